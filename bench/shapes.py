"""Named 3x3 layers of real models, with the operations and bytes that none of their implementations can
avoid."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["MODELS", "WIDTHS", "ConvShape", "PixelShape", "is_whole", "pixel_shapes", "select", "whose"]

# Floating-point operations of forward + backward in units of the forward: y, dx and dweight cost the same.
TRAINING_FLOPS = 3
# Activation-sized passes over memory of conv + BN + ReLU in training, (input-sized, output-sized), when the
# batch statistics force a barrier in the forward and the backward and nothing is read twice without need:
#   forward   read x, write y | read y, write z         (mean and variance of y are known only at the end)
#   backward  read dz, y | read dz, y, x, write dx      (dgamma and dbeta are known only at the end)
TRAINING_PASSES = (3, 7)


@dataclass(frozen=True)
class ConvShape:
    """One 3x3 convolution followed by batch norm and ReLU. Images are square; padding keeps the size at
    stride 1."""

    model: str
    layer: str
    in_channels: int
    out_channels: int
    groups: int
    size: int
    stride: int = 1
    count: int = 1  # how often the model runs it in one forward pass

    @property
    def padding(self) -> int:
        return 1

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - 3) // self.stride + 1

    @property
    def channels_per_group(self) -> int:
        return self.in_channels // self.groups

    @property
    def weights(self) -> int:
        return self.out_channels * self.channels_per_group * 9

    def flops(self, batch: int, mode: str) -> int:
        """Multiply-adds counted as two. Border pixels count in full, as everywhere else in the literature."""
        forward = 2 * batch * self.out_size**2 * self.weights
        return forward * (TRAINING_FLOPS if mode == "training" else 1)

    def bytes(self, batch: int, mode: str, itemsize: int) -> int:
        """Compulsory traffic: each operand once (inference), or once per side of a batch-wide barrier
        (training)."""
        x = batch * self.in_channels * self.size**2
        y = batch * self.out_channels * self.out_size**2
        if mode == "inference":
            return itemsize * (x + y + self.weights)
        x_passes, y_passes = TRAINING_PASSES
        return itemsize * (x_passes * x + y_passes * y + 3 * self.weights)


def _resnet_layers(
    model: str, groups: int, width_per_group: int, depths: tuple[int, ...], first: int = 56
) -> tuple[ConvShape, ...]:
    """The 3x3 layers of a bottleneck ResNet (arXiv 1512.03385, 1611.05431): "s2" is stage 2, "s2d" its
    strided one."""
    layers = []
    for stage, depth in enumerate(depths):
        width = int(64 * 2**stage * width_per_group / 64) * groups
        size = first >> stage
        if stage:
            layers.append(ConvShape(model, f"s{stage + 1}d", width, width, groups, size * 2, 2, 1))
        repeats = depth - (1 if stage else 0)
        if repeats:
            layers.append(ConvShape(model, f"s{stage + 1}", width, width, groups, size, 1, repeats))
    return tuple(layers)


def regnet_stages(
    depth: int, w_0: int, w_a: float, w_m: float, group_width: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths and depths of a RegNet's stages from its parameters (arXiv 2003.13678, equations 2 to 4)."""
    widths = []
    for j in range(depth):
        s_j = round(math.log((w_0 + w_a * j) / w_0) / math.log(w_m))
        widths.append(int(round(w_0 * w_m**s_j / 8) * 8))
    stages = sorted(set(widths))
    return tuple(_whole_groups(w, min(group_width, w)) for w in stages), tuple(
        widths.count(w) for w in stages
    )


