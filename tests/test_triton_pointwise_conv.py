"""The Triton kernels of pointwise_conv against the float64 oracle: under Triton's interpreter on any machine
(TRITON_INTERPRET=1), compiled on a GPU.

bfloat16 is tested on a GPU alone: the interpreter computes it wrongly.
"""

import math

import checks
import pointwise_cases
import pytest
import torch
import torch.nn.functional as F
from checks import (
    EXPANDED,
    assert_accurate,
    assert_exact,
    assert_same_bits,
    assert_statistics,
    place,
)
from pointwise_cases import BAD_BWD, CORE, VERIFY, all_args, all_ops, as_grouped, case_of

import gconv
from gconv import gpu

if gpu.missing_triton() is not None:
    pytest.skip(gpu.missing_triton(), allow_module_level=True)
if not (gpu.interpreting() or torch.cuda.is_available()):
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

from gconv.bench import tune
from gconv.kernels import pointwise_conv, verbs

pytestmark = pytest.mark.usefixtures("nan_filled_memory", "precision")
needs_cuda = pytest.mark.skipif(
    gpu.interpreting() or not torch.cuda.is_available(), reason="bfloat16: needs a GPU, not the interpreter"
)
DTYPES = (torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_cuda))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: checks.dtype_name(dtype))
DEVICE = "cpu" if gpu.interpreting() else "cuda"


@pytest.fixture
def precision():
    """Products of float32 in float32, as the oracle's bounds assume; undone afterwards. Gives the setter."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"
    yield lambda name: setattr(conv, "fp32_precision", name)
    conv.fp32_precision = before


def moved(t, device):
    """t in memory of its own on the device, with the same strides and whatever lies between its elements."""
    storage = torch.empty(t.untyped_storage().nbytes(), dtype=torch.uint8, device=device)
    source = torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())
    storage.copy_(source)
    return torch.empty(0, dtype=t.dtype, device=device).set_(
        storage.untyped_storage(), t.storage_offset(), t.shape, t.stride()
    )


class Launchers:
    """The launchers under the ops' names, for tensors on the CPU wherever the kernels run."""

    def __getattr__(self, name):
        launcher = getattr(pointwise_conv, name)

        def call(*args):
            if DEVICE == "cpu":
                return launcher(*args)
            there = [moved(a, DEVICE) if isinstance(a, torch.Tensor) else a for a in args]
            result = launcher(*there)
            for a, b in zip(args, there):
                if isinstance(a, torch.Tensor):  # what was written in place
                    a.untyped_storage().copy_(moved(b, "cpu").untyped_storage())
            return (
                moved(result, "cpu")
                if isinstance(result, torch.Tensor)
                else tuple(moved(t, "cpu") for t in result)
            )

        return call


KERNELS = Launchers()
RUN = as_grouped(KERNELS)


# ------------------------------------------------------------------------------------------------
# against the oracle


@each_dtype
@pytest.mark.parametrize("case", CORE, ids=str)
@pytest.mark.parametrize("name, variant", [(n, v) for n, (_, vs) in VERIFY.items() for v in vs])
def test_every_variant(case, dtype, name, variant):
    kinds = (
        ["integer", "normal"]
        if case is CORE[0]
        else [checks.rotate(("integer", "normal"), case, name, variant)]
    )
    for kind in kinds:
        VERIFY[name][0](RUN[name], case, dtype, kind, variant)


# One channel, full tiles, one more than a tile on each side; one pixel; rows and images that end in a tile.
CASES = (
    case_of(1, 1, 1, 1, 1), case_of(1, 130, 1, 3, 5, (2, 1)), case_of(129, 1, 2, 3, 3),
    case_of(64, 64, 1, 8, 8), case_of(65, 136, 3, 5, 5), case_of(24, 56, 1, 13, 11, (2, 2)),
    case_of(32, 128, 1, 12, 12), case_of(3, 7, 5, 2, 2, (1, 2)),
)  # fmt: skip


@each_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", VERIFY)
def test_sizes(case, dtype, name):
    check, variants = VERIFY[name]
    check(RUN[name], case, dtype, "integer", checks.rotate(variants, str(case), name, str(dtype)))
    check(RUN[name], case, dtype, "normal", variants[-1])


