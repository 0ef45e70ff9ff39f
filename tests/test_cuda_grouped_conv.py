"""grouped_conv's forward and input gradient as CUDA kernels, run on the CPU by tests/cuda_host.

Each case runs twice: on arrays of exact size with blocks and warps in their order, and inside guarded buffers
with both shuffled; the two must agree bitwise. Small integers make every sum exact.
"""

import itertools

import grouped_conv_numpy as checks
import numpy as np
import numpy_runs
import pytest
from build_numpy_binding import ROOT
from grouped_conv_numpy import BWD_OPTIONS, FWD_OPTIONS, GEOMETRIES, WIDTHS, Case, name
from numpy_oracle import EPSILON, conv, keep, store, value
from numpy_runs import assert_same, cuda_runs

cuda_kernels = numpy_runs.cuda_kernels  # a fixture

FORMS = [("bfloat16", False), ("float16", False), ("float32", False), ("float32", True)]  # dtype, TF32
ALL_WIDTHS = [*WIDTHS, (12, 12, 4), (40, 40, 2)]
SAME = (1, 1)
# Several images in a tile, a tile that ends within the image, more columns than a tile has, taps further
# apart than a tile is long.
TILES = [
    (9, (7, 7), SAME, SAME, SAME),
    (3, (14, 14), SAME, SAME, SAME),
    (1, (37, 56), SAME, SAME, SAME),
    (1, (5, 301), SAME, SAME, SAME),
    (5, (14, 14), (2, 2), SAME, SAME),
    (1, (40, 41), SAME, (17, 19), (17, 19)),
    (1, (41, 43), (2, 2), (16, 18), (16, 17)),
]


def runs_of(cuda_kernels, form, **options):
    dtype, tf32 = form
    return cuda_runs(cuda_kernels, dtype, tf32=tf32, **options)


