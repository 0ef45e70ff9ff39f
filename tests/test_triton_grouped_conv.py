"""The kernels of grouped_conv for GPUs, in Triton and in CUDA C++: tests of the C++ ops again, on a GPU or in
Triton's interpreter, at the smallest shapes that reach every tile, and what is theirs alone."""

import math

import checks
import conv_cases
import pytest
import test_grouped_conv as of_cpu
import torch
from checks import assert_exact, assert_same_bits, place
from conv_cases import VERIFY, Case
from test_grouped_conv import ACTIVATIONS, EXPANDED, all_args, all_ops
from triton_cases import DTYPES, OnDevice, dtypes, on_triton

import gconv
from gconv import backend

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@pytest.fixture
def ops(gpu_backend):
    return OnDevice(gpu_backend)


@pytest.fixture
def isa():
    """The one "instruction set" of this backend, as the tests of the C++ ops ask for one."""
    return "triton"


# Groups merged to 16 channels, whole, cut off and too few; groups that take a tile each, with zeros and
# without; groups of several tiles in and out. Bands of rows, whole and cut off; every stride, dilation and
# padding.
CASES = (
    Case(1, 1, 17, 1, 3, 4),
    Case(2, 2, 9, 2, 5, 3, (2, 1), (2, 2), (3, 3)),
    Case(3, 3, 6, 1, 5, 4),
    Case(4, 4, 5, 2, 6, 5),
    Case(5, 3, 4, 1, 6, 5, (1, 2), (3, 4), (2, 2)),
    Case(8, 8, 3, 1, 4, 5, (2, 2)),
    Case(16, 16, 2, 2, 3, 3, (2, 1), (0, 1)),
    Case(24, 24, 1, 1, 4, 3, (2, 2), (2, 2), (2, 2)),
    Case(48, 33, 1, 1, 2, 2),
    Case(3, 70, 1, 1, 5, 4, (2, 2)),
    Case(40, 17, 1, 1, 2, 3),
    Case(1, 8, 3, 1, 1, 1),
    Case(8, 4, 5, 2, 5, 4, (1, 2), (0, 2), (2, 1)),
)
CORE = Case(4, 4, 5, 1, 3, 6)


def each(cases, every_variant):
    """Each case on each op: with all variants or one; dtypes and kinds of data turn."""
    params = []
    for case in cases:
        for name, (_, variants) in VERIFY.items():
            for variant in variants if every_variant else [checks.rotate(variants, str(case), name)]:
                kind = checks.rotate(("integer", "normal"), str(case), name, variant)
                for dtype in (checks.rotate(DTYPES[:2], str(case), name, variant, kind), DTYPES[2]):
                    label = f"{name.removeprefix('grouped_conv_')}-{variant}-{case}-{kind}"
                    value = dtype if isinstance(dtype, torch.dtype) else dtype.values[0]
                    marks = () if isinstance(dtype, torch.dtype) else dtype.marks
                    label += f"-{checks.dtype_name(value)}"
                    params.append(pytest.param(name, case, value, kind, variant, id=label, marks=marks))
    return pytest.mark.parametrize("name, case, dtype, kind, variant", params)


@each(CASES, False)
def test_every_tile(ops, name, case, dtype, kind, variant):
    VERIFY[name][0](getattr(ops, name), case, dtype, kind, variant)


@each((CORE,), True)
def test_every_variant(ops, name, case, dtype, kind, variant):
    VERIFY[name][0](getattr(ops, name), case, dtype, kind, variant)


