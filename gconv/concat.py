"""Concatenation along the channels without a copy: convolutions write into slices of one buffer, and prefixes
of it are read where they lie (asked for in pytorch#7983, #29378 and #70600; the concatenation of Pleiss et
al. 2017, "Memory-Efficient Implementation of DenseNets", arXiv 1707.06990, section 3, is in shared memory
too, but by a copy).

The buffer has two aliases. Ops write through one with a version counter of its own, so that a further slot
spoils nothing that autograd saved. Every tensor handed out is of the other and shares its counter, so that
whoever else writes is found out. A slot with gradients is handed out as a tensor of its own, whose history an
in-place operation may extend. A prefix, and a slot without gradients, is a view made inside a Function or
without grad mode: torch refuses operations on those that would have to change the history of other tensors.
"""

import itertools
import operator

import torch
from torch._C import _are_functorch_transforms_active
from torch.autograd import Function, forward_ad

from gconv import backend
from gconv.autograd import applier, unwatched


def _not_in_place() -> str | None:
    """Why results must not be written into a buffer here, or None: what watches sees no aliases."""
    if torch.compiler.is_compiling():
        return "torch.compile"
    if _are_functorch_transforms_active():
        return "a function transform"
    if forward_ad._current_level >= 0:
        return "forward-mode AD"
    return "torch.jit.trace" if torch.jit.is_tracing() else None


class ConcatSlot(Function):
    """`function` of all arguments but the last with its first output in a slot, for autograd's tape alone.
    The last argument is (function, fill, memory, handed_out), as `Slot.run` has them."""

    @staticmethod
    def forward(ctx, *args):
        *args, (ctx.function, fill, memory, handed_out) = args
        outputs = handed_out.detach(), *fill(memory, *args)
        ctx.function.setup_context(ctx, tuple(args), outputs if len(outputs) > 1 else outputs[0])
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        grads = ctx.function.backward(ctx, *grads)
        return *grads, *(None,) * (len(ctx.needs_input_grad) - len(grads))


class _Copy(Function):
    """What `ConcatSlot` needs to know of a copy."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, dy):
        return (dy,)


def _copy(memory, x) -> tuple:
    memory.copy_(x)
    return ()


class ConcatPrefix(Function):
    """The prefix of `buffer` in which `slots` lie; the gradient of each is a view."""

    @staticmethod
    def forward(ctx, buffer, *slots):
        ctx.channels = [slot.shape[1] for slot in slots]
        # No values are needed, but that none has changed since: slots and prefix are one memory.
        ctx.save_for_backward(buffer.narrow(1, 0, 0))
        return buffer.narrow(1, 0, sum(ctx.channels))

    @staticmethod
    def backward(ctx, dx):
        ctx.saved_tensors  # noqa: B018
        slices = zip(ctx.needs_input_grad[1:], dx.split(ctx.channels, 1))
        return None, *[dslot if want else None for want, dslot in slices]


_slot_apply = applier(ConcatSlot)
_prefix_apply = applier(ConcatPrefix)


class Slot:
    """One of the slots of a `Concat`: what an `into` argument takes."""

    def __init__(self, concat: "Concat", index: int):
        self.concat, self.index = concat, index

    def __repr__(self) -> str:
        return f"<slot {self.index} of {self.concat!r}>"

    def run(self, function, fill, size, *args) -> tuple:
        """(y, *rest): the outputs of an autograd Function of args, y of this size in the slot. `fill(memory,
        *args)` writes y and returns the rest; the first of args has y's dtype and device."""
        concat, index = self.concat, self.index
        concat._check(index, size, args[0])
        memory, handed_out = concat._slices(index, size, args[0])
        if unwatched(*[arg for arg in args if isinstance(arg, torch.Tensor)]):
            outputs = handed_out, *fill(memory, *args)
        else:
            outputs = _slot_apply(*args, (function, fill, memory, handed_out))
        concat._keep(index, outputs[0], True)
        return outputs

    def put(self, x):
        """`Concat.put` of this slot."""
        if isinstance(x, torch.fx.Proxy):
            self.concat._keep(self.index, x, False)
            return x
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"Concat: slot {self.index}: want a tensor, got {type(x).__name__}")
        if _not_in_place() is not None:
            self.concat._check(self.index, x.shape, x)
            self.concat._keep(self.index, x, False)
            return x
        (y,) = self.run(_Copy, _copy, x.shape, x)
        reason = "by design: copied into a slot of Concat"
        backend.record(backend.Decision("torch", "torch.copy_", reason), "concat", x)
        return y


def check_into(name: str, into) -> None:
    if into is not None and not isinstance(into, Slot):
        raise ValueError(
            f"{name}: into: want a slot of a gconv.Concat, such as concat[0], got {type(into).__name__}"
        )


def writes_in_place(into: Slot | None) -> bool:
    """Whether an op is to write its result into the memory of a slot, by `Slot.run`."""
    return into is not None and _not_in_place() is None


def placed(y, into: Slot | None):
    """The result of what cannot write it elsewhere itself. While torch.fx traces a layer as the root, `into`
    is a Proxy that stands for None."""
    return into.put(y) if isinstance(into, Slot) else y


