"""Pointwise (1x1) convolution: every pixel's channels by one matrix (Lin, Chen & Yan 2014, "Network In
Network", section 3.1).

The companion of `grouped_conv`, with the same prologue, epilogues and backward, whose references it shares:
a 1x1 convolution is a grouped one with one group and no padding.
"""

from gconv.grouped_conv import (
    grouped_conv_bwd_input_ref,
    grouped_conv_bwd_weight_ref,
    grouped_conv_fwd_ref,
    grouped_conv_fwd_stats_ref,
    wide,
)

# ----------------------------------------------------------------------------------------------- references

DENSE = ((0, 0), (1, 1), 1)  # padding, dilation and groups of a 1x1 convolution


def pointwise_conv_fwd_ref(x, weight, stride, act=None, affine=None, residual=None, relu=False):
    """y = conv(relu(a*x + b), weight); c*y + d; + residual; ReLU: each but the convolution optional, in this
    order.

    x [N, C, H, W], weight [K, C, 1, 1], act [2, C] = (a; b), affine [2, K] = (c; d), residual like y. Of a
    stride's pixels the first is taken. Computes in float32 (float64 for float64); y has x's dtype and is
    channels_last.
    """
    return grouped_conv_fwd_ref(x, weight, stride, *DENSE, act, affine, residual, relu)


def pointwise_conv_fwd_stats_ref(x, weight, stride, act=None):
    """(y, mean, var): the convolution, and mean and biased variance [K] of y as stored, over N*OH*OW."""
    return grouped_conv_fwd_stats_ref(x, weight, stride, *DENSE, act)


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
    dx = dweight = x.new_zeros(0)
    sums = x.new_zeros(0, dtype=wide(x))
    if want_dx:
        masked_by = (None, None) if act is None else (x, act)
        dx, sums = grouped_conv_bwd_input_ref(
            dy, weight, tuple(x.shape), stride, *DENSE, y, finish, *masked_by, residual
        )
    if want_dweight:
        prologue = None if act is None else act[:2]
        dweight = grouped_conv_bwd_weight_ref(
            dy, x, tuple(weight.shape), stride, *DENSE, y, finish, prologue, channels_last
        )
    return dx, dweight, sums


# Replaced by the C++ ops' handles once those exist.
fwd = pointwise_conv_fwd_ref
fwd_stats = pointwise_conv_fwd_stats_ref
bwd = pointwise_conv_bwd_ref
