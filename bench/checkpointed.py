"""A stock DenseNet that trains with checkpointing as torchvision's memory_efficient=True does it: the
concatenation, batch norm, ReLU and first convolution of every dense layer run again in the backward."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gconv.dense_layers import DenseLayer

__all__ = ["checkpoint_layers"]


def _first(layer: DenseLayer, *features: Tensor) -> Tensor:
    return layer.conv1(layer.relu1(layer.norm1(torch.cat(features, 1))))


def _forward(layer: DenseLayer, features: list[Tensor]) -> Tensor:
    y = checkpoint(functools.partial(_first, layer), *features, use_reentrant=False)
    if layer.has_bottleneck:
        y = layer.conv2(layer.relu2(layer.norm2(y)))
    return F.dropout(y, layer.drop_rate, layer.training) if layer.drop_rate > 0 else y


def checkpoint_layers(model: nn.Module) -> nn.Module:
    """A stock DenseNet, the forward of its dense layers replaced in place; names and weights stay.

    As in torchvision 0.28 (models/densenet.py), and as there the batch norm that runs again updates its
    running statistics again.
    """
    for layer in model.modules():
        if isinstance(layer, DenseLayer):
            layer.forward = functools.partial(_forward, layer)
    return model
