"""The Triton kernels as what the ops run on a GPU, and under Triton's interpreter on the CPU.

Every op of `gconv.schemas` has a launcher of its name and arguments in the module of its stem in
gconv.kernels; it is imported at the first call, so that importing gconv needs no Triton. Registered as the
CUDA kernels of torch.ops.gconv, the launchers run under the same Functions, layers and compilers as the C++
kernels do on a CPU.

With TRITON_INTERPRET=1 in the environment and `use_backend("triton")` they also take the place of the CPU
kernels, slowly and without a GPU: for tests, at small shapes, in float32 and float16. (The interpreter
computes bfloat16 wrongly.)
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable

import torch

STEMS = ("grouped_conv", "pointwise_conv", "batch_norm", "conv_bn_relu")  # modules of gconv.kernels

_library: torch.library.Library | None = None  # of the CUDA kernels: registered as long as it lives
_interpreted: torch.library.Library | None = None


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


def _names() -> list[str]:
    from gconv.schemas import schemas

    return [schema.partition("(")[0] for schema in schemas()]


def _launcher(name: str) -> Callable:
    """The launcher of an op, imported when it is first called."""
    stem = next(stem for stem in STEMS if name.startswith(stem))

    def launch(*args, **kwargs):
        return getattr(importlib.import_module(f"gconv.kernels.{stem}"), name)(*args, **kwargs)

    return launch


def _registered(key: str, override: bool) -> torch.library.Library:
    library = torch.library.Library("gconv", "IMPL")
    for name in _names():
        library.impl(name, _launcher(name), key, allow_override=override)
    return library


def register() -> None:
    """Makes the launchers the CUDA kernels of the ops."""
    global _library
    if _library is None:
        _library = _registered("CUDA", False)


def interpret(on: bool) -> None:
    """Puts the launchers in the place of the CPU kernels, or takes them away again."""
    global _interpreted
    if on and _interpreted is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that they take the place of others is what is wanted
            _interpreted = _registered("CPU", True)
    elif not on and _interpreted is not None:
        _interpreted._destroy()
        _interpreted = None