test_both_gradients_are_those_of_their_own_ops = on_triton(
    of_cpu.test_both_gradients_are_those_of_their_own_ops,
    isa=("triton",),
    case=(Case(4, 4, 2, 1, 2, 3, (2, 1)),),
)
test_weight_layout_at_every_width_of_a_group = on_triton(
    of_cpu.test_weight_layout_at_every_width_of_a_group, isa=("triton",), width=(3, 24)
)
test_padding_stays_zero_under_a_positive_shift = on_triton(
    of_cpu.test_padding_stays_zero_under_a_positive_shift, padding=((1, 1), (0, 2))
)
test_rounds_once_to_nearest_even = on_triton(of_cpu.test_rounds_once_to_nearest_even, width=(3,))
test_rounds_once_to_nearest_even.pytestmark = [  # float32 has nothing to round there
    pytest.mark.parametrize("dtype", DTYPES[1:], ids=checks.dtype_name).mark if "dtype" in mark.args else mark
    for mark in test_rounds_once_to_nearest_even.pytestmark
]
test_relu_and_its_masks_let_nan_through = on_triton(of_cpu.test_relu_and_its_masks_let_nan_through)
test_a_gradient_of_exactly_zero_input_is_blocked = on_triton(
    of_cpu.test_a_gradient_of_exactly_zero_input_is_blocked
)
test_zero_batch = on_triton(of_cpu.test_zero_batch)
test_does_not_write_to_its_inputs = on_triton(of_cpu.test_does_not_write_to_its_inputs, width=(4,))

TINY = Case(3, 4, 3, 2, 2, 2)


@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "stepped"])
def test_layout_does_not_change_a_bit(ops, dtype, layout):
    args = all_args(TINY, dtype)
    want = all_ops(ops, {**args, **{n: place(args[n], "channels_last") for n in ACTIVATIONS}})
    got = all_ops(ops, {**args, **{n: place(args[n], layout) for n in ACTIVATIONS}})
    for name in want:
        assert_same_bits(got[name], want[name], name)


@dtypes
@pytest.mark.parametrize("how", ["scalar"])
def test_stride_0(ops, dtype, how):
    """y.sum().backward() hands over a gradient of stride 0, broadcasting hands over the rest."""
    args = all_args(TINY, dtype)
    expanded = {n: EXPANDED[how](args[n]) for n in ACTIVATIONS}
    got = all_ops(ops, {**args, **expanded})
    want = all_ops(ops, {**args, **{n: place(t, "channels_last") for n, t in expanded.items()}})
    for name in want:
        assert_same_bits(got[name], want[name], name)


@dtypes
def test_the_same_bits_from_run_to_run_and_in_any_batch(ops, dtype):
    args = all_args(TINY, dtype)
    whole, again = all_ops(ops, args), all_ops(ops, args)
    alone = all_ops(ops, {**args, **{name: args[name][1:] for name in ACTIVATIONS}})
    for name in whole:
        assert_same_bits(again[name], whole[name], name)
    for name in ("fwd", "y", "dx", "plain_dx"):
        assert_same_bits(alone[name], whole[name][1:], name)


@dtypes
@pytest.mark.parametrize("want_stats", [False, True])
def test_writes_a_slice_of_a_wider_buffer_and_nothing_else(ops, dtype, want_stats):
    case = Case(4, 4, 5, 2, 3, 4)
    args = all_args(case, dtype)
    n, k, oh, ow = case.output_size
    buffer = torch.full((n, oh, ow, k + 16), math.nan, dtype=dtype).permute(0, 3, 1, 2)
    view = buffer[:, 8 : 8 + k]
    conv = (args["x"], args["w"], *case.geometry, args["act"][:2].contiguous())
    mean, var = ops.grouped_conv_fwd_into(*conv, None, None, False, want_stats, view)
    if want_stats:
        want, *statistics = ops.grouped_conv_fwd_stats(*conv)
        for got, same in zip((mean, var), statistics):
            assert_same_bits(got, same)
    else:
        want = ops.grouped_conv_fwd(*conv, None, None, False)
        assert mean.shape == var.shape == (0,)
    assert_same_bits(view, want)
    assert buffer[:, :8].isnan().all() and buffer[:, 8 + k :].isnan().all()


@dtypes
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_16_channels(ops, dtype, value):
    """Merged groups share a product, where 0*inf is NaN; weight gradients keep to their groups."""
    case = Case(4, 4, 8, 1, 4, 5)
    x, w, dy = (
        torch.ones(size, dtype=dtype) for size in (case.input_size, case.weight_size, case.output_size)
    )
    want = ops.grouped_conv_fwd(x, w, *case.geometry, None, None, None, False)
    x[0, 5, 0, 0] = value
    y = ops.grouped_conv_fwd(x, w, *case.geometry, None, None, None, False)
    reached = torch.zeros(case.output_size, dtype=torch.bool)
    reached[0, :16, :2, :2] = True
    assert torch.equal(y[~reached], want[~reached])
    assert not y[0, 4:8, :2, :2].isfinite().any(), "its own group"
    dw = ops.grouped_conv_bwd_weight(dy, x, case.weight_size, *case.geometry, None, None, None)
    assert not dw[4:8, 1, :2, :2].isfinite().any()
    dw[4:8, 1, :2, :2] = 0
    assert dw.isfinite().all()


