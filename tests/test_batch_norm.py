"""The ops batch_norm_* against the float64 oracle, and gconv.functional.batch_norm against torch's."""

import itertools
import math

import checks
import pytest
import torch
import torch.nn.functional as F
from checks import (
    DTYPES,
    KINK_MARGIN,
    LAYOUTS,
    assert_accurate,
    assert_exact,
    assert_same_bits,
    channel,
    place,
)
from run_together import together

import gconv
from gconv.batch_norm import batch_norm_bwd_finish_ref, batch_norm_update_running_ref

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

SHAPES = (
    (2, 1, 7, 5), (1, 2, 29, 31), (3, 3, 2, 3), (2, 4, 14, 14), (2, 5, 1, 7), (1, 8, 57, 3), (2, 16, 7, 7),
    (3, 17, 5, 4), (2, 24, 9, 8), (1, 32, 15, 13), (1, 33, 1, 2), (2, 48, 3, 5), (2, 56, 6, 6), (4, 64, 1, 1),
    (1, 112, 9, 11), (2, 130, 4, 7),
)  # fmt: skip
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
kinds = together(kind=["integer", "normal"])


class Data:
    """Tensors of one problem: whole numbers, or normal ones with the ReLU's kink kept clear."""

    def __init__(self, shape, dtype, kind, *key):
        self.shape, self.dtype, self.integer = shape, dtype, kind == "integer"
        self.key = (shape, str(dtype), kind, *key)
        self.gen = checks.generator(*self.key)

    def activation(self):
        t = (
            checks.integers(self.shape, 4, self.gen)
            if self.integer
            else torch.randn(self.shape, generator=self.gen)
        )
        return t.to(self.dtype)

    def vector(self, values=(-1.0, 1.0, 2.0)):
        c = self.shape[1]
        return (
            checks.choice((c,), values, self.gen)
            if self.integer
            else torch.randn(c, generator=self.gen) + 0.5
        )

    def affine(self):
        return torch.stack([self.vector(), self.vector((-2.0, -1.0, 0.0, 1.0, 3.0))])

    def clear(self, x, affine):
        return x if self.integer else checks.clear_of_kink(x, affine[0], affine[1], 1e-4)

    def place(self, t, name):
        return None if t is None else place(t, checks.rotate(LAYOUTS, *self.key, name))


def check(integer, actual, exact, own, label, dtype=None, magnitude=None):
    if integer:
        assert_exact(actual, exact, label)
    else:
        assert_accurate(actual, exact, own, label, dtype, magnitude)


@shapes
@dtypes
@together(residual=["none", "plain", "scaled"], relu=[False, True])
@kinds
def test_apply(isa, ops, shape, dtype, residual, relu, kind):
    data = Data(shape, dtype, kind, residual, relu)
    x, affine = data.place(data.activation(), "x"), data.affine()
    r = None if residual == "none" else data.place(data.activation(), "residual")
    args = (x, affine, r, data.affine() if residual == "scaled" else None, relu)
    y = ops.batch_norm_apply(*args)
    assert y.dtype == dtype
    check(
        data.integer,
        y,
        checks.ref_bn_apply(torch.float64, *args),
        checks.ref_bn_apply(dtype, *args),
        "batch_norm_apply",
    )
    checks.assert_channels_last(y)


@shapes
@dtypes
@pytest.mark.parametrize("ratio", [0, 1, 1000])
def test_statistics(isa, ops, shape, dtype, ratio):
    gen = checks.generator("batch_norm statistics", shape, ratio)
    x = torch.randn(shape, generator=gen) * (torch.rand(1, shape[1], 1, 1, generator=gen) + 0.5)
    x = (x + ratio * (1 + torch.rand(1, shape[1], 1, 1, generator=gen)) * (ratio > 0)).to(dtype)
    for layout in ("channels_last", checks.rotate(LAYOUTS, shape, str(dtype), ratio)):
        mean, var = ops.batch_norm_stats(place(x, layout))
        checks.assert_statistics(mean, var, x, f"batch_norm_stats {layout}")


@pytest.mark.parametrize("shape", [(2, 16, 64, 64), (4, 3, 129, 65), (8, 64, 28, 28)], ids=str)
def test_statistics_of_many_values(isa, ops, shape):
    """Enough pixels for many tiles: the merge of their means must not lose what one pass would keep."""
    x = place(torch.randn(shape, generator=checks.generator(shape)) + 1000, "channels_last")
    x[:, 0] += torch.linspace(0, 50, shape[2] * shape[3]).view(shape[2:])
    x[:, 1] = 1000.1
    mean, var = ops.batch_norm_stats(x)
    checks.assert_statistics(mean, var, x)
    assert (var >= 0).all()


