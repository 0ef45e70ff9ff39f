"""The ops of dense blocks: forwards into a slice of a wider buffer, an input gradient added to one, and
normalisation, ReLU and pooling in one pass, against the float64 oracle."""

import contextlib

import checks
import conv_cases
import pytest
import torch
import torch.nn.functional as F
from checks import DTYPES, assert_accurate, assert_exact, assert_same_bits, channel, place
from conv_cases import FWD_VARIANTS, STATS_VARIANTS, Case
from run_together import together

import gconv
from gconv import batch_norm as bn_module
from gconv import grouped_conv as conv_module
from gconv import pointwise_conv as pointwise_module

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
kinds = together(kind=["integer", "normal"])
# Channels before and after a slice, and rows and columns around it: vectors of it are aligned, or not.
PLACES = ((16, 48, 0), (3, 2, 0), (0, 1, 1))
places = pytest.mark.parametrize("at", PLACES, ids=str)


@contextlib.contextmanager
def slice_of(t, at=PLACES[1]):
    """The values of `t` in a slice of a buffer that is NaN elsewhere and must stay so, bit for bit."""
    before, after, around = at
    n, c, h, w = t.shape
    size = (n, h + 2 * around, w + 2 * around, before + c + after)
    buffer = torch.full(size, float("nan"), dtype=t.dtype).permute(0, 3, 1, 2)

    def view(of):
        return of[:, before : before + c, around : around + h, around : around + w]

    view(buffer).copy_(t)
    kept = buffer.clone(memory_format=torch.preserve_format)
    yield view(buffer)
    view(kept).copy_(view(buffer))
    assert_same_bits(buffer, kept, "outside the slice")


def unwritten(shape, dtype):
    return torch.full(list(shape), float("nan"), dtype=dtype)


# ------------------------------------------------------------------------------------------------
# forwards into a slice

GROUPED = [
    Case(*width, 2, 9, 11, *rest)
    for width in ((4, 4, 8), (8, 8, 3), (64, 32, 1), (33, 17, 1), (5, 1, 1), (3, 2, 1), (7, 3, 1))
    for rest in (((1, 1),), ((2, 2), (1, 1), (1, 1)))
]  # fmt: skip
POINTWISE = [
    Case(c, k, 1, n, h, w, stride, (0, 0), (1, 1), 1)
    for c, k, n, h, w, stride in (
        (64, 32, 2, 7, 9, (1, 1)), (300, 17, 1, 9, 8, (2, 2)), (20, 1, 3, 2, 3, (1, 2)),
        (33, 130, 1, 1, 57, (1, 1)), (16, 3, 1, 1, 1, (1, 1)), (5, 2, 2, 6, 5, (2, 1)),
    )
]  # fmt: skip


def into(ops, case, at):
    """fwd and fwd_stats of grouped_conv, by the ops that write to a slice."""

    def run(x, weight, stride, padding, dilation, groups, act, affine, residual, relu, want_stats):
        args = (act, affine, residual, relu, want_stats)
        with slice_of(unwritten(case.output_size, x.dtype), at) as y:
            if case.kernel == 1:
                mean, var = ops.pointwise_conv_fwd_into(x, weight, stride, *args, y)
            else:
                mean, var = ops.grouped_conv_fwd_into(x, weight, stride, padding, dilation, groups, *args, y)
        return place(y, "channels_last"), mean, var

    def fwd(*args):
        y, mean, var = run(*args, False)
        assert mean.shape == var.shape == (0,)
        return y

    return {"fwd": fwd, "fwd_stats": lambda *args: run(*args, None, None, False, True)}


@pytest.mark.parametrize("case", GROUPED + POINTWISE, ids=str)
@dtypes
def test_forward_into_a_slice(isa, ops, case, dtype):
    kind = checks.rotate(("integer", "normal"), str(case), str(dtype))
    at = checks.rotate(PLACES, str(case), str(dtype), kind)
    for name, variants in (("fwd", FWD_VARIANTS), ("fwd_stats", STATS_VARIANTS)):
        variant = checks.rotate(variants, str(case), str(dtype), kind, name)
        conv_cases.VERIFY["grouped_conv_" + name][0](into(ops, case, at)[name], case, dtype, kind, variant)


