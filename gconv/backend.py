"""Which code runs a call, and how a user finds out.

Every op asks `choose` (a pure function of shapes, dtypes and device), runs what it says and reports to
`record`. A call ends in one of three ways: one of our kernels; torch *by design* (the 7x7 convolution of a
stem: no warning); or a *fallback*: gconv was asked for something its kernels do not cover. A fallback always
has a reason, shown by `trace` and `explain`, and `set_policy` says whether it is silent, warned about once or
an error.
"""

import contextlib
import dataclasses
import json
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from gconv import extensions, gpu, schemas

BACKENDS = ("auto", "cpu", "cuda", "triton", "torch")
POLICIES = ("silent", "warn_once", "error")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# In "auto" a dense (groups = 1) convolution with at least this many input channels is left to torch, whose
# dense kernels are the better ones there; None leaves none.
DENSE_TO_TORCH_CHANNELS: int | None = 384
# In "auto" a 1x1 convolution of bfloat16 is left to torch where the CPU has AMX: there the speed of ours has
# not been measured (bench/NOTES.md).
POINTWISE_BFLOAT16_TO_TORCH: bool = getattr(torch.cpu, "_is_amx_tile_supported", bool)()


class FallbackWarning(UserWarning):
    """gconv was asked for something its kernels do not cover; torch ran it instead."""


class Decision(NamedTuple):
    """What runs a call: `backend` "cpu", "cuda" or "triton" (our kernels) or "torch", the `kernel`'s name as
    `counts` and `trace` show it, the `reason` torch was chosen (or Triton where CUDA C++ would be the choice,
    else None), and whether torch was a `fallback`.

    What is made of several ops is named after the kernels of its 3x3 convolution: on a GPU the rest of
    "cuda.conv_bn_relu" is Triton's."""

    backend: str
    kernel: str
    reason: str | None = None
    fallback: bool = False

    @property
    def ours(self) -> bool:
        """Whether our kernels run the call."""
        return self.backend != "torch"


# ---------------------------------------------------------------------------------------------- the extension


_missing_extension = extensions.load("_C", "run `make develop`")
if _missing_extension is None:
    from gconv._C import cpu_settings, guard_holds, make_guard  # noqa: F401
else:
    schemas.define()
gpu.register()


def extension_loaded() -> bool:
    """True if the C++ kernels are there."""
    return _missing_extension is None


def missing_extension() -> str | None:
    """None, or one line saying why the C++ kernels are not there and what to do."""
    return _missing_extension


def notify_missing_extension() -> None:
    """The one notice of an import without the C++ kernels; silent with GCONV_FALLBACK=silent."""
    if _missing_extension is not None and _policy != "silent":
        _warned.add(_missing_extension)
        message = (
            f"gconv: {_missing_extension} in the checkout, or `pip install --no-build-isolation .`, with a "
            "C++ compiler on PATH; until then torch runs every call (GCONV_FALLBACK=silent hides this notice)"
        )
        warnings.warn(message, FallbackWarning, stacklevel=_user_stacklevel())


# --------------------------------------------------------------------------------------------------- settings


def _checked(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"gconv: {name}: want {', '.join(allowed[:-1])} or {allowed[-1]}, got {value!r}")
    return value


# Plain module globals, so that torch.compile guards on them and compiles again when they change.
_mode = _checked("GCONV_BACKEND", os.environ.get("GCONV_BACKEND") or "auto", BACKENDS)
_policy = _checked("GCONV_FALLBACK", os.environ.get("GCONV_FALLBACK") or "warn_once", POLICIES)
_explaining = False
_warned: set[str] = set()
gpu.follow(_mode)


def _set_mode(name: str) -> None:
    global _mode
    _mode = name
    gpu.follow(name)


