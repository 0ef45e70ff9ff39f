"""torch.autocast: a convolution's arguments in its dtype, as torch casts them."""

import torch
from torch._C import _is_any_autocast_enabled
from torch.autograd import Function

from gconv import backend, memory
from gconv.autograd import applier, first_order, on_tape, transformed


def autocast_enabled(x) -> bool:
    """Whether autocast is on for the device of x; the first question is the cheap one."""
    if not torch.compiler.is_compiling() and not _is_any_autocast_enabled():
        return False
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # meta has no autocast to ask about


class CastLeaf(Function):
    """leaf.to(dtype), in memory of `gconv.memory`, and so the leaf's gradient. A network has copies until the
    backward and gradients until the optimizer's step: what one part of a step frees is room for the next."""

    @staticmethod
    def forward(ctx, leaf, dtype):
        ctx.dtype = leaf.dtype
        return memory.new_like(leaf, dtype).copy_(leaf)

    @staticmethod
    def backward(ctx, grad):
        if not first_order():
            return grad.to(ctx.dtype), None
        return memory.new_like(grad, ctx.dtype).copy_(grad), None


_cast_leaf = applier(CastLeaf)


def _cast(t, dtype):
    if t is None or t.dtype is dtype or t.dtype is torch.float64 or not t.is_floating_point():
        return t
    return _cast_leaf(t, dtype) if t.is_leaf and on_tape(t) else t.to(dtype)


def rounds_weights(x) -> bool:
    """Whether autocast leaves float32 weights of convolutions of x as they are, because the kernels round
    them to its dtype as they read them: there is no copy to make, to keep and to differentiate."""
    return x.is_cpu and backend.extension_loaded() and not transformed() and backend.backend_of(x) == "cpu"


def autocast_around(weights, *tensors) -> tuple:
    """`autocast` of tensors and weights of convolutions, but `rounds_weights`: (*tensors, weights)."""
    if not autocast_enabled(tensors[0]):
        return *tensors, weights
    if not rounds_weights(tensors[0]):
        return *autocast(*tensors), autocast(*weights)
    return *autocast(*tensors), tuple(w if w.dtype is torch.float32 else autocast(w)[0] for w in weights)


def autocast(*tensors):
    """The tensors in autocast's dtype where it is on, as torch casts a convolution's arguments."""
    if not autocast_enabled(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(_cast(t, dtype) for t in tensors)