@pytest.mark.parametrize("case", (*GROUPED[::3], *POINTWISE[::2]), ids=str)
@dtypes
def test_forward_into_a_slice_has_the_bits_of_the_plain_op(isa, ops, case, dtype):
    at = checks.rotate(PLACES, str(case), str(dtype), "bits")
    args = conv_cases.fwd_problem(case, dtype, "normal", "act")[0]
    y, mean, var = into(ops, case, at)["fwd_stats"](*args[:7])
    if case.kernel == 1:
        want = ops.pointwise_conv_fwd_stats(*args[:3], args[6])
    else:
        want = ops.grouped_conv_fwd_stats(*args[:7])
    for got, plain in zip((y, mean, var), want, strict=True):
        assert_same_bits(got, plain)


@pytest.mark.parametrize("winograd_runs", ["never", "always"])
def test_forward_into_a_slice_by_either_algorithm(isa, ops, winograd, winograd_runs):
    winograd(winograd_runs)
    case = Case(128, 32, 1, 1, 12, 13)
    for at in PLACES:
        conv_cases.verify_fwd_stats(into(ops, case, at)["fwd_stats"], case, torch.float32, "normal", "act")


@pytest.mark.parametrize("before", [16, 5], ids=["aligned", "unaligned"])
def test_a_slice_too_large_for_the_caches(ops, isa, before):
    """Above 4 MiB an aligned slice is written past the caches."""
    x, w = place(torch.randn(1, 8, 192, 190), "channels_last"), torch.randn(32, 8, 1, 1)
    w3 = torch.randn(32, 8, 3, 3)
    conf = ([1, 1], [1, 1], [1, 1], 1, None, None, None)
    epilogue = (None, None, None, False)
    affine = torch.randn(2, 32)
    with slice_of(unwritten((1, 32, 192, 190), x.dtype), (before, 3, 0)) as y:
        ops.pointwise_conv_fwd_into(x, w, [1, 1], *epilogue, False, y)
        want = ops.pointwise_conv_fwd(x, w, [1, 1], *epilogue)
        assert_same_bits(y, want)
        ops.batch_norm_apply_into(want, affine, None, None, True, y)
        assert_same_bits(y, ops.batch_norm_apply(want, affine, None, None, True))
        ops.grouped_conv_fwd_into(x, w3, *conf, False, False, y)
        assert_same_bits(y, ops.grouped_conv_fwd(x, w3, *conf, False))


@dtypes
@places
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 33, 7, 5), (3, 64, 2, 3), (0, 4, 3, 3)], ids=str)
def test_apply_into_a_slice(isa, ops, dtype, at, shape):
    gen = checks.generator("apply into", shape)
    x, r = (torch.randn(shape, generator=gen).to(dtype) for _ in range(2))
    affine, residual_affine = torch.randn(2, 2, shape[1], generator=gen)
    for args in ((None, None, True), (r, None, False), (r, residual_affine, True)):
        with slice_of(unwritten(shape, dtype), at) as y:
            assert ops.batch_norm_apply_into(x, affine, *args, y) is None
            assert_same_bits(y, ops.batch_norm_apply(x, affine, *args))
    with slice_of(r, at) as y:  # in place: added to what lies there
        ops.batch_norm_apply_into(x, affine, y, None, False, y)
        assert_same_bits(y, ops.batch_norm_apply(x, affine, r, None, False))
    with slice_of(x, at) as y:
        ops.batch_norm_apply_into(y, affine, r, None, False, y)
        assert_same_bits(y, ops.batch_norm_apply(x, affine, r, None, False))


# ------------------------------------------------------------------------------------------------
# an input gradient added to a slice