def _whole_groups(width: int, group_width: int) -> int:
    """The nearest whole number of groups, halves upwards. (torchvision's models are never more than 10 %
    below `width`, which gives its RegNetY-8GF a wider first stage than the paper's.)"""
    return max(1, (width + group_width // 2) // group_width) * group_width


def _regnet_layers(
    model: str, depth: int, w_0: int, w_a: float, w_m: float, group_width: int
) -> tuple[ConvShape, ...]:
    """The 3x3 layers of the RegNet of these parameters: every stage, the first included, halves the 112x112
    images of the stem."""
    widths, depths = regnet_stages(depth, w_0, w_a, w_m, group_width)
    layers = []
    for stage, (width, repeats) in enumerate(zip(widths, depths)):
        groups = width // min(group_width, width)
        size = 112 >> stage
        layers.append(ConvShape(model, f"s{stage + 1}d", width, width, groups, size, 2, 1))
        if repeats > 1:
            layers.append(ConvShape(model, f"s{stage + 1}", width, width, groups, size // 2, 1, repeats - 1))
    return tuple(layers)


def _mobilenet_v2_layers() -> tuple[ConvShape, ...]:
    """The depthwise 3x3 layers of MobileNetV2 (arXiv 1801.04381, table 2): "d384" has 384 channels, "d192d"
    is strided. (There a ReLU6 follows, here a ReLU.)"""
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
              (6, 320, 1, 1))  # fmt: skip
    counts: dict[tuple[int, int, int], int] = {}
    channels, size = 32, 112
    for expansion, out_channels, repeats, first_stride in stages:
        for i in range(repeats):
            stride = first_stride if i == 0 else 1
            key = (expansion * channels, size, stride)
            counts[key] = counts.get(key, 0) + 1
            channels, size = out_channels, size // stride
    return tuple(
        ConvShape("mobilenet_v2", f"d{width}{'d' * (stride - 1)}", width, width, width, size, stride, count)
        for (width, size, stride), count in counts.items()
    )


MODELS: dict[str, tuple[ConvShape, ...]] = {
    "resnext50_32x4d": _resnet_layers("resnext50_32x4d", 32, 4, (3, 4, 6, 3)),
    "resnext101_32x8d": _resnet_layers("resnext101_32x8d", 32, 8, (3, 4, 23, 3)),
    "resnext101_64x4d": _resnet_layers("resnext101_64x4d", 64, 4, (3, 4, 23, 3)),
    # Between depthwise and ResNeXt's narrowest: the paper's template with 64 groups of base width 2.
    "resnext50_64x2d": _resnet_layers("resnext50_64x2d", 64, 2, (3, 4, 6, 3)),
    "resnet50": _resnet_layers("resnet50", 1, 64, (3, 4, 6, 3)),
    "regnet_x_400mf": _regnet_layers("regnet_x_400mf", 22, 24, 24.48, 2.54, 16),
    "regnet_x_3_2gf": _regnet_layers("regnet_x_3_2gf", 25, 88, 26.31, 2.25, 48),
    "regnet_y_400mf": _regnet_layers("regnet_y_400mf", 16, 48, 27.89, 2.09, 8),
    "regnet_y_1_6gf": _regnet_layers("regnet_y_1_6gf", 27, 48, 20.71, 2.65, 24),
    "regnet_y_4gf": _regnet_layers("regnet_y_4gf", 22, 96, 31.41, 2.24, 64),
    "regnet_y_8gf": _regnet_layers("regnet_y_8gf", 17, 192, 76.82, 2.19, 56),
    "regnet_y_16gf": _regnet_layers("regnet_y_16gf", 18, 200, 106.23, 2.48, 112),
    "mobilenet_v2": _mobilenet_v2_layers(),
}


# Channels per group that ResNeXt-50 has not, narrow to wide, each by a layer early in its network and the one
# that it has most of.
WIDTHS = "widths"
_WIDTHS = (
    ("mobilenet_v2", "d144"), ("mobilenet_v2", "d384"),  # 1
    ("resnext50_64x2d", "s1"), ("resnext50_64x2d", "s3"),  # 2
    ("resnext101_64x4d", "s1"), ("resnext101_64x4d", "s3"),  # 4 and 16, twice as many groups
    ("regnet_y_1_6gf", "s2"), ("regnet_y_1_6gf", "s3"),  # 24
    ("regnet_x_3_2gf", "s2"), ("regnet_x_3_2gf", "s3"),  # 48
    ("regnet_y_8gf", "s2"), ("regnet_y_8gf", "s3"),  # 56
    ("regnet_y_4gf", "s2"), ("regnet_y_4gf", "s3"),  # 64
    ("regnet_y_16gf", "s2"), ("regnet_y_16gf", "s3"),  # 112
)  # fmt: skip


@dataclass(frozen=True)
class PixelShape:
    """A 1x1 convolution next to the 3x3 layer `beside`, and its input as batch norm sees it."""

    model: str
    layer: str
    beside: str
    in_channels: int
    out_channels: int
    size: int
    stride: int = 1
    groups: int = 1

    @property
    def weights(self) -> int:
        return self.in_channels * self.out_channels


def pixel_shapes(model: str) -> tuple[PixelShape, ...]:
    """Of a bottleneck ResNet the 1x1 convolutions into and out of each stage's layers of stride 1, "s2a" and
    "s2c"; of others none."""
    if "res" not in model:
        return ()
    found = []
    for shape in MODELS.get(model, ()):
        if shape.stride == 1:
            outer = 256 << (int(shape.layer[1:]) - 1)
            ends = (("a", outer, shape.in_channels), ("c", shape.out_channels, outer))
            found += [
                PixelShape(model, shape.layer + end, shape.layer, i, o, shape.size) for end, i, o in ends
            ]
    return tuple(found)


def _find(model: str, layer: str) -> ConvShape:
    return next(shape for shape in MODELS[model] if shape.layer == layer)


def is_whole(shapes: Sequence[ConvShape]) -> bool:
    """Whether these are all layers of one model, so that their sum is a figure of that model."""
    return bool(shapes) and len(shapes) > 1 and tuple(shapes) == MODELS.get(shapes[0].model)


def whose(models: Iterable[str]) -> str:
    """Whose layers these are, from the models of all of them."""
    names = set(models)
    return names.pop() if len(names) == 1 else "layers of several networks"


def select(model: str, layers: str | None = None) -> tuple[ConvShape, ...]:
    """The layers of `model`, or those of them named in the comma-separated `layers`; the model "widths" has
    layers of several networks, named as in regnet_y_8gf.s3. ValueError names what exists."""
    if model == WIDTHS:
        shapes = {f"{model}.{layer}": _find(model, layer) for model, layer in _WIDTHS}
    elif model in MODELS:
        shapes = {shape.layer: shape for shape in MODELS[model]}
    else:
        raise ValueError(f"bench: model: want one of {', '.join(MODELS)} or {WIDTHS}, got {model!r}")
    if not layers:
        return tuple(shapes.values())
    names = [name.strip() for name in layers.split(",") if name.strip()]
    unknown = [name for name in names if name not in shapes]
    if unknown or not names:
        raise ValueError(f"bench: layers: want some of {', '.join(shapes)}, got {layers!r}")
    return tuple(shapes[name] for name in names)
