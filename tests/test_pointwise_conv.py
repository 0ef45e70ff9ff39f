"""The ops pointwise_conv_* and the function: shapes, dtypes, prologues, epilogues and instruction sets
against the float64 oracle, which is that of grouped_conv with a 1x1 kernel."""

import math

import checks
import conv_cases
import pytest
import torch
import torch.nn.functional as F
from checks import (
    DTYPES,
    EXPANDED,
    ISAS,
    assert_accurate,
    assert_same_bits,
    place,
)
from pointwise_cases import (
    BAD_BWD,
    CORE,
    VERIFY,
    all_args,
    all_ops,
    as_grouped,
    case_of,
    verify_batch,
    verify_both,
    verify_bwd_refuses,
    verify_layout,
    verify_residual,
    verify_stride_0,
    verify_threads,
)  # fmt: skip
from run_together import together, without_repeats

import gconv
from gconv.functional import pointwise_conv

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


# (C, K): each of 1 to 70 on both sides, then the widths of networks: several vectors, chunks and cuts.
WIDTHS = [(c, 71 - c) for c in range(1, 71)] + [
    (64, 64), (64, 256), (256, 64), (96, 32), (128, 192), (24, 144), (300, 40), (40, 300), (520, 24),
    (24, 520),
]  # fmt: skip
GEOMETRIES = [
    (2, 7, 9, (1, 1)), (1, 9, 8, (2, 2)), (3, 2, 3, (1, 2)), (1, 1, 1, (1, 1)), (2, 5, 4, (2, 1)),
    (1, 29, 31, (1, 1)), (1, 1, 57, (2, 2)),
]  # fmt: skip
CASES = [case_of(*width, *GEOMETRIES[i % len(GEOMETRIES)]) for i, width in enumerate(WIDTHS)]


def grid(kind):
    """Every case x op: float32 plain and one other variant, which rotates, and so in a low precision."""
    params = []
    for case in CASES:
        for name, (_, variants) in VERIFY.items():
            chosen = [(torch.float32, "plain")] if kind == "integer" else []
            for dtype in (torch.float32, checks.rotate(DTYPES[1:], str(case), kind, name)):
                chosen.append((dtype, checks.rotate(variants, str(case), str(dtype), kind, name)))
            label = f"{name}-{case}"
            params.append(pytest.param(name, case, list(dict.fromkeys(chosen)), id=label))
    return params


each_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)


@each_isa
@pytest.mark.parametrize("name, case, chosen", grid("integer"))
def test_integers_are_exact(isa, ops, name, case, chosen):
    for dtype, variant in without_repeats(isa, chosen):
        VERIFY[name][0](as_grouped(ops)[name], case, dtype, "integer", variant)


@each_isa
@pytest.mark.parametrize("name, case, chosen", grid("normal"))
def test_error_against_float64(isa, ops, name, case, chosen):
    for dtype, variant in without_repeats(isa, chosen):
        VERIFY[name][0](as_grouped(ops)[name], case, dtype, "normal", variant)


core = pytest.mark.parametrize("case", CORE, ids=str)


@each_isa
@core
@pytest.mark.parametrize("name, variant", [(n, v) for n, (_, vs) in VERIFY.items() for v in vs])
@together(dtype=DTYPES, kind=["integer", "normal"])
def test_every_variant(isa, ops, case, dtype, name, variant, kind):
    VERIFY[name][0](as_grouped(ops)[name], case, dtype, kind, variant)


@pytest.mark.parametrize("width", [(1024, 512), (512, 1024), (2048, 64)], ids=str)
@pytest.mark.parametrize("name", VERIFY)
def test_error_of_wide_layers(isa, ops, name, width):
    VERIFY[name][0](as_grouped(ops)[name], case_of(*width, 1, 7, 7), torch.float32, "normal", "plain")


