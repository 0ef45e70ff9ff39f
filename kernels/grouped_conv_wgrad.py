"""The weight gradient of a grouped 3x3 convolution in Triton, in two stages: partial sums by a split of the
pixels, then their sum in a fixed order. Spans, lanes and tiles are those of
gconv.kernels.grouped_conv_tiles."""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from gconv.kernels import grouped_conv_tiles as tiling
from gconv.kernels import verbs
from gconv.kernels.grouped_conv_tiles import UNIT, Spans, band_lanes, image_offset, replaced, span_channels
from gconv.kernels.verbs import activated, finish_vectors, finished

from gconv.grouped_conv import conv_output_size


# computes: partial[split] = sum over the split's pixels of act(x) (x) finish(dy), of the groups' own channels
# grid:     (splits of the tiles of lanes x rows of taps x tiles of input x tiles of output channels)
# tile:     TAPS_H x 3 x [BLOCK_C input, BLOCK_K output channels], over ROWS x BLOCK_M output pixels at a time
# bytes:    x once from memory ((ROWS + 2)/ROWS times from L2, each three times from L1), dy once
# accum.:   float32
@triton.jit(
    do_not_specialize=[
        "tiles", "tiles_per_split", "blocks", "N", "H", "W", "C", "OH", "OW", "K", "BANDS",
        "dy_n", "dy_h", "dy_w", "finish_n", "finish_h", "finish_w", "x_n", "x_h", "x_w",
        "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w",
        "numel", "group_c", "group_k", "partial_k", "partial_c", "partial_tap",
    ]
)  # fmt: skip
def grouped_conv_bwd_weight_kernel(
    dy, finish_y, finish, x, act, partial,
    tiles, tiles_per_split, blocks, N, H, W, C, OH, OW, K, BANDS,
    dy_n, dy_h, dy_w, finish_n, finish_h, finish_w, x_n, x_h, x_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    numel, group_c, group_k, partial_k, partial_c, partial_tap,
    TAPS_H: tl.constexpr, SPAN_C: tl.constexpr, SPAN_K: tl.constexpr,
    CHUNKS: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN_X: tl.constexpr, ALIGN_Y: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    split, block = pid // blocks, pid % blocks
    part, block = block % PARTS, block // PARTS
    chunk, block = block % CHUNKS, block // CHUNKS
    kh_first, span = block % (3 // TAPS_H), block // (3 // TAPS_H)
    c, c_within = span_channels(span, chunk, C, SPAN_C, BLOCK_C, ALIGN_X)
    k, k_within = span_channels(span, part, K, SPAN_K, BLOCK_K, ALIGN_Y)
    if act is not None:
        a = tl.load(act + c, mask=c_within, other=0.0)[None, :]
        b = tl.load(act + C + c, mask=c_within, other=0.0)[None, :]

    acc = (tl.zeros([BLOCK_C, BLOCK_K], tl.float32),) * (TAPS_H * 3)
    begin = split * tiles_per_split
    for tile in range(begin, tl.minimum(begin + tiles_per_split, tiles)):
        n, band, column, known = band_lanes(tile, N, BANDS, OW, BLOCK_M)
        # Loaded anew for each tile: held in registers all along they would leave too few.
        if finish is not None:
            A, B, offset, mean, f_a, f_b = finish_vectors(finish, k[None, :], K, k_within[None, :])
        gradients = ()
        for r in tl.static_range(ROWS):
            h_out = band * ROWS + r
            valid = (known & (h_out < OH))[:, None] & k_within[None, :]
            at = image_offset(n, h_out, column, dy_n, dy_h, dy_w, ALIGN_Y) + k[None, :]
            g = tl.load(dy + at, mask=valid, other=0.0)
            if finish is not None:
                at = image_offset(n, h_out, column, finish_n, finish_h, finish_w, ALIGN_Y) + k[None, :]
                other = tl.load(finish_y + at, mask=valid, other=0.0)
                g = finished(g, other, A, B, offset, mean, f_a, f_b)
                g = tl.where(valid, g, 0.0).to(dy.dtype.element_ty)
            gradients += (g,)
        for kw in tl.static_range(3):
            w_in = column * stride_w - pad_w + kw * dilation_w
            w_known = known & (w_in >= 0) & (w_in < W)
            for i in tl.static_range(ROWS + TAPS_H - 1):
                h_in = band * (ROWS * stride_h) - pad_h + (kh_first + i) * dilation_h
                valid = (w_known & (h_in >= 0) & (h_in < H))[:, None] & c_within[None, :]
                at = image_offset(n, h_in, w_in, x_n, x_h, x_w, ALIGN_X) + c[None, :]
                v = tl.load(x + at, mask=valid, other=0.0)
                # Outside the image there is 0, not what the prologue makes of it.
                if act is not None:
                    v = tl.where(valid, activated(v, a, b), 0.0).to(v.dtype)
                v = tl.trans(v)
                for kh in tl.static_range(TAPS_H):
                    if i - kh >= 0 and i - kh < ROWS:
                        term = tl.dot(v, gradients[i - kh], acc[kh * 3 + kw], input_precision=PRECISION)
                        acc = replaced(acc, kh * 3 + kw, term)

    c_of_span = chunk * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    k_of_span = part * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    own = (c_of_span // group_c == k_of_span // group_k) & c_within[:, None] & k_within[None, :]
    at = tl.cast(split, tl.int64) * numel + k[None, :] * partial_k + c_of_span % group_c * partial_c
    for kh in tl.static_range(TAPS_H):
        for kw in tl.static_range(3):
            tap = (kh_first + kh) * 3 + kw
            tl.store(partial + at + tap * partial_tap, acc[kh * 3 + kw], mask=own)


class Tile(NamedTuple):
    """rows: the most it takes at a time; programs: as many the pixels are split for, to fill a large GPU."""

    rows: int
    taps_h: int
    block_m: int
    block_c: int
    block_k: int
    num_warps: int
    programs: int


# By the operands and the channels of a span in and out, rounded up to 16 or 32, or 64 for both. More warps
# than one would compute the same 16x16 results of the matrix unit. Of wider ones one row of taps at a time:
# three would not leave registers enough. `python -m gconv.bench tune` prints this table.
TILES = {
    ("16-bit", 16, 16): Tile(4, 3, 16, 16, 16, 1, 4096),
    ("16-bit", 16, 32): Tile(1, 1, 32, 16, 32, 1, 2048),
    ("16-bit", 32, 16): Tile(1, 1, 32, 32, 16, 2, 2048),
    ("16-bit", 32, 32): Tile(1, 1, 32, 32, 32, 2, 2048),
    ("16-bit", 64, 64): Tile(1, 1, 32, 64, 64, 4, 1024),
    ("tf32", 16, 16): Tile(1, 3, 16, 16, 16, 2, 2048),
    ("tf32", 16, 32): Tile(1, 1, 16, 16, 32, 4, 1024),
    ("tf32", 32, 16): Tile(1, 1, 16, 32, 16, 4, 1024),
    ("tf32", 32, 32): Tile(1, 1, 16, 32, 32, 4, 1024),
    ("tf32", 64, 64): Tile(1, 1, 16, 32, 32, 4, 1024),
    ("float32", 16, 16): Tile(1, 3, 16, 16, 16, 2, 2048),
    ("float32", 16, 32): Tile(1, 1, 16, 16, 32, 4, 1024),
    ("float32", 32, 16): Tile(1, 1, 16, 32, 16, 4, 1024),
    ("float32", 32, 32): Tile(1, 1, 16, 32, 32, 4, 1024),
    ("float32", 64, 64): Tile(1, 1, 16, 32, 32, 4, 1024),
}


def candidates(key: tuple) -> list[Tile]:
    """The tiles that a key of TILES may have, twelve at most."""
    operands, width_c, width_k = key
    matrix_unit, tiles = operands == "16-bit", []
    if width_c == width_k == UNIT:
        for rows in (1, 2, 4) if matrix_unit else (1, 2):
            for block_m, num_warps in ((16, 1), (32, 1)) if matrix_unit else ((16, 1), (16, 2), (32, 2)):
                tiles += [Tile(rows, 3, block_m, UNIT, UNIT, num_warps, count) for count in (2048, 4096)]
        return tiles
    widest = (32, 64) if matrix_unit and width_c == 64 else (32,)
    for most in widest:
        c, k = min(width_c, most), min(width_k, most)
        lanes = ((32, c // UNIT), (32, 4), (64, 4)) if matrix_unit else ((16, 2), (16, 4), (32, 4))
        for block_m, num_warps in dict.fromkeys(lanes):
            tiles += [Tile(1, 1, block_m, c, k, num_warps, count) for count in (1024, 2048)]
    return tiles


def wgrad_tile(dtype: torch.dtype, precision: str, cut: Spans, wide: bool = True) -> Tile:
    """Tile of a weight gradient; rows are the most it takes at a time. wide: loads are 16 bytes."""
    if not wide:
        tile = wgrad_tile(dtype, precision, cut)
        block_c, block_k = min(tile.block_c, 32), min(tile.block_k, 32)
        return tile._replace(rows=1, block_m=16, block_c=block_c, block_k=block_k, num_warps=4)
    if cut.block_c == UNIT and cut.block_k == UNIT:
        width_c = width_k = UNIT
    elif cut.span_c > 32 and cut.span_k > 32:
        width_c = width_k = 64
    else:
        width_c, width_k = (max(UNIT, min(32, triton.next_power_of_2(s))) for s in (cut.span_c, cut.span_k))
    return TILES[verbs.operands(dtype, precision), width_c, width_k]


def wgrad_meta(cut: Spans, tile: Tile) -> dict:
    """What a launch has of its cut and its tile."""
    return {
        "TAPS_H": tile.taps_h, "SPAN_C": cut.span_c, "SPAN_K": cut.span_k,
        "CHUNKS": triton.cdiv(cut.span_c, tile.block_c), "PARTS": triton.cdiv(cut.span_k, tile.block_k),
        "BLOCK_M": tile.block_m, "BLOCK_C": tile.block_c, "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps, "num_stages": 1,
    }  # fmt: skip


def grouped_conv_bwd_weight(
    dy, x, weight_size, stride, padding, dilation, groups, y, finish, act, channels_last=False
):
    """dweight, as `gconv.grouped_conv.grouped_conv_bwd_weight_ref`."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    dweight = torch.empty(tuple(weight_size), dtype=x.dtype, device=x.device, memory_format=memory_format)
    op, size = "grouped_conv_bwd_weight", conv_output_size(x, dweight, stride, padding, dilation)
    (n, c, h, w), (_, k, oh, ow) = x.shape, size
    verbs.check(op, "weight_size", dweight, x.dtype, (k, c // groups, 3, 3))
    x, dy = verbs.channels_adjacent(x), tiling.activation(op, "dy", dy, x.dtype, size)
    y = tiling.activation(op, "y", None if finish is None else y, x.dtype, size)
    act, finish = tiling.coefficients(op, "act", act, 2, c), tiling.coefficients(op, "finish", finish, 6, k)
    group_k, group_c = k // groups, c // groups
    cut = tiling.spans(x.dtype, group_c, group_k)
    loaded = [s for t in (x, dy, y) for s in verbs.pixel_strides(t)]
    precision = verbs.dot_precision(x)
    tile = wgrad_tile(x.dtype, precision, cut, verbs.wide_loads(x.dtype, c, k, *loaded))
    verbs.dot_tile(tile.block_c, tile.block_k, tile.block_m)
    rows = tiling.band_rows(1 if tile.taps_h == 1 else tile.rows, stride[0], dilation[0], oh)
    bands = triton.cdiv(oh, rows)
    tiles = triton.cdiv(n * bands * ow, tile.block_m)
    meta = wgrad_meta(cut, tile)
    blocks = triton.cdiv(groups, cut.merge) * (3 // tile.taps_h) * meta["CHUNKS"] * meta["PARTS"]
    tiles_per_split = triton.cdiv(tiles, max(1, tile.programs // blocks))
    splits = triton.cdiv(tiles, max(1, tiles_per_split))
    partial = torch.empty((splits, dweight.numel()), dtype=torch.float32, device=x.device)
    # A partial result is laid out as dweight is.
    strides = (9 * group_c, 1, group_c) if channels_last else (9 * group_c, 9, 1)
    dy_strides, finish_strides, x_strides = (verbs.pixel_strides(t) for t in (dy, y, x))
    if splits > 0:
        verbs.launch(
            grouped_conv_bwd_weight_kernel, (splits * blocks,),
            dy, y, finish, x, act, partial,
            tiles, tiles_per_split, blocks, n, h, w, c, oh, ow, k, bands,
            *dy_strides, *finish_strides, *x_strides, *stride, *padding, *dilation,
            dweight.numel(), group_c, group_k, *strides,
            ROWS=rows,
            ALIGN_X=verbs.alignment(c, *x_strides), ALIGN_Y=verbs.alignment(k, *dy_strides, *finish_strides),
            PRECISION=precision, **meta,
        )  # fmt: skip
    verbs.merge_sums(partial, dweight, wide=False)
    return dweight


def wgrad_configurations() -> list:
    """(kernel, signature, constexprs, options) of every tile and dtype that the launcher may pick."""
    result = []
    kernel = grouped_conv_bwd_weight_kernel
    for (dtype, cut, precision), wide in itertools.product(tiling.compiled_cuts(False), (True, False)):
        tile = wgrad_tile(dtype, precision, cut, wide)
        constants = {"PRECISION": precision, **wgrad_meta(cut, tile)}
        constants |= tiling.compiled_alignment(dtype, wide)
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        types = dict.fromkeys(("dy", "finish_y", "x"), verbs.POINTERS[dtype])
        types |= dict.fromkeys(("finish", "act", "partial"), "*fp32")
        types |= dict.fromkeys(kernel.do_not_specialize, "i32")
        result.append((kernel, *verbs.signature(kernel, {"ROWS": tile.rows, **constants}, **types), options))
    return result
