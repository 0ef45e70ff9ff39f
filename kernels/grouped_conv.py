"""Grouped 3x3 convolution and its gradients in Triton: the launchers are the ops of gconv/grouped_conv.py.

The packed weights of merged groups (gconv.kernels.grouped_conv_tiles) are block-diagonal. A zero in them
times an infinity or NaN is NaN, so what is not finite in one group spreads to those that share its 16
channels, at the same pixels; weight gradients keep to their own groups.

Determinism: bit-identical from run to run; work is cut by shape alone and merged in a fixed order.
"""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from gconv.kernels import verbs
from gconv.kernels.grouped_conv_tiles import (
    UNIT,
    Spans,
    activation,
    band_lanes,
    band_rows,
    coefficients,
    compiled_alignment,
    compiled_cuts,
    image_offset,
    replaced,
    span_channels,
    spans,
)
from gconv.kernels.grouped_conv_wgrad import grouped_conv_bwd_weight, wgrad_configurations
from gconv.kernels.verbs import (
    POINTERS,
    activated,
    alignment,
    channels_adjacent,
    check,
    check_output,
    dot_precision,
    finish_vectors,
    finished,
    merge_statistics,
    merge_sums,
    merged,
    operands,
    pixel_strides,
    relu,
    signature,
    statistics,
    statistics_scratch,
    store_statistics,
    sum_rows,
    wide_loads,
)

from gconv.autograd import empty_channels_last
from gconv.grouped_conv import conv_output_size

# ------------------------------------------------------------------------------------------ packed weights

PACK_BLOCK = 1024