class use_backend:
    """Chooses the backend of the calls that follow, in the whole process: "auto" (ours where it covers the
    call, by the tensor's device), "cpu", "cuda" or "triton" (that one, and an error where it does not cover
    the call) or "torch" (always torch). "triton" takes CPU tensors where TRITON_INTERPRET=1 is set.

    On a GPU the 3x3 convolution has kernels in CUDA C++ and in Triton, all else in Triton alone: "auto" takes
    for each layer those that should be faster, "cuda" wherever there are both CUDA C++.

    A plain call sets it for good; in a `with` statement it is set for the block. The backward of a call runs
    on the kernels if its forward did; on a GPU the mode at that time says on which. Raises ValueError for
    another name.
    """

    def __init__(self, name: str):
        self.previous = _mode
        _set_mode(_checked("use_backend", name, BACKENDS))

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exc) -> None:
        _set_mode(self.previous)


class set_policy:
    """What a fallback does: "silent", "warn_once" (a FallbackWarning once per reason; the default) or "error"
    (RuntimeError). The environment variable GCONV_FALLBACK sets it at import.

    A plain call sets it for good; in a `with` statement it is set for the block. Either way the reasons
    already warned about are forgotten. Raises ValueError for another name.
    """

    def __init__(self, policy: str):
        global _policy
        self.previous, _policy = _policy, _checked("set_policy", policy, POLICIES)
        _warned.clear()

    def __enter__(self) -> "set_policy":
        return self

    def __exit__(self, *exc) -> None:
        global _policy
        _policy = self.previous
        _warned.clear()


def backend_mode() -> str:
    """The name last given to `use_backend`."""
    return _mode


def policy() -> str:
    """The policy last given to `set_policy`."""
    return _policy


def explaining() -> bool:
    """Whether this is the dry run of `explain`."""
    return _explaining


def tracing() -> bool:
    """Whether a trace is open."""
    return bool(_traces)


def settings() -> tuple:
    """What decisions in favour of our kernels depend on besides the call."""
    return _mode, _missing_extension, DENSE_TO_TORCH_CHANNELS, POINTWISE_BFLOAT16_TO_TORCH


# ----------------------------------------------------------------------------------------------- the decision


def _pair(value) -> tuple:
    return (value, value) if isinstance(value, int) else tuple(value)


def _resolved_padding(padding, dilation) -> tuple:
    """Padding as a pair; "same" around a 3x3 kernel is the dilation."""
    if isinstance(padding, str):
        return _pair(dilation) if padding == "same" else (0, 0)
    return _pair(padding)


def kernel_size_reason(kernel_size) -> str | None:
    """Why our kernels do not cover this kernel size, or None."""
    kernel = _pair(kernel_size)
    if kernel == (3, 3) or kernel == (1, 1):
        return None
    return f"kernel_size: want 3x3 or 1x1, got {kernel[0]}x{kernel[1]}"


def geometry_reason(stride, padding, dilation, kernel_size=3, groups: int = 1) -> str | None:
    """Why our kernels do not cover this convolution of a kernel size they cover, or None. Of 3x3, dilations
    of 1 and more are all covered, padding up to the window's reach, twice the (smaller) dilation; of 1x1 no
    padding and no groups."""
    stride = _pair(stride)
    if stride[0] not in (1, 2) or stride[1] not in (1, 2):
        return f"stride: want 1 or 2, got {stride[0]}x{stride[1]}"
    if _pair(kernel_size) == (1, 1):
        padding = (0, 0) if isinstance(padding, str) else _pair(padding)
        if padding != (0, 0):
            return f"padding: want 0 around a 1x1 kernel, got {padding[0]}x{padding[1]}"
        return None if groups == 1 else f"groups: want 1 with a 1x1 kernel, got {groups}"
    padding, most = _resolved_padding(padding, dilation), 2 * min(_pair(dilation))
    if not (0 <= padding[0] <= most and 0 <= padding[1] <= most):
        return f"padding: want 0 to {most}, got {padding[0]}x{padding[1]}"
    return None


def same_device(one, other) -> bool:
    """Between large kernels the caches are cold and reading a device costs microseconds; is_cpu does not."""
    return (one.is_cpu and other.is_cpu) or one.device == other.device


