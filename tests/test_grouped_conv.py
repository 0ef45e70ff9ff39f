"""The ops grouped_conv_*: every listed shape, dtype, prologue, epilogue and instruction set against the
float64 oracle."""

import math

import checks
import conv_cases
import pytest
import torch
import torch.nn.functional as F
from checks import DTYPES, EXPANDED, ISAS, assert_accurate, assert_exact, assert_same_bits, place
from conv_cases import CASES, VERIFY, Case
from run_together import together, without_repeats

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def grid(kind):
    """Every case x op: float32 plain and one other variant, which rotates from case to case, and so in a low
    precision."""
    params = []
    for case in CASES:
        for name, (_, variants) in VERIFY.items():
            chosen = [(torch.float32, "plain")] if kind == "integer" else []
            low = checks.rotate(DTYPES[1:], str(case), kind, name)
            for dtype in (torch.float32, low):
                chosen.append((dtype, checks.rotate(variants, str(case), str(dtype), kind, name)))
            label = f"{name.removeprefix('grouped_conv_')}-{case}"
            params.append(pytest.param(name, case, list(dict.fromkeys(chosen)), id=label))
    return params


# The instruction sets innermost, so that the oracle runs once for all of them.
each_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)


def test_grid_lists_what_it_promises():
    widths = (1, 2, 3, 4, 5, 8, 16, 24, 32, 48, 56, 64, 112)
    equal = {c.cin for c in CASES if c.cin == c.cout}
    assert equal.issuperset(widths), f"widths missing: {set(widths) - equal}"
    unequal = {(c.cin, c.cout) for c in CASES if c.cin != c.cout}
    assert unequal.issuperset({(3, 5), (4, 8), (16, 24), (8, 1)})
    strides = [(1, 1), (2, 2), (1, 2), (2, 1)]
    assert {c.stride for c in CASES} == set(strides)
    assert {c.groups for c in CASES}.issuperset({1, 2, 3, 4, 5, 32})
    assert {c.n for c in CASES} == {1, 2, 3}
    for padding in [(0, 0), (1, 1), (2, 2), (0, 2)]:
        assert {(c.stride, c.padding) for c in CASES}.issuperset({(s, padding) for s in ((1, 1), (2, 2))}), (
            padding
        )
    for dilation in [(1, 1), (2, 2), (3, 3)]:
        assert {(c.stride, c.dilation) for c in CASES}.issuperset({(s, dilation) for s in strides}), dilation
        assert {(c.padding, c.dilation) for c in CASES}.issuperset({((p, p), dilation) for p in range(3)}), (
            dilation
        )
    assert min(c.output_size[2] * c.output_size[3] for c in CASES) == 1
    assert all(min(c.output_size) > 0 for c in CASES)


@each_isa
@pytest.mark.parametrize("name, case, chosen", grid("integer"))
def test_integers_are_exact(isa, ops, name, case, chosen):
    for dtype, variant in without_repeats(isa, chosen):
        VERIFY[name][0](getattr(ops, name), case, dtype, "integer", variant)


@each_isa
@pytest.mark.parametrize("name, case, chosen", grid("normal"))
def test_error_against_float64(isa, ops, name, case, chosen):
    for dtype, variant in without_repeats(isa, chosen):
        VERIFY[name][0](getattr(ops, name), case, dtype, "normal", variant)


# Small enough to run everything on: a grouped case with tails and a dense one with stride.
CORE = (
    Case(4, 4, 5, 2, 6, 9),
    Case(8, 16, 1, 2, 9, 7, (2, 2)),
    Case(3, 2, 3, 1, 7, 8, (1, 2), (2, 0), (2, 1)),
)
core = pytest.mark.parametrize("case", CORE, ids=str)


@each_isa
@core
@pytest.mark.parametrize("name, variant", [(n, v) for n, (_, vs) in VERIFY.items() for v in vs])
@together(dtype=DTYPES, kind=["integer", "normal"])
def test_every_variant(isa, ops, case, dtype, name, variant, kind):
    VERIFY[name][0](getattr(ops, name), case, dtype, kind, variant)


