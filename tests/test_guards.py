"""gconv.guards: a call is recalled where nothing has changed that a decision can depend on, only there."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from bottleneck_blocks import BLOCKS, twins
from checks import assert_same_bits
from torch import nn

import gconv
from gconv import backend, bottleneck_modules, conv_bn_relu, guards


def layer(frozen=False, **options):
    torch.manual_seed(0)
    made = gconv.ConvBNReLU(16, 16, 3, padding=1, groups=4, **options)
    with torch.no_grad():
        made.bn.weight.uniform_(0.5, 1.5)
        made.bn.bias.uniform_(0.1, 0.5)
        made.bn.running_mean.normal_()
        made.bn.running_var.uniform_(0.5, 2)
    return gconv.freeze(made.eval()) if frozen else made


def image(n=2, size=6, seed=0, **options):
    torch.manual_seed(seed)
    return torch.randn(n, 16, size, size, **options)


def recalled(module, x, residual=None):
    return guards.recall("conv_bn_relu", (module.conv, module.bn), (x, residual))


def set_eps(module):
    module.bn.eps = 1e-3


def set_momentum(module):
    module.bn.momentum = None


def set_mode(module):
    module.bn.train(not module.bn.training)


def set_memory(module):
    module.conv.weight.data = module.conv.weight.data.to(torch.bfloat16)


def set_strides(module):
    module.conv.weight.data = module.conv.weight.data.contiguous(memory_format=torch.channels_last)


def set_parameter(module):
    module.conv.weight = nn.Parameter(2 * module.conv.weight.detach())


def set_no_parameter(module):
    module.bn.bias = None


def set_buffer(module):
    module.bn.running_var = module.bn.running_var * 2


def set_counter(module):
    module.bn.num_batches_tracked = module.bn.num_batches_tracked.to(torch.int32)


def set_bias(module):
    module.conv.bias = nn.Parameter(torch.ones(16))


def set_stride(module):
    module.conv.stride = (2, 2)


def set_padding_mode(module):
    module.conv.padding_mode = "reflect"


def set_forward(module):
    module.bn.forward = lambda x: x


def set_hook(module):
    module.conv.register_forward_hook(lambda *args: None)


def set_backward_hook(module):
    module.bn.register_full_backward_hook(lambda *args: None)


def set_class(module):
    module.conv.__class__ = type("Other", (nn.Conv2d,), {})


def set_parametrization(module):
    nn.utils.parametrize.register_parametrization(module.conv, "weight", nn.Identity(), unsafe=True)


def set_child(module):
    module.bn.child = nn.ReLU()


def set_requires_grad(module):
    module.conv.weight.requires_grad_(False)


CHANGES = (
    set_eps, set_momentum, set_mode, set_memory, set_strides, set_parameter, set_no_parameter, set_buffer,
    set_counter, set_bias, set_stride, set_padding_mode, set_forward, set_hook, set_backward_hook, set_class,
    set_parametrization, set_child, set_requires_grad,
)  # fmt: skip


@pytest.mark.parametrize("frozen", (False, True))
@pytest.mark.parametrize("change", CHANGES)
def test_changed_modules(change, frozen):
    module, x = layer(frozen), image()
    with torch.set_grad_enabled(not frozen):
        module(x)
        assert recalled(module, x) is not None, "the same call"
        change(module)
        unconcerned = change is set_requires_grad and not frozen
        assert (recalled(module, x) is not None) == unconcerned


def in_place(name):
    def change(module):
        with torch.no_grad():
            module.state_dict(keep_vars=True)[name].mul_(1.5)

    return change


@pytest.mark.parametrize("name", ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"))
def test_written_to(name):
    """What is frozen depends on what the tensors hold, a training step does not."""
    for frozen in (True, False):
        module, x = layer(frozen), image()
        with torch.no_grad():
            module(x)
            in_place(name)(module)
            assert (recalled(module, x) is None) == frozen
            want = module.bn(module.conv(x)).relu()
            assert torch.allclose(module(x), want, atol=1e-5)


def test_memory_taken_again():
    """Another tensor must not come to lie where the one before lay, with as many writes."""
    module, x = layer(frozen=True), image()
    with torch.no_grad():
        module(x)
        address, size = module.conv.weight.data_ptr(), module.conv.weight.shape
        others = []
        module.conv.weight.data = torch.zeros(1)
        for _ in range(50):
            others.append(torch.full(size, 2.0))
            assert others[-1].data_ptr() != address
        module.conv.weight.data = others[-1]
        assert recalled(module, x) is None


@pytest.mark.parametrize(
    "other",
    (
        image(n=3), image(size=5), image(dtype=torch.float64), image(requires_grad=True),
        image().contiguous(memory_format=torch.channels_last), image(size=7)[:, :, :6, :6],
        nn.Parameter(image(), requires_grad=False), image().to("meta"), image().to_mkldnn(),
    ),
    ids=("batch", "size", "dtype", "requires_grad", "channels_last", "strides", "type", "device", "layout"),
)  # fmt: skip
def test_other_inputs(other):
    module, x = layer(), image()
    module(x)
    assert recalled(module, image(seed=1)) is not None, "values are of no concern"
    assert recalled(module, other) is None
    assert recalled(module, x, image()) is None, "a residual"


def test_settings(monkeypatch):
    module, x = layer(), image()
    module(x)

    def same():
        return recalled(module, x) is not None

    assert same()
    with torch.no_grad():
        assert not same()
    with torch.inference_mode():
        assert not same()
    with torch.autocast("cpu", torch.bfloat16):
        assert not same()
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert same()
    with gconv.use_backend("torch"):
        assert not same()
    with monkeypatch.context() as patch:
        patch.setattr(conv_bn_relu, "JOINED", False)
        assert not same()
    with monkeypatch.context() as patch:
        patch.setattr(backend, "DENSE_TO_TORCH_CHANNELS", None)
        assert not same()
    before = torch.ops.gconv.cpu_winograd()
    torch.ops.gconv.set_cpu_winograd("never" if before != "never" else "always")
    assert not same()
    torch.ops.gconv.set_cpu_winograd(before)
    with torch.autograd.forward_ad.dual_level():
        assert not same()
    assert same()
    seen = []
    torch.func.vjp(lambda x: seen.append(same()) or 2 * x, x)
    torch.jit.trace(lambda x: seen.append(same()) or 2 * x, x, check_trace=False)
    assert seen == [False, False]


def test_autocast_has_its_own():
    """Which dtype autocast casts to is part of the call."""
    module, x = layer(), image()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            want = module(x).dtype
            assert want is dtype and recalled(module, x) is not None
            assert module(x).dtype is dtype


def steps(run, module, size, count, dtype, residual, tracked, layout):
    """All that `count` training steps of run(x, residual) give and leave behind."""
    results = []
    for step in range(count):
        torch.manual_seed(step)
        x, more = torch.randn(*size), None
        x = x.contiguous(memory_format=layout).requires_grad_(tracked)
        autocast = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
        with autocast, torch.set_grad_enabled(tracked):
            if residual is not None:
                more = torch.randn(*residual).requires_grad_(tracked)
            z = run(x, more)
        results.append(z.detach())
        assert z.is_contiguous(memory_format=layout)
        if tracked:
            z.float().square().mean().backward()
            results += [t.grad for t in (x, more) if t is not None]
    results += [p.grad for p in module.parameters() if p.grad is not None]
    return results + list(module.state_dict().values())


def assert_recalled_bits(kind, make, *args, monkeypatch, calls=2):
    """Steps of make()'s (run, module) have the same bits where `kind`'s calls are recalled, from the second
    step on, and where none is."""
    run, ran = kind.run, []
    with monkeypatch.context() as patch:
        patch.setattr(kind, "run", lambda self, *args: ran.append(1) or run(self, *args))
        got = steps(*make(), *args)
        assert len(ran) == calls, "the first step decides"
        patch.setattr(guards, "recall", lambda *args: None)
        want = steps(*make(), *args)
        assert len(ran) == calls and len(got) == len(want) > 6
    for number, pair in enumerate(zip(got, want)):
        assert_same_bits(*pair, f"result {number}")


LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tracked", (True, False))
@pytest.mark.parametrize("residual", (None, (2, 16, 6, 6)))
@pytest.mark.parametrize("dtype", (None, torch.bfloat16))
def test_training_has_the_same_bits(dtype, residual, tracked, layout, monkeypatch):
    def make():
        module = layer()
        return module, module

    args = ((2, 16, 6, 6), 3, dtype, residual, tracked, layout)
    assert_recalled_bits(conv_bn_relu.TrainingCall, make, *args, monkeypatch=monkeypatch)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tracked", (True, False))
@pytest.mark.parametrize("dtype", (None, torch.bfloat16))
@pytest.mark.parametrize("given", (False, True))
@pytest.mark.parametrize("channels, options, size", BLOCKS[::2])
def test_training_of_a_bottleneck_has_the_same_bits(
    channels, options, size, given, dtype, tracked, layout, monkeypatch
):
    def make():
        _, block = twins("guards", channels, **options)
        return block, block

    residual = None
    if given:
        stride = options.get("stride", 1)
        residual = size[0], channels[-1], *(-(-s // stride) for s in size[1:])
    args = ((size[0], channels[0], *size[1:]), 3, dtype, residual, tracked, layout)
    assert_recalled_bits(bottleneck_modules.TrainingCall, make, *args, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    "options, calls",
    (
        ({"track_running_stats": False}, 2),
        ({"momentum": None}, 0),
        ({"affine": False}, 2),
        ({"frozen": ("bn2",)}, 0),
    ),
    ids=str,
)
def test_which_bottlenecks_are_recalled_in_training(options, calls, monkeypatch):
    def make():
        _, block = twins("guards", (16, 8, 8, 16), **options)
        return block, block

    args = ((2, 16, 7, 9), 3, None, None, True, torch.contiguous_format)
    assert_recalled_bits(bottleneck_modules.TrainingCall, make, *args, monkeypatch=monkeypatch, calls=calls)


def test_a_row_of_blocks_keeps_as_little(monkeypatch):
    """Recalled or not, a block's result is made again for the backward instead of being kept."""

    def kept(recalls):
        with monkeypatch.context() as patch:
            if not recalls:
                patch.setattr(guards, "recall", lambda *args: None)
            torch.manual_seed(0)
            row = nn.Sequential(*(twins(str(i), (16, 8, 8, 16))[1] for i in range(4)))
            x = torch.randn(2, 16, 6, 6).contiguous(memory_format=torch.channels_last)
            row(x)
            z = row(x)
            node, recipes = z.grad_fn, []
            while hasattr(node, "gconv_recipe"):
                recipes.append(node.gconv_recipe() is not None)
                node = node.next_functions[0][0]
            return recipes

    assert kept(True) == kept(False) == [True] * 4


