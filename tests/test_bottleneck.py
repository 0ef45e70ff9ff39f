"""The bottleneck chain against stock modules: outputs, every gradient, running statistics, and what runs
where."""

import copy
import itertools

import checks
import pytest
import torch
from bottleneck_blocks import BLOCKS, SMALL_BLOCKS, assert_chained, block_input, twins
from checks import DTYPES, LAYOUTS, assert_accurate, assert_same_bits, place
from fused_checks import assert_repeats, assert_same_results, compare, compare_draws, memory_formats, run
from torch import nn
from torch.library import opcheck

import gconv
from gconv import bottleneck as chain_module
from gconv import pointwise_conv
from gconv.functional import bottleneck

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@pytest.fixture(autouse=True)
def bfloat16_on_our_kernels(monkeypatch):
    """On every CPU: where it has AMX, "auto" leaves 1x1 convolutions to torch."""
    monkeypatch.setattr(gconv.backend, "POINTWISE_BFLOAT16_TO_TORCH", False)


blocks = pytest.mark.parametrize("case", BLOCKS, ids=lambda c: "-".join(map(str, c[0])))
small_blocks = pytest.mark.parametrize("case", SMALL_BLOCKS, ids=lambda c: "-".join(map(str, c[0])))
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def draws(case, dtype, training):
    """(stock, ours, x) with other weights and inputs each time."""
    channels, options, size = case
    for draw in range(8):
        key = (str(case), draw)
        stock, ours = twins(key, channels, training=training, **options)
        yield stock, ours, block_input(stock, size, key, dtype)


@blocks
@modes
def test_every_result_in_float32(isa, case, training):
    got = compare_draws(draws(case, torch.float32, training), torch.float32)
    assert_chained()
    assert all(got[name] is not None for name in got if name not in ("dresidual",))
    assert all(int(got[n]) == training for n in got if n.endswith("num_batches_tracked"))


@small_blocks
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=checks.dtype_name)
@modes
def test_every_result_in_low_precision(ops, case, dtype, training):
    low = [(stock.to(dtype), ours.to(dtype), x) for stock, ours, x in draws(case, dtype, training)]
    compare_draws(low, dtype)
    assert_chained()


@small_blocks
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=checks.dtype_name)
@modes
def test_autocast(ops, case, dtype, training):
    """x as a layer before would leave it."""
    got = compare_draws(list(draws(case, dtype, training)), dtype, autocast=dtype)
    assert got["z"].dtype == dtype and got["dconv2.weight"].dtype == torch.float32
    assert_chained()


@modes
def test_a_shortcut_that_is_given(ops, training):
    for case in (BLOCKS[1], BLOCKS[6]):
        channels, options, size = case
        stock, ours = twins(str(case), channels, training=training, **options)
        x = block_input(stock, size, str(case))
        residual = torch.randn(x.shape, generator=checks.generator("shortcut")).requires_grad_()
        got = compare(stock, ours, x, residual, key=("given", str(case)))
        assert got["dresidual"].abs().max() > 0
        assert_chained()


BN_OPTIONS = (
    {"momentum": None}, {"momentum": 0.0}, {"momentum": 1.0}, {"affine": False}, {"eps": 0.1},
    {"track_running_stats": False}, {"affine": False, "track_running_stats": False},
    {"affine": False, "momentum": None},
)  # fmt: skip


@pytest.mark.parametrize("options", BN_OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()))
@modes
def test_batch_norm_options(ops, options, training):
    """Three steps, so that the running statistics move by their rule more than once."""
    for case in (BLOCKS[1], BLOCKS[3]):
        channels, kwargs, size = case
        stock, ours = twins(str(case), channels, training=training, **kwargs, **options)
        x = block_input(stock, size, (str(case), str(options)))
        compare(stock, ours, x, None, steps=3, key=str(case))
        assert_chained(3)


NORMS = ("bn1", "bn2", "bn3", "downsample.1")


