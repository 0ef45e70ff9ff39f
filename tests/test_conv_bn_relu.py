"""conv_bn_relu and ConvBNReLU against nn.Conv2d, nn.BatchNorm2d and ReLU: outputs, every gradient, running
statistics."""

import copy
import itertools

import checks
import pytest
import torch
from checks import DTYPES, LAYOUTS, assert_accurate, assert_same_bits, place
from fused_checks import (
    FrozenBatchNorm2d,
    assert_repeats,
    assert_same_results,
    compare,
    memory_formats,
    randomize,
    run,
)
from torch import nn

import gconv
from gconv import conv_bn_relu as fused_module

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
BOTH = list(itertools.product([False, True], repeat=2))


class Stock(nn.Module):
    def __init__(self, conv, bn, relu):
        super().__init__()
        self.conv, self.bn, self.relu = conv, bn, relu

    def forward(self, x, residual=None):
        z = self.bn(self.conv(x))
        z = z if residual is None else z + residual
        return torch.relu(z) if self.relu else z


def pair_of_modules(key, channels, relu, frozen_bn=False, conv_options=None, **bn_options):
    """(stock, ours) with the same parameters, both in training mode."""
    cin, cout = channels
    conv_options = {"bias": False, **(conv_options or {})}
    conv = nn.Conv2d(cin, cout, 3, **conv_options)
    bn = FrozenBatchNorm2d(cout) if frozen_bn else nn.BatchNorm2d(cout, **bn_options)
    randomize(conv, bn, key)
    ours = gconv.ConvBNReLU(cin, cout, 3, relu=relu, **conv_options, **bn_options)
    if frozen_bn:
        ours.bn = FrozenBatchNorm2d(cout)
    ours.load_state_dict(Stock(conv, bn, relu).state_dict())
    return Stock(conv, bn, relu), ours


def assert_ran_on_our_kernels(calls=1):
    counts = gconv.backend.counts()
    assert counts == {"cpu.conv_bn_relu": calls}, f"want {calls} calls of cpu.conv_bn_relu, got {counts}"


# (in, out, conv options, input N, H, W)
LAYERS = (
    ((32, 32), {"groups": 8, "padding": 1}, (2, 9, 11)),
    ((16, 32), {"groups": 2, "padding": 1, "stride": 2}, (3, 10, 7)),
    ((3, 8), {"padding": 1}, (1, 8, 9)),
    ((12, 12), {"groups": 12, "padding": 2, "dilation": 2, "stride": (1, 2)}, (2, 7, 9)),
    ((10, 15), {"groups": 5, "padding": (0, 2)}, (2, 6, 5)),
    ((48, 24), {"groups": 1, "padding": 1}, (2, 5, 5)),
)
layers = pytest.mark.parametrize("layer", LAYERS, ids=lambda v: f"{v[0][0]}to{v[0][1]}")


def inputs(layer, residual, dtype=torch.float32, key=""):
    (cin, cout), options, (n, h, w) = layer
    gen = checks.generator("inputs", str(layer), residual, key)
    layout = checks.rotate(LAYOUTS, str(layer), residual, key)
    x = place(torch.randn(n, cin, h, w, generator=gen).to(dtype), layout).requires_grad_()
    if not residual:
        return x, None
    size = nn.Conv2d(cin, cout, 3, device="meta", **options)(torch.empty(x.shape, device="meta")).shape
    layout = checks.rotate(LAYOUTS, str(layer), key, "residual")
    return x, place(torch.randn(size, generator=gen).to(dtype), layout).requires_grad_()


@layers
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual, relu", BOTH)
def test_every_result_in_float32(isa, layer, training, residual, relu):
    stock, ours = pair_of_modules(str(layer), layer[0], relu, conv_options=layer[1])
    stock.train(training), ours.train(training)
    got = compare(stock, ours, *inputs(layer, residual), key=layer)
    assert_ran_on_our_kernels()
    assert all(got[n] is not None for n in ("dx", "dconv.weight", "dbn.weight", "dbn.bias")), (
        "a gradient is missing"
    )
    assert (got["dresidual"] is not None) == residual
    assert int(got["bn.num_batches_tracked"]) == int(training)


@layers
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=checks.dtype_name)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_result_in_low_precision(ops, layer, dtype, training):
    residual = checks.rotate([False, True], str(layer), str(dtype), training)
    stock, ours = pair_of_modules(str(layer), layer[0], True, conv_options=layer[1])
    stock.to(dtype), ours.to(dtype)
    stock.train(training), ours.train(training)
    compare(stock, ours, *inputs(layer, residual, dtype), dtype=dtype, key=layer)
    assert_ran_on_our_kernels()


