"""The dense block against stock modules: outputs, every gradient, running statistics, and what runs where."""

import copy
import functools
import itertools

import checks
import pytest
import torch
import torch.nn.functional as F
from checks import DTYPES, LAYOUTS, assert_accurate, assert_same_bits, place
from dense_blocks import BLOCKS, SMALL_BLOCKS, assert_shared, block_input, case_id, reference_stages, twins
from fused_checks import assert_repeats, assert_same_results, compare, compare_draws, memory_formats, run
from torch import nn

import gconv
from gconv import dense_block as dense_module
from gconv import dense_stages, pointwise_conv
from gconv.functional import dense_block

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

blocks = pytest.mark.parametrize("case", BLOCKS, ids=case_id)
small_blocks = pytest.mark.parametrize("case", SMALL_BLOCKS, ids=case_id)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@blocks
@modes
@pytest.mark.parametrize("dtype", [torch.float32], ids=checks.dtype_name)
def test_every_result_in_float32(isa, case, training, dtype):
    """Three steps: running statistics move once in each."""
    shape, options, size = case
    stock, ours = twins(str(case), *shape, training=training, **options)
    got = compare(stock, ours, block_input(stock, size, str(case)), None, steps=3, key=str(case))
    assert_shared(3)
    assert all(got[name] is not None for name in got if name != "dresidual")
    assert all(int(got[n]) == 3 * training for n in got if n.endswith("num_batches_tracked"))


@blocks
@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=checks.dtype_name)
def test_what_is_kept_does_not_change_a_bit(ops, case, training, dtype):
    shape, options, size = case
    results = []
    for memory in ("shared", "ultra"):
        _, ours = twins(str(case), *shape, training=training, memory=memory, **options)
        x = torch.randn(size[0], shape[0], *size[1:], generator=checks.generator("kept", size))
        ours, x = ours.to(dtype), x.to(dtype)
        dz = torch.randn(copy.deepcopy(ours)(x).shape, generator=checks.generator("kept dz", size))
        results.append(run(ours, x.requires_grad_(), dz, None))
    assert_same_results(*results)


@functools.cache
def drawn(i, draw, dtype, training):
    """(stock, ours, x) of SMALL_BLOCKS[i]"""
    shape, options, size = case = SMALL_BLOCKS[i]
    key = (str(case), draw)
    stock, ours = twins(key, *shape, training=training, **options)
    return stock, ours, block_input(stock, size, key, dtype)


def draws(case, dtype, training):
    """(stock, ours, x) with other weights and inputs each time."""
    for draw in range(8):
        yield copy.deepcopy(drawn(SMALL_BLOCKS.index(case), draw, dtype, training))


@small_blocks
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=checks.dtype_name)
@modes
def test_every_result_in_low_precision(ops, case, dtype, training):
    low = [(stock.to(dtype), ours.to(dtype), x) for stock, ours, x in draws(case, dtype, training)]
    compare_draws(low, dtype)
    assert_shared()


@small_blocks
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=checks.dtype_name)
@modes
def test_autocast(ops, case, dtype, training):
    """x as a layer before would leave it."""
    got = compare_draws(list(draws(case, dtype, training)), dtype, autocast=dtype)
    assert got["z"].dtype == dtype and got["dlayers.0.conv1.weight"].dtype == torch.float32
    assert_shared()


def test_autocast_of_a_float32_input(ops):
    """The block computes in autocast's dtype throughout; gradients come back in float32."""
    stock, ours = twins("autocast", 6, 4, 3, width=8, end=7)
    x = block_input(stock, (2, 4, 6), "autocast")
    gconv.backend.reset_counts()
    with torch.autocast("cpu", torch.bfloat16):
        want, got = stock(x), ours(x)
    assert_shared()
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    got.float().sum().backward()
    assert x.grad.dtype == torch.float32 and ours.conv.weight.grad.dtype == torch.float32


# --------------------------------------------------------------------------------- the algebra, in float64


@pytest.fixture
def exact_stages(monkeypatch):
    """The stages on references, taking float64, in the place of the kernels."""
    reference_stages(monkeypatch)