def test_saved_statistics_are_guarded():
    """Autograd finds out that running statistics moved which something else has saved."""
    module, x = layer(), image()
    module(x)
    saved = (module.bn.running_mean * torch.ones(16, requires_grad=True)).sum()
    module(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_outlived_transforms():
    """A tensor that left torch.func is as good as another."""
    module, kept = layer(), []
    x = image(requires_grad=True)
    module(x)
    torch.func.grad(lambda t: kept.append(t) or t.sum())(image(seed=3))
    dead = kept[0]
    want = copy.deepcopy(module)(image(seed=3))
    assert_same_bits(module(dead).detach(), want.detach())


def test_traces_and_counts():
    module, x = layer(), image()
    tables = []
    for _ in range(2):
        backend.reset_counts()
        with gconv.trace() as trace:
            module(x)
        tables.append((str(trace), backend.counts()))
    assert tables[0] == tables[1] and "conv " in tables[0][0]


@pytest.mark.parametrize("channels, options, size", BLOCKS[::3])
def test_bottleneck(channels, options, size):
    _, block = twins("guards", channels, training=False, **options)
    block, x = gconv.freeze(block), torch.randn(size[0], channels[0], *size[1:])
    with torch.no_grad():
        want = block(x)
        known = vars(block.conv1)[guards.CALLS].known
        assert len(known) == 1
        assert_same_bits(block(x), want, "the same again")
        block.bn3.running_mean.add_(1)
        assert not torch.equal(block(x), want)
        block.bn2.eps = 0.1
        changed, keys = block(x), set(known)
        known.clear()
        assert_same_bits(block(x), changed)
        assert set(known) == keys


def test_copies_know_nothing():
    module, x = layer(), image()
    module(x)
    assert guards.CALLS in vars(module.conv) and b"gconv.guards" not in pickle.dumps(module.conv)
    taken_over = gconv.Conv2d.from_torch(nn.Conv2d(16, 16, 3))
    assert guards.CALLS not in vars(taken_over)
    assert guards.CALLS not in vars(gconv.ConvBNReLU.from_torch(_stock(module.conv), module.bn).conv)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert recalled(other, x) is None
        other(x)
        assert recalled(other, x) is not None
    assert guards.CALLS not in str(module.state_dict().keys())


def _stock(conv):
    """An nn.Conv2d in the place of ours, with all its attributes."""
    stock = nn.Conv2d(1, 1, 1)
    stock.__dict__ = vars(conv)
    return stock


def test_modules_die():
    """At once: nothing waits for the garbage collector."""
    made = (
        layer,
        lambda: layer(frozen=True),
        lambda: twins("guards", (16, 8, 8, 16))[1],
        lambda: gconv.freeze(twins("guards", (16, 8, 8, 16))[1].eval()),
    )
    for make in made:
        module = make()
        with torch.set_grad_enabled(module.training):
            for _ in range(2):
                module(image())
        convs = [child for child in module.modules() if isinstance(child, nn.Conv2d)]
        assert vars(convs[0])[guards.CALLS].known
        found = [weakref.ref(t) for conv in convs for t in (conv, conv.weight)]
        gc.disable()
        try:
            del module, convs
            assert [reference() for reference in found] == [None] * len(found)
        finally:
            gc.enable()


@pytest.mark.parametrize("options, slot", (({}, True), ({"padding_mode": "circular"}, False)))
def test_nothing_is_remembered_that_is_not_recalled(options, slot):
    """A training call into a slot, or of a padded image, decides every time."""
    module, x = layer(**options), image()
    into = gconv.Concat(16, 4)[0] if slot else None
    module(x, into=into)
    assert guards.CALLS not in vars(module.conv)
    plain = layer()
    plain(x)
    assert guards.CALLS in vars(plain.conv)


def test_no_step_is_kept():
    """Weights that were computed and tensors that a module carries around end with their step."""
    module, x = layer(), image()
    values = dict(module.named_parameters())
    made = values["conv.weight"] * 1
    torch.func.functional_call(module, values | {"conv.weight": made}, x).sum().backward()
    other = layer()
    other.bn.carried = carried = torch.ones(1)
    other(x)
    assert recalled(module, x) is None and recalled(other, x) is None
    found = weakref.ref(made), weakref.ref(carried)
    del made, carried, other
    gc.collect()
    assert [reference() for reference in found] == [None] * 2


def test_not_too_many():
    module = layer()
    for n in range(1, guards.MOST + 8):
        module(image(n=n))
    assert 0 < len(vars(module.conv)[guards.CALLS].known) <= guards.MOST


def test_bad_use():
    with pytest.raises(TypeError, match="make_guard: want"):
        backend.make_guard(1, 2, 3)
    with pytest.raises(TypeError, match="make_guard: want"):
        backend.make_guard(((), ()), None, (), (), True, None)
    with pytest.raises(TypeError, match="guard_holds: want"):
        backend.guard_holds(())
    with pytest.raises(TypeError, match="guard_holds: want"):
        backend.guard_holds((1, 2), (), None)
    somewhere = {}
    state = (), ((somewhere, "nowhere"),)
    guard = backend.make_guard(state, (image(),), (), (), True, None)
    assert backend.guard_holds(guard, (), None, image()) is True
    for inputs in ((), (image(), None), (None,), (3,)):
        assert backend.guard_holds(guard, (), None, *inputs) is False
    somewhere["nowhere"] = 1
    assert backend.guard_holds(guard, (), None, image()) is False