def rotated(width, geometries, options):
    """Every form with one geometry and one set of options, other ones for each width."""
    start = ALL_WIDTHS.index(width)
    for i, form in enumerate(FORMS):
        at = start * len(FORMS) + i
        yield form, geometries[at % len(geometries)], options[(at // 3) % len(options)], at


@pytest.mark.parametrize("width", ALL_WIDTHS, ids=name)
def test_fwd(cuda_kernels, width):
    for form, geometry, options, seed in rotated(width, GEOMETRIES, FWD_OPTIONS):
        checks.check_fwd(runs_of(cuda_kernels, form), Case(width, geometry, seed), *options)


@pytest.mark.parametrize("width", ALL_WIDTHS, ids=name)
def test_fwd_stats(cuda_kernels, width):
    shapes = [geometry for geometry in GEOMETRIES if geometry[0] > 0]
    for form, geometry, with_act, seed in rotated(width, shapes, (False, True)):
        checks.check_fwd_stats(runs_of(cuda_kernels, form), Case(width, geometry, seed), with_act)


@pytest.mark.parametrize("width", ALL_WIDTHS, ids=name)
def test_bwd_input(cuda_kernels, width):
    for form, geometry, options, seed in rotated(width, GEOMETRIES[::-1], BWD_OPTIONS):
        checks.check_bwd_input(runs_of(cuda_kernels, form), Case(width, geometry, seed), *options)


@pytest.mark.parametrize("geometry", TILES, ids=str)
def test_tiles(cuda_kernels, geometry):
    widths = itertools.cycle([(4, 4, 9), (16, 16, 1), (8, 8, 3), (5, 3, 2)])
    for seed, (form, width) in enumerate(zip(FORMS, widths)):
        runs, case = runs_of(cuda_kernels, form), Case(width, geometry, seed)
        checks.check_fwd(runs, case, *FWD_OPTIONS[seed])
        checks.check_fwd_stats(runs, case, with_act=True)
        checks.check_bwd_input(runs, case, *BWD_OPTIONS[-1 - seed])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_padded_tap_is_zero_after_the_activation(cuda_kernels, form):
    """With a shift above 0 relu(shift) is not: on the border it would show."""
    for geometry in (GEOMETRIES[0], GEOMETRIES[2], GEOMETRIES[7]):
        case = Case((4, 4, 3), geometry)
        case.act[1] = 2
        checks.check_fwd(runs_of(cuda_kernels, form), case, with_act=True)
        case.finish[2] = 1.5  # what `finish` makes of a gradient of 0
        checks.check_bwd_input(runs_of(cuda_kernels, form), case, with_finish=True)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_channels_in_chunks(cuda_kernels, form):
    """Where a tile with all units does not fit shared memory they come in several chunks."""
    runs = runs_of(cuda_kernels, form, shared_per_block=44 * 1024)
    for geometry, options in ((GEOMETRIES[0], 1), (GEOMETRIES[5], 2), (GEOMETRIES[2], 3)):
        checks.check_fwd(runs, Case((600, 8, 1), geometry), *FWD_OPTIONS[options])
        assert between_chunks(cuda_kernels)
        checks.check_bwd_input(runs, Case((8, 600, 1), geometry), *BWD_OPTIONS[options])
        assert between_chunks(cuda_kernels)
    checks.check_fwd_stats(runs, Case((600, 8, 1), GEOMETRIES[9]))


def between_chunks(cuda_kernels):
    """Whether the last call waited for a chunk to be used before it loaded the next."""
    lines = (ROOT / "csrc" / "cuda" / "grouped_conv_fwd.h").read_text().splitlines()
    barriers = [i for i, line in enumerate(lines, 1) if "unit > 0) block_sync()" in line]
    assert len(barriers) == 1
    return any(place.endswith(f"grouped_conv_fwd.h:{barriers[0]}") for place in cuda_kernels.passed())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_real_values(cuda_kernels, form):
    error = 2.0**-11 if form[1] else 0.0  # of each operand
    for width, geometry in [((4, 4, 8), 1), ((24, 24, 2), 5), ((64, 64, 1), 0)]:
        case = Case(width, GEOMETRIES[geometry], 7)
        runs = runs_of(cuda_kernels, form)
        checks.check_real_values(runs, case, ops=("fwd", "bwd_input"), operand_error=error)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_statistics_of_a_mean_of_a_thousand_deviations(cuda_kernels, form):
    """By the two-pass formula in float32, twice, and a floor: a sum of squares would be wrong by 6e-2."""
    eps = EPSILON["float32"]
    for width, geometry in (((1, 1, 7), TILES[0]), ((8, 8, 2), TILES[2]), ((1, 1, 9), GEOMETRIES[3])):
        case = Case(width, geometry)
        case.weight[:] = 0
        case.weight[:, 0, 1, 1] = 1  # of each group's first channel alone
        case.x = 1000 + case.rng.standard_normal(case.input)
        y, mean, var = checks.run_fwd(runs_of(cuda_kernels, form), case, None, None, None, False, True)
        rows = value(y, form[0]).reshape(-1, case.k)
        own = rows.astype(np.float32)
        own_mean = own.mean(0, dtype=np.float32)
        own_var = np.square(own - own_mean).mean(0, dtype=np.float32)
        want_mean, want_var, std = rows.mean(0), rows.var(0), rows.std(0)
        slack = 2 * np.abs(own_mean - want_mean) + 2 * eps * (np.abs(want_mean) + std)
        assert (np.abs(mean - want_mean) <= slack).all()
        floor = eps * (4 * want_var + np.abs(want_mean) * std) + (4 * eps * want_mean) ** 2
        assert (np.abs(var - want_var) <= 2 * np.abs(own_var - want_var) + floor).all()


def test_of_no_images(cuda_kernels):
    case = Case((4, 4, 2), GEOMETRIES[-1])
    runs = runs_of(cuda_kernels, FORMS[0])
    _, mean, var = checks.run_fwd(runs, case, None, None, None, False, stats=True)
    assert not mean.any() and np.isnan(var).all()
    _, sums = checks.run_bwd_input(runs, case, None, case.mask)
    assert not sums.any()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_gradient_that_repeats_one_pixel(cuda_kernels, form):
    """y.sum().backward(): the strides of dy are 0."""
    dtype, tf32 = form
    run = cuda_kernels.Run(dtype, tf32=tf32)
    for geometry in (GEOMETRIES[0], GEOMETRIES[11]):
        case = Case((8, 8, 3), geometry)
        pixel = store(case.dy[0, 0, 0], dtype)
        dx = []
        for dy in (np.broadcast_to(pixel, case.output), np.tile(pixel, (*case.output[:3], 1))):
            dx.append(store(np.zeros(case.input), dtype))
            weight = store(case.weight, dtype)
            cuda_kernels.grouped_conv_bwd_input(
                run, *case.geometry_arguments(), dy, weight, None, None, None, None, dx[-1], None
            )
        assert_same(value(dx[0], dtype), value(dx[1], dtype), "dx")


def test_offsets_beyond_32_bits(cuda_kernels):
    """Images 2**31 elements apart, in memory that is mostly never touched."""
    case = Case((4, 4, 2), (2, (5, 6), SAME, SAME, SAME))
    run = cuda_kernels.Run("bfloat16")

    def far_apart(stored):
        buffer = np.zeros(2**31 + stored[0].size, np.uint16)
        strides = (2**32, *stored.strides[1:])
        view = np.lib.stride_tricks.as_strided(buffer, stored.shape, strides)
        view[:] = stored
        return view

    x, residual = (far_apart(store(v, "bfloat16")) for v in (case.x, case.residual))
    y = far_apart(store(np.zeros(case.output), "bfloat16"))
    weight = store(case.weight, "bfloat16")
    cuda_kernels.grouped_conv_fwd(
        run, *case.geometry_arguments(), x, weight, None, None, residual, False, y, None, None
    )
    want = conv(case.x, case.weight, *case.geometry) + case.residual
    assert_same(value(y, "bfloat16"), value(store(want, "bfloat16"), "bfloat16"), "y")


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_weights_in_channels_last(cuda_kernels, form):
    dtype, tf32 = form
    case = Case((16, 24, 2), GEOMETRIES[0])
    results = []
    for channels_last in (False, True):
        run = cuda_kernels.Run(dtype, tf32=tf32, channels_last_weight=channels_last)
        weight = store(case.weight, dtype)
        if channels_last:
            weight = np.ascontiguousarray(weight.transpose(0, 2, 3, 1))
        y = store(np.zeros(case.output), dtype)
        x = store(case.x, dtype)
        cuda_kernels.grouped_conv_fwd(
            run, *case.geometry_arguments(), x, weight, None, None, None, False, y, None, None
        )
        results.append(y)
    assert_same(value(results[1], dtype), value(results[0], dtype), "y")


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_nan_and_infinity_keep_to_their_unit(cuda_kernels, form):
    """What is not finite reaches the groups that share a unit of 16 bytes with it, at the same pixels, and no
    others; the ReLU lets NaN through."""
    case = Case((4, 4, 9), GEOMETRIES[0], 5)
    case.x[0, 3, 4, 9] = np.nan
    case.x[1, 0, 0, 20] = np.inf
    with np.errstate(invalid="ignore"):
        got = checks.run_fwd(runs_of(cuda_kernels, form), case, None, None, None, True, stats=False)[0]
        want = conv(case.x, case.weight, *case.geometry)
    got = value(got, form[0])
    assert np.isnan(got[np.isnan(want)]).all()
    finite = np.isfinite(want).reshape(*case.output[:3], -1, 4)
    padded = np.concatenate([finite, np.ones_like(finite[..., :1, :])], 3)  # units of two groups
    shared = padded.reshape(*case.output[:3], -1, 8).all(4).repeat(8, 3)[..., : case.k]
    assert_same(got[shared], np.where(keep(want), want, 0.0)[shared], "y where nothing is lost")
    assert np.count_nonzero(shared) > got.size / 2