def other_norms(block):
    """eps and momentum of their own."""
    for i, (_, norm) in enumerate(block.all_pairs()):
        norm.eps, norm.momentum = 10.0 ** -(2 + i % 4), 0.1 * (i + 1)


def freeze_some(block):
    """The first normalisation of one layer, the second of another, that of the end."""
    block.layers[1].norm1.eval()
    block.layers[2].norm2.eval()
    if block.norm is not None:
        block.norm.eval()


# name: (options, training, what is done to a block)
SETTINGS = {
    "train": ({}, True, None),
    "eps and momentum": ({}, True, other_norms),
    "cumulative": ({"momentum": None}, True, None),
    "momentum 0": ({"momentum": 0.0}, True, None),
    "untracked": ({"track_running_stats": False}, True, None),
    "untracked, eval": ({"track_running_stats": False}, False, None),
    "plain": ({"affine": False}, True, None),
    "plain, untracked": ({"affine": False, "track_running_stats": False}, True, None),
    "plain, eval": ({"affine": False}, False, None),
    "eval": ({}, False, None),
    "some in eval": ({}, True, freeze_some),
    "frozen": ({"frozen": True}, True, None),
    "dropout": ({"dropout": 0.2}, True, None),
    "dropout, eval": ({"dropout": 0.2}, False, None),
    "dropout of all": ({"dropout": 1.0}, True, None),
    "dropout, some in eval": ({"dropout": 0.5}, True, freeze_some),
}
settings = pytest.mark.parametrize("setting", SETTINGS)
ends = pytest.mark.parametrize("end", [11, "relu", None], ids=["pool", "relu", "buffer"])


@pytest.fixture
def same_masks(monkeypatch):
    """Dropout that keeps the same in every precision, by the sizes alone."""

    def noise(shape, p):
        return torch.rand(shape, generator=checks.generator("dropout", tuple(shape))) >= p

    def dropout(h, p, training=True):
        return h * noise(h.shape, p) * (1 / (1 - p) if p < 1 else 0.0) if training else h

    def kept(x, layer):
        shape = (x.shape[0], layer.growth, *x.shape[2:])
        return noise(shape, layer.dropout).contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(dense_module, "_noise", kept)


def in_setting(setting, end, memory="shared", draw=0):
    """(stock, ours, their input)"""
    options, training, change = SETTINGS[setting]
    key = (end, draw)
    pair = twins(key, 6, 4, 4, width=16, end=end, training=training, memory=memory, **options)
    for block in pair if change is not None else ():
        change(block)
    return *pair, block_input(pair[0], (4, 6, 8), key)


@checks.one_thread()
def assert_same_algebra(stock, ours, x, steps=3):
    """Every result of `steps` steps in float64, each on another input: the error relative to its norm."""
    stock, ours = stock.double(), ours.double()
    leaves = [x.detach().double().requires_grad_() for _ in range(2)]
    gconv.backend.reset_counts()
    shape = copy.deepcopy(stock)(leaves[0]).shape
    dz = torch.randn(shape, dtype=torch.float64, generator=checks.generator("errors", tuple(shape)))
    errors = {}
    for step in range(steps):
        with torch.no_grad():
            for leaf in leaves:
                leaf.mul_(1.25).add_(0.1 * step)
        want, got = (run(block, leaf, dz, None) for block, leaf in zip((stock, ours), leaves))
        for name, value in want.items():
            if value is None:
                assert got[name] is None, name
            elif not value.is_floating_point():
                assert torch.equal(got[name], value), name
            else:
                error = (got[name] - value).norm() / max(value.norm(), 1e-30)
                errors[name] = max(errors.get(name, 0.0), error.item())
    assert_shared(steps)
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-10, f"error of {worst}: {errors[worst]:.1e}"


@settings
@ends
def test_algebra_in_float64(exact_stages, same_masks, setting, end):
    memory = checks.rotate(("shared", "ultra"), setting, end)
    assert_same_algebra(*in_setting(setting, end, memory))


