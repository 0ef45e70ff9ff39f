"""Models on gconv's layers, under torchvision's names: builders, their classes, and a registry to find them
by name.

`list_models()` gives the names, `get_model(name, **arguments)` builds one, `load_weights(model, weights)`
fills one.
"""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from gconv.dense_layers import remap_densenet_keys

from . import densenet as _densenet
from . import resnet as _resnet
from .densenet import *  # noqa: F403
from .resnet import *  # noqa: F403
from .weights import load_weights, read_weights

__all__ = [
    *_densenet.__all__, *_resnet.__all__, "get_model", "get_model_builder", "list_models", "load_weights",
    "read_weights", "remap_densenet_keys",
]  # fmt: skip

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    name: getattr(module, name)
    for module in (_densenet, _resnet)
    for name in module.__all__
    if name[0].islower()
}


def list_models(
    include: Iterable[str] | str | None = None, exclude: Iterable[str] | str | None = None
) -> list[str]:
    """Names of the models, sorted; include and exclude are shell patterns ("resnext*") or several of them."""

    def matches(name: str, patterns: Iterable[str] | str) -> bool:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    names = sorted(_BUILDERS)
    if include is not None:
        names = [name for name in names if matches(name, include)]
    if exclude is not None:
        names = [name for name in names if not matches(name, exclude)]
    return names


def get_model_builder(name: str) -> Callable[..., nn.Module]:
    """The builder of that name; upper and lower case are the same. Raises ValueError for an unknown name."""
    try:
        return _BUILDERS[name.lower()]
    except KeyError:
        raise ValueError(f"get_model: name: want one of {', '.join(list_models())}, got {name!r}") from None


def get_model(name: str, **arguments: Any) -> nn.Module:
    """The model of that name: get_model("resnext50_32x4d", num_classes=10) calls its builder."""
    return get_model_builder(name)(**arguments)