@pytest.mark.parametrize(
    "frozen", [s for n in (1, 2, 3, 4) for s in itertools.combinations(NORMS, n)], ids="+".join
)
@pytest.mark.parametrize("kind", ["eval", "buffers"])
def test_some_normalisations_by_constants(ops, frozen, kind):
    """In eval mode inside a block that trains, or FrozenBatchNorm2d: constants in the same chain."""
    channels, options, size = BLOCKS[3]
    names = [name.partition(".")[0] for name in frozen]
    stock, ours = twins("frozen", channels, **options, frozen=names if kind == "buffers" else ())
    for block in (stock, ours):
        for name in frozen:
            block.get_submodule(name).eval()
    before = copy.deepcopy(ours.state_dict())
    compare(stock, ours, block_input(stock, size, ("frozen", frozen)), None, key="frozen")
    assert_chained()
    for name, value in ours.state_dict().items():
        if any(name.startswith(f"{part}.running") for part in frozen):
            assert_same_bits(value, before[name], name)


PARTS = ("x", "conv1.weight", "conv2.weight", "conv3.weight", "bn1", "bn2", "bn3", "downsample.0.weight",
         "downsample.1")  # fmt: skip


@pytest.mark.parametrize("down", [False, True], ids=["identity", "downsample"])
@pytest.mark.parametrize(
    "kept", [*[(part,) for part in PARTS], ("x", "bn2"), ("conv1.weight", "bn3")], ids=str
)
@modes
def test_only_what_is_wanted(ops, monkeypatch, kept, training, down):
    """Everything but `kept` is frozen: what is wanted is right, the rest gets no gradient, and no convolution
    is asked for more than is needed for it."""
    case = BLOCKS[3] if down else BLOCKS[1]
    channels, options, size = case
    if not down and any(part.startswith("downsample") for part in kept):
        pytest.skip("the block has no downsample")
    stock, ours = twins(("wanted", down), channels, training=training, **options)
    x = block_input(stock, size, ("wanted", down)).requires_grad_("x" in kept)
    for block in (stock, ours):
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(any(name == part or name.startswith(part + ".") for part in kept))
    asked = []
    for module in (chain_module, pointwise_conv):
        real = module.bwd
        monkeypatch.setattr(module, "bwd", lambda *args, real=real: asked.append(args[-3:-1]) or real(*args))
    got = compare(stock, ours, x, None, key=("wanted", kept))
    assert_chained()
    assert (got["dx"] is not None) == ("x" in kept)
    for name, parameter in ours.named_parameters():
        assert (got[f"d{name}"] is not None) == parameter.requires_grad, name
    weights = sum(part.endswith("weight") for part in kept)
    assert sum(want_weight for _, want_weight in asked) == weights
    deepest = {"x": 3, "conv1.weight": 3, "bn1": 2, "conv2.weight": 2, "bn2": 1, "conv3.weight": 1}
    wanted = max((deepest.get(part, 0) for part in kept), default=0)
    branch = any(part in ("x", "downsample.0.weight") for part in kept) and down
    assert len(asked) == wanted + branch, asked


def test_frozen_normalisations_without_gradients_take_no_sums(ops, monkeypatch):
    channels, options, size = BLOCKS[3]
    names = ("bn1", "bn2", "bn3", "downsample")
    stock, ours = twins("frozen sums", channels, frozen=names, **options)
    for name in ("bwd_reduce", "bwd_reduce_pair"):
        monkeypatch.setattr(chain_module, name, None)
    compare(stock, ours, block_input(stock, size, "frozen sums"), None, key="frozen sums")


@memory_formats
@modes
def test_memory_format_follows_torchs_rule(ops, x_format, weight_format, training):
    for case in (BLOCKS[1], BLOCKS[3]):
        channels, options, size = case
        stock, ours = twins("format", channels, training=training, **options)
        for block in (stock, ours):
            block.to(memory_format=weight_format)
        x = torch.randn(size[0], channels[0], *size[1:]).contiguous(memory_format=x_format)
        with torch.no_grad():
            assert ours(x).stride() == stock(x).stride()
        want, got = stock(x.requires_grad_()), ours(x)
        assert got.stride() == want.stride()
        want.sum().backward()
        got.sum().backward()
        for name, parameter in ours.named_parameters():
            assert parameter.grad.shape == parameter.shape, name
        assert ours.conv2.weight.grad.is_contiguous(memory_format=weight_format)


