"""Dense blocks of other projects for gconv.convert: a whole block, and the transition behind it, as one call.

A block is known by the code of its forward and of its layers' methods: torchvision's and timm's DenseNets and
every copy of them. Source: Huang et al. 2017, arXiv 1608.06993; what runs is `gconv.dense_block`.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as cp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gconv import backend
from gconv.conv_bn_relu import watched
from gconv.dense_block import not_shared
from gconv.dense_layers import layer_reason, transition_reason
from gconv.dense_modules import fuse_dense_block_forward, modules_reason
from gconv.fingerprint import same_code

# ----------------------------------------------------------------------------------------- the blocks we know


def _block_forward(self, init_features):
    features = [init_features]
    for _, layer in self.items():
        new_features = layer(features)
        features.append(new_features)
    return torch.cat(features, 1)


def _any_requires_grad(self, input):
    for tensor in input:  # noqa: SIM110  (its code is what is compared)
        if tensor.requires_grad:
            return True
    return False


def _torchvision_layer(self, input):
    if isinstance(input, Tensor):
        prev_features = [input]
    else:
        prev_features = input

    if self.memory_efficient and self.any_requires_grad(prev_features):
        if torch.jit.is_scripting():
            raise Exception("Memory Efficient not supported in JIT")

        bottleneck_output = self.call_checkpoint_bottleneck(prev_features)
    else:
        bottleneck_output = self.bn_function(prev_features)

    new_features = self.conv2(self.relu2(self.norm2(bottleneck_output)))
    if self.drop_rate > 0:
        new_features = F.dropout(new_features, p=self.drop_rate, training=self.training)
    return new_features


def _torchvision_bottleneck(self, inputs):
    concated_features = torch.cat(inputs, 1)
    bottleneck_output = self.conv1(self.relu1(self.norm1(concated_features)))
    return bottleneck_output


def _torchvision_checkpoint(self, input):
    def closure(*inputs):
        return self.bn_function(inputs)

    return cp.checkpoint(closure, *input, use_reentrant=False)


def _torchvision_checkpoint_of_old(self, input):
    def closure(*inputs):
        return self.bn_function(inputs)

    return cp.checkpoint(closure, *input)


def _timm_layer(self, x):
    if isinstance(x, torch.Tensor):
        prev_features = [x]
    else:
        prev_features = x

    if self.grad_checkpointing and self.any_requires_grad(prev_features):
        if torch.jit.is_scripting():
            raise Exception("Memory Efficient not supported in JIT")
        bottleneck_output = self.call_checkpoint_bottleneck(prev_features)
    else:
        bottleneck_output = self.bottleneck_fn(prev_features)

    new_features = self.conv2(self.norm2(bottleneck_output))
    if self.drop_rate > 0:
        new_features = F.dropout(new_features, p=self.drop_rate, training=self.training)
    return new_features


def _timm_bottleneck(self, xs):
    concated_features = torch.cat(xs, 1)
    bottleneck_output = self.conv1(self.norm1(concated_features))
    return bottleneck_output


def _timm_checkpoint(self, x):
    def closure(*xs):
        return self.bottleneck_fn(xs)

    return checkpoint(closure, *x)


class Known(NamedTuple):
    """A dense layer: its methods, each with the code it may have, its children in their order (a norm without
    a relu of its number brings a ReLU itself), and the attribute that asks for recomputation."""

    methods: dict[str, tuple[Callable, ...]]
    children: tuple[str, ...]
    recomputes: str


LAYERS = (
    Known(
        {
            "forward": (_torchvision_layer,),
            "bn_function": (_torchvision_bottleneck,),
            "any_requires_grad": (_any_requires_grad,),
            "call_checkpoint_bottleneck": (_torchvision_checkpoint, _torchvision_checkpoint_of_old),
        },
        ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2"),
        "memory_efficient",
    ),
    Known(
        {
            "forward": (_timm_layer,),
            "bottleneck_fn": (_timm_bottleneck,),
            "any_requires_grad": (_any_requires_grad,),
            "call_checkpoint_bottleneck": (_timm_checkpoint,),
        },
        ("norm1", "conv1", "norm2", "conv2"),
        "grad_checkpointing",
    ),
)
TRANSITIONS = (("norm", "relu", "conv", "pool"), ("norm", "conv", "pool"))


class Layers(NamedTuple):
    """What all layers of a converted block are."""

    type: type
    children: tuple[str, ...]
    recomputes: str


def is_dense_block(cls: type) -> bool:
    return same_code(cls.forward, _block_forward)


def _known(cls: type) -> Known | None:
    """The dense layer whose methods `cls` has, or None."""

    def matches(known: Known) -> bool:
        return all(
            any(same_code(getattr(cls, name, None), code) for code in codes)
            for name, codes in known.methods.items()
        )

    return next(filter(matches, LAYERS), None)


def layers_of(block: nn.Module) -> Layers | None:
    """What the layers of a dense block are, or None where the first of them is none that we know."""
    cls = type(next(iter(block._modules.values()), None))
    known = _known(cls)
    return None if known is None else Layers(cls, known.children, known.recomputes)


def labels(layers: Layers) -> dict[str, str]:
    """For each convolution of a layer the names of what runs with it."""
    convs = [name for name in layers.children if name.startswith("conv")]
    return {conv: "+".join(name for name in layers.children if name[4:] == conv[4:]) for conv in convs}


def kept_reason(block: nn.Module, layers: Layers | None) -> str | None:
    """Why a dense block cannot become one call, or None."""
    if layers is None:
        return "its layers are none that we know"
    return _reason(block, layers) or modules_reason(_parts(block), None)


# --------------------------------------------------------------------------------------------- fused forwards


def _reason(block: nn.Module, layers: Layers) -> str | None:
    """Why the layers have to be called, or None."""
    for name, layer in block._modules.items():
        if type(layer) is not layers.type:
            return f"{name}: want {layers.type.__name__}, got {type(layer).__name__}"
        reason = layer_reason(layer, layers.children)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _parts(block: nn.Module) -> list[tuple]:
    """(bn1, conv1, bn2, conv2, dropout) of each layer, as `fuse_dense_block_forward` takes them."""
    return [
        (layer.norm1, layer.conv1, layer.norm2, layer.conv2, layer.drop_rate)
        for layer in block._modules.values()
    ]


def _memory(block: nn.Module) -> str:
    recomputes = block._gconv_layers.recomputes
    return "ultra" if any(getattr(layer, recomputes) for layer in block._modules.values()) else "shared"


def _called_reason(block: nn.Module) -> str | None:
    """Why a converted block runs its own forward now, or None."""
    if not block._modules:
        return "it has no layers"
    return "torch.jit.trace" if torch.jit.is_tracing() else _reason(block, block._gconv_layers)


class DenseForward:
    """Mixin of the classes that convert gives to dense blocks; `_gconv_layers` (on the instance) is what its
    layers were when it did. A layer that changed, has hooks or holds what does not fuse, torch.fx and
    torch.jit.trace get the block's own forward, which keeps its checkpoints."""

    def forward(self, init_features):
        if isinstance(init_features, torch.fx.Proxy):
            return self._gconv_base.forward(self, init_features)
        reason = _called_reason(self)
        if reason is not None:
            not_shared(reason, init_features)
            return self._gconv_base.forward(self, init_features)
        return fuse_dense_block_forward(
            init_features, _parts(self), None, _memory(self), lambda x: self._gconv_base.forward(self, x)
        )


