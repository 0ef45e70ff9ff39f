"""Grouped convolution (Xie et al. 2017, "Aggregated Residual Transformations for Deep Neural Networks",
section 3).

Each op has its definition in plain PyTorch beside it (`<op>_ref`): the oracle of the tests, the fallback, and
the formula of rare derivatives. Three autograd Functions, forward and both gradients, are each other's
derivatives, so any order of differentiation runs on the kernels.
"""

import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.nn.grad import conv2d_input, conv2d_weight

from gconv import backend
from gconv.autocast import autocast
from gconv.autograd import (
    applier,
    batched,
    call,
    channels_last,
    decide,
    distinct,
    empty_channels_last,
    first_order,
    in_format,
    op,
    register,
    stored,
    suggests_channels_last,
    untracked,
)
from gconv.concat import check_into, placed, writes_in_place

# ----------------------------------------------------------------------------------------------- references


def wide(x: torch.Tensor) -> torch.dtype:
    """The dtype that references compute in and per-channel vectors have."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def per_channel(vector: torch.Tensor) -> torch.Tensor:
    return vector[:, None, None]


def _act_ref(x, act):
    h = x.to(wide(x))
    return h if act is None else torch.relu(per_channel(act[0]) * h + per_channel(act[1]))


def _finish_ref(dy, y, finish):
    g = dy.to(wide(dy))
    if finish is None:
        return g
    scale, slope, offset, mean, a, b = (per_channel(row) for row in finish)
    y = y.to(g.dtype)
    g = torch.where(a * y + b <= 0, 0, g)
    return scale * g + slope * (y - mean) + offset


def grouped_conv_fwd_ref(
    x, weight, stride, padding, dilation, groups, act=None, affine=None, residual=None, relu=False
):
    """y = conv(relu(a*x + b), weight); c*y + d; + residual; ReLU: each but the convolution optional, in this
    order.

    x [N, C, H, W], weight [K, C/groups, R, S], act [2, C] = (a; b), affine [2, K] = (c; d), residual like y.
    Padding comes after act. Computes in float32 (float64 for float64); y has x's dtype and is channels_last.
    """
    y = F.conv2d(_act_ref(x, act), weight.to(wide(x)), None, stride, padding, dilation, groups)
    if affine is not None:
        y = per_channel(affine[0]) * y + per_channel(affine[1])
    if residual is not None:
        y = y + residual
    return stored(torch.relu(y) if relu else y, x.dtype)


def _statistics_ref(y):
    var, mean = torch.var_mean(y.to(wide(y)), (0, 2, 3), correction=0)
    return mean, var


def grouped_conv_fwd_stats_ref(x, weight, stride, padding, dilation, groups, act=None):
    """(y, mean, var): the convolution, and mean and biased variance [K] of y as stored, over N*OH*OW."""
    y = grouped_conv_fwd_ref(x, weight, stride, padding, dilation, groups, act)
    return y, *_statistics_ref(y)


def grouped_conv_fwd_into_ref(
    x, weight, stride, padding, dilation, groups, act, affine, residual, relu, want_stats, y
):
    """(mean, var): writes `grouped_conv_fwd_ref` to y [N, K, OH, OW], which may be a slice of a wider buffer.

    mean and biased variance [K] are of y as stored, of shape [0] unless wanted; they exclude affine, residual
    and relu.
    """
    y.copy_(grouped_conv_fwd_ref(x, weight, stride, padding, dilation, groups, act, affine, residual, relu))
    if not want_stats:
        return x.new_zeros(0, dtype=wide(x)), x.new_zeros(0, dtype=wide(x))
    return _statistics_ref(y)


def grouped_conv_bwd_input_ref(
    dy, weight, input_size, stride, padding, dilation, groups, y=None, finish=None, x=None, act=None,
    residual=None,
):  # fmt: skip
    """(dx, sums): the gradient of conv(x, weight) to x.

    finish [6, K] = (A; B; C; mean; a; b), with y [N, K, OH, OW]: dy becomes A*(dy*[not a*y + b <= 0]) +
    B*(y - mean) + C first, the backward of a batch normalisation and its ReLU.
    act [4, C] = (a; b; mean; rstd), with x [N, C, H, W]: dx is masked by [not a*x + b <= 0] and sums [2, C]
    are (sum dx; sum dx*(x - mean)*rstd); without act sums has shape [0].
    residual [N, C, H, W], for a pointwise convolution without act only, is added to dx.
    """
    g = _finish_ref(dy, y, finish)
    dx = conv2d_input(input_size, weight.to(g.dtype), g, stride, padding, dilation, groups)
    if residual is not None:
        dx = dx + residual
    if act is None:
        return stored(dx, dy.dtype), dx.new_zeros(0)
    a, b, mean, rstd = (per_channel(row) for row in act)
    raw = x.to(dx.dtype)
    dx = torch.where(a * raw + b <= 0, 0, dx)
    sums = torch.stack((dx.sum((0, 2, 3)), (dx * (raw - mean) * rstd).sum((0, 2, 3))))
    return stored(dx, dy.dtype), sums


def grouped_conv_bwd_weight_ref(
    dy, x, weight_size, stride, padding, dilation, groups, y=None, finish=None, act=None, channels_last=False
):
    """dweight [K, C/groups, R, S]: the gradient of conv(relu(a*x + b), weight) to weight; finish as in
    `grouped_conv_bwd_input_ref`, act [2, C] as in `grouped_conv_fwd_ref`."""
    g = _finish_ref(dy, y, finish)
    dweight = conv2d_weight(_act_ref(x, act), weight_size, g, stride, padding, dilation, groups)
    return dweight.to(x.dtype).contiguous(memory_format=_weight_format(channels_last))


def grouped_conv_bwd_ref(
    dy, x, weight, stride, padding, dilation, groups, y, finish, act, want_dx, want_dweight, channels_last
):
    """(dx, dweight, sums) of `grouped_conv_bwd_input_ref` and `grouped_conv_bwd_weight_ref`, both with the
    former's act [4, C]; of shape [0] unless wanted."""
    conf = (stride, padding, dilation, groups)
    dx = dweight = x.new_zeros(0)
    sums = x.new_zeros(0, dtype=wide(x))
    if want_dx:
        masked_by = (None, None) if act is None else (x, act)
        dx, sums = grouped_conv_bwd_input_ref(dy, weight, tuple(x.shape), *conf, y, finish, *masked_by)
    if want_dweight:
        prologue = None if act is None else act[:2]
        size = tuple(weight.shape)
        dweight = grouped_conv_bwd_weight_ref(dy, x, size, *conf, y, finish, prologue, channels_last)
        dweight = dweight.to(weight.dtype)
    return dx, dweight, sums


