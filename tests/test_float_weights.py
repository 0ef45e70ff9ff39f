"""float32 weights beside 16-bit activations: the kernels round them as they read them, which has the bits of
rounding them before, and leave weight gradients in float32."""

import copy

import pytest
import torch
from bottleneck_blocks import BLOCKS, twins
from checks import assert_same_bits, place
from torch import nn

import gconv
from gconv import autocast, backend
from gconv.grouped_conv import grouped_conv_bwd_ref, grouped_conv_fwd_ref

DTYPES = (torch.bfloat16, torch.float16)
# (C, K, groups, stride, size): narrow groups, whole in a vector or not, odd ones, wide ones, weights that
# are packed by chunks, Winograd's
GROUPED = (
    (32, 32, 8, 1, (2, 9, 11)), (64, 64, 8, 2, (1, 12, 9)), (15, 20, 5, 1, (2, 7, 5)),
    (32, 32, 2, 2, (1, 8, 8)), (96, 64, 1, 1, (1, 8, 12)), (256, 384, 1, 1, (1, 6, 6)),
)  # fmt: skip
POINTWISE = ((32, 48, 1, (2, 5, 7)), (37, 20, 2, (1, 9, 8)), (512, 256, 1, (2, 16, 16)))


def tensors(c, k, per_group, kernel, size, stride, dtype, layout, seed=0):
    """(x, dy, weight) with values that 16 bits have to round."""
    torch.manual_seed(seed)
    n, h, w = size
    x = place(torch.randn(n, c, h, w).to(dtype), "channels_last")
    dy = place(torch.randn(n, k, -(-h // stride), -(-w // stride)).to(dtype), "channels_last")
    return x, dy, place(torch.randn(k, per_group, kernel, kernel), layout)


def assert_rounds(got, want, what):
    """Every result of `got`, from float32 weights, is that of the rounded ones; a float32 gradient rounds to
    theirs."""
    for i, (mine, other) in enumerate(zip(got, want)):
        if mine.dtype != other.dtype:
            assert mine.dtype is torch.float32 and not torch.equal(mine, other.float()), "it is not rounded"
            assert mine.stride() == other.stride(), what
            mine = mine.to(other.dtype)
        assert_same_bits(mine, other, f"{what} {i}")


def every(*results):
    return [t for result in results for t in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", ("never", "auto", "always"))
@pytest.mark.parametrize("case", GROUPED, ids=str)
def test_grouped_conv(ops, isa, case, algorithm, dtype, layout, winograd):
    winograd(algorithm)
    c, k, groups, stride, size = case
    x, dy, weight = tensors(c, k, c // groups, 3, size, stride, dtype, layout)
    act, finish = torch.rand(4, c) + 0.5, torch.rand(6, k) + 0.5
    conf, adjacent = ((stride, stride), (1, 1), (1, 1), groups), layout == "channels_last"

    def run(weight):
        y = torch.empty_like(dy)
        ops.grouped_conv_fwd_into(x, weight, *conf, act[:2], None, None, False, False, y)
        return every(
            ops.grouped_conv_fwd(x, weight, *conf, None, None, dy, True),
            ops.grouped_conv_fwd_stats(x, weight, *conf, act[:2]),
            ops.grouped_conv_bwd_input(dy, weight, x.shape, *conf, dy, finish, None, None),
            ops.grouped_conv_bwd(dy, x, weight, *conf, dy, finish, act, True, True, adjacent),
            ops.grouped_conv_bwd(dy, x, weight, *conf, None, None, None, False, True, adjacent),
            y,
        )

    assert_rounds(run(weight), run(weight.to(dtype)), "grouped_conv")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", ("never", "always"))
@pytest.mark.parametrize("case", POINTWISE, ids=str)
def test_pointwise_conv(ops, isa, case, algorithm, dtype, strassen):
    strassen(algorithm)
    c, k, stride, size = case
    x, dy, weight = tensors(c, k, c, 1, size, stride, dtype, "contiguous")
    act, finish, stride = torch.rand(4, c) + 0.5, torch.rand(6, k) + 0.5, (stride, stride)

    def run(weight):
        dx = x.clone()
        return every(
            ops.pointwise_conv_fwd(x, weight, stride, None, None, dy, True),
            ops.pointwise_conv_fwd_stats(x, weight, stride, act[:2]),
            ops.pointwise_conv_bwd(dy, x, weight, stride, dy, finish, act, None, True, True, False),
            ops.pointwise_conv_bwd(dy, x, weight, stride, None, None, None, None, False, True, True),
            ops.pointwise_conv_bwd_add(dy, x, weight, stride, dy, finish, act, dx, True, False),
            dx,
        )

    assert_rounds(run(weight), run(weight.to(dtype)), "pointwise_conv")


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_defined(ops, dtype):
    """Against the references, which other bits of the same numbers may come from."""
    x, dy, weight = tensors(16, 16, 4, 3, (2, 6, 6), 1, dtype, "contiguous")
    conf = ((1, 1), (1, 1), (1, 1), 4)
    args = (dy, x, weight, *conf, None, None, None, True, True, False)
    got = ops.grouped_conv_fwd(x, weight, *conf, None, None, None, False), *ops.grouped_conv_bwd(*args)[:2]
    want = grouped_conv_fwd_ref(x, weight.to(dtype), *conf), *grouped_conv_bwd_ref(*args)[:2]
    for mine, other in zip(got, want):
        assert mine.dtype is other.dtype
        assert (mine.double() - other.double()).norm() < 0.01 * other.double().norm()


def test_refused(ops):
    x, _, weight = tensors(8, 8, 2, 3, (1, 5, 5), 1, torch.bfloat16, "contiguous")
    conf = ((1, 1), (1, 1), (1, 1), 4)
    for values, other in ((x, weight.half()), (x.float(), weight.bfloat16()), (x, weight.double())):
        with pytest.raises(RuntimeError, match="weight: want "):
            ops.grouped_conv_fwd(values, other, *conf, None, None, None, False)
    with pytest.raises(ValueError, match="weight: want dtype"):
        gconv.functional.grouped_conv(x, weight, padding=1, groups=4)


# ---------------------------------------------------------------------------------------------- in autocast


@pytest.fixture
def copies(monkeypatch):
    """What autocast casts to another dtype."""
    monkeypatch.setattr(backend, "POINTWISE_BFLOAT16_TO_TORCH", False)
    cast, made = autocast._cast, []

    def counted(t, dtype):
        result = cast(t, dtype)
        made.extend([t] if result is not t else [])
        return result

    monkeypatch.setattr(autocast, "_cast", counted)
    return made


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("channels, options, size", BLOCKS[::3])
def test_a_bottleneck_makes_no_copies_of_its_weights(channels, options, size, training, copies):
    _, block = twins("float weights", channels, training=training, **options)
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    x = torch.randn(size[0], channels[0], *size[1:])
    for _ in range(2):
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            z = block(x)
        z.float().square().sum().backward()
        assert z.dtype is torch.bfloat16 and all(t is x for t in copies)
        assert {conv.weight.grad.dtype for conv in convs} == {torch.float32}
        # Autograd keeps a gradient as it is if its layout is the weight's.
        assert all(conv.weight.grad.stride() == conv.weight.stride() for conv in convs)
    if not training:
        rounded = copy.deepcopy(block)
        for module in rounded.modules():
            if isinstance(module, nn.Conv2d):
                module.bfloat16()
        with torch.no_grad():
            want = rounded(x.bfloat16())
            with torch.autocast("cpu", torch.bfloat16):
                assert_same_bits(block(x), want)


def test_weights_that_are_not_float32_are_cast(copies):
    _, block = twins("float weights", (16, 8, 8, 16))
    for conv in (block.conv1, block.conv3):
        conv.half()
    x = torch.randn(2, 16, 6, 6, dtype=torch.bfloat16)
    for _ in range(2):
        copies.clear()
        with torch.autocast("cpu", torch.bfloat16):
            block(x)
        assert [t.dtype for t in copies] == [torch.float16] * 2


def test_gradients_of_gradients(copies):
    stock, ours = twins("float weights", (16, 8, 8, 16))
    x = torch.randn(2, 16, 6, 6)
    found = []
    for block in (stock, ours):
        weights = [conv.weight for conv, _ in block.pairs()]
        with torch.autocast("cpu", torch.bfloat16):
            z = block(x)
        grads = torch.autograd.grad(z.float().square().mean(), weights, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        found.append(torch.autograd.grad(penalty, weights))
    for mine, other in zip(*found):
        assert torch.nn.functional.cosine_similarity(mine.flatten(), other.flatten(), 0) > 0.98
