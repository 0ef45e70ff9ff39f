"""Derivatives of every order, function transforms and the state of a batch norm: always beside stock torch.

The formulas of the Functions are checked twice: in float64, with every op replaced by its reference, by finite
differences; and in float32 on the kernels, against the same expression in stock torch.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import gconv
from gconv import batch_norm as bn_module
from gconv import conv_bn_relu as fused_module
from gconv import grouped_conv as conv_module
from gconv.functional import batch_norm, conv_bn_relu, fuse_modules_forward, grouped_conv

STRIDE, PADDING, DILATION, GROUPS = (2, 1), (1, 2), (1, 2), 2
GEOMETRY = (STRIDE, PADDING, DILATION, GROUPS)
INPUT, WEIGHT, OUTPUT = (2, 4, 6, 5), (6, 2, 3, 3), (2, 6, 3, 5)
OPS = {
    conv_module: ("fwd", "bwd_input", "bwd_weight"),
    bn_module: ("_stats", "fold", "apply_affine", "bwd_reduce", "bwd_apply"),
    fused_module: (
        "fwd", "_fwd_stats", "bwd_input", "bwd_weight", "fold", "apply_affine", "bwd_reduce", "bwd_apply",
    ),
}  # fmt: skip


def values(*shape, seed=0, dtype=torch.float32, positive=False):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)
    return (t.abs() + 0.5 if positive else t).to(dtype)


def close(actual, want, tolerance=2e-5, label=""):
    """Within `tolerance` of the largest wanted value, which must not be zero everywhere."""
    assert actual.shape == want.shape and actual.dtype == want.dtype, label
    scale = want.abs().max().item()
    assert scale > 0, f"{label}: a wanted value of zeros proves nothing"
    error = (actual - want).abs().max().item()
    assert error <= tolerance * scale, f"{label}: error {error:.2e}, largest value {scale:.2e}"


def reference_of(name):
    stem = name.removeprefix("_")
    names = {"stats": "batch_norm_stats", "fold": "batch_norm_fold", "apply_affine": "batch_norm_apply"}
    names |= {"bwd_reduce": "batch_norm_bwd_reduce", "bwd_apply": "batch_norm_bwd_apply"}
    full = names.get(stem, f"grouped_conv_{stem}") + "_ref"
    return getattr(bn_module if full.startswith("batch_norm") else conv_module, full)


@pytest.fixture
def reference_ops(monkeypatch):
    """The Functions on references instead of kernels, so that they take float64."""
    for module, names in OPS.items():
        for name in names:
            monkeypatch.setattr(module, name, reference_of(name))


def doubles(*shapes, first_positive=False):
    tensors = [values(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate(shapes)]
    return [t.requires_grad_() for t in tensors]


def check_both_orders(function, tensors, first_output=True):
    def first(*args):
        out = function(*args)
        return out[0] if isinstance(out, tuple) else out

    assert gradcheck(first, tensors)
    assert gradgradcheck(first, tensors, fast_mode=True)


# ------------------------------------------------------------------ the formulas, by finite differences


@pytest.mark.parametrize("scale", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_gradcheck_of_grouped_conv(reference_ops, scale, relu, residual):
    x, weight, c, d, r = doubles(INPUT, WEIGHT, (6,), (6,), OUTPUT)
    tensors = [x, weight, *([c, d] if scale else []), *([r] if residual else [])]

    def function(x, weight, *rest):
        rest = list(rest)
        c, d = (rest.pop(0), rest.pop(0)) if scale else (None, None)
        r = rest.pop(0) if residual else None
        return conv_module.conv_apply(x, weight, c, d, r, relu, *GEOMETRY)

    check_both_orders(function, tensors)


def test_gradcheck_of_the_gradients_of_grouped_conv(reference_ops):
    dy, weight, x = doubles(OUTPUT, WEIGHT, INPUT)
    check_both_orders(lambda dy, w: conv_module.bwd_input_apply(dy, w, INPUT, *GEOMETRY), [dy, weight])
    check_both_orders(lambda dy, x: conv_module.bwd_weight_apply(dy, x, WEIGHT, *GEOMETRY), [dy, x])


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("kind", ["batch_norm", "finish_on_load", "finish_first"])
def test_gradcheck_of_training(reference_ops, monkeypatch, kind, residual, relu, affine):
    monkeypatch.setattr(fused_module, "FINISH_ON_LOAD", kind == "finish_on_load")
    x, weight, gamma, beta, r, plain = doubles(INPUT, WEIGHT, (6,), (6,), OUTPUT, OUTPUT)
    extra = [*([gamma, beta] if affine else []), *([r] if residual else [])]

    def parts(rest):
        rest = list(rest)
        gamma, beta = (rest.pop(0), rest.pop(0)) if affine else (None, None)
        return gamma, beta, rest.pop(0) if residual else None

    if kind == "batch_norm":
        check_both_orders(lambda x, *rest: bn_module._train_apply(x, *parts(rest), 1e-3, relu), [plain, *extra])
    else:
        check_both_orders(
            lambda x, w, *rest: fused_module._train_apply(x, w, None, *parts(rest), 1e-3, relu, *GEOMETRY),
            [x, weight, *extra],
        )


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_gradcheck_of_inference(reference_ops, residual, relu):
    x, scale, shift, r = doubles(OUTPUT, (6,), (6,), OUTPUT)
    tensors = [x, scale, shift, *([r] if residual else [])]
    check_both_orders(
        lambda x, c, d, *r: bn_module._affine_apply(x, c, d, r[0] if r else None, relu), tensors
    )


def test_third_derivative_of_training(reference_ops):
    x, weight, gamma, beta, r = (t.detach() for t in doubles(INPUT, WEIGHT, (6,), (6,), OUTPUT))

    def ours(x):
        z = fused_module._train_apply(x, weight, None, gamma, beta, r, 1e-3, True, *GEOMETRY)[0]
        return z.pow(3).sum()

    def stock(x):  # from elements: the third derivative of torch's own batch_norm takes its mean for a constant
        y = F.conv2d(x, weight, None, *GEOMETRY)
        y = y - y.mean((0, 2, 3), keepdim=True)
        y = y * (y.square().mean((0, 2, 3), keepdim=True) + 1e-3).rsqrt()
        return torch.relu(gamma[:, None, None] * y + beta[:, None, None] + r).pow(3).sum()

    def third(f):
        return grad(lambda x: grad(lambda x: grad(f)(x).sin().sum())(x).sin().sum())(x)

    close(third(ours), third(stock), 1e-9)


# -------------------------------------------------------------------------- the kernels, beside stock torch


class Block(nn.Module):
    """relu?(bn(conv(x)) + residual), ours or stock."""

    def __init__(self, bias=False, relu=True, stock=False, **norm):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, STRIDE, PADDING, DILATION, GROUPS, bias)
        self.bn = nn.BatchNorm2d(6, **norm)
        self.relu, self.stock = relu, stock
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(values(*p.shape, seed=i))
            if self.bn.running_mean is not None:
                self.bn.running_mean.copy_(values(6, seed=8))
                self.bn.running_var.copy_(values(6, seed=9, positive=True))

    def forward(self, x, residual=None):
        if not self.stock:
            conv = self.conv
            return conv_bn_relu(
                x, conv.weight, self.bn, conv.bias, STRIDE, PADDING, DILATION, GROUPS, residual, self.relu
            )
        y = self.bn(self.conv(x))
        y = y if residual is None else y + residual
        return torch.relu(y) if self.relu else y


def twins(**arguments):
    ours = Block(**arguments)
    stock = copy.deepcopy(ours)
    stock.stock = True
    return ours, stock


def both_orders(block, x, residual, dz):
    """(z, gradients, gradients of a function of the gradients, running statistics) by name."""
    leaves = {"x": x.clone().requires_grad_(), **dict(block.named_parameters())}
    if residual is not None:
        leaves["residual"] = residual.clone().requires_grad_()
    z = block(leaves["x"], leaves.get("residual"))
    tensors = list(leaves.values())
    plain = torch.autograd.grad(z, tensors, dz, retain_graph=True)
    first = torch.autograd.grad(z, tensors, dz, create_graph=True)
    for name, a, b in zip(leaves, plain, first):
        torch.testing.assert_close(a, b, msg=f"{name}: differs with create_graph")
    penalty = sum(g.square().sum() for g in first)
    second = torch.autograd.grad(penalty, tensors, allow_unused=True)
    results = {"z": z.detach()} | {f"d{n}": g.detach() for n, g in zip(leaves, first)}
    results |= {f"second d{n}": g for n, g in zip(leaves, second)}
    return results | {name: b.clone() for name, b in block.named_buffers()}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bias", [False, True], ids=["unbiased", "bias"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_conv_bn_relu_is_stocks_to_the_second_order(ops, memory_format, training, bias, relu, residual):
    ours, stock = (block.train(training) for block in twins(bias=bias, relu=relu))
    x, dz = values(*INPUT).to(memory_format=memory_format), values(*OUTPUT, seed=1)
    r = values(*OUTPUT, seed=2) if residual else None
    got, want = both_orders(ours, x, r, dz), both_orders(stock, x, r, dz)
    assert got["z"].stride() == want["z"].stride()
    for name, expected in want.items():
        if training and "conv.bias" in name:  # exactly zero here, rounding in torch
            assert got[name] is None or not got[name].any()
        elif expected is None or not expected.any():
            assert got[name] is None or not got[name].any(), name
        else:
            close(got[name].float(), expected.float(), 1e-3 if "second" in name else 5e-5, name)


@pytest.mark.parametrize("bias", [False, True], ids=["unbiased", "bias"])
def test_grouped_conv_is_torchs_to_the_second_order(ops, bias):
    tensors = [values(*INPUT), values(*WEIGHT), *([values(6)] if bias else [])]

    def run(function):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = function(leaves[0], leaves[1], leaves[2] if bias else None, *GEOMETRY)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return [y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    for got, want in zip(run(grouped_conv), run(F.conv2d)):
        close(got, want)


def test_batch_norm_is_torchs_to_the_second_order(ops):
    tensors = [values(*OUTPUT), values(6), values(6, seed=1)]

    def run(function):
        x, gamma, beta = leaves = [t.clone().requires_grad_() for t in tensors]
        y = function(x, None, None, gamma, beta, True)
        first = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        return [y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    for got, want in zip(run(batch_norm), run(F.batch_norm)):
        close(got, want, 1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_bfloat16_gradients_have_their_parameters_dtypes_and_values(ops, training):
    ours, stock = (block.train(training) for block in twins())
    ours.conv.to(torch.bfloat16)
    stock.double()
    stock.conv.weight.data.copy_(ours.conv.weight.data)
    x, dz = values(*INPUT).bfloat16(), values(*OUTPUT, seed=1).bfloat16()
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    ours(leaf).backward(dz)
    stock(wide).backward(dz.double())
    pairs = {"x": (leaf, wide), "weight": (ours.conv.weight, stock.conv.weight)}
    pairs |= {name: (getattr(ours.bn, name), getattr(stock.bn, name)) for name in ("weight", "bias")}
    for name, (a, b) in pairs.items():
        assert a.grad.dtype == a.dtype
        close(a.grad.double(), b.grad, 3e-2, name)


# -------------------------------------------------------------------------------- only what is asked for


def refuse(*args):
    raise AssertionError("an op ran that nobody needs")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("frozen", ["x", "weight", "everything but gamma"])
def test_frozen_tensors_skip_their_work(ops, monkeypatch, training, frozen):
    block = Block().train(training)
    x = values(*INPUT).requires_grad_(frozen == "weight")
    block.conv.weight.requires_grad_(frozen == "x")
    z = block(x)
    forbidden = {"x": ["bwd_input"], "weight": ["bwd_weight"]}.get(frozen, ["bwd_input", "bwd_weight"])
    if not training:  # the scale's gradient is <dweight, weight>
        forbidden = [name for name in forbidden if name != "bwd_weight"]
    for name in forbidden:
        monkeypatch.setattr(fused_module, name, refuse)
        monkeypatch.setattr(conv_module, name, refuse)
    z.sum().backward()
    assert (x.grad is not None) == (frozen == "weight")
    assert (block.conv.weight.grad is not None) == (frozen == "x")
    assert block.bn.weight.grad is not None and block.bn.bias.grad is not None


def test_training_stores_the_raw_output_and_nothing_normalised(ops):
    """Bytes that the graph holds: input, raw output and small vectors; with a residual also the output."""
    x = torch.randn(2, 8, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    layer = gconv.ConvBNReLU(8, 8, 3, padding=1, groups=2)

    def held(residual):
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.setdefault(t.data_ptr(), t) is None or t, lambda t: t
        ):
            z = layer(x, residual)
        activations = [t for t in seen.values() if t.shape == x.shape]
        return len(activations), any(t.data_ptr() == z.data_ptr() for t in activations)

    assert held(None) == (2, False)
    assert held(torch.randn_like(x)) == (3, True)


def test_a_frozen_batch_norm_trains_the_convolution_in_one_pass(ops):
    block = Block()
    frozen = FrozenBatchNorm2d(block.bn)
    weight, x, r = block.conv.weight, values(*INPUT).requires_grad_(), values(*OUTPUT, seed=2)

    def stock(x):
        return torch.relu(frozen(F.conv2d(x, weight, None, *GEOMETRY)) + r)

    ours = conv_bn_relu(x, weight, frozen, None, *GEOMETRY, r)
    assert frozen.training
    for got, want in zip(
        (ours, *torch.autograd.grad(ours.square().sum(), (x, weight))),
        (stock(x), *torch.autograd.grad(stock(x).square().sum(), (x, weight))),
    ):
        close(got, want)


class FrozenBatchNorm2d(nn.Module):
    """As in torchvision and detectron2: four buffers, no num_batches_tracked, no momentum."""

    def __init__(self, bn):
        super().__init__()
        self.eps = bn.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(bn, name).detach().clone())

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


# -------------------------------------------------------------------------------------- function transforms

X, WEIGHTS = values(3, *INPUT), values(3, *WEIGHT)


def ours_conv(x, weight):
    return grouped_conv(x, weight, None, *GEOMETRY)


def stock_conv(x, weight):
    return F.conv2d(x, weight, None, *GEOMETRY)


def loss_of(conv):
    return lambda x, weight: conv(x, weight).sin().sum()


def penalty_of(conv, i):
    """A scalar function of the gradient of `loss_of(conv)` to argument i."""
    return lambda x, weight: grad(loss_of(conv), i)(x, weight).cos().sum()


@pytest.mark.parametrize("i", [0, 1], ids=["x", "weight"])
def test_func_grad_and_its_grad(ops, i):
    args = (X[0], WEIGHTS[0])
    close(grad(loss_of(ours_conv), i)(*args), grad(loss_of(stock_conv), i)(*args))
    for j in (0, 1):
        close(grad(penalty_of(ours_conv, i), j)(*args), grad(penalty_of(stock_conv, i), j)(*args), 1e-4)


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0), (1, 0)], ids=str)
def test_vmap_of_grouped_conv_and_its_gradients(ops, dims):
    args = [X[0] if dims[0] is None else X, WEIGHTS[0] if dims[1] is None else WEIGHTS]
    if dims[0] == 1:
        args[0] = args[0].transpose(0, 1)
    gconv.backend.reset_counts()
    close(vmap(ours_conv, dims)(*args), vmap(stock_conv, dims)(*args))
    assert gconv.backend.counts() == {"cpu.grouped_conv": 1}
    for i in (0, 1):
        close(vmap(grad(loss_of(ours_conv), i), dims)(*args), vmap(grad(loss_of(stock_conv), i), dims)(*args))
        ours, stock = grad(penalty_of(ours_conv, i), 1 - i), grad(penalty_of(stock_conv, i), 1 - i)
        close(vmap(ours, dims)(*args), vmap(stock, dims)(*args), 1e-4)


def test_jacrev_and_batched_gradients(ops):
    x, weight = X[0], WEIGHTS[0]
    pixels = [lambda x, f=f: f(x, weight).sum((0, 2)) for f in (ours_conv, stock_conv)]
    close(jacrev(pixels[0])(x), jacrev(pixels[1])(x))
    leaf, cotangents = x.clone().requires_grad_(), values(3, *OUTPUT)
    batched = [
        torch.autograd.grad(f(leaf, weight), leaf, cotangents, is_grads_batched=True)[0]
        for f in (ours_conv, stock_conv)
    ]
    close(*batched)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_transforms_of_a_block(ops, training, residual):
    """Per-sample gradients and their derivatives. In-place updates of captured buffers are refused by torch under a
    transform, for stock modules too, hence no running statistics in training."""
    pair = [block.train(training) for block in twins(bias=True, track_running_stats=not training)]
    r = values(*OUTPUT, seed=2) if residual else None

    def loss_of(block):
        buffers = dict(block.named_buffers())
        return lambda p, x: functional_call(block, (p, buffers), (x, r)).mul(0.3).sin().sum()

    (ours, stock), parameters = map(loss_of, pair), dict(pair[1].named_parameters())
    names = [name for name in parameters if not (training and name == "conv.bias")]
    for transform in (
        lambda f: grad(f)(parameters, X[0]),
        lambda f: vmap(grad(f), (None, 0))(parameters, X),
        lambda f: grad(lambda p: vmap(f, (None, 0))(p, X).sum())(parameters),
    ):
        got, want = transform(ours), transform(stock)
        for name in names:
            close(got[name], want[name], 1e-4, name)
    for transform in (
        lambda f: vmap(grad(f, 1), (None, 0))(parameters, X),
        lambda f: grad(lambda x: grad(f, 1)(parameters, x).cos().sum())(X[0]),
        lambda f: vmap(grad(lambda x: grad(f, 1)(parameters, x).cos().sum()))(X),
    ):
        close(transform(ours), transform(stock), 1e-3)


def test_transforms_that_torch_refuses_are_refused(ops):
    block = Block()
    parameters = dict(block.named_parameters())
    with pytest.raises(RuntimeError, match="in-place"):
        grad(lambda p: functional_call(block, p, (X[0],)).sum())(parameters)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward_mode_is_loud_never_zero(ops, training):
    block, x = Block(track_running_stats=not training).train(training), X[0]
    raises = pytest.raises(NotImplementedError, match="jvp")
    for function in (lambda x: ours_conv(x, WEIGHTS[0]), block, lambda x: batch_norm(x, None, None, training=True)):
        with raises:
            jvp(function, (x,), (x,))
        for grad_mode in (torch.no_grad(), torch.enable_grad()):
            with grad_mode, forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
                function(forward_ad.make_dual(x, x))
    with raises:
        hessian(lambda x: ours_conv(x, WEIGHTS[0]).square().sum())(x)


# --------------------------------------------------------------------------------------- users of autograd


def test_checkpoint_gives_the_same_gradients(ops):
    layer = gconv.ConvBNReLU(4, 4, 3, padding=1, groups=2, track_running_stats=False)
    x = values(*INPUT)
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        run(leaf).square().sum().backward()
        results.append([leaf.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("how", ["sum", "mean", "slice", "channels first", "expand"])
def test_output_gradients_of_any_strides(ops, training, how):
    """`z.sum().backward()` sends a gradient with stride 0."""
    w = values(*OUTPUT, seed=3)
    reduce = {
        "sum": lambda z: z.sum() + (z * w).sum(),
        "mean": lambda z: (z.mean((2, 3)) * w[:, :, 0, 0]).sum() + z.square().mul(w).sum(),
        "slice": lambda z: (torch.cat((z, z), 1)[:, 3:9] * w).sum(),
        "channels first": lambda z: (z.contiguous() * w).sum(),
        "expand": lambda z: (z * w).expand(2, *z.shape).sum(),
    }[how]
    grads = []
    for block in twins(relu=False):
        x = values(*INPUT).to(memory_format=torch.channels_last).requires_grad_()
        reduce(block.train(training)(x)).backward()
        grads.append([x.grad, block.conv.weight.grad, block.bn.weight.grad, block.bn.bias.grad])
    for got, want in zip(*grads):
        close(got, want, 1e-4)


def test_sum_backward_alone(ops):
    x = values(*INPUT).requires_grad_()
    weight = values(*WEIGHT).requires_grad_()
    ours = torch.autograd.grad(ours_conv(x, weight).sum(), (x, weight))
    stock = torch.autograd.grad(stock_conv(x, weight).sum(), (x, weight))
    for got, want in zip(ours, stock):
        close(got, want)


def test_a_second_backward_needs_a_retained_graph(ops):
    x = values(*INPUT).requires_grad_()
    z = Block()(x)
    z.sum().backward(retain_graph=True)
    z.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        z.sum().backward()


def test_a_changed_saved_tensor_is_noticed(ops):
    block, x = Block(), values(*INPUT).requires_grad_()
    z = block(x)
    with torch.no_grad():
        block.conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast_casts_activations_and_keeps_parameters(ops, dtype, training):
    block = Block(bias=True).train(training)
    x, r = values(*INPUT).requires_grad_(), values(*OUTPUT, seed=2)
    with torch.autocast("cpu", dtype):
        z = block(x, r)
        y = grouped_conv(x, block.conv.weight, block.conv.bias, *GEOMETRY)
    assert z.dtype == y.dtype == dtype
    z.float().square().sum().backward()
    for p in (x, *block.parameters()):
        assert p.grad.dtype == torch.float32
    twin = Block(bias=True, stock=True).train(training)
    leaf = values(*INPUT).requires_grad_()
    twin(leaf, r).square().sum().backward()
    close(z.float(), twin(leaf, r), 3e-2)
    close(x.grad, leaf.grad, 5e-2)
    close(block.conv.weight.grad, twin.conv.weight.grad, 5e-2)
    assert block.bn.running_mean.dtype == torch.float32


def test_ddp_style_zero_gradient_of_a_bias_before_training(ops):
    """torch's is rounding noise around zero; ours is zero and, unlike None, takes part in a reducer."""
    block = Block(bias=True)
    block(values(*INPUT)).square().sum().backward()
    assert torch.equal(block.conv.bias.grad, torch.zeros(6))


