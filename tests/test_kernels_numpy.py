"""The torch-free kernels on NumPy arrays: every instruction set, storage type and width, against float64.

Small integers (and halves) make every sum exact, so results are compared bit by bit. Each case runs twice: on
arrays of exact size with one thread, and inside guarded buffers with three; the two must agree bitwise.
`make sanitize` runs this file under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import itertools

import numpy as np
import numpy_runs
import pytest
from grouped_conv_numpy import (
    BWD_OPTIONS,
    FWD_OPTIONS,
    GEOMETRIES,
    WIDTHS,
    Case,
    check_bwd_input,
    check_bwd_weight,
    check_fwd,
    check_fwd_stats,
    check_real_values,
    name,
    run_bwd_input,
    run_bwd_weight,
    run_fwd,
)
from numpy_oracle import (
    Exact,
    act,
    conv,
    conv_bwd_input,
    conv_bwd_weight,
    keep,
    store,
    value,
)
from numpy_runs import assert_same, both_ways, cpu_runs, integers, table
from run_together import together

kernels, isa, dtype = numpy_runs.kernels, numpy_runs.isa, numpy_runs.dtype  # fixtures


def run_bwd(runs, case, finish, mask):
    def call(run, arrays):
        dx, dweight = arrays.output(case.input), arrays.flat_output(case.weight_shape)
        sums = arrays.table_output(2, case.c) if mask is not None else None
        runs.kernels.grouped_conv_bwd(
            run, *case.geometry_arguments(),
            arrays.activation(store(case.dy, runs.dtype)), arrays.activation(store(case.x, runs.dtype)),
            arrays.flat(store(case.weight, runs.dtype)),
            None if finish is None else arrays.activation(store(case.y, runs.dtype)),
            None if finish is None else arrays.table(table(finish)),
            None if mask is None else arrays.table(table(mask)),
            dx, dweight, sums,
        )  # fmt: skip
        return [dx, dweight] if mask is None else [dx, dweight, sums]

    return runs.both(call)


# Each width directly, and by Winograd's algorithm where its groups fill a vector of some instruction set.
ALGORITHMS = [pytest.param(width, "never", id=name(width)) for width in WIDTHS] + [
    pytest.param(width, "always", id=f"{name(width)}-winograd") for width in WIDTHS if min(width[:2]) >= 4
]
each_algorithm = pytest.mark.parametrize("width, winograd", ALGORITHMS)


def cases(width, winograd):
    """The cases of one width; Winograd's algorithm leaves strides and dilations to the direct one."""
    for seed, geometry in enumerate(GEOMETRIES):
        _, _, stride, _, dilation = geometry
        if winograd == "never" or stride == dilation == (1, 1):
            yield Case(width, geometry, seed)


@each_algorithm
def test_conv_fwd_exact(kernels, isa, dtype, width, winograd):
    runs = cpu_runs(kernels, isa, dtype, winograd)
    for case in cases(width, winograd):
        for options in FWD_OPTIONS:
            check_fwd(runs, case, *options)


@each_algorithm
def test_conv_fwd_stats(kernels, isa, dtype, width, winograd):
    runs = cpu_runs(kernels, isa, dtype, winograd)
    for case in cases(width, winograd):
        if 0 in case.output:
            continue  # no value, no moments
        for with_act in (False, True):
            check_fwd_stats(runs, case, with_act)


@each_algorithm
def test_conv_bwd_input_exact(kernels, isa, dtype, width, winograd):
    runs = cpu_runs(kernels, isa, dtype, winograd)
    for case in cases(width, winograd):
        for options in BWD_OPTIONS:
            check_bwd_input(runs, case, *options)


@each_algorithm
def test_conv_bwd_weight_exact(kernels, isa, dtype, width, winograd):
    runs = cpu_runs(kernels, isa, dtype, winograd)
    for case in cases(width, winograd):
        for options in BWD_OPTIONS:
            check_bwd_weight(runs, case, *options)


