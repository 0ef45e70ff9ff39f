"""Grouped convolutions for PyTorch: drop-in layers on kernels of their own; torch runs what those do not."""

import importlib
import os

from gconv import backend

backend.notify_missing_extension()

# In a checkout the sibling folders models/, kernels/ and bench/ are gconv.models, gconv.kernels and
# gconv.bench, as they are once installed.
_checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if all(os.path.exists(os.path.join(_checkout, name)) for name in ("pyproject.toml", "csrc", "models")):
    __path__.append(_checkout)

from gconv import functional  # noqa: E402
from gconv.backend import FallbackWarning, explain, set_policy, trace, use_backend  # noqa: E402
from gconv.concat import Concat  # noqa: E402
from gconv.convert import convert, revert  # noqa: E402
from gconv.dense_layers import DenseBlock  # noqa: E402
from gconv.freeze import freeze  # noqa: E402
from gconv.layers import Conv2d, ConvBNReLU  # noqa: E402
from gconv.memory import empty_cache  # noqa: E402

__all__ = [
    "Concat", "Conv2d", "ConvBNReLU", "DenseBlock", "FallbackWarning", "bench", "convert", "empty_cache",
    "explain", "freeze", "functional", "kernels", "models", "revert", "set_policy", "trace", "use_backend",
]  # fmt: skip

_LAZY = ("bench", "kernels", "models")


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f"gconv.{name}")
    if name == "__version__":
        from gconv.info import version

        return version()
    raise AttributeError(f"module 'gconv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, "__version__"])
