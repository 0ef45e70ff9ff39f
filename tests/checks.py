"""The oracle of the tests: what each op of `gconv` must return, and how close is close enough.

**Oracle.** Every C++ op has a `ref_*` twin here, written with plain torch (`F.conv2d` and autograd). The
first argument, `work`, is the dtype of the activations: `torch.float64` gives the exact answer; the dtype
under test gives *torch's own* answer, every intermediate stored at that dtype, as a chain of stock modules
would store it.

**Accuracy.** `assert_accurate` bounds the largest and the RMS error against float64 by twice torch's own plus
a floor. The floor is for small outputs, where torch may be exact by luck. In rounding units (eps) of the
dtype times the largest (RMS) exact value: float32 2 (1), because sums are taken in another order; bfloat16
and float16 1/2 (1/4), because sums are float32 and only the last rounding differs. An error of 1 % fails for
every dtype.

**Exactness.** With small integers every partial sum is a whole number below 2^24, exact in float32 in any
order; `assert_exact` then wants the very bits. For bfloat16 and float16 the results themselves are kept
representable.

Both treat NaN and infinity as values: a NaN in one place and not in the other is a failure.
"""

import contextlib
import functools
import math
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

ISAS = ("portable", "avx2", "avx512")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS32 = torch.finfo(torch.float32).eps
FLOOR_MAX = {torch.float32: 2.0, torch.bfloat16: 0.5, torch.float16: 0.5}
FLOOR_RMS = {torch.float32: 1.0, torch.bfloat16: 0.25, torch.float16: 0.25}
# Distance from the kink of ReLU under which rounding may put a value on either side.
KINK_MARGIN = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 2e-2}


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------
# criteria


def _same_special_values(actual, exact, label):
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(actual) != test(exact)
        if wrong.any():
            where = tuple(wrong.nonzero()[0].tolist())
            raise AssertionError(
                f"{label}: {name} in {int(wrong.sum())} wrong places, first {where}: "
                f"want {exact[where].item()}, got {actual[where].item()}"
            )


def _same_shape(actual, want, label):
    if tuple(actual.shape) != tuple(want.shape):
        raise AssertionError(f"{label}: want shape {tuple(want.shape)}, got {tuple(actual.shape)}")


def assert_accurate(actual, exact, baseline, label="", dtype=None, magnitude=None):
    """Errors of `actual` against `exact` (float64) at most twice those of `baseline` (torch's own) plus the
    floor.

    `baseline` is a tensor, or several: torch sums in another order for another memory format, each order is
    torch's own. `dtype` is the precision that the computation went through (default: that of `actual`).
    `magnitude`, of the shape of `exact`, joins |exact| in the floor where the result is a sum of larger terms
    that cancel.
    """
    dtype = dtype or actual.dtype
    _same_shape(actual, exact, label)
    baselines = [baseline] if isinstance(baseline, torch.Tensor) else baseline
    actual = actual.double()
    _same_special_values(actual, exact, label)
    finite = torch.isfinite(exact)
    actual, exact, baselines = actual[finite], exact[finite], [b.double()[finite] for b in baselines]
    if exact.numel() == 0:
        return
    assert all(b.isfinite().all() for b in baselines), (
        f"{label}: torch's own result is not finite: no yardstick"
    )
    magnitude = exact.abs() if magnitude is None else magnitude.double()[finite].maximum(exact.abs())
    eps = torch.finfo(dtype).eps
    for name, norm, floor in (
        ("max", lambda t: t.abs().max().item(), FLOOR_MAX[dtype]),
        ("RMS", lambda t: t.square().mean().sqrt().item(), FLOOR_RMS[dtype]),
    ):
        error, own, scale = norm(actual - exact), max(norm(b - exact) for b in baselines), norm(magnitude)
        bound = 2 * own + floor * eps * scale
        if not error <= bound:
            worst = int((actual - exact).abs().argmax())
            raise AssertionError(
                f"{label}: {name} error {error:.3e} > {bound:.3e} (torch's own {own:.3e}, "
                f"{name} value {scale:.3e}); "
                f"worst: want {exact[worst].item():.9g}, got {actual[worst].item():.9g}"
            )