def test_layout_of_input_does_not_change_a_bit(isa):
    for case in (BLOCKS[1], BLOCKS[4]):
        channels, options, size = case
        _, ours = twins("layouts", channels, **options)
        values = torch.randn(size[0], channels[0], *size[1:], generator=checks.generator("layouts"))
        dz = torch.randn_like(ours(values))
        results = [
            run(copy.deepcopy(ours), place(values, layout).requires_grad_(), place(dz, layout), None)
            for layout in LAYOUTS
        ]
        for other, layout in zip(results[1:], LAYOUTS[1:], strict=True):
            assert_same_results(other, results[0], layout)


def test_gradient_of_stride_0(ops):
    channels, options, size = BLOCKS[3]
    _, ours = twins("stride 0", channels, **options)
    x = block_input(ours, size, "stride 0")
    shape = copy.deepcopy(ours)(x).shape
    ones = run(copy.deepcopy(ours), x, torch.ones(shape), None)
    expanded = run(copy.deepcopy(ours), x, torch.ones(()).expand(shape), None)
    assert_same_results(expanded, ones)


def test_bits_repeat_for_any_number_of_threads(isa, threads):
    _, ours = twins("threads", (64, 64, 64, 128), groups=16, stride=2, down=True)
    gen = checks.generator("threads")
    x = torch.randn(3, 64, 21, 19, generator=gen).requires_grad_()
    dz = torch.randn(3, 128, 11, 10, generator=gen)
    assert_repeats(threads, lambda: run(copy.deepcopy(ours), x, dz, None))


@modes
def test_without_gradient_gives_the_same(ops, training):
    for case in (BLOCKS[1], BLOCKS[3]):
        channels, options, size = case
        _, ours = twins("no grad", channels, training=training, **options)
        x = block_input(ours, size, "no grad")
        copies = [copy.deepcopy(ours) for _ in range(3)]
        z = copies[0](x)
        for block, context in zip(copies[1:], (torch.no_grad(), torch.inference_mode()), strict=True):
            with context:
                torch.testing.assert_close(block(x), z.detach(), rtol=1e-5, atol=1e-5)
            for (name, got), want in zip(block.named_buffers(), copies[0].buffers(), strict=True):
                assert torch.equal(got, want), name


