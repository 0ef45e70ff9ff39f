"""The Triton kernels of batch_norm: the tests of the C++ ops again, on a GPU or in Triton's interpreter, and
what is theirs alone."""

import math

import checks
import pytest
import test_batch_norm as of_cpu
import torch
from checks import assert_accurate, assert_exact, assert_same_bits, place
from test_batch_norm import Data
from triton_cases import dtypes, no_isa, on_triton, ops_on_device  # noqa: F401

import gconv
from gconv.batch_norm import batch_norm_pool_bwd_ref, batch_norm_pool_ref

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

# One block of channels and several, whole and cut off, aligned to vectors and not.
SHAPES = (
    (2, 1, 7, 5), (2, 5, 1, 7), (2, 24, 9, 8), (1, 33, 1, 2), (2, 130, 4, 7),
)  # fmt: skip
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


test_apply = on_triton(of_cpu.test_apply, shape=SHAPES)
test_statistics = on_triton(of_cpu.test_statistics, shape=SHAPES)
test_statistics_of_many_values = on_triton(
    of_cpu.test_statistics_of_many_values, shape=((2, 16, 64, 64), (4, 3, 129, 65), (1, 64, 28, 28))
)
test_fold = on_triton(of_cpu.test_fold)
test_update_running = on_triton(of_cpu.test_update_running)
test_update_running_is_its_reference = on_triton(of_cpu.test_update_running_is_its_reference)
test_backward_reduce = on_triton(of_cpu.test_backward_reduce, shape=SHAPES)
test_backward_reduce_of_a_pair = on_triton(of_cpu.test_backward_reduce_of_a_pair, shape=SHAPES)
test_backward_finish = on_triton(of_cpu.test_backward_finish)
test_backward_apply = on_triton(of_cpu.test_backward_apply, shape=SHAPES)
test_chain_is_the_gradient_of_torchs_batch_norm = on_triton(
    of_cpu.test_chain_is_the_gradient_of_torchs_batch_norm
)
test_layout_does_not_change_a_bit = on_triton(of_cpu.test_layout_does_not_change_a_bit)
test_stride_0 = on_triton(of_cpu.test_stride_0)
test_nan_and_inf_stay_in_their_channel = on_triton(of_cpu.test_nan_and_inf_stay_in_their_channel)
test_zero_batch = on_triton(of_cpu.test_zero_batch)
test_the_gradient_at_exactly_zero_is_blocked = on_triton(of_cpu.test_the_gradient_at_exactly_zero_is_blocked)
test_mask_uses_channel_vectors_of_its_own_channel = on_triton(
    of_cpu.test_mask_uses_channel_vectors_of_its_own_channel
)


@dtypes
@pytest.mark.parametrize("alias", ["none", "x", "residual"])
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "stepped"])
def test_apply_into_a_view(ops, dtype, alias, layout):
    """The view alone is written, also where it is what is read."""
    data = Data((2, 21, 5, 6), dtype, "normal", "into", alias, layout)
    x, residual, affine = place(data.activation(), layout), place(data.activation(), layout), data.affine()
    args = (x.clone(), affine, residual.clone(), None, True)
    y = {"x": x, "residual": residual}.get(alias, place(data.activation(), layout))
    around = torch.empty(0, dtype=dtype).set_(y.untyped_storage())
    outside = around.isnan().sum()
    assert ops.batch_norm_apply_into(x, affine, residual, None, True, y) is None
    want = checks.ref_bn_apply(torch.float64, *args)
    assert_accurate(y, want, checks.ref_bn_apply(dtype, *args), "batch_norm_apply_into")
    assert around.isnan().sum() == outside


POOLED = ((2, 5, 6, 8), (1, 24, 7, 9), (2, 33, 2, 3), (1, 130, 5, 4))


@pytest.mark.parametrize("shape", POOLED, ids=lambda s: "x".join(map(str, s)))
@dtypes
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "sliced"])
def test_pool(ops, shape, dtype, layout):
    data = Data(shape, dtype, "normal", "pool", layout)
    affine = data.affine()
    x = place(data.activation(), layout)
    y = ops.batch_norm_pool(x, affine)
    assert_accurate(y, batch_norm_pool_ref(x.double(), affine.double()), batch_norm_pool_ref(x, affine), "y")
    checks.assert_channels_last(y, "y")