def test_error_of_a_weight_gradient_over_many_pixels(isa, ops):
    case = case_of(24, 20, 4, 112, 112)
    VERIFY["bwd_weight"][0](as_grouped(ops)["bwd_weight"], case, torch.float32, "normal", "plain")


# ------------------------------------------------------------------------------------------------
# both gradients in one op


@each_isa
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_both_gradients_are_those_alone(isa, ops, case):
    """Bit for bit; only what is wanted is computed."""
    verify_both(ops, case, checks.rotate(DTYPES, str(case), "both"))


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
@pytest.mark.parametrize("finish", [False, True])
@core
def test_residual_joins_dx_before_it_is_rounded(isa, ops, case, dtype, finish):
    verify_residual(ops, case, dtype, finish)


# ------------------------------------------------------------------------------------------------
# memory layouts


@core
@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
@pytest.mark.parametrize("layout", checks.LAYOUTS)
def test_layout_does_not_change_a_bit(isa, ops, case, dtype, layout):
    verify_layout(ops, case, dtype, layout)


@core
def test_weight_layout_does_not_change_a_bit(isa, ops, case):
    args = all_args(case, torch.float32)
    want = all_ops(ops, args)
    for layout in ("channels_last", "sliced", "sliced_nchw", "stepped", "transposed"):
        got = all_ops(ops, {**args, "w": place(args["w"], layout)})
        for name in want:
            assert_same_bits(got[name], want[name], f"{name}, weight {layout}")


@core
@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
@pytest.mark.parametrize("how", EXPANDED)
def test_stride_0(isa, ops, case, dtype, how):
    verify_stride_0(ops, case, dtype, how)


def test_a_prefix_of_the_channels_of_a_wider_buffer_is_read_in_place(isa, ops):
    """What a dense block's layers read: the channels lie side by side, the pixels further apart."""
    wide = place(torch.randn(2, 96, 6, 5), "channels_last")
    prefix, w = wide[:, :40], torch.randn(24, 40, 1, 1)
    assert prefix.stride(1) == 1 and prefix.stride(3) == 96
    args = (w, [1, 1], None, None, None, False)
    assert_same_bits(ops.pointwise_conv_fwd(prefix, *args), ops.pointwise_conv_fwd(prefix.clone(), *args))


# ------------------------------------------------------------------------------------------------
# determinism

PARALLEL = (
    case_of(64, 128, 4, 28, 28), case_of(256, 64, 1, 33, 29), case_of(520, 300, 1, 14, 14),
    case_of(40, 24, 2, 57, 31, (2, 2)), case_of(7, 5, 3, 15, 13), case_of(300, 513, 1, 9, 9, (1, 2)),
)  # fmt: skip