def backend_of(x) -> str:
    """Whose tensor x is: "cpu", "triton" or, if nobody's, its device."""
    if x.is_cpu:
        return "triton" if _mode == "triton" and gpu.interpreting() else "cpu"
    return "triton" if x.is_cuda else x.device.type


def _kernels_of(x, weight, groups: int) -> tuple[str, str | None]:
    """(backend, note): whose kernels run an op on x, one with a convolution where there is a weight, and why
    not those in CUDA C++ where these would be the choice."""
    ours = backend_of(x)
    if ours != "triton" or x.is_cpu:
        return ours, None
    size = None if weight is None else weight.shape
    call = (_mode, x.dtype, x.device, size, groups)
    if size is not None and gpu.kernels(*call) == "cuda":
        return "cuda", None
    return "triton", gpu.why_triton(*call)


def _backend_reason(name: str, op: str, x) -> str | None:
    """Why this backend cannot run a call of `op` at all, or None."""
    if name not in ("cpu", "cuda", "triton"):
        return f"device: want cpu or cuda, got {name}"
    wanted = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda, or TRITON_INTERPRET=1"}.get(_mode)
    if wanted is not None and (name == "cpu") != (_mode == "cpu"):
        return f"device: want {wanted}, got {x.device.type}"
    if name == "cpu":
        return _missing_extension
    if name == "cuda":
        reason = gpu.missing_cuda(x.device)
        if reason is not None or op.startswith("grouped_conv"):
            return reason
    return gpu.missing_triton()


def _tensor_reason(x, weight) -> str | None:
    if x.layout != torch.strided:
        return f"layout: want torch.strided, got {x.layout}"
    if x.dtype not in DTYPES:
        return f"dtype: want float32, bfloat16 or float16, got {str(x.dtype)[6:]}"
    if x.dtype is torch.bfloat16 and x.is_cpu and backend_of(x) == "triton":
        return "dtype: want float32 or float16 in Triton's interpreter, got bfloat16"
    if weight is not None and weight.dtype != x.dtype:
        return f"weight: want dtype {str(x.dtype)[6:]} like x, got {str(weight.dtype)[6:]}"
    if weight is not None and not same_device(weight, x):
        return f"weight: want device {x.device} like x, got {weight.device}"
    return None


def dense_to_torch(groups: int, in_channels: int, kernel_size=3) -> bool:
    """True if "auto" leaves a convolution with this many groups and input channels to torch because it is
    dense."""
    return (
        groups == 1
        and DENSE_TO_TORCH_CHANNELS is not None
        and in_channels >= DENSE_TO_TORCH_CHANNELS
        and _pair(kernel_size) != (1, 1)
    )


def _left_to_torch(x, weight, kernel_size, groups: int) -> str | None:
    """Why "auto" leaves a convolution that our kernels cover to torch, which is faster, or None."""
    if dense_to_torch(groups, weight.shape[1], kernel_size):
        return "torch runs dense convolutions"
    if x.dtype is torch.bfloat16 and POINTWISE_BFLOAT16_TO_TORCH and _pair(kernel_size) == (1, 1):
        return "torch runs 1x1 convolutions of bfloat16 on this CPU"
    return None


def _torch_kernel(op: str) -> str:
    """What torch runs in the place of `op`; of a conv_bn_relu the rest is a batch_norm call of its own."""
    for stem in ("grouped_conv", "pointwise_conv", "conv_bn_relu"):
        op = op.replace(stem, "conv2d")
    return "torch." + op


def _our_kernel(backend: str, op: str, kernel_size) -> str:
    """The kernels that run `op`."""
    pointwise = kernel_size is not None and _pair(kernel_size) == (1, 1)
    return f"{backend}." + (op.replace("grouped_conv", "pointwise_conv") if pointwise else op)


