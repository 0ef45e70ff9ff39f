"""nn.MaxPool2d whose backward keeps neither what was pooled nor 64-bit indices, in memory that stays."""

import torch
from torch import nn
from torch._C import _get_tracing_state
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import Function
from torch.nn.modules.utils import _pair

from gconv import memory
from gconv.autograd import applier, first_order, on_tape, suggests_channels_last, unwatched
from gconv.conv_bn_relu import watched

_aten = torch.ops.aten


def _pool(x, size, conf):
    """max_pool2d(x) of that size and the 64-bit indices of the maxima."""
    channels_last = suggests_channels_last(x)
    z = memory.new(x, size, x.dtype, channels_last)
    places = memory.new(x, size, torch.int64, channels_last)
    _aten.max_pool2d_with_indices.out(x, *conf, out=z, indices=places)
    return z, places


class MaxPool(Function):
    """max_pool2d(x) of x [N, C, H, W]. torch's kernels do the work; for the backward the place of each
    maximum in its plane is kept in 16 bits, or in 32 where a plane has more pixels."""

    @staticmethod
    def forward(ctx, x, size, *conf):
        ctx.size, ctx.conf, ctx.channels_last = x.shape, conf, suggests_channels_last(x)
        z, places = _pool(x, size, conf)
        last = x.shape[2] * x.shape[3] - 1
        small = torch.int16 if last <= torch.iinfo(torch.int16).max else torch.int32
        if last <= torch.iinfo(small).max:
            places = memory.new(x, size, small, ctx.channels_last).copy_(places)
        ctx.save_for_backward(places)
        return z

    @staticmethod
    def backward(ctx, dz):
        (small,) = ctx.saved_tensors
        places = memory.new(small, small.shape, torch.int64, ctx.channels_last).copy_(small)
        # Of what was pooled torch's backward reads size and layout, which are those of its gradient.
        dx = memory.new(small, ctx.size, dz.dtype, ctx.channels_last)
        if first_order() and not is_legacy_batchedtensor(dz):
            _aten.max_pool2d_with_indices_backward.grad_input(dz, dx, *ctx.conf, places, grad_input=dx)
        else:
            dx = _aten.max_pool2d_with_indices_backward(dz, dx, *ctx.conf, places)
        return dx, *(None,) * (1 + len(ctx.conf))


_apply = applier(MaxPool)


def _pooled(size, kernel, stride, padding, dilation, ceil_mode):
    """How many windows of such a row there are; torch lets none begin past the row and its padding."""
    if stride < 1:
        return 0
    span = size + 2 * padding - dilation * (kernel - 1) - 1 + (stride - 1 if ceil_mode else 0)
    count = span // stride + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count


def max_pool(pool, x):
    """pool(x) of an nn.MaxPool2d, with less to keep for the backward. On a CPU also where there is none: the
    fresh pages of indices that nobody reads can cost more than the pooling. Any other module, or one with
    hooks, is merely called, and so it is where others watch the tensors."""
    ours = (
        type(pool) is nn.MaxPool2d
        and type(x) is torch.Tensor
        and x.dim() == 4
        and 0 not in x.shape
        and not pool.return_indices
        and watched(pool) is None
    )
    kept = ours and on_tape(x)
    plain = ours and x.is_cpu and unwatched(x) and _get_tracing_state() is None
    if not (kept or plain):
        return pool(x)
    conf = tuple(_pair(v) for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation))
    sizes = [_pooled(n, *axis, pool.ceil_mode) for n, axis in zip(x.shape[2:], zip(*conf))]
    if min(sizes) < 1:  # torch says what is wrong
        return pool(x)
    size, conf = (*x.shape[:2], *sizes), (*conf, pool.ceil_mode)
    return _apply(x, size, *conf) if kept else _pool(x, size, conf)[0]