# C, K, N, H, W, stride
ADDED = [
    Case(c, k, 1, n, h, w, stride, (0, 0), (1, 1), 1)
    for c, k, n, h, w, stride in (
        (64, 128, 2, 7, 9, (1, 1)), (70, 33, 1, 9, 8, (2, 2)), (3, 16, 3, 2, 3, (1, 2)),
        (1, 20, 1, 29, 31, (1, 1)), (300, 2, 1, 5, 7, (2, 1)), (2, 7, 1, 1, 1, (1, 1)),
        (17, 300, 1, 6, 13, (1, 1)), (130, 8, 1, 3, 57, (2, 2)),
    )
]  # fmt: skip


def added_problem(case, dtype, kind, variant):
    """(arguments of pointwise_conv_bwd_add without its dx, exact (dx, sums, magnitude of the sums), torch's
    own (dx, sums), the dx added to)."""
    args, (g, sums, magnitude), own = conv_cases.bwd_input_problem(case, dtype, kind, variant)
    dy, weight, _, stride, *_, y, finish, x, act = args
    data = conv_cases.Data(case, dtype, kind, "added", variant)
    before = data.activation(case.input_size).to(dtype)
    a = channel(act[0])
    exact = before.double() + a.double() * g
    own = None if own is None else ([before + (a * own_g).to(dtype) for own_g in own[0]], own[1])
    return (dy, x, weight, stride, y, finish, act), (exact, sums, magnitude), own, before


def run_added(ops, args, before, want_dweight=True, at=PLACES[1]):
    with slice_of(before, at) as dx:
        dweight, sums = ops.pointwise_conv_bwd_add(*args, dx, want_dweight, False)
    return dx, dweight, sums


def verify_added(got, exact, own, args, dtype, kind):
    (dx, _, sums), (exact_dx, exact_sums, magnitude) = got, exact
    assert dx.dtype == dtype and sums.dtype == torch.float32
    if kind == "integer":
        assert_exact(dx, exact_dx, "dx")
        assert_exact(sums, exact_sums, "sums")
    else:
        assert_accurate(dx, exact_dx, own[0], "dx")
        assert_accurate(sums, exact_sums, own[1], "sums", dtype, magnitude)


@pytest.mark.parametrize("case", ADDED, ids=str)
@dtypes
@kinds
def test_gradient_added_to_a_slice(isa, ops, case, dtype, kind):
    variant = checks.rotate(("act", "finish_act"), str(case), str(dtype), kind)
    args, exact, own, before = added_problem(case, dtype, kind, variant)
    at = checks.rotate(PLACES, str(case), variant, str(dtype), kind)
    got = run_added(ops, args, before, True, at)
    verify_added(got, exact, own, args, dtype, kind)
    dx, dweight, sums = got
    _, plain_dweight, plain_sums = ops.pointwise_conv_bwd(*args, None, True, True, False)
    assert_same_bits(dweight, plain_dweight, "dweight")
    if dtype is torch.float32:
        assert_same_bits(sums, plain_sums, "sums")
    untouched = torch.ones(case.input_size[2:], dtype=torch.bool)
    untouched[:: case.stride[0], :: case.stride[1]] = False
    assert_same_bits(dx[:, :, untouched], before[:, :, untouched], "pixels that the stride leaves out")
    alone, nothing, same_sums = run_added(ops, args, before, False, at)
    assert nothing.shape == (0,)
    assert_same_bits(alone, dx, "dx without dweight")
    assert_same_bits(same_sums, sums, "sums without dweight")


def test_added_sums_are_of_what_was_not_rounded(isa, ops):
    """In a low precision they are nearer to the exact ones than sums of the stored gradient can be."""
    for dtype in DTYPES[1:]:
        if isa in ("avx512_bf16", "amx_bf16") and dtype is not torch.bfloat16:
            continue
        args, (_, exact, magnitude), _, before = added_problem(ADDED[0], dtype, "normal", "act")
        _, _, sums = run_added(ops, args, before)
        rounded = ops.pointwise_conv_bwd(*args, None, True, False, False)[2]
        error, of_rounded = (((s - exact).abs() / magnitude.clamp_min(1e-3)).max() for s in (sums, rounded))
        assert error < 1e-5 < of_rounded, f"{dtype}: {error} and {of_rounded}"


