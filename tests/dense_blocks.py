"""A dense block of torch's modules twice, stock and shared: what the tests of the dense block compare."""

import torch
import torch.nn.functional as F
from fused_checks import FrozenBatchNorm2d, clear_input, randomized_twins
from torch import nn

import gconv
from gconv import batch_norm, dense_stages, grouped_conv, pointwise_conv
from gconv import dense_block as dense_module
from gconv.functional import fuse_dense_block_forward


class Layer(nn.Module):
    """A layer's modules under torchvision's names; width None: without a bottleneck."""

    def __init__(self, channels, growth, width, norm, **three):
        super().__init__()
        self.norm1, self.norm2, self.conv2 = norm(channels), None, None
        last = nn.Conv2d(channels if width is None else width, growth, 3, bias=False, **three)
        self.conv1 = last if width is None else nn.Conv2d(channels, width, 1, bias=False)
        if width is not None:
            self.norm2, self.conv2 = norm(width), last

    def pairs(self):
        first = (self.conv1, self.norm1)
        return (first,) if self.conv2 is None else (first, (self.conv2, self.norm2))


class Block(nn.Module):
    """A dense block of torch's modules, called one by one or as a whole. end: None, "relu" for BN and ReLU,
    or the channels of a transition."""

    def __init__(
        self, channels, growth, layers, width=None, end=None, dropout=0.0, dilation=1, groups=1, frozen=False,
        memory="shared", **bn_options,
    ):  # fmt: skip
        super().__init__()

        def norm(features):
            return FrozenBatchNorm2d(features) if frozen else nn.BatchNorm2d(features, **bn_options)

        three = {"padding": dilation, "dilation": dilation, "groups": groups}
        self.channels, self.total = channels, channels + layers * growth
        self.layers = nn.ModuleList(
            Layer(channels + i * growth, growth, width, norm, **three) for i in range(layers)
        )
        self.norm = None if end is None else norm(self.total)
        self.conv = nn.Conv2d(self.total, end, 1, bias=False) if isinstance(end, int) else None
        self.inner, self.relu = nn.ReLU(), nn.ReLU() if end == "relu" else None
        self.dropout, self.memory, self.stock = dropout, memory, True

    def transition(self):
        return None if self.norm is None else (self.norm, self.conv)

    def all_pairs(self):
        """(convolution, the normalisation before it); at the end the convolution may be an nn.Identity."""
        end = [] if self.norm is None else [(nn.Identity() if self.conv is None else self.conv, self.norm)]
        return [pair for layer in self.layers for pair in layer.pairs()] + end

    def forward(self, x):
        if not self.stock:
            layers = [(m.norm1, m.conv1, m.norm2, m.conv2, self.dropout) for m in self.layers]
            return fuse_dense_block_forward(x, layers, self.transition(), self.memory)
        features = [x]
        for layer in self.layers:
            h = torch.cat(features, 1)
            for conv, norm in layer.pairs():
                h = conv(self.inner(norm(h)))
            features.append(F.dropout(h, self.dropout, self.training) if self.dropout > 0 else h)
        out = torch.cat(features, 1)
        if self.norm is None:
            return out
        if self.conv is None:
            return self.relu(self.norm(out))
        return F.avg_pool2d(self.conv(self.inner(self.norm(out))), 2)


def twins(key, *args, training=True, **kwargs):
    """(stock, ours) of the same state."""
    return randomized_twins(Block(*args, **kwargs).train(training), key)


def block_input(block, size, key, dtype=torch.float32):
    """An input whose values stay clear of the inner ReLUs' kinks."""
    return clear_input(block, block.channels, size, key, dtype)


def case_id(case):
    shape, options, _ = case
    return "-".join(map(str, (*shape, *(f"{name}={value}" for name, value in options.items()))))


def assert_shared(calls=1):
    assert gconv.backend.counts() == {"cpu.dense_block": calls}, gconv.backend.counts()


# (channels, growth, layers), options, input (N, H, W)
BLOCKS = (
    ((6, 4, 4), {"width": 16, "end": 11}, (4, 6, 8)),
    ((9, 5, 3), {"width": 7, "end": 10}, (2, 7, 9)),
    ((16, 12, 3), {"width": 48, "end": "relu"}, (2, 5, 6)),
    ((8, 32, 2), {"width": 64}, (1, 8, 7)),
    ((10, 6, 3), {}, (2, 6, 5)),
    ((24, 12, 2), {"end": 30}, (2, 9, 6)),
    ((12, 8, 3), {"width": 16, "groups": 4, "dilation": 2, "end": "relu"}, (2, 8, 7)),
    ((8, 6, 2), {"groups": 2, "dilation": 3, "end": 5}, (3, 6, 7)),
)  # fmt: skip
# Few values, so that inputs can be found that stay clear of the kinks at lower precision.
SMALL_BLOCKS = (
    ((4, 2, 2), {"width": 3, "end": 6}, (1, 4, 6)),
    ((4, 4, 2), {"width": 6, "end": "relu"}, (2, 3, 3)),
    ((4, 12, 2), {"width": 4}, (1, 3, 3)),
    ((4, 3, 2), {"end": 5}, (1, 5, 4)),
)


def reference_stages(monkeypatch):
    """Runs the stages, and what calls them, on references, so that they take float64."""
    for module, stem, names in (
        (pointwise_conv, "pointwise_conv", ("fwd", "fwd_stats", "bwd", "bwd_add")),
        (dense_stages, "grouped_conv", ("fwd_into", "bwd")),
        (dense_stages, "batch_norm", ("stats", "fold", "pool", "pool_bwd")),
        (dense_stages, "batch_norm", ("apply_into", "bwd_apply", "bwd_finish", "bwd_reduce")),
    ):
        source = {"grouped_conv": grouped_conv, "batch_norm": batch_norm}.get(stem, module)
        for name in names:
            monkeypatch.setattr(module, name, getattr(source, f"{stem}_{name}_ref"))
    monkeypatch.setattr(dense_module, "as_float", lambda vector: vector)
    decision = gconv.backend.Decision("cpu", "cpu.dense_block")
    monkeypatch.setattr(dense_module, "decide", lambda *args: decision)
