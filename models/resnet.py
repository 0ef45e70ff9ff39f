"""ResNet, ResNeXt and Wide ResNet on gconv's layers.

Sources: He et al. 2015, "Deep residual learning for image recognition", arXiv 1512.03385 (ResNet, table 1);
Xie et al. 2017, "Aggregated residual transformations for deep neural networks", arXiv 1611.05431 (ResNeXt,
table 1 and figure 3); Zagoruyko and Komodakis 2016, "Wide residual networks", arXiv 1605.07146. As in
torchvision the stride of a bottleneck sits on its 3x3 convolution ("ResNet v1.5").

Names, shapes and order of parameters and buffers, and the use of the random generator while they are
initialised, are torchvision's: the same seed gives the same weights and checkpoints go both ways. What
differs is the forward pass: a bottleneck runs as one chain
(`gconv.bottleneck_modules.fuse_bottleneck_forward`), and elsewhere convolution, batch norm, residual and
ReLU as one call (`gconv.conv_bn_relu.fuse_modules_forward`).
For the backward the max pooling keeps less than torch's (`gconv.max_pool`).
The 3x3 convolutions are gconv.Conv2d; the 1x1 ones and the 7x7 stem are nn.Conv2d.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gconv import backend
from gconv.bottleneck_modules import fuse_bottleneck_forward
from gconv.conv_bn_relu import fuse_modules_forward, not_plain_relu, watched
from gconv.layers import Conv2d
from gconv.max_pool import max_pool

from .common import build, to_channels_last

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "resnext_digits",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


def conv3x3(
    in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1, stock: bool = False
) -> nn.Conv2d:
    """3x3 convolution that keeps the size at stride 1; nn.Conv2d where `stock`, gconv.Conv2d otherwise."""
    conv = nn.Conv2d if stock else Conv2d
    return conv(
        in_planes,
        out_planes,
        kernel_size=3,
        stride=stride,
        padding=dilation,
        dilation=dilation,
        groups=groups,
        bias=False,
    )


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution."""
    return nn.Conv2d(in_planes, out_planes, kernel_size=1, stride=stride, bias=False)


def _calls_modules(owner: nn.Module, x: Tensor) -> bool:
    """True where the children of `owner` must be called one by one instead of fused.

    So it is in a stock model, under torch.fx tracing (the graph then has torchvision's nodes), and where
    `relu` is no longer a bare nn.ReLU: a hook on it must fire, another activation put in its place must be
    the one that runs. The last is shown by gconv.trace.
    """
    if owner.stock or isinstance(x, torch.fx.Proxy):
        return True
    reason = not_plain_relu(owner.relu)
    if reason is None:
        return False
    backend.record(backend.one_by_one(f"relu: {reason}"), type(owner).__name__, x)
    return True


def _projection(downsample: nn.Module | None) -> tuple | None:
    """(conv, bn) of a shortcut that is nothing else and that nobody watches, or None."""
    if type(downsample) is nn.Sequential and len(downsample) == 2 and watched(downsample) is None:
        conv, bn = downsample
        if isinstance(conv, nn.Conv2d):
            return conv, bn
    return None


