"""How every op is wired to autograd: the parts that grouped_conv, batch_norm and conv_bn_relu share.

Each C++ op is used through an `autograd.Function` with `setup_context` and `vmap` and without `jvp`, and also
carries `register_autograd` and a fake. Both are needed: a compiler may inline the Function and then sees only
the op's own formula, and with the op's formula alone forward-mode AD would silently be zero.
"""

from collections.abc import Callable

import torch
from torch._C import _are_functorch_transforms_active, _AutoDispatchBelowAutograd
from torch._C._functorch import is_legacy_batchedtensor, unwrap_if_dead
from torch.autograd import forward_ad

from gconv import backend


def op(name: str) -> Callable:
    """torch.ops.gconv.<name>."""
    return getattr(torch.ops.gconv, name).default


def call(fn: Callable, *args):
    """Calls an op from inside an autograd.Function, where the op's own autograd formula has nothing to add
    and would cost more than a small layer's kernel."""
    if torch.compiler.is_compiling():
        return fn(*args)
    with _AutoDispatchBelowAutograd():
        return fn(*args)


def applier(function: type[torch.autograd.Function], transforms: bool = True) -> Callable:
    """`function.apply` without the 0.1 ms it spends inspecting the forward's signature to bind keyword
    arguments; the arguments must be positional and complete. Without `transforms` for where it is known that
    there are none, and no argument that outlived one."""
    plain_apply = super(torch.autograd.Function, function).apply
    if not transforms:
        return plain_apply

    def apply(*args):
        if transformed():
            return function.apply(*args)
        return plain_apply(*[unwrap_if_dead(arg) if isinstance(arg, torch.Tensor) else arg for arg in args])

    return apply


def unwrapped(x):
    """The tensor of a function transform that has ended, where x outlived one; anything else as it is."""
    return x if x is None else unwrap_if_dead(x)


def transformed() -> bool:
    """True where a compiler or a function transform must see every step."""
    return torch.compiler.is_compiling() or _are_functorch_transforms_active()


def untracked() -> bool:
    """True if nothing watches the tensors: no gradient mode, function transform, forward-mode AD or tracing.
    Then a forward may call its op without the Function."""
    return not (torch.is_grad_enabled() or transformed() or forward_ad._current_level >= 0)


def on_tape(x) -> bool:
    """Whether autograd's tape watches x and nobody else does: then a Function may decide what is kept."""
    return x.requires_grad and torch.is_grad_enabled() and not transformed() and forward_ad._current_level < 0


def unwatched(*tensors) -> bool:
    """The same for a call on these tensors: also where none of them wants a gradient."""
    if untracked():
        return True
    if transformed() or forward_ad._current_level >= 0:
        return False
    return not any(t is not None and t.requires_grad for t in tensors)


def decide(op_name: str, x, *args) -> backend.Decision:
    """`backend.choose`, but torch for an x [N, C, H, W] without pixels, and for function transforms and
    forward-mode AD inside torch.compile, which inlines a Function's forward there: gradients of gradients and
    tangents would silently be zero."""
    decision = backend.choose(op_name, x, *args)
    if not decision.ours:
        return decision
    reason = None
    if x.numel() == 0 and 0 in x.shape[1:]:
        reason = f"x: want at least one channel and one pixel, got {list(x.shape)}"
    elif torch.compiler.is_compiling() and (
        _are_functorch_transforms_active() or forward_ad._current_level >= 0
    ):
        reason = "a function transform or forward-mode AD inside torch.compile"
    return decision if reason is None else backend.fall_back(op_name, reason)


def first_order() -> bool:
    """The same for a backward. Compilers trace it as plain ops: they differentiate once, or by the ops'
    formulas."""
    return torch.compiler.is_compiling() or untracked()


def distinct(x, other):
    """`other`, as a view where it is `x` itself: torch.compile refuses a Function that takes one tensor
    twice."""
    return other.view_as(other) if other is x and torch.compiler.is_compiling() else other


def vjp_by_reference(ref: Callable, args: tuple, wanted: tuple, grads: tuple) -> tuple:
    """Gradients of `ref(*args)` to the arguments whose `wanted` is true (None for the rest), differentiable
    again.

    `wanted` may be shorter than `args`. `grads` has one entry per output of `ref`; None stands for zeros.
    Outputs of `ref` that are None are left out.
    """
    places = [i for i, want in enumerate(wanted) if want]
    result: list = [None] * len(args)
    if not places:
        return tuple(result)
    there: list[int] = []

    def outputs(*primals):
        full = list(args)
        for i, primal in zip(places, primals):
            full[i] = primal
        values = ref(*full)
        values = values if isinstance(values, tuple) else (values,)
        there[:] = [i for i, value in enumerate(values) if value is not None]
        return tuple(values[i] for i in there)

    values, pullback = torch.func.vjp(outputs, *(args[i] for i in places))
    cotangents = tuple(
        torch.zeros_like(value) if grads[i] is None else grads[i].to(value.dtype)
        for i, value in zip(there, values)
    )
    for i, grad in zip(places, pullback(cotangents)):
        result[i] = grad
    return tuple(result)