def choose(
    op: str, x, weight=None, kernel_size=None, stride=None, padding=None, dilation=None, groups: int = 1,
    by_design: bool = False,
) -> Decision:  # fmt: skip
    """What runs `op` on these arguments. Reads only shapes, dtypes and devices, has no side effect and is
    traced by torch.compile without a graph break.

    Args:
        op: the op's stem: "grouped_conv", "pointwise_conv", "batch_norm", "conv_bn_relu", or a stem with a
            suffix such as "_bwd_input".
        x: the activation [N, C, H, W].
        weight: the convolution's weight [K, C/groups, R, S], or None for an op without one.
        kernel_size: (R, S); read from `weight` if None.
        stride, padding, dilation: an int or a pair; padding also "same" or "valid". Not looked at if stride
            is None.
        groups: of the convolution.
        by_design: a convolution that our kernels do not cover by its kernel size (the 7x7 of a stem), or a
            1x1 one by its geometry, is expected here, so it is no fallback.

    Raises:
        RuntimeError: the call is not covered, and `use_backend("cpu")`, `use_backend("cuda")`,
            `use_backend("triton")` or `set_policy("error")` forbids torch.
    """
    if kernel_size is None and weight is not None:
        kernel_size = (weight.shape[2], weight.shape[3])
    reason = None if kernel_size is None else kernel_size_reason(kernel_size)
    if stride is not None and reason is None:
        geometry = (stride, 0 if padding is None else padding, 1 if dilation is None else dilation)
        reason = geometry_reason(*geometry, 3 if kernel_size is None else kernel_size, groups)
    if reason is not None and by_design and _pair(kernel_size) != (3, 3):
        return Decision("torch", _torch_kernel(op), f"by design: {reason}")
    if _mode == "torch":
        return Decision("torch", _torch_kernel(op), "use_backend('torch')")
    ours, note = _kernels_of(x, weight, groups)
    if reason is None:
        # A bottleneck's weights may be float32 in autocast, which is for it to say.
        reason = _backend_reason(ours, op, x) or _tensor_reason(x, None if op == "bottleneck" else weight)
    if reason is not None:
        return fall_back(op, reason)
    left = None
    if _mode == "auto" and weight is not None and ours == "cpu":
        left = _left_to_torch(x, weight, kernel_size, groups)
    if left is not None:
        return Decision("torch", _torch_kernel(op), f"by design: {left}")
    return Decision(ours, _our_kernel(ours, op, kernel_size), note)


def whole(op: str, x, weight, groups: int) -> Decision:
    """The decision for a block that runs on the kernels as a whole, with such a 3x3 convolution."""
    ours, note = _kernels_of(x, weight, groups)
    return Decision(ours, f"{ours}.{op}", note)


def fall_back(op: str, reason: str) -> Decision:
    """The decision for a call of `op` that our kernels do not cover, and why.

    Raises:
        RuntimeError: `use_backend("cpu")`, `use_backend("cuda")`, `use_backend("triton")` or
            `set_policy("error")` forbids torch.
    """
    if _mode in ("cpu", "cuda", "triton") and not _explaining:
        raise RuntimeError(f"gconv.{op}: use_backend('{_mode}') does not cover this call: {reason}")
    if _policy == "error" and not _explaining:
        raise RuntimeError(
            f"gconv.{op}: no kernel for this call and the fallback policy is 'error': {reason}"
        )
    return Decision("torch", _torch_kernel(op), reason, True)


def one_by_one(reason: str) -> Decision:
    """The decision for modules that have to be called as they are instead of fused, and why: no fallback, for
    that is what their owner asked for."""
    return Decision("torch", "modules", f"called one by one: {reason}")


# ------------------------------------------------------------------------------------------------- the record


_lock = threading.Lock()
_counts: dict[str, int] = {}
_traces: list["Trace"] = []


def counts() -> dict[str, int]:
    """Calls by kernel name (as in `Decision.kernel`) since the last `reset_counts`, in the whole process.
    Calls inside code made by torch.compile are not counted."""
    with _lock:
        return dict(_counts)


def reset_counts() -> None:
    """Sets every call counter to zero."""
    with _lock:
        _counts.clear()


