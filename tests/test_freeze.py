"""gconv.freeze: the same results as without it, whatever happens to the model in between."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from bottleneck_blocks import BLOCKS
from bottleneck_blocks import twins as bottleneck_twins
from checks import assert_same_bits
from model_checks import COPIES, assert_as_good, copied, lively, pair, seeded
from torch import nn
from torch.library import opcheck

import gconv
from gconv import models, packed

DTYPES = ("float32", "bfloat16", "float16", "autocast")
WIDTHS = ((64, 96, 1, 1), (20, 37, 1, 1), (300, 130, 1, 1), (64, 64, 32, 3), (96, 96, 3, 3), (18, 33, 3, 3),
          (128, 256, 2, 3))  # fmt: skip  # (C, K, groups, kernel)


def called(module, *args, dtype="float32"):
    """(result, trace) of a call without gradients."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast")
    with torch.no_grad(), autocast, gconv.trace() as trace:
        y = module(*args)
    return y, trace


def ran_packed(trace):
    return any("packed weights" in row.kernel for row in trace)


def assert_frozen(frozen, plain, *args, dtype="float32", label="", as_packed=True):
    """`frozen` gives the bits of `plain` and says that it used packed weights, in the first call and in the
    next."""
    want, before = called(plain, *args, dtype=dtype)
    assert not ran_packed(before)
    for call in ("first", "second"):
        got, trace = called(frozen, *args, dtype=dtype)
        assert_same_bits(got, want, f"{label} {call} call")
        assert got.stride() == want.stride(), label
        assert ran_packed(trace) == as_packed, f"{label} {call} call\n{trace}"


def of_dtype(module, dtype):
    return module if dtype in ("float32", "autocast") else module.to(getattr(torch, dtype))


def images(*size, dtype="float32", layout="nhwc", seed=0):
    torch.manual_seed(seed)
    x = torch.randn(*size)
    x = x if dtype == "autocast" else x.to(getattr(torch, dtype))
    return x.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else x