def test_eval_without_anything_to_differentiate_folds(ops, monkeypatch):
    """Grad mode alone is no reason to keep raw outputs."""
    channels, options, size = BLOCKS[3]
    stock, ours = twins("fold", channels, training=False, **options)
    x = block_input(stock, size, "fold").detach()
    ours.requires_grad_(False)
    monkeypatch.setattr(chain_module, "apply_affine", None)
    z = ours(x)
    assert not z.requires_grad
    torch.testing.assert_close(z, stock(x).detach(), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------ what runs where


def rows_of(block, x):
    with gconv.trace() as t:
        z = block(x)
    return z, [(row.kernel, row.reason) for row in t]


def layers_reason(calls):
    assert calls[0][0] == "layers", calls
    return calls[0][1]


def spectral(block):
    nn.utils.parametrizations.spectral_norm(block.conv2)


UNCHAINED = {
    "hook": (lambda b: b.bn2.register_forward_hook(lambda *_: None), "middle: bn: has hooks"),
    "sync": (
        lambda b: setattr(b, "bn1", nn.SyncBatchNorm(16).eval()),
        "first: bn: want BatchNorm2d or FrozenBatchNorm2d, got SyncBatchNorm",
    ),
    "bias": (
        lambda b: setattr(b, "conv3", nn.Conv2d(16, 24, 1)),
        "last: conv: has a bias",
    ),
    "padding mode": (
        lambda b: setattr(b.conv2, "padding_mode", "circular"),
        "middle: conv: padding (1, 1) with circular",
    ),
    "parametrized": (spectral, "middle: conv: want Conv2d, got ParametrizedConv2d"),
    "kernel": (
        lambda b: setattr(b, "conv3", nn.Conv2d(16, 24, 3, padding=1, bias=False)),
        "convolutions that are not 1x1, 3x3 and 1x1, or do not fit together",
    ),
    "stride": (
        lambda b: (setattr(b.conv2, "stride", (3, 3)), setattr(b, "downsample", nn.MaxPool2d(1, 3))),
        "stride: want 1 or 2, got 3x3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNCHAINED)
def test_what_cannot_be_chained_runs_layer_by_layer_and_says_so(ops, kind):
    change, reason = UNCHAINED[kind]
    channels, options, size = BLOCKS[1]
    stock, ours = twins("unchained", channels, **options)
    for block in (stock, ours):
        torch.manual_seed(0)
        change(block)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(size[0], channels[0], *size[1:])

    def call(block):
        if block.downsample is not None:
            return block(x, block.downsample(x))
        return block(x)

    with gconv.set_policy("silent"), gconv.trace() as t:
        z = call(ours)
    calls = [(row.kernel, row.reason) for row in t]
    assert layers_reason(calls) == f"layer by layer: {reason}"
    assert "cpu.bottleneck" not in [kernel for kernel, _ in calls]
    torch.testing.assert_close(z, call(stock), rtol=1e-4, atol=1e-4)


@modes
def test_an_empty_batch_is_stocks(ops, training):
    channels, options, size = BLOCKS[3]
    blocks = twins("empty", channels, training=training, **options)
    x = torch.empty(0, channels[0], *size[1:])
    want, got = (block(x) for block in blocks)
    assert got.shape == want.shape
    for a, b in zip(*(block.buffers() for block in blocks), strict=True):
        assert torch.equal(a, b)


def test_float64_and_the_torch_backend_run_layer_by_layer(ops):
    channels, options, size = BLOCKS[3]
    stock, ours = twins("torch", channels, **options)
    x = block_input(stock, size, "torch").detach()
    with gconv.use_backend("torch"):
        z, calls = rows_of(ours, x)
    assert layers_reason(calls) == "layer by layer: use_backend('torch')"
    assert not any(kernel.startswith("cpu.") for kernel, _ in calls)
    torch.testing.assert_close(z, stock(x), rtol=1e-4, atol=1e-4)
    with gconv.set_policy("silent"):
        z, calls = rows_of(ours.double(), x.double())
    assert layers_reason(calls) == "layer by layer: dtype: want float32, bfloat16 or float16, got float64"
    torch.testing.assert_close(z, copy.deepcopy(stock).double()(x.double()))


def test_wide_dense_blocks_are_torchs_by_design(ops):
    _, ours = twins("dense", (8, 384, 384, 8), training=False)
    _, calls = rows_of(ours, torch.randn(1, 8, 4, 4))
    assert layers_reason(calls) == "layer by layer: by design: torch runs dense convolutions"


def test_bfloat16_is_torchs_where_the_cpu_multiplies_it(ops, monkeypatch):
    monkeypatch.setattr(gconv.backend, "POINTWISE_BFLOAT16_TO_TORCH", True)
    channels, options, size = BLOCKS[3]
    _, ours = twins("bfloat16", channels, training=False, **options)
    x = torch.randn(size[0], channels[0], *size[1:]).bfloat16()
    reason = "by design: torch runs 1x1 convolutions of bfloat16 on this CPU"
    assert layers_reason(rows_of(ours.bfloat16(), x)[1]) == f"layer by layer: {reason}"
    with gconv.use_backend("cpu"):
        assert [kernel for kernel, _ in rows_of(ours, x)[1]] == ["cpu.bottleneck"]


def test_explain_shows_the_chain(ops):
    channels, options, size = BLOCKS[3]
    _, ours = twins("explain", channels, **options)
    before = copy.deepcopy(ours.state_dict())
    rows = list(gconv.explain(ours, (size[0], channels[0], *size[1:])))
    assert [row.kernel for row in rows] == ["cpu.bottleneck"]
    for name, value in ours.state_dict().items():
        assert_same_bits(value, before[name], name)


def test_a_refused_call_changes_no_state(ops):
    channels, options, size = BLOCKS[1]
    _, ours = twins("refused", channels, **options)
    before = copy.deepcopy(ours.state_dict())
    x = torch.randn(size[0], channels[0], *size[1:])
    with pytest.raises(ValueError, match="residual: want"):
        ours(x, x[..., :-1])
    with pytest.raises((ValueError, RuntimeError)):
        ours(x[:, :-1])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ours(x[:1, :, :1, :1])
    for name, value in ours.state_dict().items():
        assert_same_bits(value, before[name], name)


# ---------------------------------------------------------------------------------------- the functional form


@pytest.mark.parametrize("shortcut", ["x", "given", "down"])
@modes
def test_functional_form(ops, shortcut, training):
    channels, options, size = BLOCKS[3] if shortcut == "down" else BLOCKS[1]
    stock, ours = twins("functional", channels, training=training, **options)
    x = block_input(stock, size, "functional").detach()
    residual = torch.randn(x.shape) if shortcut == "given" else None
    want = stock(x, residual)
    weights, norms = zip(*((conv.weight, bn) for conv, bn in ours.all_pairs()))
    down = (weights[3], norms[3]) if shortcut == "down" else None
    conf = (options.get("stride", 1), 1, 1, options["groups"])
    gconv.backend.reset_counts()
    got = bottleneck(x, weights[:3], norms[:3], *conf, down, residual)
    assert_chained()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    ref = chain_module.bottleneck_ref(x, weights[:3], norms[:3], *conf, down, residual)
    torch.testing.assert_close(ref, want)


def test_functional_form_refuses(ops):
    _, ours = twins("refuse", (16, 8, 8, 16))
    weights, norms = zip(*((conv.weight, bn) for conv, bn in ours.pairs()))
    x = torch.randn(2, 16, 5, 5)
    for change, words in (
        ({"weights": weights[:2]}, "weights: want three, got 2"),
        ({"bns": norms[:2]}, "bns: want three, got 2"),
        ({"weights": (weights[0], 3, weights[2])}, "weight: want a tensor, got int"),
        ({"stride": 0}, "stride: want at least 1, got"),
        ({"groups": 1.5}, "groups: want an int of at least 1, got 1.5"),
        ({"groups": 2}, "groups"),
        ({"stride": 2}, r"x: want \[2, 16, 3, 3\] as the output, got \[2, 16, 5, 5\]"),
        ({"residual": x, "downsample": (weights[2], norms[2])}, "either downsample or residual, got both"),
        ({"residual": x.double()}, "residual: want dtype"),
        ({"x": x[:, :5]}, "weight"),
        ({"x": x[0]}, "x: want"),
    ):
        with pytest.raises(ValueError, match=words):
            bottleneck(**{"x": x, "weights": weights, "bns": norms, **change})


# ----------------------------------------------------------------------------------------- negative controls


@pytest.mark.parametrize(
    "name, spoil",
    [
        ("bwd_finish", lambda out: (out[0] * 1.01, *out[1:])),
        ("bwd_finish", lambda out: (*out[:2], out[2] * 1.01)),
        ("bwd_reduce_pair", lambda out: (*out[:4], out[3], out[5])),
        ("bwd", lambda out: (out[0].roll(1, 3), *out[1:])),
        ("apply_affine", lambda z: z * 1.01),
        ("fold", lambda out: (out[0], out[1].roll(1, 1))),
    ],
    ids=["dgamma", "finish", "swapped branches", "shifted pixel", "output", "shifted affine"],
)
def test_the_comparison_would_notice(ops, monkeypatch, name, spoil):
    channels, options, size = BLOCKS[3]
    stock, ours = twins("control", channels, **options)
    x = block_input(stock, size, "control")
    real = getattr(chain_module, name)
    monkeypatch.setattr(chain_module, name, lambda *args: spoil(real(*args)))
    with pytest.raises(AssertionError, match="error"):
        compare(stock, ours, x, None, key="control")


def test_a_constant_shift_shows_in_padding(ops):
    """A padded tap of the 3x3 convolution is 0, never relu(shift): with x = 0 and a shift of 3 the border
    sees fewer taps than the middle."""
    stock, ours = twins("padding", (8, 8, 8, 8), groups=2, training=False)
    for block in (stock, ours):
        nn.init.constant_(block.bn1.bias, 3.0)
        nn.init.zeros_(block.bn1.running_mean)
    x = torch.zeros(1, 8, 5, 5)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            assert_accurate(
                ours(x).detach(), copy.deepcopy(stock).double()(x.double()), stock(x).detach(), "z"
            )


# ---------------------------------------------------------------------------------------------- the joint op


def joint_arguments(down=False, given=False, moving=True):
    """By name, as of bottleneck_fwd_train."""
    torch.manual_seed(0)
    widths, x = (8, 12, 20), torch.randn(2, 6, 5, 7)
    sizes = [(8, 6, 1, 1), (12, 4, 3, 3), (20, 12, 1, 1)]
    if down:
        widths, sizes = (*widths, 20), [*sizes, (20, 6, 1, 1)]
    norms = [[torch.rand(k) + 0.5 for k in widths] for _ in range(2)]
    running = [t for k in widths for t in (torch.zeros(k), torch.ones(k), torch.tensor(3))]
    stride = [2, 2] if down else [1, 1]
    return {
        "x": x.contiguous(memory_format=torch.channels_last),
        "residual": torch.randn(2, 20, 5, 7) if given else None,
        "weights": [torch.randn(size) for size in sizes],
        "gammas": [norms[0][0], None, *norms[0][2:]], "betas": [*norms[1][:2], None, *norms[1][3:]],
        "eps": [1e-5] * len(widths), "first": [1, 1], "stride": stride, "padding": [1, 1],
        "dilation": [1, 1], "groups": 2, "last": [1, 1], "down": stride if down else [],
        "running": running if moving else [], "momenta": [0.1] * len(widths) if moving else [],
    }  # fmt: skip


@pytest.mark.parametrize("down, given", [(False, True), (True, False)])
@pytest.mark.parametrize("moving", (True, False))
def test_opcheck_of_the_joint_op(ops, down, given, moving):
    args = tuple(joint_arguments(down, given, moving).values())
    checks_run = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(ops.bottleneck_fwd_train.default, args, test_utils=checks_run)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weights": []}, "weights: want one of each of the 3 layers, got 0"),
        ({"gammas": [None]}, "gammas: want one of each of the 3 layers, got 1"),
        ({"betas": [None] * 4}, "betas: want one of each of the 3 layers, got 4"),
        ({"eps": [1e-5]}, "eps: want one of each of the 3 layers, got 1"),
        ({"momenta": []}, "momenta: want one of each of the 3 layers, got 0"),
        ({"running": [torch.ones(8)]}, "running: want nothing or three tensors for each .* 3 layers, got 1"),
        ({"down": [1, 1]}, "weights: want one of each of the 4 layers, got 3"),
        ({"x": torch.randn(2, 7, 5, 7)}, "weight: want float32 \\[8, 7, 1, 1\\], got .*\\[8, 6, 1, 1\\]"),
        ({"gammas": [torch.ones(9), None, None]}, "gamma: want float32 \\[8\\], got float32 \\[9\\]"),
        ({"groups": 5}, "groups: want a divisor of the 8 input channels, got 5"),
        ({"residual": torch.randn(2, 20, 5, 6)}, "residual: want float32 \\[2, 20, 5, 7\\]"),
    ],
)  # fmt: skip
def test_bad_input_of_the_joint_op(ops, change, message):
    args = joint_arguments(given=True)
    before = [t.clone() for t in args["running"]]
    with pytest.raises(RuntimeError, match=message):
        ops.bottleneck_fwd_train(*(args | change).values())
    assert all(map(torch.equal, args["running"], before)), "a refused call changes no state"


def test_the_joint_op_takes_one_shortcut(ops):
    args = joint_arguments(down=True) | {"residual": torch.randn(2, 20, 3, 4)}
    with pytest.raises(RuntimeError, match="residual: want either it or down, got both"):
        ops.bottleneck_fwd_train(*args.values())