@layers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=checks.dtype_name)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast(ops, layer, dtype, training):
    stock, ours = pair_of_modules(str(layer), layer[0], True, conv_options=layer[1])
    stock.train(training), ours.train(training)
    x, _ = inputs(layer, False)
    got = compare(stock, ours, x, None, autocast=dtype, key=layer)
    assert got["z"].dtype == dtype and got["dconv.weight"].dtype == torch.float32
    assert_ran_on_our_kernels()


BN_OPTIONS = (
    {"momentum": None}, {"momentum": 0.0}, {"momentum": 1.0}, {"affine": False}, {"track_running_stats":
    False}, {"eps": 0.1},
    {"affine": False, "track_running_stats": False}, {"affine": False, "momentum": None},
)  # fmt: skip


@pytest.mark.parametrize("options", BN_OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()))
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual, relu", [(False, True), (True, True), (False, False)])
def test_batch_norm_options(ops, options, training, residual, relu):
    """Three steps, so that the running statistics move by their rule more than once."""
    for layer in (LAYERS[0], LAYERS[1]):
        stock, ours = pair_of_modules(str(layer), layer[0], relu, conv_options=layer[1], **options)
        stock.train(training), ours.train(training)
        compare(stock, ours, *inputs(layer, residual), steps=3, key=layer)
        assert_ran_on_our_kernels(3)


def test_running_statistics_over_changing_batches(ops):
    """Cumulative and exponential averages over batches of different sizes and means."""
    for momentum in (None, 0.1, 0.7):
        stock, ours = pair_of_modules("running", (8, 16), True, conv_options={"groups": 4}, momentum=momentum)
        exact = copy.deepcopy(stock).double()
        gen = checks.generator("batches")
        for step in range(5):
            x = torch.randn(step + 1, 8, 6, 5 + step, generator=gen) * (1 + step) + 3 * step
            for module, given in ((stock, x), (ours, x), (exact, x.double())):
                module(given)
        for name in ("running_mean", "running_var"):
            assert_accurate(
                getattr(ours.bn, name),
                getattr(exact.bn, name),
                getattr(stock.bn, name),
                f"{name}, momentum {momentum}",
            )
        assert int(ours.bn.num_batches_tracked) == 5


@layers
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_convolution_bias(ops, layer, training):
    """In training the bias moves only the running mean; its gradient is zero."""
    stock, ours = pair_of_modules(str(layer), layer[0], True, conv_options={**layer[1], "bias": True})
    stock.train(training), ours.train(training)
    got = compare(stock, ours, *inputs(layer, False), key=layer)
    if not training:
        assert got["dconv.bias"].abs().max() > 0
    assert_ran_on_our_kernels()


FREEZE = ("conv.weight", "bn.weight", "bn.bias", "x", "residual")


@pytest.mark.parametrize(
    "frozen", [s for n in (1, 2, 4) for s in itertools.combinations(FREEZE, n)], ids="+".join
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_frozen_parts(ops, frozen, training):
    """What needs no gradient gets none, and the others are as right as ever."""
    for relu in (True, False):
        layer = LAYERS[0]
        stock, ours = pair_of_modules(str(layer), layer[0], relu, conv_options=layer[1])
        x, residual = inputs(layer, True)
        for module in (stock, ours):
            module.train(training)
            for name, p in module.named_parameters():
                p.requires_grad_(name not in frozen)
        x.requires_grad_("x" not in frozen)
        residual.requires_grad_("residual" not in frozen)
        got = compare(stock, ours, x, residual, key=layer)
        for name in frozen:
            assert got[f"d{name}"] is None, f"{name} is frozen"
        assert_ran_on_our_kernels()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True])
def test_frozen_batch_norm(ops, training, residual):
    for layer in (LAYERS[0], LAYERS[1]):
        stock, ours = pair_of_modules(str(layer), layer[0], True, True, conv_options=layer[1])
        stock.train(training), ours.train(training)
        before = copy.deepcopy(ours.bn.state_dict())
        compare(stock, ours, *inputs(layer, residual), key=layer)
        assert_ran_on_our_kernels()
        for name, value in ours.bn.state_dict().items():
            assert_same_bits(value, before[name], name)