@each_isa
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_gradients_are_those_of_their_own_ops(isa, ops, case):
    """Bit for bit, whatever the share of a thread; only what is wanted is computed."""
    dtype = checks.rotate(DTYPES, str(case), "both")
    args = all_args(case, dtype)
    dy, x, w, geometry = args["dy"], args["x"], args["w"], args["geometry"]
    channels_last = case.cin % 2 == 0
    finish = args["y"], args["finish"]
    for gradient, act in (
        ((None, None), None),
        (finish, None),
        ((None, None), args["act"]),
        (finish, args["act"]),
    ):
        masked_by, prologue = (None, None) if act is None else (x, act), None if act is None else act[:2]
        dx, sums = ops.grouped_conv_bwd_input(dy, w, list(x.shape), *geometry, *gradient, *masked_by)
        dw = ops.grouped_conv_bwd_weight(dy, x, list(w.shape), *geometry, *gradient, prologue, channels_last)
        for wanted in ((True, True), (True, False), (False, True), (False, False)):
            got = ops.grouped_conv_bwd(dy, x, w, *geometry, *gradient, act, *wanted, channels_last)
            for tensor, want, there in zip(got, (dx, dw, sums), (*wanted, wanted[0]), strict=True):
                assert_same_bits(tensor, want if there else want.new_empty(0))
                assert tensor.stride() == (want.stride() if there else (1,))


# ------------------------------------------------------------------------------------------------
# memory layouts


def all_ops(ops, args):
    """Results of the five ops with everything switched on, as a dict of tensors."""
    a = args
    fwd = ops.grouped_conv_fwd(a["x"], a["w"], *a["geometry"], a["act"][:2], a["affine"], a["residual"], True)
    y, mean, var = ops.grouped_conv_fwd_stats(a["x"], a["w"], *a["geometry"], a["act"][:2])
    gradient = a["y"], a["finish"]
    dx, sums = ops.grouped_conv_bwd_input(
        a["dy"], a["w"], list(a["x"].shape), *a["geometry"], *gradient, a["x"], a["act"]
    )
    dw = ops.grouped_conv_bwd_weight(
        a["dy"], a["x"], list(a["w"].shape), *a["geometry"], *gradient, a["act"][:2].contiguous()
    )
    plain_dx, _ = ops.grouped_conv_bwd_input(
        a["dy"], a["w"], list(a["x"].shape), *a["geometry"], None, None, None, None
    )
    plain_dw = ops.grouped_conv_bwd_weight(
        a["dy"], a["x"], list(a["w"].shape), *a["geometry"], None, None, None
    )
    both_dx, both_dw, both_sums = ops.grouped_conv_bwd(
        a["dy"], a["x"], a["w"], *a["geometry"], *gradient, a["act"], True, True, False
    )
    return {
        "fwd": fwd, "y": y, "mean": mean, "var": var, "dx": dx, "sums": sums, "dw": dw, "plain_dx": plain_dx,
        "plain_dw": plain_dw, "both_dx": both_dx, "both_dw": both_dw, "both_sums": both_sums,
    }  # fmt: skip


def all_args(case, dtype, kind="normal"):
    data = conv_cases.Data(case, dtype, kind, "all")
    c, k = case.input_size[1], case.output_size[1]
    return {
        "x": data.activation(case.input_size).to(dtype),
        "w": data.weight(9 * case.cin).contiguous(),
        "geometry": case.geometry,
        "act": torch.cat([data.pair(c), data.pair(c)]),
        "affine": data.pair(k),
        "residual": data.activation(case.output_size).to(dtype),
        "dy": data.activation(case.output_size).to(dtype),
        "y": data.activation(case.output_size).to(dtype),
        "finish": data.finish(k, True),
    }


ACTIVATIONS = ("x", "residual", "dy", "y")


@core
@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
@pytest.mark.parametrize("layout", checks.LAYOUTS)
def test_layout_does_not_change_a_bit(isa, ops, case, dtype, layout):
    args = all_args(case, dtype)
    want = all_ops(ops, {**args, **{n: place(args[n], "channels_last") for n in ACTIVATIONS}})
    inputs = {**args, **{n: place(args[n], layout) for n in ACTIVATIONS}}
    before = {n: inputs[n].clone() for n in ACTIVATIONS}
    got = all_ops(ops, inputs)
    for name in want:
        assert_same_bits(got[name], want[name], name)
    for name in ("fwd", "y", "dx", "plain_dx"):
        checks.assert_channels_last(got[name], name)
    for name in ACTIVATIONS:
        assert_same_bits(inputs[name], before[name], f"{name} was written to")