def _weight_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def in_channels_last(weight) -> bool:
    """True if a gradient of weight should be channels_last: autograd copies one of another layout."""
    return not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def grouped_conv_ref(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """The definition of `grouped_conv`: torch.nn.functional.conv2d."""
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


fwd = op("grouped_conv_fwd")
fwd_into = op("grouped_conv_fwd_into")
fwd_stats = op("grouped_conv_fwd_stats")
bwd_input = op("grouped_conv_bwd_input")
bwd_weight = op("grouped_conv_bwd_weight")
bwd = op("grouped_conv_bwd")


class ConvOps(NamedTuple):
    """The ops of one kernel size, as grouped_conv_* take their arguments."""

    fwd: Callable
    fwd_stats: Callable
    bwd_input: Callable
    bwd_weight: Callable
    bwd: Callable
    fwd_into: Callable


POINTWISE: list[ConvOps] = []  # what stands for them where the kernel is 1x1: pointwise_conv puts it here


def ops_for(weight_size) -> ConvOps:
    """The ops that run a convolution with a weight [K, C/groups, R, S]."""
    if weight_size[2] == 1 and weight_size[3] == 1:
        return POINTWISE[0]
    return ConvOps(fwd, fwd_stats, bwd_input, bwd_weight, bwd, fwd_into)


# ------------------------------------------------------------------------------------------------- Functions


def conv_grads(dy, x, weight, stride, padding, dilation, groups, want_x: bool, want_weight: bool):
    """(dx, dweight) of conv(x, weight), None where not wanted; differentiable again where anything
    watches."""
    conf = (stride, padding, dilation, groups)
    if first_order() and (want_x or want_weight):
        layout = want_weight and in_channels_last(weight)
        args = (dy, x, weight, *conf, None, None, None, want_x, want_weight, layout)
        dx, dweight, _ = call(ops_for(weight.shape).bwd, *args)
        return dx if want_x else None, dweight if want_weight else None
    dx = bwd_input_apply(dy, weight, tuple(x.shape), *conf) if want_x else None
    dweight = bwd_weight_apply(dy, x, tuple(weight.shape), *conf) if want_weight else None
    return dx, dweight


def _epilogue_grads(dz, x, weight, scale, z, conf, wanted):
    """Gradients of relu?(scale*conv(x, weight) + shift + residual) to (x, weight, scale, shift, residual).

    `z` is the output if there was a ReLU, else None. The scale goes into the weight, not into the gradient:
    with g the masked gradient, dx = conv_transpose(g, scale*weight), and as sum g*conv(x, weight) = <dweight
    of g, weight> the scale's gradient needs neither the convolution's output nor a pass over the image.
    """
    want_x, want_weight, want_scale, want_shift, want_residual = wanted
    g = channels_last(dz) if z is None else torch.ops.aten.threshold_backward(channels_last(dz), z, 0)
    unit = None if scale is None else scale[:, None, None, None]
    dx, dweight = conv_grads(g, x, weight, *conf, want_x and unit is None, want_weight or want_scale)
    if want_x and unit is not None:
        dx, _ = conv_grads(g, x, (weight * unit).to(weight.dtype), *conf, True, False)
    dscale = dshift = None
    if want_scale:
        dscale = (dweight * weight).sum((1, 2, 3), dtype=scale.dtype)
    if want_weight and unit is not None:
        dweight = (dweight * unit).to(weight.dtype)
    if want_shift:
        dshift = g.sum((0, 2, 3), dtype=wide(g))
    return dx, dweight if want_weight else None, dscale, dshift, g if want_residual else None


def _stacked(scale, shift):
    """The op's affine [2, K] of an optional scale and an optional shift."""
    if scale is None and shift is None:
        return None
    if scale is None:
        scale = torch.ones_like(shift)
    return torch.stack((scale, torch.zeros_like(scale) if shift is None else shift))


def _fold(value, dim, size):
    """[N, C, ...] with a vmapped dimension as [N, size*C, ...]: one set of groups per vmapped entry."""
    value = value.unsqueeze(1).expand(-1, size, *value.shape[1:]) if dim is None else value.movedim(dim, 1)
    return value.flatten(1, 2)


def _fold_first(value, dim, size):
    """[K, ...] with a vmapped dimension as [size*K, ...]; None stays None."""
    if value is None:
        return None
    value = value.unsqueeze(0).expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
    return value.flatten(0, 1)


class GroupedConv(Function):
    """relu?(scale*conv(x, weight) + shift + residual); scale, shift [K] float32 and residual may be None."""

    @staticmethod
    def forward(x, weight, scale, shift, residual, relu, stride, padding, dilation, groups):
        affine = _stacked(scale, shift)
        args = (x, weight, stride, padding, dilation, groups, None, affine, residual, relu)
        return call(ops_for(weight.shape).fwd, *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, scale, _, _, relu, *conf = inputs
        ctx.save_for_backward(x, weight, scale, output if relu else None)
        ctx.conf = tuple(conf)

    @staticmethod
    def backward(ctx, dz):
        x, weight, scale, z = ctx.saved_tensors
        grads = _epilogue_grads(dz, x, weight, scale, z, ctx.conf, tuple(ctx.needs_input_grad[:5]))
        return *grads, None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, x, weight, scale, shift, residual, relu, stride, padding, dilation, groups):
        size = info.batch_size
        conf = (relu, stride, padding, dilation)
        if in_dims[1] is None and in_dims[2] is None and in_dims[3] is None:
            x = _fold_first(x, in_dims[0], size)
            residual = _fold_first(residual, in_dims[4], size)
            y = conv_apply(x, weight, scale, shift, residual, *conf, groups)
            return y.unflatten(0, (size, -1)), 0
        x = _fold(x, in_dims[0], size)
        weight, scale, shift = (_fold_first(v, d, size) for v, d in zip((weight, scale, shift), in_dims[1:4]))
        residual = None if residual is None else _fold(residual, in_dims[4], size)
        y = conv_apply(x, weight, scale, shift, residual, *conf, groups * size)
        return y.unflatten(1, (size, -1)), 1


class GroupedConvBwdInput(Function):
    """dx of conv(x, weight): linear in dy and in weight."""

    @staticmethod
    def forward(dy, weight, input_size, stride, padding, dilation, groups):
        conf = (stride, padding, dilation, groups)
        args = (dy, weight, input_size, *conf, None, None, None, None)
        return call(ops_for(weight.shape).bwd_input, *args)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, weight, _, *conf = inputs
        ctx.save_for_backward(dy, weight)
        ctx.conf = tuple(conf)

    @staticmethod
    def backward(ctx, ddx):
        dy, weight = ctx.saved_tensors
        want_dy, want_weight = ctx.needs_input_grad[:2]
        ddy = conv_apply(ddx, weight, None, None, None, False, *ctx.conf) if want_dy else None
        _, dweight = conv_grads(dy, ddx, weight, *ctx.conf, False, want_weight)
        return ddy, dweight, None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, dy, weight, input_size, stride, padding, dilation, groups):
        size = info.batch_size
        n, c, h, w = input_size
        if in_dims[1] is None:
            dy = batched(dy, in_dims[0]).flatten(0, 1)
            dx = bwd_input_apply(dy, weight, (size * n, c, h, w), stride, padding, dilation, groups)
            return dx.unflatten(0, (size, -1)), 0
        dy, weight = _fold(dy, in_dims[0], size), batched(weight, in_dims[1]).flatten(0, 1)
        dx = bwd_input_apply(dy, weight, (n, size * c, h, w), stride, padding, dilation, groups * size)
        return dx.unflatten(1, (size, -1)), 1