# ------------------------------------------------------------------------------------------ the ops themselves


def samples(ops):
    """(op, reference, arguments) for every op with every optional argument present and absent."""
    x, weight, dy, y, r = values(*INPUT), values(*WEIGHT), values(*OUTPUT), values(*OUTPUT, seed=1), values(*OUTPUT)
    act, affine, finish = values(2, 4), values(2, 6), values(6, 6)
    act4 = values(4, 4)
    gamma, beta, mean, var = values(6), values(6, seed=1), values(6, seed=2), values(6, seed=3, positive=True)
    rstd, coef = var.rsqrt(), values(4, 6)
    conv = [list(STRIDE), list(PADDING), list(DILATION), GROUPS]
    table = {
        "grouped_conv_fwd": [
            (x, weight, *conv, None, None, None, False),
            (x, weight, *conv, None, affine, r, True),
            (x, weight, *conv, act, affine, None, True),
        ],
        "grouped_conv_fwd_stats": [(x, weight, *conv, None), (x, weight, *conv, act)],
        "grouped_conv_bwd_input": [
            (dy, weight, list(INPUT), *conv, None, None, None, None),
            (dy, weight, list(INPUT), *conv, y, finish, x, act4),
        ],
        "grouped_conv_bwd_weight": [
            (dy, x, list(WEIGHT), *conv, None, None, None),
            (dy, x, list(WEIGHT), *conv, y, finish, act),
        ],
        "batch_norm_stats": [(y,)],
        "batch_norm_fold": [(mean, var, gamma, beta, 1e-3), (mean, var, None, None, 1e-3)],
        "batch_norm_apply": [(y, affine, None, False), (y, affine, r, True)],
        "batch_norm_bwd_reduce": [
            (dy, y, mean, rstd, gamma, affine, None),
            (dy, y, mean, rstd, None, None, r),
            (dy, y, mean, rstd, None, None, None),
        ],
        "batch_norm_bwd_apply": [(dy, y, coef, affine, None, False), (dy, y, coef, None, r, True)],
    }  # fmt: skip
    for name, cases in table.items():
        module = conv_module if name.startswith("grouped_conv") else bn_module
        for args in cases:
            yield name, getattr(ops, name).default, getattr(module, name + "_ref"), args


