"""The kernels that run the ops on a GPU: those in Triton and, for the 3x3 convolution, those in CUDA C++.

Every op of `gconv.schemas` has a Triton launcher of its name and arguments in the module of its stem in
gconv.kernels; it is imported at the first call, so that importing gconv needs no Triton. The extension
gconv._cuda has the grouped_conv_* ops again, on its own kernels. Registered as the CUDA kernels of
torch.ops.gconv, launchers that choose between the two by `kernels` run under the same Functions, layers and
compilers as the C++ kernels do on a CPU, and under every op that is made of them.

With TRITON_INTERPRET=1 in the environment and `use_backend("triton")` the Triton launchers also take the
place of the CPU kernels, slowly and without a GPU: for tests, at small shapes, in float32 and float16. (The
interpreter computes bfloat16 wrongly.)
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import warnings
from collections.abc import Callable

import torch

from gconv import extensions
from gconv.schemas import schemas

# Modules of gconv.kernels; other ops have kernels for the CPU alone.
STEMS = ("grouped_conv", "pointwise_conv", "batch_norm", "conv_bn_relu")
# In "auto" a 3x3 convolution of fewer channels per group than this, in and out, runs on CUDA C++, where a
# tile is read into shared memory once, with its halo, for all nine taps; the Triton kernels read it once for
# each column of taps. With more channels the products outweigh the reading, and Triton's matrix instructions
# are the wider ones. In float32 what counts is that Triton multiplies zeros up to 16 channels.
# This is a rule from the kernels' construction: neither has been timed on a GPU. `make gpu` times both.
CUDA_CHANNELS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16}

_library: torch.library.Library | None = None  # of the CUDA kernels: registered as long as it lives
_interpreted: torch.library.Library | None = None
_mode = "auto"  # as `use_backend` has it
_missing_cuda = extensions.load("_cuda", "build with nvcc on PATH and GCONV_CUDA=1 (`make cuda-build`)")


def missing_triton() -> str | None:
    """None, or one line saying why the Triton kernels cannot run and what to do."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton, in the version that this torch wants"
    return _interpreter_at_odds() if interpreting() else None


@functools.cache
def _interpreter_at_odds() -> str | None:
    """None, or why Triton's interpreter fails here: before 3.7 it takes arrays of one element for numbers,
    which NumPy 2.4 refuses."""
    try:
        triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
    except importlib.metadata.PackageNotFoundError:
        return None
    if _release(triton) >= (3, 7) or _release(numpy) < (2, 4):
        return None
    return f"the interpreter of Triton {triton} needs NumPy below 2.4, got {numpy}: pip install 'numpy<2.4'"


def _release(version: str) -> tuple[int, ...]:
    """(major, minor)"""
    return tuple(int(part) for part in version.split(".")[:2])


def interpreting() -> bool:
    """Whether Triton's interpreter is asked for."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


# ------------------------------------------------------------------------------------- the CUDA C++ kernels


def architectures() -> tuple[str, ...]:
    """What the CUDA C++ kernels are compiled for: sm_90a is machine code, compute_90 is PTX; () without
    them."""
    return () if _missing_cuda is not None else tuple(torch.ops.gconv_cuda.architectures().split(","))


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for this architecture runs on a GPU of this compute capability: machine code within its
    major version, PTX on all later GPUs, what is specific (sm_90a) on its own capability alone."""
    kind, major, minor, specific = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture).groups()
    target = (int(major), int(minor))
    if specific == "a":
        return capability == target
    within = capability[0] == target[0] or (kind == "compute" and not specific)
    return within and capability >= target


