"""What the grouped 3x3 convolution and its weight gradient share: how channels are cut into tiles for a
matrix unit, and pixels into lanes.

A matrix unit takes 16 channels at least. Groups narrower than that are merged: as many whole groups as 16
input and 16 output channels hold make one span. Wider groups are spans of their own, cut into tiles with
zero-filled tails.

The rows of a program's matrix product, its lanes, are output columns counted over images and bands of ROWS
output rows each: every tile of an input row that a program loads serves up to three output rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from gconv.kernels.verbs import channels_adjacent, check, dot_tile, multiple

# ------------------------------------------------------------------------------------------ on tiles


@triton.jit
def band_lanes(tile, N, BANDS, W, BLOCK_M: tl.constexpr):
    """(image int64, band, column, whether there is one) of a tile's lanes, counted over images, bands of rows
    and W columns."""
    per_image = BANDS * W
    first = tl.cast(tile, tl.int64) * BLOCK_M
    image = first // per_image
    lane = (first - image * per_image).to(tl.int32) + tl.arange(0, BLOCK_M)
    n = image + lane // per_image
    lane = lane % per_image
    return n, lane // W, lane % W, n < N


@triton.jit
def span_channels(span, tile, C, SPAN: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """(channels, whether there is one) of one tile of a span of SPAN channels."""
    within = tile * BLOCK + tl.arange(0, BLOCK)
    c = span * SPAN + within
    return c, (within < SPAN) & (c < multiple(C, ALIGN))


@triton.jit
def image_offset(n, row, column, stride_n, stride_h, stride_w, ALIGN: tl.constexpr):
    """Where pixels begin, in elements: int64 [lanes, 1]."""
    at = n * multiple(stride_n, ALIGN)
    at += row.to(tl.int64) * multiple(stride_h, ALIGN) + column.to(tl.int64) * multiple(stride_w, ALIGN)
    return at[:, None]


@triton.jit
def replaced(values, i: tl.constexpr, value):
    """The tuple with another i-th value."""
    return values[:i] + (value,) + values[i + 1 :]  # noqa: RUF005 (Triton has no starred tuples)


# ------------------------------------------------------------------------------------------ cutting


class Spans(NamedTuple):
    """How the channels of a convolution are cut: `merge` groups to a span of SPAN_C input and SPAN_K output
    channels, a span into `chunks` tiles of BLOCK_C and `parts` tiles of BLOCK_K."""

    merge: int
    span_c: int
    span_k: int
    block_c: int
    block_k: int

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.span_c, self.block_c)

    @property
    def parts(self) -> int:
        return triton.cdiv(self.span_k, self.block_k)


UNIT = 16  # channels that a matrix unit takes at least
# The widest tiles of input and of output channels: wider ones would leave too few registers.
WIDEST = {torch.float32: (32, 32), torch.bfloat16: (32, 64), torch.float16: (32, 64)}


def spans(dtype: torch.dtype, group_c: int, group_k: int, finish: bool = False) -> Spans:
    """`finish`: whether the input is finished on load, whose six vectors take registers."""
    if dtype not in WIDEST:
        raise RuntimeError(f"grouped_conv: dtype: want float32, bfloat16 or float16, got {dtype}")
    most_c, most_k = (UNIT, 32) if finish else WIDEST[dtype]
    merge = max(1, min(UNIT // group_c, UNIT // group_k))
    span_c, span_k = merge * group_c, merge * group_k
    # As few tiles of output channels as can be, for each reads the input again. Of input channels wide tiles
    # that add a third of zeros at most: wide loads save more than zeros cost.
    wide = triton.cdiv(span_c, most_c) * most_c
    block_c = most_c if 3 * wide <= 4 * span_c or wide == triton.cdiv(span_c, UNIT) * UNIT else UNIT
    block_k = max(UNIT, min(most_k, triton.next_power_of_2(span_k)))
    dot_tile(block_c, block_k)
    return Spans(merge, span_c, span_k, block_c, block_k)


def band_rows(rows: int, step: int, dilation: int, height: int) -> int:
    """Output rows to a band, `rows` at most; 1 where an input row serves one output row only."""
    return 1 if step != 1 or dilation != 1 else min(rows, triton.next_power_of_2(height))


def coefficients(op: str, name: str, vectors, rows: int, channels: int):
    """Per-channel vectors as the kernels read them, one after the other; None stays None."""
    if vectors is not None:
        check(op, name, vectors, torch.float32, (rows, channels))
        vectors = vectors.contiguous()
    return vectors


def activation(op: str, name: str, t, dtype: torch.dtype, shape):
    """[N, C, H, W] as the kernels read it, a pixel's channels side by side; None stays None."""
    if t is not None:
        check(op, name, t, dtype, shape)
        t = channels_adjacent(t)
    return t


# Channels per group, in and out, that take every tile there is.
WIDTHS = ((4, 4), (16, 32), (16, 64), (32, 16), (32, 32), (40, 16), (40, 64), (128, 128))


def compiled_cuts(finish: bool) -> list:
    """(dtype, cut, precision of tl.dot) for ahead-of-time compilation: every tile, but the narrowest and the
    widest alone for float16, which differs from bfloat16 in the matrix unit only."""
    result = []
    for dtype, precision, widths in (
        (torch.bfloat16, "ieee", WIDTHS), (torch.float16, "ieee", (WIDTHS[0], WIDTHS[-1])),
        (torch.float32, "ieee", WIDTHS), (torch.float32, "tf32", WIDTHS),
    ):  # fmt: skip
        cuts = {
            (cut.block_c, cut.block_k, cut.chunks > 1): cut
            for cut in (spans(dtype, *w, finish) for w in widths)
        }
        result += [(dtype, cut, precision) for cut in cuts.values()]
    return result


def compiled_alignment(dtype: torch.dtype, wide: bool = True) -> dict:
    """Alignment of channels that lets a load be 16 bytes wide, or none at all."""
    align = 16 // dtype.itemsize if wide else 1
    return {"ALIGN_X": align, "ALIGN_Y": align}
