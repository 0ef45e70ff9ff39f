"""Densely connected layers under torchvision's names: DenseLayer, DenseBlock and Transition.

Source: Huang et al. 2017, "Densely connected convolutional networks", arXiv 1608.06993, equation 2 (each
layer reads the concatenation of all feature maps before it), section 3 (BN-ReLU-convolution; the bottleneck
of DenseNet-B, the compression of DenseNet-C). A block of C channels and L layers of growth rate k gives
C + L*k channels.

The modules hold parameters and say what is computed; a whole block, and the transition behind it, runs as one
call (`gconv.dense_modules.fuse_dense_block_forward`) on one buffer that every layer writes its slice of.
"""

import re
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gconv import backend
from gconv.batch_norm import batch_norm_module, is_frozen
from gconv.conv_bn_relu import brings_relu, not_fusable, not_plain_relu, watched
from gconv.dense_modules import fuse_dense_block_forward
from gconv.grouped_conv import grouped_conv
from gconv.layers import Conv2d

__all__ = ["DenseBlock", "DenseLayer", "Transition", "remap_densenet_keys", "run_dense_block"]

MEMORY = ("shared", "ultra", "naive")


def _renamed(state: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    """`state` with the names of today; `layer` is the pattern of what stands before a dense layer's
    children."""
    old = re.compile(f"^({layer})(norm|relu|conv)\\.([12]\\..+)$")
    result = {}
    for key, value in state.items():
        name = old.sub(r"\1\2\3", key)
        if name != key and name in state:
            raise ValueError(f"remap_densenet_keys: state: want one of {key!r} and {name!r}, got both")
        result[name] = value
    return result


def remap_densenet_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with `denselayer1.norm.1.weight` and its like, as DenseNet checkpoints had them while a
    module's name could hold a dot, under their names of today, `denselayer1.norm1.weight`.

    state: names to tensors, with any prefix; not changed. Names of today stay, so twice is once.

    Raises ValueError where `state` has a tensor under both names.
    """
    return _renamed(state, r".*denselayer\d+\.")


def check_memory(owner: str, memory: str) -> None:
    if memory not in MEMORY:
        raise ValueError(f"{owner}: memory: want {', '.join(MEMORY[:-1])} or {MEMORY[-1]}, got {memory!r}")


def _check_positive(owner: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{owner}: {name}: want at least 1, got {size}")


def _check_rate(owner: str, drop_rate: float) -> None:
    if not 0 <= drop_rate <= 1:
        raise ValueError(f"{owner}: drop_rate: want 0 to 1, got {drop_rate}")


def _norm_reason(norm) -> str | None:
    if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm) and not is_frozen(norm):
        return f"want BatchNorm2d, SyncBatchNorm or FrozenBatchNorm2d, got {type(norm).__name__}"
    return watched(norm)


def _norm_relu_reason(norm) -> str | None:
    if not brings_relu(norm):
        return f"want BatchNormAct2d with ReLU, got {type(norm).__name__}"
    return watched(norm)


def _conv_reason(conv) -> str | None:
    if type(conv) is not nn.Conv2d and type(conv) is not Conv2d:
        return f"want Conv2d, got {type(conv).__name__}"
    return watched(conv)


_REASONS = {"norm": _norm_reason, "relu": not_plain_relu, "conv": _conv_reason}


def _children_reason(owner: nn.Module, names: tuple[str, ...]) -> str | None:
    """Why the children of these names have to be called, or None. A norm without a relu of its number brings
    a ReLU itself."""
    children = owner._modules
    if tuple(children) != names:
        return f"want {', '.join(names)}, got {', '.join(children)}"
    for name, child in children.items():
        kind, number = name[:4], name[4:]
        check = _REASONS.get(kind)
        if kind == "norm" and f"relu{number}" not in names:
            check = _norm_relu_reason
        reason = check and check(child)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def layer_reason(layer: nn.Module, names: tuple[str, ...]) -> str | None:
    """Why a dense layer, which has children of these names and a drop_rate, has to be called, or None."""
    reason = watched(layer) or _children_reason(layer, names)
    if reason is None and layer.drop_rate > 0 and layer._modules[names[-1]].training != layer.training:
        reason = "its convolution is not in its mode"
    return reason


def transition_reason(transition: nn.Module, names: tuple[str, ...]) -> str | None:
    """Why the children of a transition, which have these names, have to be called, or None."""
    reason = _children_reason(transition, names)
    if reason is None and not _is_pointwise(transition.conv):
        reason = f"conv: want 1x1, got {transition.conv}"
    if reason is None and not _halves(transition.pool):
        reason = f"pool: want AvgPool2d(2, 2), got {transition.pool}"
    return reason


class DenseLayer(nn.Module):
    """The k = growth_rate feature maps that one layer adds: BN-ReLU-1x1-BN-ReLU-3x3 on all maps before it
    (DenseNet-B), or BN-ReLU-3x3 without a bottleneck.

    [N, num_input_features, H, W], or a list of tensors of as many channels together -> [N, k, H, W].
    Called by itself it runs its modules one by one; a DenseBlock runs all its layers as one call.

    Args:
        num_input_features: channels of the input.
        growth_rate: k.
        bn_size: the 1x1 convolution has bn_size * k output channels; None or 0: no bottleneck, and conv1 is
            the 3x3.
        drop_rate: of the dropout behind the last convolution, applied in train mode.
        norm_layer: makes norm1 and norm2 from a number of channels; nn.BatchNorm2d if None.

    State dicts load with names of either kind (`remap_densenet_keys`).
    """

    has_bottleneck: torch.jit.Final[bool]

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int | None = 4,
        drop_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        _check_positive("DenseLayer", num_input_features=num_input_features, growth_rate=growth_rate)
        _check_rate("DenseLayer", drop_rate)
        if bn_size is not None and bn_size < 0:
            raise ValueError(f"DenseLayer: bn_size: want None, 0 or a positive number, got {bn_size}")
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        width = bn_size * growth_rate if bn_size else num_input_features
        self.norm1 = norm_layer(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.has_bottleneck = bool(bn_size)
        if self.has_bottleneck:
            self.conv1 = nn.Conv2d(num_input_features, width, kernel_size=1, bias=False)
            self.norm2 = norm_layer(width)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(width, growth_rate, kernel_size=3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(width, growth_rate, kernel_size=3, padding=1, bias=False)
        self.drop_rate = float(drop_rate)

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        features = [x] if isinstance(x, Tensor) else x
        y = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        if self.has_bottleneck:
            y = self.conv2(self.relu2(self.norm2(y)))
        if self.drop_rate > 0:
            y = F.dropout(y, p=self.drop_rate, training=self.training)
        return y

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        renamed = _renamed(state_dict, re.escape(prefix))
        state_dict.clear()
        state_dict.update(renamed)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _reason(self) -> str | None:
        """Why the layer, whatever it is, has to be called, or None."""
        if type(self) is not DenseLayer:
            return f"want DenseLayer, got {type(self).__name__}"
        names = ("norm1", "relu1", "conv1")
        if self.has_bottleneck:
            names = (*names, "norm2", "relu2", "conv2")
        return layer_reason(self, names)

    def _parts(self) -> tuple:
        """(bn1, conv1, bn2, conv2, dropout), as `fuse_dense_block_forward` takes them."""
        second = (self.norm2, self.conv2) if self.has_bottleneck else (None, None)
        return self.norm1, self.conv1, *second, self.drop_rate


class _Fused(nn.Module):
    """A container that runs its children as one call where `memory` and the children allow it."""

    memory: str

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._forward_modules(x)
        else:
            return self._run(x)

    @torch.jit.unused
    def _run(self, x: Tensor) -> Tensor:
        # Under torch.fx tracing the graph gets torchvision's nodes.
        if self.memory == "naive" or isinstance(x, torch.fx.Proxy):
            return self._forward_modules(x)
        reason = self._reason_alone()
        if reason is not None:
            backend.record(backend.one_by_one(reason), type(self).__name__, x)
            return self._forward_modules(x)
        return self._forward_fused(x)

    def extra_repr(self) -> str:
        return f"memory={self.memory!r}"


class DenseBlock(_Fused, nn.ModuleDict):
    """num_layers DenseLayers, each on the concatenation of the input and the outputs of the layers before it.

    [N, num_input_features, H, W] -> [N, num_input_features + num_layers * growth_rate, H, W]: the input and
    then each layer's maps. Children are `denselayer1`, `denselayer2`, ..., as torchvision's.

    Args:
        num_layers, num_input_features: of the block.
        bn_size, growth_rate, drop_rate, norm_layer: as in DenseLayer.
        memory: what the block keeps for the backward. "shared": one buffer of all maps, and of each layer
            what its 1x1 convolution gives. "ultra": the buffer alone; the 1x1 convolutions run again in the
            backward. "naive": what torch.nn's modules keep, called one by one with torch.cat; torchvision's
            results to the bit.

    In the first two the block is one call of `gconv.dense_block`. Where a child has hooks, a replaced
    forward or a type other than those above (norms: BatchNorm2d, SyncBatchNorm or FrozenBatchNorm2d) the
    modules are called one by one instead, and `gconv.trace` says why. Running statistics move once per
    forward in every mode.

    Raises:
        ValueError: memory or a size that is none of the above.
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int | None,
        growth_rate: int,
        drop_rate: float = 0.0,
        memory: str = "shared",
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        check_memory("DenseBlock", memory)
        _check_positive("DenseBlock", num_layers=num_layers)
        self.memory = memory
        for i in range(num_layers):
            width = num_input_features + i * growth_rate
            self[f"denselayer{i + 1}"] = DenseLayer(width, growth_rate, bn_size, drop_rate, norm_layer)

    def _forward_fused(self, x: Tensor) -> Tensor:
        return fuse_dense_block_forward(x, self._parts(), None, self.memory)

    def _forward_modules(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)

    def _reason(self) -> str | None:
        """Why the layers have to be called, or None."""
        for name, layer in self._modules.items():
            reason = DenseLayer._reason(layer)
            if reason is not None:
                return f"{name}: {reason}"
        return None

    _reason_alone = _reason

    def _parts(self) -> list[tuple]:
        return [layer._parts() for layer in self._modules.values()]


class Transition(_Fused, nn.Sequential):
    """What is between two dense blocks: BN-ReLU-1x1-2x2 average pooling.

    [N, num_input_features, H, W] -> [N, num_output_features, H // 2, W // 2]. Children are `norm`, `relu`,
    `conv` and `pool`, as torchvision's.

    The mean over 2x2 pixels and the 1x1 convolution are linear maps of different axes, so they commute:
    unless `memory` is "naive", the pooling comes first and the convolution does a quarter of the work. After
    a DenseBlock, `run_dense_block` makes block and transition one call.

    Args:
        num_input_features, num_output_features: channels.
        memory, norm_layer: as in DenseBlock.

    Raises:
        ValueError: memory or a size that is none of the above.
    """

    def __init__(
        self,
        num_input_features: int,
        num_output_features: int,
        memory: str = "shared",
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        check_memory("Transition", memory)
        _check_positive(
            "Transition", num_input_features=num_input_features, num_output_features=num_output_features
        )
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        self.memory = memory
        self.norm = norm_layer(num_input_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(num_input_features, num_output_features, kernel_size=1, bias=False)
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2)

    def _forward_fused(self, x: Tensor) -> Tensor:
        conv = self.conv
        y = F.avg_pool2d(batch_norm_module(x, self.norm), 2)
        return grouped_conv(y, conv.weight, conv.bias, groups=conv.groups)

    def _forward_modules(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x)
        return x

    def _reason(self) -> str | None:
        """Why the children have to be called, or None."""
        if type(self) is not Transition:
            return f"want Transition, got {type(self).__name__}"
        return transition_reason(self, ("norm", "relu", "conv", "pool"))

    def _reason_alone(self) -> str | None:
        return self._reason() or not_fusable(self.conv, self.norm)


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding in ((0, 0), "same", "valid")


def _halves(pool: nn.Module) -> bool:
    """Whether `pool` takes the mean of each 2x2, and nobody watches it do so."""
    if type(pool) is not nn.AvgPool2d or watched(pool):
        return False
    sizes = [
        (size, size) if isinstance(size, int) else tuple(size) for size in (pool.kernel_size, pool.stride)
    ]
    padded = pool.padding not in (0, (0, 0))
    return sizes == [(2, 2), (2, 2)] and not (padded or pool.ceil_mode or pool.divisor_override)


def _ending(module: nn.Module) -> tuple | None:
    """`module`, a Transition or a normalisation with ReLU behind it, as `fuse_dense_block_forward` takes it,
    or None where it has to be called."""
    if isinstance(module, Transition):
        plain = module.memory != "naive" and not watched(module) and module._reason() is None
        return (module.norm, module.conv) if plain else None
    return (module, None) if _norm_reason(module) is None else None


def run_dense_block(x: Tensor, block: DenseBlock, ending: nn.Module) -> Tensor:
    """ending(block(x)): a dense block and what follows it as one call, which never stores the block's
    normalised maps.

    Args:
        x: [N, C, H, W].
        block: on C channels.
        ending: a Transition, or a batch norm of the block's output channels, after which a ReLU is applied.

    Returns:
        [N, num_output_features, H // 2, W // 2] for a Transition, else the block's output shape.

    Where block or ending has hooks, or anything in them has to be called as a module, the two run one after
    the other, each as it does by itself.
    """
    plain = type(block) is DenseBlock and block.memory != "naive" and not watched(block)
    parts = _ending(ending) if plain and block._reason() is None else None
    if parts is None or isinstance(x, torch.fx.Proxy):
        z = ending(block(x))
        return z if isinstance(ending, Transition) else F.relu(z)
    with backend.layer_scope(block):
        return fuse_dense_block_forward(x, block._parts(), parts, block.memory)