class GroupedConvBwdWeight(Function):
    """dweight of conv(x, weight): linear in dy and in x."""

    @staticmethod
    def forward(dy, x, weight_size, stride, padding, dilation, groups):
        conf = (stride, padding, dilation, groups)
        return call(ops_for(weight_size).bwd_weight, dy, x, weight_size, *conf, None, None, None, False)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, x, _, *conf = inputs
        ctx.save_for_backward(dy, x)
        ctx.conf = tuple(conf)

    @staticmethod
    def backward(ctx, ddweight):
        dy, x = ctx.saved_tensors
        want_dy, want_x = ctx.needs_input_grad[:2]
        ddy = conv_apply(x, ddweight, None, None, None, False, *ctx.conf) if want_dy else None
        dx, _ = conv_grads(dy, x, ddweight, *ctx.conf, want_x, False)
        return ddy, dx, None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, dy, x, weight_size, stride, padding, dilation, groups):
        size = info.batch_size
        k, *rest = weight_size
        dy, x = _fold(dy, in_dims[0], size), _fold(x, in_dims[1], size)
        dweight = bwd_weight_apply(dy, x, (size * k, *rest), stride, padding, dilation, groups * size)
        return dweight.unflatten(0, (size, -1)), 0


conv_apply = applier(GroupedConv)
bwd_input_apply = applier(GroupedConvBwdInput)
bwd_weight_apply = applier(GroupedConvBwdWeight)