@pytest.mark.parametrize("shape", POOLED, ids=lambda s: "x".join(map(str, s)))
@dtypes
@pytest.mark.parametrize("want_y", [False, True])
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_pool_backward(ops, shape, dtype, want_y, layout):
    data = Data(shape, dtype, "normal", "pool backward", layout)
    affine = data.affine()
    x = data.clear(place(data.activation(), layout), affine)
    n, c, h, w = shape
    dy = data.activation()[:, :, : h // 2, : w // 2]
    act = torch.stack([*affine, data.vector(), data.vector((0.5, 1.0, 2.0))])
    dx, exact_dx, own_dx = place(data.activation(), layout), x.double(), x.clone()
    sums, y = ops.batch_norm_pool_bwd(dy, x, act, want_y, dx)
    exact = batch_norm_pool_bwd_ref(dy.double(), x.double(), act.double(), want_y, exact_dx)
    own = batch_norm_pool_bwd_ref(dy, x, act, want_y, own_dx)
    assert_accurate(dx, exact_dx, own_dx, "dx")
    magnitude = math.sqrt(n * h * w) * torch.ones(2, c)
    assert_accurate(sums, exact[0], own[0], "sums", torch.float32, magnitude)
    if want_y:
        assert_accurate(y, exact[1], own[1], "y")
    else:
        assert y.numel() == 0
    assert torch.equal(dx[:, :, h - h % 2 :], torch.zeros_like(dx[:, :, h - h % 2 :]))


def test_pool_of_whole_numbers_is_exact(ops):
    """An odd last row and column, dropped, and a shift that opens the ReLU at 0."""
    gen = checks.generator("pool of whole numbers")
    x, dy = checks.integers((2, 9, 5, 7), 4, gen), 4 * checks.integers((2, 9, 2, 3), 3, gen)
    act = torch.stack([checks.choice((9,), v, gen) for v in ((-1, 1, 2), (-2, 0, 3), (0, 1), (0.5, 1))])
    dx, exact_dx = torch.empty_like(x, memory_format=torch.channels_last), x.double()
    sums, y = ops.batch_norm_pool_bwd(dy, x, act, True, dx)
    exact_sums, exact_y = batch_norm_pool_bwd_ref(dy.double(), x.double(), act.double(), True, exact_dx)
    for got, want in ((sums, exact_sums), (y, exact_y), (dx, exact_dx)):
        assert_exact(got, want)
    assert_same_bits(ops.batch_norm_pool(x, act[:2]), y)


@dtypes
@pytest.mark.parametrize("where", ["cut", "shifted"])
def test_views_without_one_stride(ops, dtype, where):
    """What does not follow one stride from pixel to pixel, beside what does: the bits are the same."""
    data = Data((2, 32, 6, 7), dtype, "normal", "views")
    x, dz, finish = data.activation(), data.activation(), torch.randn(6, 32, generator=data.gen)
    whole = torch.full((2, 40, 9, 9), math.nan, dtype=dtype).contiguous(memory_format=torch.channels_last)
    view = whole[:, 8:, 2:8, 1:8] if where == "cut" else whole[:, 3:35, 3:, :7]
    view.copy_(x)
    want, got = ops.batch_norm_bwd_apply(dz, x, finish, None, True), None
    got = ops.batch_norm_bwd_apply(dz, view, finish, None, True)
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)
    for one, other in zip(ops.batch_norm_stats(view), ops.batch_norm_stats(x), strict=True):
        assert_same_bits(one, other)


@pytest.mark.needs_cuda
@dtypes
def test_every_run_has_the_same_bits(ops, dtype):
    """The interpreter runs one program after the other: only a GPU can show a race."""
    data = Data((16, 96, 57, 59), dtype, "normal", "runs")
    x, dz, affine = data.activation(), data.activation(), data.affine()
    results = []
    for _ in range(5):
        mean, var = ops.batch_norm_stats(x)
        reduced = ops.batch_norm_bwd_reduce_pair(dz, x, x, mean, var, None, dz, mean, var, None)
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        act, dy = torch.stack([*affine, mean, var]), dz[:, :, :28, :29]
        results.append((mean, var, *reduced, *ops.batch_norm_pool_bwd(dy, x, act, True, dx), dx))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits(a, b)


def test_bad_input_is_named(ops):
    x, v = torch.zeros(2, 6, 4, 4), torch.ones(6)
    mean_of_five, table = torch.ones(5), torch.ones(2, 6)
    for call, message in (
        (lambda: ops.batch_norm_stats(x[0]), "batch_norm_stats: x: want float32, bfloat16 or float16"),
        (lambda: ops.batch_norm_stats(x.double()), "x: want .* got float64"),
        (lambda: ops.batch_norm_fold(v, mean_of_five, None, None, 1e-5), r"var: want float32 \[6\], got"),
        (lambda: ops.batch_norm_apply(x, table, x[:1], None, True), r"residual: want float32 \[2, 6, 4, 4\]"),
        (lambda: ops.batch_norm_apply(x, table, None, table, True), "residual: want the tensor that"),
        (lambda: ops.batch_norm_apply_into(x, table, None, None, True, x.half()), "y: want float32"),
        (lambda: ops.batch_norm_apply_into(x, table, None, None, True, x.clone()), "y: want channels side"),
        (lambda: ops.batch_norm_bwd_finish(table, v, v, None, 0), "count: want at least 1"),
        (lambda: ops.batch_norm_update_running(v, v, None, v, v, None, 1, 0.1), "count: want at least 2"),
        (lambda: ops.batch_norm_update_running(v, v, None, v, v, None, 4, None), "momentum: want a number"),
        (lambda: ops.batch_norm_pool(x[:, :, :1], table), "x: want an image of at least 2x2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_the_functional_names_its_kernel(triton_backend):
    x = torch.randn(2, 8, 5, 4, device=triton_backend).requires_grad_()
    running = [torch.zeros(8, device=triton_backend), torch.ones(8, device=triton_backend)]
    stock = [t.clone() for t in running]
    with gconv.trace() as trace:
        y = gconv.functional.batch_norm(x, *running, training=True, relu=True)
    assert [row.kernel for row in trace] == ["triton.batch_norm"]
    want = torch.relu(torch.nn.functional.batch_norm(x, *stock, training=True))
    dy = torch.randn_like(y)
    for got, exact in zip(
        (y, *running, *torch.autograd.grad(y, x, dy)),
        (want, *stock, *torch.autograd.grad(want, x, dy)),
        strict=True,
    ):
        torch.testing.assert_close(got, exact)
