"""Max pooling that keeps 16-bit places: always against torch's own, bit for bit."""

import copy

import pytest
import torch
from checks import assert_same_bits, generator
from gconv.bench.allocations import MB, allocations_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from gconv import memory, models
from gconv.max_pool import max_pool

pytestmark = pytest.mark.usefixtures("ops", "one_thread")
POOLS = (
    nn.MaxPool2d(3, 2, 1),
    nn.MaxPool2d(2),
    nn.MaxPool2d((2, 3), (2, 1), (0, 1)),
    nn.MaxPool2d(2, ceil_mode=True),
    nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    nn.MaxPool2d(3, 1, dilation=2),
)
OURS = "MaxPoolBackward"


def images(size, dtype=torch.float32, layout=torch.channels_last):
    x = torch.randn(size, generator=generator("max_pool")).to(dtype)
    return x.contiguous(memory_format=layout)


def node(z):
    return z.grad_fn.name()


def differentiated(run, pool, x):
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    z = run(pool, leaf)
    upstream = torch.randn(z.shape, generator=generator("upstream")).to(z.dtype)
    first = torch.autograd.grad((z * upstream).sum(), leaf, retain_graph=True)[0]
    (again,) = torch.autograd.grad((z.double().exp() * upstream).sum(), leaf, create_graph=True)
    second = torch.autograd.grad(again.square().sum(), leaf)[0]
    return z.detach(), first, again.detach(), second


def stock(pool, x):
    return pool(x)


