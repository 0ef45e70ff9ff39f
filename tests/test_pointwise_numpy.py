"""pointwise_conv's kernels on NumPy arrays: every instruction set, storage type and width, against float64.

As in test_kernels_numpy.py: small integers, so that results are compared bit by bit; each case on arrays of
exact size with one thread and inside guarded buffers with three.
"""

import numpy as np
import numpy_runs
import pytest
from numpy_oracle import EPSILON, Exact, act, finished, keep, store, value
from numpy_runs import assert_same, both_ways, integers, table

kernels, isa, dtype = numpy_runs.kernels, numpy_runs.isa, numpy_runs.dtype  # fixtures

# (C, K): below, at and beyond one, two and three vectors of every instruction set; several chunks and cuts.
WIDTHS = [
    (1, 1), (2, 3), (3, 4), (4, 5), (5, 8), (7, 2), (8, 16), (15, 17), (16, 33), (33, 16), (31, 48), (48, 31),
    (64, 70), (70, 64), (130, 20), (20, 130), (300, 9), (9, 300), (513, 40), (40, 513),
]  # fmt: skip
# Of Strassen's algorithm: halves are whole vectors of some or of all instruction sets. Input gradients can go
# by it from more than 512 channels of dy on.
STRASSEN_WIDTHS = [
    (8, 16), (16, 8), (32, 32), (64, 96), (96, 160), (288, 32), (544, 64), (32, 544), (64, 1056),
]  # fmt: skip
# n, (h, w), stride
GEOMETRIES = [
    (2, (7, 9), (1, 1)),
    (1, (1, 1), (1, 1)),
    (1, (8, 11), (2, 2)),
    (3, (5, 4), (1, 2)),
    (2, (1, 7), (2, 1)),
    (1, (2, 2), (2, 2)),
    (2, (19, 23), (1, 1)),  # several blocks of pixels
    (0, (5, 5), (1, 1)),
]