@blocks
@modes
def test_algebra_of_every_shape(exact_stages, case, training):
    shape, options, size = case
    pair = twins(str(case), *shape, training=training, **options)
    assert_same_algebra(*pair, block_input(pair[0], size, str(case)), steps=1)


@settings
def test_every_setting_in_float32(ops, same_masks, setting):
    """Several draws together: sums over which terms cancel are right by luck in some."""
    end = checks.rotate((11, "relu", None), setting)
    compare_draws([in_setting(setting, end, draw=draw) for draw in range(3)], torch.float32, steps=3)
    assert_shared(3)


# ------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("p", [0.4, 1.0])
def test_dropout_draws_as_stock_does(ops, p):
    """The same state of the generator drops the same values, as by channels_last modules of torch's."""
    stock, ours = twins("dropout draws", 6, 5, 3, width=8, dropout=p)
    x = torch.randn(3, 6, 7, 5).to(memory_format=torch.channels_last)
    outputs = []
    for block in (stock.to(memory_format=torch.channels_last), ours):
        torch.manual_seed(7)
        outputs.append(block(x))
        outputs.append(torch.rand(3))
    want, state, got, our_state = outputs
    dropped = want[:, 6:] == 0
    assert abs(dropped.float().mean() - p) < 0.1
    assert torch.equal(got[:, 6:] == 0, dropped)
    assert torch.equal(our_state, state)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_dropout_in_low_precision_keeps_what_it_kept_in_float32(ops):
    """The backward drops what the forward dropped: nothing flows to a layer through a dropped value."""
    _, ours = twins("dropout low", 4, 3, 1, dropout=0.5)
    x = torch.randn(2, 4, 5, 5).bfloat16()
    z = ours.to(torch.bfloat16)(x)
    dropped = z[:, 4:] == 0
    weight = ours.layers[0].conv1.weight
    (none,) = torch.autograd.grad(z, weight, torch.cat((z[:, :4], dropped.bfloat16()), 1), retain_graph=True)
    (some,) = torch.autograd.grad(z, weight, torch.cat((z[:, :4], (~dropped).bfloat16()), 1))
    assert dropped.any() and not none.any() and some.any()


# ----------------------------------------------------------------------------------- layouts, formats, bits


@memory_formats
@modes
def test_memory_format_follows_torchs_rule(ops, x_format, weight_format, training):
    for case in (BLOCKS[0], BLOCKS[2], BLOCKS[4]):
        shape, options, size = case
        stock, ours = twins("format", *shape, training=training, **options)
        for block in (stock, ours):
            block.to(memory_format=weight_format)
        x = torch.randn(size[0], shape[0], *size[1:]).contiguous(memory_format=x_format)
        for context in (torch.no_grad(), torch.enable_grad()):
            with context:
                z = ours(x)
            last = torch.channels_last in (x_format, weight_format)
            assert z.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        z.sum().backward()
        for name, parameter in ours.named_parameters():
            assert parameter.grad.shape == parameter.shape, name
        assert ours.layers[0].conv1.weight.grad.is_contiguous(memory_format=weight_format)


def test_layout_of_input_does_not_change_a_bit(isa):
    for case in (BLOCKS[1], BLOCKS[2], BLOCKS[4]):
        shape, options, size = case
        _, ours = twins("layouts", *shape, **options)
        values = torch.randn(size[0], shape[0], *size[1:], generator=checks.generator("layouts"))
        dz = torch.randn_like(ours(values))
        results = [
            run(copy.deepcopy(ours), place(values, layout).requires_grad_(), place(dz, layout), None)
            for layout in LAYOUTS
        ]
        for other, layout in zip(results[1:], LAYOUTS[1:], strict=True):
            assert_same_results(other, results[0], layout)


@pytest.mark.parametrize("end", [11, "relu", None], ids=["pool", "relu", "buffer"])
def test_gradient_of_stride_0(ops, end):
    stock, ours = twins("stride 0", 6, 4, 2, width=8, end=end)
    x = block_input(stock, (2, 5, 6), "stride 0")
    shape = copy.deepcopy(ours)(x).shape
    ones = run(copy.deepcopy(ours), x, torch.ones(shape), None)
    expanded = run(copy.deepcopy(ours), x, torch.ones(()).expand(shape), None)
    assert_same_results(expanded, ones)


