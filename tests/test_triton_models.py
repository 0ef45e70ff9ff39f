"""Fused operations and a training step on the kernels for GPUs, forward and backward, against torch's own.

All tiny: they run in Triton's interpreter, and on a GPU under compute-sanitizer.
"""

import copy
import importlib

import bottleneck_blocks
import pytest
import torch
import torch.nn.functional as F
import twins
from fused_checks import compare, compare_draws, randomize
from model_checks import assert_as_good, lively, training_step
from torch import nn
from triton_cases import DTYPES, on_device

import gconv
from gconv import backend, gpu, models

modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def kernel(op):
    """The name of the kernels that have to run an op with a 3x3 convolution."""
    return f"{backend.backend_mode()}.{op}"


def assert_ran(op):
    """The kernels of this op ran, and no other."""
    assert set(backend.counts()) == {kernel(op)}, backend.counts()


@modes
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_conv_bn_relu(gpu_backend, training, residual):
    """Groups, strides, paddings and dilations that differ between rows and columns."""
    ours, stock = twins.twins()
    ours, stock = on_device(ours.train(training), gpu_backend), stock.train(training)
    x = twins.values(*twins.INPUT).requires_grad_()
    r = twins.values(*twins.OUTPUT, seed=3).requires_grad_() if residual else None
    compare(stock, ours, x, r, key=("gpu", training, residual))
    assert_ran("conv_bn_relu")


@modes
@pytest.mark.parametrize("case", bottleneck_blocks.SMALL_BLOCKS[1:3], ids=lambda c: "-".join(map(str, c[0])))
def test_bottleneck(gpu_backend, case, training):
    channels, options, size = case
    stock, ours = bottleneck_blocks.twins(str(case), channels, training=training, **options)
    x = bottleneck_blocks.block_input(stock, size, str(case))
    compare(stock, on_device(ours, gpu_backend), x, None, key=str(case))
    assert_ran("bottleneck")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_bottleneck_in_low_precision(gpu_backend, dtype):
    case = bottleneck_blocks.SMALL_BLOCKS[1]
    draws = []
    for draw in range(3):
        key = (str(case), draw)
        stock, ours = bottleneck_blocks.twins(key, case[0], **case[1])
        x = bottleneck_blocks.block_input(stock, case[2], key, dtype)
        draws.append((stock.to(dtype), on_device(ours.to(dtype), gpu_backend), x))
    compare_draws(draws, dtype)
    assert_ran("bottleneck")


class Dense(nn.Module):
    """A dense block with bottlenecks and a transition, of torch's modules or as one operation."""

    relu = False  # the last layer is no ReLU

    def __init__(self, memory):
        super().__init__()
        self.block = gconv.DenseBlock(2, 8, 2, 4, memory=memory)
        self.norm, self.conv = nn.BatchNorm2d(16), nn.Conv2d(16, 6, 1, bias=False)
        self.memory, self.stock = memory, True

    def forward(self, x):
        if self.stock:
            return F.avg_pool2d(self.conv(torch.relu(self.norm(self.modules_one_by_one(x)))), 2)
        layers = [
            (layer.norm1, layer.conv1.weight, layer.norm2, layer.conv2.weight)
            for layer in self.block.values()
        ]
        transition = (self.norm, self.conv.weight)
        return gconv.functional.dense_block(x, layers, transition, self.memory)

    def modules_one_by_one(self, x):
        features = [x]
        for layer in self.block.values():
            h = layer.conv1(torch.relu(layer.norm1(torch.cat(features, 1))))
            features.append(layer.conv2(torch.relu(layer.norm2(h))))
        return torch.cat(features, 1)