class Case:
    """One convolution on small integers, with everything an epilogue or prologue may want."""

    def __init__(self, width, geometry, seed=0, strassen="never"):
        self.c, self.k = width
        self.strassen = strassen
        n, (h, w), self.stride = geometry
        rng = self.rng = np.random.default_rng(seed)
        self.input = (n, h, w, self.c)
        self.output = (n, (h - 1) // self.stride[0] + 1, (w - 1) // self.stride[1] + 1, self.k)
        self.x = integers(rng, -3, 3, self.input)
        self.weight = integers(rng, -1, 1, (self.k, self.c))
        self.y = integers(rng, -3, 3, self.output)
        self.dy = integers(rng, -2, 2, self.output)
        self.residual = {"y": integers(rng, -5, 5, self.output), "dx": integers(rng, -5, 5, self.input)}
        self.affine = np.stack([integers(rng, -2, 2, self.k), integers(rng, -5, 5, self.k)])
        halves = [integers(rng, -4, 4, self.k) / 2 for _ in range(3)]
        self.finish = np.stack([*halves, *(integers(rng, -1, 1, self.k) for _ in range(3))])
        pair = integers(rng, -1, 2, self.c), integers(rng, -2, 2, self.c)
        self.act = np.stack([*pair, integers(rng, -1, 1, self.c), 2.0 ** integers(rng, -1, 1, self.c)])

    def taken(self, x):
        return x[:, :: self.stride[0], :: self.stride[1]]


def run_fwd(kernels, isa, dtype, case, act_table, affine, residual, relu, stats):
    def call(run, arrays):
        y = arrays.output(case.output)
        mean, var = (arrays.table_output(case.k) if stats else None for _ in range(2))
        kernels.pointwise_conv_fwd(
            run, case.input, case.k, case.stride,
            arrays.activation(store(case.x, dtype)), arrays.flat(store(case.weight, dtype)),
            None if act_table is None else arrays.table(table(act_table)),
            None if affine is None else arrays.table(table(affine)),
            None if residual is None else arrays.activation(store(residual, dtype)),
            relu, y, mean, var,
        )  # fmt: skip
        return [y, mean, var] if stats else [y]

    return both_ways(kernels, isa, dtype, call, case.strassen)


def run_bwd(
    kernels, isa, dtype, case, finish, act_table, residual, want_dx=True, want_dweight=True, added_to=None
):
    def call(run, arrays):
        dx = arrays.output(case.input) if want_dx else None
        if added_to is not None:
            dx[...] = store(added_to, dtype)
        dweight = arrays.flat_output((case.k, case.c)) if want_dweight else None
        sums = arrays.table_output(2, case.c) if want_dx and act_table is not None else None
        kernels.pointwise_conv_bwd(
            run, case.input, case.k, case.stride,
            arrays.activation(store(case.dy, dtype)), arrays.activation(store(case.x, dtype)),
            arrays.flat(store(case.weight, dtype)),
            None if finish is None else arrays.activation(store(case.y, dtype)),
            None if finish is None else arrays.table(table(finish)),
            None if act_table is None else arrays.table(table(act_table)),
            None if residual is None else arrays.activation(store(residual, dtype)),
            dx, dweight, sums, added_to is not None,
        )  # fmt: skip
        return [array for array in (dx, dweight, sums) if array is not None]

    return both_ways(kernels, isa, dtype, call, case.strassen)


def expected_bwd(case, finish, act_table, residual):
    """(dx, dweight, terms of the two sums) in float64."""
    dy = case.dy if finish is None else finished(case.dy, case.y, finish)
    x = case.x if act_table is None else act(case.x, act_table[:2])
    dweight = dy.reshape(-1, case.k).T @ case.taken(x).reshape(-1, case.c)
    dx = np.zeros(case.input)
    case.taken(dx)[:] = dy @ case.weight
    terms = None
    if act_table is not None:
        dx = np.where(keep(act_table[0] * case.x + act_table[1]), dx, 0.0)
        terms = np.stack([dx, dx * (case.x - act_table[2]) * act_table[3]]).reshape(2, -1, case.c)
    if residual is not None:
        dx = dx + residual
    return dx, dweight, terms


each_width = pytest.mark.parametrize(
    "width, strassen",
    [pytest.param(width, "never", id="{}to{}".format(*width)) for width in WIDTHS]
    + [pytest.param(width, "always", id="{}to{}-strassen".format(*width)) for width in STRASSEN_WIDTHS],
)


@each_width
def test_fwd_exact(kernels, isa, dtype, width, strassen):
    for seed, geometry in enumerate(GEOMETRIES):
        case = Case(width, geometry, seed, strassen)
        for with_act, with_affine, with_residual, relu in [
            (False, False, False, False),
            (True, True, False, True),
            (False, True, True, True),
            (True, False, True, False),
        ]:
            act_table = case.act[:2] if with_act else None
            affine = case.affine if with_affine else None
            residual = case.residual["y"] if with_residual else None
            got = run_fwd(kernels, isa, dtype, case, act_table, affine, residual, relu, stats=False)[0]
            want = case.taken(act(case.x, act_table) if with_act else case.x) @ case.weight.T
            if with_affine:
                want = case.affine[0] * want + case.affine[1]
            if with_residual:
                want = want + residual
            if relu:
                want = np.maximum(want, 0)
            assert_same(value(got, dtype), value(store(want, dtype), dtype), f"y at {geometry}")


@each_width
def test_fwd_stats(kernels, isa, dtype, width, strassen):
    for seed, geometry in enumerate(GEOMETRIES):
        case = Case(width, geometry, seed, strassen)
        for act_table in (None, case.act[:2]):
            y, mean, var = run_fwd(kernels, isa, dtype, case, act_table, None, None, False, stats=True)
            if 0 in case.output:
                assert np.isnan(mean).all() and np.isnan(var).all()
                continue
            x = case.x if act_table is None else act(case.x, act_table)
            stored = value(y, dtype)
            assert_same(stored, value(store(case.taken(x) @ case.weight.T, dtype), dtype), f"y at {geometry}")
            rows = stored.reshape(-1, case.k)
            size = rows.std(0).max() + np.abs(rows).max() + 1e-30
            np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-6, atol=1e-6 * size)
            np.testing.assert_allclose(var, rows.var(0), rtol=2e-5, atol=1e-6 * size**2)


@each_width
def test_bwd_exact(kernels, isa, dtype, width, strassen):
    for seed, geometry in enumerate(GEOMETRIES):
        case = Case(width, geometry, seed, strassen)
        for with_finish, with_act, with_residual in [
            (False, False, False),
            (True, False, True),
            (False, True, False),
            (True, True, False),
        ]:
            inputs = (
                case.finish if with_finish else None,
                case.act if with_act else None,
                case.residual["dx"] if with_residual else None,
            )
            dx, dweight, *sums = run_bwd(kernels, isa, dtype, case, *inputs)
            want_dx, want_dweight, terms = expected_bwd(case, *inputs)
            assert_same(value(dx, dtype), value(store(want_dx, dtype), dtype), f"dx at {geometry}")
            assert_same(value(dweight, dtype), value(store(want_dweight, dtype), dtype), f"dw at {geometry}")
            if with_act:
                # The kernels sum the gradient after it is rounded to storage.
                slack = 0 if dtype == "float32" else EPSILON[dtype] * np.abs(terms).sum(1)
                assert (np.abs(sums[0] - terms.sum(1)) <= slack).all(), f"sums at {geometry}"
            alone = run_bwd(kernels, isa, dtype, case, *inputs, want_dweight=False)
            assert_same(alone[0], dx, "dx alone")
            assert_same(run_bwd(kernels, isa, dtype, case, *inputs, want_dx=False)[0], dweight, "dw alone")