@functools.cache
def _unfit(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if any(runs_on(architecture, capability) for architecture in architectures()):
        return None
    built, found = ", ".join(architectures()), ".".join(map(str, capability))
    return f"gconv._cuda is built for {built}, but the GPU has compute capability {found}"


@torch.compiler.assume_constant_result
def _why_unfit(index: int) -> str | None:
    return _unfit(index) if torch.cuda.is_available() else None  # fake tensors are on a GPU anywhere


def missing_cuda(device: torch.device | None = None) -> str | None:
    """None, or one line saying why the CUDA C++ kernels cannot run (on this device) and what to do."""
    if _missing_cuda is not None or device is None:
        return _missing_cuda
    return _why_unfit(device.index or 0)


def prefers_cuda(dtype: torch.dtype, weight_size, groups: int) -> bool:
    """Whether "auto" takes CUDA C++ rather than Triton for a convolution with a weight of this size."""
    k, c, *kernel_size = weight_size
    return tuple(kernel_size) == (3, 3) and max(c, k // groups) < CUDA_CHANNELS.get(dtype, 0)


def kernels(mode: str, dtype, device, weight_size, groups: int) -> str:
    """Which kernels run a convolution and its gradients on a GPU, "cuda" or "triton", by the weight's size
    [K, C/groups, R, S] and the mode of `use_backend`. "cuda" where that is the mode, missing or not."""
    if mode == "cuda":
        return "cuda" if tuple(weight_size[2:]) == (3, 3) else "triton"
    wanted = mode != "triton" and prefers_cuda(dtype, weight_size, groups)
    return "cuda" if wanted and missing_cuda(device) is None else "triton"


def why_triton(mode: str, dtype, device, weight_size, groups: int) -> str | None:
    """Why Triton runs what would by default, or by `use_backend("cuda")`, be for CUDA C++; None where it is
    not."""
    if mode == "cuda":
        return "use_backend('cuda'): only Triton has this op"
    if mode == "auto" and weight_size is not None and prefers_cuda(dtype, weight_size, groups):
        return missing_cuda(device)
    return None


def tf32(x) -> bool:
    """Whether products of x's dtype may be rounded to TF32: as in torch's own convolutions."""
    return x.dtype is torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"


def on_cuda(name: str, x, args) -> object:
    """Runs an op on the CUDA C++ kernels, on the device of x and that device's current stream."""
    missing = missing_cuda(x.device)
    if missing is not None:
        raise RuntimeError(f"{name}: use_backend('cuda'): {missing}")
    with torch.cuda.device_of(x):
        stream = torch._C._cuda_getCurrentRawStream(x.device.index)
        return getattr(torch.ops.gconv_cuda, name)(*args, tf32=tf32(x), stream=stream)


# -------------------------------------------------------------------------------------------- the launchers


def _arguments(schema: str) -> list[str]:
    """The names of an op's arguments."""
    return re.findall(r"(\w+)(?:=\w+)?[,)]", schema.partition(" -> ")[0])


def _launcher(schema: str) -> Callable:
    """The launcher of an op."""
    name = schema.partition("(")[0]
    stem = next(stem for stem in STEMS if name.startswith(stem))

    def launch(*args):
        return getattr(importlib.import_module(f"gconv.kernels.{stem}"), name)(*args)

    if stem != "grouped_conv":
        return launch
    names = _arguments(schema)
    groups = names.index("groups")
    weight = names.index("weight" if "weight" in names else "weight_size")

    def launch_either(*args):
        x = args[0]
        size = args[weight].shape if isinstance(args[weight], torch.Tensor) else args[weight]
        if x.is_cuda and kernels(_mode, x.dtype, x.device, size, args[groups]) == "cuda":
            return on_cuda(name, x, args)
        return launch(*args)

    return launch_either


def _registered(key: str, override: bool) -> torch.library.Library:
    library = torch.library.Library("gconv", "IMPL")
    for schema in schemas():
        if schema.startswith(STEMS):
            library.impl(schema.partition("(")[0], _launcher(schema), key, allow_override=override)
    return library


def register() -> None:
    """Makes the launchers the CUDA kernels of the ops."""
    global _library
    if _library is None:
        _library = _registered("CUDA", False)


def follow(mode: str) -> None:
    """Makes the launchers follow this mode of `use_backend`: "triton" with the interpreter puts them in the
    place of the CPU kernels, every other mode takes them away again."""
    global _mode, _interpreted
    _mode = mode
    on = mode == "triton" and interpreting()
    if on and _interpreted is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that they take the place of others is what is wanted
            _interpreted = _registered("CPU", True)
    elif not on and _interpreted is not None:
        _interpreted._destroy()
        _interpreted = None