@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.1])
def test_fold(isa, ops, gamma, beta, eps):
    gen = checks.generator("fold")
    c = 37
    mean = 100 * torch.randn(c, generator=gen)
    var = torch.exp(6 * torch.randn(c, generator=gen))
    var[0] = 0
    gamma = torch.randn(c, generator=gen) if gamma else None
    beta = torch.randn(c, generator=gen) if beta else None
    rstd, affine = ops.batch_norm_fold(mean, var, gamma, beta, eps)
    exact_rstd, exact, magnitude = checks.ref_bn_fold(mean, var, gamma, beta, eps)
    assert rstd.shape == (c,) and affine.shape == (2, c) and rstd.dtype == affine.dtype == torch.float32
    # Computed in double: rounded once, or twice where rstd itself is rounded in between.
    assert ((rstd.double() - exact_rstd).abs() <= checks.EPS32 * exact_rstd).all()
    assert ((affine[0].double() - exact[0]).abs() <= checks.EPS32 * exact[0].abs()).all()
    assert ((affine[1].double() - exact[1]).abs() <= checks.EPS32 * magnitude).all()


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, None], ids=str)
def test_update_running(isa, ops, shift, momentum):
    """Three batches of different sizes against the reference in float64."""
    gen = checks.generator("update running")
    c = 37
    running = [torch.randn(c, generator=gen), torch.rand(c, generator=gen) + 0.5]
    exact, counter, exact_counter = [t.double() for t in running], torch.tensor(4), torch.tensor(4)
    for count in (2, 9, 10**6):
        mean, var = torch.randn(c, generator=gen), torch.rand(c, generator=gen)
        added = torch.randn(c, generator=gen) if shift else None
        rest = (mean, var, added, count, momentum)
        assert ops.batch_norm_update_running(*running, counter, *rest) is None
        wide = [t.double() if isinstance(t, torch.Tensor) else t for t in rest]
        if momentum is None:
            wide[-1] = 1 / (exact_counter.item() + 1)
        batch_norm_update_running_ref(*exact, exact_counter, *wide)
        assert torch.equal(counter, exact_counter)
        magnitude = 1 + mean.abs().max() + (0 if added is None else added.abs().max())
        for got, want in zip(running, exact, strict=True):
            assert got.dtype == torch.float32
            assert ((got.double() - want).abs() <= 4 * checks.EPS32 * magnitude).all()
            want.copy_(got)
    ops.batch_norm_update_running(*running, None, mean, var, None, 2, 0.5)