@core
def test_weight_layout_does_not_change_a_bit(isa, ops, case):
    args = all_args(case, torch.float32)
    want = all_ops(ops, args)
    for layout in ("channels_last", "sliced", "sliced_nchw", "stepped", "transposed"):
        got = all_ops(ops, {**args, "w": place(args["w"], layout)})
        for name in want:
            assert_same_bits(got[name], want[name], f"{name}, weight {layout}")


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
@pytest.mark.parametrize("width", [1, 3, 4, 6, 8, 12, 16, 24, 32])
def test_weight_layout_at_every_width_of_a_group(isa, ops, dtype, width):
    """Weights are packed by blocks of a vector's width: groups within, across and as wide as such blocks."""
    groups = 3
    gen = checks.generator("weight layout", width)
    x = checks.integers((1, groups * width, 4, 5), 3, gen).to(dtype)
    weight = checks.integers((groups * (width + 2), width, 3, 3), 3, gen).to(dtype)
    dy = checks.integers((1, groups * (width + 2), 4, 5), 3, gen).to(dtype)
    geometry = ([1, 1], [1, 1], [1, 1], groups)
    want_y = torch.nn.functional.conv2d(x.double(), weight.double(), None, 1, 1, 1, groups)
    want_dx = torch.nn.grad.conv2d_input(x.shape, weight.double(), dy.double(), 1, 1, 1, groups)
    for layout in ("contiguous", "channels_last"):
        placed = place(weight, layout)
        y = ops.grouped_conv_fwd(x, placed, *geometry, None, None, None, False)
        dx, _ = ops.grouped_conv_bwd_input(dy, placed, list(x.shape), *geometry, None, None, None, None)
        assert torch.equal(y, want_y.to(dtype)), layout
        assert torch.equal(dx, want_dx.to(dtype)), layout


@core
@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
@pytest.mark.parametrize("how", EXPANDED)
def test_stride_0(isa, ops, case, dtype, how):
    """y.sum().backward() hands over a gradient of stride 0, broadcasting hands over the rest."""
    checks.verify_stride_0(lambda args: all_ops(ops, args), all_args(case, dtype), ACTIVATIONS, how)


@pytest.mark.parametrize("kind", ["integer", "normal"])
def test_overlapping_windows_as_input(isa, ops, kind):
    """x may be an unfolded view, whose pixels share memory."""
    case = Case(4, 4, 2, 1, 6, 7)
    base = conv_cases.Data(case, torch.float32, kind).activation([1, 8, 6, 9])
    x = place(base, "channels_last").as_strided([1, 8, 6, 7], [6 * 9 * 8, 1, 8 * 8, 8])
    w = conv_cases.Data(case, torch.float32, kind, "w").weight(36)
    args = (x, w, *case.geometry, None, None, None, False)
    y, exact = ops.grouped_conv_fwd(*args), checks.ref_fwd(torch.float64, *args)
    if kind == "integer":
        assert_exact(y, exact)
    else:
        assert_accurate(y, exact, checks.torchs_own(checks.ref_fwd, torch.float32, args))


# ------------------------------------------------------------------------------------------------
# determinism

PARALLEL = (
    Case(4, 4, 32, 3, 29, 31), Case(16, 16, 8, 2, 14, 14, (2, 2)), Case(64, 64, 2, 2, 7, 7),
    Case(5, 3, 7, 3, 15, 13), Case(1, 1, 64, 1, 33, 20), Case(3, 64, 1, 2, 33, 31, (2, 2)),
)  # fmt: skip


