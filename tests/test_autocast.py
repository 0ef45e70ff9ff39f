"""How parameters are cast for autocast, and where their gradients lie. Results under autocast: the tests of
the layers."""

import pytest
import torch
from checks import assert_same_bits, generator
from torch import nn

import gconv
from gconv import memory
from gconv.autocast import autocast

pytestmark = pytest.mark.usefixtures("ops", "one_thread")


def parameter(size, layout=torch.contiguous_format, dtype=torch.float32):
    values = torch.randn(size, generator=generator("autocast")).to(dtype)
    return nn.Parameter(values.contiguous(memory_format=layout))


def cast(t, dtype=torch.bfloat16):
    with torch.autocast("cpu", dtype):
        return autocast(t)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(64, 32, 3, 3), (512, 256, 1, 1), (3, 5, 1, 1)], ids=str)
def test_values_and_gradients_are_those_of_to(size, layout, dtype):
    upstream = torch.randn(size, generator=generator("upstream")).contiguous(memory_format=layout)
    grads = []
    for run in (cast, torch.Tensor.to):
        leaf = parameter(size, layout)
        y = run(leaf, dtype)
        assert y.dtype is dtype and y.stride() == leaf.stride()
        assert_same_bits(y.detach(), leaf.detach().to(dtype))
        (y.float() * upstream).sum().backward()
        assert leaf.grad.dtype is torch.float32 and leaf.grad.stride() == leaf.stride()
        grads.append(leaf.grad)
    assert_same_bits(*grads)


def test_gradients_that_are_expanded_or_differentiated_again():
    leaf = parameter((8, 4, 3, 3))
    cast(leaf).sum().backward()
    assert_same_bits(leaf.grad, torch.ones(8, 4, 3, 3))
    (first,) = torch.autograd.grad(cast(leaf).float().pow(3).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    assert_same_bits(second, (6 * leaf.detach().bfloat16().float()).bfloat16().float())


def test_what_is_not_cast():
    wide, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    done = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    x = torch.zeros(2)
    with torch.autocast("cpu", torch.bfloat16):
        got = autocast(x, None, wide, counts, done)
    assert got[0].dtype is torch.bfloat16
    assert got[1] is None and got[2] is wide and got[3] is counts and got[4] is done
    assert autocast(x)[0] is x


def test_function_transforms_and_forward_mode():
    leaf = parameter((4, 4, 1, 1)).detach()

    def total(w):
        return cast(w).float().square().sum()

    plain = leaf.clone().requires_grad_()
    (want,) = torch.autograd.grad(plain.bfloat16().float().square().sum(), plain)
    assert_same_bits(torch.func.grad(total)(leaf), want)
    _, tangent = torch.func.jvp(total, (leaf,), (torch.ones_like(leaf),))
    assert tangent == want.sum()


def test_copies_and_gradients_are_the_allocators():
    if memory.cache_limit() == 0:
        pytest.skip("GCONV_CACHE_MB is 0")
    layer = gconv.ConvBNReLU(256, 256, 1)
    conv = next(module for module in layer.modules() if isinstance(module, nn.Conv2d))
    x = torch.randn(1, 256, 4, 4).to(memory_format=torch.channels_last)
    before = memory.cache_use().allocated
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x)
    assert memory.cache_use().allocated - before >= 2 * conv.weight.numel()
    z.sum().backward()
    del z
    assert memory.cache_use().allocated - before >= 4 * conv.weight.numel()
    assert conv.weight.grad.dtype is torch.float32