def test_added_gradients_accumulate(isa, ops):
    """Two layers on one buffer, as in a dense block: exactly their sum on integers."""
    first, second = (Case(c, 24, 1, 2, 7, 6, (1, 1), (0, 0), (1, 1), 1) for c in (20, 33))
    buffer = place(torch.zeros(2, 40, 7, 6), "channels_last")
    total = torch.zeros(2, 40, 7, 6, dtype=torch.float64)
    for case in (second, first):
        args, (exact, *_), _, before = added_problem(case, torch.float32, "integer", "finish_act")
        ops.pointwise_conv_bwd_add(*args, buffer[:, : case.cin], False, False)
        total[:, : case.cin] += exact - before.double()
    assert_exact(buffer, total)


# ------------------------------------------------------------------------------------------------
# normalisation, ReLU and pooling

POOLED = [
    (2, 5, 7, 9), (1, 16, 8, 6), (3, 33, 2, 3), (1, 1, 29, 31), (2, 64, 2, 2), (1, 130, 5, 4), (1, 2, 57, 2),
    (1, 520, 4, 5), (2, 3, 3, 2),
]  # fmt: skip
pooled_shapes = pytest.mark.parametrize("shape", POOLED, ids=str)


def pooled_problem(shape, dtype, kind):
    """(x, act [4, C], dy)"""
    gen = checks.generator("pool", shape, str(dtype), kind)
    n, c, h, w = shape
    size = (n, c, h // 2, w // 2)
    if kind == "integer":
        x, dy = checks.integers(shape, 4, gen), 4 * checks.integers(size, 4, gen)
        values = (-1.0, 1.0, 2.0), (-2.0, 0.0, 1.0, 3.0), (-1.0, 0.0, 2.0), (0.5, 1.0, 2.0)
        act = torch.stack([checks.choice((c,), v, gen) for v in values])
    else:
        x, dy = torch.randn(shape, generator=gen), torch.randn(size, generator=gen)
        act = torch.randn(4, c, generator=gen) + 0.5
        x = checks.clear_of_kink(x.to(dtype), act[0], act[1], 1e-4)
    return x.to(dtype), act, dy.to(dtype)


def pool_oracle(work, x, act, dy):
    """(y, dx, sums, magnitude of the sums) by autograd."""
    a, b, mean, rstd = checks.vectors(act, work)
    z = (a * x.to(work) + b).to(work).detach().requires_grad_()
    with torch.enable_grad():
        y = F.avg_pool2d(torch.relu(z), 2)
    (g,) = torch.autograd.grad(y, z, dy.to(work))
    wide = g.to(mean.dtype)
    terms = torch.stack([wide, wide * (x.to(mean.dtype) - mean) * rstd])
    dims = (1, 3, 4)
    return y.detach(), (a * g).to(work), terms.sum(dims), terms.square().sum(dims).sqrt()


def verify_pooled(got, x, act, dy, kind):
    """got: (y, dx, sums)"""
    *exact, magnitude = pool_oracle(torch.float64, x, act, dy)
    own = pool_oracle(x.dtype, x, act, dy)
    for name, actual, want, other in zip(("y", "dx", "sums"), got, exact, own):
        low = name != "sums"
        assert actual.dtype == (x.dtype if low else torch.float32)
        if kind == "integer":
            assert_exact(actual, want, name)
        else:
            dtype = x.dtype if low else torch.float32
            assert_accurate(actual, want, other, name, dtype, None if low else magnitude)


def run_pooled(ops, x, act, dy, at=PLACES[1], want_y=True):
    with slice_of(unwritten(x.shape, x.dtype), at) as dx:
        sums, y = ops.batch_norm_pool_bwd(dy, x, act, want_y, dx)
    return y, dx, sums


@pooled_shapes
@dtypes
@kinds
def test_pool_and_its_backward(isa, ops, shape, dtype, kind):
    x, act, dy = pooled_problem(shape, dtype, kind)
    key = (shape, str(dtype), kind)
    x = place(x, checks.rotate(checks.LAYOUTS, *key, "x"))
    dy = place(dy, checks.rotate(checks.LAYOUTS, *key, "dy"))
    y = ops.batch_norm_pool(x, act[:2])
    checks.assert_channels_last(y)
    again, dx, sums = run_pooled(ops, x, act, dy, checks.rotate(PLACES, *key))
    assert_same_bits(again, y, "the forward's output in the backward")
    verify_pooled((y, dx, sums), x, act, dy, kind)
    h, w = 2 * y.shape[2], 2 * y.shape[3]
    assert not dx[:, :, h:].any() and not dx[..., w:].any(), "a dropped row or column has no gradient"
    nothing, other_dx, other_sums = run_pooled(ops, x, act, dy, PLACES[0], False)
    assert nothing.shape == (0,) and nothing.dtype == dtype
    assert_same_bits(other_dx, dx)
    assert_same_bits(other_sums, sums)


def test_pool_of_many_values_far_from_zero(isa, ops):
    """Sums over many squares keep what plain float32 would lose."""
    gen = checks.generator("pool of many")
    x = place(torch.randn(2, 5, 130, 121, generator=gen) + 100, "channels_last")
    act = torch.stack([torch.ones(5), torch.ones(5), torch.full((5,), 100.0), torch.ones(5)])
    dy = torch.randn(2, 5, 65, 60, generator=gen) + 3
    verify_pooled(run_pooled(ops, x, act, dy), x, act, dy, "normal")


def test_pool_lets_nan_through_and_blocks_at_zero(isa, ops):
    x = torch.zeros(1, 20, 5, 4)
    act = torch.stack([torch.ones(20), torch.zeros(20), torch.zeros(20), torch.ones(20)])
    dy = torch.ones(1, 20, 2, 2)
    y, dx, sums = run_pooled(ops, x, act, dy)
    assert not y.any() and not dx.any() and not sums.any()
    x[0, 3, 2, 1] = float("nan")
    x[0, 5, 4, 1] = float("nan")  # in the dropped row
    y, dx, sums = run_pooled(ops, x, act, dy)
    assert y[0, 3, 1, 0].isnan() and y.isnan().sum() == 1
    assert dx[0, 3, 2, 1] == 0.25 and dx.count_nonzero() == 1
    assert sums[0, 3] == 0.25 and sums[1, 3].isnan() and sums.isnan().sum() == 1


# ------------------------------------------------------------------------------------------------
# determinism, empty batches, references


def everything(ops, dtype, n):
    """Results of all the ops on one buffer of n images, of a size that several threads share."""
    gen = checks.generator("everything", n)
    activation = [
        place(torch.randn(n, 96, 31, 29, generator=gen).to(dtype), "channels_last") for _ in range(4)
    ]
    x, dy, y, r = activation
    x = x[:, :72]
    act = torch.randn(4, 72, generator=gen) + 0.5
    w1, w3 = torch.randn(96, 72, 1, 1, generator=gen).to(dtype), torch.randn(24, 72, 3, 3, generator=gen)
    conf = ([1, 1], [1, 1], [1, 1], 1)
    finish = torch.rand(6, 96, generator=gen)
    results = {}

    def slot(name, t):
        results[name] = t.clone(memory_format=torch.preserve_format)
        return results[name]

    grown = slot("grown", r)[:, 72:]
    results["mean"], results["var"] = ops.grouped_conv_fwd_into(
        x, w3.to(dtype), *conf, act[:2], None, None, False, True, grown
    )
    wide = slot("wide", r)
    results["wide mean"], results["wide var"] = ops.pointwise_conv_fwd_into(
        x, w1, [1, 1], act[:2], None, None, False, True, wide
    )
    dx = slot("dx", y)[:, 8:80]
    results["dweight"], results["sums"] = ops.pointwise_conv_bwd_add(
        dy, x, w1, [1, 1], y, finish, act, dx, True, False
    )
    applied = slot("applied", r)[:, 24:]
    ops.batch_norm_apply_into(x, act[:2], applied, None, False, applied)
    results["pool"] = ops.batch_norm_pool(x, act[:2])
    unpooled = slot("unpooled", r)[:, :72]
    results["pool sums"], results["pool again"] = ops.batch_norm_pool_bwd(
        results["pool"], x, act, True, unpooled
    )
    return results


@dtypes
def test_same_bits_for_any_number_of_threads_and_any_run(isa, ops, threads, dtype):
    threads(2)
    want = everything(ops, dtype, 2)
    for number in (2, 1, 3, 4):
        threads(number)
        for name, got in everything(ops, dtype, 2).items():
            assert_same_bits(got, want[name], f"{name} with {number} threads")


@dtypes
def test_zero_batch(isa, ops, dtype):
    got = everything(ops, dtype, 0)
    for name in ("mean", "var", "wide mean", "wide var"):
        assert got[name].isnan().all(), name
    for name in ("dweight", "sums", "pool sums"):
        assert not got[name].any() and got[name].numel(), name
    assert got["pool"].shape == (0, 72, 15, 14)


@dtypes
def test_references(ops, dtype):
    """What runs without the extension gives the same, within rounding."""

    class References:
        grouped_conv_fwd_into = staticmethod(conv_module.grouped_conv_fwd_into_ref)
        pointwise_conv_fwd_into = staticmethod(pointwise_module.pointwise_conv_fwd_into_ref)
        pointwise_conv_bwd_add = staticmethod(pointwise_module.pointwise_conv_bwd_add_ref)
        batch_norm_apply_into = staticmethod(bn_module.batch_norm_apply_into_ref)
        batch_norm_pool = staticmethod(bn_module.batch_norm_pool_ref)
        batch_norm_pool_bwd = staticmethod(bn_module.batch_norm_pool_bwd_ref)

    want, got = everything(References, dtype, 2), everything(ops, dtype, 2)
    eps = torch.finfo(dtype).eps
    for name, reference in want.items():
        assert got[name].dtype == reference.dtype and got[name].shape == reference.shape, name
        error = (got[name].double() - reference.double()).norm() / reference.double().norm()
        assert error < max(eps, 1e-5), f"{name}: {error}"
    for name, handle in (
        ("grouped_conv_fwd_into", conv_module.fwd_into),
        ("pointwise_conv_fwd_into", pointwise_module.fwd_into),
        ("pointwise_conv_bwd_add", pointwise_module.bwd_add),
        ("batch_norm_apply_into", bn_module.apply_into),
        ("batch_norm_pool", bn_module.pool),
        ("batch_norm_pool_bwd", bn_module.pool_bwd),
    ):
        assert handle is getattr(torch.ops.gconv, name).default


# ------------------------------------------------------------------------------------------------
# what is refused, and defects that the checks must see

X, Y = (place(torch.zeros(2, c, 4, 5), "channels_last") for c in (8, 12))
W1, W3 = torch.zeros(12, 8, 1, 1), torch.zeros(12, 8, 3, 3)
CONF, ACT = ([1, 1], [1, 1], [1, 1], 1), torch.ones(4, 8)
BAD = {
    "another shape": ("pointwise_conv_fwd_into", 8, Y[..., 1:], "y: want float32 [2, 12, 4, 5], got float32"),
    "another dtype": ("pointwise_conv_fwd_into", 8, Y.half(), "y: want float32 [2, 12, 4, 5], got float16"),
    "contiguous": ("pointwise_conv_fwd_into", 8, Y.contiguous(), "y: want channels side by side"),
    "expanded": ("pointwise_conv_fwd_into", 8, Y[:1].expand(2, 12, 4, 5), "y: want channels side by side"),
    "statistics and ReLU": ("pointwise_conv_fwd_into", 6, True, "want_stats: want false with affine"),
    "3x3, contiguous": ("grouped_conv_fwd_into", 11, Y.contiguous(), "y: want channels side by side"),
    "3x3, another shape": ("grouped_conv_fwd_into", 11, X, "y: want float32 [2, 12, 4, 5], got float32"),
    "dx of another shape": ("pointwise_conv_bwd_add", 7, Y, "dx: want float32 [2, 8, 4, 5], got float32"),
    "dx contiguous": ("pointwise_conv_bwd_add", 7, X.contiguous(), "dx: want channels side by side"),
    "two rows of act": ("pointwise_conv_bwd_add", 6, ACT[:2], "act: want float32 [4, 8], got float32 [2, 8]"),
    "apply, contiguous": ("batch_norm_apply_into", 5, X.contiguous(), "y: want channels side by side"),
    "pool of one row": ("batch_norm_pool", 0, X[:, :, :1], "x: want an image of at least 2x2, got float32"),
    "dy not pooled": ("batch_norm_pool_bwd", 0, X, "dy: want float32 [2, 8, 2, 2], got float32 [2, 8, 4, 5]"),
    "dx expanded": ("batch_norm_pool_bwd", 4, X[:, :, :1].expand(X.shape), "dx: want channels side by side"),
}
GOOD = {
    "grouped_conv_fwd_into": (X, W3, *CONF, ACT[:2], None, None, False, True, Y),
    "pointwise_conv_fwd_into": (X, W1, [1, 1], None, None, None, False, True, Y),
    "pointwise_conv_bwd_add": (Y, X, W1, [1, 1], None, None, ACT, X.clone(), True, False),
    "batch_norm_apply_into": (X, ACT[:2], None, None, True, X.clone()),
    "batch_norm_pool": (X, ACT[:2]),
    "batch_norm_pool_bwd": (X[:, :, :2, :2], X, ACT, True, X.clone()),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_in_one_line(ops, name):
    op, place_of, wrong, message = BAD[name]
    good = list(GOOD[op])
    getattr(ops, op)(*good)
    good[place_of] = wrong
    with pytest.raises(RuntimeError) as error:
        getattr(ops, op)(*good)
    assert str(error.value).startswith(f"{op}: {message}") and "\n" not in str(error.value)


def test_the_checks_notice(ops):
    with pytest.raises(AssertionError, match="outside the slice"), slice_of(torch.zeros(2, 4, 3, 3)) as y:
        y._base.permute(0, 3, 1, 2)[1, 0, 0, 0] = 1
    case = ADDED[0]
    args, exact, own, before = added_problem(case, torch.float32, "normal", "act")
    dx, dweight, sums = run_added(ops, args, before)
    verify_added((dx, dweight, sums), exact, own, args, torch.float32, "normal")
    for wrong in ((dx - before, dweight, sums), (dx * 1.01, dweight, sums), (dx, dweight, sums * 1.01)):
        with pytest.raises(AssertionError):
            verify_added(wrong, exact, own, args, torch.float32, "normal")
    x, act, dy = pooled_problem(POOLED[0], torch.float32, "integer")
    y, dx, sums = run_pooled(ops, x, act, dy)
    for wrong in (
        (y, 4 * dx, sums),
        (y, dx.roll(1, 3), sums),
        (y.roll(1, 2), dx, sums),
        (y, dx, sums.flip(0)),
    ):
        with pytest.raises(AssertionError):
            verify_pooled(wrong, x, act, dy, "integer")


def test_a_padded_tap_is_zero_after_the_relu(isa, ops):
    """Not relu(shift): of an all-zero image only what lies inside it counts."""
    x, w = torch.zeros(1, 8, 3, 3), torch.ones(5, 8, 3, 3)
    act = torch.stack([torch.ones(8), torch.full((8,), 2.0)])
    with slice_of(unwritten((1, 5, 3, 3), x.dtype)) as y:
        ops.grouped_conv_fwd_into(x, w, *CONF, act, None, None, False, False, y)
    taps = torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]])
    assert torch.equal(y, (16 * taps).expand(1, 5, 3, 3))


def test_running_the_ops_records_nothing(ops):
    """They are stages: who calls them says in a trace what ran."""
    with gconv.trace() as t:
        ops.batch_norm_pool(X, ACT[:2])
    assert len(t) == 0