@pytest.mark.parametrize("case", PARALLEL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
def test_same_bits_for_any_number_of_threads_and_any_run(isa, ops, threads, case, dtype):
    args = all_args(case, dtype)
    checks.verify_threads(lambda: all_ops(ops, args), threads)


@pytest.mark.parametrize("width", [(4, 4, 32), (16, 16, 8)], ids=str)
@pytest.mark.parametrize(
    "name, variant", [("grouped_conv_fwd_stats", "act"), ("grouped_conv_bwd_weight", "finish")]
)
def test_a_large_batch_which_is_cut_finer(isa, ops, name, variant, width):
    case = Case(*width, 24 if width[0] == 4 else 8, 56, 56)
    assert 9 * case.n * case.h * case.w * case.groups * case.cin * case.cout > 2**28
    VERIFY[name][0](getattr(ops, name), case, torch.float32, "normal", variant)


def test_twice_as_large_a_batch_is_cut_finer(ops):
    """It leaves more partial results of the weight gradient."""

    def kept(n):
        x, w = place(torch.randn(n, 128, 28, 28), "channels_last"), torch.randn(128, 16, 3, 3)
        args = (x, x, w, [1, 1], [1, 1], [1, 1], 8, None, None, None, False, True, False)
        return checks.kept_after(ops, lambda: ops.grouped_conv_bwd(*args))

    assert kept(64) > 1.5 * kept(32)


@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
def test_an_image_does_not_depend_on_its_batch(isa, ops, dtype):
    """The result for one image is the same bits alone and in a batch."""
    args = all_args(Case(4, 4, 16, 3, 15, 13), dtype)
    whole = all_ops(ops, args)
    for n in range(3):
        alone = all_ops(ops, {**args, **{name: args[name][n : n + 1] for name in ACTIVATIONS}})
        for name in ("fwd", "y", "dx", "plain_dx"):
            assert_same_bits(alone[name], whole[name][n : n + 1], f"{name}, image {n}")


# ------------------------------------------------------------------------------------------------
# single points of the contract


@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
@pytest.mark.parametrize("padding", [(1, 1), (2, 2), (0, 2)])
def test_padding_stays_zero_under_a_positive_shift(isa, ops, dtype, padding):
    """act comes before the padding: relu(0·a + b) = 100 must not leak in from outside the image."""
    case = Case(4, 4, 3, 2, 5, 6, (1, 1), padding)
    x = torch.zeros(case.input_size, dtype=dtype)
    w = torch.ones(case.weight_size, dtype=dtype)
    act = torch.stack([torch.ones(12), torch.full((12,), 100.0)])
    y = ops.grouped_conv_fwd(x, w, *case.geometry, act, None, None, False)
    inside = F.conv2d(torch.full(case.input_size, 100.0).double(), w.double(), None, *case.geometry)
    assert_exact(y, inside, "forward")
    dy = torch.ones(case.output_size, dtype=dtype)
    dw = ops.grouped_conv_bwd_weight(dy, x, case.weight_size, *case.geometry, None, None, act)
    exact = checks.ref_bwd_weight(torch.float64, dy, x, case.weight_size, *case.geometry, None, None, act)
    assert_exact(dw, exact, "weight gradient")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=checks.dtype_name)
