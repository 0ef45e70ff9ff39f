"""The convolutions under test: the grid of cases, their data, and each op of `gconv` against its oracle."""

import functools
import math
from dataclasses import dataclass

import torch
from checks import (
    LAYOUTS,
    assert_accurate,
    assert_channels_last,
    assert_exact,
    assert_statistics,
    choice,
    clear_of_kink,
    generator,
    integers,
    place,
    ref_bwd_input,
    ref_bwd_weight,
    ref_fwd,
    rotate,
    torchs_own,
    zero_near_kink,
)


@dataclass(frozen=True)
class Case:
    """One convolution. cin and cout are channels per group, the kernel is 3x3 or 1x1."""

    cin: int
    cout: int
    groups: int
    n: int
    h: int
    w: int
    stride: tuple = (1, 1)
    padding: tuple = (1, 1)
    dilation: tuple = (1, 1)
    kernel: int = 3

    @property
    def input_size(self):
        return [self.n, self.cin * self.groups, self.h, self.w]

    @property
    def weight_size(self):
        return [self.cout * self.groups, self.cin, self.kernel, self.kernel]

    @property
    def output_size(self):
        sizes = ((self.h, self.w), self.padding, self.dilation, self.stride)
        reach = self.kernel - 1
        oh, ow = ((i + 2 * p - reach * d - 1) // s + 1 for i, p, d, s in zip(*sizes, strict=True))
        return [self.n, self.cout * self.groups, oh, ow]

    @property
    def taps(self):
        return self.kernel**2

    @property
    def geometry(self):
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    def __str__(self):
        def pair(p):
            return str(p[0]) if p[0] == p[1] else f"{p[0]}{p[1]}"

        return f"{self.cin}to{self.cout}x{self.groups}-n{self.n}-{self.h}x{self.w}-s{pair(self.stride)}" + (
            f"p{pair(self.padding)}d{pair(self.dilation)}" if self.kernel == 3 else ""
        )


# (channels per group in, out, groups). Every width of the issue with equal in and out, then unequal ones.
WIDTHS = (
    (1, 1, 32), (2, 2, 16), (3, 3, 3), (4, 4, 32), (5, 5, 4), (8, 8, 8), (16, 16, 3), (24, 24, 2),
    (32, 32, 2), (48, 48, 1), (56, 56, 2), (64, 64, 1), (112, 112, 1),
    (1, 1, 5), (4, 4, 3), (8, 8, 1), (16, 16, 1), (2, 2, 1), (32, 32, 1), (3, 3, 1), (5, 5, 1), (24, 24, 1),
    (3, 5, 2), (4, 8, 8), (16, 24, 2), (8, 1, 4), (1, 8, 3), (8, 4, 5), (1, 2, 16), (2, 1, 17), (3, 64, 1),
    (64, 3, 1), (24, 16, 1), (7, 9, 2), (32, 16, 1), (17, 33, 1), (1, 1, 67), (12, 20, 3),
    (4, 6, 5), (6, 4, 7),
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
            w = torch.randn(shape, generator=self.gen) * math.sqrt(2 / (self.case.taps * self.case.cin))
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


def problem(ref, dtype, kind, args):
    """(args, exact result, torch's own); integers leave torch no error."""
    return args, ref(torch.float64, *args), None if kind == "integer" else torchs_own(ref, dtype, args)


@functools.lru_cache(maxsize=64)
def fwd_problem(case, dtype, kind, variant):
    """(arguments of grouped_conv_fwd, exact, torch's own)"""
    data = Data(case, dtype, kind, "fwd", variant)
    x, weight = data.placed(data.activation(case.input_size), "x"), data.weight(case.taps * case.cin)
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
    return problem(ref_fwd, dtype, kind, args)


@functools.lru_cache(maxsize=64)
def bwd_input_problem(case, dtype, kind, variant):
    data = Data(case, dtype, kind, "bwd_input", variant)
    weight = data.weight(case.taps * case.cout)
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
    return problem(ref_bwd_input, dtype, kind, args)


@functools.lru_cache(maxsize=64)
def bwd_weight_problem(case, dtype, kind, variant):
    data = Data(case, dtype, kind, "bwd_weight", variant)
    x = data.placed(data.activation(case.input_size), "x")
    dy, y, finish = data.gradient(variant)
    act_ = data.pair(case.input_size[1]) if variant.endswith("act") else None
    args = (dy, x, case.weight_size, *case.geometry, y, finish, act_)
    return problem(ref_bwd_weight, dtype, kind, args)


def verify_stored(got, exact, own, dtype, kind, label):
    """A result in the storage type: exact on integers, else as near as torch's own."""
    assert got.dtype == dtype, f"{label}: want {dtype}, got {got.dtype}"
    if kind == "integer":
        assert_exact(got, exact, label)
    else:
        assert_accurate(got, exact, own, label)


def verify_fwd(op, case, dtype, kind, variant):
    """Runs `op` (grouped_conv_fwd, or a stand-in for it) on the case and holds it to the oracle."""
    args, exact, own = fwd_problem(case, dtype, kind, variant)
    y = op(*args)
    label = f"grouped_conv_fwd {variant}"
    verify_stored(y, exact, own, dtype, kind, label)
    assert_channels_last(y, label)


def verify_fwd_stats(op, case, dtype, kind, variant):
    args, exact, own = fwd_problem(case, dtype, kind, variant)
    y, mean, var = op(*args[:7])
    label = f"grouped_conv_fwd_stats {variant}"
    verify_stored(y, exact, own, dtype, kind, label)
    assert_channels_last(y, label)
    assert_statistics(mean, var, y, label)


def verify_bwd_input(op, case, dtype, kind, variant):
    args, (exact, exact_sums, magnitude), own = bwd_input_problem(case, dtype, kind, variant)
    dx, sums = op(*args)
    own_dx, own_sums = own[:2] if own else (None, None)
    label = f"grouped_conv_bwd_input {variant}"
    assert sums.dtype == torch.float32, f"{label} sums: got {sums.dtype}"
    if kind == "integer":
        assert_exact(exact.to(dtype), exact, f"{label}: the test's own data are not representable")
    verify_stored(dx, exact, own_dx, dtype, kind, label)
    if kind == "integer":
        assert_exact(sums, exact_sums, f"{label} sums")
    else:
        assert_accurate(sums, exact_sums, own_sums, f"{label} sums", dtype, magnitude)
    assert_channels_last(dx, label)


def verify_bwd_weight(op, case, dtype, kind, variant):
    args, exact, own = bwd_weight_problem(case, dtype, kind, variant)
    verify_stored(op(*args), exact, own, dtype, kind, f"grouped_conv_bwd_weight {variant}")


# Each op's check and the variants it takes.
VERIFY = {
    "grouped_conv_fwd": (verify_fwd, FWD_VARIANTS),
    "grouped_conv_fwd_stats": (verify_fwd_stats, STATS_VARIANTS),
    "grouped_conv_bwd_input": (verify_bwd_input, BWD_INPUT_VARIANTS),
    "grouped_conv_bwd_weight": (verify_bwd_weight, BWD_WEIGHT_VARIANTS),
}