def _user_stacklevel() -> int:
    """The stacklevel, for the function that calls this one, of the innermost frame outside gconv and torch:
    the user's own line. `warnings` does not count the import machinery's frames."""
    inside = (os.path.dirname(__file__) + os.sep, os.path.dirname(torch.__file__) + os.sep)
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*inside, "<frozen importlib")):
        level += not frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    return level


def _warn_fallback(op: str, reason: str) -> None:
    with _lock:
        if _policy != "warn_once" or reason in _warned:
            return
        _warned.add(reason)
    message = f"gconv.{op} runs on torch: {reason} (gconv.set_policy says what a fallback does)"
    warnings.warn(message, FallbackWarning, stacklevel=_user_stacklevel())


@torch.compiler.assume_constant_result
def _warn_while_compiling(op: str, reason: str) -> bool:
    _warn_fallback(op, reason)
    return True


def record(decision: Decision, op: str, x, y=None) -> None:
    """Counts a call that ran as `decision` says, adds it to the open traces and warns of a fallback by the
    policy. Inside torch.compile and torch.export it only warns, once, while compiling."""
    if torch.compiler.is_compiling():
        if decision.fallback:
            _warn_while_compiling(op, decision.reason)
        return
    if _explaining:
        for trace in _traces:
            if trace.dry:
                trace.add(decision, x)
        return
    with _lock:
        _counts[decision.kernel] = _counts.get(decision.kernel, 0) + 1
    for trace in _traces:
        trace.add(decision, x)
    if decision.fallback:
        _warn_fallback(op, decision.reason)


# ------------------------------------------------------------------------------------------ trace and explain


class _Layers(threading.local):
    """The modules being called in this thread, outermost first, as (id, qualified name)."""

    def __init__(self):
        self.stack: list[tuple[int, str]] = []
        self.names: dict[int, str] = {}

    def push(self, module: nn.Module) -> None:
        if not self.stack:
            self.names = {id(child): name for name, child in reversed(list(module.named_modules()))}
        self.stack.append((id(module), self.names.get(id(module)) or type(module).__name__))

    def pop(self, module: nn.Module) -> None:
        if self.stack and self.stack[-1][0] == id(module):
            self.stack.pop()


_layers = _Layers()
_hooks: list = []


def _before_forward(module, args) -> None:
    if not torch.compiler.is_compiling():
        _layers.push(module)


def _after_forward(module, args, output) -> None:
    if not torch.compiler.is_compiling():
        _layers.pop(module)


class layer_scope:
    """Within this block a trace names `module` as the layer: for a block that runs its children's parameters
    itself instead of calling the children."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self) -> None:
        if not torch.compiler.is_compiling() and _traces:
            _layers.push(self.module)

    def __exit__(self, *exc) -> None:
        if not torch.compiler.is_compiling() and _traces:
            _layers.pop(self.module)


def _layout(x) -> str:
    if x.layout != torch.strided:
        return str(x.layout)[6:]
    if x.is_contiguous():
        return "contiguous"
    return (
        "channels_last" if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else "strided"
    )


@dataclasses.dataclass
class Row:
    """One line of a trace: the calls of one layer that ran alike."""

    layer: str
    kernel: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    calls: int
    reason: str | None


class Trace:
    """The calls of gconv's ops while a `with` block was open, or, from `explain`, of a dry run.

    Iterating gives `Row`s in the order of their first call, `str` an aligned table, `to_dict` and `to_json`
    the rows as plain data. A call outside every module has the layer "-"; so has a backward.
    """

    def __init__(self, dry: bool = False):
        self.dry = dry
        self._rows: dict[tuple, Row] = {}

    def __enter__(self) -> "Trace":
        with _lock:
            _traces.append(self)
            if not _hooks:
                _layers.stack.clear()
                hooks = nn.modules.module
                _hooks.append(hooks.register_module_forward_pre_hook(_before_forward))
                _hooks.append(hooks.register_module_forward_hook(_after_forward, always_call=True))
        return self

    def __exit__(self, *exc) -> None:
        with _lock:
            _traces.remove(self)
            if not _traces:
                while _hooks:
                    _hooks.pop().remove()
                _layers.stack.clear()

    def add(self, decision: Decision, x) -> None:
        layer = _layers.stack[-1][1] if _layers.stack else "-"
        key = (layer, decision.kernel, tuple(x.shape), str(x.dtype)[6:], _layout(x), decision.reason)
        with _lock:
            row = self._rows.get(key)
            if row is None:
                self._rows[key] = Row(*key[:5], calls=1, reason=decision.reason)
            else:
                row.calls += 1

    @property
    def rows(self) -> list[Row]:
        with _lock:
            return list(self._rows.values())

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self._rows)

    def to_dict(self) -> dict:
        return {"rows": [dataclasses.asdict(row) | {"shape": list(row.shape)} for row in self.rows]}

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        if not self._rows:
            return "no gconv call was seen (calls inside code made by torch.compile are not)"
        table = [("layer", "kernel", "shape, dtype, layout", "calls", "reason")]
        for row in self.rows:
            what = f"{'x'.join(map(str, row.shape))} {row.dtype} {row.layout}"
            table.append((row.layer, row.kernel, what, str(row.calls), row.reason or ""))
        return format_table(table)

    __repr__ = __str__


def format_table(table: list[tuple[str, ...]]) -> str:
    """Aligned columns with a line under the heading; the last column is left ragged."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def trace() -> Trace:
    """`with gconv.trace() as t:` collects the calls of gconv's ops in the block, in every thread; `print(t)`
    shows layer | kernel | shape, dtype, layout | calls | reason. Layers are named from the outermost module
    called."""
    return Trace()