@pytest.mark.parametrize("width", [1, 3, 4, 8, 16, 32, 64])
def test_rounds_once_to_nearest_even(isa, ops, dtype, width):
    """Whole numbers beyond the dtype's exact range: sums, scale, shift and residual in float32, then one
    rounding."""
    case = Case(width, width, 2, 2, 7, 9)
    gen = checks.generator("rounding", width, dtype)
    limit = math.isqrt((600 if dtype == torch.bfloat16 else 5000) // math.isqrt(width))
    x, w = (checks.integers(s, limit, gen).to(dtype) for s in (case.input_size, case.weight_size))
    residual = checks.integers(case.output_size, 100, gen).to(dtype)
    affine = torch.stack(
        [checks.choice((2 * width,), [1.0, 2.0, 3.0], gen), checks.integers((2 * width,), 50, gen)]
    )
    for extra in ((None, None, None, False), (None, affine, residual, False), (None, affine, residual, True)):
        args = (x, w, *case.geometry, *extra)
        exact = checks.ref_fwd(torch.float64, *args)
        assert (exact.to(dtype).double() != exact).any(), "nothing to round: the test would prove nothing"
        assert_exact(ops.grouped_conv_fwd(*args), exact, "forward")
    dy = checks.integers(case.output_size, limit // 4, gen).to(dtype)
    args = (dy, w, case.input_size, *case.geometry, None, None, None, None)
    assert_exact(ops.grouped_conv_bwd_input(*args)[0], checks.ref_bwd_input(torch.float64, *args)[0], "dx")
    args = (dy, x, case.weight_size, *case.geometry, None, None, None)
    assert_exact(ops.grouped_conv_bwd_weight(*args), checks.ref_bwd_weight(torch.float64, *args), "dweight")


@pytest.mark.parametrize("ratio", [0, 1, 30, 1000])
@pytest.mark.parametrize("width, groups", [(1, 24), (4, 8), (8, 4), (24, 1), (32, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
def test_statistics_far_from_zero(isa, ops, ratio, width, groups, dtype):
    """The variance survives mean/std = `ratio`: x is a large constant plus noise under weights that sum to
    1."""
    case = Case(width, width, groups, 2, 31, 29, (1, 1), (0, 0))
    gen = checks.generator("statistics", ratio, width, groups)
    w = torch.rand(case.weight_size, generator=gen) + 0.1
    w = w / w.sum((1, 2, 3), keepdim=True)
    spread = 1 / w.square().sum((1, 2, 3)).sqrt().mean()
    x = place((spread * torch.randn(case.input_size, generator=gen) + ratio).to(dtype), "channels_last")
    y, mean, var = ops.grouped_conv_fwd_stats(x, w.to(dtype), *case.geometry, None)
    if dtype == torch.float32:
        got = (y.double().mean((0, 2, 3)).abs() / y.double().std((0, 2, 3))).median().item()
        assert ratio / 2 <= got <= 2 * ratio or ratio == 0, f"the data have mean/std {got}"
    checks.assert_statistics(mean, var, y)
    assert_same_bits(y, ops.grouped_conv_fwd(x, w.to(dtype), *case.geometry, None, None, None, False), "y")


def test_statistics_of_a_constant(isa, ops):
    case = Case(4, 4, 4, 3, 15, 13, (1, 1), (0, 0))
    y, mean, var = ops.grouped_conv_fwd_stats(
        torch.full(case.input_size, 1000.1), torch.full(case.weight_size, 0.0277), *case.geometry, None
    )
    checks.assert_statistics(mean, var, y)
    assert (var >= 0).all()


def test_statistics_of_one_value(isa, ops):
    x, w = torch.randn(1, 8, 1, 1), torch.randn(8, 2, 3, 3)
    y, mean, var = ops.grouped_conv_fwd_stats(x, w, [1, 1], [1, 1], [1, 1], 4, None)
    assert torch.equal(mean, y.flatten()) and torch.equal(var, torch.zeros(8))


@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize(
    "width, groups, stride", [(1, 8, 1), (3, 2, 1), (4, 8, 1), (8, 2, 2), (16, 2, 1), (64, 1, 1)]
)
def test_nan_and_inf_reach_what_they_touch_and_nothing_else(
    isa, ops, winograd, dtype, value, width, groups, stride
):
    """Padding excepted: whether 0 outside the image times an infinite weight is NaN is left open."""
    winograd("never")
    case = Case(width, width, groups, 2, 9, 11, (stride, stride))
    x, w = (
        t.clone()
        for t in conv_cases.fwd_problem(Case(width, width, groups, 2, 9, 11), dtype, "normal", "plain")[0][:2]
    )
    x[1, width - 1, 4, 5] = value
    args = (x, w, *case.geometry, None, None, None, False)
    assert_accurate(
        ops.grouped_conv_fwd(*args),
        checks.ref_fwd(torch.float64, *args),
        checks.torchs_own(checks.ref_fwd, dtype, args),
        "fwd",
    )
    y, mean, var = ops.grouped_conv_fwd_stats(*args[:7])
    checks.assert_statistics(mean, var, y)
    dy = torch.ones(case.output_size, dtype=dtype)
    dy[0, 0, 2, 3] = value
    args = (dy, w, case.input_size, *case.geometry, None, None, None, None)
    own = checks.torchs_own(checks.ref_bwd_input, dtype, args)[0]
    assert_accurate(
        ops.grouped_conv_bwd_input(*args)[0], checks.ref_bwd_input(torch.float64, *args)[0], own, "dx"
    )
    args = (dy, torch.ones_like(x), case.weight_size, *case.geometry, None, None, None)
    dw = ops.grouped_conv_bwd_weight(*args)
    assert_accurate(
        dw,
        checks.ref_bwd_weight(torch.float64, *args),
        checks.torchs_own(checks.ref_bwd_weight, dtype, args),
        "dw",
    )
    w[0, 0, 1, 1] = value
    args = (torch.ones_like(x), w, *case.geometry, None, None, None, False)
    assert_accurate(
        ops.grouped_conv_fwd(*args),
        checks.ref_fwd(torch.float64, *args),
        checks.torchs_own(checks.ref_fwd, dtype, args),
        "weight",
    )


def test_relu_and_its_masks_let_nan_through(isa, ops):
    """relu(NaN) is NaN, in the epilogue and in the prologue; the backward's mask keeps the gradient there, as
    torch's does."""
    nan = torch.full((1, 4, 3, 3), math.nan)
    x, w = torch.ones(1, 4, 3, 3), torch.ones(4, 1, 3, 3)
    geometry = [1, 1], [1, 1], [1, 1], 4
    one = torch.stack([torch.ones(4), torch.zeros(4)])
    assert ops.grouped_conv_fwd(nan, w, *geometry, None, None, None, True).isnan().all()
    assert ops.grouped_conv_fwd(x, w, *geometry, None, one, nan, True).isnan().all()
    assert ops.grouped_conv_fwd(nan, w, *geometry, one, None, None, False).isnan().all()
    act = torch.stack([torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4)])
    dx, _ = ops.grouped_conv_bwd_input(x, w, [1, 4, 3, 3], *geometry, None, None, nan, act)
    want, _ = ops.grouped_conv_bwd_input(x, w, [1, 4, 3, 3], *geometry, None, None, None, None)
    assert torch.equal(dx, want)
    finish = torch.stack([torch.ones(4), *torch.zeros(3, 4), torch.ones(4), torch.zeros(4)])
    masked, _ = ops.grouped_conv_bwd_input(x, w, [1, 4, 3, 3], *geometry, -x, finish, None, None)
    assert torch.equal(masked, torch.zeros_like(masked))
    passed, _ = ops.grouped_conv_bwd_input(x, w, [1, 4, 3, 3], *geometry, nan, finish, None, None)
    assert passed.isnan().all(), "B·(y - mean) + C carries the NaN of y"


def test_a_gradient_of_exactly_zero_input_is_blocked(isa, ops):
    """ReLU's gradient at 0 is 0: in act's mask and in finish's."""
    x, w = torch.zeros(1, 4, 3, 3), torch.ones(4, 4, 3, 3)
    geometry = [1, 1], [1, 1], [1, 1], 1
    act = torch.stack([torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4)])
    dx, sums = ops.grouped_conv_bwd_input(
        torch.ones(1, 4, 3, 3), w, [1, 4, 3, 3], *geometry, None, None, x, act
    )
    assert torch.equal(dx, torch.zeros_like(dx)) and torch.equal(sums, torch.zeros(2, 4))
    finish = torch.stack([torch.ones(4), *torch.zeros(3, 4), torch.ones(4), torch.zeros(4)])
    dw = ops.grouped_conv_bwd_weight(
        torch.ones(1, 4, 3, 3), torch.ones(1, 4, 3, 3), [4, 4, 3, 3], *geometry, x, finish, None
    )
    assert torch.equal(dw, torch.zeros_like(dw))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=checks.dtype_name)
@pytest.mark.parametrize("width, groups, stride", [(4, 8, 1), (8, 6, 1), (16, 3, 1), (8, 8, 2), (32, 2, 1)])
def test_large_results_are_exact(isa, ops, dtype, width, groups, stride):
    """Results of more than 4 MB leave past the caches, whole lines at a time where they can."""
    gen = checks.generator("large", width, groups)
    pixels = (5 << 20) // (width * groups * dtype.itemsize)
    case = Case(width, width, groups, 1, pixels // 128, 128, (stride, stride))
    x, dy, y, residual = (
        checks.integers(size, 3, gen).to(dtype).contiguous(memory_format=torch.channels_last)
        for size in (case.input_size, *[case.output_size] * 3)
    )
    w = checks.integers(case.weight_size, 2, gen, density=0.25).to(dtype)
    affine = checks.choice((2, width * groups), (0.5, 1.0, 2.0), gen)
    for args in (
        (x, w, *case.geometry, None, affine, None, True),
        (x, w, *case.geometry, None, None, residual, False),
    ):
        assert_exact(ops.grouped_conv_fwd(*args), checks.ref_fwd(torch.float64, *args), "fwd")
    y, mean, var = ops.grouped_conv_fwd_stats(x, w, *case.geometry, None)
    assert_exact(y, checks.ref_fwd(torch.float64, x, w, *case.geometry, None, None, None, False), "y")
    checks.assert_statistics(mean, var, y)
    args = (dy, w, case.input_size, *case.geometry, None, None, None, None)
    assert_exact(ops.grouped_conv_bwd_input(*args)[0], checks.ref_bwd_input(torch.float64, *args)[0], "dx")


@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
def test_zero_batch(isa, ops, dtype):
    case = conv_cases.ZERO_BATCH
    got = all_ops(ops, all_args(case, dtype))
    for name, size in (
        ("fwd", case.output_size),
        ("y", case.output_size),
        ("dx", case.input_size),
        ("plain_dx", case.input_size),
    ):
        assert list(got[name].shape) == size and got[name].dtype == dtype
    assert torch.equal(got["dw"], torch.zeros(case.weight_size, dtype=dtype))
    assert torch.equal(got["plain_dw"], torch.zeros(case.weight_size, dtype=dtype))
    assert torch.equal(got["sums"], torch.zeros(2, 8))
    assert got["mean"].shape == got["var"].shape == (8,)


@pytest.mark.parametrize("width", [1, 4, 16, 64])
def test_does_not_write_to_its_inputs(isa, ops, width):
    case = Case(width, width, 2, 2, 6, 7)
    args = all_args(case, torch.float32)
    copies = {n: t.clone() for n, t in args.items() if isinstance(t, torch.Tensor)}
    all_ops(ops, args)
    for name, copy in copies.items():
        assert_same_bits(args[name], copy, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_pixels_near_and_far_give_the_same_bits(isa, ops, width, dtype):
    """Narrow groups read rows where they lie where pixels are near to each other, and copies of others."""
    gen = checks.generator("near and far", width, str(dtype))
    w = torch.randn(64, width, 3, 3, generator=gen).to(dtype)
    for columns in (1, 2, 6, 13, 19):
        near = place(torch.randn(2, 64, 5, columns, generator=gen).to(dtype), "channels_last")
        far = place(near.new_full((2, 2048, 5, columns), math.nan), "channels_last")[:, 64:128]
        far.copy_(near)
        assert near.stride(3) == 64 and far.stride(3) == 2048
        one, other = (
            ops.grouped_conv_fwd_stats(x, w, (1, 1), (1, 1), (1, 1), 64 // width, None) for x in (near, far)
        )
        for a, b, name in zip(one, other, ("y", "mean", "var"), strict=True):
            assert_same_bits(a, b, f"{columns} columns: {name}")


@pytest.mark.parametrize("width", [4, 8, 24])
def test_adjoint_identities(isa, ops, width):
    """<conv(x, w), dy> = <x, dx> = <w, dw>: forward and both gradients describe one bilinear map, exactly on
    integers."""
    for stride, padding, dilation in ((1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 0, 3)):
        case = Case(width, width, 3, 2, 9, 10, (stride,) * 2, (padding,) * 2, (dilation,) * 2)
        data = conv_cases.Data(case, torch.float32, "integer", "adjoint")
        x, dy, w = data.activation(case.input_size), data.activation(case.output_size), data.weight(9 * width)
        y = ops.grouped_conv_fwd(x, w, *case.geometry, None, None, None, False)
        dx, _ = ops.grouped_conv_bwd_input(dy, w, case.input_size, *case.geometry, None, None, None, None)
        dw = ops.grouped_conv_bwd_weight(dy, x, case.weight_size, *case.geometry, None, None, None)
        forward = (y.double() * dy).sum().item()
        assert forward == (dx.double() * x).sum().item() == (dw.double() * w).sum().item() != 0


def test_isa_choice_is_reported_and_refused(ops):
    before = ops.cpu_isa()
    assert before in ISAS
    with pytest.raises((RuntimeError, ValueError), match="sse9"):
        ops.set_cpu_isa("sse9")
    assert ops.cpu_isa() == before, "a refused choice must not change the one in use"