@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
def test_update_running_is_its_reference(ops, momentum):
    """What compilers and function transforms run instead, in float32."""
    gen = checks.generator("update running in float32")
    state = [torch.randn(9, generator=gen), torch.rand(9, generator=gen), torch.tensor(2)]
    other = [t.clone() for t in state]
    args = (torch.randn(9, generator=gen), torch.rand(9, generator=gen), torch.ones(9), 6, momentum)
    ops.batch_norm_update_running(*state, *args)
    batch_norm_update_running_ref(*other, *args)
    for got, want in zip(state, other, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_backward_through_running_statistics_that_moved_is_refused(ops):
    """As after any change in place of a tensor that autograd saved."""
    bn = torch.nn.BatchNorm2d(3)
    penalties = [(bn.weight * statistic).sum() for statistic in (bn.running_mean, bn.running_var)]
    gconv.functional.batch_norm(torch.randn(2, 3, 4, 4), bn.running_mean, bn.running_var, training=True)
    for penalty in penalties:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            penalty.backward()


MASKS = ("none", "affine", "output")


def backward_problem(shape, dtype, kind, mask):
    data = Data(shape, dtype, kind, "backward", mask)
    affine = data.affine()
    x = data.clear(data.activation(), affine)
    z = None
    if mask == "output":
        z = checks.ref_bn_apply(torch.float64, x, affine, data.activation(), None, True).to(dtype)
    values = {
        "dz": data.place(data.activation(), "dz"), "x": data.place(x, "x"), "z": data.place(z, "z"),
        "affine": affine if mask == "affine" else None,
    }  # fmt: skip
    return data, values


@shapes
@dtypes
@together(mask=MASKS)
@kinds
def test_backward_reduce(isa, ops, shape, dtype, mask, kind):
    data, v = backward_problem(shape, dtype, kind, mask)
    mean, rstd = data.vector((-1.0, 0.0, 2.0)), data.vector((0.5, 1.0, 2.0))
    gamma = checks.rotate((None, data.vector()), shape, str(dtype), mask)
    args = (v["dz"], v["x"], mean, rstd, gamma, v["affine"], v["z"])
    dgamma, dbeta, finish, g = ops.batch_norm_bwd_reduce(*args, True)
    verify_reduced(data, (dgamma, dbeta, finish), args)
    assert_exact(g, checks.masked(torch.float64, v["dz"], v["x"], v["affine"], v["z"]), "g")
    checks.assert_channels_last(g, "g")
    *without, nothing = ops.batch_norm_bwd_reduce(*args, False)
    assert nothing.numel() == 0 and nothing.dtype == dtype
    for one, other in zip(without, (dgamma, dbeta, finish), strict=True):
        assert_same_bits(one, other, "whether g is wanted")


def verify_reduced(data, got, args):
    """(dgamma, dbeta, finish) of a reduction of `args` against the oracle."""
    dgamma, dbeta, finish = got
    _, x, mean, rstd, gamma, *_ = args
    exact = checks.ref_bn_bwd_reduce(torch.float64, *args)
    own = checks.ref_bn_bwd_reduce(data.dtype, *args)
    assert dgamma.dtype == dbeta.dtype == finish.dtype == torch.float32
    assert finish.shape == (6, x.shape[1])
    # The masked gradient has the dtype of dz, exactly: what is added up is float32 whatever the dtype.
    check(data.integer, dgamma, exact[0], own[0], "dgamma", torch.float32, exact[3])
    check(data.integer, dbeta, exact[1], own[1], "dbeta", torch.float32, exact[4])
    m = x.shape[0] * x.shape[2] * x.shape[3]
    scale = (torch.ones_like(mean) if gamma is None else gamma).double() * rstd
    slope = scale * rstd / m
    for row, magnitude in ((0, None), (1, slope * exact[3]), (2, scale * exact[4] / m), (3, None)):
        assert_accurate(finish[row], exact[2][row], own[2][row], f"finish[{row}]", torch.float32, magnitude)
    assert_exact(finish[4:], exact[2][4:], "finish: the mask")


@shapes
@dtypes
@kinds
def test_backward_reduce_of_a_pair(isa, ops, shape, dtype, kind):
    data, v = backward_problem(shape, dtype, kind, "output")
    dz, z = v["dz"], v["z"]
    branches = []
    for name in ("main", "other"):
        x = v["x"] if name == "main" else data.place(data.activation(), "other")
        gamma = checks.rotate((None, data.vector()), shape, str(dtype), name)
        branches.append((x, data.vector((-1.0, 0.0, 2.0)), data.vector((0.5, 1.0, 2.0)), gamma))
    main, other = branches
    dgamma, other_dgamma, dbeta, finish, other_finish, g = ops.batch_norm_bwd_reduce_pair(
        dz, z, *main, *other
    )
    assert_exact(g, checks.masked(torch.float64, dz, main[0], None, z), "g")
    checks.assert_channels_last(g, "g")
    verify_reduced(data, (dgamma, dbeta, finish), (dz, *main, None, z))
    verify_reduced(data, (other_dgamma, dbeta, other_finish), (dz, *other, None, z))


@pytest.mark.parametrize("gamma", [False, True])
def test_backward_finish(isa, ops, gamma):
    gen = checks.generator("finish")
    c, count = 37, 1000
    sums, mean, rstd = (
        torch.randn(2, c, generator=gen),
        torch.randn(c, generator=gen),
        torch.rand(c, generator=gen),
    )
    gamma = torch.randn(c, generator=gen) if gamma else None
    dgamma, dbeta, finish = ops.batch_norm_bwd_finish(sums, mean, rstd, gamma, count)
    assert torch.equal(dbeta, sums[0]) and torch.equal(dgamma, sums[1])
    wide = [None if t is None else t.double() for t in (sums, mean, rstd, gamma)]
    exact = batch_norm_bwd_finish_ref(*wide, count)[2]
    assert finish.dtype == torch.float32 and ((finish - exact).abs() <= checks.EPS32 * exact.abs()).all()


@shapes
@dtypes
@together(mask=MASKS, want_g=[False, True])
@kinds
def test_backward_apply(isa, ops, shape, dtype, mask, want_g, kind):
    data, v = backward_problem(shape, dtype, kind, mask)
    mask = checks.no_mask(shape[1]) if v["affine"] is None else v["affine"]
    coefficients = data.vector(), 0.5 * data.vector(), data.vector(), data.vector((-2.0, 0.0, 2.0))
    args = (v["dz"], v["x"], torch.stack([*coefficients, *mask]), v["z"])
    dx, g = ops.batch_norm_bwd_apply(*args, want_g)
    exact, own = checks.ref_bn_bwd_apply(torch.float64, *args), checks.ref_bn_bwd_apply(dtype, *args)
    assert dx.dtype == dtype
    check(data.integer, dx, exact[0], own[0], "dx")
    checks.assert_channels_last(dx, "dx")
    if want_g:
        assert_exact(g, exact[1], "g")
        checks.assert_channels_last(g, "g")
    else:
        assert g.numel() == 0


@dtypes
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 9, 7), (3, 32, 6, 5)], ids=str)
def test_chain_is_the_gradient_of_torchs_batch_norm(isa, ops, dtype, relu, residual, shape):
    """stats, fold, apply, reduce, apply, as training chains them, against autograd in float64."""
    data = Data(shape, dtype, "normal", "chain")
    x, dz, r = data.activation(), data.activation(), data.activation() if residual else None
    gamma, beta = data.vector(), data.vector()

    def stock(work):
        leaves = [
            t.detach().to(work).requires_grad_()
            for t in ((x, gamma, beta) if r is None else (x, gamma, beta, r))
        ]
        z = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], True, 0.1, 1e-5)
        z = z if r is None else z + leaves[3]
        z = torch.relu(z) if relu else z
        return leaves, z

    leaves, exact_z = stock(torch.float64)
    dz = torch.where(exact_z.abs() < KINK_MARGIN[dtype], 0, dz) if relu else dz
    exact = torch.autograd.grad(exact_z, leaves, dz.double())
    leaves, own_z = stock(dtype)
    own = torch.autograd.grad(own_z, leaves, dz)

    mean, var = ops.batch_norm_stats(x)
    rstd, affine = ops.batch_norm_fold(mean, var, gamma, beta, 1e-5)
    z = ops.batch_norm_apply(x, affine, r, None, relu)
    mask = (affine if relu and r is None else None, z if relu and r is not None else None)
    dgamma, dbeta, finish, _ = ops.batch_norm_bwd_reduce(dz, x, mean, rstd, gamma, *mask, False)
    dx, g = ops.batch_norm_bwd_apply(dz, x, finish, mask[1], residual)
    assert_accurate(z, exact_z.detach(), own_z.detach(), "z")
    for name, got, i in (("dx", dx, 0), ("dgamma", dgamma, 1), ("dbeta", dbeta, 2)):
        assert_accurate(got, exact[i], own[i], name, dtype)
    if residual:
        assert_accurate(g, exact[3], own[3], "dresidual", dtype)


