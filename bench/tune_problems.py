"""What the tiles of the Triton kernels are timed on (gconv.bench.tune): layers of networks, and the calls of
each op on them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import shapes

__all__ = ["LAYERS", "Layer", "Problem", "kernels_of", "names_of", "precision", "problems", "select"]

# (dtype, precision of a float32 product)
WAYS = (("bfloat16", "ieee"), ("float16", "ieee"), ("float32", "tf32"), ("float32", "ieee"))


# ------------------------------------------------------------------------------------------ layers


@dataclass(frozen=True)
class Layer(shapes.ConvShape):
    """A convolution of any kernel size, or the normalisation of its input channels. It has one `share`-th of
    the images: a small problem."""

    share: int = 1

    def __str__(self) -> str:
        return f"{self.model}.{self.layer}"


POINTWISE = (
    Layer("resnext50_32x4d", "s1.in", 256, 128, 1, 56),
    Layer("resnext50_32x4d", "s1.out", 128, 256, 1, 56),
    Layer("resnext50_32x4d", "s3.out", 512, 1024, 1, 14),
    Layer("resnext50_32x4d", "s1.first", 64, 128, 1, 56),
    Layer("resnext50_32x4d", "s1.few", 128, 256, 1, 56, share=64),
    Layer("resnet50", "s1.in", 256, 64, 1, 56),
    Layer("densenet121", "b1.l6", 224, 128, 1, 56),
    Layer("densenet121", "b3.l12", 608, 128, 1, 14),
    Layer("densenet121", "b4.l8", 736, 128, 1, 7),
    Layer("regnet_y_4gf", "s2.in", 192, 192, 1, 28),
    Layer("regnet_y_4gf", "s3.in", 512, 512, 1, 14),
)


def _of(shape: shapes.ConvShape) -> Layer:
    return Layer(**asdict(shape))


REGNETS = ("regnet_y_1_6gf", "regnet_y_4gf", "regnet_y_8gf", "regnet_y_16gf")
CONVOLUTIONS = (
    *map(_of, shapes.select("resnext50_32x4d")),
    *(_of(shape) for model in REGNETS for shape in shapes.select(model, "s2,s3")),
    Layer("densenet121", "b1.l6", 128, 32, 1, 56),
    Layer("densenet121", "b3.l12", 128, 32, 1, 14),
    Layer("unet", "first", 16, 32, 1, 112),
    Layer("unet", "wide", 16, 64, 1, 112),
    Layer("unet", "head", 40, 16, 1, 112),
    Layer("unet", "last", 32, 16, 1, 112),
)  # fmt: skip
NORMS = (
    Layer("resnext50_32x4d", "s1", 256, 256, 1, 56),
    Layer("resnext50_32x4d", "s3", 512, 512, 1, 14),
    Layer("densenet121", "t1", 256, 128, 1, 56),
    Layer("densenet121", "t2", 512, 256, 1, 28),
    Layer("densenet100_k12", "t1", 210, 105, 1, 32),  # no multiple of 8: loads are not vectors
)
LAYERS = {
    "pointwise_conv": POINTWISE,
    "grouped_conv": CONVOLUTIONS,
    "grouped_conv_wgrad": CONVOLUTIONS,
    "batch_norm": NORMS,
}


def names_of(text: str | None) -> set[str]:
    """Those in a comma-separated list."""
    return {name.strip() for name in (text or "").split(",") if name.strip()}


def select(stem: str, names: str | None) -> tuple[Layer, ...]:
    """The layers of a stem, or those of them named in the comma-separated `names`, as in s1 or
    resnext50_32x4d.s1."""
    wanted = names_of(names)
    return tuple(layer for layer in LAYERS[stem] if not wanted or wanted & {layer.layer, str(layer)})


# ------------------------------------------------------------------------------------------ problems


class Tensors:
    """Random tensors of one layer: channels_last activations and per-channel vectors."""

    def __init__(self, layer: Layer, dtype: torch.dtype, images: int, device: str):
        self.layer, self.dtype, self.device = layer, dtype, device
        self.images = max(1, images // layer.share)
        self.x_size = (self.images, layer.in_channels, layer.size, layer.size)
        self.y_size = (self.images, layer.out_channels, layer.out_size, layer.out_size)

    def activation(self, size: Sequence[int]) -> torch.Tensor:
        n, c, h, w = size
        flat = torch.randn(n, h, w, c, device=self.device, dtype=torch.float32).to(self.dtype)
        return flat.add_(0.5).permute(0, 3, 1, 2)

    def weight(self, taps: int) -> torch.Tensor:
        terms = self.layer.channels_per_group
        size = (self.layer.out_channels, terms, taps, taps)
        return (torch.randn(size, device=self.device) / (terms * taps * taps) ** 0.5).to(self.dtype)

    def vectors(self, rows: int, channels: int) -> torch.Tensor:
        return torch.rand(rows, channels, device=self.device) + 0.2


@dataclass(frozen=True)
class Problem:
    """A call of an op. `arguments(tensors)` makes its arguments, of which the one at `written` is changed."""

    stem: str
    op: str
    what: str
    layer: Layer
    dtype: str
    precision: str
    arguments: Callable[[Tensors], tuple]
    written: int | None = None

    def __str__(self) -> str:
        what = f" {self.what}" if self.what else ""
        return f"{self.op}{what} {self.layer} {self.dtype}"

    def make(self, images: int, device: str) -> tuple:
        return self.arguments(Tensors(self.layer, getattr(torch, self.dtype), images, device))

    def call(self, args: tuple) -> dict[str, torch.Tensor]:
        """Results by name, as the kernels compute them."""
        with precision(self.precision):
            return self._named(getattr(kernels_of(self.stem), self.op)(*args), args)

    def defined(self, args: tuple) -> dict[str, torch.Tensor]:
        """Results by the op's definition, in the arguments' dtypes."""
        stem = "grouped_conv" if self.stem == "grouped_conv_wgrad" else self.stem
        with precision(self.precision):
            return self._named(
                getattr(importlib.import_module(f"gconv.{stem}"), f"{self.op}_ref")(*args), args
            )

    def exact(self, args: tuple) -> dict[str, torch.Tensor]:
        """Results by the op's definition, in float64 or, of 16-bit types, in float32."""
        dtype = torch.float64 if self.dtype == "float32" else torch.float32
        return self.defined(tuple(arg.to(dtype) if isinstance(arg, torch.Tensor) else arg for arg in args))

    def _named(self, results: Any, args: tuple) -> dict[str, torch.Tensor]:
        results = [results] if isinstance(results, torch.Tensor) else list(results or ())
        results += [] if self.written is None else [args[self.written]]
        return {str(i): t for i, t in enumerate(results) if t.numel() > 0}

    def apart(self, args: tuple) -> tuple:
        """The arguments, what is changed a copy."""
        return tuple(arg.clone() if i == self.written else arg for i, arg in enumerate(args))