@pytest.mark.parametrize("memory", ["shared", "ultra"])
@pytest.mark.parametrize("end", [24, "relu"], ids=["pool", "relu"])
def test_bits_repeat_for_any_number_of_threads(isa, threads, memory, end):
    _, ours = twins("threads", 24, 12, 3, width=48, end=end, memory=memory)
    gen = checks.generator("threads")
    x = torch.randn(3, 24, 21, 18, generator=gen).requires_grad_()
    dz = torch.randn(copy.deepcopy(ours)(x).shape, generator=gen)
    assert_repeats(threads, lambda: run(copy.deepcopy(ours), x, dz, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
@modes
def test_without_gradient_gives_the_same(ops, dtype, training):
    for shape, options, size in (BLOCKS[0], BLOCKS[2], BLOCKS[4]):
        _, ours = twins("no grad", *shape, training=training, **options)
        x = torch.randn(size[0], shape[0], *size[1:], generator=checks.generator("no grad")).to(dtype)
        copies = [copy.deepcopy(ours).to(dtype) for _ in range(3)]
        z = copies[0](x)
        tolerance = 1e-5 if dtype is torch.float32 else 16 * torch.finfo(dtype).eps
        for block, context in zip(copies[1:], (torch.no_grad(), torch.inference_mode()), strict=True):
            with context:
                torch.testing.assert_close(block(x), z.detach(), rtol=tolerance, atol=tolerance)
            for (name, got), want in zip(block.named_buffers(), copies[0].buffers(), strict=True):
                assert torch.equal(got, want), name


def test_a_constant_shift_shows_in_padding(isa):
    """A padded tap of the 3x3 convolution is 0, never relu(shift): with x = 0 and a shift of 3 the border
    sees fewer taps than the middle."""
    for width in (4, None):
        stock, ours = twins("padding", 8, 8, 2, width=width, groups=2, training=False)
        for block in (stock, ours):
            for _, norm in block.all_pairs():
                nn.init.constant_(norm.bias, 3.0)
                nn.init.zeros_(norm.running_mean)
        x = torch.zeros(1, 8, 5, 5)
        for context in (torch.no_grad(), torch.enable_grad()):
            with context:
                exact = copy.deepcopy(stock).double()(x.double())
                assert_accurate(ours(x).detach(), exact, stock(x).detach(), "z")


def test_training_with_large_shifts(ops):
    """The same in training, and for the gradients of the border."""
    stock, ours = twins("shifts", 6, 4, 3, width=8, end="relu")
    for block in (stock, ours):
        for _, norm in block.all_pairs():
            nn.init.constant_(norm.bias, 3.0)
    compare(stock, ours, block_input(stock, (2, 5, 4), "shifts"), None, key="shifts")
    assert_shared()


# ---------------------------------------------------------------------------------------- what is asked for

PARTS = (
    "x", "layers.0.conv1.weight", "layers.0.conv2.weight", "layers.1.conv1.weight", "layers.2.conv2.weight",
    "conv.weight", "layers.0.norm1", "layers.0.norm2", "layers.1.norm1", "layers.2.norm2", "norm",
)  # fmt: skip
SEVERAL = (
    ("x", "layers.1.norm2"), ("layers.0.conv1.weight", "norm"), ("layers.1", "layers.2", "norm", "conv"),
    ("layers.0",), ("norm.bias",), ("layers.1.norm1.weight",),
)  # fmt: skip


@pytest.mark.parametrize("kept", [*[(part,) for part in PARTS], *SEVERAL], ids="+".join)
@pytest.mark.parametrize("memory", ["shared", "ultra"])
@modes
def test_only_what_is_wanted(ops, monkeypatch, kept, training, memory):
    """Everything but `kept` is frozen: what is wanted is right, the rest gets no gradient, and no weight
    gradient is computed that nobody wants."""
    stock, ours = twins("wanted", 6, 4, 3, width=8, end=10, training=training, memory=memory)
    x = block_input(stock, (2, 5, 6), "wanted").requires_grad_("x" in kept)
    for block in (stock, ours):
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(any(name == part or name.startswith(part + ".") for part in kept))
    asked = []
    for module, name in ((dense_stages, "bwd"), (pointwise_conv, "bwd"),
                         (pointwise_conv, "bwd_add")):  # fmt: skip
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, real=real: asked.append(args[-2]) or real(*args)
        )  # fmt: skip
    got = compare(stock, ours, x, None, key=("wanted", kept))
    assert_shared()
    assert (got["dx"] is not None) == ("x" in kept)
    for name, parameter in ours.named_parameters():
        assert (got[f"d{name}"] is not None) == parameter.requires_grad, name
    convolutions = [name for name, p in ours.named_parameters() if p.dim() == 4 and p.requires_grad]
    assert sum(asked) == len(convolutions), asked


def test_nothing_is_kept_where_nothing_needs_a_gradient(ops, monkeypatch):
    """Grad mode alone is no reason to save: in eval the second normalisations are folded, too."""
    stock, ours = twins("fold", 6, 4, 3, width=8, end=10, training=False)
    x = block_input(stock, (2, 5, 6), "fold").detach()
    ours.requires_grad_(False)
    monkeypatch.setattr(dense_module, "forward_stages", None)
    z = ours(x)
    assert not z.requires_grad and z.grad_fn is None
    torch.testing.assert_close(z, stock(x).detach(), rtol=1e-5, atol=1e-5)


def test_training_without_any_gradient_keeps_nothing(ops):
    stock, ours = twins("no gradient", 6, 4, 3, width=8, end=10)
    x = block_input(stock, (2, 5, 6), "fold").detach()
    got = compare(stock.requires_grad_(False), ours.requires_grad_(False), x, None)
    assert not any(got[name] is not None for name in got if name.startswith("d"))
    assert ours(x).grad_fn is None


def test_the_buffer_changed_in_place_raises(ops):
    _, ours = twins("in place", 6, 4, 2, width=8)
    x = torch.randn(2, 6, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    z = ours(x)
    z.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
    z = ours(x)
    with torch.no_grad():
        z.relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_the_input_changed_in_place_is_none_of_the_backwards_business(ops):
    _, ours = twins("in place x", 6, 4, 2, width=8, end="relu")
    x = torch.randn(2, 6, 5, 5)
    results = []
    for change in (False, True):
        leaf = x.clone().requires_grad_()
        z = copy.deepcopy(ours)(leaf)
        if change:
            leaf.data.zero_()
        z.square().sum().backward()
        results.append(leaf.grad)
    assert_same_bits(*results)


# -------------------------------------------------------------------------------------------- what runs where


def rows_of(block, x):
    with gconv.set_policy("silent"), gconv.trace() as t:
        z = block(x)
    return z, [(row.kernel, row.reason) for row in t]


UNSHARED = {
    "hook": (lambda b: b.layers[0].norm2.register_forward_hook(lambda *_: None), "layer 0: bn: has hooks"),
    "bias": (
        lambda b: setattr(b.layers[1], "conv1", nn.Conv2d(10, 8, 1)),
        "layer 1: conv: has a bias",
    ),
    "padding mode": (
        lambda b: setattr(b.layers[0].conv2, "padding_mode", "circular"),
        "layer 0: conv: stride (1, 1), padding (1, 1) with circular",
    ),
    "kernel": (
        lambda b: setattr(b.layers[0], "conv2", nn.Conv2d(8, 4, 5, padding=2, bias=False)),
        "layer 0: conv: want a 3x3 kernel, got 5x5",
    ),
    "parametrized": (
        lambda b: nn.utils.parametrizations.spectral_norm(b.layers[0].conv2),
        "layer 0: conv: want Conv2d, got ParametrizedConv2d",
    ),
    "groups of a 1x1": (
        lambda b: setattr(b.layers[0], "conv1", nn.Conv2d(6, 8, 1, groups=2, bias=False)),
        "layer 0: conv: 2 groups",
    ),
    "transition": (
        lambda b: setattr(b, "conv", nn.Conv2d(14, 10, 3, padding=1, bias=False)),
        "transition: conv: want a 1x1 kernel, got 3x3",
    ),
    "replaced": (
        lambda b: setattr(b.norm, "forward", nn.BatchNorm2d(14).forward),
        "transition: bn: its forward is replaced",
    ),
    "mixed vectors": (
        lambda b: b.norm.double(),
        "an empty batch or uncommon parameters of a normalisation",
    ),
    "memory": (lambda b: setattr(b, "memory", "naive"), "memory='naive'"),
}


@pytest.mark.parametrize("kind", UNSHARED)
def test_what_cannot_be_shared_runs_as_modules_and_says_so(ops, kind):
    change, reason = UNSHARED[kind]
    stock, ours = twins("unshared", 6, 4, 2, width=8, end=10)
    for block in (stock, ours):
        torch.manual_seed(0)
        change(block)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 6, 5, 6)
    if kind == "mixed vectors":
        with pytest.raises(RuntimeError):
            stock(x)
        with gconv.set_policy("silent"), gconv.trace() as t, pytest.raises(RuntimeError):
            ours(x)
        assert [(row.kernel, row.reason) for row in t] == [("modules", f"called one by one: {reason}")]
        return
    z, calls = rows_of(ours, x)
    assert calls[0] == ("modules", f"called one by one: {reason}")
    assert "cpu.dense_block" not in [kernel for kernel, _ in calls]
    torch.testing.assert_close(z, stock(x), rtol=1e-4, atol=1e-4)


@modes
def test_an_empty_batch_is_stocks(ops, training):
    blocks = twins("empty", 6, 4, 2, width=8, end="relu", training=training)
    want, got = (block(torch.empty(0, 6, 5, 5)) for block in blocks)
    assert got.shape == want.shape
    for a, b in zip(*(block.buffers() for block in blocks), strict=True):
        assert torch.equal(a, b)


def test_float64_and_the_torch_backend_run_as_modules(ops):
    stock, ours = twins("torch", 6, 4, 2, width=8, end=10)
    x = block_input(stock, (2, 5, 6), "torch").detach()
    with gconv.use_backend("torch"):
        z, calls = rows_of(ours, x)
    assert calls == [("modules", "called one by one: use_backend('torch')")]
    torch.testing.assert_close(z, stock(x), rtol=1e-4, atol=1e-4)
    z, calls = rows_of(ours.double(), x.double())
    assert calls[0][1].startswith("called one by one: dtype: want float32, bfloat16 or float16, got float64")
    torch.testing.assert_close(z, copy.deepcopy(stock).double()(x.double()))


def test_explain_shows_one_call_and_changes_nothing(ops):
    _, ours = twins("explain", 6, 4, 2, width=8, end=10)
    before = copy.deepcopy(ours.state_dict())
    rows = list(gconv.explain(ours, (2, 6, 5, 6)))
    assert [row.kernel for row in rows] == ["cpu.dense_block"]
    for name, value in ours.state_dict().items():
        assert_same_bits(value, before[name], name)


# ---------------------------------------------------------------------------------------- the functional form


def functional(block):
    """`layers` and `transition` of the functional form."""
    layers = [
        tuple(itertools.chain(*((norm, conv.weight) for conv, norm in layer.pairs())))
        for layer in block.layers
    ]
    end = block.transition()
    return layers, end if end is None or end[1] is None else (end[0], end[1].weight)


@pytest.mark.parametrize("case", [BLOCKS[i] for i in (0, 2, 3, 4)], ids=case_id)
@modes
def test_functional_form(ops, case, training):
    shape, options, size = case
    stock, ours = twins("functional", *shape, training=training, **options)
    x = block_input(stock, size, "functional").detach()
    naive, ref = copy.deepcopy(ours), copy.deepcopy(ours)
    want = stock(x)
    gconv.backend.reset_counts()
    got = dense_block(x, *functional(ours))
    assert_shared()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dense_block(x, *functional(naive), memory="naive"), want)
    layers, end = functional(ref)
    layers = [dense_module.Layer(layer[::2], layer[1::2]) for layer in layers]
    torch.testing.assert_close(dense_module.dense_block_ref(x, layers, end), want)
    for block in (ours, naive, ref):
        for (name, value), other in zip(block.named_buffers(), stock.buffers(), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5, msg=name)