def _ending_reason(module: nn.Module) -> str | None:
    """Why `module` is no transition that runs with the dense block before it, or None."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return f"want a Sequential, got {type(module).__name__}"
    names = TRANSITIONS["relu" not in module._modules]
    reason = watched(module) or transition_reason(module, names)
    return reason or modules_reason([], (module.norm, module.conv))


def transitions_of(sequential: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of each transition that can run with the converted dense block before it."""
    children = list(sequential._modules.items())
    for (_, block), (name, module) in pairwise(children):
        if isinstance(block, DenseForward) and _ending_reason(module) is None:
            yield name, module


def run_with_transition(x, block: DenseForward, transition: nn.Module):
    """transition(block(x)), one call where nobody watches what is between the two."""
    reason = _ending_reason(transition)
    if reason is None and watched(block):
        reason = f"its dense block {watched(block)}"
    if reason is None and _called_reason(block) is not None:
        reason = "its dense block is called one by one"
    if reason is not None:
        y = block(x)
        with backend.layer_scope(transition):
            backend.record(backend.one_by_one(reason), "transition", y)
        return transition(y)
    with backend.layer_scope(block):
        return fuse_dense_block_forward(
            x,
            _parts(block),
            (transition.norm, transition.conv),
            _memory(block),
            lambda x: transition(block._gconv_base.forward(block, x)),
        )