def kernels_of(stem: str):
    """The module of gconv.kernels."""
    return importlib.import_module(f"gconv.kernels.{stem}")


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """What float32 convolutions compute in: the setting that the kernels read."""
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, name
    try:
        yield
    finally:
        conv.fp32_precision = before


def _pointwise_calls(layer: Layer):
    stride = [layer.stride, layer.stride]

    def forward(t):
        return t.activation(t.x_size), t.weight(1), stride, t.vectors(2, layer.in_channels)

    def gradient(t, finish):
        dy, x, w = t.activation(t.y_size), t.activation(t.x_size), t.weight(1)
        y, table = (t.activation(t.y_size), t.vectors(6, layer.out_channels)) if finish else (None, None)
        return dy, x, w, stride, y, table, t.vectors(4, layer.in_channels)

    yield "pointwise_conv_fwd_stats", "", forward, None
    for finish in (False, True):
        what = "finish" if finish else ""
        for name, wanted in (("dx", (True, False)), ("dweight", (False, True))):
            yield (
                "pointwise_conv_bwd", f"{name} {what}".rstrip(),
                lambda t, f=finish, wanted=wanted: (*gradient(t, f), None, *wanted, False), None,
            )  # fmt: skip
        yield (
            "pointwise_conv_bwd_add", what,
            lambda t, f=finish: (*gradient(t, f), t.activation(t.x_size), False, False), 7,
        )  # fmt: skip


def _geometry(layer: Layer) -> tuple:
    return [layer.stride] * 2, [1, 1], [1, 1], layer.groups


def _grouped_calls(layer: Layer):
    geometry = _geometry(layer)

    def forward(t):
        return t.activation(t.x_size), t.weight(3), *geometry, t.vectors(2, layer.in_channels)

    def backward(t, finish):
        gradient = (t.activation(t.y_size), t.vectors(6, layer.out_channels)) if finish else (None, None)
        masked_by = t.activation(t.x_size), t.vectors(4, layer.in_channels)
        return t.activation(t.y_size), t.weight(3), list(t.x_size), *geometry, *gradient, *masked_by

    yield "grouped_conv_fwd_stats", "", forward, None
    yield "grouped_conv_bwd_input", "finish", lambda t: backward(t, True), None
    yield "grouped_conv_bwd_input", "", lambda t: backward(t, False), None


def _wgrad_calls(layer: Layer):
    def arguments(t):
        gradient = t.activation(t.y_size), t.vectors(6, layer.out_channels)
        activations = t.activation(t.y_size), t.activation(t.x_size)
        act = t.vectors(2, layer.in_channels)
        return *activations, list(t.weight(3).shape), *_geometry(layer), *gradient, act

    yield "grouped_conv_bwd_weight", "finish", arguments, None


def _norm_calls(layer: Layer):
    c = layer.in_channels

    def x(t):
        return t.activation(t.x_size)

    def pooled(t):
        return t.activation((t.images, c, layer.size // 2, layer.size // 2))

    def reduced(t):
        return x(t), x(t), *t.vectors(3, c).unbind(0), t.vectors(2, c), None, False

    yield "batch_norm_apply", "residual", lambda t: (x(t), t.vectors(2, c), x(t), None, True), None
    yield "batch_norm_bwd_apply", "", lambda t: (x(t), x(t), t.vectors(6, c), None, False), None
    yield "batch_norm_stats", "", lambda t: (x(t),), None
    yield "batch_norm_bwd_reduce", "", reduced, None
    yield "batch_norm_pool", "", lambda t: (x(t), t.vectors(2, c)), None
    yield "batch_norm_pool_bwd", "", lambda t: (pooled(t), x(t), t.vectors(4, c), True, x(t)), 4


CALLS = {
    "pointwise_conv": _pointwise_calls,
    "grouped_conv": _grouped_calls,
    "grouped_conv_wgrad": _wgrad_calls,
    "batch_norm": _norm_calls,
}


def problems(stem: str, layers: Sequence[Layer]) -> list[Problem]:
    """Every op of the stem on every layer, in every dtype."""
    ways = [way for way in WAYS if stem != "batch_norm" or way[1] == "ieee"]
    return [
        Problem(stem, op, what, layer, *way, arguments, written)
        for way in ways
        for layer in layers
        for op, what, arguments, written in CALLS[stem](layer)
    ]