def assert_exact(actual, exact, label=""):
    """Bit equality with the float64 result rounded once to the dtype of `actual` (NaN equals NaN, 0 equals
    -0)."""
    _same_shape(actual, exact, label)
    want = exact.to(actual.dtype)
    wrong = ~((actual == want) | (actual.isnan() & want.isnan()))
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{label}: {int(wrong.sum())} of {wrong.numel()} values differ, first {where}: "
            f"want {want[where].item()}, got {actual[where].item()}"
        )


def assert_same_bits(a, b, label=""):
    """Equal down to the bits, NaN payloads and signed zeros included."""
    _same_shape(a, b, label)
    as_int = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    wrong = a.contiguous().view(as_int) != b.contiguous().view(as_int)
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{label}: {int(wrong.sum())} of {wrong.numel()} values differ in their bits, first {where}: "
            f"{a[where].item()!r} and {b[where].item()!r}"
        )


def assert_statistics(mean, var, y, label=""):
    """`mean`, `var` (float32 [K]) of `y` as stored: as good as the two-pass formula in float32.

    Allowed on top of twice the two-pass error: 2 eps (|mean| + std) for the mean; for the variance 4 eps var
    + eps |mean| std (means of tiles are float32) + (4 eps mean)^2 (a constant channel). At mean/std = 1000
    that is 1.2e-4 of var; Σy² - (Σy)²/M in float32 is wrong by 6e-2 and more there. A channel that holds an
    infinity has no variance (NaN), and as its mean an infinity or NaN.
    """
    assert mean.dtype == var.dtype == torch.float32, f"{label}: want float32 statistics"
    dims = (0, 2, 3)
    y64, y32 = y.double(), y.float()
    mean64, var64 = y64.mean(dims), y64.var(dims, correction=0)
    mean32 = y32.mean(dims)
    var32 = (y32 - channel(mean32)).square().mean(dims)
    std64 = var64.sqrt()
    for name, got, want, own, floor in (
        ("mean", mean, mean64, mean32, 2 * EPS32 * (mean64.abs() + std64)),
        (
            "var",
            var,
            var64,
            var32,
            EPS32 * (4 * var64 + mean64.abs() * std64) + (4 * EPS32 * mean64).square(),
        ),
    ):
        _same_shape(got, want, f"{label} {name}")
        if (got.isfinite() != want.isfinite()).any() or (
            name == "var" and (got.isnan() != want.isnan()).any()
        ):
            raise AssertionError(f"{label}: {name}: want {want.tolist()}, got {got.tolist()}")
        bound = 2 * (own.double() - want).abs() + floor
        error = (got.double() - want).abs()
        bad = torch.isfinite(want) & ~(error <= bound)
        if bad.any():
            k = int(bad.nonzero()[0])
            raise AssertionError(
                f"{label}: {name}[{k}]: want {want[k].item():.9g}, got {got[k].item():.9g}: "
                f"error {error[k].item():.3e} "
                f"> {bound[k].item():.3e} (mean {mean64[k].item():.4g}, std {std64[k].item():.4g})"
            )


def assert_channels_last(t, label=""):
    """Contiguous channels_last with exactly the strides of torch.empty(...,
    memory_format=torch.channels_last)."""
    want = torch.empty(t.shape, memory_format=torch.channels_last).stride()
    assert t.stride() == want, f"{label}: want channels_last strides {want}, got {t.stride()}"


# ------------------------------------------------------------------------------------------------
# the oracle