@each_algorithm
def test_conv_bwd_is_both_gradients(kernels, isa, dtype, width, winograd):
    runs = cpu_runs(kernels, isa, dtype, winograd)
    for case in cases(width, winograd):
        for finish, mask in ((None, None), (case.finish, None), (case.finish, case.mask)):
            dx, dweight, *sums = run_bwd(runs, case, finish, mask)
            want = run_bwd_input(runs, case, finish, mask)
            for got, expected, what in zip((dx, *sums), want, ("dx", "sums"), strict=mask is not None):
                assert_same(got, expected, f"{what} of {case}")
            act_table = None if mask is None else mask[:2]
            want = run_bwd_weight(runs, case, finish, act_table)[0]
            assert_same(dweight, want, f"dweight of {case}")


@pytest.mark.parametrize("width", [(1, 1, 32), (4, 4, 9), (5, 5, 3), (16, 16, 2), (24, 24, 2)], ids=name)
def test_conv_nan_and_infinity_stay_in_their_group(kernels, isa, dtype, width):
    runs, case = cpu_runs(kernels, isa, dtype), Case(width, GEOMETRIES[0], 5)
    case.x[0, 3, 4, case.c // 2] = np.nan
    case.x[1, 0, 0, 0] = np.inf
    case.dy[0, 2, 2, case.k // 2] = np.nan
    case.dy[1, 1, 1, 0] = -np.inf
    with np.errstate(invalid="ignore"):
        want = act(conv(case.x, case.weight, *case.geometry), (1, 0))
        want_dx = conv_bwd_input(case.dy, case.weight, case.input, *case.geometry)
        want_dw = conv_bwd_weight(case.dy, case.x, case.weight_shape, *case.geometry)
    got = value(run_fwd(runs, case, None, None, None, True, stats=False)[0], dtype)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    got = value(run_bwd_input(runs, case, None, None)[0], dtype)
    assert np.array_equal(np.isnan(got), np.isnan(want_dx))
    # Of a weight gradient, which taps of a pair of channels are lost depends on how the border is computed.
    got = value(run_bwd_weight(runs, case, None, None)[0], dtype)
    assert np.array_equal(np.isfinite(got).all((2, 3)), np.isfinite(want_dw).all((2, 3)))


@pytest.mark.parametrize("winograd", ["never", "always"])
@pytest.mark.parametrize("width", [(1, 1, 32), (4, 4, 8), (8, 8, 4), (24, 24, 2), (64, 64, 1)], ids=name)
def test_conv_real_values(kernels, isa, dtype, width, winograd):
    check_real_values(cpu_runs(kernels, isa, dtype, winograd), Case(width, GEOMETRIES[1], 7))


def test_conv_gradient_of_a_sum_is_read_in_place(kernels, isa, dtype):
    """An expanded gradient, one vector for all pixels: strides of 0."""
    case = Case((4, 4, 5), GEOMETRIES[0], 3)
    vector = store(integers(case.rng, -2, 2, case.k), dtype)
    case.dy = np.broadcast_to(value(vector, dtype), case.output)
    expanded = np.broadcast_to(vector, case.output)
    run, arrays = kernels.Run(isa, dtype, 2), Exact(dtype)
    dx, dweight = arrays.output(case.input), arrays.flat_output(case.weight_shape)
    weight, x = store(case.weight, dtype), store(case.x, dtype)
    kernels.grouped_conv_bwd_input(
        run, *case.geometry_arguments(), expanded, weight, None, None, None, None, dx, None
    )
    kernels.grouped_conv_bwd_weight(run, *case.geometry_arguments(), expanded, x, None, None, None, dweight)
    want = conv_bwd_input(case.dy, case.weight, case.input, *case.geometry)
    assert_same(value(dx, dtype), value(store(want, dtype), dtype), "dx")
    want = conv_bwd_weight(case.dy, case.x, case.weight_shape, *case.geometry)
    assert_same(value(dweight, dtype), value(store(want, dtype), dtype), "dweight")


# --------------------------------------------------------------------------------------------- batch_norm

CHANNELS = [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 24, 33, 64, 112, 130, 513, 1030]
NORM_SIZES = [(2, 5, 7), (1, 1, 1), (3, 1, 9), (1, 19, 1), (0, 4, 4), (2, 0, 3), (1, 37, 41)]


def norm_cases(channels):
    for seed, size in enumerate(NORM_SIZES):
        if channels <= 130 or np.prod(size) < 1000:
            yield np.random.default_rng(seed), (*size, channels)


def moments(x):
    rows = x.reshape(-1, x.shape[-1])
    return rows.mean(0), rows.var(0)


def norm_stats(kernels, isa, dtype, x):
    def call(run, arrays):
        mean, var = arrays.table_output(x.shape[-1]), arrays.table_output(x.shape[-1])
        kernels.batch_norm_stats(run, x.shape, arrays.activation(store(x, dtype)), mean, var)
        return [mean, var]

    return both_ways(kernels, isa, dtype, call)


@together(channels=CHANNELS)
def test_norm_stats(kernels, isa, dtype, channels):
    for rng, shape in norm_cases(channels):
        x = value(store(rng.standard_normal(shape) * 2 + 3, dtype), dtype)
        mean, var = norm_stats(kernels, isa, dtype, x)
        if 0 in shape:
            assert np.isnan(mean).all() and np.isnan(var).all()
            continue
        want_mean, want_var = moments(x)
        np.testing.assert_allclose(mean, want_mean, rtol=3e-7, atol=3e-7)
        np.testing.assert_allclose(var, want_var, rtol=2e-6, atol=1e-12)


def test_norm_stats_keep_a_small_variance_beside_a_large_mean(kernels, isa):
    """mean/std = 1000 and 100000, where sums of x and x^2 alone would lose the variance."""
    rng = np.random.default_rng(0)
    for offset in (1e3, 1e5):
        x = value(store(rng.standard_normal((2, 56, 56, 20)) + offset, "float32"), "float32")
        mean, var = norm_stats(kernels, isa, "float32", x)
        want_mean, want_var = moments(x)
        np.testing.assert_allclose(mean, want_mean, rtol=2e-7)
        np.testing.assert_allclose(var, want_var, rtol=1e-5)


def test_norm_stats_of_a_constant_are_exact(kernels, isa, dtype):
    x = np.broadcast_to(value(store(np.linspace(-9, 9, 21), dtype), dtype), (2, 30, 31, 21))
    mean, var = norm_stats(kernels, isa, dtype, x)
    assert np.array_equal(mean, x[0, 0, 0]) and not var.any()


def test_norm_fold(kernels):
    rng = np.random.default_rng(1)
    c, eps = 37, 1e-5
    mean, beta, gamma = (rng.standard_normal(c).astype(np.float32) for _ in range(3))
    var = rng.random(c).astype(np.float32)
    for g, b in [(gamma, beta), (None, beta), (gamma, None), (None, None)]:
        rstd, affine = np.full(c, np.nan, np.float32), np.full((2, c), np.nan, np.float32)
        kernels.batch_norm_fold(kernels.Run("portable", "float32", 3), c, mean, var, g, b, eps, rstd, affine)
        want = 1 / np.sqrt(var.astype(np.float64) + eps)
        a = want * (1 if g is None else g)
        np.testing.assert_allclose(rstd, want, rtol=6e-8)
        np.testing.assert_allclose(affine[0], a, rtol=6e-8)
        np.testing.assert_allclose(affine[1], (0 if b is None else b) - mean * a, rtol=6e-8)


def run_norm_apply(kernels, isa, dtype, x, affine, residual, residual_affine, relu):
    def call(run, arrays):
        y = arrays.output(x.shape)
        more = None if residual is None else arrays.activation(store(residual, dtype))
        scaled = None if residual_affine is None else arrays.table(table(residual_affine))
        stored = arrays.activation(store(x, dtype))
        kernels.batch_norm_apply(run, x.shape, stored, arrays.table(table(affine)), more, scaled, relu, y)
        return [y]

    return both_ways(kernels, isa, dtype, call)[0]


def run_norm_pool(kernels, isa, dtype, x, dy, coefficients):
    def call(run, arrays):
        stored = arrays.activation(store(x, dtype))
        y, again, dx = arrays.output(dy.shape), arrays.output(dy.shape), arrays.output(x.shape)
        sums = arrays.table_output(2, x.shape[3])
        kernels.batch_norm_pool(run, x.shape, stored, arrays.table(table(coefficients[:2])), y)
        gradient = arrays.activation(store(dy, dtype))
        act_table = arrays.table(table(coefficients))
        kernels.batch_norm_pool_bwd(run, x.shape, gradient, stored, act_table, dx, sums, again)
        return [y, again, dx, sums]

    return both_ways(kernels, isa, dtype, call)


@together(channels=CHANNELS)
def test_norm_pool_exact(kernels, isa, dtype, channels):
    rng = np.random.default_rng(channels)
    for shape in ((2, 5, 7, channels), (1, 2, 2, channels), (0, 4, 3, channels), (1, 40, 63, channels)):
        h, w = shape[1] // 2, shape[2] // 2
        x, dy = integers(rng, -5, 5, shape), 4 * integers(rng, -4, 4, (shape[0], h, w, channels))
        rows = [integers(rng, low, high, channels) for low, high in ((-2, 2), (-3, 3), (-1, 1))]
        coefficients = np.stack([*rows, 2.0 ** integers(rng, -1, 1, channels)])
        y, again, dx, sums = run_norm_pool(kernels, isa, dtype, x, dy, coefficients)
        a, b, mean, rstd = coefficients
        inside = x[:, : 2 * h, : 2 * w]
        squares = np.maximum(a * inside + b, 0).reshape(shape[0], h, 2, w, 2, channels).mean((2, 4))
        g = np.where(a * inside + b <= 0, 0, dy.repeat(2, 1).repeat(2, 2) / 4)
        want_dx = np.zeros(shape)
        want_dx[:, : 2 * h, : 2 * w] = a * g
        for got, want in ((y, squares), (again, squares), (dx, want_dx)):
            assert_same(value(got, dtype), value(store(want, dtype), dtype), f"at {shape}")
        assert_same(sums, np.stack([g, g * (inside - mean) * rstd]).sum((1, 2, 3)), f"sums at {shape}")


@together(channels=CHANNELS)
def test_norm_apply_exact(kernels, isa, dtype, channels):
    for rng, shape in norm_cases(channels):
        x, residual = integers(rng, -9, 9, shape), integers(rng, -9, 9, shape)
        affine, scaled = (
            np.stack([integers(rng, -3, 3, channels), integers(rng, -9, 9, channels)]) for _ in range(2)
        )
        if x.size:
            x.flat[0] = np.nan
            residual.flat[-1] = np.nan
        for kind, relu in itertools.product(("none", "plain", "scaled"), (False, True)):
            more, table_of_more = None if kind == "none" else residual, scaled if kind == "scaled" else None
            got = run_norm_apply(kernels, isa, dtype, x, affine, more, table_of_more, relu)
            added = {"none": 0, "plain": residual, "scaled": scaled[0] * residual + scaled[1]}[kind]
            want = affine[0] * x + affine[1] + added
            want = np.where(want <= 0, 0.0, want) if relu else want
            assert_same(value(got, dtype), value(store(want, dtype), dtype), f"y at {shape}")


@pytest.mark.parametrize("with_shift", [False, True])
def test_norm_update_running(kernels, with_shift):
    rng = np.random.default_rng(2)
    c, count = 37, 5
    mean, shift, before_mean = (rng.standard_normal(c).astype(np.float32) for _ in range(3))
    var, before_var = (rng.random(c).astype(np.float32) + 0.5 for _ in range(2))
    for momentum in (0.0, 0.1, 1.0, 1 / 3):
        running_mean, running_var = before_mean.copy(), before_var.copy()
        run = kernels.Run("portable", "float32", 3)
        added = shift if with_shift else None
        kernels.batch_norm_update_running(
            run, c, mean, var, added, count, momentum, running_mean, running_var
        )
        new_mean = mean.astype(np.float64) + (shift if with_shift else 0)
        new_var = var.astype(np.float64) * count / (count - 1)
        want_mean = (1 - momentum) * before_mean.astype(np.float64) + momentum * new_mean
        want_var = (1 - momentum) * before_var.astype(np.float64) + momentum * new_var
        magnitude = np.abs(before_mean) + np.abs(new_mean)
        assert (np.abs(running_mean - want_mean) <= 6e-8 * magnitude).all()
        np.testing.assert_allclose(running_var, want_var, rtol=6e-8)


MASKS = ("none", "from x", "from z")


class NormBackward:
    """Integers for both passes of the backward; rstd a power of two, so that dgamma is exact."""

    def __init__(self, rng, shape, mask):
        c = shape[-1]
        self.shape = shape
        self.dz, self.x, self.z = (integers(rng, -3, 3, shape) for _ in range(3))
        self.mean, self.gamma = integers(rng, -2, 2, c), integers(rng, -3, 3, c)
        self.rstd = 2.0 ** integers(rng, -2, 1, c)
        self.affine = (
            np.stack([integers(rng, -2, 2, c), integers(rng, -2, 2, c)]) if mask == "from x" else None
        )
        if mask == "from x":
            self.kept = keep(self.affine[0] * self.x + self.affine[1])
        else:
            self.kept = keep(self.z) if mask == "from z" else np.ones(shape, bool)
        self.z = self.z if mask == "from z" else None

    def g(self):
        return np.where(self.kept, self.dz, 0.0)

    def reduce(self, kernels, isa, dtype, with_g=False, other=None):
        """dgamma, dbeta, finish, then g if wanted, then dgamma and finish of `other`, a NormBackward too."""

        def call(run, arrays):
            c = self.shape[-1]
            outputs = [arrays.table_output(c), arrays.table_output(c), arrays.table_output(6, c)]
            dz, x, z = (optional(arrays.activation, self, name, dtype) for name in ("dz", "x", "z"))
            vectors = (optional(arrays.table, self, name) for name in ("mean", "rstd", "gamma", "affine"))
            g = [arrays.output(self.shape)] if with_g else []
            more, branch = [], []
            if other is not None:
                more = [arrays.table_output(c), arrays.table_output(6, c)]
                branch = [optional(arrays.activation, other, "x", dtype)]
                branch += [optional(arrays.table, other, name) for name in ("mean", "rstd", "gamma")]
            kernels.batch_norm_bwd_reduce(
                run, self.shape, dz, x, *vectors, z, *outputs, *(g or [None]), branch + more
            )
            return [*outputs, *g, *more]

        return both_ways(kernels, isa, dtype, call)

    def mask_table(self):
        """The (a; b) of the mask in `finish`: those that mask nothing unless it comes from x."""
        c = self.shape[-1]
        return np.stack([np.zeros(c), np.ones(c)]) if self.affine is None else self.affine

    def apply(self, kernels, isa, dtype, finish, with_g):
        def call(run, arrays):
            dx, g = arrays.output(self.shape), arrays.output(self.shape) if with_g else None
            dz, x, z = (optional(arrays.activation, self, name, dtype) for name in ("dz", "x", "z"))
            kernels.batch_norm_bwd_apply(run, self.shape, dz, x, arrays.table(table(finish)), z, dx, g)
            return [dx, g] if with_g else [dx]

        return both_ways(kernels, isa, dtype, call)


def optional(place, case, name, dtype=None):
    """place(the field in storage, or in float32 for a table); None stays."""
    field = getattr(case, name)
    if field is None:
        return None
    return place(table(field) if dtype is None else store(field, dtype))


@pytest.mark.parametrize("mask", MASKS)
@together(channels=CHANNELS)
def test_norm_bwd_reduce_exact(kernels, isa, dtype, channels, mask):
    for rng, shape in norm_cases(channels):
        case = NormBackward(rng, shape, mask)
        dgamma, dbeta, finish, written = case.reduce(kernels, isa, dtype, with_g=True)
        assert_same(value(written, dtype), case.g(), f"g at {shape}")
        for one, same in zip(case.reduce(kernels, isa, dtype), (dgamma, dbeta, finish), strict=True):
            assert_same(one, same, f"without g at {shape}")
        g, rows = case.g().reshape(-1, channels), max(1, int(np.prod(shape[:3])))
        want_dbeta = g.sum(0)
        want_dgamma = (g * (case.x.reshape(-1, channels) - case.mean)).sum(0) * case.rstd
        assert_same(dbeta, want_dbeta, f"dbeta at {shape}")
        assert_same(dgamma, want_dgamma, f"dgamma at {shape}")
        a = case.gamma * case.rstd
        want = np.stack([a, -a * case.rstd * want_dgamma / rows, -a * want_dbeta / rows, case.mean])
        np.testing.assert_allclose(finish[:4], want, rtol=1.2e-7, atol=0)
        assert_same(finish[4:], case.mask_table(), f"mask at {shape}")


@together(channels=CHANNELS)
def test_norm_bwd_reduce_of_two_branches(kernels, isa, dtype, channels):
    """Each branch gets what it gets alone."""
    for rng, shape in norm_cases(channels):
        case, other = NormBackward(rng, shape, "from z"), NormBackward(rng, shape, "from z")
        other.dz, other.z, other.kept = case.dz, case.z, case.kept
        got = case.reduce(kernels, isa, dtype, with_g=True, other=other)
        alone = case.reduce(kernels, isa, dtype, with_g=True)
        dgamma, dbeta, finish = other.reduce(kernels, isa, dtype)
        names = ("dgamma", "dbeta", "finish", "g", "other dgamma", "other finish")
        for one, want, what in zip(got, (*alone, dgamma, finish), names, strict=True):
            assert_same(one, want, f"{what} at {shape}")
        assert_same(got[1], dbeta, f"dbeta at {shape}")


def test_norm_bwd_finish(kernels):
    rng = np.random.default_rng(1)
    c, count = 37, 1000
    sums, mean = table(rng.standard_normal((2, c))), table(rng.standard_normal(c))
    rstd, gamma = table(rng.random(c)), table(rng.standard_normal(c))
    for g in (gamma, None):
        dgamma, dbeta, finish = (np.full(shape, np.nan, np.float32) for shape in (c, c, (6, c)))
        run = kernels.Run("portable", "float32", 3)
        kernels.batch_norm_bwd_finish(run, c, sums, mean, rstd, g, count, dgamma, dbeta, finish)
        assert np.array_equal(dbeta, sums[0]) and np.array_equal(dgamma, sums[1])
        scale = rstd.astype(np.float64) * (1 if g is None else g)
        want = [scale, -scale * rstd * sums[1] / count, -scale * sums[0] / count, mean]
        np.testing.assert_allclose(finish, [*want, np.zeros(c), np.ones(c)], rtol=6e-8)


@pytest.mark.parametrize("mask", MASKS)
@together(channels=CHANNELS)
def test_norm_bwd_apply_exact(kernels, isa, dtype, channels, mask):
    for rng, shape in norm_cases(channels):
        case = NormBackward(rng, shape, mask)
        coefficients = [integers(rng, -4, 4, channels) / 2 for _ in range(3)]
        finish = np.stack([*coefficients, case.mean, *case.mask_table()])
        if case.x.size:
            case.dz.flat[0] = np.nan
        want_g = case.g()
        want_dx = finish[0] * want_g + finish[1] * (case.x - finish[3]) + finish[2]
        for with_g in (False, True):
            got = case.apply(kernels, isa, dtype, finish, with_g)
            assert_same(value(got[0], dtype), value(store(want_dx, dtype), dtype), f"dx at {shape}")
            if with_g:
                assert_same(value(got[1], dtype), value(store(want_g, dtype), dtype), f"g at {shape}")


@pytest.mark.parametrize("mask", ["from x", "from z"])
def test_norm_mask_lets_nan_through(kernels, isa, mask):
    """As in torch, a gradient passes where the ReLU's output is NaN."""
    dz, x = np.ones((1, 1, 3, 5), np.float32), np.zeros((1, 1, 3, 5), np.float32)
    source = np.array(np.broadcast_to(np.array([np.nan, -1, 1], np.float32)[None, None, :, None], x.shape))
    finish, dx, g = (
        table([np.ones(5), *np.zeros((3, 5)), np.ones(5), np.zeros(5)]),
        np.full_like(x, 9),
        np.full_like(x, 9),
    )
    run = kernels.Run(isa, "float32", 1)
    if mask == "from x":
        kernels.batch_norm_bwd_apply(run, x.shape, dz, source, finish, None, dx, g)
    else:
        kernels.batch_norm_bwd_apply(run, x.shape, dz, x, finish, source, dx, g)
    assert np.array_equal(g[0, 0, :, 0], [1, 0, 1])


def test_norm_many_threads_same_bits(kernels, isa, dtype):
    rng = np.random.default_rng(3)
    x = store(rng.standard_normal((2, 40, 41, 48)), dtype)
    results = []
    for threads in (1, 2, 5, 16):
        mean, var = np.empty(48, np.float32), np.empty(48, np.float32)
        kernels.batch_norm_stats(kernels.Run(isa, dtype, threads), x.shape, x, mean, var)
        results.append((mean.tobytes(), var.tobytes()))
    assert len(set(results)) == 1