def conv_bn(c, k, groups, kernel, **options):
    layer = gconv.ConvBNReLU(c, k, kernel, padding=kernel // 2, groups=groups, **options)
    return lively(layer, images(2, c, 9, 8)).eval()


@pytest.fixture
def layer():
    """(frozen, its twin that is not, input)"""
    torch.manual_seed(0)
    plain = conv_bn(32, 48, 1, 1, bias=True)
    x = images(2, 32, 6, 5)
    frozen = gconv.freeze(copy.deepcopy(plain))
    assert_frozen(frozen, plain, x)
    return frozen, plain, x


# --------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS, ids=str)
def test_layers(isa, winograd, dtype, width):
    c, k, groups, kernel = width
    for use in ("never", "always") if kernel == 3 else ("auto",):
        winograd(use)
        for stride, layout in ((1, "nhwc"), (2, "nchw")):
            x = images(2, c, 12, 9, dtype=dtype, layout=layout)
            conv = gconv.Conv2d(c, k, kernel, stride, kernel // 2, groups=groups, bias=stride == 1)
            for plain in (of_dtype(conv, dtype).eval(), of_dtype(conv_bn(*width, stride=stride), dtype)):
                frozen = gconv.freeze(copy.deepcopy(plain))
                assert_frozen(frozen, plain, x, dtype=dtype, label=f"{width} {stride} {use}")


def test_residual_and_slots():
    plain = conv_bn(32, 48, 1, 1)
    frozen = gconv.freeze(copy.deepcopy(plain))
    x, residual = images(2, 32, 6, 5), images(2, 48, 6, 5, seed=1)
    assert_frozen(frozen, plain, x, residual)

    def joined(layer):
        def call(x):
            concat = gconv.Concat(48, 48)
            layer(x, into=concat[0])
            layer(x, residual, into=concat[1])
            return concat.read()

        return call

    assert_frozen(joined(frozen), joined(plain), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels,options,size", BLOCKS, ids=str)
def test_bottleneck(isa, dtype, channels, options, size):
    _, plain = bottleneck_twins("frozen", channels, training=False, **options)
    plain = of_dtype(plain, dtype)
    n, h, w = size
    x = images(n, channels[0], h, w, dtype=dtype)
    plain.stock = False
    frozen = gconv.freeze(copy.deepcopy(plain))
    assert_frozen(frozen, plain, x, dtype=dtype)
    if "down" not in options:
        assert_frozen(frozen, plain, x, images(*x.shape, dtype=dtype, seed=3).to(x.dtype), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bottleneck", [True, False])
def test_dense_block(isa, dtype, bottleneck):
    block = gconv.DenseBlock(3, 20, 2 if bottleneck else 0, 12, 0.0)
    plain = of_dtype(lively(block, images(2, 20, 8, 7)).eval(), dtype)
    frozen = gconv.freeze(copy.deepcopy(plain))
    assert_frozen(frozen, plain, images(2, 20, 8, 7, dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("name", ["resnext50_32x4d", "densenet121", "resnet18"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
def test_networks(name, dtype):
    """Beside float64, because the stem's batch norm is folded into its weights: torch's own error bounds
    ours."""
    plain, stock, x = pair(name)
    plain, stock = plain.eval(), stock.eval()
    with torch.no_grad():
        exact = copy.deepcopy(stock).double()(x.double())
    dtyped = of_dtype(stock, dtype)
    x = x.to(next(dtyped.parameters()).dtype)
    frozen = gconv.freeze(of_dtype(plain, dtype))
    got, trace = called(frozen, x, dtype=dtype)
    kernels = {row.kernel for row in trace}
    assert "torch.conv2d, folded batch norm" in kernels
    assert all("packed" in kernel or "folded" in kernel or "batch_norm" in kernel for kernel in kernels), (
        trace
    )
    assert_as_good(got, called(dtyped, x, dtype=dtype)[0], exact, name)
    again, _ = called(frozen, x, dtype=dtype)
    assert_same_bits(again, got, "second call")


def test_converted():
    stock = seeded(models.resnext50_32x4d, stock=True).eval()
    plain = copy.deepcopy(stock)
    gconv.convert(plain)
    frozen = gconv.freeze(copy.deepcopy(plain)).layer2
    assert_frozen(frozen, plain.layer2, images(1, 256, 12, 12))


def test_images_of_other_sizes(winograd):
    """Where the algorithm depends on the image, each size gets its own; packed copies do not pile up."""
    winograd("auto")
    plain = conv_bn(64, 64, 1, 3)
    frozen = gconv.freeze(copy.deepcopy(plain))
    for size in ((24, 24), (3, 3), (25, 31), (1, 40), (24, 24)):
        assert_frozen(frozen, plain, images(1, 64, *size), label=str(size))
    made = [value for _, value in frozen.conv.__dict__[packed.KEPT].made.values()]
    assert len({id(value) for value in made if isinstance(value, packed.Packed)}) <= 2


# ------------------------------------------------------------------------------------------ what invalidates


def _load(model):
    state = {k: (v * 1.5 if v.is_floating_point() else v) for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def _in_place(name):
    def change(model):
        with torch.no_grad():
            dict(model.state_dict(keep_vars=True))[name].mul_(1.25)

    return change


def _half_and_back(model):
    """The memory of the first weights is free before the last are made."""
    model.to(torch.bfloat16)
    model.to(torch.float32)


def _new_parameter(model):
    model.conv.weight = nn.Parameter(model.conv.weight.detach().clone() * 2)


def _same_memory(model):
    """Another parameter at the same address, with the same version."""
    memory = model.conv.weight.data
    with torch.no_grad():
        memory.mul_(3)
    model.conv.weight = nn.Parameter(memory)


def _trained(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(images(2, 32, 6, 5)).square().sum().backward()
    optimizer.step()
    model.eval()


def _eps(model):
    model.bn.eps = 0.5


def _momentum(model):
    model.bn.momentum = 0.5


def _no_gamma(model):
    model.bn.weight = model.bn.bias = None


NAMES = ("conv.weight", "conv.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
CHANGES = {
    **{name: _in_place(name) for name in NAMES}, "load_state_dict": _load, "to and back": _half_and_back,
    "new parameter": _new_parameter, "same memory": _same_memory, "training": _trained, "eps": _eps,
    "momentum": _momentum, "no affine": _no_gamma,
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "contiguous": lambda model: model.to(memory_format=torch.contiguous_format),
    "share_memory": lambda model: model.share_memory(),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_noticed(layer, change):
    frozen, plain, x = layer
    before, _ = called(plain, x)
    change(frozen)
    change(plain)
    assert_frozen(frozen, plain, x)
    same = ("momentum", "to and back", "channels_last", "contiguous", "share_memory")
    if change not in (CHANGES[name] for name in same):
        assert not torch.equal(called(frozen, x)[0], before), "the change changed nothing"


@pytest.mark.parametrize("part", ["bottleneck", "dense"])
def test_noticed_in_blocks(part):
    """Each parameter and buffer in turn."""
    if part == "dense":
        plain, x = gconv.DenseBlock(2, 20, 2, 12, 0.0), images(2, 20, 6, 6)
        plain = lively(plain, x).eval()
    else:
        channels, options, (n, h, w) = BLOCKS[3]
        _, plain = bottleneck_twins("noticed", channels, training=False, **options)
        plain.stock, x = False, images(n, channels[0], h, w)
    frozen = gconv.freeze(copy.deepcopy(plain))
    assert_frozen(frozen, plain, x)
    for name in plain.state_dict():
        if "num_batches" in name:
            continue
        for model in (frozen, plain):
            _in_place(name)(model)
        assert_frozen(frozen, plain, x, label=name)
    norm = next(name for name, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d))
    for model in (frozen, plain):
        model.get_submodule(norm).eps = 0.3
    assert_frozen(frozen, plain, x, label="eps")


def test_instruction_set(layer, ops):
    frozen, plain, x = layer
    before = ops.cpu_isa()
    try:
        for name in ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16", "portable"):
            try:
                ops.set_cpu_isa(name)
            except RuntimeError:
                continue
            assert_frozen(frozen, plain, x, label=name)
            assert_frozen(frozen, plain, x, dtype="autocast", label=name)
    finally:
        ops.set_cpu_isa(before)


def test_dtype_after_dtype(layer):
    frozen, plain, x = layer
    for dtype in ("autocast", "float32", "autocast"):
        assert_frozen(frozen, plain, x, dtype=dtype, label=dtype)
    frozen.bfloat16(), plain.bfloat16()
    assert_frozen(frozen, plain, x.bfloat16())
    frozen.float(), plain.float()
    assert_frozen(frozen, plain, x)


def test_freeze_again_after_data(layer):
    """`.data` is the way past the version counter."""
    frozen, plain, x = layer
    for model in (frozen, plain):
        model.conv.weight.data.mul_(2)
    gconv.freeze(frozen)
    assert_frozen(frozen, plain, x)


# ------------------------------------------------------------------------------------------- the plain path


def test_training_runs_plain(layer):
    frozen, plain, x = layer
    for model in (frozen, plain):
        model.train()
    got, trace = called(frozen, x)
    assert not ran_packed(trace)
    assert_same_bits(got, called(plain, x)[0])
    for model in (frozen, plain):
        model.eval()
    assert_frozen(frozen, plain, x)


def test_gradients_run_plain(layer):
    frozen, plain, x = layer
    for wanted in (True, False):
        for model in (frozen, plain):
            model.zero_grad()
            model.requires_grad_(not wanted)
        inputs = [x.clone().requires_grad_(wanted) for _ in range(2)]
        for model, given in zip((frozen, plain), inputs):
            with gconv.trace() as trace:
                model(given).square().sum().backward()
            assert not ran_packed(trace)
        grads = [[t.grad for t in (given, *m.parameters())] for m, given in zip((frozen, plain), inputs)]
        assert any(g is not None for g in grads[0])
        for one, other in zip(*grads):
            assert (one is None) == (other is None)
            if one is not None:
                assert_same_bits(one, other)
    frozen.requires_grad_(False)
    with gconv.trace() as trace:
        frozen(x)
    assert ran_packed(trace), "nothing wants a gradient"


def test_modes(layer):
    frozen, plain, x = layer
    want, _ = called(plain, x)
    with torch.inference_mode():
        assert_same_bits(frozen(x).clone(), want)
    fresh = copy.deepcopy(frozen)
    with torch.inference_mode():
        fresh(x)
    assert_frozen(fresh, plain, x)
    with torch.no_grad():
        twins = [torch.compile(m, fullgraph=True, backend="eager")(x) for m in (frozen, plain)]
        assert_same_bits(*twins)
        assert_same_bits(torch.func.vmap(frozen)(x[None]), torch.func.vmap(plain)(x[None]))
        traced = torch.jit.trace(frozen, x)
        assert_same_bits(traced(x), want)
    state = {name: t * 2 if t.is_floating_point() else t for name, t in plain.state_dict().items()}
    with torch.no_grad():
        got = torch.func.functional_call(frozen, state, (x,))
        assert_same_bits(got, torch.func.functional_call(plain, state, (x,)))
    assert_frozen(frozen, plain, x)


def test_parameters_of_inference_mode():
    """They count no writes: such layers run as if not frozen."""
    with torch.inference_mode():
        plain = gconv.ConvBNReLU(16, 24, 1).eval()
        frozen = gconv.freeze(copy.deepcopy(plain))
        x = images(1, 16, 5, 5)
        frozen(x)
        for model in (frozen, plain):
            model.conv.weight.mul_(2)
        assert_same_bits(frozen(x), plain(x))
    assert_frozen(frozen, plain, x, as_packed=False)
    assert_frozen(frozen, plain, x, dtype="autocast", as_packed=False)


def test_hooks_and_backends(layer):
    frozen, plain, x = layer
    seen = []
    handle = frozen.conv.register_forward_hook(lambda *args: seen.append(1))
    assert torch.allclose(called(frozen, x)[0], called(plain, x)[0], atol=1e-5) and seen == [1]
    handle.remove()
    assert_frozen(frozen, plain, x)
    with gconv.use_backend("torch"):
        got, trace = called(frozen, x)
        assert not ran_packed(trace)
        assert_same_bits(got, called(plain, x)[0])


def test_explain(layer):
    frozen, _, x = layer
    made = dict(frozen.conv.__dict__[packed.KEPT].made)
    with torch.no_grad():
        assert ran_packed(gconv.explain(frozen, x))
        model = gconv.freeze(seeded(models.densenet121).eval())
        rows = gconv.explain(model, (1, 3, 64, 64)).rows
    assert sum("packed weights" in row.kernel for row in rows) == 4
    assert not ran_packed(gconv.explain(frozen, x)), "parameters want gradients"
    assert frozen.conv.__dict__[packed.KEPT].made == made


# ---------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("how", COPIES)
def test_copies(layer, how):
    frozen, plain, x = layer
    twin = copied(frozen, how)
    assert_frozen(twin, plain, x)
    with torch.no_grad():
        twin.conv.weight.mul_(2)
    assert_frozen(frozen, plain, x)


def test_model_stays_as_it_was():
    plain = conv_bn(32, 48, 1, 1)
    frozen = copy.deepcopy(plain)
    assert gconv.freeze(frozen) is frozen
    called(frozen, images(1, 32, 4, 4))
    assert list(frozen.state_dict()) == list(plain.state_dict())
    for of in (nn.Module.named_parameters, nn.Module.named_buffers, nn.Module.named_modules):
        assert [name for name, _ in of(frozen)] == [name for name, _ in of(plain)]
    assert repr(frozen) == repr(plain)


def test_threads():
    """Several threads call a model while its weights change between rounds."""
    plain, _, x = pair("resnext50_32x4d", size=64, batch=2)
    plain.eval()
    frozen = gconv.freeze(copy.deepcopy(plain))
    for _ in range(2):
        want, _ = called(frozen.layer1, images(1, 64, 8, 8))
        assert_same_bits(want, called(plain.layer1, images(1, 64, 8, 8))[0])
        results, full = [], called(gconv.freeze(copy.deepcopy(plain)), x)[0]

        def work(results=results):
            with torch.no_grad():
                results.extend(frozen(x) for _ in range(2))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 8
        for got in results:
            assert_same_bits(got, full)
        for model in (frozen, plain):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.9)


def test_refuses():
    with pytest.raises(TypeError, match=r"^freeze: model: want a torch.nn.Module, got int$"):
        gconv.freeze(3)
    with pytest.raises(ValueError, match=r"^freeze: model: want eval mode, got a ConvBNReLU in train mode$"):
        gconv.freeze(gconv.ConvBNReLU(8, 8, 1))
    model = gconv.ConvBNReLU(8, 8, 1).eval()
    model.bn.train()
    with pytest.raises(ValueError, match=r"^freeze: model: want eval mode, got a BatchNorm2d in train mode$"):
        gconv.freeze(model)
    with pytest.raises(ValueError, match=r"^freeze: model: want convolutions, got a Linear without$"):
        gconv.freeze(nn.Linear(3, 3).eval())


def test_bad_calls_raise_as_before(layer):
    frozen, plain, x = layer
    for args in ((x[:, :7],), (x, x), (x.double(),), (x[0, 0],)):
        errors = []
        for model in (frozen, plain):
            with torch.no_grad(), pytest.raises((ValueError, RuntimeError)) as error:
                model(*args)
            errors.append(str(error.value))
        assert errors[0] == errors[1]


# ------------------------------------------------------------------------------------------------- the ops


def op_args(dtype=torch.float32):
    x = images(2, 32, 6, 5).to(dtype)
    weight = (torch.randn(48, 16, 3, 3) / 12).to(dtype)
    conf = ([1, 1], [1, 1], [1, 1], 2)
    return x, weight, torch.ops.gconv.conv_pack(weight, list(x.shape), *conf), conf


def test_ops(ops):
    x, weight, data, conf = op_args()
    affine, y = torch.randn(2, 48), images(2, 48, 6, 5)
    rest = (None, affine, None, True)
    want = ops.grouped_conv_fwd(x, weight, *conf, *rest)
    args = (x, data, list(weight.shape), *conf, *rest)
    assert_same_bits(ops.conv_fwd_packed(*args), want)
    ops.conv_fwd_packed_into(*args, y)
    assert_same_bits(y, want)
    tests = ("test_schema", "test_faketensor")
    opcheck(ops.conv_fwd_packed.default, args, test_utils=tests)
    opcheck(ops.conv_fwd_packed_into.default, (*args, y), test_utils=tests)
    opcheck(ops.conv_pack.default, (weight, list(x.shape), *conf), test_utils=("test_schema",))


def test_ops_refuse_what_was_packed_for_something_else(ops):
    x, weight, data, conf = op_args()
    rest = (None, None, None, False)
    size = list(weight.shape)
    wrong = {
        "dtype": (x.bfloat16(), data, size, *conf),
        "size": (x, data, [24, 16, 3, 3], *conf),
        "kernel": (images(2, 16, 6, 5), data, [48, 16, 1, 1], *conf[:1], [0, 0], [1, 1], 1),
        "short": (x, data[:-16], size, *conf),
        "no header": (x, torch.zeros_like(data), size, *conf),
        "integers": (x, data.int(), size, *conf),
    }
    for name, args in wrong.items():
        with pytest.raises(RuntimeError, match="conv_fwd_packed: packed: want what conv_pack makes"):
            ops.conv_fwd_packed(*args, *rest)
            pytest.fail(name)
    with pytest.raises(RuntimeError, match="conv_pack: weight: want "):
        ops.conv_pack(weight.double(), list(x.shape), *conf)
    with pytest.raises(RuntimeError, match="conv_pack: groups: want 1 with a 1x1 kernel, got 2"):
        ops.conv_pack(torch.zeros(4, 2, 1, 1), [1, 4, 5, 5], [1, 1], [0, 0], [1, 1], 2)
    with pytest.raises(RuntimeError, match="conv_fwd_packed: weight_size: want"):
        ops.conv_fwd_packed(x, data, [48, 7, 1, 1], [1, 1], [0, 0], [1, 1], 1, *rest)


def test_f_conv2d_is_untouched():
    """A frozen plain nn.Conv2d beside gconv's layers runs as torch's."""
    model = nn.Sequential(nn.Conv2d(3, 8, 5), gconv.Conv2d(8, 8, 3)).eval()
    x = torch.randn(1, 3, 9, 9)
    want = F.conv2d(x, model[0].weight, model[0].bias)
    assert_same_bits(called(gconv.freeze(model)[0], x)[0], want.detach())