def test_functional_form_refuses(ops):
    _, ours = twins("refuse", 6, 4, 2, width=8, end=10)
    layers, end = functional(ours)
    first, second = layers
    x = torch.randn(2, 6, 5, 5)
    before = copy.deepcopy(ours.state_dict())
    for change, words in (
        ({"memory": "less"}, "memory: want shared, ultra or naive, got 'less'"),
        ({"layers": []}, "layers: want at least one layer, got none"),
        ({"layers": [first[:3], second]}, r"layers: 0: want \(bn, weight\) or .*, got 3 items"),
        ({"dropout": 1.5}, "dropout: want a probability, got 1.5"),
        ({"dropout": -0.1}, "dropout: want a probability, got -0.1"),
        ({"x": [1.0]}, "x: want a tensor, got list"),
        ({"layers": [(first[0], 3), second]}, "weight: want a tensor, got int"),
        ({"x": x[:1, :, :1, :1], "transition": None}, "more than 1 value per channel"),
    ):
        with pytest.raises(ValueError, match=f"dense_block: .*{words}"):
            dense_block(**{"x": x, "layers": layers, "transition": end, **change})
    for change in (
        {"x": x[:, :5]},
        {"layers": [second, first]},
        {"x": x.bfloat16()},
        {"x": x[0]},
        {"transition": (end[0], end[1][:, :9])},
    ):  # fmt: skip
        with gconv.set_policy("silent"), pytest.raises((RuntimeError, ValueError)):
            dense_block(**{"x": x, "layers": layers, "transition": end, **change})
    for name, value in ours.state_dict().items():
        if "num_batches" not in name and "running" not in name:
            assert_same_bits(value, before[name], name)


