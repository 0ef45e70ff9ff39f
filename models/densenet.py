"""DenseNet on gconv's dense blocks: DenseNet, -B, -C and -BC.

Source: Huang et al. 2017, "Densely connected convolutional networks", arXiv 1608.06993, table 1 (ImageNet)
and section 4.2 and table 2 (CIFAR).

Names, shapes and order of parameters and buffers, and the use of the random generator while they are
initialised, are torchvision's: the same seed gives the same weights and checkpoints go both ways. What
differs is the forward pass: each dense block runs with the transition behind it as one call, the last one
with the final batch norm and ReLU (`gconv.dense_layers.run_dense_block`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gconv.batch_norm import is_frozen
from gconv.conv_bn_relu import fuse_modules_forward, not_plain_relu, watched
from gconv.dense_layers import DenseBlock, Transition, check_memory, remap_densenet_keys, run_dense_block
from gconv.layers import Conv2d
from gconv.max_pool import max_pool

from .common import build, to_channels_last

__all__ = [
    "DenseNet",
    "densenet40_k12",
    "densenet100_k12",
    "densenet100_k24",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet_bc100_k12",
    "densenet_bc190_k40",
    "densenet_bc250_k24",
]


class DenseNet(nn.Module):
    """DenseNet of any of the four kinds: images [N, in_channels, H, W] -> logits [N, num_classes].

    Images of either memory format are taken to channels_last once and stay so.

    The arguments up to `memory_efficient` are torchvision's:
        growth_rate: k, the channels that each layer adds.
        block_config: layers of each dense block.
        num_init_features: channels of the stem.
        bn_size: a bottleneck has bn_size * k channels (DenseNet-B); None or 0: no bottlenecks.
        drop_rate: of the dropout behind each layer, in train mode.
        num_classes: of the classifier.
        memory_efficient: True is memory="ultra", the form that, as torchvision's checkpointing, computes
            activations again to keep less. (Already "shared" keeps less than torchvision's.)
    The rest, by keyword:
        memory: "shared", "ultra" or "naive", what each block keeps for the backward: see
            gconv.DenseBlock. "naive" runs the whole network module by module, as torchvision does.
        compression: theta, a transition gives int(theta * C) channels (DenseNet-C below 1).
        in_channels: channels of the images.
        small_images: for images of about 32x32, as in the paper: the stem is a 3x3 convolution of stride 1
            alone, without normalisation or pooling, instead of the 7x7 one and max pooling, both of stride 2.
        norm_layer: makes a normalisation from a number of channels; nn.BatchNorm2d if None.
        stock: the same as memory="naive": built of torch.nn's layers, the thing to compare with.

    Raises ValueError for sizes below 1, and where memory_efficient contradicts memory or stock.
    """

    remap_keys = staticmethod(remap_densenet_keys)

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int | None = 4,
        drop_rate: float = 0,
        num_classes: int = 1000,
        memory_efficient: bool = False,
        *,
        memory: str = "shared",
        compression: float = 0.5,
        in_channels: int = 3,
        small_images: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        stock: bool = False,
    ) -> None:
        super().__init__()
        check_memory("DenseNet", memory)
        if not 0 < compression <= 1:
            raise ValueError(f"DenseNet: compression: want above 0 to 1, got {compression}")
        if not block_config:
            raise ValueError(f"DenseNet: block_config: want at least one block, got {block_config}")
        self.memory = "naive" if stock else memory
        if memory_efficient:
            if self.memory == "naive":
                raise ValueError(
                    "DenseNet: memory_efficient: want False with memory='naive' or stock=True, got True"
                )
            self.memory = "ultra"
        self.stock = self.memory == "naive"
        norm = nn.BatchNorm2d if norm_layer is None else norm_layer
        self.features = nn.Sequential()
        if small_images:
            conv = nn.Conv2d if self.stock else Conv2d
            self.features.conv0 = conv(in_channels, num_init_features, kernel_size=3, padding=1, bias=False)
        else:
            self.features.conv0 = nn.Conv2d(
                in_channels, num_init_features, kernel_size=7, stride=2, padding=3, bias=False
            )
            self.features.norm0 = norm(num_init_features)
            self.features.relu0 = nn.ReLU(inplace=True)
            self.features.pool0 = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        width = num_init_features
        for i, layers in enumerate(block_config):
            block = DenseBlock(layers, width, bn_size, growth_rate, drop_rate, self.memory, norm_layer)
            self.features.add_module(f"denseblock{i + 1}", block)
            width += layers * growth_rate
            if i != len(block_config) - 1:
                compressed = int(width * compression)
                transition = Transition(width, compressed, self.memory, norm_layer)
                self.features.add_module(f"transition{i + 1}", transition)
                width = compressed
        self.features.norm5 = norm(width)
        self.classifier = nn.Linear(width, num_classes)

        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.constant_(m.weight, 1)
                nn.init.constant_(m.bias, 0)
            elif isinstance(m, nn.Linear):
                nn.init.constant_(m.bias, 0)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            y = F.relu(self.features(x))
        else:
            y = self._run_features(x)
        y = F.adaptive_avg_pool2d(y, (1, 1))
        y = torch.flatten(y, 1)
        return self.classifier(y)

    @torch.jit.unused
    def _run_features(self, x: Tensor) -> Tensor:
        if self.stock or isinstance(x, torch.fx.Proxy):
            # Not in place: what a hook on `features` was given stays as it was.
            return F.relu(self.features(x))
        x = to_channels_last(x)
        if type(self.features) is not nn.Sequential or watched(self.features):
            return F.relu(self.features(x))
        return _run_fused(x, list(self.features))


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or is_frozen(module)


def _run_fused(x: Tensor, modules: list[nn.Module]) -> Tensor:
    """The modules in their order and a ReLU; neighbours that are one call run as one."""
    last = len(modules) - 1
    i, relu_done = 0, False
    while i <= last:
        module, *rest = modules[i : i + 3]
        if isinstance(module, DenseBlock) and rest and (isinstance(rest[0], Transition) or i + 1 == last):
            x = run_dense_block(x, module, rest[0])
            relu_done = not isinstance(rest[0], Transition)
            i += 2
        elif isinstance(module, nn.Conv2d) and rest and _is_batch_norm(rest[0]):
            relu = len(rest) == 2 and not_plain_relu(rest[1]) is None
            x = fuse_modules_forward(x, module, rest[0], relu=relu)
            i += 2 + relu
        else:
            x = max_pool(module, x) if isinstance(module, nn.MaxPool2d) else module(x)
            i += 1
    return x if relu_done else F.relu(x)


def _densenet(
    name: str,
    growth_rate: int,
    block_config: tuple[int, ...],
    num_init_features: int,
    weights: Any,
    kwargs: dict[str, Any],
) -> DenseNet:
    """The model `name` of the paper's table 1."""
    fixed = {"growth_rate": growth_rate, "block_config": block_config, "num_init_features": num_init_features}
    return build(DenseNet, name, weights, kwargs, **fixed)


def _cifar(
    name: str, depth: int, growth_rate: int, bottleneck: bool, weights: Any, kwargs: dict[str, Any]
) -> DenseNet:
    """The model `name` of the paper's table 2: depth L counts the stem, three blocks' convolutions, two
    transitions and the classifier."""
    fixed = {
        "growth_rate": growth_rate,
        "block_config": ((depth - 4) // (6 if bottleneck else 3),) * 3,
        "num_init_features": 2 * growth_rate if bottleneck else 16,
        "bn_size": 4 if bottleneck else None,
        "compression": 0.5 if bottleneck else 1.0,
        "small_images": True,
    }
    return build(DenseNet, name, weights, kwargs, classes=10, **fixed)


def densenet121(
    *, weights: Mapping[str, Tensor] | str | None = None, progress: bool = True, **kwargs: Any
) -> DenseNet:
    """DenseNet-121, -BC with k = 32 (arXiv 1608.06993, table 1), torchvision's names and shapes.

    weights: path of a .pth, .pt or .safetensors file, or a state dict (gconv.models.read_weights says what
        is read), with names of either kind (gconv.models.remap_densenet_keys); nothing is downloaded.
    progress: accepted as in torchvision; without a download there is no progress to show.
    kwargs: the arguments of DenseNet. num_classes is read off the weights where it is not given.

    Raises ValueError where kwargs contradict the name, and what read_weights and load_weights raise.
    """
    return _densenet("densenet121", 32, (6, 12, 24, 16), 64, weights, kwargs)


def densenet161(
    *, weights: Mapping[str, Tensor] | str | None = None, progress: bool = True, **kwargs: Any
) -> DenseNet:
    """DenseNet-161, -BC with k = 48 (arXiv 1608.06993, figure 3); arguments as in densenet121."""
    return _densenet("densenet161", 48, (6, 12, 36, 24), 96, weights, kwargs)


def densenet169(
    *, weights: Mapping[str, Tensor] | str | None = None, progress: bool = True, **kwargs: Any
) -> DenseNet:
    """DenseNet-169, -BC with k = 32 (arXiv 1608.06993, table 1); arguments as in densenet121."""
    return _densenet("densenet169", 32, (6, 12, 32, 32), 64, weights, kwargs)


def densenet201(
    *, weights: Mapping[str, Tensor] | str | None = None, progress: bool = True, **kwargs: Any
) -> DenseNet:
    """DenseNet-201, -BC with k = 32 (arXiv 1608.06993, table 1); arguments as in densenet121."""
    return _densenet("densenet201", 32, (6, 12, 48, 32), 64, weights, kwargs)


def densenet40_k12(
    *, weights: Mapping[str, Tensor] | str | None = None, progress: bool = True, **kwargs: Any
) -> DenseNet:
    """DenseNet of L = 40, k = 12 for CIFAR (arXiv 1608.06993, table 2), 1.0 M parameters.

    [N, 3, 32, 32] -> [N, 10]: three blocks on a 3x3 stem of 16 channels, without bottlenecks or compression.
    Arguments as in densenet121, num_classes 10 where neither it nor weights are given. The paper trains with
    drop_rate=0.2 where it does not augment the images.
    """
    return _cifar("densenet40_k12", 40, 12, False, weights, kwargs)


def densenet100_k12(
    *, weights: Mapping[str, Tensor] | str | None = None, progress: bool = True, **kwargs: Any
) -> DenseNet:
    """DenseNet of L = 100, k = 12 (arXiv 1608.06993, table 2), 7.0 M parameters; as densenet40_k12."""
    return _cifar("densenet100_k12", 100, 12, False, weights, kwargs)


def densenet100_k24(
    *, weights: Mapping[str, Tensor] | str | None = None, progress: bool = True, **kwargs: Any
) -> DenseNet:
    """DenseNet of L = 100, k = 24 (arXiv 1608.06993, table 2), 27.2 M parameters; as densenet40_k12."""
    return _cifar("densenet100_k24", 100, 24, False, weights, kwargs)


def densenet_bc100_k12(
    *, weights: Mapping[str, Tensor] | str | None = None, progress: bool = True, **kwargs: Any
) -> DenseNet:
    """DenseNet-BC of L = 100, k = 12 for CIFAR (arXiv 1608.06993, table 2), 0.8 M parameters.

    [N, 3, 32, 32] -> [N, 10]: three blocks with bottlenecks on a 3x3 stem of 2k channels, transitions that
    halve the channels. Arguments as in densenet40_k12.
    """
    return _cifar("densenet_bc100_k12", 100, 12, True, weights, kwargs)


def densenet_bc250_k24(
    *, weights: Mapping[str, Tensor] | str | None = None, progress: bool = True, **kwargs: Any
) -> DenseNet:
    """DenseNet-BC of L = 250, k = 24 (arXiv 1608.06993, table 2), 15.3 M parameters.

    As densenet_bc100_k12.
    """
    return _cifar("densenet_bc250_k24", 250, 24, True, weights, kwargs)


def densenet_bc190_k40(
    *, weights: Mapping[str, Tensor] | str | None = None, progress: bool = True, **kwargs: Any
) -> DenseNet:
    """DenseNet-BC of L = 190, k = 40 (arXiv 1608.06993, table 2), 25.6 M parameters.

    As densenet_bc100_k12.
    """
    return _cifar("densenet_bc190_k40", 190, 40, True, weights, kwargs)
