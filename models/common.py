"""What the models share: how a builder makes one, and the memory format of their images."""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from .weights import load_weights, num_classes_of, read_weights

Model = TypeVar("Model", bound=nn.Module)


def build(
    cls: type[Model],
    name: str,
    weights: Mapping[str, Tensor] | str | None,
    kwargs: dict[str, Any],
    classes: int = 1000,
    **fixed: Any,
) -> Model:
    """cls(**kwargs), filled with `weights` where they are given.

    kwargs: the caller's; `fixed` are the ones that the model's name stands for.
    classes: num_classes where neither the caller nor, as in torchvision, the weights decide it.

    Raises ValueError where kwargs contradict the name, and what read_weights and load_weights raise.
    """
    for key, value in fixed.items():
        if kwargs.setdefault(key, value) != value:
            raise ValueError(f"{name}: {key}: want {value}, got {kwargs[key]}")
    state = None if weights is None else read_weights(weights, name)
    kwargs.setdefault("num_classes", classes if state is None else num_classes_of(state, default=classes))
    model = cls(**kwargs)
    return model if state is None else load_weights(model, state, name)


def to_channels_last(x: Tensor) -> Tensor:
    """x in channels_last, which gconv's kernels read in place; the layers that follow keep to it.

    By permute, since under torch.func.vmap there is no Tensor.contiguous(memory_format=...).
    """
    if x.dim() != 4:
        return x
    if x.shape[1] == 1:
        # One channel is contiguous in both formats; a view gets the strides that say channels_last.
        return x.reshape(x.shape[0], x.shape[2], x.shape[3], 1).permute(0, 3, 1, 2)
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