def _shortcut(downsample: nn.Module | None, x: Tensor) -> Tensor:
    """The identity branch: x itself, or 1x1 convolution and batch norm without ReLU."""
    if downsample is None:
        return x
    projection = _projection(downsample)
    return downsample(x) if projection is None else fuse_modules_forward(x, *projection, relu=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., figure 5 left).

    [N, inplanes, H, W] -> [N, planes, ceil(H / stride), ceil(W / stride)].
    Arguments as in torchvision; `stock=True` builds and runs it from torch.nn alone.
    Raises ValueError for groups or base_width, NotImplementedError for dilation > 1, as torchvision does.
    """

    expansion: int = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        stock: bool = False,
    ) -> None:
        super().__init__()
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError(
                "BasicBlock: groups, base_width: want groups = 1 and base_width = 64, "
                f"got groups = {groups}, base_width = {base_width}"
            )
        if dilation > 1:
            raise NotImplementedError(f"BasicBlock: want dilation = 1, got {dilation}")
        self.conv1 = conv3x3(inplanes, planes, stride, stock=stock)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes, stock=stock)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride
        self.stock = stock

    def forward(self, x: Tensor) -> Tensor:
        if _calls_modules(self, x):
            return self._forward_modules(x)
        out = fuse_modules_forward(x, self.conv1, self.bn1)
        return fuse_modules_forward(out, self.conv2, self.bn2, residual=_shortcut(self.downsample, x))

    def _forward_modules(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3 (grouped) and 1x1 convolutions and a shortcut.

    [N, inplanes, H, W] -> [N, 4 * planes, ceil(H / stride), ceil(W / stride)].
    He et al., figure 5 right; with groups > 1 it is the ResNeXt block, Xie et al., figure 3(c). The 3x3
    convolution has int(planes * base_width / 64) channels per group. Arguments as in torchvision;
    `stock=True` builds and runs it from torch.nn alone.
    """

    expansion: int = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        stock: bool = False,
    ) -> None:
        super().__init__()
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation, stock=stock)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride
        self.stock = stock

    def forward(self, x: Tensor) -> Tensor:
        if _calls_modules(self, x):
            return self._forward_modules(x)
        layers = ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3))
        projection = _projection(self.downsample)
        other = projection is None and self.downsample is not None
        return fuse_bottleneck_forward(x, layers, projection, self.downsample(x) if other else None)

    def _forward_modules(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet of any of the kinds above: images [N, in_channels, H, W] -> logits [N, num_classes].

    Images of either memory format are taken to channels_last once and stay so: what a hook on a stage sees
    has torchvision's values in channels_last strides. (A stock model keeps the format of the images.)

    The arguments up to `norm_layer` are torchvision's. The rest, by keyword:
        in_channels: channels of the images.
        small_images: for images of about 32x32: a 3x3 stem of stride 1 and no max pooling (the module
            `maxpool` is nn.Identity), instead of the 7x7 stem and the max pooling, both of stride 2.
        stem_channels, planes: width of the stem, and of each stage before `block.expansion`. There are
            len(layers) stages, named layer1, layer2, ...; all but the first halve the image.
        stock: build it from torch.nn alone and call its modules one by one, as torchvision does. Same
            names, same weights for the same seed: the thing to compare with.

    Raises ValueError where the lengths of layers, planes and replace_stride_with_dilation do not agree.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        in_channels: int = 3,
        small_images: bool = False,
        stem_channels: int = 64,
        planes: Sequence[int] = (64, 128, 256, 512),
        stock: bool = False,
    ) -> None:
        super().__init__()
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        if not layers or len(layers) > len(planes):
            raise ValueError(
                f"ResNet: layers: want 1 to len(planes) = {len(planes)} stages, got {list(layers)}"
            )
        if replace_stride_with_dilation is None:
            replace_stride_with_dilation = [False] * (len(layers) - 1)
        if len(replace_stride_with_dilation) != len(layers) - 1:
            raise ValueError(
                f"ResNet: replace_stride_with_dilation: want None or {len(layers) - 1} elements, "
                f"one for each stage after the first, got {replace_stride_with_dilation}"
            )
        self._norm_layer = norm_layer
        self.stock = stock
        self.inplanes = stem_channels
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        if small_images:
            self.conv1 = conv3x3(in_channels, self.inplanes, stock=stock)
        else:
            self.conv1 = nn.Conv2d(in_channels, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        dilate = [False, *replace_stride_with_dilation]
        for i, blocks in enumerate(layers):
            stage = self._make_layer(block, planes[i], blocks, stride=1 if i == 0 else 2, dilate=dilate[i])
            self.add_module(f"layer{i + 1}", stage)
        self.num_stages = len(layers)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)

        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.constant_(m.weight, 1)
                nn.init.constant_(m.bias, 0)
        # A residual branch that starts at zero makes each block the identity
        # (Goyal et al. 2017, arXiv 1706.02677, section 5.1).
        if zero_init_residual:
            for m in self.modules():
                last_bn = m.bn3 if isinstance(m, Bottleneck) else m.bn2 if isinstance(m, BasicBlock) else None
                if last_bn is not None and last_bn.weight is not None:
                    nn.init.constant_(last_bn.weight, 0)

    def _make_layer(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        norm_layer = self._norm_layer
        # Passed only where set, so that a block written for torchvision's signature can be used.
        stock = {"stock": True} if self.stock else {}
        downsample = None
        previous_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        if stride != 1 or self.inplanes != planes * block.expansion:
            downsample = nn.Sequential(
                conv1x1(self.inplanes, planes * block.expansion, stride),
                norm_layer(planes * block.expansion),
            )
        layers = [
            block(
                self.inplanes,
                planes,
                stride,
                downsample,
                self.groups,
                self.base_width,
                previous_dilation,
                norm_layer,
                **stock,
            )
        ]
        self.inplanes = planes * block.expansion
        for _ in range(1, blocks):
            layers.append(
                block(
                    self.inplanes,
                    planes,
                    groups=self.groups,
                    base_width=self.base_width,
                    dilation=self.dilation,
                    norm_layer=norm_layer,
                    **stock,
                )
            )
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if _calls_modules(self, x):
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        else:
            x = max_pool(self.maxpool, fuse_modules_forward(to_channels_last(x), self.conv1, self.bn1))
        for i in range(self.num_stages):
            x = getattr(self, f"layer{i + 1}")(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


def _resnet(
    name: str, block: type, layers: Sequence[int], weights: Any, kwargs: dict, **fixed: Any
) -> ResNet:
    """The model `name`; `fixed` are the arguments of ResNet that its name stands for."""
    return build(ResNet, name, weights, kwargs, block=block, layers=layers, **fixed)


def resnet18(
    *, weights: Mapping[str, Tensor] | str | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNet-18 (arXiv 1512.03385, table 1), torchvision's names and shapes.

    weights: path of a .pth, .pt or .safetensors file, or a state dict (gconv.models.read_weights says what
        is read); nothing is downloaded.
    progress: accepted as in torchvision; without a download there is no progress to show.
    kwargs: the arguments of ResNet. num_classes is read off the weights where it is not given.

    Raises ValueError where kwargs contradict the name, and what read_weights and load_weights raise.
    """
    return _resnet("resnet18", BasicBlock, [2, 2, 2, 2], weights, kwargs)


def resnet34(
    *, weights: Mapping[str, Tensor] | str | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNet-34 (arXiv 1512.03385, table 1); arguments as in resnet18."""
    return _resnet("resnet34", BasicBlock, [3, 4, 6, 3], weights, kwargs)


def resnet50(
    *, weights: Mapping[str, Tensor] | str | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNet-50 (arXiv 1512.03385, table 1), stride on the 3x3 convolutions; arguments as in resnet18."""
    return _resnet("resnet50", Bottleneck, [3, 4, 6, 3], weights, kwargs)


def resnet101(
    *, weights: Mapping[str, Tensor] | str | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNet-101 (arXiv 1512.03385, table 1), stride on the 3x3 convolutions; arguments as in resnet18."""
    return _resnet("resnet101", Bottleneck, [3, 4, 23, 3], weights, kwargs)


def resnet152(
    *, weights: Mapping[str, Tensor] | str | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNet-152 (arXiv 1512.03385, table 1), stride on the 3x3 convolutions; arguments as in resnet18."""
    return _resnet("resnet152", Bottleneck, [3, 8, 36, 3], weights, kwargs)


def resnext50_32x4d(
    *, weights: Mapping[str, Tensor] | str | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNeXt-50, 32 groups 4 wide (arXiv 1611.05431, table 1); arguments as in resnet18."""
    return _resnet("resnext50_32x4d", Bottleneck, [3, 4, 6, 3], weights, kwargs, groups=32, width_per_group=4)


def resnext101_32x8d(
    *, weights: Mapping[str, Tensor] | str | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNeXt-101, 32 groups 8 wide (arXiv 1611.05431); arguments as in resnet18."""
    return _resnet(
        "resnext101_32x8d", Bottleneck, [3, 4, 23, 3], weights, kwargs, groups=32, width_per_group=8
    )


def resnext101_64x4d(
    *, weights: Mapping[str, Tensor] | str | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNeXt-101, 64 groups 4 wide (arXiv 1611.05431, table 4); arguments as in resnet18."""
    return _resnet(
        "resnext101_64x4d", Bottleneck, [3, 4, 23, 3], weights, kwargs, groups=64, width_per_group=4
    )


def wide_resnet50_2(
    *, weights: Mapping[str, Tensor] | str | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNet-50 with 3x3 convolutions twice as wide (arXiv 1605.07146); arguments as in resnet18."""
    return _resnet("wide_resnet50_2", Bottleneck, [3, 4, 6, 3], weights, kwargs, width_per_group=128)


def wide_resnet101_2(
    *, weights: Mapping[str, Tensor] | str | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNet-101 with 3x3 convolutions twice as wide (arXiv 1605.07146); arguments as in resnet18."""
    return _resnet("wide_resnet101_2", Bottleneck, [3, 4, 23, 3], weights, kwargs, width_per_group=128)


def resnext_digits(
    *, weights: Mapping[str, Tensor] | str | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """A ResNeXt of 62,746 parameters for one-channel images of about 32x32 and ten classes.

    [N, 1, H, W] -> [N, 10]. Stages of 1, 2 and 2 bottlenecks with 8 groups of 2, 4 and 8 channels, on a 3x3
    stem of 16 channels (the form of arXiv 1611.05431, section 5.3, made small). Arguments as in resnet18;
    in_channels=3 takes colour images, stock=True builds the equal model from torch.nn alone (same weights for
    the same seed).

    A recipe for scikit-learn's 1,797 digits at 32x32 (gconv.bench.digits): zero_init_residual=True, 8 epochs
    of AdamW with weight decay 0.05 on batches of 32, the learning rate rising to 0.005 over the first tenth
    of the steps and then falling linearly to 0: 98.9, 99.1 and 98.9 % of the test digits with seeds 0, 1, 2.
    """
    kwargs = {"num_classes": 10, "in_channels": 1, "small_images": True, "stem_channels": 16, **kwargs}
    kwargs.setdefault("planes", (8, 16, 32))
    return _resnet("resnext_digits", Bottleneck, [1, 2, 2], weights, kwargs, groups=8, width_per_group=16)