@pytest.mark.parametrize("case", PARALLEL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
def test_same_bits_for_any_number_of_threads_and_any_run(isa, ops, threads, case, dtype):
    verify_threads(ops, case, dtype, threads)


@pytest.mark.parametrize("name, variant", [("fwd_stats", "act"), ("bwd_weight", "finish")])
def test_a_large_batch_which_is_cut_finer(isa, ops, name, variant):
    case = case_of(256, 256, 24, 28, 28)
    assert case.n * case.h * case.w * case.cin * case.cout > 2**30
    VERIFY[name][0](as_grouped(ops)[name], case, torch.float32, "normal", variant)


def test_twice_as_large_a_batch_is_cut_finer(ops):
    """It leaves more partial results of the weight gradient."""

    def kept(n):
        x, w = place(torch.randn(n, 256, 28, 28), "channels_last"), torch.randn(256, 256, 1, 1)
        nothing = (None, None, None, None)
        args = (x, x, w, [1, 1], *nothing, False, True, False)
        return checks.kept_after(ops, lambda: ops.pointwise_conv_bwd(*args))

    assert kept(24) > 1.5 * kept(12)


@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
def test_an_image_does_not_depend_on_its_batch(isa, ops, dtype):
    verify_batch(ops, case_of(300, 40, 3, 15, 13), dtype)


# ------------------------------------------------------------------------------------------------
# single points of the contract


@pytest.mark.parametrize("ratio", [0, 1, 30, 1000])
@pytest.mark.parametrize("width", [(1, 24), (8, 33), (64, 64), (300, 20)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
def test_statistics_far_from_zero(isa, ops, ratio, width, dtype):
    """The variance survives mean/std = `ratio`: x is a large constant plus noise under weights that sum to
    1."""
    case = case_of(*width, 2, 31, 29)
    gen = checks.generator("pointwise statistics", ratio, width)
    w = torch.rand(case.weight_size, generator=gen) + 0.1
    w = w / w.sum((1, 2, 3), keepdim=True)
    spread = 1 / w.square().sum((1, 2, 3)).sqrt().mean()
    x = place((spread * torch.randn(case.input_size, generator=gen) + ratio).to(dtype), "channels_last")
    y, mean, var = ops.pointwise_conv_fwd_stats(x, w.to(dtype), [1, 1], None)
    if dtype == torch.float32:
        got = (y.double().mean((0, 2, 3)).abs() / y.double().std((0, 2, 3))).median().item()
        assert ratio / 2 <= got <= 2 * ratio or ratio == 0, f"the data have mean/std {got}"
    checks.assert_statistics(mean, var, y)
    assert_same_bits(y, ops.pointwise_conv_fwd(x, w.to(dtype), [1, 1], None, None, None, False), "y")


def test_statistics_of_a_constant_and_of_one_value(isa, ops):
    x, w = torch.full((3, 4, 15, 13), 1000.1), torch.full((20, 4, 1, 1), 0.0277)
    y, mean, var = ops.pointwise_conv_fwd_stats(x, w, [1, 1], None)
    checks.assert_statistics(mean, var, y)
    assert (var >= 0).all()
    y, mean, var = ops.pointwise_conv_fwd_stats(
        torch.randn(1, 8, 1, 1), torch.randn(40, 8, 1, 1), [2, 2], None
    )
    assert torch.equal(mean, y.flatten()) and torch.equal(var, torch.zeros(40))


@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("width, stride", [((3, 20), 1), ((40, 17), 2), ((300, 64), 1)], ids=str)
def test_nan_and_inf_reach_what_they_touch_and_nothing_else(isa, ops, dtype, value, width, stride):
    case = case_of(*width, 2, 9, 11, (stride, stride))
    a = all_args(case, dtype)
    x, w, dy = a["x"], a["w"], torch.ones(case.output_size, dtype=dtype)
    x[1, 1, 4, 6], dy[0, 1, 2, 3] = value, value
    args = (x, w, *case.geometry, None, None, None, False)
    y, mean, var = ops.pointwise_conv_fwd_stats(x, w, a["stride"], None)
    own = checks.torchs_own(checks.ref_fwd, dtype, args)
    assert_accurate(y, checks.ref_fwd(torch.float64, *args), own, "fwd")
    checks.assert_statistics(mean, var, y)
    dx, dw, _ = ops.pointwise_conv_bwd(
        dy, torch.ones_like(x), w, a["stride"], None, None, None, None, True, True, False
    )
    args = (dy, w, case.input_size, *case.geometry, None, None, None, None)
    own = checks.torchs_own(checks.ref_bwd_input, dtype, args)[0]
    assert_accurate(dx, checks.ref_bwd_input(torch.float64, *args)[0], own, "dx")
    args = (dy, torch.ones_like(x), case.weight_size, *case.geometry, None, None, None)
    own = checks.torchs_own(checks.ref_bwd_weight, dtype, args)
    assert_accurate(dw, checks.ref_bwd_weight(torch.float64, *args), own, "dw")


def test_relu_and_its_masks_let_nan_through_and_block_at_zero(isa, ops):
    nan, x, w = torch.full((1, 4, 3, 3), math.nan), torch.ones(1, 4, 3, 3), torch.ones(4, 4, 1, 1)
    one = torch.stack([torch.ones(4), torch.zeros(4)])
    stride, off = [1, 1], (None, None)
    assert ops.pointwise_conv_fwd(nan, w, stride, None, None, None, True).isnan().all()
    assert ops.pointwise_conv_fwd(x, w, stride, None, one, nan, True).isnan().all()
    assert ops.pointwise_conv_fwd(nan, w, stride, one, None, None, False).isnan().all()
    act = torch.stack([torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4)])
    dx, _, _ = ops.pointwise_conv_bwd(x, nan, w, stride, *off, act, None, True, False, False)
    assert torch.equal(dx, torch.full_like(dx, 4))
    dx, _, sums = ops.pointwise_conv_bwd(
        x, torch.zeros_like(x), w, stride, *off, act, None, True, False, False
    )
    assert torch.equal(dx, torch.zeros_like(dx)) and torch.equal(sums, torch.zeros(2, 4))
    finish = torch.stack([torch.ones(4), *torch.zeros(3, 4), torch.ones(4), torch.zeros(4)])
    for y, blocked in ((-x, True), (torch.zeros_like(x), True), (nan, False)):
        dx, dw, _ = ops.pointwise_conv_bwd(x, x, w, stride, y, finish, None, None, True, True, False)
        if blocked:
            assert not dx.any() and not dw.any()
        else:
            assert dx.isnan().all() and dw.isnan().all(), "B·(y - mean) + C carries the NaN of y"


@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
def test_zero_batch(isa, ops, dtype):
    case = case_of(20, 37, 0, 5, 6, (2, 1))
    got = all_ops(ops, all_args(case, dtype))
    for name, size in (
        ("fwd", case.output_size),
        ("y", case.output_size),
        ("dx", case.input_size),
        ("joined", case.input_size),
    ):
        assert list(got[name].shape) == size and got[name].dtype == dtype
    for name in ("dw", "plain_dw"):
        assert torch.equal(got[name], torch.zeros(case.weight_size, dtype=dtype))
    assert torch.equal(got["sums"], torch.zeros(2, 20))
    assert got["mean"].isnan().all() and got["var"].isnan().all()


@pytest.mark.parametrize("width", [(4, 9), (40, 24), (300, 64)], ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2)], ids=str)
def test_adjoint_identities(isa, ops, width, stride):
    """<conv(x, w), dy> = <x, dx> = <w, dw>: forward and both gradients describe one bilinear map, exactly on
    integers."""
    case = case_of(*width, 2, 9, 10, stride)
    data = conv_cases.Data(case, torch.float32, "integer", "adjoint")
    x, dy, w = data.activation(case.input_size), data.activation(case.output_size), data.weight(case.cin)
    y = ops.pointwise_conv_fwd(x, w, stride, None, None, None, False)
    dx, dw, _ = ops.pointwise_conv_bwd(dy, x, w, stride, None, None, None, None, True, True, False)
    forward = (y.double() * dy).sum().item()
    assert forward == (dx.double() * x).sum().item() == (dw.double() * w).sum().item() != 0