TILED = (
    ("fwd_stats", "act"),
    ("bwd_input", "act"),
    ("bwd_input", "finish_act"),
    ("bwd_weight", "finish_act"),
)
PRECISIONS = [
    (torch.float32, "ieee"), (torch.float32, "tf32"), (torch.float16, "ieee"),
    pytest.param(torch.bfloat16, "ieee", marks=needs_cuda),
]  # fmt: skip


@pytest.mark.parametrize("dtype, name", PRECISIONS, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("width", [(40, 20), (130, 20), (20, 130), (72, 130)], ids=str)
def test_tiles_of_large_problems(monkeypatch, precision, dtype, name, width):
    """Chosen here for a small one. Integers are exact in TF32 as well."""
    precision(name)
    monkeypatch.setattr(pointwise_conv, "BUSY", 0)
    with tune.lookups(pointwise_conv) as keys:
        for op, variant in TILED:
            VERIFY[op][0](RUN[op], case_of(*width, 1, 9, 15), dtype, "integer", variant)
    assert {size for rows, _, size, _ in keys if rows == "pixels"} <= {"wide", "narrow"}


def test_a_dot_that_a_gpu_refuses_is_refused_by_the_interpreter_too():
    with pytest.raises(AssertionError, match=r"tl.dot: want at least 16"):
        verbs.dot_tile(64, 64, 8)


# ------------------------------------------------------------------------------------------------
# several programs for one result


@each_dtype
@pytest.mark.parametrize("variant", ["plain", "finish_act"])
def test_weight_gradient_of_several_splits(dtype, variant):
    case = case_of(20, 24, 2, 28, 29)
    assert case.n * case.h * case.w > 3 * pointwise_conv.SPLIT_PIXELS
    for kind in ("integer", "normal"):
        VERIFY["bwd_weight"][0](RUN["bwd_weight"], case, dtype, kind, variant)


def test_statistics_and_sums_of_many_tiles(monkeypatch):
    """Two levels of merging; a mean a thousand times the deviation."""
    monkeypatch.setattr(verbs, "ONE_LEVEL", 16)
    gen = checks.generator("many tiles")
    x = torch.randn(1, 3, 31, 37, generator=gen) + 1000
    assert 64 * verbs.ONE_LEVEL < 31 * 37
    w = torch.eye(3)[:, :, None, None]
    y, mean, var = KERNELS.pointwise_conv_fwd_stats(place(x, "channels_last"), w, [1, 1], None)
    assert_exact(y, x.double())
    assert_statistics(mean, var, y)
    dy, act = checks.integers(x.shape, 2, gen), torch.tensor([[1.0] * 3, [0.0] * 3, [1000.0] * 3, [2.0] * 3])
    x = x.round()
    _, _, sums = KERNELS.pointwise_conv_bwd(dy, x, w, [1, 1], None, None, act, None, True, False, False)
    exact = torch.stack([dy.double().sum((0, 2, 3)), (dy.double() * (x.double() - 1000) * 2).sum((0, 2, 3))])
    assert_exact(sums, exact)


@pytest.mark.parametrize("tiles, channels", [(1, 5), (100, 33), (300, 40)])
def test_merging_beside_all_values_at_once(tiles, channels):
    """Tiles of any size, empty ones among them."""
    gen = checks.generator("merging", tiles)
    counts = torch.randint(0, 60, (tiles,), generator=gen)
    counts[0] = 7
    values = [torch.randn(int(n), channels, generator=gen) * 2 + 50 for n in counts]
    partial = verbs.statistics_scratch(torch.empty(0, device=DEVICE), tiles, channels)
    means, squares = partial[: 2 * tiles * channels].view(2, tiles, channels)
    for tile, v in enumerate(values):
        mean = v.double().mean(0) if len(v) else torch.zeros(channels)
        means[tile], squares[tile] = mean, (v - mean).square().sum(0)
    partial[2 * tiles * channels :] = counts
    mean, var = verbs.merge_statistics(partial, tiles, channels)
    everything = torch.cat(values)
    assert_statistics(mean.cpu(), var.cpu(), everything.T[None, :, :, None])

    sums = checks.integers((tiles, 2, channels), 9, gen).to(DEVICE)
    for wide in (True, False):
        out = torch.empty(2, channels, device=DEVICE)
        verbs.merge_sums(sums, out, wide)
        assert_exact(out, sums.double().sum(0))


@each_dtype
def test_results_repeat_bit_for_bit(dtype):
    args = all_args(case_of(20, 24, 2, 9, 11), dtype)
    first, second = all_ops(KERNELS, args), all_ops(KERNELS, args)
    for name, want in first.items():
        assert_same_bits(second[name], want, name)


# ------------------------------------------------------------------------------------------------
# both gradients in one op


@each_dtype
@pytest.mark.parametrize("case", CORE, ids=str)
def test_both_gradients_are_those_alone(case, dtype):
    pointwise_cases.verify_both(KERNELS, case, dtype)


@each_dtype
@pytest.mark.parametrize("finish", [False, True])
@pytest.mark.parametrize("case", CORE, ids=str)
def test_residual_joins_dx_before_it_is_rounded(case, dtype, finish):
    pointwise_cases.verify_residual(KERNELS, case, dtype, finish)


def slice_of_nan(t):
    """(a slice of a channels_last buffer that is NaN elsewhere, holding t; a copy of the buffer's memory)"""
    view = place(t, "sliced")
    return view, view.untyped_storage().clone()


def assert_nothing_else_written(view, before):
    """What lies around the slice is as it was."""
    was = torch.empty(0, dtype=view.dtype).set_(before, view.storage_offset(), view.shape, view.stride())
    was.copy_(view)
    now = torch.empty(0, dtype=torch.uint8).set_(view.untyped_storage())
    assert torch.equal(now, torch.empty(0, dtype=torch.uint8).set_(before))


@each_dtype
@pytest.mark.parametrize("finish", [False, True])
@pytest.mark.parametrize("case", CORE, ids=str)
@pytest.mark.parametrize("kind", ["integer", "normal"])
def test_gradient_added_in_place(case, dtype, finish, kind):
    a = all_args(case, dtype, kind)
    a["act"][:2], a["act"][2:] = a["act"][:2].clone(), a["act"][2:].flip(0)
    if kind == "normal":
        a["x"] = checks.clear_of_kink(a["x"], a["act"][0], a["act"][1], 1e-4)
        a["dy"] = checks.zero_near_kink(a["dy"], a["y"], a["finish"][4], a["finish"][5], 1e-4)
    gradient = (a["y"], a["finish"]) if finish else (None, None)
    args = a["dy"], a["x"], a["w"], a["stride"], *gradient, a["act"]
    dx, before = slice_of_nan(a["dresidual"])
    dweight, sums = KERNELS.pointwise_conv_bwd_add(*args, dx, True, False)
    assert_nothing_else_written(dx, before)

    base = a["dy"], a["w"], case.input_size, *case.geometry, *gradient, a["x"], a["act"]
    results = [checks.ref_bwd_input(work, *base) for work in (torch.float64, dtype)]
    (exact, exact_sums, magnitude), (own, own_sums, _) = results
    scale = checks.channel(a["act"][0].double())
    exact = a["dresidual"].double() + scale * exact
    own = (a["dresidual"].double() + scale * own.double()).to(dtype)
    other = KERNELS.pointwise_conv_bwd(*args, None, False, True, False)[1]
    assert_same_bits(dweight, other, "dweight")
    if kind == "integer":
        assert_exact(dx, exact, "dx")
        assert_exact(sums, exact_sums, "sums")
    else:
        assert_accurate(dx, exact, own, "dx", dtype, a["dresidual"].abs())
        assert_accurate(sums, exact_sums, own_sums, "sums", dtype, magnitude)


@each_dtype
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("case", CORE, ids=str)
def test_forward_into_a_slice(case, dtype, stats):
    a = all_args(case, dtype)
    epilogue = (None, None, False) if stats else (a["affine"], a["residual"], True)
    base = a["x"], a["w"], a["stride"], a["act"][:2]
    want = KERNELS.pointwise_conv_fwd(*base, *epilogue)
    y, before = slice_of_nan(torch.full(case.output_size, math.nan, dtype=dtype))
    mean, var = KERNELS.pointwise_conv_fwd_into(*base, *epilogue, stats, y)
    assert_same_bits(y, want)
    assert_nothing_else_written(y, before)
    if stats:
        assert_statistics(mean, var, y)
    else:
        assert mean.shape == var.shape == (0,)


# ------------------------------------------------------------------------------------------------
# memory layouts


@each_dtype
@pytest.mark.parametrize("layout", checks.LAYOUTS)
def test_layout_does_not_change_a_bit(dtype, layout):
    pointwise_cases.verify_layout(KERNELS, CORE[1], dtype, layout)


@each_dtype
@pytest.mark.parametrize("how", EXPANDED)
def test_stride_0(dtype, how):
    pointwise_cases.verify_stride_0(KERNELS, CORE[1], dtype, how)


# ------------------------------------------------------------------------------------------------
# special values


@each_dtype
def test_no_images(dtype):
    got = all_ops(KERNELS, all_args(case_of(5, 6, 0, 4, 4), dtype))
    for name in ("fwd", "y"):
        assert got[name].shape == (0, 6, 4, 4)
    for name in ("dx", "joined"):
        assert got[name].shape == (0, 5, 4, 4)
    assert got["mean"].shape == got["var"].shape == (6,)
    for name, shape in (("dw", (6, 5, 1, 1)), ("plain_dw", (6, 5, 1, 1)), ("sums", (2, 5))):
        assert_exact(got[name], torch.zeros(shape, dtype=torch.float64), name)


@each_dtype
def test_relu_and_its_masks_let_nan_through_and_block_at_zero(dtype):
    x, w = torch.ones(1, 4, 3, 3, dtype=dtype), torch.eye(4, dtype=dtype)[:, :, None, None]
    nan, one = torch.full_like(x, math.nan), torch.stack([torch.ones(4), torch.zeros(4)])
    base = [1, 1], one
    assert KERNELS.pointwise_conv_fwd(nan, w, *base, None, None, True).isnan().all()
    act, finish = torch.cat([one, one.flip(0)]), torch.cat([one, one * 0, one])
    finish[1] = 0
    for value in (nan, x * 0, -x, x):
        passes = ~(value <= 0)
        masked = KERNELS.pointwise_conv_bwd(x, value, w, [1, 1], None, None, act, None, True, False, False)[0]
        assert_exact(masked, passes.double())
        if not value.isnan().any():  # B*(y - mean) is NaN with y
            args = x, x, w, [1, 1], value, finish, None, None, True, False, False
            assert_exact(KERNELS.pointwise_conv_bwd(*args)[0], passes.double())


# ------------------------------------------------------------------------------------------------
# under the functions, and bad input


@pytest.mark.parametrize("stride", [1, 2])
def test_function_and_gradients_beside_torch(stride):
    gen = checks.generator("triton function", stride)
    x, w = torch.randn(2, 24, 8, 7, generator=gen), torch.randn(40, 24, 1, 1, generator=gen) / 5
    b = torch.randn(40, generator=gen)

    def run(conv, dtype, device="cpu"):
        leaves = [t.detach().to(device, dtype).requires_grad_() for t in (x, w, b)]
        y = conv(*leaves, stride)
        y.square().sum().backward()
        return [t.cpu() for t in (y.detach(), *(leaf.grad for leaf in leaves))]

    with gconv.use_backend("triton"), gconv.trace() as t:
        got = run(gconv.functional.pointwise_conv, torch.float32, DEVICE)
    assert [row.kernel for row in t] == ["triton.pointwise_conv"]
    for name, *tensors in zip(
        ("y", "dx", "dw", "db"), got, run(F.conv2d, torch.float64), run(F.conv2d, torch.float32)
    ):
        assert_accurate(*tensors, name)


@pytest.mark.parametrize("name", BAD_BWD)
def test_bwd_refuses(name):
    pointwise_cases.verify_bwd_refuses(pointwise_conv, *BAD_BWD[name])


def test_fwd_refuses():
    x, w = torch.zeros(2, 8, 4, 4), torch.zeros(5, 8, 1, 1)
    fwd, into, base = "pointwise_conv_fwd", "pointwise_conv_fwd_into", (x, w, [1, 1])
    for op, rest, message in (
        (fwd, (torch.zeros(4, 8), None, None, False), "act: want float32 [2, 8], got float32 [4, 8]"),
        (fwd, (None, torch.zeros(2, 8), None, False), "affine: want float32 [2, 5]"),
        (fwd, (None, None, x, False), "residual: want float32 [2, 5, 4, 4]"),
        (into, (None, None, None, True, True, x), "want_stats: want none of affine, residual and relu"),
        (into, (None, None, None, False, False, x), "y: want float32 [2, 5, 4, 4]"),
        (
            into, (None, None, None, False, False, torch.zeros(2, 5, 4, 4)),
            "y: want channels side by side, got strides [80, 16, 4, 1]",
        ),
    ):  # fmt: skip
        with pytest.raises(RuntimeError) as error:
            getattr(pointwise_conv, op)(*base, *rest)
        assert f"{op}: {message}" in str(error.value)
