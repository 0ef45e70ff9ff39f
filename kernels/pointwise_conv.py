"""Pointwise convolution as an implicit matrix product over pixels: [pixels, C] x [C, K].

The launchers have the names and arguments of the ops in gconv/schemas.inc, and gconv.pointwise_conv has their
definitions (`<op>_ref`). Activations are read and written in place with any strides between pixels, so a
stride is a view of the pixels it takes and a slice of a wider buffer needs no copy.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from gconv.kernels import verbs
from gconv.kernels.verbs import (
    activated,
    finish_vectors,
    finished,
    grouped_tile,
    multiple,
    pixel_offset,
    relu,
    statistics,
    store_statistics,
    sum_rows,
)

from gconv.autograd import empty_channels_last

# ------------------------------------------------------------------------------------------ kernels


@triton.jit
def product(
    x, x_at, y, y_at, act, finish, weight, weight_at, weight_step, valid, n_within, terms,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum over k < terms of prologue(x)[m, k] * weight[k, n], float32 [BLOCK_M, BLOCK_N].

    x_at, y_at [BLOCK_M, 1] are the offsets of k = 0, weight_at [BLOCK_K, BLOCK_N] those of the first block.
    The prologue is act on load with act [.., terms], finish on load with finish [6, terms] and y, or nothing.
    Rows that are not valid hold anything.
    """
    columns = tl.arange(0, BLOCK_K)[None, :]
    rows = tl.arange(0, BLOCK_K)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, terms, BLOCK_K):
        k = first + columns
        within = k < terms
        h = tl.load(x + x_at + k, mask=valid & within, other=0.0)
        if act is not None:
            a = tl.load(act + k, mask=within, other=0.0)
            b = tl.load(act + terms + k, mask=within, other=0.0)
            h = activated(h, a, b)
        if finish is not None:
            A, B, C, mean, a, b = finish_vectors(finish, k, terms, within)
            h = finished(h, tl.load(y + y_at + k, mask=valid & within, other=0.0), A, B, C, mean, a, b)
        w = tl.load(
            weight + weight_at + first * weight_step, mask=(first + rows < terms) & n_within, other=0.0
        )
        acc = tl.dot(h, w, acc, input_precision=PRECISION)
    return acc


