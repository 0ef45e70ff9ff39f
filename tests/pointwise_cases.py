"""What the tests of pointwise_conv share, whatever its kernels run on: the ops under the names of
grouped_conv's, cases, and calls of all ops with everything switched on."""

import math

import conv_cases
import torch
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


EXPANDED = {
    "scalar": lambda t: t[:1, :1, :1, :1].expand(t.shape),
    "batch": lambda t: t[:1].expand(t.shape),
    "channel": lambda t: t[:, :1].expand(t.shape),
    "pixel": lambda t: t[:, :, :1, :1].expand(t.shape),
    "row": lambda t: t[:, :, :, :1].expand(t.shape),
}
