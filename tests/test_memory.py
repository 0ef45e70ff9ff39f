"""Memory that the CPU kernels' large results come from: reused when it is free, never before."""

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd.profiler import profile

import gconv
from gconv import memory

MB = 1 << 20


@pytest.fixture
def cache(ops):
    """`gconv.memory` with nothing kept; the limit is put back."""
    before = memory.cache_limit()
    memory.empty_cache()
    yield memory
    memory.set_cache_limit(before)
    memory.empty_cache()


def new(mebibytes, channels=16):
    """A float32 tensor of so many MiB."""
    return memory.new_channels_last(torch.empty(0), (1, channels, mebibytes * MB // (64 * channels), 16))


def test_freed_memory_is_allocated_again(cache):
    at_start = cache.cache_use().allocated
    x = new(4)
    where = x.data_ptr()
    assert cache.cache_use() == (at_start + 4 * MB, 0)
    del x
    assert cache.cache_use() == (at_start, 4 * MB)
    y = new(4)
    assert y.data_ptr() == where and cache.cache_use() == (at_start + 4 * MB, 0)


def test_memory_of_a_view_is_not_allocated_again(cache):
    x = new(4)
    part = x.zero_()[:, 1:2, 3]
    del x
    y = new(4).fill_(1)
    assert y.data_ptr() != part.untyped_storage().data_ptr() and part.abs().max() == 0


def test_free_neighbours_become_one_range(cache):
    """Of a freed tensor smaller ones take parts, and freed in any order they make room for it again."""
    x = new(8)
    where = x.data_ptr()
    del x
    parts = [new(2) for _ in range(4)]
    assert [part.data_ptr() for part in parts] == [where + 2 * MB * i for i in range(4)]
    assert cache.cache_use().cached == 0
    for i in (1, 3, 0, 2):
        parts[i] = None
    assert cache.cache_use().cached == 8 * MB
    assert new(8).data_ptr() == where


def test_the_smallest_range_that_fits_is_taken(cache):
    x = new(16)
    del x  # one range for them all, side by side
    tensors = [new(size) for size in (6, 1, 3, 1, 4, 1)]
    places = [tensor.data_ptr() for tensor in tensors]
    for i in (0, 2, 4):
        tensors[i] = None
    taken = [new(size) for size in (3, 4, 5, 1)]
    assert [tensor.data_ptr() for tensor in taken] == [places[2], places[4], places[0], places[0] + 5 * MB]


def test_the_last_range_grows(cache):
    """What is too small at the end becomes the beginning of what comes next, and addresses there stay."""
    first, second = new(4), new(3)
    where = second.data_ptr()
    del second
    larger = new(5).fill_(1)
    assert larger.data_ptr() == where and cache.cache_use().cached == 0
    del larger
    cache.empty_cache()
    again = new(2)
    assert again.data_ptr() == where and again.abs().max() == 0  # from the system
    del first
    assert new(4).fill_(1).data_ptr() + 4 * MB == where


def test_more_than_the_reserved_addresses(cache):
    """Tensors of more than a GiB together, of which only corners are touched."""
    tensors = [new(size) for size in (700, 600, 1500, 2)]
    for i, x in enumerate(tensors):
        x[0, 0, 0, 0] = x[0, -1, -1, -1] = i
    places = sorted((x.data_ptr(), x.nbytes) for x in tensors)
    assert all(place + nbytes <= after for (place, nbytes), (after, _) in itertools.pairwise(places))
    del x, tensors[1]
    assert cache.cache_use().cached <= 600 * MB
    more = new(650)
    more[0, 0, 0, 0] = more[0, -1, -1, -1] = 9
    for i, x in zip((0, 2, 3), tensors):
        assert x[0, 0, 0, 0] == i and x[0, -1, -1, -1] == i


def test_empty_cache_and_limit(cache):
    x = new(8).fill_(3)
    del x
    gconv.empty_cache()
    assert cache.cache_use().cached == 0
    cache.set_cache_limit(5 * MB)
    x, y = new(4).fill_(1), new(4).fill_(2)
    del x
    assert cache.cache_use().cached == 4 * MB
    del y
    assert cache.cache_use().cached == 4 * MB
    cache.set_cache_limit(MB)
    assert cache.cache_use().cached == MB
    assert new(1).fill_(1).sum() == MB / 4


def test_small_tensors_other_types_and_a_limit_of_zero_are_torchs(cache):
    before = cache.cache_use().allocated
    small = memory.new_channels_last(torch.empty(0), (1, 16, 8, 8))
    wide = memory.new_channels_last(torch.empty(0, dtype=torch.float64), (1, 16, 256, 256))
    cache.set_cache_limit(0)
    with profile(profile_memory=True) as profiled:
        large = new(4)
    assert cache.cache_use().allocated == before
    assert max(event.cpu_memory_usage for event in profiled.key_averages()) == 4 * MB
    assert small.shape == (1, 16, 8, 8) and wide.dtype == torch.float64 and large.is_cpu


@pytest.mark.parametrize("shape", [(3, 5, 129, 257), (2, 1, 700, 400), (1, 300, 1, 1000), (0, 4, 9, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_are_torchs(cache, shape, dtype):
    want = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    got = memory.new_channels_last(want, shape)
    assert got.shape == want.shape and got.stride() == want.stride() and got.dtype == dtype
    assert got.untyped_storage().nbytes() == want.untyped_storage().nbytes()


def test_results_and_gradients_come_from_it(cache):
    """A convolution's result, its gradients and those of a wide 1x1 convolution's weight."""
    x = torch.randn(4, 64, 64, 64).contiguous(memory_format=torch.channels_last).requires_grad_()
    conv = gconv.Conv2d(64, 64, 3, padding=1, groups=8, bias=False)
    want = torch.nn.functional.conv2d(x, conv.weight, None, 1, 1, 1, 8)
    before = cache.cache_use().allocated
    y = conv(x)
    assert cache.cache_use().allocated == before + 4 * MB
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    y.backward(torch.ones_like(y))
    assert cache.cache_use().allocated == before + 8 * MB  # y and x.grad
    again = torch.autograd.grad(want, x, torch.ones_like(want))[0]
    torch.testing.assert_close(x.grad, again, rtol=1e-4, atol=1e-4)
    weight = torch.randn(1024, 512, 1, 1, requires_grad=True)
    scale = torch.ones(1, 512, 4, 4).contiguous(memory_format=torch.channels_last)
    gconv.functional.pointwise_conv(scale, weight).sum().backward()
    assert cache.cache_use().allocated == before + 10 * MB


def test_threads_do_not_share_blocks(cache):
    def work(seed):
        for i in range(200):
            x = new(1 + (seed + i) % 3).fill_(seed)
            y = new(1 + i % 2).fill_(-seed)
            if x.min() != seed or x.max() != seed or y.max() != -seed or y.min() != -seed:
                return False
        return True

    at_start = cache.cache_use().allocated
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(1, 5)))
    assert cache.cache_use().allocated == at_start


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_allocates(cache):
    x = new(2).fill_(1)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            y = new(2)
            y[0, 0, 0], x[0, 0, 0] = 2, 5  # few elements: torch's threads are not there after a fork
            status = int(not (y[0, 0, 0].max() == 2 and y.data_ptr() != x.data_ptr()))
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert x.max() == 1


def test_a_model_computes_the_same_bits_without_it(cache):
    torch.manual_seed(0)
    model = gconv.models.resnext50_32x4d(num_classes=8)
    x = torch.randn(2, 3, 96, 96)

    def step():
        model.zero_grad()
        y = model(x)
        y.square().mean().backward()
        return [y.detach(), *(p.grad.clone() for p in model.parameters())]

    model.eval()
    first = step()
    with_cache = step()
    cache.set_cache_limit(0)
    for a, b, c in zip(first, with_cache, step()):
        assert torch.equal(a, b) and torch.equal(b, c)


@pytest.mark.parametrize("limit", [-1, 1.5, None, True])
def test_bad_limit(cache, limit):
    with pytest.raises(ValueError, match=r"set_cache_limit: limit: want an int of at least 0, got"):
        cache.set_cache_limit(limit)


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(memory.backend, "extension_loaded", lambda: False)
    memory.empty_cache()
    memory.set_cache_limit(MB)
    assert memory.cache_limit() == 0 and memory.cache_use() == (0, 0)
    assert new(4).is_contiguous(memory_format=torch.channels_last)
    monkeypatch.undo()
    assert memory.cache_limit() != MB


def test_more_memory_than_there_is(cache):
    with pytest.raises(RuntimeError, match=f"can't allocate {1 << 62} bytes"):
        memory.new_channels_last(torch.empty(0), (1 << 20, 1 << 20, 1 << 20, 1))
    for size in (
        (1 << 32, (1 << 30) + 1, 4, 1),
        (1 << 20, 1 << 20, 1 << 20, 1 << 20),
    ):  # modulo 2^64: 16 G, 0
        with pytest.raises(RuntimeError):
            memory.new_channels_last(torch.empty(0), size)


@pytest.mark.parametrize("size", [(1, 2, 3), (1, 2, 3, -4)])
def test_bad_size(cache, size):
    with pytest.raises(RuntimeError, match="cpu_empty: size: want"):
        memory.new_channels_last(torch.empty(0), size)


@pytest.mark.parametrize("given, want", [("3", 3 * MB), ("0", 0), ("", None)])
def test_environment_variable(ops, given, want):
    code = "from gconv import memory; print(memory.cache_limit())"
    done = _python(code, given)
    limit = int(done.stdout)
    assert limit == want if want is not None else limit >= MB


@pytest.mark.parametrize("given", ["x", "1.5"])
def test_bad_environment_variable(ops, given):
    done = _python("from gconv import memory; memory.cache_limit()", given)
    line = f"GCONV_CACHE_MB: want a whole number of mebibytes, got {given}"
    assert done.returncode == 1 and line in done.stderr


def _python(code, cache_mb):
    environment = os.environ | {"GCONV_CACHE_MB": cache_mb}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