@dtypes
def test_many_splits_and_tiles(ops, dtype):
    """Images enough that partial results are merged: of statistics, of sums and of the weight gradient."""
    case = Case(8, 8, 2, 2, 7, 9)
    for name, variant in (
        ("grouped_conv_fwd_stats", "act"),
        ("grouped_conv_bwd_input", "finish_act"),
        ("grouped_conv_bwd_weight", "finish_act"),
    ):
        VERIFY[name][0](getattr(ops, name), case, dtype, "integer", variant)
        VERIFY[name][0](getattr(ops, name), case, dtype, "normal", variant)


def test_both_layouts_of_the_weight_gradient(ops):
    for case in (Case(4, 4, 5, 1, 3, 4), Case(24, 5, 1, 1, 2, 3)):
        args = all_args(case, torch.float32, "integer")
        gradient = (args["dy"], args["x"], case.weight_size, *case.geometry, None, None, None)
        exact = checks.ref_bwd_weight(torch.float64, *gradient)
        for channels_last in (False, True):
            dw = ops.grouped_conv_bwd_weight(*gradient, channels_last)
            assert_exact(dw, exact)
            form = torch.channels_last if channels_last else torch.contiguous_format
            assert dw.is_contiguous(memory_format=form)


def test_the_layer_runs_on_the_kernels_and_trains(gpu_backend):
    """Every derivative of the function goes through the launchers."""
    case = Case(4, 4, 3, 1, 4, 5, (2, 1))
    data = conv_cases.Data(case, torch.float32, "integer", "layer")
    x, w = (t.to(gpu_backend) for t in (data.activation(case.input_size), data.weight(36)))
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    w = w.contiguous().requires_grad_()
    stride, padding, dilation, groups = (tuple(g) if isinstance(g, list) else g for g in case.geometry)
    with gconv.trace() as trace:
        y = gconv.functional.grouped_conv(x, w, None, stride, padding, dilation, groups)
    assert [row.kernel for row in trace] == [f"{backend.backend_mode()}.grouped_conv"], trace
    dx, dw = torch.autograd.grad(y.square().sum(), (x, w))
    a, b = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    exact = torch.nn.functional.conv2d(a, b, None, stride, padding, dilation, groups)
    want_dx, want_dw = torch.autograd.grad(exact.square().sum(), (a, b))
    for got, want in ((y, exact), (dx, want_dx), (dw, want_dw)):
        assert_exact(got.detach().cpu(), want.detach().cpu())


def refused(op, args, **other):
    names = ("x", "weight", "stride", "padding", "dilation", "groups", "act", "affine", "residual", "relu")
    return op(*({**dict(zip(names, args)), **other}[name] for name in names))


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("weight", torch.zeros(20, 3, 3, 3), "[20, 3, 3, 3]"),
        ("weight", torch.zeros(20, 4, 3, 3).half(), "want float32"),
        ("act", torch.zeros(2, 19), "want float32 [2, 20]"),
        ("affine", torch.zeros(2, 20).double(), "want float32 [2, 20], got float64"),
        ("residual", torch.zeros(1, 20, 3, 5), "want float32 [1, 20, 3, 4]"),
    ],
)
def test_bad_input_is_refused_in_one_line(ops, name, wrong, message):
    case = Case(4, 4, 5, 1, 3, 4)
    args = all_args(case, torch.float32)
    conv = (args["x"], args["w"], *case.geometry, None, None, None, False)
    with pytest.raises(RuntimeError) as caught:
        refused(ops.grouped_conv_fwd, conv, **{name: wrong})
    line = str(caught.value)
    assert line.startswith(f"grouped_conv_fwd: {name}: want") and message in line and "\n" not in line
