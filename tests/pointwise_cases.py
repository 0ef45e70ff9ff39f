"""What the tests of pointwise_conv share, whatever its kernels run on: the ops under the names of
grouped_conv's, cases, and calls of all ops with everything switched on."""

import math

import checks
import conv_cases
import pytest
import torch
from checks import assert_channels_last, assert_exact, assert_same_bits, place
from conv_cases import BWD_INPUT_VARIANTS, BWD_WEIGHT_VARIANTS, FWD_VARIANTS, STATS_VARIANTS, Case


def case_of(c, k, n, h, w, stride=(1, 1)):
    return Case(c, k, 1, n, h, w, stride, (0, 0), (1, 1), 1)


CORE = (case_of(20, 37, 2, 6, 9), case_of(33, 16, 2, 9, 7, (2, 2)), case_of(5, 3, 1, 7, 8, (1, 2)))


def as_grouped(ops):
    """The ops by the names and with the arguments of grouped_conv's."""

    def bwd_input(dy, weight, input_size, stride, padding, dilation, groups, y, finish, x, act):
        x = dy.new_empty(1).expand(input_size) if x is None else x
        dx, dweight, sums = ops.pointwise_conv_bwd(
            dy, x, weight, stride, y, finish, act, None, True, False, False
        )
        assert dweight.shape == (0,)
        return dx, sums

    def bwd_weight(dy, x, weight_size, stride, padding, dilation, groups, y, finish, act):
        act = None if act is None else torch.cat([act, torch.full_like(act, math.nan)])
        weight = x.new_empty(1).expand(weight_size)
        dx, dweight, sums = ops.pointwise_conv_bwd(
            dy, x, weight, stride, y, finish, act, None, False, True, False
        )
        assert dx.shape == sums.shape == (0,)
        return dweight

    return {
        "fwd": lambda x, weight, stride, p, d, g, *rest: ops.pointwise_conv_fwd(x, weight, stride, *rest),
        "fwd_stats": lambda x, weight, stride, p, d, g, act: ops.pointwise_conv_fwd_stats(
            x, weight, stride, act
        ),
        "bwd_input": bwd_input,
        "bwd_weight": bwd_weight,
    }


VERIFY = {
    "fwd": (conv_cases.verify_fwd, FWD_VARIANTS),
    "fwd_stats": (conv_cases.verify_fwd_stats, STATS_VARIANTS),
    "bwd_input": (conv_cases.verify_bwd_input, BWD_INPUT_VARIANTS),
    "bwd_weight": (conv_cases.verify_bwd_weight, BWD_WEIGHT_VARIANTS),
}


def all_args(case, dtype, kind="normal"):
    data = conv_cases.Data(case, dtype, kind, "all")
    c, k = case.input_size[1], case.output_size[1]
    activations = {
        name: data.activation(size).to(dtype)
        for name, size in (
            ("x", case.input_size),
            ("residual", case.output_size),
            ("dy", case.output_size),
            ("y", case.output_size),
            ("dresidual", case.input_size),
        )
    }
    return activations | {
        "w": data.weight(case.cin),
        "stride": list(case.stride),
        "act": torch.cat([data.pair(c), data.pair(c)]),
        "affine": data.pair(k),
        "finish": data.finish(k, True),
    }


ACTIVATIONS = ("x", "residual", "dy", "y", "dresidual")


def all_ops(ops, a):
    """Results of the three ops with everything switched on, as a dict of tensors."""
    base = a["x"], a["w"], a["stride"]
    act = a["act"][:2]
    y, mean, var = ops.pointwise_conv_fwd_stats(*base, act)
    wanted = (True, True, False)
    dx, dw, sums = ops.pointwise_conv_bwd(a["dy"], *base, a["y"], a["finish"], a["act"], None, *wanted)
    joined, plain_dw, _ = ops.pointwise_conv_bwd(a["dy"], *base, None, None, None, a["dresidual"], *wanted)
    return {
        "fwd": ops.pointwise_conv_fwd(*base, act, a["affine"], a["residual"], True), "y": y, "mean": mean,
        "var": var, "dx": dx, "dw": dw, "sums": sums, "joined": joined, "plain_dw": plain_dw,
    }  # fmt: skip