# computes: y = conv(act(x), weight), then one of: c*y + d, + residual, ReLU | statistics of y as stored
# grid:     (tiles of pixels x tiles of output channels, eight rows of tiles at a time)
# tile:     [BLOCK_M pixels, BLOCK_N output channels], BLOCK_K input channels at a time
# bytes:    M*C + K*C read, M*K written (M*K read with a residual): x comes from memory once, then from L2
# accum.:   float32; statistics from registers, two passes about the tile's own mean
@triton.jit(
    do_not_specialize=[
        "M", "C", "K", "OH", "OW", "x_n", "x_h", "x_w", "residual_n", "residual_h", "residual_w",
        "y_n", "y_h", "y_w",
    ]
)  # fmt: skip
def pointwise_conv_fwd_kernel(
    x, weight, act, affine, residual, y, partial, M, C, K, OH, OW,
    x_n, x_h, x_w, residual_n, residual_h, residual_w, y_n, y_h, y_w,
    RELU: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    C = multiple(C, ALIGN)
    K = multiple(K, ALIGN)
    tiles = tl.cdiv(M, BLOCK_M)
    tile, column = grouped_tile(tl.program_id(0), tiles, tl.cdiv(K, BLOCK_N), GROUP)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = (m < M)[:, None]
    n_within = (n < K)[None, :]

    x_at = pixel_offset(m, OH, OW, multiple(x_n, ALIGN), multiple(x_h, ALIGN), multiple(x_w, ALIGN))
    weight_at = n[None, :] * C + tl.arange(0, BLOCK_K)[:, None]
    acc = product(
        x, x_at[:, None], None, None, act, None, weight, weight_at, 1, valid, n_within, C,
        PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    mask = valid & n_within
    if affine is not None:
        scale = tl.load(affine + n, mask=n < K, other=0.0)[None, :]
        shift = tl.load(affine + K + n, mask=n < K, other=0.0)[None, :]
        acc = scale * acc + shift
    if residual is not None:
        at = pixel_offset(
            m, OH, OW, multiple(residual_n, ALIGN), multiple(residual_h, ALIGN), multiple(residual_w, ALIGN)
        )
        acc += tl.load(residual + at[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
    if RELU:
        acc = relu(acc)
    out = acc.to(y.dtype.element_ty)
    y_at = pixel_offset(m, OH, OW, multiple(y_n, ALIGN), multiple(y_h, ALIGN), multiple(y_w, ALIGN))
    tl.store(y + y_at[:, None] + n[None, :], out, mask=mask)
    if partial is not None:
        count, mean, m2 = statistics(out.to(tl.float32), valid)
        store_statistics(partial, tile, tiles, K, n, n < K, count, mean, m2)


# computes: g = conv_transpose(finish(dy), weight); with act: masked by [not a*x + b <= 0] and sums of it
#           dx = g [+ residual], 0 (or the residual) at pixels a stride leaves out; or, with ADD, dx += a*g
# grid:     (tiles of pixels x tiles of input channels, eight rows of tiles at a time)
# tile:     [BLOCK_M pixels, BLOCK_N input channels], BLOCK_K output channels at a time
# bytes:    M*K + K*C read (2*M*K with finish), M*C read with act, with a residual and with ADD, M*C written
# accum.:   float32; sums one row per tile
@triton.jit(
    do_not_specialize=[
        "M", "C", "K", "H", "W", "OH", "OW", "dy_n", "dy_h", "dy_w", "y_n", "y_h", "y_w", "x_n", "x_h", "x_w",
        "residual_n", "residual_h", "residual_w", "dx_n", "dx_h", "dx_w",
    ]
)  # fmt: skip
def pointwise_conv_bwd_input_kernel(
    dy, weight, y, finish, x, act, residual, dx, partial, M, C, K, H, W, OH, OW,
    dy_n, dy_h, dy_w, y_n, y_h, y_w, x_n, x_h, x_w, residual_n, residual_h, residual_w, dx_n, dx_h, dx_w,
    ADD: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    C = multiple(C, ALIGN)
    K = multiple(K, ALIGN)
    tile, column = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(C, BLOCK_N), GROUP)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = (m < M)[:, None]
    n_within = (n < C)[None, :]

    dy_at = pixel_offset(m, OH, OW, multiple(dy_n, ALIGN), multiple(dy_h, ALIGN), multiple(dy_w, ALIGN))
    y_at = pixel_offset(m, OH, OW, multiple(y_n, ALIGN), multiple(y_h, ALIGN), multiple(y_w, ALIGN))
    weight_at = tl.arange(0, BLOCK_K)[:, None] * C + n[None, :]
    acc = product(
        dy, dy_at[:, None], y, y_at[:, None], None, finish, weight, weight_at, C, valid, n_within, K,
        PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    mask = valid & n_within
    dx_h = multiple(dx_h, ALIGN)
    dx_w = multiple(dx_w, ALIGN)
    into = dx + pixel_offset(m, OH, OW, multiple(dx_n, ALIGN), dx_h * STRIDE_H, dx_w * STRIDE_W)[:, None]
    into += n[None, :]
    if act is not None:
        a = tl.load(act + n, mask=n < C, other=0.0)[None, :]
        b = tl.load(act + C + n, mask=n < C, other=0.0)[None, :]
        mean = tl.load(act + 2 * C + n, mask=n < C, other=0.0)[None, :]
        rstd = tl.load(act + 3 * C + n, mask=n < C, other=0.0)
        x_at = pixel_offset(m, OH, OW, multiple(x_n, ALIGN), multiple(x_h, ALIGN), multiple(x_w, ALIGN))
        raw = tl.load(x + x_at[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
        # Rows past the last pixel hold what the finish makes of nothing: the sums must not see it.
        acc = tl.where((a * raw + b <= 0) | ~valid, 0.0, acc)
        row = partial + tile.to(tl.int64) * 2 * C + n
        tl.store(row, sum_rows(acc), mask=n < C)
        tl.store(row + C, sum_rows(acc * (raw - mean)) * rstd, mask=n < C)
        if ADD:
            acc = tl.load(into, mask=mask, other=0.0).to(tl.float32) + a * acc
    if residual is not None:
        residual_h = multiple(residual_h, ALIGN)
        residual_w = multiple(residual_w, ALIGN)
        residual_n = multiple(residual_n, ALIGN)
        other = pixel_offset(m, OH, OW, residual_n, residual_h * STRIDE_H, residual_w * STRIDE_W)
        added = residual + other[:, None] + n[None, :]
        acc += tl.load(added, mask=mask, other=0.0).to(tl.float32)
    tl.store(into, acc.to(dx.dtype.element_ty), mask=mask)

    if not ADD:
        for gap in tl.static_range(1, STRIDE_H * STRIDE_W):
            h = gap // STRIDE_W
            w = gap % STRIDE_W
            there = (m // OW % OH * STRIDE_H + h < H) & (m % OW * STRIDE_W + w < W)
            there = there[:, None] & mask
            rest = tl.zeros([BLOCK_M, BLOCK_N], dx.dtype.element_ty)
            if residual is not None:
                rest = tl.load(added + h * residual_h + w * residual_w, mask=there, other=0.0)
            tl.store(into + h * dx_h + w * dx_w, rest, mask=there)


# computes: partial[split] = sum over the pixels of a split of finish(dy) (x) act(x)
# grid:     (splits x tiles of output channels x tiles of input channels), those of a split side by side
# tile:     [BLOCK_M output channels, BLOCK_N input channels], BLOCK_K pixels at a time
# bytes:    M*(K + C) read (M*(2*K + C) with finish), 4*splits*K*C written
# accum.:   float32, pixels in order; the splits are summed afterwards
@triton.jit(
    do_not_specialize=[
        "M", "C", "K", "OH", "OW", "pixels", "dy_n", "dy_h", "dy_w", "y_n", "y_h", "y_w", "x_n", "x_h", "x_w",
    ]
)  # fmt: skip
def pointwise_conv_bwd_weight_kernel(
    dy, y, finish, x, act, partial, M, C, K, OH, OW, pixels,
    dy_n, dy_h, dy_w, y_n, y_h, y_w, x_n, x_h, x_w,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    C = multiple(C, ALIGN)
    K = multiple(K, ALIGN)
    dy_n, dy_h, dy_w = multiple(dy_n, ALIGN), multiple(dy_h, ALIGN), multiple(dy_w, ALIGN)
    y_n, y_h, y_w = multiple(y_n, ALIGN), multiple(y_h, ALIGN), multiple(y_w, ALIGN)
    x_n, x_h, x_w = multiple(x_n, ALIGN), multiple(x_h, ALIGN), multiple(x_w, ALIGN)
    columns = tl.cdiv(C, BLOCK_N)
    tiles = tl.cdiv(K, BLOCK_M) * columns
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    k = tile // columns * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    c = tile % columns * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    k_within = k < K
    c_within = c < C
    if act is not None:
        a = tl.load(act + c, mask=c_within, other=0.0)
        b = tl.load(act + C + c, mask=c_within, other=0.0)
    if finish is not None:
        f_scale, f_slope, f_offset, f_mean, f_a, f_b = finish_vectors(finish, k, K, k_within)

    first = split * pixels
    last = tl.minimum(first + pixels, M)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(first, last, BLOCK_K):
        m = begin + tl.arange(0, BLOCK_K)
        valid = (m < last)[:, None]
        dy_at = pixel_offset(m, OH, OW, dy_n, dy_h, dy_w)[:, None]
        g = tl.load(dy + dy_at + k, mask=valid & k_within, other=0.0)
        if finish is not None:
            y_at = pixel_offset(m, OH, OW, y_n, y_h, y_w)[:, None]
            v = tl.load(y + y_at + k, mask=valid & k_within, other=0.0)
            g = finished(g, v, f_scale, f_slope, f_offset, f_mean, f_a, f_b)
            g = tl.where(valid, g, 0.0).to(g.dtype)
        x_at = pixel_offset(m, OH, OW, x_n, x_h, x_w)[:, None]
        h = tl.load(x + x_at + c, mask=valid & c_within, other=0.0)
        if act is not None:
            h = activated(h, a, b)
        acc = tl.dot(tl.trans(g), h, acc, input_precision=PRECISION)
    rows = tl.trans(k)
    at = (split.to(tl.int64) * K + rows) * C + c
    tl.store(partial + at, acc.to(partial.dtype.element_ty), mask=(rows < K) & c_within)


# ------------------------------------------------------------------------------------------ tiles


class Tile(NamedTuple):
    """A tile of a matrix product and how it runs."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# By what the rows of the product are (pixels, or a weight's output channels), the operands, the product's
# size and whether an operand is finished on load, as a third in shared memory. wide: 64 operations per byte
# from L2; narrow: at most 64 columns, of which wider tiles would compute zeros; small: so few tiles that
# wider ones would leave multiprocessors idle. As TF32 half the columns, or epilogues would spill registers;
# in float32 the operands of FMAs share the registers with the accumulators. `python -m gconv.bench tune`
# prints this table.
TILES = {
    ("pixels", "16-bit", "wide", False): Tile(128, 128, 64, 8, 3),
    ("pixels", "16-bit", "wide", True): Tile(128, 128, 32, 8, 3),
    ("pixels", "16-bit", "narrow", False): Tile(128, 64, 64, 8, 3),
    ("pixels", "16-bit", "narrow", True): Tile(128, 64, 32, 8, 3),
    ("pixels", "16-bit", "small", False): Tile(64, 64, 64, 4, 3),
    ("pixels", "16-bit", "small", True): Tile(64, 64, 32, 4, 3),
    ("pixels", "tf32", "wide", False): Tile(128, 64, 32, 8, 3),
    ("pixels", "tf32", "wide", True): Tile(128, 64, 16, 8, 3),
    ("pixels", "tf32", "narrow", False): Tile(128, 64, 32, 8, 3),
    ("pixels", "tf32", "narrow", True): Tile(128, 64, 16, 8, 3),
    ("pixels", "tf32", "small", False): Tile(64, 64, 32, 4, 3),
    ("pixels", "tf32", "small", True): Tile(64, 64, 16, 4, 3),
    ("pixels", "float32", "wide", False): Tile(64, 64, 16, 4, 3),
    ("pixels", "float32", "wide", True): Tile(64, 64, 16, 4, 3),
    ("pixels", "float32", "narrow", False): Tile(64, 64, 16, 4, 3),
    ("pixels", "float32", "narrow", True): Tile(64, 64, 16, 4, 3),
    ("pixels", "float32", "small", False): Tile(64, 64, 16, 4, 3),
    ("pixels", "float32", "small", True): Tile(64, 64, 16, 4, 3),
    ("weight", "16-bit", "wide", False): Tile(128, 128, 64, 8, 3),
    ("weight", "16-bit", "wide", True): Tile(128, 128, 32, 8, 3),
    ("weight", "16-bit", "small", False): Tile(64, 64, 64, 4, 3),
    ("weight", "16-bit", "small", True): Tile(64, 64, 32, 4, 3),
    ("weight", "tf32", "wide", False): Tile(128, 64, 32, 8, 3),
    ("weight", "tf32", "wide", True): Tile(128, 64, 16, 8, 3),
    ("weight", "tf32", "small", False): Tile(64, 64, 32, 4, 3),
    ("weight", "tf32", "small", True): Tile(64, 64, 16, 4, 3),
    ("weight", "float32", "wide", False): Tile(64, 64, 16, 4, 3),
    ("weight", "float32", "wide", True): Tile(64, 64, 16, 4, 3),
    ("weight", "float32", "small", False): Tile(64, 64, 16, 4, 3),
    ("weight", "float32", "small", True): Tile(64, 64, 16, 4, 3),
}
# Where loads are not 16 bytes wide, by the size of an element.
UNALIGNED = {2: Tile(32, 32, 32, 4, 3), 4: Tile(32, 32, 16, 4, 2)}

# Blocks and warps to try, for operands of 16 bits: no more than 64 accumulators to a thread.
TRIED = {
    "wide": ((128, 128, 64, 8), (128, 128, 32, 8), (128, 256, 32, 16), (64, 128, 64, 8)),
    "narrow": ((128, 64, 64, 8), (128, 64, 32, 8), (256, 64, 32, 16), (64, 64, 32, 4)),
    "small": ((64, 64, 64, 4), (64, 64, 32, 4), (64, 32, 64, 4), (32, 64, 64, 4)),
}
TRIED_FLOAT32 = ((64, 64, 16, 4), (64, 64, 16, 8), (32, 64, 16, 4), (64, 32, 16, 4))
SHARED = 99 * 1024  # bytes of shared memory that every GPU since compute capability 8.0 has
GROUP = 8  # rows of tiles walked together
BUSY = 132  # multiprocessors of an H200; so many tiles at least, where there can be
SPLITS = 2 * BUSY  # programs of a weight gradient
SPLIT_PIXELS = 512  # fewer are not worth a partial result


def candidates(key: tuple) -> list[Tile]:
    """The tiles that a key of TILES may have, twelve at most: those whose operands fit into shared memory."""
    _, operands, size, finish = key
    if operands == "float32":
        tried, itemsize = TRIED_FLOAT32, 4
    elif operands == "tf32":
        tried = [(m, n, k // 2, warps) for m, n, k, warps in TRIED["narrow" if size == "wide" else size]]
        itemsize = 4
    else:
        tried, itemsize = TRIED[size], 2
    tiles = [Tile(*blocks, stages) for blocks in tried for stages in (2, 3, 4)]

    def bytes_of(tile: Tile) -> int:
        rows = tile.BLOCK_M * (2 if finish else 1)
        return (rows + tile.BLOCK_N) * tile.BLOCK_K * itemsize * tile.num_stages

    return [tile for tile in tiles if bytes_of(tile) <= SHARED]


def rows_tile(
    dtype: torch.dtype, precision: str, M: int, N: int, finish: bool = False, add: bool = False
) -> Tile:
    """The tile of a product with M pixels as rows and N channels as columns. What is added in place has two
    more tiles in registers, for which a wide one leaves no room."""
    if triton.cdiv(M, 128) * triton.cdiv(N, 128 if N > 64 else 64) < BUSY:
        size = "small"
    else:
        size = "narrow" if N <= 64 or add else "wide"
    return TILES["pixels", verbs.operands(dtype, precision), size, finish]


def weight_tile(dtype: torch.dtype, precision: str, K: int, C: int, finish: bool) -> Tile:
    """The tile of a weight gradient [K, C]."""
    size = "small" if min(K, C) <= 64 else "wide"
    return TILES["weight", verbs.operands(dtype, precision), size, finish]


def pixels_per_split(M: int, tiles: int, block: int) -> int:
    """Pixels that one program of a weight gradient sums over: a multiple of the block."""
    return triton.cdiv(max(triton.cdiv(M * tiles, SPLITS), SPLIT_PIXELS), block) * block


# ------------------------------------------------------------------------------------------ launchers


def _loadable(tile: Tile, dtype: torch.dtype, *sizes: int) -> Tile:
    """The tile, or one for what is loaded element by element."""
    return tile if verbs.wide_loads(dtype, *sizes) else UNALIGNED[dtype.itemsize]


def _meta(tile: Tile, precision: str, *sizes: int) -> dict:
    verbs.dot_tile(*tile[:3])
    return {**tile._asdict(), "ALIGN": verbs.alignment(*sizes), "PRECISION": precision}


def _dense(weight):
    """weight itself where it is [K, C] in memory, else a copy that is."""
    K, C = weight.shape[:2]
    dense = (K == 1 or weight.stride(0) == C) and (C == 1 or weight.stride(1) == 1)
    return weight if dense else weight.contiguous()


def _vectors(op: str, name: str, t, shape):
    """Per-channel coefficients, checked, one row after the other; None stays None."""
    if t is None:
        return None
    verbs.check(op, name, t, torch.float32, shape)
    return t.contiguous()


def _taken(x, stride):
    """The pixels of x that the convolution sees: of a stride's the first."""
    return x[:, :, :: stride[0], :: stride[1]]


def _forward(op: str, x, weight, stride, act, affine, residual, relu, stats: bool, y=None):
    """(y, mean, var), the statistics None unless wanted."""
    K, C = weight.shape[:2]
    verbs.check(op, "weight", weight, x.dtype, (K, x.shape[1], 1, 1))
    act, affine = _vectors(op, "act", act, (2, C)), _vectors(op, "affine", affine, (2, K))
    x, weight = _taken(verbs.channels_adjacent(x), stride), _dense(weight)
    N, _, OH, OW = x.shape
    if y is None:
        y = empty_channels_last(x, (N, K, OH, OW))
    else:
        verbs.check_output(op, "y", y, x.dtype, (N, K, OH, OW))
    if residual is not None:
        verbs.check(op, "residual", residual, x.dtype, y.shape)
        residual = verbs.channels_adjacent(residual)
    M = N * OH * OW
    precision = verbs.dot_precision(x)
    strides = [s for t in (x, residual, y) for s in verbs.pixel_strides(t)]
    tile = _loadable(rows_tile(x.dtype, precision, M, K), x.dtype, C, K, *strides)
    tiles = triton.cdiv(M, tile.BLOCK_M)
    partial = verbs.statistics_scratch(x, tiles, K) if stats else None
    grid = (tiles * triton.cdiv(K, tile.BLOCK_N),)
    args = (x, weight, act, affine, residual, y, partial, M, C, K, OH, OW, *strides)
    meta = _meta(tile, precision, C, K, *strides)
    verbs.launch(pointwise_conv_fwd_kernel, grid, *args, RELU=relu, GROUP=GROUP, **meta)
    return y, *(verbs.merge_statistics(partial, tiles, K) if stats else (None, None))


def pointwise_conv_fwd(x, weight, stride, act, affine, residual, relu):
    """y, as `gconv.pointwise_conv.pointwise_conv_fwd_ref`."""
    return _forward("pointwise_conv_fwd", x, weight, stride, act, affine, residual, relu, False)[0]


def pointwise_conv_fwd_into(x, weight, stride, act, affine, residual, relu, want_stats, y):
    """(mean, var), as `gconv.pointwise_conv.pointwise_conv_fwd_into_ref`."""
    op = "pointwise_conv_fwd_into"
    if want_stats and (affine is not None or residual is not None or relu):
        raise RuntimeError(f"{op}: want_stats: want none of affine, residual and relu with it")
    _, mean, var = _forward(op, x, weight, stride, act, affine, residual, relu, want_stats, y)
    if want_stats:
        return mean, var
    return x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)


def pointwise_conv_fwd_stats(x, weight, stride, act):
    """(y, mean, var), as `gconv.pointwise_conv.pointwise_conv_fwd_stats_ref`."""
    return _forward("pointwise_conv_fwd_stats", x, weight, stride, act, None, None, False, True)


class _Gradient:
    """What the two gradients of one call share: the output's gradient, checked, and the sizes."""

    def __init__(self, op: str, dy, x, weight, stride, y, finish, act, reads_x: bool):
        self.K, self.C = K, C = weight.shape[:2]
        self.H, self.W = H, W = x.shape[2:]
        self.stride = stride
        self.size = N, _, OH, OW = x.shape[0], K, (H - 1) // stride[0] + 1, (W - 1) // stride[1] + 1
        self.M = N * OH * OW
        self.precision = verbs.dot_precision(x)
        verbs.check(op, "weight", weight, x.dtype, (K, x.shape[1], 1, 1))
        verbs.check(op, "dy", dy, x.dtype, self.size)
        self.act, self.finish = _vectors(op, "act", act, (4, C)), _vectors(op, "finish", finish, (6, K))
        if (y is None) != (finish is None):
            missing, given = ("finish", "y") if finish is None else ("y", "finish")
            raise RuntimeError(f"{op}: {missing}: want finish and y together, got only {given}")
        self.dy, self.weight, self.y = verbs.channels_adjacent(dy), weight, y
        if y is not None:
            verbs.check(op, "y", y, x.dtype, self.size)
            self.y = verbs.channels_adjacent(y)
        self.x = _taken(verbs.channels_adjacent(x), stride) if reads_x else None

    def to_input(self, dx, residual=None, add: bool = False):
        """Writes dx; returns the sums, of shape [0] without act."""
        x = None if self.act is None else self.x
        M, C, K, (_, _, OH, OW) = self.M, self.C, self.K, self.size
        tensors = (self.dy, self.y, x, residual, dx)
        strides = [s for t in tensors for s in verbs.pixel_strides(t)]
        tile = rows_tile(dx.dtype, self.precision, M, C, self.finish is not None, add)
        tile = _loadable(tile, dx.dtype, C, K, *strides)
        tiles = triton.cdiv(M, tile.BLOCK_M)
        sums = dx.new_empty(0 if x is None else (2, C), dtype=torch.float32)
        partial = None if x is None else dx.new_empty((tiles, 2, C), dtype=torch.float32)
        args = (self.dy, _dense(self.weight), self.y, self.finish, x, self.act, residual, dx, partial)
        sizes = (M, C, K, self.H, self.W, OH, OW)
        meta = _meta(tile, self.precision, C, K, *strides) | {
            "STRIDE_H": self.stride[0],
            "STRIDE_W": self.stride[1],
        }
        grid = (tiles * triton.cdiv(C, tile.BLOCK_N),)
        verbs.launch(
            pointwise_conv_bwd_input_kernel, grid, *args, *sizes, *strides, ADD=add, GROUP=GROUP, **meta
        )
        if partial is not None:
            verbs.merge_sums(partial, sums)
        return sums

    def to_weight(self, channels_last: bool):
        x = self.x
        M, C, K, (_, _, OH, OW) = self.M, self.C, self.K, self.size
        layout = torch.channels_last if channels_last else torch.contiguous_format
        dweight = torch.empty((K, C, 1, 1), dtype=x.dtype, device=x.device, memory_format=layout)
        strides = [s for t in (self.dy, self.y, x) for s in verbs.pixel_strides(t)]
        tile = weight_tile(x.dtype, self.precision, K, C, self.finish is not None)
        tile = _loadable(tile, x.dtype, C, K, *strides)
        tiles = triton.cdiv(K, tile.BLOCK_M) * triton.cdiv(C, tile.BLOCK_N)
        pixels = pixels_per_split(M, tiles, tile.BLOCK_K)
        splits = triton.cdiv(M, pixels)
        partial = dweight if splits == 1 else x.new_empty((splits, K, C), dtype=torch.float32)
        args = (self.dy, self.y, self.finish, x, self.act, partial, M, C, K, OH, OW, pixels, *strides)
        grid, meta = (splits * tiles,), _meta(tile, self.precision, C, K, *strides)
        verbs.launch(pointwise_conv_bwd_weight_kernel, grid, *args, **meta)
        if splits != 1:
            verbs.merge_sums(partial, dweight, wide=False)
        return dweight


def pointwise_conv_bwd(dy, x, weight, stride, y, finish, act, residual, want_dx, want_dweight, channels_last):
    """(dx, dweight, sums), as `gconv.pointwise_conv.pointwise_conv_bwd_ref`."""
    op = "pointwise_conv_bwd"
    reads_x = act is not None or want_dweight
    gradient = _Gradient(op, dy, x, weight, stride, y, finish, act, reads_x)
    dx, dweight, sums = x.new_empty(0), x.new_empty(0), x.new_empty(0, dtype=torch.float32)
    if residual is not None:
        if act is not None:
            raise RuntimeError(f"{op}: residual: want none together with act")
        verbs.check(op, "residual", residual, x.dtype, x.shape)
        residual = verbs.channels_adjacent(residual)
    if want_dx:
        dx = empty_channels_last(x, x.shape)
        sums = gradient.to_input(dx, residual)
    if want_dweight:
        dweight = gradient.to_weight(channels_last)
    return dx, dweight, sums


def pointwise_conv_bwd_add(dy, x, weight, stride, y, finish, act, dx, want_dweight, channels_last):
    """(dweight, sums), as `gconv.pointwise_conv.pointwise_conv_bwd_add_ref`."""
    op = "pointwise_conv_bwd_add"
    gradient = _Gradient(op, dy, x, weight, stride, y, finish, act, True)
    verbs.check_output(op, "dx", dx, x.dtype, x.shape)
    sums = gradient.to_input(dx, add=True)
    dweight = gradient.to_weight(channels_last) if want_dweight else x.new_empty(0)
    return dweight, sums


# ------------------------------------------------------------------------------------------ ahead of time


def configurations() -> list:
    """(kernel, signature, constexprs, options) of every tile and dtype that the launchers may pick, with the
    prologues and epilogues that networks use, and of the merging kernels."""
    result = list(verbs.configurations())

    def add(kernel, dtype, tile, precision, tensors, floats, **constants):
        constants |= dict(zip(Tile._fields[:3], tile))
        align = 1 if tile in UNALIGNED.values() else 16 // dtype.itemsize
        constants |= {"ALIGN": align, "PRECISION": precision}
        constants |= {"GROUP": GROUP} if "GROUP" in kernel.arg_names else {}
        types = dict.fromkeys(tensors, verbs.POINTERS[dtype]) | dict.fromkeys(floats, "*fp32")
        integers = [name for name in kernel.do_not_specialize if name not in constants]
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        types |= dict.fromkeys(integers, "i32")
        result.append((kernel, *verbs.signature(kernel, constants, **types), options))

    precisions = (
        (torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"),
    )  # fmt: skip

    def ways(rows, sizes, finish):
        found = (
            (dtype, TILES[rows, verbs.operands(dtype, precision), size, finish], precision)
            for dtype, precision in precisions
            for size in sizes
        )
        unaligned = ((dtype, UNALIGNED[dtype.itemsize], precision) for dtype, precision in precisions)
        return dict.fromkeys((*found, *unaligned))

    for how in ways("pixels", ("wide", "narrow", "small"), False):
        for tensors, floats, relu_last in (
            ((), (), False), ((), ("act", "partial"), False), (("residual",), ("affine",), True),
        ):  # fmt: skip
            named = ("x", "weight", "y", *tensors)
            add(pointwise_conv_fwd_kernel, *how, named, floats, RELU=relu_last)
    for given in ((), ("y",)):
        vectors = ("finish",) if given else ()
        added_to = ways("pixels", ("narrow", "small"), bool(given))
        for how in ways("pixels", ("wide", "narrow", "small"), bool(given)):
            for tensors, floats, accumulate, stride in (
                ((), (), False, 1), (("residual",), (), False, 1), ((), (), False, 2),
                (("x",), ("act", "partial"), False, 1), (("x",), ("act", "partial"), True, 1),
            ):  # fmt: skip
                if accumulate and how not in added_to:
                    continue
                named, floats = ("dy", "weight", "dx", *given, *tensors), (*vectors, *floats)
                constants = {"ADD": accumulate, "STRIDE_H": stride, "STRIDE_W": stride}
                add(pointwise_conv_bwd_input_kernel, *how, named, floats, **constants)
        for how in ways("weight", ("wide", "small"), bool(given)):
            for floats in ((), ("act",)):
                named, floats = ("dy", "x", *given), ("partial", *vectors, *floats)
                add(pointwise_conv_bwd_weight_kernel, *how, named, floats)
    return result