# -------------------------------------------------------------- what the ops are to autograd and to compilers


def conv_output_size(x, weight, stride, padding, dilation) -> tuple:
    """[N, K, OH, OW]."""
    n, _, h, w = x.shape
    k, _, r, s = weight.shape
    oh = (h + 2 * padding[0] - dilation[0] * (r - 1) - 1) // stride[0] + 1
    ow = (w + 2 * padding[1] - dilation[1] * (s - 1) - 1) // stride[1] + 1
    return n, k, oh, ow


def fwd_fake(x, weight, stride, padding, dilation, groups, act, affine, residual, relu):
    return empty_channels_last(x, conv_output_size(x, weight, stride, padding, dilation))


def fwd_into_fake(x, weight, *args):
    size = weight.shape[0] if args[-2] else 0
    return x.new_empty(size, dtype=torch.float32), x.new_empty(size, dtype=torch.float32)


def fwd_formula(args, outputs, grads, wanted):
    x, weight, *conf, act, affine, _, relu = args
    if act is not None:
        return NotImplemented
    scale = None if affine is None else affine[0]
    z = outputs[0] if relu else None
    want = (wanted[0], wanted[1], wanted[7], wanted[7], wanted[8])
    dx, dweight, dscale, dshift, dresidual = _epilogue_grads(grads[0], x, weight, scale, z, tuple(conf), want)
    daffine = torch.stack((dscale, dshift)) if wanted[7] else None
    return dx, dweight, None, None, None, None, None, daffine, dresidual, None