def verify_both(ops, case, dtype):
    """Both gradients in one op are those alone, bit for bit; only what is wanted is computed."""
    a = all_args(case, dtype)
    base = a["dy"], a["x"], a["w"], a["stride"]
    channels_last = case.cin % 2 == 0
    for rest in (
        (None, None, None, None),
        (a["y"], a["finish"], a["act"], None),
        (a["y"], a["finish"], None, a["dresidual"]),
    ):
        both = ops.pointwise_conv_bwd(*base, *rest, True, True, channels_last)
        assert both[2].shape == ((0,) if rest[2] is None else (2, case.cin))
        for wanted in ((True, False), (False, True), (False, False)):
            got = ops.pointwise_conv_bwd(*base, *rest, *wanted, channels_last)
            for tensor, want, there in zip(got, both, (*wanted, wanted[0]), strict=True):
                assert_same_bits(tensor, want if there else want.new_empty(0))
                assert tensor.stride() == (want.stride() if there else (1,))


def verify_residual(ops, case, dtype, finish):
    """The residual joins dx before it is rounded."""
    a = all_args(case, dtype, "integer")
    gradient = (a["y"], a["finish"]) if finish else (None, None)
    base = a["dy"], a["w"], case.input_size, *case.geometry
    exact = checks.ref_bwd_input(torch.float64, *base, *gradient, None, None)[0] + a["dresidual"].double()
    args = a["dy"], a["x"], a["w"], a["stride"], *gradient, None, a["dresidual"]
    dx, _, _ = ops.pointwise_conv_bwd(*args, True, False, False)
    assert_exact(dx, exact)
    assert_channels_last(dx)


def verify_layout(ops, case, dtype, layout):
    """The activations' layout does not change a bit, and none is written to."""
    args = all_args(case, dtype)
    want = all_ops(ops, {**args, **{n: place(args[n], "channels_last") for n in ACTIVATIONS}})
    inputs = {**args, **{n: place(args[n], layout) for n in ACTIVATIONS}}
    before = {n: t.clone() for n, t in inputs.items() if isinstance(t, torch.Tensor)}
    got = all_ops(ops, inputs)
    for name in want:
        assert_same_bits(got[name], want[name], name)
    for name in ("fwd", "y", "dx", "joined"):
        assert_channels_last(got[name], name)
    for name, copy in before.items():
        assert_same_bits(inputs[name], copy, f"{name} was written to")


def verify_threads(ops, case, dtype, threads):
    args = all_args(case, dtype)
    checks.verify_threads(lambda: all_ops(ops, args), threads)


def verify_batch(ops, case, dtype):
    """An image alone has the bits that it has in its batch."""
    args = all_args(case, dtype)
    whole = all_ops(ops, args)
    for n in range(case.n):
        alone = all_ops(ops, {**args, **{name: args[name][n : n + 1] for name in ACTIVATIONS}})
        for name in ("fwd", "y", "dx", "joined"):
            assert_same_bits(alone[name], whole[name][n : n + 1], f"{name}, image {n}")


def verify_stride_0(ops, case, dtype, how):
    checks.verify_stride_0(lambda args: all_ops(ops, args), all_args(case, dtype), ACTIVATIONS, how)


# Changes to the arguments of pointwise_conv_bwd, and what it says to them.
BAD_BWD = {
    "weight": ({"w": torch.zeros(5, 7, 1, 1)}, "weight: want float32 [5, 8, 1, 1], got float32 [5, 7, 1, 1]"),
    "kernel": ({"w": torch.zeros(5, 8, 3, 3)}, "weight: want float32 [5, 8, 1, 1], got float32 [5, 8, 3, 3]"),
    "dtype": ({"w": torch.zeros(5, 8, 1, 1).half()}, "weight: want float32 [5, 8, 1, 1], got float16"),
    "dy": ({"dy": torch.zeros(2, 5, 3, 4)}, "dy: want float32 [2, 5, 4, 4], got float32 [2, 5, 3, 4]"),
    "act": ({"act": torch.zeros(2, 8)}, "act: want float32 [4, 8], got float32 [2, 8]"),
    "finish alone": ({"finish": torch.zeros(6, 5)}, "y: want finish and y together, got only finish"),
    "y alone": ({"y": torch.zeros(2, 5, 4, 4)}, "finish: want finish and y together, got only y"),
    "residual and act": (
        {"act": torch.zeros(4, 8), "residual": torch.zeros(2, 8, 4, 4)},
        "residual: want none together with act",
    ),
    "residual": ({"residual": torch.zeros(2, 5, 4, 4)}, "residual: want float32 [2, 8, 4, 4]"),
}  # fmt: skip


def verify_bwd_refuses(ops, changes, message):
    a = {"dy": torch.zeros(2, 5, 4, 4), "x": torch.zeros(2, 8, 4, 4), "w": torch.zeros(5, 8, 1, 1)}
    a |= {"stride": [1, 1], "y": None, "finish": None, "act": None, "residual": None} | changes
    with pytest.raises(RuntimeError) as error:
        ops.pointwise_conv_bwd(*a.values(), True, True, False)
    assert f"pointwise_conv_bwd: {message}" in str(error.value)
