"""Derivatives of every order, always beside stock torch, and what the graph keeps.

The formulas of the Functions are checked twice: in float64, with every op replaced by its reference, by
finite differences; and in float32 on the kernels, against the same expression in stock torch.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad
from torch.utils.checkpoint import checkpoint
from twins import GEOMETRY, INPUT, OUTPUT, STRIDE, WEIGHT, Block, close, twins, values

import gconv
from gconv import batch_norm as bn_module
from gconv import conv_bn_relu as fused_module
from gconv import grouped_conv as conv_module
from gconv import pointwise_conv as pointwise_module
from gconv.functional import batch_norm, conv_bn_relu, grouped_conv

OPS = {
    conv_module: ("fwd", "fwd_stats", "bwd_input", "bwd_weight", "bwd"),
    bn_module: ("stats", "fold", "apply_affine", "bwd_reduce", "bwd_apply"),
    fused_module: ("fold", "apply_affine", "bwd_reduce", "bwd_apply"),
}


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
    for name in ("fwd", "fwd_stats", "bwd"):
        monkeypatch.setattr(pointwise_module, name, getattr(pointwise_module, f"pointwise_conv_{name}_ref"))
    monkeypatch.setattr(fused_module, "_fwd_train", fused_module.conv_bn_relu_fwd_train_ref)
    monkeypatch.setattr(fused_module, "_bwd", fused_module.conv_bn_relu_bwd_ref)


def doubles(*shapes):
    tensors = [values(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate(shapes)]
    return [t.requires_grad_() for t in tensors]


def check_both_orders(function, tensors):
    """Along random directions (fast_mode): every entry counts, and it takes seconds instead of minutes."""

    def first(*args):
        out = function(*args)
        return out[0] if isinstance(out, tuple) else out

    assert gradcheck(first, tensors, fast_mode=True)
    assert gradgradcheck(first, tensors, fast_mode=True)


# ------------------------------------------------------------------ the formulas, by finite differences


# Both give OUTPUT.
each_kernel = pytest.mark.parametrize(
    "size, conf", [(WEIGHT, GEOMETRY), ((6, 4, 1, 1), (STRIDE, (0, 0), (1, 1), 1))], ids=["3x3", "1x1"]
)


@each_kernel
@pytest.mark.parametrize("scale", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_gradcheck_of_a_convolution(reference_ops, size, conf, scale, relu, residual):
    x, weight, c, d, r = doubles(INPUT, size, (6,), (6,), OUTPUT)
    tensors = [x, weight, *([c, d] if scale else []), *([r] if residual else [])]

    def function(x, weight, *rest):
        rest = list(rest)
        c, d = (rest.pop(0), rest.pop(0)) if scale else (None, None)
        r = rest.pop(0) if residual else None
        return conv_module.conv_apply(x, weight, c, d, r, relu, *conf)

    check_both_orders(function, tensors)


@each_kernel
def test_gradcheck_of_the_gradients_of_a_convolution(reference_ops, size, conf):
    dy, weight, x = doubles(OUTPUT, size, INPUT)
    check_both_orders(lambda dy, w: conv_module.bwd_input_apply(dy, w, INPUT, *conf), [dy, weight])
    check_both_orders(lambda dy, x: conv_module.bwd_weight_apply(dy, x, size, *conf), [dy, x])


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("kind", ["batch_norm", "joined", "finish_on_load", "finish_first"])
def test_gradcheck_of_training(reference_ops, monkeypatch, kind, residual, relu, affine):
    monkeypatch.setattr(fused_module, "FINISH_ON_LOAD", kind != "finish_first")
    monkeypatch.setattr(fused_module, "JOINED", kind == "joined")
    x, weight, gamma, beta, r, plain = doubles(INPUT, WEIGHT, (6,), (6,), OUTPUT, OUTPUT)
    extra = [*([gamma, beta] if affine else []), *([r] if residual else [])]

    def parts(rest):
        rest = list(rest)
        gamma, beta = (rest.pop(0), rest.pop(0)) if affine else (None, None)
        return gamma, beta, rest.pop(0) if residual else None

    if kind == "batch_norm":
        check_both_orders(
            lambda x, *rest: bn_module._train_apply(x, *parts(rest), 1e-3, relu), [plain, *extra]
        )
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

    def stock(
        x,
    ):  # from elements: the third derivative of torch's own batch_norm takes its mean for a constant
        y = F.conv2d(x, weight, None, *GEOMETRY)
        y = y - y.mean((0, 2, 3), keepdim=True)
        y = y * (y.square().mean((0, 2, 3), keepdim=True) + 1e-3).rsqrt()
        return torch.relu(gamma[:, None, None] * y + beta[:, None, None] + r).pow(3).sum()

    def third(f):
        return grad(lambda x: grad(lambda x: grad(f)(x).sin().sum())(x).sin().sum())(x)

    close(third(ours), third(stock), 1e-9)


# -------------------------------------------------------------------------- the kernels, beside stock torch


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


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
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


@pytest.mark.parametrize("joined", [True, False], ids=["joined", "staged"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("frozen", ["x", "weight", "everything but gamma"])
def test_frozen_tensors_skip_their_work(ops, monkeypatch, joined, training, frozen):
    """Both gradients come from one op, which is told what is wanted of it."""
    monkeypatch.setattr(fused_module, "JOINED", joined)
    asked = []

    def spy(module, name, last):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: asked.append(args[last - 2 : last]) or run(*args))

    spy(conv_module, "bwd", -1)
    spy(fused_module, "_bwd", -2)
    block = Block().train(training)
    x = values(*INPUT).requires_grad_(frozen == "weight")
    block.conv.weight.requires_grad_(frozen == "x")
    z = block(x)
    z.sum().backward()
    want_x, want_weight = (
        frozen == "weight",
        frozen == "x" or not training,
    )  # the scale's is <dweight, weight>
    assert asked and {(any(dx for dx, _ in asked), any(dw for _, dw in asked))} == {(want_x, want_weight)}
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


def test_sum_sends_a_gradient_of_stride_0(ops):
    leaves = [values(*INPUT).requires_grad_(), values(*WEIGHT).requires_grad_()]
    for got, want in zip(
        torch.autograd.grad(grouped_conv(*leaves, None, *GEOMETRY).sum(), leaves),
        torch.autograd.grad(F.conv2d(*leaves, None, *GEOMETRY).sum(), leaves),
    ):
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


def test_a_bias_before_a_training_batch_norm_has_a_zero_gradient(ops):
    """torch's is rounding noise around zero; ours is zero and, unlike None, takes part in a reducer."""
    block = Block(bias=True)
    block(values(*INPUT)).square().sum().backward()
    assert torch.equal(block.conv.bias.grad, torch.zeros(6))


# ---------------------------------------------------------------------------------------- negative controls


def test_the_comparison_would_notice(ops):
    want = values(*OUTPUT)
    for wrong in (
        torch.zeros_like(want),
        want * 1.01,
        want.roll(1, 3),
        want.roll(3, 1),
        want.clone().fill_(float("nan")),
    ):
        with pytest.raises(AssertionError):
            close(wrong, want)


def test_gradcheck_would_notice(reference_ops, monkeypatch):
    right = conv_module.bwd

    def wrong(*args):
        dx, dweight, sums = right(*args)
        return dx, dweight * 1.01, sums

    monkeypatch.setattr(conv_module, "bwd", wrong)
    x, weight = doubles((1, 2, 3, 3), (2, 1, 3, 3))
    conf = ((1, 1), (1, 1), (1, 1), 2)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        check_both_orders(
            lambda *xw: conv_module.conv_apply(*xw, None, None, None, False, *conf), [x, weight]
        )