@layers
@memory_formats
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_memory_format_follows_torchs_rule(ops, layer, x_format, weight_format, training):
    stock, ours = pair_of_modules(str(layer), layer[0], True, conv_options=layer[1])
    for module in (stock, ours):
        module.train(training).to(memory_format=weight_format)
    x = inputs(layer, False)[0].detach().contiguous(memory_format=x_format)
    with torch.no_grad():
        want, got = stock(x), ours(x)
    assert got.stride() == want.stride(), f"without gradient: want {want.stride()}, got {got.stride()}"
    want, got = stock(x.requires_grad_()), ours(x)
    assert got.stride() == want.stride(), f"with gradient: want {want.stride()}, got {got.stride()}"
    got.backward(torch.ones_like(got))
    assert ours.conv.weight.grad.shape == ours.conv.weight.shape


@layers
def test_layout_of_input_does_not_change_a_bit(isa, layer):
    for training in (True, False):
        _, ours = pair_of_modules(str(layer), layer[0], True, conv_options=layer[1])
        ours.train(training)
        x, residual = inputs(layer, True)
        results = []
        for layout in LAYOUTS:
            placed = [place(t.detach(), layout).requires_grad_() for t in (x, residual)]
            results.append(run(copy.deepcopy(ours), placed[0], torch.ones(residual.shape), placed[1]))
        for other, layout in zip(results[1:], LAYOUTS[1:], strict=True):
            assert_same_results(other, results[0], layout)


@pytest.mark.parametrize("relu, residual", BOTH)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradient_of_stride_0(ops, relu, residual, training):
    """y.sum().backward() equals y.backward(ones), bit for bit."""
    layer = LAYERS[0]
    _, ours = pair_of_modules(str(layer), layer[0], relu, conv_options=layer[1])
    ours.train(training)
    x, r = inputs(layer, residual)
    size = ours(x.detach(), None if r is None else r.detach()).shape
    ours.bn.reset_running_stats()
    ones = run(copy.deepcopy(ours), x, torch.ones(size), r)
    expanded = run(copy.deepcopy(ours), x, torch.ones(()).expand(size), r)
    assert_same_results(expanded, ones)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True])