# ------------------------------------------------------------------------------------------------
# defects that the checks must see

DEFECTS = {
    "fwd": {
        "a shifted pixel": lambda y: torch.roll(y, 1, 3),
        "swapped channels": lambda y: y.flip(1),
        "1 % off": lambda y: y * 1.01,
        "one pixel zero": lambda y: y.index_fill(3, torch.tensor([2]), 0),
    },
    "bwd_input": {"no gradient": torch.zeros_like, "swapped channels": lambda dx: dx.flip(1)},
    "bwd_weight": {"1 % off": lambda dw: dw * 1.01, "transposed": lambda dw: dw.flip(0)},
}


@pytest.mark.parametrize("name, defect", [(n, d) for n, ds in DEFECTS.items() for d in ds])
@pytest.mark.parametrize("kind", ["integer", "normal"])
def test_the_checks_notice(ops, name, defect, kind):
    right, spoil = as_grouped(ops)[name], DEFECTS[name][defect]

    def wrong(*args):
        out = right(*args)
        if isinstance(out, torch.Tensor):
            return place(spoil(out), "channels_last")
        return place(spoil(out[0]), "channels_last"), *out[1:]

    verify = VERIFY[name][0]
    verify(right, CORE[0], torch.float32, kind, "plain")
    with pytest.raises(AssertionError):
        verify(wrong, CORE[0], torch.float32, kind, "plain")