class Concat:
    """torch.cat(slots, 1) without the copy: a buffer [N, sum(channels), H, W] whose slots convolutions write.

        concat = gconv.Concat(64, 32)
        skip = conv(x, into=concat[0])  # [N, 64, H, W]: gconv's layers and functions take `into`
        concat.put(1, upsampled)        # [N, 32, H, W]: anything else is copied
        y = next_conv(concat.read())    # [N, 96, H, W] in, no copy

    The first write fixes N, H, W, dtype and device and allocates the buffer, channels_last whatever the
    inputs are. Slots are written once each, in any order. `prefix(k)`, the concatenation of the first k
    slots, can be read as soon as they are written and as often as wanted. One Concat serves one forward: make
    a new one in each.

    Slots and prefixes are parts of the autograd graph. In the backward each slot receives its slice of a
    prefix's gradient as a view; where several prefixes were read, autograd adds the slices. Without gradients
    (no_grad, inference_mode, frozen layers) no graph is kept. Double backward works, and so do autocast and
    checkpointing, the latter around the Concat and all its writes.

    What runs on torch, a 7x7 convolution or a tensor that is not on the CPU, is computed and then copied into
    its slot, which a trace shows as `torch.copy_`. gconv's kernels read slots and prefixes in place; torch's
    operators may copy a slot for themselves, as max_pool2d does on the CPU. Inside torch.compile, function
    transforms (torch.func), forward-mode AD, torch.fx and torch.jit.trace nothing is written in place:
    results are kept as they are, and `prefix` is `torch.cat`, which a trace shows where it sees the call.

    In-place operations change the memory of slots and prefixes alike, and torch's version counter counts them
    for all: the backward of whatever had saved one raises, and so does that of a prefix that was read before.
    On a prefix torch refuses them while gradients are recorded.

    Args:
        channels: of each slot, at least 1.

    Raises:
        ValueError: what is written does not fit the slot, or not the batch, image, dtype and device of the
            first write; `prefix` of no slot or of more than there are; channels.
        IndexError: there is no such slot.
        RuntimeError: a slot is written twice, or read before it is written.

    Determinism: the kernels return the bits that they return for the result of torch.cat.
    """

    def __init__(self, *channels: int):
        try:
            self.channels = tuple(map(operator.index, channels))
        except TypeError:
            self.channels = ()
        if not self.channels or min(self.channels) < 1:
            given = ", ".join(map(repr, channels))
            raise ValueError(f"Concat: channels: want one or more ints of at least 1, got ({given})")
        self._ends = tuple(itertools.accumulate(self.channels))
        self._slots: list[torch.Tensor | None] = [None] * len(self.channels)
        self._inside = [False] * len(self.channels)  # which slots lie in the buffer
        self._first: int | None = None  # the slot written first
        self._buffer: torch.Tensor | None = None  # what is handed out is of this alias
        self._memory: torch.Tensor | None = None  # ops write through this one

    def __repr__(self) -> str:
        return f"Concat{self.channels if len(self.channels) > 1 else f'({self.channels[0]})'}"

    def __len__(self) -> int:
        return len(self.channels)

    def __getitem__(self, index: int) -> Slot:
        """Slot `index`, for an `into` argument."""
        if not -len(self.channels) <= index < len(self.channels):
            raise IndexError(f"Concat: slot: want one of {len(self.channels)}, got {index}")
        return Slot(self, operator.index(index) % len(self.channels))

    def put(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Copies x [N, channels[index], H, W], of any strides, into slot `index`; returns the slot, with x's
        gradient."""
        return self[index].put(x)

    def prefix(self, slots: int) -> torch.Tensor:
        """The concatenation [N, sum(channels[:slots]), H, W] of the first `slots` slots, not copied."""
        if not 1 <= slots <= len(self.channels):
            raise ValueError(f"Concat: prefix: want 1 to {len(self.channels)} slots, got {slots}")
        taken = self._slots[:slots]
        missing = [index for index, slot in enumerate(taken) if slot is None]
        if missing:
            raise RuntimeError(f"Concat: prefix({slots}): want its slots written, slot {missing[0]} is not")
        reason = _not_in_place()
        if reason is None and all(self._inside[:slots]):
            if not unwatched(*taken):
                return _prefix_apply(self._buffer, *taken)
            with torch.no_grad():
                return self._buffer.narrow(1, 0, self._ends[slots - 1])
        joined = torch.cat(taken, 1)
        if isinstance(joined, torch.Tensor):
            reason = f"by design: {reason or 'slots written under a transform'}"
            backend.record(backend.Decision("torch", "torch.cat", reason), "concat", joined)
        return joined

    def read(self) -> torch.Tensor:
        """`prefix` of all slots."""
        return self.prefix(len(self.channels))

    def _check(self, index: int, size, like) -> None:
        if self._slots[index] is not None:
            raise RuntimeError(
                f"Concat: slot {index}: want one write, got a second (make a new Concat in each forward)"
            )
        channels, got = self.channels[index], list(size)
        if len(got) != 4 or got[1] != channels:
            raise ValueError(f"Concat: slot {index}: want [N, {channels}, H, W], got {got}")
        if self._first is None:
            return
        first, origin = self._slots[self._first], f"as of slot {self._first}"
        n, _, h, w = first.shape
        if got != [n, channels, h, w]:
            raise ValueError(f"Concat: slot {index}: want {[n, channels, h, w]} {origin}, got {got}")
        if like.dtype != first.dtype:
            raise ValueError(f"Concat: slot {index}: want dtype {first.dtype} {origin}, got {like.dtype}")
        if not backend.same_device(like, first):
            raise ValueError(f"Concat: slot {index}: want device {first.device} {origin}, got {like.device}")

    def _keep(self, index: int, slot, inside: bool) -> None:
        self._slots[index], self._inside[index] = slot, inside
        if self._first is None and isinstance(slot, torch.Tensor):
            self._first = index

    def _slices(self, index: int, size, like) -> tuple:
        """Slot `index` of the two aliases."""
        if self._buffer is None:
            size = (size[0], self._ends[-1], *size[2:])
            self._buffer = torch.empty(
                size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
            )
            self._memory = self._buffer.data
        place = (1, self._ends[index] - self.channels[index], self.channels[index])
        with torch.no_grad():
            return self._memory.narrow(*place), self._buffer.narrow(*place)