def test_without_gradient_gives_the_same(ops, training, residual):
    """torch.no_grad and inference_mode give what the differentiable call gives; training updates the
    statistics there too."""
    for layer in LAYERS[:3]:
        _, ours = pair_of_modules(str(layer), layer[0], True, conv_options=layer[1])
        ours.train(training)
        x, r = inputs(layer, residual)
        modules = [copy.deepcopy(ours) for _ in range(3)]
        z = modules[0](x, r)
        for module, context in zip(modules[1:], (torch.no_grad(), torch.inference_mode()), strict=True):
            with context:
                other = module(x, r)
            torch.testing.assert_close(other, z.detach(), rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(module.bn.running_mean, modules[0].bn.running_mean, rtol=0, atol=0)
            torch.testing.assert_close(module.bn.running_var, modules[0].bn.running_var, rtol=0, atol=0)
            assert int(module.bn.num_batches_tracked) == int(training)


def test_bits_repeat_for_any_number_of_threads(isa, threads):
    layer = ((64, 64), {"groups": 16, "padding": 1}, (3, 21, 19))
    _, ours = pair_of_modules("threads", layer[0], True, conv_options=layer[1])
    x, r = inputs(layer, True)
    dz = torch.randn(r.shape, generator=checks.generator("threads"))
    assert_repeats(threads, lambda: run(copy.deepcopy(ours), x, dz, r))


@layers
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_joined_ops_are_their_stages(isa, monkeypatch, layer, residual, relu, dtype):
    """Bit for bit, for every choice of gradients, and with the strides that autograd expects."""
    channels, options, _ = layer
    ran = []
    for name in ("_fwd_train", "_bwd"):
        op = getattr(fused_module, name)
        monkeypatch.setattr(fused_module, name, lambda *args, name=name, op=op: ran.append(name) or op(*args))
    x, r = inputs(layer, residual, dtype, "joined")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        module = gconv.ConvBNReLU(*channels, 3, relu=relu, **options)
        randomize(module.conv, module.bn, "joined")
        module.conv.to(dtype=dtype, memory_format=memory_format)
        leaves = [t for t in (x, module.conv.weight, module.bn.weight, module.bn.bias, r) if t is not None]
        for skipped in (None, *range(len(leaves))):
            for i, leaf in enumerate(leaves):
                leaf.requires_grad_(i != skipped)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            results = []
            for joined in (True, False):
                monkeypatch.setattr(fused_module, "JOINED", joined)
                before = copy.deepcopy(module.bn.state_dict())
                ran.clear()
                z = module(x, r)
                dz = torch.randn(z.shape, generator=checks.generator("dz")).to(dtype)
                result = [z, *torch.autograd.grad(z, wanted, dz), *module.bn.buffers()]
                results.append([t.detach().clone() for t in result])
                module.bn.load_state_dict(before)
                assert ran == (["_fwd_train", "_bwd"] if joined else [])
            for got, want in zip(*results, strict=True):
                assert got.stride() == want.stride()
                checks.assert_same_bits(got, want)


def test_joined_backward_returns_only_what_is_wanted(ops):
    (cin, k), options, _ = LAYERS[0]
    x, r = (t.detach() for t in inputs(LAYERS[0], True, key="wanted"))
    weight = torch.randn(k, cin // options["groups"], 3, 3, generator=checks.generator("wanted"))
    conf = ((1, 1), (1, 1), (1, 1), options["groups"])
    nothing = (None,) * 5
    z, y, mean, rstd, affine = ops.conv_bn_relu_fwd_train(
        x, weight, *conf, None, None, r, 1e-5, True, *nothing
    )
    full = None
    for wanted in itertools.product([True, False], repeat=3):
        got = ops.conv_bn_relu_bwd(r, x, weight, *conf, y, mean, rstd, None, affine, z, *wanted, False)
        full = full or got
        for tensor, want, there in zip(got, full, (*wanted[:2], True, True, wanted[2]), strict=True):
            checks.assert_same_bits(tensor, want if there else want.new_empty(0))


@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving", "cumulative"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_joined_op_moves_the_running_statistics(ops, momentum, bias):
    """Once per step, bit for bit as the op of their own, also without gradients; autograd sees the write, and
    a refused call leaves them alone."""
    x, _ = inputs(LAYERS[0], False, key="running")
    (cin, k), options, _ = LAYERS[0]
    layer = gconv.ConvBNReLU(cin, k, 3, momentum=momentum, bias=bias, **options)
    randomize(layer.conv, layer.bn, "running")
    conf = (layer.conv.stride, layer.conv.padding, layer.conv.dilation, layer.conv.groups)
    expected = [t.clone() for t in layer.bn.buffers()]
    versions = [t._version for t in (layer.bn.running_mean, layer.bn.running_var)]
    for step in range(3):
        with torch.set_grad_enabled(step != 1):
            layer(x)
        y, mean, var = ops.grouped_conv_fwd_stats(x.detach(), layer.conv.weight.detach(), *conf, None)
        shift = layer.conv.bias.detach() if bias else None
        count = y.numel() // k
        ops.batch_norm_update_running(*expected, mean, var, shift, count, momentum)
        for got, want in zip(layer.bn.buffers(), expected, strict=True):
            checks.assert_same_bits(got, want)
    assert [t._version for t in (layer.bn.running_mean, layer.bn.running_var)] == [v + 3 for v in versions]
    with pytest.raises(RuntimeError, match="residual"):
        running = (layer.bn.running_mean, layer.bn.running_var, layer.bn.num_batches_tracked, None, momentum)
        weight = layer.conv.weight.detach()
        ops.conv_bn_relu_fwd_train(x.detach(), weight, *conf, None, None, y[:1], 1e-5, True, *running)
    for got, want in zip(layer.bn.buffers(), expected, strict=True):
        checks.assert_same_bits(got, want)


def test_zero_batch(ops):
    for training in (True, False):
        stock, ours = pair_of_modules("zero batch", (8, 16), True, conv_options={"groups": 2, "padding": 1})
        stock.train(training), ours.train(training)
        results = []
        for module in (stock, ours):
            results.append(
                run(module, torch.empty(0, 8, 5, 6).requires_grad_(), torch.empty(0, 16, 5, 6), None)
            )
        for name, want in results[0].items():
            got = results[1][name]
            assert (got is None) == (want is None), name
            if want is not None:
                torch.testing.assert_close(
                    got, want, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
                )


def test_one_value_per_channel_is_refused_in_training(ops):
    _, ours = pair_of_modules("one value", (4, 4), True)
    with pytest.raises(ValueError, match=r"more than 1 value per channel.*\[1, 4, 1, 1\]"):
        ours(torch.ones(1, 4, 3, 3))
    assert ours.eval()(torch.ones(1, 4, 3, 3)).shape == (1, 4, 1, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nan_and_inf_go_where_torch_sends_them(ops, value, training):
    stock, ours = pair_of_modules("nan", (8, 8), True, conv_options={"groups": 4, "padding": 1})
    stock.train(training), ours.train(training)
    x = torch.randn(2, 8, 7, 6, generator=checks.generator("nan"))
    x[1, 3, 2, 4] = value
    with torch.no_grad():
        want, got = stock(x), ours(x)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(ours.bn, name).isfinite(), getattr(stock.bn, name).isfinite()), name


@pytest.mark.parametrize("kernel_size, padding", [(1, 0), (5, 2), ((3, 1), (1, 0)), (7, 3)])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_other_kernel_sizes_run_on_torch_and_say_so(ops, kernel_size, padding, training):
    ours = gconv.ConvBNReLU(6, 12, kernel_size, padding=padding, groups=2)
    stock = Stock(
        nn.Conv2d(6, 12, kernel_size, padding=padding, groups=2, bias=False), nn.BatchNorm2d(12), True
    )
    randomize(stock.conv, stock.bn, "other kernel")
    ours.load_state_dict(stock.state_dict())
    stock.train(training), ours.train(training)
    x = torch.randn(2, 6, 8, 9, generator=checks.generator("other kernel")).requires_grad_()
    with gconv.set_policy("silent"):
        compare(stock, ours, x, None)
    counts = gconv.backend.counts()
    assert counts.get("torch.conv2d") == 1 and "cpu.conv_bn_relu" not in counts, counts


def test_backend_torch_is_the_reference(ops):
    stock, ours = pair_of_modules("torch", (8, 16), True, conv_options={"groups": 2, "padding": 1})
    x = torch.randn(2, 8, 5, 6, generator=checks.generator("torch")).requires_grad_()
    with gconv.use_backend("torch"):
        compare(stock, ours, x, None)
    assert not [k for k in gconv.backend.counts() if k.startswith("cpu.")], gconv.backend.counts()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual, relu", BOTH)
def test_functional_form(ops, training, residual, relu):
    """gconv.functional.conv_bn_relu is what the module computes, state included."""
    for layer in LAYERS[:4]:
        _, module = pair_of_modules(str(layer), layer[0], relu, conv_options={**layer[1], "bias": True})
        module.train(training)
        bn = copy.deepcopy(module.bn)
        x, r = inputs(layer, residual)
        want = module(x, r)
        conv = module.conv
        got = gconv.functional.conv_bn_relu(
            x,
            conv.weight,
            bn,
            conv.bias,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            residual=r,
            relu=relu,
        )
        assert_same_bits(got.detach(), want.detach())
        for (name, a), b in zip(bn.named_buffers(), module.bn.buffers(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
def test_padding_modes(ops, padding_mode):
    options = {"groups": 2, "padding": 1, "padding_mode": padding_mode}
    stock, ours = pair_of_modules(padding_mode, (6, 6), True, conv_options=options)
    x = torch.randn(2, 6, 5, 7, generator=checks.generator(padding_mode)).requires_grad_()
    compare(stock, ours, x, None, key=padding_mode)
    assert_ran_on_our_kernels()


@checks.one_thread()
def test_training_step_by_step_follows_stock(ops):
    """Twenty SGD steps of two blocks: losses stay together to float32 noise, so every gradient feeds the
    right parameter."""

    def network(block):
        torch.manual_seed(0)
        return nn.Sequential(
            block(3, 16, 1, 1),
            block(16, 16, 1, 4),
            block(16, 32, 2, 8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 4),
        )

    def stock_block(cin, cout, stride, groups):
        return Stock(
            nn.Conv2d(cin, cout, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(cout), True
        )

    def our_block(cin, cout, stride, groups):
        return gconv.ConvBNReLU(cin, cout, 3, stride, 1, groups=groups)

    gen = checks.generator("steps")
    x, target = torch.randn(16, 3, 10, 10, generator=gen), torch.randint(4, (16,), generator=gen)
    curves = []
    for block, dtype in (
        (stock_block, torch.float64),
        (stock_block, torch.float32),
        (our_block, torch.float32),
    ):
        model = network(block).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x.to(dtype)), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses, dtype=torch.float64))
    exact, own, got = curves
    assert exact[-1] < 0.5 * exact[0], "the network does not learn: the curve would prove nothing"
    assert ((got - exact).abs() <= 10 * (own - exact).abs().cummax(0).values + 1e-5).all(), (
        got - exact,
        own - exact,
    )
