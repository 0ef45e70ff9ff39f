"""grouped_conv on NumPy arrays, by the kernels of the CPU and those of the GPU: cases, calls, comparisons.

Small integers (and halves) make every sum exact, so results are compared bit by bit. `runs` (numpy_runs.Runs)
says which kernels run, and how.
"""

import numpy as np
from numpy_oracle import (
    EPSILON,
    act,
    conv,
    conv_bwd_input,
    conv_bwd_weight,
    finished,
    keep,
    output_size,
    store,
    value,
)
from numpy_runs import assert_same, integers, table

# (input, output) channels per group and how many groups: the widths of issue-size models, whole and odd.
WIDTHS = [
    (1, 1, 7), (1, 1, 32), (2, 2, 5), (3, 3, 3), (4, 4, 9), (5, 5, 3), (8, 8, 4), (16, 16, 2), (24, 24, 2),
    (32, 32, 2), (48, 48, 1), (56, 56, 1), (64, 64, 1), (112, 112, 1), (1, 2, 9), (2, 1, 9), (3, 5, 4),
    (4, 8, 3), (8, 4, 3), (16, 24, 2), (5, 16, 2), (24, 8, 2), (3, 64, 1), (2, 32, 3),
]  # fmt: skip
# n, (h, w), stride, padding, dilation
GEOMETRIES = [
    (2, (7, 9), (1, 1), (1, 1), (1, 1)),
    (1, (9, 31), (1, 1), (1, 1), (1, 1)),
    (1, (8, 11), (2, 2), (1, 1), (1, 1)),
    (2, (3, 3), (1, 1), (0, 0), (1, 1)),
    (1, (1, 1), (1, 1), (1, 1), (1, 1)),
    (1, (5, 17), (2, 1), (2, 0), (1, 1)),
    (1, (6, 10), (1, 2), (0, 2), (1, 1)),
    (1, (9, 12), (1, 1), (2, 2), (2, 2)),
    (1, (11, 8), (2, 2), (2, 1), (3, 2)),
    (2, (17, 15), (1, 1), (1, 1), (1, 1)),  # two stripes of rows, strips of several widths
    (1, (33, 16), (2, 2), (1, 1), (1, 1)),
    (2, (18, 29), (2, 2), (1, 1), (1, 1)),
    (0, (5, 5), (1, 1), (1, 1), (1, 1)),
]


def name(width):
    return "{}-{}x{}".format(*width)


class Case:
    """One convolution on small integers, with everything an epilogue or prologue may want."""

    def __init__(self, width, geometry, seed=0):
        cg, kg, self.groups = width
        n, size, self.stride, self.pad, self.dilation = geometry
        rng = self.rng = np.random.default_rng(seed)
        self.c, self.k = cg * self.groups, kg * self.groups
        self.input = (n, *size, self.c)
        self.output = (n, *output_size(size, self.stride, self.pad, self.dilation), self.k)
        self.weight_shape = (self.k, cg, 3, 3)
        self.geometry = (self.stride, self.pad, self.dilation, self.groups)
        self.x = integers(rng, -3, 3, self.input)
        self.weight = integers(rng, -1, 1, self.weight_shape)
        self.y = integers(rng, -3, 3, self.output)
        self.dy = integers(rng, -2, 2, self.output)
        self.residual = integers(rng, -5, 5, self.output)
        self.act = np.stack([integers(rng, -1, 2, self.c), integers(rng, -2, 2, self.c)])
        self.affine = np.stack([integers(rng, -2, 2, self.k), integers(rng, -5, 5, self.k)])
        halves = [integers(rng, -4, 4, self.k) / 2 for _ in range(3)]
        self.finish = np.stack([*halves, *(integers(rng, -1, 1, self.k) for _ in range(3))])
        self.mask = np.stack([*self.act, integers(rng, -1, 1, self.c), 2.0 ** integers(rng, -1, 1, self.c)])

    def __repr__(self):
        return f"Case({self.input} to {self.output}, {self.geometry})"

    def geometry_arguments(self):
        return self.input, self.k, *self.geometry


def run_fwd(runs, case, act_table, affine, residual, relu, stats):
    def call(run, arrays):
        y = arrays.output(case.output)
        mean = arrays.table_output(case.k) if stats else None
        var = arrays.table_output(case.k) if stats else None
        runs.kernels.grouped_conv_fwd(
            run, *case.geometry_arguments(),
            arrays.activation(store(case.x, runs.dtype)), arrays.flat(store(case.weight, runs.dtype)),
            None if act_table is None else arrays.table(table(act_table)),
            None if affine is None else arrays.table(table(affine)),
            None if residual is None else arrays.activation(store(residual, runs.dtype)),
            relu, y, mean, var,
        )  # fmt: skip
        return [y, mean, var] if stats else [y]

    return runs.both(call)


def run_bwd_input(runs, case, finish, mask):
    def call(run, arrays):
        dx = arrays.output(case.input)
        sums = arrays.table_output(2, case.c) if mask is not None else None
        runs.kernels.grouped_conv_bwd_input(
            run, *case.geometry_arguments(),
            arrays.activation(store(case.dy, runs.dtype)), arrays.flat(store(case.weight, runs.dtype)),
            None if finish is None else arrays.activation(store(case.y, runs.dtype)),
            None if finish is None else arrays.table(table(finish)),
            None if mask is None else arrays.activation(store(case.x, runs.dtype)),
            None if mask is None else arrays.table(table(mask)),
            dx, sums,
        )  # fmt: skip
        return [dx] if mask is None else [dx, sums]

    return runs.both(call)