# ------------------------------------------------------------------------------------------------
# the function


@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
def test_function_and_gradients_beside_torch(ops, dtype, bias, stride):
    gen = checks.generator("function", bias, stride)
    x, w = torch.randn(2, 24, 8, 7, generator=gen), torch.randn(40, 24, 1, 1, generator=gen) / 5
    b = torch.randn(40, generator=gen) if bias else None

    def run(conv, dtype):
        leaves = [t.detach().clone().to(dtype).requires_grad_() for t in (x, w, b) if t is not None]
        y = conv(leaves[0], leaves[1], leaves[2] if bias else None, stride)
        y.square().sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    with gconv.use_backend("cpu"):
        got = run(pointwise_conv, dtype)
    want, own = run(F.conv2d, torch.float64), run(F.conv2d, dtype)
    for name, *tensors in zip(("y", "dx", "dw", "db"), got, want, own):
        assert_accurate(*tensors, name)


def test_function_runs_where_it_says(ops):
    x, w = torch.randn(2, 24, 8, 7), torch.randn(40, 24, 1, 1)
    for conv in (pointwise_conv, gconv.functional.grouped_conv):
        with gconv.trace() as t:
            conv(x, w)
        assert [row.kernel for row in t] == ["cpu.pointwise_conv"]
    layer = gconv.Conv2d(24, 40, 1, stride=2)
    with gconv.trace() as t:
        layer(x)
    assert [row.kernel for row in t] == ["cpu.pointwise_conv"]
    with gconv.set_policy("silent"), gconv.trace() as t:
        torch.testing.assert_close(pointwise_conv(x, w, stride=3), F.conv2d(x, w, stride=3))
    assert [(row.kernel, row.reason) for row in t] == [("torch.conv2d", "stride: want 1 or 2, got 3x3")]