# ------------------------------------------------------------------------------------------------
# the contract's corners


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_change_a_bit(isa, ops, dtype, layout):
    results = []
    for where in ("channels_last", layout):
        data = Data((2, 19, 7, 6), dtype, "normal", "layout")
        x, dz, r, z = (place(data.activation(), where) for _ in range(4))
        mean, var = ops.batch_norm_stats(x)
        rstd, affine = ops.batch_norm_fold(mean, var, None, None, 1e-5)
        results.append(
            (
                mean,
                var,
                ops.batch_norm_apply(x, affine, r, affine, True),
                *ops.batch_norm_bwd_reduce(dz, x, mean, rstd, None, None, z, True),
                *ops.batch_norm_bwd_reduce_pair(dz, z, x, mean, rstd, None, r, var, rstd, None),
            )
        )
        results[-1] += ops.batch_norm_bwd_apply(dz, x, results[-1][5], None, True)
    for want, got in zip(*results, strict=True):
        assert_same_bits(got, want)


@dtypes
def test_stride_0(isa, ops, dtype):
    data = Data((2, 9, 5, 6), dtype, "normal", "stride 0")
    x, finish = data.activation(), torch.randn(6, 9, generator=data.gen)
    dz = torch.ones((), dtype=dtype).expand(x.shape)
    mean, var = ops.batch_norm_stats(x)
    rest = (x, mean, var, None, None, None, True)
    for got, want in zip(
        ops.batch_norm_bwd_reduce(dz, *rest), ops.batch_norm_bwd_reduce(dz.contiguous(), *rest), strict=True
    ):
        assert_same_bits(got, want)
    got = ops.batch_norm_bwd_apply(dz, x, finish, None, True)
    for a, b in zip(got, ops.batch_norm_bwd_apply(dz.contiguous(), x, finish, None, True), strict=True):
        assert_same_bits(a, b)


