"""Reading weights for a model from a file or a state dict. Nothing is ever downloaded."""

import enum
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["load_weights", "num_classes_of", "read_weights"]

# Where training scripts put the state dict inside a checkpoint, and what wrappers put before each of its
# keys: DistributedDataParallel and torch.compile.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
# The last part of the name of BatchNorm2d's counter. Old checkpoints and FrozenBatchNorm2d lack it.
_COUNTER = "num_batches_tracked"
# What the last linear layer is called: in ResNets, in DenseNets.
_CLASSIFIERS = ("fc", "classifier")


def read_weights(weights: Any, model_name: str = "model") -> dict[str, Tensor]:
    """The state dict that `weights` stands for, on the CPU where it comes from a file.

    weights: a path (str or os.PathLike) of a .safetensors file, read with the safetensors library, or of any
    other file (.pth, .pt), read with torch.load(weights_only=True); or a mapping from names to tensors. A
    checkpoint that holds the state dict under "state_dict", "model_state_dict" or "model" is opened; a
    "module." or "_orig_mod." before every name is taken off.

    Raises FileNotFoundError where there is no such file, ValueError where the file or the mapping holds no
    state dict, for torchvision's weights enum and for the name of one of its members (that would be a
    download), ModuleNotFoundError for a .safetensors file without the safetensors library, TypeError for
    anything else.
    """
    where = f"{model_name}: weights"
    if isinstance(weights, enum.Enum):
        raise ValueError(
            f"{where}: want a path or a state dict, got {weights}: nothing is downloaded; "
            f"pass the path of the file{_url_hint(weights)}, or {type(weights).__name__}.{weights.name}"
            ".get_state_dict() if a download by torchvision is wanted"
        )
    if isinstance(weights, (str, os.PathLike)):
        path = os.fspath(weights)
        state = _read_file(path, where)
        where = f"{where}: {path}"
    elif isinstance(weights, Mapping):
        state = weights
    else:
        raise TypeError(f"{where}: want a path or a state dict, got {type(weights).__name__}")
    return _unwrap(state, where)


def _url_hint(weights: enum.Enum) -> str:
    url = getattr(weights.value, "url", None)
    return f" fetched from {url}" if url else ""


def _read_file(path: str, where: str) -> Any:
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{where}: want the path of a .pth, .pt or .safetensors file or a state dict, got {path!r}: "
            "no such file, and nothing is downloaded by name"
        )
    if path.endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{where}: {path}: reading it needs the safetensors library: pip install safetensors"
            ) from error
        read = load_file
    else:

        def read(path: str) -> Any:
            return torch.load(path, map_location="cpu", weights_only=True)

    try:
        return read(path)
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise ValueError(f"{where}: cannot read {path}: {type(error).__name__}: {first_line}") from error


def _unwrap(state: Any, where: str) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise ValueError(f"{where}: want a state dict (names to tensors), got {type(state).__name__}")
    if not state:
        raise ValueError(f"{where}: want a state dict (names to tensors), got an empty one")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{where}: want a state dict (names to tensors), got {type(value).__name__} under {key!r}"
            )
    state = dict(state)
    for prefix in _PREFIXES * 2:  # twice: the two wrappers come in either order
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def num_classes_of(state: Mapping[str, Tensor], default: int) -> int:
    """The number of classes of the classifier, `fc` or `classifier`, in a state dict, `default` where it has
    none."""
    for name in _CLASSIFIERS:
        weight = state.get(f"{name}.weight")
        if weight is not None and weight.dim() == 2:
            return weight.shape[0]
    return default


def load_weights(model: nn.Module, weights: Any, model_name: str | None = None) -> nn.Module:
    """Copies weights into `model`, in place, and returns it. All or nothing: on an error the model is
    unchanged.

    weights: what read_weights takes. Values are converted to the model's dtypes and devices. BatchNorm2d's
    num_batches_tracked may be missing (it is then left alone) or unused. A model that knows its names of
    former times has a method remap_keys(state) -> state.

    Raises ValueError, in one line, with the names that are missing, that are unexpected, and whose shape
    differs.
    """
    model_name = model_name or type(model).__name__
    state = read_weights(weights, model_name)
    if hasattr(model, "remap_keys"):
        state = model.remap_keys(state)
    want = model.state_dict()
    missing = [key for key in want if key not in state and not key.endswith(_COUNTER)]
    unexpected = [key for key in state if key not in want and not key.endswith(_COUNTER)]
    differing = [key for key in want if key in state and want[key].shape != state[key].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {_some(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {_some(unexpected)}")
    if differing:
        shapes = [f"{key}: want {list(want[key].shape)}, got {list(state[key].shape)}" for key in differing]
        problems.append(f"{len(differing)} of another shape: {_some(shapes)}")
    if problems:
        raise ValueError(
            f"{model_name}: weights: {'; '.join(problems)}{_classes_hint(want, state, differing)}"
        )
    with torch.no_grad():
        for key, value in want.items():
            if key in state:
                value.copy_(state[key])
    return model


def _some(items: list[str], limit: int = 4) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _classes_hint(want: Mapping[str, Tensor], state: Mapping[str, Tensor], differing: list[str]) -> str:
    """What to do when the classifiers alone differ: the common case of fine-tuning on other classes."""
    for name in _CLASSIFIERS:
        if differing and set(differing) <= {f"{name}.weight", f"{name}.bias"}:
            have, given = num_classes_of(want, 0), num_classes_of(state, 0)
            if have == given:
                return ""
            return (
                f" (the model has num_classes = {have}, the weights {given}: leave num_classes out when "
                f"loading, then replace model.{name} by nn.Linear({want[f'{name}.weight'].shape[1]}, {have}))"
            )
    return ""
