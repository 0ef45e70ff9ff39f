"""The criteria must fail on wrong results: each seeded defect below has to be caught by the very checks of
the other tests."""

import functools

import checks
import conv_cases
import pytest
import torch
import torch.nn.functional as F
from conv_cases import Case

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

CASE = Case(4, 4, 4, 2, 9, 10)
STRIDED = Case(8, 16, 2, 2, 9, 10, (2, 1), (1, 1))


def shifted_column(t):
    return torch.roll(t, 1, 3)


def swapped_groups(t, groups):
    """The channels of group 0 and of group 1, exchanged."""
    n, c, h, w = t.shape
    parts = list(t.reshape(n, groups, c // groups, h, w).unbind(1))
    parts[0], parts[1] = parts[1], parts[0]
    return torch.stack(parts, 1).reshape(n, c, h, w)


def like(t):
    """Contiguous channels_last, as an op returns."""
    return checks.place(t, "channels_last")


def first(change):
    """A defect in the first (or only) result of an op."""

    def defect(op, *args):
        out = op(*args)
        return change(out, args) if isinstance(out, torch.Tensor) else (change(out[0], args), *out[1:])

    return defect


def zero_last_column_of(position):
    """A kernel whose halo is one short: it never reads the last column of one argument."""

    def defect(op, *args):
        args = list(args)
        args[position] = args[position].clone()
        args[position][..., -1] = 0
        return op(*args)

    return defect


def padding_before_act(op, x, weight, stride, padding, dilation, groups, act, *rest):
    """relu(a·0 + b) instead of 0 outside the image."""
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    return op(padded, weight, stride, [0, 0], dilation, groups, act, *rest)


def padding_before_act_in_weight_gradient(
    op, dy, x, weight_size, stride, padding, dilation, groups, y, finish, act
):
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    return op(dy, padded, weight_size, stride, [0, 0], dilation, groups, y, finish, act)


def rounded_before_residual(op, *args):
    *args, residual, relu = args
    y = op(*args, None, False) + residual
    return like(torch.relu(y) if relu else y)


def residual_after_relu(op, *args):
    *args, residual, relu = args
    return like(op(*args, None, relu) + residual)


def unfinished(op, *args):
    """dy used as it came: y and finish ignored."""
    args = list(args)
    at = next(
        i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.dim() == 2 and a.shape[0] == 6
    )
    args[at] = torch.stack(
        [*[torch.ones_like(args[at][0])], *torch.zeros(4, args[at].shape[1]), torch.ones_like(args[at][0])]
    )
    return op(*args)


def unmasked(op, *args):
    """finish with a = 0, b = 1: the gradient passes everywhere."""
    finish = args[8].clone()
    finish[4], finish[5] = 0, 1
    return op(*args[:8], finish, *args[9:])


def last_row_unwritten(t, _):
    t = t.clone()
    t[:, :, -1, -1] = float("nan")
    return t


def one_wrong_element(t, _):
    """The smallest defect there is: one element, off by the smallest step that the data know."""
    t = t.clone()
    t[tuple(size // 2 for size in t.shape)] += 1
    return t


FWD = {
    "zero": ("plain", first(lambda y, a: torch.zeros_like(y))),
    "one pixel shift": ("plain", first(lambda y, a: shifted_column(y))),
    "one row shift": ("plain", first(lambda y, a: torch.roll(y, 1, 2))),
    "swapped groups": ("plain", first(lambda y, a: swapped_groups(y, a[5]))),
    "swapped images": ("plain", first(lambda y, a: y.flip(0))),
    "halo": ("plain", zero_last_column_of(0)),
    "relu(shift) padding": ("act", padding_before_act),
    "flipped taps": ("plain", lambda op, x, w, *rest: op(x, w.flip(2, 3), *rest)),
    "transposed taps": ("plain", lambda op, x, w, *rest: op(x, w.transpose(2, 3).contiguous(), *rest)),
    "1 % too large": ("plain", first(lambda y, a: y * 1.01)),
    "no relu": ("affine_relu", lambda op, *a: op(*a[:-1], False)),
    "no residual": ("affine_residual", lambda op, *a: op(*a[:-2], None, a[-1])),
    "relu before residual": ("affine_residual_relu", residual_after_relu),
    "no shift": ("affine", lambda op, *a: op(*a[:7], torch.stack([a[7][0], 0 * a[7][1]]), *a[8:])),
    "unwritten corner": ("plain", first(last_row_unwritten)),
    "contiguous instead of channels_last": ("plain", first(lambda y, a: y.contiguous())),
}
BWD_INPUT = {
    "zero": ("plain", first(lambda dx, a: torch.zeros_like(dx))),
    "one pixel shift": ("plain", first(lambda dx, a: shifted_column(dx))),
    "swapped groups": ("plain", first(lambda dx, a: swapped_groups(dx, a[6]))),
    "halo": ("plain", zero_last_column_of(0)),
    "unflipped taps": ("plain", lambda op, dy, w, *rest: op(dy, w.flip(2, 3), *rest)),
    "1 % too large": ("plain", first(lambda dx, a: dx * 1.01)),
    "finish ignored": ("finish", unfinished),
    "mask of finish ignored": ("finish", unmasked),
    "mask of act ignored": (
        "act", lambda op, *a: (op(*a[:9], None, None)[0], op(*a)[1]),
    ),
    "sums exchanged": ("act", lambda op, *a: (op(*a)[0], op(*a)[1].flip(0))),
    "sums 1 % too large": ("act", lambda op, *a: (op(*a)[0], op(*a)[1] * 1.01)),
    "sums zero": ("act", lambda op, *a: (op(*a)[0], op(*a)[1] * 0)),
    "unwritten corner": ("plain", first(last_row_unwritten)),
}  # fmt: skip
BWD_WEIGHT = {
    "zero": ("plain", first(lambda dw, a: torch.zeros_like(dw))),
    "1 % too large": ("plain", first(lambda dw, a: dw * 1.01)),
    "one tap shift": ("plain", first(lambda dw, a: shifted_column(dw))),
    "swapped groups": ("plain", first(lambda dw, a: dw.roll(dw.shape[0] // a[6], 0))),
    "flipped taps": ("plain", first(lambda dw, a: dw.flip(2, 3))),
    "an image left out": ("plain", lambda op, dy, x, *rest: op(dy[1:], x[1:], *rest)),
    "halo": ("plain", zero_last_column_of(1)),
    "relu(shift) padding": ("act", padding_before_act_in_weight_gradient),
    "finish ignored": ("finish", unfinished),
    "unwritten corner": ("plain", first(last_row_unwritten)),
}
STATS = {
    "unbiased variance": ("plain", lambda y, mean, var: (y, mean, var * count(y) / (count(y) - 1))),
    "var is std": ("plain", lambda y, mean, var: (y, mean, var.sqrt())),
    "statistics exchanged": ("plain", lambda y, mean, var: (y, var, mean)),
    "channels shifted": ("plain", lambda y, mean, var: (y, mean.roll(1), var.roll(1))),
    "mean zero": ("plain", lambda y, mean, var: (y, mean * 0, var)),
    "mean 0.01 % too large": ("plain", lambda y, mean, var: (y, mean * 1.0001, var)),
    "variance 0.01 % too large": ("plain", lambda y, mean, var: (y, mean, var * 1.0001)),
    "variance unwritten": ("plain", lambda y, mean, var: (y, mean, var * float("nan"))),
    "y shifted": ("plain", lambda y, mean, var: (shifted_column(y), mean, var)),
}


def count(y):
    return y.numel() // y.shape[1]


def params(defects):
    return [pytest.param(*v, id=k) for k, v in defects.items()]


def must_fail(verify, op, defect, case, dtype, kind, variant):
    """`verify` accepts the op and refuses the op with the defect."""
    verify(op, case, dtype, kind, variant)
    with pytest.raises(AssertionError):
        verify(functools.partial(defect, op), case, dtype, kind, variant)


grid = [
    pytest.mark.parametrize("dtype", checks.DTYPES, ids=checks.dtype_name),
    pytest.mark.parametrize("kind", ["integer", "normal"]),
    pytest.mark.parametrize("case", [CASE, STRIDED], ids=str),
]


def on_grid(function):
    return functools.reduce(lambda f, mark: mark(f), grid, function)


@on_grid
@pytest.mark.parametrize("variant, defect", params(FWD))
def test_wrong_forward(ops, dtype, kind, case, variant, defect):
    must_fail(
        conv_cases.verify_fwd,
        ops.grouped_conv_fwd,
        lambda op, *a: keep_layout(defect, op, *a),
        case,
        dtype,
        kind,
        variant,
    )


def keep_layout(defect, op, *args):
    """A wrong value must be caught as a wrong value, not by the layout it came in, unless the layout is the
    defect."""
    y = defect(op, *args)
    if y.shape == op(*args).shape and not torch.equal(y.nan_to_num(7), op(*args).nan_to_num(7)):
        return like(y)
    return y


@on_grid
@pytest.mark.parametrize("variant, defect", params(BWD_INPUT))
def test_wrong_input_gradient(ops, dtype, kind, case, variant, defect):
    def wrong(op, *args):
        dx, sums = defect(op, *args)
        return like(dx), sums

    must_fail(conv_cases.verify_bwd_input, ops.grouped_conv_bwd_input, wrong, case, dtype, kind, variant)


@on_grid
@pytest.mark.parametrize("variant, defect", params(BWD_WEIGHT))
def test_wrong_weight_gradient(ops, dtype, kind, case, variant, defect):
    must_fail(conv_cases.verify_bwd_weight, ops.grouped_conv_bwd_weight, defect, case, dtype, kind, variant)


@on_grid
@pytest.mark.parametrize("variant, change", params(STATS))
def test_wrong_statistics(ops, dtype, kind, case, variant, change):
    def wrong(op, *args):
        y, mean, var = change(*op(*args))
        return like(y), mean, var

    must_fail(conv_cases.verify_fwd_stats, ops.grouped_conv_fwd_stats, wrong, case, dtype, kind, variant)


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=checks.dtype_name)
@pytest.mark.parametrize("case", [CASE, STRIDED], ids=str)
def test_one_element_off_by_one_is_seen_in_integers(ops, dtype, case):
    wrong = first(one_wrong_element)
    for verify, name in (
        (conv_cases.verify_fwd, "grouped_conv_fwd"),
        (conv_cases.verify_bwd_input, "grouped_conv_bwd_input"),
        (conv_cases.verify_bwd_weight, "grouped_conv_bwd_weight"),
    ):
        must_fail(verify, getattr(ops, name), wrong, case, dtype, "integer", "plain")


@pytest.mark.parametrize("dtype", checks.DTYPES[1:], ids=checks.dtype_name)
def test_a_second_rounding_is_seen(ops, dtype):
    """Storing the convolution before adding the residual rounds twice: exact arithmetic on whole numbers
    tells."""
    gen = checks.generator("second rounding")
    case = Case(16, 16, 2, 2, 7, 9)
    limit = 10 if dtype == torch.bfloat16 else 35
    x, w = (checks.integers(s, limit, gen).to(dtype) for s in (case.input_size, case.weight_size))
    residual = checks.integers(case.output_size, 100, gen).to(dtype)
    args = (x, w, *case.geometry, None, None, residual, False)
    exact = checks.ref_fwd(torch.float64, *args)
    checks.assert_exact(ops.grouped_conv_fwd(*args), exact)
    with pytest.raises(AssertionError):
        checks.assert_exact(rounded_before_residual(ops.grouped_conv_fwd, *args), exact)


def test_statistics_from_sums_of_squares_are_refused():
    """Σy² - (Σy)²/M in float32 passes at mean/std 1 and must fail at 1000."""
    noise = torch.randn(4, 8, 31, 29, generator=checks.generator("sums of squares"))
    for offset, acceptable in ((0, True), (1000, False)):
        y = noise + offset
        mean = y.mean((0, 2, 3))
        checks.assert_statistics(mean, y.var((0, 2, 3), correction=0), y)
        naive = y.square().sum((0, 2, 3)) / count(y) - mean.square()
        if acceptable:
            checks.assert_statistics(mean, naive, y)
        else:
            with pytest.raises(AssertionError, match="var"):
                checks.assert_statistics(mean, naive, y)


def test_statistics_of_the_unrounded_value_are_refused():
    """Statistics belong to y as stored; those of the float32 sums before rounding differ visibly in
    bfloat16."""
    y32 = torch.randn(2, 8, 9, 7, generator=checks.generator("unrounded")) + 3
    y = y32.bfloat16()
    with pytest.raises(AssertionError):
        checks.assert_statistics(y32.mean((0, 2, 3)), y32.var((0, 2, 3), correction=0), y)


def test_nan_never_passes():
    exact = torch.ones(2, 2, dtype=torch.float64)
    nan = torch.full((2, 2), float("nan"))
    for check in (
        lambda t, e: checks.assert_accurate(t, e, e.float()),
        lambda t, e: checks.assert_exact(t, e),
    ):
        check(exact.float(), exact)
        with pytest.raises(AssertionError, match=r"NaN|differ"):
            check(nan, exact)
        with pytest.raises(AssertionError, match=r"NaN|differ"):
            check(exact.float(), nan.double())
        with pytest.raises(AssertionError, match=r"inf|differ"):
            check(exact.float() * float("inf"), exact)
        with pytest.raises(AssertionError, match="shape"):
            check(exact.float()[:1], exact)
    with pytest.raises(AssertionError, match="yardstick"):
        checks.assert_accurate(exact.float(), exact, nan)


def test_an_error_just_above_the_bound_fails():
    """Twice torch's own error plus the floor is the limit, in the maximum and in RMS each for itself."""
    gen = checks.generator("bound")
    for dtype in checks.DTYPES:
        exact = torch.rand(4096, generator=gen).double() + 1
        exact[0] = 2
        eps = torch.finfo(dtype).eps
        own = exact + eps * (torch.rand(4096, generator=gen).double() - 0.5)
        own_max, own_rms = (own - exact).abs().max(), (own - exact).square().mean().sqrt()
        spike, noise = torch.zeros_like(exact), torch.randn(4096, generator=gen).double().sign()
        spike[7] = 2 * own_max + checks.FLOOR_MAX[dtype] * eps * 2
        noise = noise * (2 * own_rms + checks.FLOOR_RMS[dtype] * eps * exact.square().mean().sqrt())
        for error, name in ((spike, "max"), (noise, "RMS")):
            checks.assert_accurate(exact + 0.99 * error, exact, own, dtype=dtype)
            with pytest.raises(AssertionError, match=name):
                checks.assert_accurate(exact + 1.01 * error, exact, own, dtype=dtype)


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=checks.dtype_name)
def test_running_variance_with_the_wrong_bias_is_refused(dtype):
    """Biased and unbiased variance exchanged, as a fused batch norm easily does."""
    x = torch.randn(2, 8, 7, 5, generator=checks.generator("bias"), dtype=torch.float32).to(dtype)
    exact, own, wrong = torch.ones(8).double(), torch.ones(8), torch.ones(8)
    F.batch_norm(x.double(), torch.zeros(8).double(), exact, training=True)
    F.batch_norm(x.float(), torch.zeros(8), own, training=True)
    wrong.lerp_(x.float().var((0, 2, 3), correction=0), 0.1)
    checks.assert_accurate(own, exact, own, dtype=torch.float32)
    with pytest.raises(AssertionError):
        checks.assert_accurate(wrong, exact, own, dtype=torch.float32)