@dtypes
@pytest.mark.parametrize("shape", [(8, 64, 28, 28), (3, 17, 29, 31), (1, 130, 40, 33)], ids=str)
def test_same_bits_for_any_number_of_threads_and_any_run(isa, ops, threads, dtype, shape):
    data = Data(shape, dtype, "normal", "threads")
    x, dz, affine, finish = (
        data.activation(),
        data.activation(),
        data.affine(),
        torch.randn(6, shape[1], generator=data.gen),
    )

    def run():
        mean, var = ops.batch_norm_stats(x)
        return (
            mean, var, ops.batch_norm_apply(x, affine, dz, affine, True),
            *ops.batch_norm_bwd_reduce(dz, x, mean, var, None, affine, None, True),
            *ops.batch_norm_bwd_reduce_pair(dz, x, x, mean, var, None, dz, mean, var, None),
            *ops.batch_norm_bwd_apply(dz, x, finish, None, True),
        )  # fmt: skip

    threads(2)
    want = run()
    for number in (2, 1, 3, 4):
        threads(number)
        for a, b in zip(run(), want, strict=True):
            assert_same_bits(a, b, f"{number} threads")


@dtypes
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_stay_in_their_channel(isa, ops, dtype, value):
    x = Data((2, 21, 4, 5), dtype, "normal", "nan").activation()
    clean = ops.batch_norm_stats(x.clone())
    x[1, 7, 2, 3] = value
    mean, var = ops.batch_norm_stats(x)
    checks.assert_statistics(mean, var, x)
    others = torch.arange(21) != 7
    assert_same_bits(mean[others], clean[0][others])
    assert_same_bits(var[others], clean[1][others])
    identity = torch.stack([torch.ones(21), torch.zeros(21)])
    assert_exact(ops.batch_norm_apply(x, identity, None, None, True), torch.relu(x.double()))
    zero = torch.zeros_like(x)
    assert_exact(ops.batch_norm_apply(zero, identity, x, identity, True), torch.relu(x.double()))
    ones = torch.ones_like(x)
    finish = torch.stack([torch.ones(21), *torch.zeros(3, 21), *identity])
    _, g = ops.batch_norm_bwd_apply(ones, x, finish, None, True)
    assert_exact(g, checks.kept(x).double(), "the mask lets the gradient through at NaN, as torch's does")
    _, g = ops.batch_norm_bwd_apply(ones, ones, finish, x, True)
    assert_exact(g, checks.kept(x).double(), "the mask by output")


def test_zero_batch(isa, ops):
    x = torch.empty(0, 6, 4, 5)
    mean, var = ops.batch_norm_stats(x)
    assert mean.shape == var.shape == (6,)
    vector = torch.ones(6)
    assert ops.batch_norm_apply(x, torch.ones(2, 6), x, None, True).shape == x.shape
    reduced = ops.batch_norm_bwd_reduce(x, x, vector, vector, vector, torch.ones(2, 6), None, True)
    dgamma, dbeta, finish, g = reduced
    assert g.shape == x.shape
    assert torch.equal(dgamma, torch.zeros(6)) and torch.equal(dbeta, torch.zeros(6))
    dx, g = ops.batch_norm_bwd_apply(x, x, finish, None, True)
    assert dx.shape == g.shape == x.shape


def test_the_gradient_at_exactly_zero_is_blocked(isa, ops):
    x, affine = torch.zeros(1, 20, 2, 3), torch.stack([torch.ones(20), torch.zeros(20)])
    ones, vector = torch.ones_like(x), torch.ones(20)
    for mask in ((affine, None), (None, x)):
        dgamma, dbeta, finish, g = ops.batch_norm_bwd_reduce(ones, x, vector, vector, None, *mask, True)
        assert torch.equal(dbeta, torch.zeros(20)) and torch.equal(dgamma, torch.zeros(20))
        assert torch.equal(g, torch.zeros_like(g))
        _, g = ops.batch_norm_bwd_apply(ones, x, finish, mask[1], True)
        assert torch.equal(g, torch.zeros_like(g))


# ------------------------------------------------------------------------------------------------
# gconv.functional.batch_norm