@modes
@pytest.mark.parametrize("memory", ["shared", "ultra"])
def test_dense_block(gpu_backend, memory, training):
    stock = Dense(memory).train(training)
    for i, layer in enumerate(stock.block.values()):
        randomize(layer.conv1, layer.norm1, (i, 1))
        randomize(layer.conv2, layer.norm2, (i, 2))
    randomize(stock.conv, stock.norm, "transition")
    ours = copy.deepcopy(stock)
    ours.stock = False
    x = twins.values(2, 8, 5, 4).requires_grad_()
    compare(stock, on_device(ours, gpu_backend), x, None, key=("dense", memory, training))
    assert_ran("dense_block")


class Tiny(nn.Module):
    """Two ResNeXt blocks, the first with a stride and a projection, and a classifier."""

    def __init__(self, stock):
        super().__init__()
        projection = nn.Sequential(nn.Conv2d(12, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
        conf = {"groups": 4, "base_width": 32, "stock": stock}
        self.layer1 = models.resnet.Bottleneck(12, 8, 2, projection, **conf)
        self.layer2 = models.resnet.Bottleneck(32, 8, **conf)
        self.fc = nn.Linear(32, 5)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


def test_a_training_step_of_resnext_blocks(gpu_backend):
    torch.manual_seed(0)
    images, labels = torch.randn(3, 12, 9, 7), torch.tensor([1, 4, 0])
    stock = lively(Tiny(stock=True), images)
    ours = Tiny(stock=False)
    ours.load_state_dict(stock.state_dict())
    exact = training_step(copy.deepcopy(stock).double(), images.double(), labels)
    own = training_step(stock, images, labels)
    with gconv.trace() as trace:
        got = training_step(on_device(ours, gpu_backend), images, labels)
    assert got.keys() == exact.keys()
    for name, value in exact.items():
        if value.is_floating_point():
            assert_as_good(got[name], own[name], value, name)
        else:
            assert torch.equal(got[name], value), name
    assert [row.kernel for row in trace] == 2 * [kernel("bottleneck")], trace


def test_inference_of_resnext_blocks(gpu_backend):
    """Without gradients each normalisation is the epilogue of its convolution."""
    torch.manual_seed(1)
    images = torch.randn(2, 12, 7, 8)
    stock = lively(Tiny(stock=True), images).eval()
    ours = Tiny(stock=False).eval()
    ours.load_state_dict(stock.state_dict())
    with torch.no_grad():
        got = on_device(ours, gpu_backend)(images)
        want = copy.deepcopy(stock).double()(images.double())
        assert_as_good(got, stock(images), want)


SPOILED = ("grouped_conv_fwd_stats", "grouped_conv_bwd", "batch_norm_apply", "batch_norm_bwd_reduce")


@pytest.mark.parametrize("name", SPOILED)
def test_the_comparison_would_notice(gpu_backend, monkeypatch, name):
    """It is the launchers that run: with the first result of one a hundredth too large nothing agrees."""
    stem = name[: name.index("_", name.index("_") + 1)]
    in_cuda = stem == "grouped_conv" and backend.backend_mode() == "cuda"
    module, attribute = (
        (gpu, "on_cuda") if in_cuda else (importlib.import_module(f"gconv.kernels.{stem}"), name)
    )
    launcher = getattr(module, attribute)

    def spoiled(*args):
        results = launcher(*args)
        if not in_cuda or args[0] == name:
            first = results if isinstance(results, torch.Tensor) else results[0]
            first.mul_(1.01)
        return results

    monkeypatch.setattr(module, attribute, spoiled)
    ours, stock = twins.twins()
    x = twins.values(*twins.INPUT).requires_grad_()
    with pytest.raises(AssertionError):
        compare(stock, on_device(ours, gpu_backend), x, None, key="spoiled")


def test_the_interpreter_refuses_bfloat16(gpu_backend):
    """It would compute it wrongly and say nothing."""
    if gpu_backend.type != "cpu":
        pytest.skip("on a GPU it is right")
    with pytest.raises(RuntimeError, match="dtype: want float32 or float16 in Triton's interpreter"):
        gconv.functional.batch_norm(torch.zeros(2, 4, 3, 3).bfloat16(), None, None, training=True)
