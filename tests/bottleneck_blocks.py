"""A bottleneck of torch's modules twice, stock and as a chain: what the tests of the chain compare."""

import torch
from fused_checks import FrozenBatchNorm2d, clear_input, randomized_twins
from torch import nn

import gconv
from gconv.functional import fuse_bottleneck_forward


class Block(nn.Module):
    """A bottleneck of torch's modules, called one by one or as a chain."""

    def __init__(self, channels, groups=1, stride=1, dilation=1, down=False, frozen=(), **bn_options):
        super().__init__()
        c, a, b, k = channels

        def norm(name, width):
            return FrozenBatchNorm2d(width) if name in frozen else nn.BatchNorm2d(width, **bn_options)

        middle = {"padding": dilation, "dilation": dilation, "groups": groups, "bias": False}
        self.conv1, self.bn1 = nn.Conv2d(c, a, 1, bias=False), norm("bn1", a)
        self.conv2, self.bn2 = nn.Conv2d(a, b, 3, stride, **middle), norm("bn2", b)
        self.conv3, self.bn3 = nn.Conv2d(b, k, 1, bias=False), norm("bn3", k)
        self.inner, self.relu = nn.ReLU(), nn.ReLU()
        self.downsample = None
        if down:
            self.downsample = nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), norm("downsample", k))
        self.stock = True

    def pairs(self):
        return (self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)

    def all_pairs(self):
        return (*self.pairs(), *([] if self.downsample is None else [tuple(self.downsample)]))

    def forward(self, x, residual=None):
        if not self.stock:
            down = None if self.downsample is None or residual is not None else tuple(self.downsample)
            return fuse_bottleneck_forward(x, self.pairs(), down, residual)
        h = self.inner(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.inner(self.bn2(self.conv2(h)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(y + (shortcut if residual is None else residual))


def twins(key, *args, training=True, **kwargs):
    """(stock, ours) of the same state."""
    return randomized_twins(Block(*args, **kwargs).train(training), key)


def block_input(block, size, key, dtype=torch.float32):
    """An input whose values stay clear of the inner ReLUs' kinks."""
    return clear_input(block, block.conv1.in_channels, size, key, dtype)


def assert_chained(calls=1):
    assert gconv.backend.counts() == {"cpu.bottleneck": calls}, gconv.backend.counts()


# channels (in, first, middle, out), options, input (N, H, W)
BLOCKS = (
    ((16, 8, 8, 16), {"groups": 1}, (2, 7, 9)),
    ((24, 16, 16, 24), {"groups": 8}, (2, 9, 6)),
    ((64, 64, 64, 64), {"groups": 32}, (1, 8, 8)),
    ((16, 32, 32, 48), {"groups": 32, "stride": 2, "down": True}, (2, 11, 8)),
    ((17, 12, 20, 33), {"groups": 4, "stride": 2, "down": True}, (1, 13, 7)),
    ((12, 10, 15, 20), {"groups": 5, "down": True}, (3, 5, 6)),
    ((20, 16, 16, 20), {"groups": 8, "dilation": 2}, (2, 9, 10)),
    ((8, 64, 64, 24), {"groups": 2, "dilation": 3, "stride": 2, "down": True}, (2, 14, 9)),
)  # fmt: skip
# Few values, so that inputs can be found that stay clear of the kinks at lower precision.
SMALL_BLOCKS = (
    ((8, 4, 4, 8), {"groups": 1}, (1, 4, 4)),
    ((9, 4, 4, 9), {"groups": 2}, (1, 4, 5)),
    ((6, 4, 4, 10), {"groups": 4, "stride": 2, "down": True}, (2, 4, 3)),
    ((5, 3, 6, 7), {"groups": 3, "dilation": 2, "down": True}, (1, 4, 4)),
)