def run_bwd_weight(runs, case, finish, act_table):
    def call(run, arrays):
        dweight = arrays.flat_output(case.weight_shape)
        runs.kernels.grouped_conv_bwd_weight(
            run, *case.geometry_arguments(),
            arrays.activation(store(case.dy, runs.dtype)), arrays.activation(store(case.x, runs.dtype)),
            None if finish is None else arrays.activation(store(case.y, runs.dtype)),
            None if finish is None else arrays.table(table(finish)),
            None if act_table is None else arrays.table(table(act_table)),
            dweight,
        )  # fmt: skip
        return [dweight]

    return runs.both(call)


# What is asked of each op beside the convolution.
FWD_OPTIONS = [  # with act, with affine, with residual, relu
    (False, False, False, False),
    (True, True, False, True),
    (False, True, True, True),
    (True, False, True, False),
]
BWD_OPTIONS = [(False, False), (True, False), (False, True), (True, True)]  # with finish, with mask or act


def check_fwd(runs, case, with_act=False, with_affine=False, with_residual=False, relu=False):
    got = run_fwd(
        runs, case,
        case.act if with_act else None, case.affine if with_affine else None,
        case.residual if with_residual else None, relu, stats=False,
    )[0]  # fmt: skip
    want = conv(act(case.x, case.act) if with_act else case.x, case.weight, *case.geometry)
    if with_affine:
        want = case.affine[0] * want + case.affine[1]
    if with_residual:
        want = want + case.residual
    if relu:
        want = np.maximum(want, 0)
    assert_same(value(got, runs.dtype), value(store(want, runs.dtype), runs.dtype), f"y of {case}")


def check_fwd_stats(runs, case, with_act=False):
    y, mean, var = run_fwd(runs, case, case.act if with_act else None, None, None, False, stats=True)
    want = conv(act(case.x, case.act) if with_act else case.x, case.weight, *case.geometry)
    stored = value(y, runs.dtype)
    assert_same(stored, value(store(want, runs.dtype), runs.dtype), f"y of {case}")
    rows = stored.reshape(-1, case.k)
    spread = rows.std(0)
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-6, atol=1e-6 * (spread.max() + 1e-30))
    np.testing.assert_allclose(var, rows.var(0), rtol=2e-5, atol=1e-6 * (rows.mean(0) ** 2).max() + 1e-30)


def check_bwd_input(runs, case, with_finish=False, with_mask=False):
    got = run_bwd_input(runs, case, case.finish if with_finish else None, case.mask if with_mask else None)
    dy = finished(case.dy, case.y, case.finish) if with_finish else case.dy
    want = conv_bwd_input(dy, case.weight, case.input, *case.geometry)
    if with_mask:
        want = np.where(keep(case.mask[0] * case.x + case.mask[1]), want, 0.0)
    assert_same(value(got[0], runs.dtype), value(store(want, runs.dtype), runs.dtype), f"dx of {case}")
    if with_mask:
        terms = np.stack([want, want * (case.x - case.mask[2]) * case.mask[3]]).reshape(2, -1, case.c)
        # A kernel may sum the gradient before or after it is rounded to storage.
        slack = 0 if runs.dtype == "float32" else EPSILON[runs.dtype] * np.abs(terms).sum(1)
        assert (np.abs(got[1] - terms.sum(1)) <= slack).all(), f"sums of {case}"


def check_bwd_weight(runs, case, with_finish=False, with_act=False):
    got = run_bwd_weight(runs, case, case.finish if with_finish else None, case.act if with_act else None)[0]
    dy = finished(case.dy, case.y, case.finish) if with_finish else case.dy
    x = act(case.x, case.act) if with_act else case.x
    want = conv_bwd_weight(dy, x, case.weight_shape, *case.geometry)
    assert_same(value(got, runs.dtype), value(store(want, runs.dtype), runs.dtype), f"dweight of {case}")


def check_real_values(runs, case, ops=("fwd", "bwd_input", "bwd_weight"), operand_error=0.0):
    """Rounding alone: within the bound of a float32 sum of that length plus one rounding to storage, and one
    of each operand where the kernels round those (relative, operand_error)."""
    case.x, case.dy = case.rng.standard_normal(case.input), case.rng.standard_normal(case.output)
    case.weight = case.rng.standard_normal(case.weight_shape)
    for field in ("x", "dy", "weight"):
        setattr(case, field, value(store(getattr(case, field), runs.dtype), runs.dtype))

    def check(op, got, oracle, *operands, terms):
        want, size = oracle(*operands), oracle(*map(np.abs, operands))
        summed = EPSILON["float32"] * 2 * np.sqrt(terms) + 2.01 * operand_error
        bound = EPSILON[runs.dtype] * np.abs(want) * 1.01 + summed * size
        error = np.abs(value(got, runs.dtype) - want)
        assert (error <= bound).all(), f"{op} of {case}: {(error / bound).max():.2f} times the bound"

    geometry = case.geometry
    if "fwd" in ops:
        got = run_fwd(runs, case, None, None, None, False, stats=False)[0]
        terms = 9 * case.c // case.groups
        check("fwd", got, lambda x, w: conv(x, w, *geometry), case.x, case.weight, terms=terms)
    if "bwd_input" in ops:
        got = run_bwd_input(runs, case, None, None)[0]
        oracle = lambda g, w: conv_bwd_input(g, w, case.input, *geometry)  # noqa: E731
        check("bwd_input", got, oracle, case.dy, case.weight, terms=9 * case.k // case.groups)
    if "bwd_weight" in ops:
        got = run_bwd_weight(runs, case, None, None)[0]
        oracle = lambda g, x: conv_bwd_weight(g, x, case.weight_shape, *geometry)  # noqa: E731
        check("bwd_weight", got, oracle, case.dy, case.x, terms=np.prod(case.output[:3]))