@contextlib.contextmanager
def one_thread():
    """The oracle's many tiny convolutions cost less than waking a second thread for each, above all on a busy
    machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def channel(v):
    """[C] -> [1, C, 1, 1]"""
    return v.view(1, -1, 1, 1)


def vectors(v, work):
    """Rows of a per-channel matrix, each [1, C, 1, 1]: float64 for the oracle, float32 beside low
    precision."""
    return [channel(row.to(torch.promote_types(work, torch.float32))) for row in v]


def kept(t):
    """Where ReLU lets the gradient through; NaN does."""
    return ~(t <= 0)


def act(work, x, coefficients):
    x = x.to(work)
    if coefficients is None:
        return x
    a, b = vectors(coefficients[:2], work)
    return torch.relu(a * x + b).to(work)


def finished(work, dy, y, finish):
    """The gradient that a convolution's backward works on: dy, or BN + ReLU's backward of it."""
    dy = dy.to(work)
    if finish is None:
        return dy
    A, B, C, mean, a, b = vectors(finish, work)
    y = y.to(work)
    return (A * (dy * kept(a * y + b)) + B * (y - mean) + C).to(work)


@one_thread()
def ref_fwd(work, x, weight, stride, padding, dilation, groups, act_, affine, residual, relu):
    y = F.conv2d(act(work, x, act_), weight.to(work), None, stride, padding, dilation, groups)
    if affine is not None:
        c, d = vectors(affine, work)
        y = (c * y + d).to(work)
    if residual is not None:
        y = y + residual.to(work)
    return torch.relu(y) if relu else y


@one_thread()
def ref_bwd_input(work, dy, weight, input_size, stride, padding, dilation, groups, y, finish, x, act_):
    """(dx, sums, magnitude of the sums)"""
    point = torch.zeros(list(input_size), dtype=work, requires_grad=True)
    with torch.enable_grad():
        out = F.conv2d(point, weight.to(work), None, stride, padding, dilation, groups)
    (dx,) = torch.autograd.grad(out, point, finished(work, dy, y, finish))
    if act_ is None:
        return dx, torch.empty(0), torch.empty(0)
    a, b, mean, rstd = vectors(act_, work)
    dx = dx * kept(a * x.to(work) + b)
    g = dx.to(mean.dtype)
    terms = torch.stack([g, g * (x.to(mean.dtype) - mean) * rstd])
    dims = (1, 3, 4)
    return dx, terms.sum(dims), terms.square().sum(dims).sqrt()


@one_thread()
def ref_bwd_weight(work, dy, x, weight_size, stride, padding, dilation, groups, y, finish, act_):
    point = torch.zeros(list(weight_size), dtype=work, requires_grad=True)
    with torch.enable_grad():
        out = F.conv2d(act(work, x, act_), point, None, stride, padding, dilation, groups)
    return torch.autograd.grad(out, point, finished(work, dy, y, finish))[0]


def torchs_own(reference, dtype, args):
    """The results of `reference` at `dtype` for NCHW and for channels_last activations: torch runs other
    kernels for each."""

    def in_format(memory_format):
        return [
            t.contiguous(memory_format=memory_format) if isinstance(t, torch.Tensor) and t.dim() == 4 else t
            for t in args
        ]

    results = [reference(dtype, *in_format(f)) for f in (torch.contiguous_format, torch.channels_last)]
    return results if isinstance(results[0], torch.Tensor) else list(zip(*results, strict=True))


def ref_bn_fold(mean, var, gamma, beta, eps):
    """float64 (rstd [C], affine [2, C], magnitude of affine's second row)"""
    mean, var = mean.double(), var.double()
    gamma = torch.ones_like(mean) if gamma is None else gamma.double()
    beta = torch.zeros_like(mean) if beta is None else beta.double()
    rstd = 1 / torch.sqrt(var + eps)
    return (
        rstd,
        torch.stack([gamma * rstd, beta - mean * gamma * rstd]),
        beta.abs() + (mean * gamma * rstd).abs(),
    )


def ref_bn_apply(work, x, affine, residual, relu):
    a, b = vectors(affine, work)
    y = (a * x.to(work) + b).to(work)
    if residual is not None:
        y = y + residual.to(work)
    return torch.relu(y) if relu else y


def masked(work, dz, x, affine, z):
    g = dz.to(work)
    if z is not None:
        return g * kept(z.to(work))
    if affine is not None:
        a, b = vectors(affine, work)
        return g * kept(a * x.to(work) + b)
    return g


def ref_bn_bwd_reduce(work, dz, x, mean, rstd, gamma, affine, z):
    """(dgamma, dbeta, finish [6, C], magnitudes of dgamma and of dbeta)"""
    wide = torch.promote_types(work, torch.float32)
    g = masked(work, dz, x, affine, z).to(wide)
    mean, rstd = mean.to(wide), rstd.to(wide)
    gamma = torch.ones_like(mean) if gamma is None else gamma.to(wide)
    terms = g * (x.to(wide) - channel(mean)) * channel(rstd)
    dims = (0, 2, 3)
    dgamma, dbeta = terms.sum(dims), g.sum(dims)
    m = max(x.numel() // max(x.shape[1], 1), 1)
    coefficients = gamma * rstd, -gamma * rstd**2 * dgamma / m, -gamma * rstd * dbeta / m, mean
    mask = no_mask(len(mean)) if affine is None or z is not None else affine
    finish = torch.stack([*coefficients, *mask.to(wide)])
    return dgamma, dbeta, finish, terms.square().sum(dims).sqrt(), g.square().sum(dims).sqrt()


def no_mask(channels):
    """The (a; b) of a `finish` that masks nothing: a*x + b = 1."""
    return torch.stack([torch.zeros(channels), torch.ones(channels)])


def ref_bn_bwd_apply(work, dz, x, finish, z):
    """(dx, g)"""
    g = masked(work, dz, x, finish[4:], z)
    A, B, C, mean = vectors(finish[:4], work)
    return (A * g + B * (x.to(work) - mean) + C).to(work), g


# ------------------------------------------------------------------------------------------------
# data

LAYOUTS = ("channels_last", "contiguous", "sliced", "sliced_nchw", "stepped", "transposed")


def place(t, layout):
    """The values of `t` [N, C, H, W] in the given memory layout; whatever lies between them is NaN."""
    n, c, h, w = t.shape
    if layout == "channels_last":
        return torch.empty(t.shape, dtype=t.dtype, memory_format=torch.channels_last).copy_(t)
    if layout == "contiguous":
        return t.clone(memory_format=torch.contiguous_format)
    if layout == "sliced":
        buffer = torch.full((n + 1, h + 2, w + 3, c + 3), math.nan, dtype=t.dtype).permute(0, 3, 1, 2)
        view = buffer[1:, 1 : c + 1, 1 : h + 1, 2 : w + 2]
    elif layout == "sliced_nchw":
        view = torch.full((n + 1, c + 2, h + 1, w + 3), math.nan, dtype=t.dtype)[:n, 2:, 1:, 1 : w + 1]
    elif layout == "stepped":
        buffer = torch.full((n, 2 * h, 2 * w, c), math.nan, dtype=t.dtype).permute(0, 3, 1, 2)
        view = buffer[:, :, 1::2, ::2]
    elif layout == "transposed":
        view = torch.full((n, w, h, c), math.nan, dtype=t.dtype).permute(0, 3, 2, 1)
    else:
        raise ValueError(f"layout: want one of {LAYOUTS}, got {layout}")
    assert view.shape == t.shape
    return view.copy_(t)


def generator(*key):
    """A generator seeded by what is tested, so that a case gets the same data alone and in the whole
    suite."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def integers(shape, limit, gen, density=1.0):
    t = torch.randint(-limit, limit + 1, shape, generator=gen).float()
    return t if density >= 1 else t * (torch.rand(shape, generator=gen) < density)


def choice(shape, values, gen):
    return torch.tensor(values, dtype=torch.float32)[torch.randint(len(values), shape, generator=gen)]


def clear_of_kink(x, a, b, margin):
    """Moves the elements of `x` whose a·x + b is within `margin` of 0 to where it is 1 or more."""
    a64, b64 = channel(a.double()), channel(b.double())
    near = (a64 * x.double() + b64).abs() < margin
    return torch.where(near, (b64.abs() + 1) / torch.where(a64 == 0, 1.0, a64), x.double()).to(x.dtype)


def zero_near_kink(dy, y, a, b, margin):
    """`dy` with zeros where a·y + b is within `margin` of 0: there either side of ReLU is a right answer."""
    near = (channel(a.double()) * y.double() + channel(b.double())).abs() < margin
    return torch.where(near, torch.zeros((), dtype=dy.dtype), dy)


# ------------------------------------------------------------------------------------------------
# the grid


@dataclass(frozen=True)
class Case:
    """One convolution. cin and cout are channels per group."""

    cin: int
    cout: int
    groups: int
    n: int
    h: int
    w: int
    stride: tuple = (1, 1)
    padding: tuple = (1, 1)
    dilation: tuple = (1, 1)

    @property
    def input_size(self):
        return [self.n, self.cin * self.groups, self.h, self.w]

    @property
    def weight_size(self):
        return [self.cout * self.groups, self.cin, 3, 3]

    @property
    def output_size(self):
        sizes = ((self.h, self.w), self.padding, self.dilation, self.stride)
        oh, ow = ((i + 2 * p - 2 * d - 1) // s + 1 for i, p, d, s in zip(*sizes, strict=True))
        return [self.n, self.cout * self.groups, oh, ow]

    @property
    def geometry(self):
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    def __str__(self):
        def pair(p):
            return str(p[0]) if p[0] == p[1] else f"{p[0]}{p[1]}"

        return (
            f"{self.cin}to{self.cout}x{self.groups}-n{self.n}-{self.h}x{self.w}"
            f"-s{pair(self.stride)}p{pair(self.padding)}d{pair(self.dilation)}"
        )


# (channels per group in, out, groups). Every width of the issue with equal in and out, then unequal ones.
WIDTHS = (
    (1, 1, 32), (2, 2, 16), (3, 3, 3), (4, 4, 32), (5, 5, 4), (8, 8, 8), (16, 16, 3), (24, 24, 2), (32, 32,
    2), (48, 48, 1),
    (56, 56, 2), (64, 64, 1), (112, 112, 1),
    (1, 1, 5), (4, 4, 3), (8, 8, 1), (16, 16, 1), (2, 2, 1), (32, 32, 1), (3, 3, 1), (5, 5, 1), (24, 24, 1),
    (3, 5, 2), (4, 8, 8), (16, 24, 2), (8, 1, 4), (1, 8, 3), (8, 4, 5), (1, 2, 16), (2, 1, 17), (3, 64, 1),
    (64, 3, 1),
    (24, 16, 1), (7, 9, 2), (32, 16, 1), (17, 33, 1), (1, 1, 67), (12, 20, 3), (4, 6, 5), (6, 4, 7),
)  # fmt: skip

# (N, H, W, stride, padding, dilation)
GEOMETRIES = (
    (2, 15, 13, (1, 1), (1, 1), (1, 1)),
    (1, 14, 14, (2, 2), (1, 1), (1, 1)),
    (1, 7, 7, (1, 1), (1, 1), (1, 1)),
    (3, 2, 3, (1, 2), (1, 1), (1, 1)),
    (1, 29, 31, (2, 2), (1, 1), (1, 1)),
    (1, 57, 3, (2, 1), (1, 1), (1, 1)),
    (2, 1, 1, (1, 1), (1, 1), (1, 1)),
    (1, 3, 3, (1, 1), (0, 0), (1, 1)),
    (2, 9, 8, (1, 1), (0, 2), (1, 1)),
    (1, 8, 17, (2, 2), (0, 0), (1, 1)),
    (1, 13, 11, (1, 1), (2, 2), (2, 2)),
    (2, 12, 10, (2, 2), (2, 2), (2, 2)),
    (1, 11, 16, (1, 2), (2, 2), (3, 3)),
    (1, 9, 9, (1, 1), (1, 1), (3, 3)),
    (2, 6, 19, (2, 1), (0, 2), (1, 2)),
    (1, 10, 7, (2, 2), (2, 0), (2, 1)),
    (1, 7, 9, (1, 1), (0, 0), (3, 1)),
    (3, 5, 6, (2, 2), (2, 2), (1, 1)),
    (1, 3, 57, (1, 1), (1, 1), (1, 1)),
    (1, 8, 8, (2, 1), (1, 1), (2, 2)),
    (1, 16, 9, (1, 2), (0, 0), (2, 2)),
    (1, 9, 15, (2, 2), (1, 1), (3, 3)),
    (2, 7, 6, (2, 2), (0, 2), (1, 1)),
    (1, 2, 2, (2, 2), (1, 1), (1, 1)),
    (1, 12, 9, (1, 2), (0, 2), (3, 2)),
    (1, 4, 33, (1, 1), (2, 2), (1, 1)),
    (1, 9, 10, (2, 1), (0, 0), (1, 1)),
    (1, 13, 7, (2, 1), (2, 2), (3, 3)),
    (1, 8, 12, (2, 2), (0, 0), (3, 3)),
)


def _grid():
    """Each width with two geometries, each geometry with several widths; each stride, padding and dilation
    beside each other."""
    cases = []
    for i, width in enumerate(WIDTHS):
        for j in (2 * i, 2 * i + 5):
            case = Case(*width, *GEOMETRIES[j % len(GEOMETRIES)])
            if case not in cases:
                cases.append(case)
    # The plain layer, in the shape of a real network, for the widths that matter most: full tiles, then their
    # remainders.
    cases += [
        Case(*width, 1, 10, 30)
        for width in ((1, 1, 32), (4, 4, 32), (8, 8, 8), (16, 16, 4), (32, 32, 2), (64, 64, 1))
    ]
    # Padding as wide as dilated taps reach.
    cases += [
        Case(4, 4, 8, 1, 9, 11, (1, 1), (3, 3), (3, 3)),
        Case(8, 8, 2, 1, 10, 8, (2, 2), (4, 4), (2, 2)),
        Case(5, 3, 2, 2, 6, 7, (1, 2), (3, 4), (2, 2)),
    ]
    return tuple(cases)


CASES = _grid()
ZERO_BATCH = Case(4, 4, 2, 0, 5, 6)


def rotate(values, *key):
    """One of `values`, chosen evenly but arbitrarily by the key: pairs are covered without the full
    product."""
    return values[zlib.crc32(repr(key).encode()) % len(values)]


FWD_VARIANTS = (
    "plain", "bias", "relu", "affine", "affine_relu", "residual", "affine_residual", "affine_residual_relu",
    "act", "act_affine_residual_relu",
)  # fmt: skip
STATS_VARIANTS = ("plain", "act")
BWD_INPUT_VARIANTS = ("plain", "finish", "finish_nomask", "act", "finish_act")
BWD_WEIGHT_VARIANTS = ("plain", "finish", "finish_nomask", "act", "finish_act")


class Data:
    """Makes the tensors of one case. kind "integer": exact in float32 and in the dtype; "normal": as in
    training."""

    def __init__(self, case, dtype, kind, *key):
        self.case, self.dtype, self.kind = case, dtype, kind
        self.key = (str(case), str(dtype), kind, *key)
        self.gen = generator(*self.key)
        self.low = dtype != torch.float32

    def layout(self, name):
        return rotate(LAYOUTS, *self.key, name)

    def placed(self, t, name):
        return place(t.to(self.dtype), self.layout(name))

    def activation(self, shape):
        if self.kind == "integer":
            return integers(shape, 1 if self.low else 3, self.gen)
        return torch.randn(shape, generator=self.gen)

    def weight(self, terms):
        """`terms`: products per result. Low precision thins the weights so that no result passes 256
        (bfloat16's exact range)."""
        shape = self.case.weight_size
        if self.kind == "integer":
            w = integers(shape, 1, self.gen, 40 / terms) if self.low else integers(shape, 2, self.gen)
        else:
            w = torch.randn(shape, generator=self.gen) * math.sqrt(2 / (9 * self.case.cin))
        w = w.to(self.dtype)
        return w.contiguous(
            memory_format=rotate((torch.contiguous_format, torch.channels_last), *self.key, "weight")
        )

    def pair(self, channels, values=(-1.0, 1.0, 2.0)):
        """(scale; shift) per channel, the shift mostly positive, so that relu(shift) differs from padding's
        0."""
        if self.kind == "integer":
            shift = torch.randint(-1, 3, (channels,), generator=self.gen).float()
            return torch.stack([choice((channels,), values, self.gen), shift])
        scale = torch.randn(channels, generator=self.gen) + 0.5
        return torch.stack([scale, torch.randn(channels, generator=self.gen) + 0.5])

    def finish(self, channels, mask):
        """[6, K]: A, B, C, mean, a, b"""
        A, C = self.pair(channels, (-1.0, 1.0))
        B, mean = self.pair(channels, (-1.0, 0.0, 1.0))
        a, b = self.pair(channels)
        if self.kind == "normal":
            B, C = 0.1 * B, 0.1 * C
        if not mask:
            a, b = torch.zeros_like(a), torch.ones_like(b)
        return torch.stack([A, B, C, mean, a, b])

    def gradient(self, variant):
        """(dy, y, finish) of a backward; y and finish None without a finish."""
        size = self.case.output_size
        dy = self.activation(size).to(self.dtype)
        if "finish" not in variant:
            return self.placed(dy, "dy"), None, None
        finish = self.finish(size[1], "nomask" not in variant)
        y = self.activation(size).to(self.dtype)
        if self.kind == "normal":
            dy = zero_near_kink(dy, y, finish[4], finish[5], 1e-4)
        return self.placed(dy, "dy"), self.placed(y, "y"), finish


@functools.lru_cache(maxsize=16)
def fwd_problem(case, dtype, kind, variant):
    """(arguments of grouped_conv_fwd, exact, torch's own)"""
    data = Data(case, dtype, kind, "fwd", variant)
    x, weight = data.placed(data.activation(case.input_size), "x"), data.weight(9 * case.cin)
    k = case.output_size[1]
    act_ = data.pair(case.input_size[1]) if "act" in variant.split("_") else None
    affine = residual = None
    if "affine" in variant or variant == "bias":
        affine = data.pair(k)
    if variant == "bias":
        affine[0] = 1
    if "residual" in variant:
        residual = data.placed(data.activation(case.output_size), "residual")
    args = (x, weight, *case.geometry, act_, affine, residual, variant.endswith("relu"))
    return (
        args,
        ref_fwd(torch.float64, *args),
        None if kind == "integer" else torchs_own(ref_fwd, dtype, args),
    )


@functools.lru_cache(maxsize=16)
def bwd_input_problem(case, dtype, kind, variant):
    data = Data(case, dtype, kind, "bwd_input", variant)
    weight = data.weight(9 * case.cout)
    dy, y, finish = data.gradient(variant)
    x = act_ = None
    if variant.endswith("act"):
        channels = case.input_size[1]
        mean_rstd = data.pair(channels, (0.5, 1.0, 2.0)).flip(0)
        act_ = torch.cat([data.pair(channels), mean_rstd])
        x = data.activation(case.input_size).to(dtype)
        if kind == "normal":
            x = clear_of_kink(x, act_[0], act_[1], 1e-4)
        x = data.placed(x, "x")
    args = (dy, weight, case.input_size, *case.geometry, y, finish, x, act_)
    return (
        args,
        ref_bwd_input(torch.float64, *args),
        None if kind == "integer" else torchs_own(ref_bwd_input, dtype, args),
    )


@functools.lru_cache(maxsize=16)
def bwd_weight_problem(case, dtype, kind, variant):
    data = Data(case, dtype, kind, "bwd_weight", variant)
    x = data.placed(data.activation(case.input_size), "x")
    dy, y, finish = data.gradient(variant)
    act_ = data.pair(case.input_size[1]) if variant.endswith("act") else None
    args = (dy, x, case.weight_size, *case.geometry, y, finish, act_)
    return (
        args,
        ref_bwd_weight(torch.float64, *args),
        None if kind == "integer" else torchs_own(ref_bwd_weight, dtype, args),
    )


def verify_fwd(op, case, dtype, kind, variant):
    """Runs `op` (grouped_conv_fwd, or a stand-in for it) on the case and holds it to the oracle."""
    args, exact, own = fwd_problem(case, dtype, kind, variant)
    y = op(*args)
    label = f"grouped_conv_fwd {variant}"
    assert y.dtype == dtype, f"{label}: want {dtype}, got {y.dtype}"
    if kind == "integer":
        assert_exact(y, exact, label)
    else:
        assert_accurate(y, exact, own, label)
    assert_channels_last(y, label)


def verify_fwd_stats(op, case, dtype, kind, variant):
    args, exact, own = fwd_problem(case, dtype, kind, variant)
    y, mean, var = op(*args[:7])
    label = f"grouped_conv_fwd_stats {variant}"
    assert y.dtype == dtype, f"{label}: want {dtype}, got {y.dtype}"
    if kind == "integer":
        assert_exact(y, exact, label)
    else:
        assert_accurate(y, exact, own, label)
    assert_channels_last(y, label)
    assert_statistics(mean, var, y, label)


def verify_bwd_input(op, case, dtype, kind, variant):
    args, (exact, exact_sums, magnitude), own = bwd_input_problem(case, dtype, kind, variant)
    dx, sums = op(*args)
    label = f"grouped_conv_bwd_input {variant}"
    assert dx.dtype == dtype and sums.dtype == torch.float32, f"{label}: got {dx.dtype}, {sums.dtype}"
    if kind == "integer":
        assert_exact(exact.to(dtype), exact, f"{label}: the test's own data are not representable")
        assert_exact(dx, exact, label)
        assert_exact(sums, exact_sums, f"{label} sums")
    else:
        assert_accurate(dx, exact, own[0], label)
        assert_accurate(sums, exact_sums, own[1], f"{label} sums", dtype, magnitude)
    assert_channels_last(dx, label)


def verify_bwd_weight(op, case, dtype, kind, variant):
    args, exact, own = bwd_weight_problem(case, dtype, kind, variant)
    dweight = op(*args)
    label = f"grouped_conv_bwd_weight {variant}"
    assert dweight.dtype == dtype, f"{label}: want {dtype}, got {dweight.dtype}"
    if kind == "integer":
        assert_exact(dweight, exact, label)
    else:
        assert_accurate(dweight, exact, own, label)