def functional(function, work, x, gamma, beta, dz, residual, relu, training, momentum, composed):
    """(named results of one call of `function` at the dtype `work` of activations, backward included)"""
    wide = torch.promote_types(work, torch.float32)
    c = x.shape[1]
    running = [torch.linspace(-1, 1, c).to(wide), torch.linspace(0.5, 2, c).to(wide)]
    leaf = x.to(work).requires_grad_()
    leaves = {"x": leaf}
    if gamma is not None:
        leaves |= {"gamma": gamma.to(wide).requires_grad_(), "beta": beta.to(wide).requires_grad_()}
    if residual is not None:
        leaves["residual"] = residual.to(work).requires_grad_()
    args = (leaf, *running, leaves.get("gamma"), leaves.get("beta"), training, momentum, 1e-5)
    if composed:
        z = function(*args)
        z = z if residual is None else z + leaves["residual"]
        z = torch.relu(z) if relu else z
    else:
        z = function(*args, residual=leaves.get("residual"), relu=relu)
    if dz is None:
        return z.detach()
    grads = torch.autograd.grad(z, list(leaves.values()), dz.to(work))
    results = {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}
    return {"z": z.detach(), "running_mean": running[0], "running_var": running[1]} | results


@dtypes
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine, residual, relu", list(itertools.product([True, False], repeat=3)))
def test_functional_against_stock(ops, dtype, training, affine, residual, relu):
    shape = (3, 20, 7, 5)
    data = Data(shape, dtype, "normal", "functional", affine, residual, relu)
    layout = checks.rotate(LAYOUTS, dtype, training, affine, residual, relu)
    x, r = place(data.activation(), layout), data.activation() if residual else None
    gamma, beta = (data.vector(), data.vector()) if affine else (None, None)
    rest = (r, relu, training, 0.3)
    exact_z = functional(F.batch_norm, torch.float64, x, gamma, beta, None, *rest, True)
    dz = torch.where(exact_z.abs() < KINK_MARGIN[dtype], 0, data.activation()) if relu else data.activation()
    exact = functional(F.batch_norm, torch.float64, x, gamma, beta, dz, *rest, True)
    own = functional(F.batch_norm, dtype, x, gamma, beta, dz, *rest, True)
    gconv.backend.reset_counts()
    got = functional(gconv.functional.batch_norm, dtype, x, gamma, beta, dz, *rest, False)
    assert gconv.backend.counts().get("cpu.batch_norm") == 1, gconv.backend.counts()
    for name in exact:
        assert_accurate(
            got[name], exact[name], own[name], name, torch.float32 if "running" in name else dtype
        )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
def test_functional_keeps_the_memory_format(memory_format, training):
    x = torch.randn(2, 6, 5, 4).contiguous(memory_format=memory_format).requires_grad_()
    args = (x, torch.zeros(6), torch.ones(6), None, None, training)
    y, stock = gconv.functional.batch_norm(*args), F.batch_norm(*args)
    assert y.stride() == stock.stride()
    for dy in (torch.ones_like(y), torch.ones(()).expand(y.shape)):
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        assert dx.shape == x.shape


def test_functional_zero_batch_and_one_value():
    running = torch.zeros(4), torch.ones(4)
    y = gconv.functional.batch_norm(torch.empty(0, 4, 3, 3), *running, training=True)
    assert y.shape == (0, 4, 3, 3)
    assert torch.equal(running[0], torch.zeros(4)) and torch.equal(running[1], torch.ones(4)), (
        "an empty batch is no batch"
    )
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        gconv.functional.batch_norm(torch.ones(1, 4, 1, 1), *running, training=True)


def test_functional_without_running_statistics():
    x = torch.randn(2, 4, 3, 3)
    want = F.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(gconv.functional.batch_norm(x, None, None, training=True), want)
    with pytest.raises((RuntimeError, ValueError), match="running_mean"):
        gconv.functional.batch_norm(x, None, None, training=False)


def test_mask_uses_channel_vectors_of_its_own_channel(isa, ops):
    """Open and shut channels in turn: a mask that reads its neighbour's affine shows at once."""
    c = 70
    shut = torch.arange(c) % 3 == 0
    affine = torch.stack([torch.zeros(c), torch.where(shut, -1.0, 1.0)])
    x = torch.ones(2, c, 3, 4)
    slope = torch.arange(c).float()
    finish = torch.stack([slope, *torch.zeros(3, c), *affine])
    dx, g = ops.batch_norm_bwd_apply(x, x, finish, None, True)
    want = torch.where(shut, 0.0, 1.0)
    assert torch.equal(g, channel(want).expand_as(g)) and torch.equal(dx, channel(want * slope).expand_as(dx))