def _fake_inputs(module: nn.Module, x, mode) -> tuple:
    if isinstance(x, torch.Tensor):
        return (mode.from_tensor(x),)
    if isinstance(x, (tuple, list)) and x and all(isinstance(item, torch.Tensor) for item in x):
        return tuple(mode.from_tensor(item) for item in x)
    if isinstance(x, (tuple, list)) and x and all(type(size) is int and size >= 0 for size in x):
        like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
        with mode:
            return (torch.empty(tuple(x), dtype=like.dtype, device=like.device),)
    raise ValueError(
        f"explain: x: want a tensor, several tensors or a shape such as (8, 3, 224, 224), got {x!r}"
    )


def explain(module: nn.Module, x) -> Trace:
    """What would run each gconv call of `module(x)`, without running any kernel and without changing the
    module.

    The module is run on fake tensors, so running statistics, counters and the fallback policy are untouched.

    Args:
        module: a layer or a whole model.
        x: the input, several inputs as a tuple, or an input's shape (then of the dtype and device of the
            parameters).

    Returns:
        the rows as from `trace()`: print it.

    Raises:
        TypeError, ValueError: `module` is no module; `x` is neither tensor nor shape.
        RuntimeError: the module's forward needs the values of its input, not only their shape.
    """
    global _explaining
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )

    module = getattr(module, "_orig_mod", module)  # what torch.compile wrapped
    if not isinstance(module, nn.Module):
        raise TypeError(f"explain: module: want a torch.nn.Module, got {type(module).__name__}")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args = _fake_inputs(module, x, mode)
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    state = {name: mode.from_tensor(tensor) for name, tensor in named}
    # A cumulative average (momentum=None) reads the value of num_batches_tracked, which a fake tensor has
    # not.
    cumulative = [
        m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.momentum is None
    ]
    before, result = _explaining, Trace(dry=True)
    stack = _layers.stack
    try:
        _explaining, _layers.stack = True, []
        for bn in cumulative:
            bn.momentum = 0.0
        # Compiled code records nothing; a module can be compiled only where dynamo is already imported.
        compiled = "torch._dynamo" in sys.modules
        eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
        with eager, result, mode:
            torch.func.functional_call(module, state, args)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise RuntimeError(
            f"explain: the forward of {type(module).__name__} needs real values: {error}"
        ) from error
    finally:
        _explaining, _layers.stack = before, stack
        for bn in cumulative:
            bn.momentum = None
    return result
