"""Pointwise (1x1) convolution: every pixel's channels by one matrix (Lin, Chen & Yan 2014, "Network In
Network", section 3.1).

The companion of `grouped_conv`, with the same prologue, epilogues and backward, whose references it shares:
a 1x1 convolution is a grouped one with one group and no padding.
"""

import torch

from gconv.autograd import op, register, stored
from gconv.grouped_conv import (
    POINTWISE,
    ConvOps,
    bwd_fake,
    bwd_formula,
    check_tensors,
    convolution,
    fwd_fake,
    fwd_formula,
    fwd_into_fake,
    fwd_stats_fake,
    fwd_stats_formula,
    grouped_conv_bwd_input_ref,
    grouped_conv_bwd_weight_ref,
    grouped_conv_fwd_into_ref,
    grouped_conv_fwd_ref,
    grouped_conv_fwd_stats_ref,
    per_channel,
    wide,
)

# ----------------------------------------------------------------------------------------------- references

PLAIN = ((0, 0), (1, 1))  # padding and dilation of a 1x1 convolution
DENSE = (*PLAIN, 1)  # and its groups


def _taken(x, stride):
    """The pixels of x that the convolution sees: of a stride's the first."""
    return x[:, :, :: stride[0], :: stride[1]]


def _put_back(dx, x, stride):
    """The inverse: x with dx in the place of `_taken(x, stride)`."""
    rows = x[:, :, :: stride[0]].slice_scatter(dx, 3, step=stride[1])
    return x.slice_scatter(rows, 2, step=stride[0])


def pointwise_conv_fwd_ref(x, weight, stride, act=None, affine=None, residual=None, relu=False, groups=1):
    """y = conv(relu(a*x + b), weight); c*y + d; + residual; ReLU: each but the convolution optional, in this
    order.

    x [N, C, H, W], weight [K, C, 1, 1], act [2, C] = (a; b), affine [2, K] = (c; d), residual like y. Of a
    stride's pixels the first is taken. More than one group is for vmap alone. Computes in float32 (float64
    for float64); y has x's dtype and is channels_last.
    """
    conf = ((1, 1), *PLAIN, groups)
    return grouped_conv_fwd_ref(_taken(x, stride), weight, *conf, act, affine, residual, relu)


def pointwise_conv_fwd_stats_ref(x, weight, stride, act=None):
    """(y, mean, var): the convolution, and mean and biased variance [K] of y as stored, over N*OH*OW."""
    return grouped_conv_fwd_stats_ref(_taken(x, stride), weight, (1, 1), *DENSE, act)


def pointwise_conv_fwd_into_ref(x, weight, stride, act, affine, residual, relu, want_stats, y):
    """(mean, var): `grouped_conv_fwd_into_ref` of `pointwise_conv_fwd_ref`."""
    conf = ((1, 1), *DENSE)
    rest = (act, affine, residual, relu, want_stats, y)
    return grouped_conv_fwd_into_ref(_taken(x, stride), weight, *conf, *rest)


def pointwise_conv_bwd_ref(
    dy, x, weight, stride, y=None, finish=None, act=None, residual=None, want_dx=True, want_dweight=True,
    channels_last=False, groups=1,
):  # fmt: skip
    """(dx, dweight, sums): the gradients of conv(relu(a*x + b), weight) to its normalised input and to
    weight, of shape [0] unless wanted.

    finish [6, K] with y [N, K, OH, OW] as in `grouped_conv_bwd_input_ref`. act [4, C] = (a; b; mean; rstd):
    dweight takes relu(a*x + b), dx is masked by [not a*x + b <= 0], and sums [2, C] are (sum dx; sum dx*(x -
    mean)*rstd); without act, or without dx, sums has shape [0]. residual [N, C, H, W], without act only, is
    added to dx.
    """
    dx = x.new_zeros(0)
    dweight = x.new_zeros(0)
    sums = x.new_zeros(0, dtype=wide(x))
    taken, conf = _taken(x, stride), ((1, 1), *PLAIN, groups)
    if want_dx:
        masked_by = (None, None) if act is None else (taken, act)
        added = None if residual is None else _taken(residual, stride)
        size = tuple(taken.shape)
        dx, sums = grouped_conv_bwd_input_ref(dy, weight, size, *conf, y, finish, *masked_by, added)
        if stride[0] != 1 or stride[1] != 1:
            dx = stored(_put_back(dx, torch.zeros_like(x) if residual is None else residual, stride), x.dtype)
    if want_dweight:
        prologue = None if act is None else act[:2]
        size = tuple(weight.shape)
        dweight = grouped_conv_bwd_weight_ref(dy, taken, size, *conf, y, finish, prologue, channels_last)
    return dx, dweight, sums