def fwd_stats_fake(x, weight, stride, padding, dilation, groups, act):
    y = empty_channels_last(x, conv_output_size(x, weight, stride, padding, dilation))
    mean = x.new_empty(y.shape[1], dtype=torch.float32)
    return y, mean, torch.empty_like(mean)


def fwd_stats_formula(args, outputs, grads, wanted):
    x, weight, *conf, act = args
    if act is not None:
        return NotImplemented
    y, mean, _ = outputs
    dy, dmean, dvar = grads
    count = y.shape[0] * y.shape[2] * y.shape[3]
    through_statistics = (per_channel(dmean) + per_channel(2 * dvar) * (y - per_channel(mean))) / count
    dy = channels_last((dy + through_statistics).to(y.dtype))
    dx, dweight = conv_grads(dy, x, weight, *conf, wanted[0], wanted[1])
    return dx, dweight, None, None, None, None, None


def _bwd_input_fake(dy, weight, input_size, stride, padding, dilation, groups, y, finish, x, act):
    sums = dy.new_empty((0,) if act is None else (2, input_size[1]), dtype=torch.float32)
    return empty_channels_last(dy, input_size), sums


def _bwd_input_formula(args, outputs, grads, wanted):
    dy, weight, _, *conf, _, finish, _, act = args
    if finish is not None or act is not None:
        return NotImplemented
    ddx = grads[0]
    ddy = conv_apply(ddx, weight, None, None, None, False, *conf) if wanted[0] else None
    _, dweight = conv_grads(dy, ddx, weight, *conf, False, wanted[1])
    return ddy, dweight, *(None,) * 9


def _bwd_weight_fake(
    dy, x, weight_size, stride, padding, dilation, groups, y, finish, act, channels_last=False
):
    return torch.empty(
        weight_size, dtype=x.dtype, device=x.device, memory_format=_weight_format(channels_last)
    )


