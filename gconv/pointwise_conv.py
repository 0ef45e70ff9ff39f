"""Pointwise (1x1) convolution: every pixel's channels by one matrix (Lin, Chen & Yan 2014, "Network In
Network", section 3.1).

The companion of `grouped_conv`, with the same prologue, epilogues and backward, whose references it shares:
a 1x1 convolution is a grouped one with one group and no padding.
"""

import torch

from gconv.autograd import op, stored
from gconv.grouped_conv import (
    grouped_conv_bwd_input_ref,
    grouped_conv_bwd_weight_ref,
    grouped_conv_fwd_ref,
    grouped_conv_fwd_stats_ref,
    wide,
)

# ----------------------------------------------------------------------------------------------- references

DENSE = ((1, 1), (0, 0), (1, 1), 1)  # stride, padding, dilation and groups of what follows the stride


def _taken(x, stride):
    """The pixels of x that the convolution sees: of a stride's the first."""
    return x[:, :, :: stride[0], :: stride[1]]


def _put_back(dx, x, stride):
    """The inverse: x with dx in the place of `_taken(x, stride)`."""
    rows = x[:, :, :: stride[0]].slice_scatter(dx, 3, step=stride[1])
    return x.slice_scatter(rows, 2, step=stride[0])


def pointwise_conv_fwd_ref(x, weight, stride, act=None, affine=None, residual=None, relu=False):
    """y = conv(relu(a*x + b), weight); c*y + d; + residual; ReLU: each but the convolution optional, in this
    order.

    x [N, C, H, W], weight [K, C, 1, 1], act [2, C] = (a; b), affine [2, K] = (c; d), residual like y. Of a
    stride's pixels the first is taken. Computes in float32 (float64 for float64); y has x's dtype and is
    channels_last.
    """
    return grouped_conv_fwd_ref(_taken(x, stride), weight, *DENSE, act, affine, residual, relu)


def pointwise_conv_fwd_stats_ref(x, weight, stride, act=None):
    """(y, mean, var): the convolution, and mean and biased variance [K] of y as stored, over N*OH*OW."""
    return grouped_conv_fwd_stats_ref(_taken(x, stride), weight, *DENSE, act)


def pointwise_conv_bwd_ref(
    dy, x, weight, stride, y=None, finish=None, act=None, residual=None, want_dx=True, want_dweight=True,
    channels_last=False,
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
    taken = _taken(x, stride)
    if want_dx:
        masked_by = (None, None) if act is None else (taken, act)
        added = None if residual is None else _taken(residual, stride)
        size = tuple(taken.shape)
        dx, sums = grouped_conv_bwd_input_ref(dy, weight, size, *DENSE, y, finish, *masked_by, added)
        if stride[0] != 1 or stride[1] != 1:
            dx = stored(_put_back(dx, torch.zeros_like(x) if residual is None else residual, stride), x.dtype)
    if want_dweight:
        prologue = None if act is None else act[:2]
        size = tuple(weight.shape)
        dweight = grouped_conv_bwd_weight_ref(dy, taken, size, *DENSE, y, finish, prologue, channels_last)
    return dx, dweight, sums


fwd = op("pointwise_conv_fwd", pointwise_conv_fwd_ref)
fwd_stats = op("pointwise_conv_fwd_stats", pointwise_conv_fwd_stats_ref)
bwd = op("pointwise_conv_bwd", pointwise_conv_bwd_ref)
