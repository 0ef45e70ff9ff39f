"""Figure 3 of Xie et al. 2017, arXiv 1611.05431: the three forms of a ResNeXt block are one function.

(a) a sum of branches, (b) branches concatenated before a common 1x1 convolution, (c) a grouped convolution.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from model_checks import lively
from torch import nn

import gconv
from gconv import models


@pytest.fixture(autouse=True)
def _kernels_only(ops):
    """A fallback where our kernels should run is an error in every test here."""
    with gconv.set_policy("error"):
        yield


class Branches(nn.Module):
    """Figure 3(a): the sum of `groups` small bottlenecks, then batch norm (section 4 of the paper)."""

    def __init__(self, block):
        super().__init__()
        conv1, conv2, conv3 = block.conv1, block.conv2, block.conv3
        width = conv2.out_channels // conv2.groups
        self.reduce, self.transform = nn.ModuleList(), nn.ModuleList()
        self.expand = []
        for i in range(conv2.groups):
            part = slice(i * width, (i + 1) * width)
            self.reduce.append(layer_of(conv1.weight[part], block.bn1, part))
            self.transform.append(layer_of(conv2.weight[part], block.bn2, part, conv2.stride, conv2.padding))
            self.expand.append(conv3.weight[:, part])
        self.bn, self.downsample = block.bn3, block.downsample

    def parts(self, x):
        return [transform(reduce(x)) for reduce, transform in zip(self.reduce, self.transform)]

    def tail(self, y, x):
        return F.relu(self.bn(y) + (x if self.downsample is None else self.downsample(x)))

    def forward(self, x):
        return self.tail(sum(F.conv2d(part, weight) for part, weight in zip(self.parts(x), self.expand)), x)


class Concatenation(Branches):
    """Figure 3(b): the branches' 3x3 outputs are concatenated before one common 1x1 convolution."""

    def forward(self, x):
        return self.tail(F.conv2d(torch.cat(self.parts(x), 1), torch.cat(self.expand, 1)), x)


def layer_of(weight, bn, part, stride=(1, 1), padding=(0, 0)):
    """One branch's convolution, batch norm and ReLU as a gconv layer: a slice of the grouped block."""
    k, c, *kernel = weight.shape
    layer = gconv.ConvBNReLU(c, k, kernel, stride, padding, momentum=bn.momentum, eps=bn.eps)
    state = {"conv.weight": weight, "bn.num_batches_tracked": bn.num_batches_tracked}
    for name in ("weight", "bias", "running_mean", "running_var"):
        state[f"bn.{name}"] = getattr(bn, name)[part]
    layer.load_state_dict(state)
    return layer.to(weight.dtype).train(bn.training)


def three_forms(block):
    return block, Branches(copy.deepcopy(block)), Concatenation(copy.deepcopy(block))


def figure_3_block(stride=1, inplanes=256):
    downsample = None
    if stride != 1 or inplanes != 256:
        downsample = nn.Sequential(nn.Conv2d(inplanes, 256, 1, stride, bias=False), nn.BatchNorm2d(256))
    return models.Bottleneck(inplanes, 64, stride, downsample, groups=32, base_width=4)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("stride, inplanes", [(1, 256), (2, 128)])
def test_three_forms_of_a_resnext_block_agree(training, stride, inplanes):
    torch.manual_seed(0)
    x = torch.randn(4, inplanes, 9, 8)
    block = lively(figure_3_block(stride, inplanes), x).train(training)
    dy = None
    results = []
    for form in three_forms(block):
        image = x.clone().requires_grad_()
        y = form(image)
        dy = torch.randn_like(y) if dy is None else dy
        y.backward(dy)
        results.append((y.detach(), image.grad))
    exact_image = x.double().requires_grad_()
    stock = copy.deepcopy(block).double()
    with gconv.set_policy("silent"), gconv.use_backend("torch"):
        stock(exact_image).backward(dy.double())
    scale = exact_image.grad.abs().max()
    for name, (y, dx) in zip("bc", results[1:]):
        torch.testing.assert_close(
            y, results[0][0], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"3({n}): {text}"
        )
        torch.testing.assert_close(dx / scale, results[0][1] / scale, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(results[0][1].double() / scale, exact_image.grad / scale, rtol=1e-4, atol=2e-5)


def test_three_forms_agree_exactly_on_integers():
    """With whole numbers and batch norms that change nothing every sum is exact: not one bit may differ."""
    torch.manual_seed(0)
    block = figure_3_block().eval()
    for bn in (block.bn1, block.bn2, block.bn3):
        bn.eps = 0.0
    for conv in (block.conv1, block.conv2, block.conv3):
        conv.weight.data = torch.randint(-1, 2, conv.weight.shape).float()
    x = torch.randint(-2, 3, (2, 256, 7, 6)).float()
    with torch.no_grad():
        grouped, branches, concatenation = (form(x) for form in three_forms(block))
        stock = copy.deepcopy(block)
        stock.stock, stock.conv2.__class__ = True, nn.Conv2d
        want = stock(x)
    assert want.abs().max() < 2**24 and want.unique().numel() > 100
    for y in (grouped, branches, concatenation):
        assert torch.equal(y, want)