def _bwd_weight_formula(args, outputs, grads, wanted):
    dy, x, _, stride, padding, dilation, groups, _, finish, act, *_ = args
    conf = (stride, padding, dilation, groups)
    if finish is not None or act is not None:
        return NotImplemented
    ddweight = grads[0]
    ddy = conv_apply(x, ddweight, None, None, None, False, *conf) if wanted[0] else None
    dx, _ = conv_grads(dy, x, ddweight, *conf, wanted[1], False)
    return ddy, dx, *(None,) * (len(args) - 2)


def bwd_fake(
    dy, x, weight, stride, padding, dilation, groups, y, finish, act, want_dx, want_dweight, channels_last
):
    dx = empty_channels_last(x, x.shape) if want_dx else x.new_empty(0)
    dweight = x.new_empty(0)
    if want_dweight:
        dweight = torch.empty_like(weight, memory_format=_weight_format(channels_last))
    size = (2, x.shape[1]) if want_dx and act is not None else (0,)
    return dx, dweight, x.new_empty(size, dtype=torch.float32)


def bwd_formula(args, outputs, grads, wanted):
    dy, x, weight, *conf, _, finish, act, want_dx, want_dweight, _ = args
    if finish is not None or act is not None:
        return NotImplemented
    ddx, ddweight = (g if want else None for g, want in zip(grads, (want_dx, want_dweight)))
    ddy = d_x = d_weight = None
    if ddx is not None:
        if wanted[0]:
            ddy = conv_apply(ddx, weight, None, None, None, False, *conf)
        _, d_weight = conv_grads(dy, ddx, weight, *conf, False, wanted[2])
    if ddweight is not None:
        if wanted[0]:
            more = conv_apply(x, ddweight, None, None, None, False, *conf)
            ddy = more if ddy is None else ddy + more
        d_x, _ = conv_grads(dy, x, ddweight, *conf, wanted[1], False)
    return ddy, d_x, d_weight, *(None,) * (len(args) - 3)


register("grouped_conv_fwd", fwd_fake, grouped_conv_fwd_ref, fwd_formula)
register("grouped_conv_fwd_into", fwd_into_fake, None)
register("grouped_conv_fwd_stats", fwd_stats_fake, grouped_conv_fwd_stats_ref, fwd_stats_formula)
register("grouped_conv_bwd_input", _bwd_input_fake, grouped_conv_bwd_input_ref, _bwd_input_formula)
register("grouped_conv_bwd_weight", _bwd_weight_fake, grouped_conv_bwd_weight_ref, _bwd_weight_formula)
register("grouped_conv_bwd", bwd_fake, grouped_conv_bwd_ref, bwd_formula)


# -------------------------------------------------------------------------------------------- the function


def _integers(name: str, items, given, wanted: str = "an int or a pair of ints") -> tuple:
    """Whatever counts as integers, numpy's and 0-dimensional tensors included, as a tuple of ints."""
    try:
        return tuple(map(operator.index, items))
    except TypeError:
        raise ValueError(f"{name}: want {wanted}, got {given!r}") from None


def pair(name: str, value, least: int) -> tuple:
    """An int or a pair of them as a pair; ValueError naming the argument otherwise."""
    if type(value) is int:
        value = (value, value)
    elif not (type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int):
        items = _integers(name, value if isinstance(value, (tuple, list)) else (value,), value)
        if len(items) not in (1, 2):
            raise ValueError(f"{name}: want an int or a pair of ints, got {value!r}")
        value = (items[0], items[-1])
    if value[0] < least or value[1] < least:
        raise ValueError(f"{name}: want at least {least}, got {value}")
    return value


def check_tensors(name: str, x, weight, bias) -> None:
    for what, value in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(value, torch.Tensor) and (value is not None or what != "bias"):
            raise ValueError(f"{name}: {what}: want a tensor, got {type(value).__name__}")