def pointwise_conv_bwd_add_ref(dy, x, weight, stride, y, finish, act, dx, want_dweight, channels_last):
    """(dweight, sums): `pointwise_conv_bwd_ref` with act [4, C] = (a; b; mean; rstd), but the gradient to x
    itself is added to dx [N, C, H, W], which may be a slice of a wider buffer.

    With g the masked gradient, in float32 throughout: dx += a*g, and sums [2, C] are (sum g; sum g*(x -
    mean)*rstd). Pixels that a stride leaves out keep what dx holds.
    """
    high = wide(x)
    wider = [None if t is None else t.to(high) for t in (dy, _taken(x, stride), weight)]
    y = None if y is None else y.to(high)
    g, dweight, sums = pointwise_conv_bwd_ref(
        *wider, (1, 1), y, finish, act, None, True, want_dweight, channels_last
    )
    into = _taken(dx, stride)
    into.copy_(into + per_channel(act[0]) * g)
    return dweight.to(x.dtype), sums


fwd = op("pointwise_conv_fwd")
fwd_into = op("pointwise_conv_fwd_into")
fwd_stats = op("pointwise_conv_fwd_stats")
bwd = op("pointwise_conv_bwd")
bwd_add = op("pointwise_conv_bwd_add")


# -------------------------------------------------- in the place of grouped_conv's ops, for kernels of 1x1


def _fwd(x, weight, stride, padding, dilation, groups, *epilogue):
    if groups != 1:
        return pointwise_conv_fwd_ref(x, weight, stride, *epilogue, groups=groups)
    return fwd(x, weight, stride, *epilogue)


def _fwd_stats(x, weight, stride, padding, dilation, groups, act):
    return fwd_stats(x, weight, stride, act)


def _bwd(dy, x, weight, stride, padding, dilation, groups, y, finish, act, *wanted):
    args = (dy, x, weight, stride, y, finish, act, None, *wanted)
    return bwd(*args) if groups == 1 else pointwise_conv_bwd_ref(*args, groups=groups)


def _bwd_input(dy, weight, input_size, stride, padding, dilation, groups, y, finish, x, act):
    if x is None:  # only its shape counts
        x = dy.new_zeros(1).expand(input_size)
    conf = (stride, padding, dilation, groups)
    dx, _, sums = _bwd(dy, x, weight, *conf, y, finish, act, True, False, False)
    return dx, sums


def _bwd_weight(dy, x, weight_size, stride, padding, dilation, groups, y, finish, act, channels_last=False):
    weight = x.new_zeros(1).expand(weight_size)
    conf = (stride, padding, dilation, groups)
    return _bwd(dy, x, weight, *conf, y, finish, act, False, True, channels_last)[1]


def _fwd_into(x, weight, stride, padding, dilation, groups, *rest):
    return fwd_into(x, weight, stride, *rest)


POINTWISE[:] = [ConvOps(_fwd, _fwd_stats, _bwd_input, _bwd_weight, _bwd, _fwd_into)]


# -------------------------------------------------------------- what the ops are to autograd and to compilers


def _without_conf(grads, at: int) -> tuple:
    """Gradients of a grouped_conv op's arguments without those of padding, dilation and groups."""
    return (*grads[:at], *grads[at + len(DENSE) :])


def _fwd_fake(x, weight, stride, *rest):
    return fwd_fake(x, weight, stride, *DENSE, *rest)