def register(name: str, fake: Callable, ref: Callable | None, formula: Callable | None = None) -> None:
    """Registers the fake and the autograd formula of torch.ops.gconv.<name>. An op that writes into its
    arguments has no formula: its `ref` is None.

    `formula(args, outputs, grads, wanted)` returns one gradient (or None) per argument, or NotImplemented to
    leave the case to the reference, which also serves where no formula is given.
    """

    def setup_context(ctx, inputs, output):
        outputs = output if isinstance(output, tuple) else (output,)
        places = [i for i, value in enumerate(inputs) if isinstance(value, torch.Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in places), *outputs)
        ctx.places = places
        ctx.rest = tuple(None if isinstance(value, torch.Tensor) else value for value in inputs)

    def backward(ctx, *grads):
        args = list(ctx.rest)
        for i, value in zip(ctx.places, ctx.saved_tensors):
            args[i] = value
        args, outputs = tuple(args), ctx.saved_tensors[len(ctx.places) :]
        wanted = tuple(ctx.needs_input_grad)
        result = NotImplemented if formula is None else formula(args, outputs, grads, wanted)
        if result is NotImplemented:
            result = vjp_by_reference(ref, args, wanted, grads)
        return result

    def checked_fake(*args):
        devices = {str(arg.device) for arg in args if isinstance(arg, torch.Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{name}: want all tensors on one device, got {' and '.join(sorted(devices))}")
        return fake(*args)

    torch.library.register_fake(f"gconv::{name}", checked_fake)
    if ref is not None:
        torch.library.register_autograd(f"gconv::{name}", backward, setup_context=setup_context)


# ------------------------------------------------------------------------------------------ vmap and layout


def batched(value, dim):
    """`value` with its vmapped dimension first; None stays None."""
    return value if value is None or dim is None else value.movedim(dim, 0)


def vmap_by(fn: Callable, info, in_dims: tuple, args: tuple):
    """The vmap rule of a Function by torch's own rules for `fn`, a composition that computes the same."""
    dims = tuple(dim if isinstance(value, torch.Tensor) else None for value, dim in zip(args, in_dims))
    tensors = [i for i, value in enumerate(args) if isinstance(value, torch.Tensor)]
    present = []

    def outputs(*values):
        full = list(args)
        for i, value in zip(tensors, values):
            full[i] = value
        result = fn(*full)
        present[:] = [value is not None for value in result]
        return tuple(value for value in result if value is not None)

    results = iter(
        torch.vmap(outputs, tuple(dims[i] for i in tensors), randomness=info.randomness)(
            *(args[i] for i in tensors)
        )
    )
    values = tuple(next(results) if there else None for there in present)
    return values, tuple(0 if there else None for there in present)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """`x` as the kernels read it in place: unit stride between channels. Anything else is copied once, here
    or, under a function transform (or autograd's is_grads_batched), where memory formats mean nothing yet, by
    the op."""
    if x.stride(1) == 1:
        return x
    if not torch.compiler.is_compiling() and (
        _are_functorch_transforms_active() or is_legacy_batchedtensor(x)
    ):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def stored(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A reference's result as an op stores it: rounded, channels_last."""
    y = y.to(dtype)
    return y if _are_functorch_transforms_active() else y.contiguous(memory_format=torch.channels_last)


def empty_channels_last(like: torch.Tensor, size) -> torch.Tensor:
    return torch.empty(tuple(size), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def suggests_channels_last(x: torch.Tensor) -> bool:
    """torch's rule (c10's is_channels_last_strides_2d): channels_last by strides, ambiguous strides being
    NCHW."""
    n, c, h, w = x.shape
    stride_n, stride_c, stride_h, stride_w = x.stride()
    if stride_c == 0 or stride_w < stride_c * c or n == 0 or c == 0 or h == 0 or w == 0:
        return False
    rows = stride_w * w
    image = stride_h * h
    return stride_h >= rows and stride_n >= image and image != stride_c


def in_format(y: torch.Tensor, keep_channels_last: bool) -> torch.Tensor:
    """A kernel's channels_last output in the memory format torch would have returned."""
    return y if keep_channels_last else y.contiguous()