# ----------------------------------------------------------------------------------------- negative controls


def spoiled(monkeypatch, name, spoil):
    real = getattr(dense_stages, name)
    monkeypatch.setattr(dense_stages, name, lambda *args: spoil(real(*args)))


CONTROLS = {
    "a correction dropped": lambda m: m.setattr(dense_stages._Corrections, "add", lambda *args: None),
    "corrections of the next channel": lambda m: m.setattr(
        dense_stages._Corrections,
        "finish",
        lambda self, begin, end: self.table[:, begin:end].roll(1, 1).contiguous(),
    ),
    "statistics of the next channel": lambda m: spoiled(
        m, "fwd_into", lambda out: tuple(t.roll(1, 0) for t in out)
    ),
    "statistics of the input": lambda m: spoiled(m, "stats", lambda out: (out[0], out[1] * 1.01)),
    "shifted affine": lambda m: spoiled(m, "fold", lambda out: (out[0], out[1].roll(1, 1))),
    "dgamma of a bottleneck": lambda m: spoiled(m, "bwd_finish", lambda out: (*out[:2], out[2] * 1.01)),
    "gradient of the pool": lambda m: spoiled(m, "pool_bwd", lambda out: (out[0] * 1.01, out[1])),
    "shifted pixel": lambda m: spoiled(m, "bwd", lambda out: (out[0].roll(1, 3), *out[1:])),
}  # fmt: skip


@pytest.mark.parametrize("control", CONTROLS)
def test_the_comparison_would_notice(ops, monkeypatch, control):
    shape, options, size = BLOCKS[0]
    stock, ours = twins("control", *shape, **options)
    x = block_input(stock, size, "control")
    CONTROLS[control](monkeypatch)
    with pytest.raises(AssertionError, match="error"):
        compare(stock, ours, x, None, key="control")


def test_the_algebra_would_notice(exact_stages, same_masks, monkeypatch):
    monkeypatch.setattr(dense_stages._Corrections, "add", lambda *args: None)
    with pytest.raises(AssertionError, match="error of"):
        assert_same_algebra(*in_setting("train", 11))