def _fwd_formula(args, outputs, grads, wanted):
    x, weight, stride, *rest = args
    wanted = (*wanted[:3], *(False,) * len(DENSE), *wanted[3:])
    grads = fwd_formula((x, weight, stride, *DENSE, *rest), outputs, grads, wanted)
    return grads if grads is NotImplemented else _without_conf(grads, 3)


def _fwd_stats_fake(x, weight, stride, act):
    return fwd_stats_fake(x, weight, stride, *DENSE, act)


def _fwd_stats_formula(args, outputs, grads, wanted):
    x, weight, stride, act = args
    grads = fwd_stats_formula((x, weight, stride, *DENSE, act), outputs, grads, wanted)
    return grads if grads is NotImplemented else _without_conf(grads, 3)


def _bwd_fake(dy, x, weight, stride, y, finish, act, residual, *wanted):
    return bwd_fake(dy, x, weight, stride, *DENSE, y, finish, act, *wanted)


def _bwd_add_fake(dy, x, weight, stride, y, finish, act, dx, want_dweight, channels_last):
    return bwd_fake(dy, x, weight, stride, *DENSE, y, finish, act, True, want_dweight, channels_last)[1:]


def _bwd_formula(args, outputs, grads, wanted):
    dy, x, weight, stride, y, finish, act, _, want_dx, *rest = args
    args = (dy, x, weight, stride, *DENSE, y, finish, act, want_dx, *rest)
    result = bwd_formula(args, outputs, grads, wanted)
    if result is NotImplemented:
        return result
    dresidual = grads[0] if wanted[7] and want_dx else None
    return *result[:3], *(None,) * 4, dresidual, *(None,) * 3


register("pointwise_conv_fwd", _fwd_fake, pointwise_conv_fwd_ref, _fwd_formula)
register("pointwise_conv_fwd_into", fwd_into_fake, None)
register("pointwise_conv_fwd_stats", _fwd_stats_fake, pointwise_conv_fwd_stats_ref, _fwd_stats_formula)
register("pointwise_conv_bwd", _bwd_fake, pointwise_conv_bwd_ref, _bwd_formula)
register("pointwise_conv_bwd_add", _bwd_add_fake, None)


# -------------------------------------------------------------------------------------------- the function


def pointwise_conv(x, weight, bias=None, stride=1, into=None):
    """1x1 convolution: torch.nn.functional.conv2d without padding, dilation and groups.

    y[n, k, h, w] = bias[k] + sum over c of x[n, c, h*stride, w*stride] * weight[k, c] (Lin, Chen & Yan 2014,
    section 3.1).

    With stride 1 or 2 in float32, bfloat16 and float16 on a CPU it runs on gconv's kernels, which accumulate
    in float32; everything else runs on torch, and so does bfloat16 on a CPU with AMX
    (`gconv.trace` and `gconv.explain` say what and why). Differentiable to any order in reverse mode;
    forward-mode AD raises on the kernels.

    Args:
        x: [N, C, H, W] or [C, H, W]; N may be 0.
        weight: [K, C, 1, 1], dtype and device of x.
        bias: [K], dtype and device of x.
        stride: an int or a pair, at least 1.
        into: a slot of a `gconv.Concat`, which becomes the result.

    Returns:
        [N, K, OH, OW] (or [K, OH, OW]) with OH = (H - 1) // stride + 1, dtype of x; channels_last if x or
        weight is, else contiguous.

    Raises:
        ValueError: what does not fit together, naming the argument, what is wanted and what was given.

    Wide layers in float32 arithmetic go by one level of Strassen's algorithm where that is faster (Winograd's
    variant: Higham 2002, section 23.1), unless GCONV_STRASSEN is 0: errors are small against the norm of an
    image's pixels, not against each pixel, and an infinity may come out as NaN in the image that it is in.

    Determinism: the kernels are bit-identical from run to run and for any number of threads.
    """
    check_tensors("pointwise_conv", x, weight, bias)
    if weight.dim() != 4 or weight.shape[2] != 1 or weight.shape[3] != 1:
        raise ValueError(f"pointwise_conv: weight: want [K, C, 1, 1], got {list(weight.shape)}")
    return convolution("pointwise_conv", x, weight, bias, stride, 0, 1, 1, into)