@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 24, 8, 7), (24, 8, 7), (1, 24, 1, 1), (0, 24, 4, 4)], ids=str)
def test_function_returns_torchs_memory_format(ops, x_layout, shape):
    x, w = torch.randn(shape), torch.randn(40, 24, 1, 1)
    if len(shape) == 4:
        x = place(x, x_layout)
    got, want = pointwise_conv(x, w), F.conv2d(x, w)
    assert got.shape == want.shape
    if want.numel() > 40:
        assert got.stride() == want.stride()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_autocast_casts_as_torch_does(ops):
    x, w = torch.randn(2, 24, 8, 7), torch.randn(40, 24, 1, 1)
    with torch.autocast("cpu", torch.bfloat16), gconv.use_backend("cpu"):
        assert pointwise_conv(x, w).dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv_bn_relu_of_1x1_beside_torch(ops, training, residual, stride):
    """Outputs, gradients and running statistics of the fused layer."""
    torch.manual_seed(1)
    layer = gconv.ConvBNReLU(24, 40, 1, stride).train(training)
    stock = torch.nn.Sequential(torch.nn.Conv2d(24, 40, 1, stride, bias=False), torch.nn.BatchNorm2d(40))
    stock.load_state_dict(dict(zip(stock.state_dict(), layer.state_dict().values())))
    stock.train(training)
    x, r = torch.randn(2, 24, 9, 8), torch.randn(2, 40, (9 - 1) // stride + 1, (8 - 1) // stride + 1)
    results = []
    for run, dtype in ((layer, None), (None, torch.float64), (None, torch.float32)):
        model = layer if run is layer else stock.to(dtype)
        leaf = x.to(dtype or torch.float32).requires_grad_()
        added = r.to(leaf.dtype) if residual else None
        if run is layer:
            with gconv.trace() as t:
                z = layer(leaf, added)
            assert [row.kernel for row in t] == ["cpu.conv_bn_relu"]
        else:
            running = {n: b.clone() for n, b in stock.named_buffers()}
            z = stock(leaf)
            z = F.relu(z if added is None else z + added)
        grads = torch.autograd.grad(z.square().sum(), [leaf, *model.parameters()])
        results.append([z.detach(), *grads, *(b.clone() for b in model.buffers() if b.is_floating_point())])
        if run is not layer:
            stock.load_state_dict({**stock.state_dict(), **running})
    for i, tensors in enumerate(zip(*results)):
        assert_accurate(*tensors, f"result {i}")


BAD = {
    "weight of another kernel": (lambda x, w: pointwise_conv(x, torch.zeros(4, 24, 3, 3)), "weight: want"),
    "weight of another width": (lambda x, w: pointwise_conv(x, torch.zeros(4, 23, 1, 1)), "weight: want"),
    "weight of another dtype": (lambda x, w: pointwise_conv(x, w.double()), "weight: want dtype"),
    "bias of another size": (lambda x, w: pointwise_conv(x, w, torch.zeros(3)), "bias: want"),
    "x of two dimensions": (lambda x, w: pointwise_conv(x[0, 0], w), "x: want"),
    "x no tensor": (lambda x, w: pointwise_conv(None, w), "x: want a tensor, got NoneType"),
    "stride 0": (lambda x, w: pointwise_conv(x, w, stride=0), "stride: want at least 1"),
    "stride of three": (lambda x, w: pointwise_conv(x, w, stride=(1, 1, 1)), "stride: want"),
}


@pytest.mark.parametrize("name", BAD)
def test_function_refuses(ops, name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=f"^pointwise_conv: {message}") as error:
        call(torch.zeros(2, 24, 8, 7), torch.zeros(40, 24, 1, 1))
    assert "\n" not in str(error.value)


BAD_OPS = BAD_BWD | {
    "stride": ({"stride": [3, 1]}, "stride: want 2 integers from 1 to 2, got [3, 1]"),
    "x": ({"x": torch.zeros(8, 4, 4)}, "x: want a CPU tensor [N, C, H, W], got float32 [8, 4, 4]"),
    "float64": ({"x": torch.zeros(2, 8, 4, 4).double()}, "x: want float32, bfloat16 or float16, got float64"),
    "no pixels": ({"x": torch.zeros(2, 8, 0, 4)}, "x: want an image with pixels, got float32 [2, 8, 0, 4]"),
}


@pytest.mark.parametrize("name", BAD_OPS)
def test_bwd_refuses(ops, name):
    verify_bwd_refuses(ops, *BAD_OPS[name])


def test_fwd_refuses(ops):
    x, w = torch.zeros(2, 8, 4, 4), torch.zeros(5, 8, 1, 1)
    for args, message in (
        (
            (x, w, [1, 1], torch.zeros(4, 8), None, None, False),
            "act: want float32 [2, 8], got float32 [4, 8]",
        ),
        ((x, w, [1, 1], None, torch.zeros(2, 8), None, False), "affine: want float32 [2, 5]"),
        ((x, w, [1, 1], None, None, x, False), "residual: want float32 [2, 5, 4, 4]"),
        ((x[:, :0], w[:, :0], [1, 1], None, None, None, False), "weight: want at least one channel"),
    ):
        with pytest.raises(RuntimeError) as error:
            ops.pointwise_conv_fwd(*args)
        assert f"pointwise_conv_fwd: {message}" in str(error.value)