def resolve(name: str, x, weight, bias, stride, padding, dilation, groups) -> tuple:
    """Checks the arguments of a convolution; returns (stride, padding, dilation, groups), pairs of ints and
    an int.

    Padding "same" that is not symmetric stays a string: torch knows what to do with it. Raises ValueError.
    """
    if x.dim() != 4:
        raise ValueError(f"{name}: x: want [N, C, H, W] or [C, H, W], got {list(x.shape)}")
    if weight.dim() != 4:
        raise ValueError(f"{name}: weight: want [K, C/groups, R, S], got {list(weight.shape)}")
    if type(groups) is not int:
        (groups,) = _integers(f"{name}: groups", (groups,), groups, "an int")
    if groups < 1:
        raise ValueError(f"{name}: groups: want at least 1, got {groups}")
    stride, dilation = pair(f"{name}: stride", stride, 1), pair(f"{name}: dilation", dilation, 1)
    c, h, w = x.shape[1:]
    k, width, r, s = weight.shape
    if isinstance(padding, str):
        if padding == "valid":
            padding = (0, 0)
        elif padding != "same":
            raise ValueError(f"{name}: padding: want ints, 'same' or 'valid', got {padding!r}")
        elif stride != (1, 1):
            raise ValueError(f"{name}: padding: want ints with stride {stride}, got 'same'")
        elif r % 2 == 1 and s % 2 == 1:
            padding = (dilation[0] * (r - 1) // 2, dilation[1] * (s - 1) // 2)
    else:
        padding = pair(f"{name}: padding", padding, 0)
    if c % groups or width * groups != c:
        want = f"C/groups = {c // groups}" if c % groups == 0 else f"groups that divide C = {c}"
        raise ValueError(
            f"{name}: weight: want [K, C/groups, R, S] with {want}, got {list(weight.shape)} "
            f"for x {list(x.shape)} and groups {groups}"
        )
    if k % groups or k == 0:
        raise ValueError(f"{name}: weight: want K that groups = {groups} divides, got {list(weight.shape)}")
    if bias is not None and bias.shape != (k,):
        raise ValueError(f"{name}: bias: want [K] with K = {k}, got {list(bias.shape)}")
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name}: {what}: want dtype {x.dtype} as of x, got {tensor.dtype}")
        if tensor is not None and not backend.same_device(tensor, x):
            raise ValueError(f"{name}: {what}: want device {x.device} as of x, got {tensor.device}")
    if h == 0 or w == 0:
        raise ValueError(f"{name}: x: want an image with pixels, got {h}x{w}")
    if isinstance(padding, tuple):
        reach = (dilation[0] * (r - 1) + 1, dilation[1] * (s - 1) + 1)
        if h + 2 * padding[0] < reach[0] or w + 2 * padding[1] < reach[1]:
            raise ValueError(
                f"{name}: x: want a padded image of at least {reach[0]}x{reach[1]}, "
                f"got {h + 2 * padding[0]}x{w + 2 * padding[1]}"
            )
    return stride, padding, dilation, groups


_planned: dict[tuple, tuple] = {}
MOST_PLANNED = 4096


def plan(name: str, x, weight, bias, stride, padding, dilation, groups, by_design: bool = False) -> tuple:
    """(conf, decision): what `resolve` and `decide` say.

    Between large kernels their Python is cold and takes 50 microseconds, so calls that run on the kernels are
    remembered, by all that the answer depends on.
    """
    key, geometry = None, (stride, padding, dilation, groups)
    if not torch.compiler.is_compiling() and x.is_cpu and weight.is_cpu and (bias is None or bias.is_cpu):
        like = None if bias is None else (bias.shape, bias.dtype)
        key = (
            name, x.shape, x.dtype, x.layout, weight.shape, weight.dtype, like, geometry, by_design,
            *backend.settings(),
        )  # fmt: skip
        try:
            found = _planned.get(key)
        except TypeError:  # a list, or whatever else may be a pair of ints
            found = key = None
        # 1.0 equals 1 and is no int: only the very objects that were checked need no check.
        if found is not None and all(map(operator.is_, found[0], geometry)):
            return found[1:]
    conf = resolve(name, x, weight, bias, stride, padding, dilation, groups)
    decision = decide(name, x, weight, None, *conf, by_design)
    if key is not None and decision.ours:
        if len(_planned) >= MOST_PLANNED:
            _planned.clear()
        _planned[key] = geometry, conf, decision
    return conf, decision


