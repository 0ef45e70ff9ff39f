"""One block twice, ours and stock, with the same parameters: what the tests of autograd compare."""

import copy

import torch
from torch import nn

from gconv.functional import conv_bn_relu

STRIDE, PADDING, DILATION, GROUPS = (2, 1), (1, 2), (1, 2), 2
GEOMETRY = (STRIDE, PADDING, DILATION, GROUPS)
INPUT, WEIGHT, OUTPUT = (2, 4, 6, 5), (6, 2, 3, 3), (2, 6, 3, 5)


def values(*shape, seed=0, dtype=torch.float32, positive=False):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)
    return (t.abs() + 0.5 if positive else t).to(dtype)


def close(actual, want, tolerance=2e-5, label=""):
    """Within `tolerance` of the largest wanted value, which must not be zero everywhere."""
    assert actual.shape == want.shape and actual.dtype == want.dtype, label
    scale = want.abs().max().item()
    assert scale > 0, f"{label}: a wanted value of zeros proves nothing"
    error = (actual - want).abs().max().item()
    assert error <= tolerance * scale, f"{label}: error {error:.2e}, largest value {scale:.2e}"


class Block(nn.Module):
    """relu?(bn(conv(x)) + residual), ours or stock."""

    def __init__(self, bias=False, relu=True, stock=False, **norm):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, STRIDE, PADDING, DILATION, GROUPS, bias)
        self.bn = nn.BatchNorm2d(6, **norm)
        self.relu, self.stock = relu, stock
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(values(*p.shape, seed=i))
            if self.bn.running_mean is not None:
                self.bn.running_mean.copy_(values(6, seed=8))
                self.bn.running_var.copy_(values(6, seed=9, positive=True))

    def forward(self, x, residual=None):
        if not self.stock:
            conv = self.conv
            return conv_bn_relu(
                x, conv.weight, self.bn, conv.bias, STRIDE, PADDING, DILATION, GROUPS, residual, self.relu
            )
        y = self.bn(self.conv(x))
        y = y if residual is None else y + residual
        return torch.relu(y) if self.relu else y


def twins(**arguments):
    ours = Block(**arguments)
    stock = copy.deepcopy(ours)
    stock.stock = True
    return ours, stock