# computes: packed [span][part][tap][chunk][BLOCK_C][BLOCK_K] = weight [outer, inner, 3, 3], 0 between groups
# grid:     (blocks of PACK_BLOCK elements)
# tile:     [PACK_BLOCK]
# bytes:    weight once, packed once
# accum.:   none
@triton.jit(
    do_not_specialize=[
        "total", "groups", "group_c", "group_k", "merge", "parts", "chunks",
        "stride_k", "stride_c", "stride_h", "stride_w",
    ]
)  # fmt: skip
def pack_weight_kernel(
    weight, packed, total, groups, group_c, group_k, merge, parts, chunks,
    stride_k, stride_c, stride_h, stride_w,
    TRANSPOSED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, PACK_BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * PACK_BLOCK + tl.arange(0, PACK_BLOCK)
    k = at % BLOCK_K
    rest = at // BLOCK_K
    c = rest % BLOCK_C
    rest = rest // BLOCK_C
    c += rest % chunks * BLOCK_C
    rest = rest // chunks
    tap = rest % 9
    rest = rest // 9
    k += rest % parts * BLOCK_K
    span = rest // parts

    group = span * merge + k // group_k
    within = (at < total) & (c // group_c == k // group_k) & (k < merge * group_k) & (group < groups)
    if TRANSPOSED:  # of the convolution's weight: c counts its output channels, k its input channels
        outer, inner = group * group_c + c % group_c, k % group_k
    else:
        outer, inner = group * group_k + k % group_k, c % group_c
    source = outer.to(tl.int64) * stride_k + inner * stride_c + tap // 3 * stride_h + tap % 3 * stride_w
    value = tl.load(weight + source, mask=within, other=0.0)
    tl.store(packed + at, value, mask=at < total)


def packed_weight(weight, groups: int, cut: Spans, transposed: bool):
    group_k, group_c = weight.shape[0] // groups, weight.shape[1]
    if transposed:
        group_k, group_c = group_c, group_k
    count = triton.cdiv(groups, cut.merge)
    packed = weight.new_empty(count * cut.parts * 9 * cut.chunks * cut.block_c * cut.block_k)
    total = packed.numel()
    verbs.launch(
        pack_weight_kernel, (triton.cdiv(total, PACK_BLOCK),),
        weight, packed, total, groups, group_c, group_k, cut.merge, cut.parts, cut.chunks, *weight.stride(),
        TRANSPOSED=transposed, BLOCK_C=cut.block_c, BLOCK_K=cut.block_k, PACK_BLOCK=PACK_BLOCK, num_warps=4,
    )  # fmt: skip
    return packed


# ------------------------------------------------------------------------------------------ the convolution


# computes: y = conv(act(x) or finish(x), w); epilogue: c*y + d [+ residual], ReLU, or statistics of y as
#           stored; or y masked by [not a*raw + b <= 0] with its two sums per channel
# grid:     (tiles of lanes x tiles of output channels, the latter next to each other)
# tile:     ROWS x [BLOCK_M lanes, BLOCK_K channels], over BLOCK_C input channels and three taps at a time
# bytes:    x once from memory ((ROWS + 2)/ROWS times from L2, each three times from L1), y once
# accum.:   float32
@triton.jit(
    do_not_specialize=[
        "tiles", "blocks", "N", "H", "W", "C", "OH", "OW", "K", "BANDS", "x_n", "x_h", "x_w",
        "finish_n", "finish_h", "finish_w", "y_n", "y_h", "y_w", "residual_n", "residual_h", "residual_w",
        "step_h", "step_w", "origin_h", "origin_w", "dilation_h", "dilation_w",
        "kh_first", "kw_first", "kh_step", "kw_step",
    ]
)  # fmt: skip
def grouped_conv_fwd_kernel(
    x, finish_y, act, finish, weight, y, affine, residual, mask, partial,
    tiles, blocks, N, H, W, C, OH, OW, K, BANDS,
    x_n, x_h, x_w, finish_n, finish_h, finish_w, y_n, y_h, y_w, residual_n, residual_h, residual_w,
    step_h, step_w, origin_h, origin_w, dilation_h, dilation_w, kh_first, kw_first, kh_step, kw_step,
    RELU: tl.constexpr, STATS: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr,
    SPAN_C: tl.constexpr, SPAN_K: tl.constexpr, CHUNKS: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN_X: tl.constexpr, ALIGN_Y: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile, block = pid // blocks, pid % blocks
    span, part = block // PARTS, block % PARTS
    n, band, column, known = band_lanes(tile, N, BANDS, OW, BLOCK_M)
    k, k_within = span_channels(span, part, K, SPAN_K, BLOCK_K, ALIGN_Y)
    c_tile, k_tile = tl.arange(0, BLOCK_C)[:, None] * BLOCK_K, tl.arange(0, BLOCK_K)[None, :]

    acc = (tl.zeros([BLOCK_M, BLOCK_K], tl.float32),) * ROWS
    for j in tl.static_range(TAPS_W):
        w_in = column * step_w + origin_w + j * dilation_w
        w_known = known & (w_in >= 0) & (w_in < W)
        # Inside of the taps: what of them does not depend on the chunk is held in registers over this loop.
        for chunk in range(CHUNKS):
            c, c_within = span_channels(span, chunk, C, SPAN_C, BLOCK_C, ALIGN_X)
            if act is not None:
                a = tl.load(act + c, mask=c_within, other=0.0)[None, :]
                b = tl.load(act + C + c, mask=c_within, other=0.0)[None, :]
            if finish is not None:
                A, B, offset, mean, f_a, f_b = finish_vectors(finish, c[None, :], C, c_within[None, :])
            # All rows first, so that their loads are under way together.
            rows = ()
            for i in tl.static_range(ROWS + TAPS_H - 1):
                h_in = band * (ROWS * step_h) + origin_h + i * dilation_h
                valid = (w_known & (h_in >= 0) & (h_in < H))[:, None] & c_within[None, :]
                at = image_offset(n, h_in, w_in, x_n, x_h, x_w, ALIGN_X) + c[None, :]
                v = tl.load(x + at, mask=valid, other=0.0)
                # Outside the image there is 0, not what the prologue makes of it.
                if act is not None:
                    v = tl.where(valid, activated(v, a, b), 0.0).to(v.dtype)
                if finish is not None:
                    at = image_offset(n, h_in, w_in, finish_n, finish_h, finish_w, ALIGN_X) + c[None, :]
                    other = tl.load(finish_y + at, mask=valid, other=0.0)
                    v = finished(v, other, A, B, offset, mean, f_a, f_b)
                    v = tl.where(valid, v, 0.0).to(x.dtype.element_ty)
                rows += (v,)
            for kh in tl.static_range(TAPS_H):
                tap = (kh_first + kh * kh_step) * 3 + kw_first + j * kw_step
                at = ((block * 9 + tap) * CHUNKS + chunk) * (BLOCK_C * BLOCK_K)
                w = tl.load(weight + at + c_tile + k_tile)
                for r in tl.static_range(ROWS):
                    acc = replaced(acc, r, tl.dot(rows[r + kh], w, acc[r], input_precision=PRECISION))

    if affine is not None:
        scale = tl.load(affine + k, mask=k_within, other=0.0)[None, :]
        shift = tl.load(affine + K + k, mask=k_within, other=0.0)[None, :]
    if mask is not None:
        mask_a = tl.load(mask + k, mask=k_within, other=0.0)[None, :]
        mask_b = tl.load(mask + K + k, mask=k_within, other=0.0)[None, :]
        mask_mean = tl.load(mask + 2 * K + k, mask=k_within, other=0.0)[None, :]
        mask_rstd = tl.load(mask + 3 * K + k, mask=k_within, other=0.0)[None, :]
    total = tl.zeros([BLOCK_K], tl.float32)
    total_normal = tl.zeros([BLOCK_K], tl.float32)
    count = 0.0
    tile_mean = tl.zeros([BLOCK_K], tl.float32)
    m2 = tl.zeros([BLOCK_K], tl.float32)
    for r in tl.static_range(ROWS):
        h_out = band * ROWS + r
        row_known = (known & (h_out < OH))[:, None]
        valid = row_known & k_within[None, :]
        v = acc[r]
        if affine is not None:
            v = scale * v + shift
        if residual is not None:
            at = image_offset(n, h_out, column, residual_n, residual_h, residual_w, ALIGN_Y) + k[None, :]
            other = tl.load(residual + at, mask=valid, other=0.0).to(tl.float32)
            if mask is not None:
                v = tl.where(mask_a * other + mask_b <= 0, 0.0, v)
                g = tl.where(valid, v, 0.0)
                total += sum_rows(g)
                total_normal += sum_rows(tl.where(valid, g * ((other - mask_mean) * mask_rstd), 0.0))
            else:
                v += other
        if RELU:
            v = relu(v)
        stored = v.to(y.dtype.element_ty)
        at = image_offset(n, h_out, column, y_n, y_h, y_w, ALIGN_Y) + k[None, :]
        tl.store(y + at, stored, mask=valid)
        if STATS:
            row = statistics(stored.to(tl.float32), row_known)
            count, tile_mean, m2 = merged(count, tile_mean, m2, row[0], row[1], row[2])
    if STATS:
        store_statistics(partial, tile, tiles, K, k, k_within, count, tile_mean, m2)
    if mask is not None:
        at = tl.cast(tile, tl.int64) * (2 * K) + k
        tl.store(partial + at, total, mask=k_within)
        tl.store(partial + at + K, total_normal, mask=k_within)


class Walk(NamedTuple):
    """One dimension of a convolution: output i reads input step*i + origin + t*dilation with the kernel's tap
    first + t*increment, for t < taps."""

    step: int
    origin: int
    dilation: int
    taps: int = 3
    first: int = 0
    increment: int = 1


def backward_walks(stride: int, padding: int, dilation: int) -> list[Walk]:
    """One dimension of the input gradient: for each parity of the input's rows (or columns) a convolution of
    dy with those taps, in reverse, that reach it."""
    walks = []
    for parity in range(stride):
        taps = [t for t in (2, 1, 0) if (parity + padding - t * dilation) % stride == 0]
        first = taps[0] if taps else 0
        increment = taps[1] - taps[0] if len(taps) > 1 else -1
        origin = (parity + padding - first * dilation) // stride
        walks.append(Walk(1, origin, max(1, -increment * dilation // stride), len(taps), first, increment))
    return walks


class Tile(NamedTuple):
    """rows: the most it takes at a time."""

    rows: int
    block_m: int
    num_warps: int


# By the operands, the channels of a tile in and out, and what is done on load: finish takes registers, and of
# 16x16 channels a sum over several chunks does. With 64 lanes of those the compiler would take to wgmma,
# which reads shared memory. Without a matrix unit both operands of 32x32 tiles lie in registers: 32 lanes
# would spill. `python -m gconv.bench tune` prints this table.
TILES = {
    ("16-bit", 16, 16, "plain"): Tile(4, 32, 2),
    ("16-bit", 16, 16, "plain chunks"): Tile(2, 32, 2),
    ("16-bit", 16, 32, "plain"): Tile(2, 64, 4),
    ("16-bit", 16, 64, "plain"): Tile(2, 64, 4),
    ("16-bit", 32, 16, "plain"): Tile(2, 64, 4),
    ("16-bit", 32, 32, "plain"): Tile(2, 64, 4),
    ("16-bit", 32, 64, "plain"): Tile(1, 64, 4),
    ("16-bit", 16, 16, "finish"): Tile(4, 32, 2),
    ("16-bit", 16, 32, "finish"): Tile(1, 64, 4),
    ("16-bit", 16, 16, "finish chunks"): Tile(2, 32, 2),
    ("tf32", 16, 16, "plain"): Tile(2, 32, 2),
    ("tf32", 16, 16, "plain chunks"): Tile(2, 32, 4),
    ("tf32", 16, 32, "plain"): Tile(1, 32, 4),
    ("tf32", 32, 16, "plain"): Tile(1, 32, 4),
    ("tf32", 32, 32, "plain"): Tile(1, 16, 4),
    ("tf32", 16, 16, "finish"): Tile(2, 32, 2),
    ("tf32", 16, 32, "finish"): Tile(1, 32, 4),
    ("tf32", 16, 16, "finish chunks"): Tile(2, 32, 2),
    ("float32", 16, 16, "plain"): Tile(2, 32, 2),
    ("float32", 16, 16, "plain chunks"): Tile(1, 32, 2),
    ("float32", 16, 32, "plain"): Tile(1, 32, 4),
    ("float32", 32, 16, "plain"): Tile(1, 32, 4),
    ("float32", 32, 32, "plain"): Tile(1, 16, 4),
    ("float32", 16, 16, "finish"): Tile(1, 32, 2),
    ("float32", 16, 32, "finish"): Tile(1, 32, 4),
    ("float32", 16, 16, "finish chunks"): Tile(2, 32, 2),
}


def candidates(key: tuple) -> list[Tile]:
    """The tiles that a key of TILES may have, twelve at most."""
    kind, block_c, block_k, _ = key
    if kind == "float32":
        rows, lanes = (1, 2), ((16, 2), (16, 4), (32, 2), (32, 4))
    elif kind == "tf32":
        rows, lanes = (1, 2), ((16, 4), (32, 2), (32, 4), (64, 4))
    elif block_c == block_k == UNIT:
        rows, lanes = (1, 2, 4), ((16, 1), (32, 1), (32, 2), (64, 2))
    else:
        rows, lanes = (1, 2), ((32, 2), (32, 4), (64, 4), (128, 4), (128, 8))
    return [Tile(r, block_m, num_warps) for r in rows for block_m, num_warps in lanes]


def conv_tile(dtype: torch.dtype, precision: str, cut: Spans, finish: bool, wide: bool = True) -> Tile:
    """Tile of a convolution; rows are the most it takes at a time. wide: loads are 16 bytes, without which
    every element has an address of its own, in registers."""
    if not wide:
        small = cut.block_c == cut.block_k == UNIT
        two = (small and dtype is torch.float32) or (finish and cut.chunks > 1)
        return Tile(1, 16, 2 if two else 4)
    load = "finish" if finish else "plain"
    if cut.block_c == cut.block_k == UNIT and cut.chunks > 1:
        load += " chunks"
    return TILES[operands(dtype, precision), cut.block_c, cut.block_k, load]


class Conv:
    """A convolution about to run: its packed weight and cut, and what it reads on load."""

    def __init__(self, x, weight, groups, transposed, act=None, finish_y=None, finish=None):
        group_k, group_c = weight.shape[0] // groups, weight.shape[1]
        if transposed:
            group_k, group_c = group_c, group_k
        self.cut = spans(x.dtype, group_c, group_k, finish is not None)
        self.blocks = triton.cdiv(groups, self.cut.merge) * self.cut.parts
        self.packed = packed_weight(weight, groups, self.cut, transposed)
        self.x, self.act, self.finish_y, self.finish = x, act, finish_y, finish
        strides = (*pixel_strides(x), *pixel_strides(finish_y))
        wide = wide_loads(x.dtype, group_c * groups, group_k * groups, *strides)
        self.precision = dot_precision(x)
        self.tile = conv_tile(x.dtype, self.precision, self.cut, finish is not None, wide)

    def rows(self, y, walk: Walk) -> int:
        """Output rows to a band."""
        most = 1 if walk.taps == 1 else self.tile.rows
        return band_rows(most, walk.step, walk.dilation, y.shape[2])

    def tiles(self, y, walk: Walk) -> int:
        """Tiles of lanes that an output takes."""
        n, _, height, width = y.shape
        return triton.cdiv(n * triton.cdiv(height, self.rows(y, walk)) * width, self.tile.block_m)

    def run(self, y, walks, affine=None, residual=None, mask=None, partial=None, relu=False, stats=False):
        """Writes y, and what it leaves of its tiles to `partial`."""
        x, cut, tile, (vertical, horizontal) = self.x, self.cut, self.tile, walks
        (n, c, height, width), (_, k, out_height, out_width) = x.shape, y.shape
        rows, tiles = self.rows(y, vertical), self.tiles(y, vertical)
        x_strides, finish_strides = pixel_strides(x), pixel_strides(self.finish_y)
        y_strides, residual_strides = pixel_strides(y), pixel_strides(residual)
        verbs.launch(
            grouped_conv_fwd_kernel, (tiles * self.blocks,),
            x, self.finish_y, self.act, self.finish, self.packed, y, affine, residual, mask, partial,
            tiles, self.blocks, n, height, width, c, out_height, out_width, k, triton.cdiv(out_height, rows),
            *x_strides, *finish_strides, *y_strides, *residual_strides,
            vertical.step, horizontal.step, vertical.origin, horizontal.origin,
            vertical.dilation, horizontal.dilation, vertical.first, horizontal.first,
            vertical.increment, horizontal.increment,
            RELU=relu, STATS=stats, TAPS_H=vertical.taps, TAPS_W=horizontal.taps, ROWS=rows,
            ALIGN_X=alignment(c, *x_strides, *finish_strides),
            ALIGN_Y=alignment(k, *y_strides, *residual_strides),
            PRECISION=self.precision, **conv_meta(cut, tile),
        )  # fmt: skip


def conv_meta(cut: Spans, tile: Tile) -> dict:
    """What a launch has of its cut and its tile."""
    return {
        "SPAN_C": cut.span_c, "SPAN_K": cut.span_k, "CHUNKS": cut.chunks, "PARTS": cut.parts,
        "BLOCK_M": tile.block_m, "BLOCK_C": cut.block_c, "BLOCK_K": cut.block_k,
        "num_warps": tile.num_warps, "num_stages": 1,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------ the ops


def _forward(op, y, x, weight, stride, padding, dilation, groups, act, affine, residual, relu, want_stats):
    """(mean, var) of what it writes to y, if they are wanted."""
    c, k = x.shape[1], weight.shape[0]
    size = conv_output_size(x, weight, stride, padding, dilation)
    check(op, "weight", weight, x.dtype, (k, c // groups, 3, 3))
    check_output(op, "y", y, x.dtype, size)
    act, affine = coefficients(op, "act", act, 2, c), coefficients(op, "affine", affine, 2, k)
    residual = activation(op, "residual", residual, x.dtype, size)
    walks = [Walk(s, -p, d) for s, p, d in zip(stride, padding, dilation)]
    partial, tiles = None, 0
    if y.numel() > 0:
        conv = Conv(channels_adjacent(x), weight, groups, False, act)
        tiles = conv.tiles(y, walks[0])
    if want_stats:
        partial = statistics_scratch(x, tiles, k)
    if y.numel() > 0:
        conv.run(y, walks, affine, residual, None, partial, relu, want_stats)
    return merge_statistics(partial, tiles, k) if want_stats else None


def grouped_conv_fwd(x, weight, stride, padding, dilation, groups, act, affine, residual, relu):
    """y, as `gconv.grouped_conv.grouped_conv_fwd_ref`."""
    y = empty_channels_last(x, conv_output_size(x, weight, stride, padding, dilation))
    conf = (stride, padding, dilation, groups)
    _forward("grouped_conv_fwd", y, x, weight, *conf, act, affine, residual, relu, False)
    return y


def grouped_conv_fwd_into(
    x, weight, stride, padding, dilation, groups, act, affine, residual, relu, want_stats, y
):
    """(mean, var), as `gconv.grouped_conv.grouped_conv_fwd_into_ref`; y is any view whose channels lie side
    by side."""
    args = (x, weight, stride, padding, dilation, groups, act, affine, residual, relu, want_stats)
    if want_stats and (affine is not None or residual is not None or relu):
        raise RuntimeError("grouped_conv_fwd_into: want_stats: want no affine, residual or relu with it")
    found = _forward("grouped_conv_fwd_into", y, *args)
    return found or (x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32))


def grouped_conv_fwd_stats(x, weight, stride, padding, dilation, groups, act):
    """(y, mean, var), as `gconv.grouped_conv.grouped_conv_fwd_stats_ref`."""
    y = empty_channels_last(x, conv_output_size(x, weight, stride, padding, dilation))
    conf = (stride, padding, dilation, groups)
    return y, *_forward("grouped_conv_fwd_stats", y, x, weight, *conf, act, None, None, False, True)


def grouped_conv_bwd_input(dy, weight, input_size, stride, padding, dilation, groups, y, finish, x, act):
    """(dx, sums), as `gconv.grouped_conv.grouped_conv_bwd_input_ref`: at stride 2 one convolution of dy for
    each parity of rows and columns."""
    op = "grouped_conv_bwd_input"
    c, k = input_size[1], weight.shape[0]
    check(op, "weight", weight, dy.dtype, (k, c // groups, 3, 3))
    dx = empty_channels_last(dy, input_size)
    check(op, "dy", dy, dy.dtype, conv_output_size(dx, weight, stride, padding, dilation))
    y = activation(op, "y", None if finish is None else y, dy.dtype, dy.shape)
    x = activation(op, "x", None if act is None else x, dy.dtype, input_size)
    act, finish = coefficients(op, "act", act, 4, c), coefficients(op, "finish", finish, 6, k)

    convolutions = []
    if dx.numel() > 0:
        conv = Conv(channels_adjacent(dy), weight, groups, True, None, y, finish)
        for p, vertical in enumerate(backward_walks(stride[0], padding[0], dilation[0])):
            for q, horizontal in enumerate(backward_walks(stride[1], padding[1], dilation[1])):
                parity = (..., slice(p, None, stride[0]), slice(q, None, stride[1]))
                if vertical.taps == 0 or horizontal.taps == 0:
                    dx[parity].zero_()
                elif dx[parity].numel() > 0:
                    convolutions.append((parity, (vertical, horizontal)))
    tiles = [conv.tiles(dx[parity], vertical) for parity, (vertical, _) in convolutions]
    if act is None:
        for parity, walks in convolutions:
            conv.run(dx[parity], walks)
        return dx, dx.new_empty(0, dtype=torch.float32)
    partial = dx.new_empty((sum(tiles), 2, c), dtype=torch.float32)
    for (parity, walks), rows in zip(convolutions, partial.split(tiles)):
        conv.run(dx[parity], walks, residual=x[parity], mask=act, partial=rows)
    sums = dx.new_empty((2, c), dtype=torch.float32)
    merge_sums(partial, sums)
    return dx, sums


def grouped_conv_bwd(
    dy, x, weight, stride, padding, dilation, groups, y, finish, act, want_dx, want_dweight, channels_last
):
    """(dx, dweight, sums), as `gconv.grouped_conv.grouped_conv_bwd_ref`."""
    conf = (stride, padding, dilation, groups)
    dy, x = channels_adjacent(dy), channels_adjacent(x)  # copies once, if at all
    y = None if finish is None else channels_adjacent(y)
    dx = dweight = x.new_empty(0)
    sums = x.new_empty(0, dtype=torch.float32)
    if want_dx:
        masked_by = (None, None) if act is None else (x, act)
        dx, sums = grouped_conv_bwd_input(dy, weight, x.shape, *conf, y, finish, *masked_by)
    if want_dweight:
        prologue = None if act is None else act[:2]
        gradient = (dy, x, weight.shape, *conf, y, finish, prologue)
        dweight = grouped_conv_bwd_weight(*gradient, channels_last)
    return dx, dweight, sums


# ------------------------------------------------------------------------------------------ ahead of time


def configurations() -> list:
    """(kernel, signature, constexprs, options) of every tile and dtype that the launchers may pick, with the
    prologues and epilogues that need most registers."""
    result = wgrad_configurations()

    def add(kernel, dtype, options, tensors, vectors, **constants):
        constants |= {name: value for name, value in options.items() if name.isupper()}
        types = dict.fromkeys(tensors, POINTERS[dtype]) | dict.fromkeys(vectors, "*fp32")
        types |= dict.fromkeys(kernel.do_not_specialize, "i32")
        warps = {name: value for name, value in options.items() if not name.isupper()}
        result.append((kernel, *signature(kernel, constants, **types), warps))

    three = {"TAPS_H": 3, "TAPS_W": 3}
    for (dtype, cut, precision), wide in itertools.product(compiled_cuts(False), (True, False)):
        tile = conv_tile(dtype, precision, cut, False, wide)
        meta = {
            "ROWS": tile.rows,
            "PRECISION": precision,
            **compiled_alignment(dtype, wide),
            **conv_meta(cut, tile),
        }
        tensors, vectors = ("x", "weight", "y"), ("act", "partial")
        add(grouped_conv_fwd_kernel, dtype, meta | three, tensors, vectors, RELU=False, STATS=True)
        if cut.block_k == UNIT:
            tensors, vectors = (*tensors, "residual"), ("affine",)
            add(grouped_conv_fwd_kernel, dtype, meta | three, tensors, vectors, RELU=True, STATS=False)
        meta = {"BLOCK_C": cut.block_c, "BLOCK_K": cut.block_k, "PACK_BLOCK": PACK_BLOCK, "num_warps": 4}
        if wide:
            add(pack_weight_kernel, dtype, meta, ("weight", "packed"), (), TRANSPOSED=cut.block_c > UNIT)
    for (dtype, cut, precision), wide in itertools.product(compiled_cuts(True), (True, False)):
        tile = conv_tile(dtype, precision, cut, True, wide)
        meta = {
            "ROWS": tile.rows,
            "PRECISION": precision,
            **compiled_alignment(dtype, wide),
            **conv_meta(cut, tile),
        }
        tensors, vectors = ("x", "weight", "y", "finish_y", "residual"), ("finish", "mask", "partial")
        add(grouped_conv_fwd_kernel, dtype, meta | three, tensors, vectors, RELU=False, STATS=False)
        if cut.block_k == UNIT:
            meta |= {"ROWS": 1, "TAPS_H": 2, "TAPS_W": 1}
            add(grouped_conv_fwd_kernel, dtype, meta, tensors, vectors, RELU=False, STATS=False)
    return result
