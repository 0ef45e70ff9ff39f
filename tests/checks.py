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
import math
import zlib

import torch
import torch.nn.functional as F

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")
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
    # On some CPUs torch's own kernels spread a NaN over the pixels that share a vector with it.
    known = [b.isfinite() for b in baselines]
    assert all(2 * k.sum() >= k.numel() for k in known), (
        f"{label}: torch's own result is not finite: no yardstick"
    )
    magnitude = exact.abs() if magnitude is None else magnitude.double()[finite].maximum(exact.abs())
    eps = torch.finfo(dtype).eps
    for name, norm, floor in (
        ("max", lambda t: t.abs().max().item(), FLOOR_MAX[dtype]),
        ("RMS", lambda t: t.square().mean().sqrt().item(), FLOOR_RMS[dtype]),
    ):
        error, own, scale = (
            norm(actual - exact),
            max(norm(b[k] - exact[k]) for b, k in zip(baselines, known)),
            norm(magnitude),
        )
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


def conv2d(x, weight, stride, padding, dilation, groups):
    """F.conv2d; of a 1x1 with a stride the pixels are taken first, for gradients of torch's own at stride
    (1, 2) write outside their memory (torch 2.13, oneDNN)."""
    if tuple(weight.shape[2:]) == (1, 1) and not any(padding):
        x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
    return F.conv2d(x, weight, None, stride, padding, dilation, groups)


@one_thread()
def ref_fwd(work, x, weight, stride, padding, dilation, groups, act_, affine, residual, relu):
    y = conv2d(act(work, x, act_), weight.to(work), stride, padding, dilation, groups)
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
        out = conv2d(point, weight.to(work), stride, padding, dilation, groups)
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
        out = conv2d(act(work, x, act_), point, stride, padding, dilation, groups)
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


def ref_bn_apply(work, x, affine, residual, residual_affine, relu):
    a, b = vectors(affine, work)
    y = (a * x.to(work) + b).to(work)
    if residual is not None:
        y = y + (
            residual
            if residual_affine is None
            else ref_bn_apply(work, residual, residual_affine, None, None, False)
        ).to(work)
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

# Tensors of the same shape that repeat some of their elements: stride 0.
EXPANDED = {
    "scalar": lambda t: t[:1, :1, :1, :1].expand(t.shape),
    "batch": lambda t: t[:1].expand(t.shape),
    "channel": lambda t: t[:, :1].expand(t.shape),
    "pixel": lambda t: t[:, :, :1, :1].expand(t.shape),
    "row": lambda t: t[:, :, :, :1].expand(t.shape),
}

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


def rotate(values, *key):
    """One of `values`, chosen evenly but arbitrarily by the key: pairs are covered without the full
    product."""
    return values[zlib.crc32(repr(key).encode()) % len(values)]


def clear_of_kink(x, a, b, margin):
    """Moves the elements of `x` whose a·x + b is within `margin` of 0 to where it is 1 or more."""
    a64, b64 = channel(a.double()), channel(b.double())
    near = (a64 * x.double() + b64).abs() < margin
    return torch.where(near, (b64.abs() + 1) / torch.where(a64 == 0, 1.0, a64), x.double()).to(x.dtype)


def zero_near_kink(dy, y, a, b, margin):
    """`dy` with zeros where a·y + b is within `margin` of 0: there either side of ReLU is a right answer."""
    near = (channel(a.double()) * y.double() + channel(b.double())).abs() < margin
    return torch.where(near, torch.zeros((), dtype=dy.dtype), dy)


def verify_threads(run, threads):
    """run(), a dict of tensors, has the same bits for any number of threads and from run to run."""
    threads(2)
    want = run()
    for number in (2, 1, 3, 4):
        threads(number)
        for name, got in run().items():
            assert_same_bits(got, want[name], f"{name} with {number} threads")


def kept_after(ops, run):
    """Bytes that gconv's memory keeps of what run() allocated: workspace, and results, which are dropped."""
    ops.empty_cpu_cache()
    before = ops.cpu_cache_use()[1]
    run()
    return ops.cpu_cache_use()[1] - before


def verify_stride_0(run, args, activations, how):
    """run(args), a dict of tensors, changes by no bit where activations repeat elements by stride 0."""
    expanded = {n: EXPANDED[how](args[n]) for n in activations}
    got = run({**args, **expanded})
    want = run({**args, **{n: place(t, "channels_last") for n, t in expanded.items()}})
    for name in want:
        assert_same_bits(got[name], want[name], name)