CASES = [(name, i) for name, i in (
    ("grouped_conv_fwd", 3), ("grouped_conv_fwd_stats", 2), ("grouped_conv_bwd_input", 2),
    ("grouped_conv_bwd_weight", 2), ("batch_norm_stats", 1), ("batch_norm_fold", 2), ("batch_norm_apply", 2),
    ("batch_norm_bwd_reduce", 3), ("batch_norm_bwd_apply", 2),
)]  # fmt: skip
ALL_CASES = [(name, i) for name, count in CASES for i in range(count)]


def sample(ops, name, i):
    return [entry[1:] for entry in samples(ops) if entry[0] == name][i]


def test_every_op_is_sampled(ops):
    schemas = {s.name.removeprefix("gconv::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("gconv::")}
    assert schemas == {name for name, _ in CASES} | {"cpu_isa", "set_cpu_isa"}
    assert [entry[0] for entry in samples(ops)] == [name for name, _ in ALL_CASES]


@pytest.mark.parametrize("name,i", ALL_CASES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_opcheck(ops, name, i, memory_format):
    op, _, args = sample(ops, name, i)
    args = [
        a.to(memory_format=memory_format) if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in args
    ]
    opcheck(op, tuple(args))
    leaves = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    opcheck(op, tuple(leaves))


@pytest.mark.parametrize("name,i", ALL_CASES)
def test_autograd_of_an_op_is_that_of_its_reference(ops, name, i):
    """Both orders, to every argument, through every output."""
    op, ref, args = sample(ops, name, i)

    def run(function, dtype):
        inputs = [a.to(dtype).requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
        leaves = [a for a in inputs if isinstance(a, torch.Tensor)]
        out = function(*inputs)
        out = [o for o in (out if isinstance(out, tuple) else (out,)) if o.numel()]
        loss = sum((o * values(*o.shape, seed=k, dtype=o.dtype)).sum() + o.square().sum() for k, o in enumerate(out))
        first = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        penalty = sum(g.square().sum() for g in first if g is not None and g.requires_grad)
        second = torch.autograd.grad(penalty, leaves, allow_unused=True)
        return [*out, *first, *second]

    for k, (got, want) in enumerate(zip(run(op, torch.float32), run(ref, torch.float64))):
        if want is None or not want.any():
            assert got is None or not got.any(), k
        else:
            close(got.double(), want, 2e-3, str(k))


# ------------------------------------------------------------------------------- the state of a batch norm


def run_steps(block, steps=3, training=True, grad_mode=True):
    block.train(training)
    with torch.set_grad_enabled(grad_mode):
        return [block(values(*INPUT, seed=step)).detach() for step in range(steps)]


@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bias", [False, True], ids=["unbiased", "bias"])
@pytest.mark.parametrize(
    "norm",
    [
        {}, {"momentum": 0.3}, {"momentum": 1.0}, {"momentum": 0.0}, {"momentum": None}, {"affine": False},
        {"track_running_stats": False}, {"eps": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_running_statistics_move_as_in_torch(ops, norm, bias, training, grad_mode):
    ours, stock = twins(bias=bias, **norm)
    got, want = run_steps(ours, 3, training, grad_mode), run_steps(stock, 3, training, grad_mode)
    for a, b in zip(got, want):
        close(a, b)
    assert dict(ours.named_buffers()).keys() == dict(stock.named_buffers()).keys()
    for (name, a), (_, b) in zip(ours.named_buffers(), stock.named_buffers()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_running_statistics_after_a_1x1_convolution(ops):
    ours, stock = nn.BatchNorm2d(6, momentum=None), nn.BatchNorm2d(6, momentum=None)
    conv = nn.Conv2d(4, 6, 1)
    for step in range(3):
        x = values(*INPUT, seed=step)
        close(fuse_modules_forward(x, conv, ours, None, False), stock(conv(x)))
    for a, b in zip(ours.buffers(), stock.buffers()):
        torch.testing.assert_close(a, b)


def test_buffers_in_bfloat16(ops):
    ours, stock = twins()
    for block in (ours, stock):
        block.to(torch.bfloat16)
    with torch.no_grad():
        a, b = ours(values(*INPUT).bfloat16()), stock(values(*INPUT).bfloat16())
    close(a.float(), b.float(), 3e-2)
    for (name, p), (_, q) in zip(ours.named_buffers(), stock.named_buffers()):
        assert p.dtype == q.dtype
        torch.testing.assert_close(p, q, rtol=2e-2, atol=1e-2, msg=name)


def test_one_buffer_missing_is_torchs_business(ops):
    for training in (True, False):
        outcomes = []
        for block in twins():
            block.bn.running_var = None
            block.train(training)
            try:
                outcomes.append(block(values(*INPUT)))
            except (RuntimeError, ValueError) as error:
                outcomes.append(type(error))
        assert type(outcomes[0]) is type(outcomes[1])
        if isinstance(outcomes[0], torch.Tensor):
            close(*outcomes)


def test_zero_batch_and_one_value_per_channel(ops):
    for training in (True, False):
        pair = [block.train(training) for block in twins()]
        for block in pair:
            x = torch.empty(0, *INPUT[1:], requires_grad=True)
            z = block(x)
            z.sum().backward()
            assert z.shape == (0, *OUTPUT[1:]) and x.grad.shape == x.shape
            assert torch.equal(block.conv.weight.grad, torch.zeros(WEIGHT))
        for a, b in zip(pair[0].buffers(), pair[1].buffers()):
            assert torch.equal(a, b)
    layer = gconv.ConvBNReLU(4, 4, 3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(torch.randn(1, 4, 3, 3))
    assert torch.equal(layer.bn.running_var, torch.ones(4))
    assert layer.eval()(torch.randn(1, 4, 3, 3)).shape == (1, 4, 1, 1)
    assert grouped_conv(torch.empty(0, *INPUT[1:]), values(*WEIGHT), None, *GEOMETRY).shape == (0, *OUTPUT[1:])


# ------------------------------------------------------------------------------------- modules that must be called


def calls_of(conv, bn, x=None, **kwargs):
    with gconv.trace() as t:
        z = fuse_modules_forward(values(*INPUT) if x is None else x, conv, bn, **kwargs)
    return z, [(row.kernel, row.reason) for row in t]


@pytest.mark.parametrize("child", ["conv", "bn"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_children_run(ops, child, kind):
    modules = {"conv": gconv.Conv2d(4, 4, 3, padding=1), "bn": nn.BatchNorm2d(4)}
    seen = []
    handle = getattr(modules[child], f"register_{kind}_hook")(lambda *args: seen.append(kind))
    z, calls = calls_of(**modules, x=values(*INPUT).requires_grad_())
    z.sum().backward()
    assert seen == [kind]
    assert ("modules", f"called one by one: {child}: has hooks") in calls
    handle.remove()
    assert calls_of(**modules)[1] == [("cpu.conv_bn_relu", None)]


def test_foreign_modules_are_called(ops):
    conv, bn = gconv.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    spectral = nn.utils.parametrizations.spectral_norm(gconv.Conv2d(4, 4, 3, padding=1)).eval()
    doubled = nn.BatchNorm2d(4)
    doubled.forward = lambda x: x * 2
    for pair, reason in (
        ((conv, nn.SyncBatchNorm(4).eval()), "bn: want BatchNorm2d or FrozenBatchNorm2d, got SyncBatchNorm"),
        ((conv, nn.GroupNorm(2, 4)), "bn: want BatchNorm2d or FrozenBatchNorm2d, got GroupNorm"),
        ((nn.Sequential(conv), bn), "conv: want Conv2d, got Sequential"),
        ((spectral, bn), "conv: want Conv2d, got ParametrizedConv2d"),
        ((conv, doubled), "bn: its forward is replaced"),
    ):
        bn.reset_running_stats()
        z, calls = calls_of(*pair, residual=values(2, 4, 6, 5))
        assert calls[-1] == ("modules", f"called one by one: {reason}")
        bn.reset_running_stats()
        close(z, torch.relu(pair[1](pair[0](values(*INPUT))) + values(2, 4, 6, 5)))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_padding_modes_are_fused(ops, mode, padding):
    conv, bn = gconv.Conv2d(4, 4, 3, padding=padding, groups=2, padding_mode=mode), nn.BatchNorm2d(4)
    z, calls = calls_of(conv, bn)
    assert calls == [("cpu.conv_bn_relu", None)]
    close(z, torch.relu(nn.BatchNorm2d(4)(nn.Conv2d.forward(conv, values(*INPUT)))))


def test_a_1x1_convolution_runs_on_torch_by_design(ops):
    conv, bn = nn.Conv2d(4, 6, 1, stride=2), nn.BatchNorm2d(6)
    shape = conv(values(*INPUT)).shape
    z, calls = calls_of(conv, bn, residual=values(*shape))
    assert [kernel for kernel, _ in calls] == ["torch.conv2d", "cpu.batch_norm"]
    assert calls[0][1] == "by design: kernel_size: want 3x3, got 1x1"
    close(z, torch.relu(nn.BatchNorm2d(6)(conv(values(*INPUT))) + values(*shape)))


# ----------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "change,match",
    [
        ({"x": values(4)}, r"x: want \[N, C, H, W\]"),
        ({"x": values(2, 5, 6, 5)}, r"weight: want .*C = 5"),
        ({"x": values(2, 8, 6, 5)}, r"weight: want .*C/groups = 4, got \[6, 2, 3, 3\]"),
        ({"weight": values(6, 2, 3)}, r"weight: want \[K, C/groups, R, S\], got \[6, 2, 3\]"),
        ({"weight": values(5, 2, 3, 3)}, r"weight: want K that groups = 2 divides, got \[5, 2, 3, 3\]"),
        ({"bias": values(5)}, r"bias: want \[K\] with K = 6, got \[5\]"),
        ({"weight": values(*WEIGHT).double()}, "weight: want dtype torch.float32 as of x, got torch.float64"),
        ({"bias": values(6).bfloat16()}, "bias: want dtype torch.float32 as of x, got torch.bfloat16"),
        ({"weight": values(*WEIGHT).to("meta")}, "weight: want device cpu as of x, got meta"),
        ({"groups": 0}, "groups: want at least 1, got 0"),
        ({"stride": 0}, r"stride: want at least 1, got \(0, 0\)"),
        ({"dilation": (1, 0)}, r"dilation: want at least 1, got \(1, 0\)"),
        ({"padding": -1}, r"padding: want at least 0, got \(-1, -1\)"),
        ({"padding": "full"}, "padding: want ints, 'same' or 'valid', got 'full'"),
        ({"padding": "same", "stride": 2}, r"padding: want ints with stride \(2, 2\), got 'same'"),
        ({"stride": (1, 1, 1)}, "stride: want an int or a pair of ints, got"),
        ({"x": values(2, 4, 1, 5)}, "x: want a padded image of at least 3x3, got 1x5"),
        ({"x": values(2, 4, 0, 5), "padding": 2}, "x: want an image with pixels, got 0x5"),
    ],
)
def test_refusals_name_argument_wanted_and_given(ops, change, match):
    arguments = {"x": values(*INPUT), "weight": values(*WEIGHT), "groups": GROUPS} | change
    with pytest.raises(ValueError, match=f"^grouped_conv: .*{match}"):
        grouped_conv(**arguments)
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        F.conv2d(*(arguments.pop(name) for name in ("x", "weight")), **arguments)
    arguments |= {"x": values(*INPUT), "weight": values(*WEIGHT), "groups": GROUPS} | change
    with pytest.raises(ValueError, match=f"^conv_bn_relu: .*{match}"):
        conv_bn_relu(**arguments, bn=nn.BatchNorm2d(6))


def test_a_residual_that_does_not_fit_is_refused(ops):
    block = Block()
    for residual, match in (
        (values(2, 6, 3, 4), r"residual: want \[2, 6, 3, 5\] as the output, got \[2, 6, 3, 4\]"),
        (values(*OUTPUT).double(), "residual: want dtype torch.float32 as of x, got torch.float64"),
        (values(*OUTPUT).to("meta"), "residual: want device cpu as of x, got meta"),
    ):
        with pytest.raises(ValueError, match=f"conv_bn_relu: {match}"):
            block(values(*INPUT), residual)
        with pytest.raises(ValueError, match=match):
            fuse_modules_forward(values(*INPUT), nn.Conv2d(4, 6, 1, (2, 1)), block.bn, residual)


@pytest.mark.parametrize(
    "x,weight,arguments",
    [
        (values(*INPUT).double(), values(*WEIGHT).double(), {}),
        (values(*INPUT).to(torch.complex64), values(*WEIGHT).to(torch.complex64), {}),
        (values(*INPUT), values(6, 2, 5, 5), {"padding": 2}),
        (values(*INPUT), values(6, 2, 2, 2), {"padding": "same"}),
        (values(*INPUT), values(*WEIGHT), {"stride": 3, "padding": 3}),
        (values(*INPUT), values(*WEIGHT), {"padding": "same", "dilation": 2}),
        (values(*INPUT), values(*WEIGHT), {"padding": [1], "stride": [2, 1]}),
        (values(4, 6, 5), values(*WEIGHT), {"padding": 1}),
        (values(2, 0, 6, 5), values(6, 0, 3, 3), {"padding": 1}),
        (values(*INPUT).expand(2, 4, 6, 5)[:, :, ::2, 1:], values(*WEIGHT), {"padding": 1}),
        (values(6, 5, 2, 4).permute(2, 3, 0, 1), values(3, 3, 6, 2).permute(2, 3, 0, 1), {"padding": 1}),
    ],
)
def test_what_torch_accepts_is_the_same(ops, x, weight, arguments):
    with gconv.set_policy("silent"):
        got = grouped_conv(x, weight, None, groups=GROUPS, **arguments)
    want = F.conv2d(x, weight, None, groups=GROUPS, **arguments)
    assert got.stride() == want.stride()
    if want.numel():
        assert got.dtype == want.dtype
        assert ((got - want).abs().max() <= 1e-5 * want.abs().max()).all()
    assert got.shape == want.shape


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nan_and_inf_pass_as_in_torch(ops, value, training):
    results = []
    for block in twins():
        x = values(*INPUT)
        x[0, 0, 2, 2] = value
        x.requires_grad_()
        z = block.train(training)(x)
        z.square().sum().backward()
        results.append((z, block.conv.weight.grad))
        running = (block.bn.running_mean, block.bn.running_var)
        assert [bool(b.isfinite().all()) for b in running] == [not training] * 2
        assert all(b[3:].isfinite().all() for b in running), "it left its group"
    for ours, stock in zip(*results):
        assert torch.equal(ours.isnan(), stock.isnan())
        finite = stock.isfinite()
        torch.testing.assert_close(ours[finite], stock[finite], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------- negative controls


def test_the_comparison_would_notice(ops):
    want = values(*OUTPUT)
    for wrong in (torch.zeros_like(want), want * 1.01, want.roll(1, 3), want.roll(3, 1), want.clone().fill_(float("nan"))):
        with pytest.raises(AssertionError):
            close(wrong, want)


def test_gradcheck_would_notice(reference_ops, monkeypatch):
    right = conv_module.bwd_weight
    monkeypatch.setattr(conv_module, "bwd_weight", lambda *args: right(*args) * 1.01)
    x, weight = doubles(INPUT, WEIGHT)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        gradcheck(lambda x, w: conv_module.conv_apply(x, w, None, None, None, False, *GEOMETRY), [x, weight])