def assert_as_stock(pool, x):
    results = zip(differentiated(max_pool, pool, x), differentiated(stock, pool, x), strict=True)
    for i, (got, want) in enumerate(results):
        assert_same_bits(got, want)
        assert i == 3 or got.stride() == want.stride(), i  # any layout will do for the second derivative


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_results_and_gradients(pool, layout):
    for size in ((2, 3, 13, 15), (1, 3, 200, 170), (3, 1, 9, 8)):  # places in 16 and in 32 bits
        x = images(size, layout=layout)
        assert node(max_pool(pool, x.requires_grad_())) == OURS
        assert_as_stock(pool, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    assert_as_stock(POOLS[0], images((2, 16, 12, 13), dtype))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_without_gradients(pool, layout):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = images((2, 3, 13, 15), dtype, layout)
        results = [max_pool(pool, x)]
        with torch.no_grad():
            results.append(max_pool(pool, x.clone().requires_grad_()))
        with torch.inference_mode():
            results.append(max_pool(pool, x))
        want = pool(x)
        for z in results:
            assert z.grad_fn is None and z.stride() == want.stride()
            assert_same_bits(z, want)


def test_uncommon_inputs():
    pool = POOLS[0]
    assert_as_stock(pool, images((4, 8, 20, 20))[::2, 1:5, 3:, ::2])
    x = images((2, 4, 9, 9))
    x[0, 0, 4, 4], x[0, 1], x[1, 2, 0, 0] = float("nan"), -float("inf"), float("inf")
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = max_pool(pool, leaf), pool(other)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    got.sum().backward()
    want.sum().backward()
    assert_same_bits(leaf.grad, other.grad)


def test_its_input_is_free_to_change():
    """torch's own raises: it reads what was pooled."""
    x = images((2, 3, 12, 12)).requires_grad_()
    z = x * 1
    pooled = max_pool(POOLS[1], z)
    with torch.no_grad():
        z.zero_()
    pooled.sum().backward()
    want = torch.autograd.grad(POOLS[1](x).sum(), x)[0]
    assert_same_bits(x.grad, want)


def test_what_is_kept():
    x = images((2, 8, 96, 96)).requires_grad_()
    pooled = 2 * 8 * 48 * 48

    def kept(run):
        # The product with 1 is what a convolution's result is: nobody else keeps it.
        found = allocations_of(lambda: run(POOLS[0], x * 1).sum(), lambda loss: loss.backward())
        return round(found.kept * MB)

    got, want = kept(max_pool), kept(stock)
    assert 2 * pooled <= got <= 2 * pooled + 4096
    assert want >= 4 * x.numel() + 8 * pooled


def test_memory_is_the_allocators(ops):
    if memory.cache_limit() == 0:
        pytest.skip("GCONV_CACHE_MB is 0")
    x = images((2, 64, 56, 56)).requires_grad_()
    before = memory.cache_use().allocated
    pooled = max_pool(POOLS[0], x)
    here = memory.cache_use().allocated - before
    assert here >= pooled.numel() * (4 + 2)
    (dx,) = torch.autograd.grad(pooled.sum(), x)
    assert memory.cache_use().allocated - before >= here - 2 * pooled.numel() + dx.numel() * 4
    before = memory.cache_use().allocated
    alone = max_pool(POOLS[0], x.detach())
    assert memory.cache_use().allocated - before >= alone.numel() * 4


# ------------------------------------------------------------------------------------- where torch's runs


def test_other_modules_are_called():
    x = images((2, 3, 12, 12)).requires_grad_()
    for module in (nn.Identity(), nn.AvgPool2d(2), nn.Sequential(nn.MaxPool2d(2)), nn.AdaptiveMaxPool2d(3)):
        assert_same_bits(max_pool(module, x).detach(), module(x).detach())
    z, places = max_pool(nn.MaxPool2d(2, return_indices=True), x)
    assert places.dtype == torch.int64 and z.shape == places.shape


class Doubled(nn.MaxPool2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_hooks_and_subclasses_are_called():
    x = images((2, 3, 12, 12)).requires_grad_()
    assert_same_bits(max_pool(Doubled(2), x).detach(), 2 * POOLS[1](x).detach())
    pool = nn.MaxPool2d(2)
    handle = pool.register_forward_pre_hook(lambda module, args: args[0].flip(2))
    assert_same_bits(max_pool(pool, x).detach(), POOLS[1](x.flip(2)).detach())
    handle.remove()
    assert node(max_pool(pool, x)) == OURS


def test_a_traced_graph_has_the_module():
    x = images((2, 3, 12, 12))
    traced = torch.jit.trace(lambda x: max_pool(POOLS[0], x), (x,))
    assert "cpu_empty" not in str(traced.graph)
    assert_same_bits(traced(x.flip(3)), POOLS[0](x.flip(3)))


def test_where_others_watch():
    pool = POOLS[0]
    x = images((2, 3, 12, 12)).requires_grad_()
    got = torch.func.grad(lambda x: max_pool(pool, x).square().sum())(x.detach())
    want = torch.autograd.grad(pool(x).square().sum(), x)[0]
    assert_same_bits(got, want)
    assert_same_bits(
        torch.func.vmap(lambda x: max_pool(pool, x))(x[:, None]).detach()[:, 0], pool(x).detach()
    )
    tangent = images((2, 3, 12, 12))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        got = torch.autograd.forward_ad.unpack_dual(max_pool(pool, dual)).tangent
        want = torch.autograd.forward_ad.unpack_dual(pool(dual)).tangent
    assert_same_bits(got.detach(), want.detach())
    rows = torch.eye(4).repeat(1, 3 * 9).reshape(4, 1, 3, 6, 6)
    small = images((1, 3, 12, 12)).requires_grad_()
    got, want = (
        torch.autograd.grad(run(POOLS[1], small), small, rows, is_grads_batched=True)[0]
        for run in (max_pool, stock)
    )
    assert_same_bits(got, want)


def test_saved_tensor_hooks_and_checkpointing():
    pool, x = POOLS[0], images((2, 3, 12, 12)).requires_grad_()
    want = torch.autograd.grad(pool(x).square().sum(), x)[0]
    with torch.autograd.graph.save_on_cpu():
        z = max_pool(pool, x)
    assert_same_bits(torch.autograd.grad(z.square().sum(), x)[0], want)
    z = checkpoint(max_pool, pool, x, use_reentrant=False)
    assert_same_bits(torch.autograd.grad(z.square().sum(), x)[0], want)


@pytest.mark.parametrize(
    "pool, size, message",
    [
        (nn.MaxPool2d(2, padding=2), (1, 3, 8, 8), "pad should be at most half"),
        (nn.MaxPool2d(5), (1, 3, 4, 8), "Output size is too small"),
        (nn.MaxPool2d(2, stride=0), (1, 3, 8, 8), "stride"),
        (nn.MaxPool2d(2), (1, 3, 0, 8), "size"),
    ],
    ids=["padding", "small", "stride", "empty"],
)
def test_bad_input(pool, size, message):
    with pytest.raises(RuntimeError, match=message):
        max_pool(pool, torch.randn(size).requires_grad_())


def test_accepted_as_torch_does():
    for size in ((3, 12, 12), (0, 3, 12, 12)):
        x = torch.randn(size).requires_grad_()
        assert_same_bits(max_pool(POOLS[0], x).detach(), POOLS[0](x).detach())


# ------------------------------------------------------------------------------------------- where it is used


def resnet():
    return models.ResNet(models.resnet.Bottleneck, [1, 1], num_classes=5, stem_channels=8, planes=(8, 16))


def densenet():
    return models.DenseNet(8, (2, 2), 16, num_classes=5)


def nodes_of(root):
    seen, todo = set(), [root]
    while todo:
        fn = todo.pop()
        if fn is not None and fn not in seen:
            seen.add(fn)
            todo += [following for following, _ in fn.next_functions]
    return [fn.name() for fn in seen]


@pytest.mark.parametrize("make", [resnet, densenet])
def test_models(make, monkeypatch):
    torch.manual_seed(5)
    module, x = make(), images((2, 3, 64, 64))
    assert OURS in nodes_of(module(x).grad_fn)
    hooked = copy.deepcopy(module)
    for pool in hooked.modules():
        if isinstance(pool, nn.MaxPool2d):
            pool.register_forward_hook(lambda *args: None)
    assert OURS not in nodes_of(hooked(x).grad_fn)
    for network in (module, hooked):
        network.zero_grad()
        network(x).square().sum().backward()
    for got, want in zip(module.parameters(), hooked.parameters(), strict=True):
        assert_same_bits(got.grad, want.grad)
