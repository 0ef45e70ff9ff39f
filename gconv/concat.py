"""Concatenation along the channels without a copy: convolutions write into slices of one buffer, and prefixes of
it are read in place (the shared storage of Pleiss et al. 2017, "Memory-Efficient Implementation of DenseNets",
arXiv 1707.06990, section 3, kept instead of filled by a copy).

The buffer has two aliases. Ops write through one with a version counter of its own, so that a further slot
spoils nothing that autograd saved. Every tensor handed out is of the other and shares its counter, so that
whoever else writes is found out. Handed out are: a slot with gradients as a tensor of its own, whose history an
in-place operation may extend; a prefix, and a slot without gradients, as a view made inside a Function or
without grad mode, where torch refuses operations that would have to change the history of other tensors.
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


class Into(Function):
    """`function` of the arguments before the last with its first output in a slot; for autograd's tape alone. The
    last argument is (function, fill, memory, handed_out), as `Slot.run` has them."""

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
    """What `Into` needs to know of a copy."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, dy):
        return (dy,)


def _copy(memory, x) -> tuple:
    memory.copy_(x)
    return ()


class Join(Function):
    """The first channels of `buffer`, a prefix, for the slots that lie there; each slot's gradient is a view."""

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


_into_apply = applier(Into)
_join_apply = applier(Join)


class Slot:
    """One of the slots of a `Concat`: what an `into` argument takes."""

    def __init__(self, concat: "Concat", index: int):
        self.concat, self.index = concat, index

    def __repr__(self) -> str:
        return f"<slot {self.index} of {self.concat!r}>"

    def run(self, function, fill, size, *args) -> tuple:
        """(y, *rest), the outputs of an autograd Function of args, of which x is the first, with y [N, K, OH, OW] =
        size in this slot: `fill(memory, *args)` writes y and returns the rest."""
        concat, index = self.concat, self.index
        concat._check(index, size, args[0])
        memory, handed_out = concat._slices(index, size, args[0])
        if unwatched(*[arg for arg in args if isinstance(arg, torch.Tensor)]):
            outputs = handed_out, *fill(memory, *args)
        else:
            outputs = _into_apply(*args, (function, fill, memory, handed_out))
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
        backend.record(backend.Decision("torch", "torch.copy_", "by design: into a slot of Concat"), "concat", x)
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
    """The result of what cannot write it elsewhere itself."""
    return y if into is None else into.put(y)


class Concat:
    """torch.cat(slots, 1) without the copy: a buffer [N, sum(channels), H, W] whose slots convolutions write.

        concat = gconv.Concat(64, 32)
        skip = conv(x, into=concat[0])      # [N, 64, H, W]: gconv's layers and functions take `into`
        concat.put(1, upsampled)            # [N, 32, H, W]: anything else is copied
        y = next_conv(concat.read())        # [N, 96, H, W]

    The first write fixes N, H, W, dtype and device and allocates the buffer, channels_last whatever the inputs
    are. Slots are written once each, in any order; `prefix(k)`, the concatenation of the first k slots, can be
    read as soon as they are written and as often as wanted. One Concat serves one forward: make a new one in
    each.

    Written slots and prefixes are tensors of the buffer and part of the autograd graph. In the backward each slot
    receives its slice of a prefix's gradient as a view; where several prefixes were read, autograd adds the
    slices. Without gradients (no_grad, inference_mode, frozen layers) nothing is kept. Double backward,
    checkpointing (around the Concat and all its writes) and autocast work.

    What runs on torch, a 7x7 convolution or a tensor that is not on the CPU, is computed and copied into its slot,
    which a trace shows as `torch.copy_`. Inside torch.compile, function transforms (torch.func), forward-mode AD
    and the tracers of torch.fx and torch.jit nothing is written in place: results are kept where they are, and
    `prefix` is torch.cat, which a trace shows where it sees the call.

    In-place operations on these tensors are torch's: they count as changes of all slots and prefixes at once, so
    that the backward of whatever had saved one raises; so does the backward of a prefix if a slot was changed
    after it was read. On a prefix itself, torch refuses them while gradients are recorded.

    Args:
        channels: of each slot, at least 1.

    Raises:
        ValueError: channels; what is written does not fit the slot, or the dtype, device, batch and image of the
            first write; `prefix` of no slot or of more than there are.
        IndexError: no such slot.
        RuntimeError: a slot is written twice, or read before it is written.

    Determinism: values and gradients are those of torch.cat, bit for bit.
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
            raise RuntimeError(f"Concat: prefix({slots}): want its slots written, got slot {missing[0]} unwritten")
        reason = _not_in_place()
        if reason is None and all(self._inside[:slots]):
            if not unwatched(*taken):
                return _join_apply(self._buffer, *taken)
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
                f"Concat: slot {index}: want one write, got a second (a Concat serves one forward: make a new one)"
            )
        n, h, w, origin = "N", "H", "W", ""
        if self._first is not None:
            first, origin = self._slots[self._first], f" as of slot {self._first}"
            n, _, h, w = first.shape
        if len(size) != 4 or size[1] != self.channels[index] or (origin and tuple(size) != (n, size[1], h, w)):
            raise ValueError(
                f"Concat: slot {index}: want [{n}, {self.channels[index]}, {h}, {w}]{origin}, got {list(size)}"
            )
        if origin and like.dtype != first.dtype:
            raise ValueError(f"Concat: slot {index}: want dtype {first.dtype}{origin}, got {like.dtype}")
        if origin and not backend.same_device(like, first):
            raise ValueError(f"Concat: slot {index}: want device {first.device}{origin}, got {like.device}")

    def _keep(self, index: int, slot, inside: bool) -> None:
        self._slots[index], self._inside[index] = slot, inside
        if self._first is None:
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