@each_width
def test_bwd_added_to_what_is_there(kernels, isa, dtype, width, strassen):
    for seed, geometry in enumerate(GEOMETRIES):
        case = Case(width, geometry, seed, strassen)
        start = case.residual["dx"]
        for finish in (None, case.finish):
            inputs = finish, case.act, None
            dx, dweight, sums = run_bwd(kernels, isa, dtype, case, *inputs, added_to=start)
            g, want_dweight, terms = expected_bwd(case, *inputs)
            want = start + case.act[0] * g
            assert_same(value(dx, dtype), value(store(want, dtype), dtype), f"dx at {geometry}")
            assert_same(value(dweight, dtype), value(store(want_dweight, dtype), dtype), f"dw at {geometry}")
            assert_same(sums, terms.sum(1), f"sums at {geometry}")


def test_nan_and_infinity_stay_at_their_pixels(kernels, isa, dtype):
    case = Case((33, 20), GEOMETRIES[0], 5)
    case.x[0, 3, 4, 16], case.x[1, 0, 0, 0] = np.nan, np.inf
    case.dy[0, 2, 2, 10], case.dy[1, 1, 1, 0] = np.nan, -np.inf
    with np.errstate(invalid="ignore"):
        want = case.x @ case.weight.T
        want_dx, want_dweight, _ = expected_bwd(case, None, None, None)
    got = value(run_fwd(kernels, isa, dtype, case, None, None, None, True, stats=False)[0], dtype)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    dx, dweight = (value(array, dtype) for array in run_bwd(kernels, isa, dtype, case, None, None, None))
    assert np.array_equal(np.isnan(dx), np.isnan(want_dx))
    assert np.array_equal(np.isfinite(dweight), np.isfinite(want_dweight))


@pytest.mark.parametrize("width", [(24, 40), (300, 64), (1024, 16)], ids="{0[0]}to{0[1]}".format)
def test_real_values(kernels, isa, dtype, width):
    """Rounding alone: within the bound of a float32 sum of that length plus one rounding to storage."""
    case = Case(width, (2, (17, 20), (1, 1)), 7)
    case.x, case.dy = case.rng.standard_normal(case.input), case.rng.standard_normal(case.output)
    case.weight = case.rng.standard_normal((case.k, case.c))
    for field in ("x", "dy", "weight"):
        setattr(case, field, value(store(getattr(case, field), dtype), dtype))
    x, dy = case.x.reshape(-1, case.c), case.dy.reshape(-1, case.k)
    y = run_fwd(kernels, isa, dtype, case, None, None, None, False, stats=False)[0]
    dx, dweight = run_bwd(kernels, isa, dtype, case, None, None, None)
    for got, left, right in ((y, x, case.weight.T), (dx, dy, case.weight), (dweight, dy.T, x)):
        want, size = left @ right, np.abs(left) @ np.abs(right)
        bound = EPSILON[dtype] * np.abs(want) * 1.01 + EPSILON["float32"] * 2 * np.sqrt(left.shape[1]) * size
        error = np.abs(value(got, dtype).reshape(want.shape) - want)
        assert (error <= bound).all(), f"{(error / bound).max():.2f} times the bound"


def test_a_gradient_of_a_sum_is_read_in_place(kernels, isa, dtype):
    """An expanded gradient, one vector for all pixels: strides of 0."""
    case = Case((20, 36), GEOMETRIES[0], 3)
    vector = store(integers(case.rng, -2, 2, case.k), dtype)
    case.dy = np.broadcast_to(value(vector, dtype), case.output)
    run, arrays = kernels.Run(isa, dtype, 2), Exact(dtype)
    dx, dweight = arrays.output(case.input), arrays.flat_output((case.k, case.c))
    kernels.pointwise_conv_bwd(
        run, case.input, case.k, case.stride, np.broadcast_to(vector, case.output), store(case.x, dtype),
        store(case.weight, dtype), None, None, None, None, dx, dweight, None, False,
    )  # fmt: skip
    want_dx, want_dweight, _ = expected_bwd(case, None, None, None)
    assert_same(value(dx, dtype), value(store(want_dx, dtype), dtype), "dx")
    assert_same(value(dweight, dtype), value(store(want_dweight, dtype), dtype), "dweight")