def _into(memory, x, weight, scale, shift, residual, relu, *conf) -> tuple:
    """What `Slot.run` takes to write the result of `GroupedConv`."""
    args = (x, weight, *conf, None, _stacked(scale, shift), residual, relu, False, memory)
    call(ops_for(weight.shape).fwd_into, *args)
    return ()


def run_conv(x, weight, scale, shift, residual, relu, conf, into=None):
    """The kernel, through its Function where anything watches, in a slot or torch's memory format."""
    keep = suggests_channels_last(x) or suggests_channels_last(weight)
    x = channels_last(x)
    if writes_in_place(into):
        size = conv_output_size(x, weight, *conf[:3])
        return into.run(GroupedConv, _into, size, x, weight, scale, shift, residual, relu, *conf)[0]
    if untracked():
        args = (x, weight, *conf, None, _stacked(scale, shift), residual, relu)
        y = call(ops_for(weight.shape).fwd, *args)
    else:
        y = conv_apply(x, weight, scale, shift, distinct(x, residual), relu, *conf)
    return placed(in_format(y, keep), into)


def grouped_conv(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, into=None):
    """2-D convolution in groups, torch.nn.functional.conv2d's signature and results.

    y[n, k] = bias[k] + sum over the group's channels c of x[n, c] * weight[k, c] (Xie et al. 2017, section
    3.2).

    3x3 kernels with stride 1 or 2 and padding up to twice the dilation, and 1x1 kernels without padding or
    groups (see `pointwise_conv`), in float32, bfloat16 and float16 on a CPU run on gconv's kernels, which
    accumulate in float32; everything else runs on torch (`gconv.trace` and `gconv.explain` say what and why).
    Differentiable to any order in reverse mode; forward-mode AD raises on
    the kernels.

    Args:
        x: [N, C, H, W] or [C, H, W]; N may be 0.
        weight: [K, C/groups, R, S], dtype and device of x.
        bias: [K], dtype and device of x.
        stride, dilation: an int or a pair, at least 1.
        padding: an int or a pair, at least 0, or "same" (stride 1 only) or "valid".
        groups: divides C and K.
        into: a slot of a `gconv.Concat`, which becomes the result.

    Returns:
        [N, K, OH, OW] (or [K, OH, OW]), dtype of x; channels_last if x or weight is, else contiguous.

    Raises:
        ValueError: what does not fit together, naming the argument, what is wanted and what was given.

    Wide groups at stride 1 go by Winograd's algorithm where that is faster (F(2x2, 3x3): Lavin & Gray 2016,
    arXiv 1509.09308, section 4.1): an infinity may come out as NaN there, unless GCONV_WINOGRAD is 0.

    Determinism: the kernels are bit-identical from run to run and for any number of threads.
    """
    return convolution("grouped_conv", x, weight, bias, stride, padding, dilation, groups, into)


def convolution(name: str, x, weight, bias, stride, padding, dilation, groups, into):
    """The convolution that a function called `name` is: on the kernels where they cover it, else on torch."""
    check_tensors(name, x, weight, bias)
    check_into(name, into)
    if x.dim() == 3:
        args = (x.unsqueeze(0), weight, bias, stride, padding, dilation, groups, into)
        return convolution(name, *args).squeeze(0)
    x, weight, bias = autocast(x, weight, bias)
    conf, decision = plan(name, x, weight, bias, stride, padding, dilation, groups)
    if decision.ours:
        y = run_conv(x, weight, None, None if bias is None else bias.float(), None, False, conf, into)
    else:
        y = placed(F.conv2d(x, weight, bias, *conf), into)
    backend.record(decision, name, x, y)
    return y
