"""Batch normalisation on Triton: the launchers of the ops batch_norm_* of gconv.schemas.

What each computes is its reference in gconv.batch_norm; the kernels are in kernels/batch_norm_kernels.py.
Everything is cut by shapes and strides alone and merged in a fixed order: bit-identical from run to run.
"""

from typing import NamedTuple

import torch
import triton
from gconv.kernels import verbs
from gconv.kernels.batch_norm_kernels import (
    batch_norm_apply_kernel,
    batch_norm_bwd_apply_kernel,
    batch_norm_bwd_finish_kernel,
    batch_norm_bwd_reduce_kernel,
    batch_norm_fold_kernel,
    batch_norm_pool_bwd_kernel,
    batch_norm_pool_kernel,
    batch_norm_stats_kernel,
    batch_norm_update_running_kernel,
)
from gconv.kernels.verbs import (
    POINTERS,
    alignment,
    channels_adjacent,
    check,
    merge_statistics,
    merge_sums,
    pixel_strides,
    signature,
    statistics_scratch,
)

from gconv.autograd import empty_channels_last
from gconv.backend import DTYPES

CHANNEL_BLOCKS = (128, 64, 32, 16)  # of which `channel_block` chooses
SUMS_PROGRAMS = 512  # of a pass with sums: about four to a multiprocessor of the largest GPUs
MERGED_PARTS, MERGED_CHANNELS = 128, 16  # tile of the merge of the backward's sums
VECTOR = 256  # channels to a program where there is one value to a channel
RUNNING = 512  # channels to a step of the one program that moves running statistics

# ------------------------------------------------------------------------------------------ tiles and views


def channel_block(C: int) -> int:
    """Channels of a tile: as many as cover C with the fewest beyond it, but a line's worth."""
    if CHANNEL_BLOCKS[-1] >= C:
        return CHANNEL_BLOCKS[-1]
    return min(CHANNEL_BLOCKS[:-1], key=lambda block: (triton.cdiv(C, block) * block, -block))


class Tile(NamedTuple):
    """elements: a multiple of the widest block of channels."""

    elements: int
    num_warps: int


# By the kind of pass, the bytes of an element and whether loads are vectors: a pass without sums takes 4
# vectors to a thread, one with sums ("sums") 16 accumulators of each; those over squares of four pixels
# ("pool", "pool sums") count squares. Without vectors every element has an address of its own, in registers.
# `python -m gconv.bench tune` prints this table.
TILES = {
    ("pass", 2, True): Tile(4096, 4),
    ("pass", 2, False): Tile(1024, 4),
    ("pass", 4, True): Tile(2048, 4),
    ("pass", 4, False): Tile(512, 4),
    ("pool", 2, True): Tile(1024, 4),
    ("pool", 2, False): Tile(256, 4),
    ("pool", 4, True): Tile(512, 4),
    ("pool", 4, False): Tile(128, 4),
    ("sums", 2, True): Tile(4096, 8),
    ("sums", 2, False): Tile(1024, 8),
    ("sums", 4, True): Tile(4096, 8),
    ("sums", 4, False): Tile(1024, 8),
    ("pool sums", 2, True): Tile(2048, 8),
    ("pool sums", 2, False): Tile(512, 8),
    ("pool sums", 4, True): Tile(2048, 8),
    ("pool sums", 4, False): Tile(512, 8),
}


def candidates(key: tuple) -> list[Tile]:
    """The tiles that a key of TILES may have, twelve at most."""
    kind, _, vectors = key
    least = 128 if not vectors else 512 if kind.startswith("pool") else 1024
    return [Tile(least << i, num_warps) for i in range(4) for num_warps in (4, 8)]


def tile_of(kind: str, C: int, itemsize: int, align: int) -> dict:
    """The tile of a pass over C channels."""
    block, tile = channel_block(C), TILES[kind, itemsize, align > 1]
    return {"BLOCK_ROWS": tile.elements // block, "BLOCK_C": block, "num_warps": tile.num_warps}


def grid_of(rows: int, C: int, tile: dict) -> tuple[int, int]:
    return triton.cdiv(rows, tile["BLOCK_ROWS"]), triton.cdiv(C, tile["BLOCK_C"])


def slabs_of(rows: int, C: int, tile: dict) -> tuple[int, int]:
    """(rows to a slab, slabs): whole tiles."""
    tiles, blocks = grid_of(rows, C, tile)
    slab = max(triton.cdiv(tiles, max(SUMS_PROGRAMS // blocks, 1)), 1) * tile["BLOCK_ROWS"]
    return slab, max(triton.cdiv(rows, slab), 1)


def row_stride(t) -> int | None:
    """From each pixel of t [N, C, H, W] to the next, over ends of rows and images, or None where that
    varies."""
    step = span = None
    for dim in (3, 2, 0):
        if t.shape[dim] == 1:
            continue
        if step is None:
            step = span = t.stride(dim)
        elif t.stride(dim) != span:
            return None
        span *= t.shape[dim]
    return step or 0


def addressing(*tensors) -> tuple[list[int], dict]:
    """(three strides for each tensor, how the kernels may take them) of activations [N, C, H, W], None for
    one that is absent."""
    there = [t for t in tensors if t is not None]
    steps = [row_stride(t) for t in there]
    flat = None not in steps
    if flat:
        strides = [(0, 0, 0) if t is None else (0, 0, row_stride(t)) for t in tensors]
    else:
        strides = [pixel_strides(t) for t in tensors]
    numbers = [number for three in strides for number in three]
    align = alignment(there[0].shape[1], *numbers)
    return numbers, {"ALIGN": align if align == 8 else 1, "FLAT": flat}


# ------------------------------------------------------------------------------------------ arguments


def activation(op: str, name: str, x):
    """x [N, C, H, W], readable: a pixel's channels side by side."""
    if x.dim() != 4 or x.dtype not in DTYPES:
        dtype = str(x.dtype).removeprefix("torch.")
        wanted = "float32, bfloat16 or float16 [N, C, H, W]"
        raise RuntimeError(f"{op}: {name}: want {wanted}, got {dtype} {list(x.shape)}")
    if rows_of(x) >= 2**30:
        raise RuntimeError(f"{op}: {name}: want fewer than 2^30 pixels, got {list(x.shape)}")
    return channels_adjacent(x)


def like(op: str, name: str, t, x, shape=None):
    """t, readable, of x's dtype and of its shape or the one given; None stays None."""
    if t is None:
        return None
    check(op, name, t, x.dtype, x.shape if shape is None else shape)
    return channels_adjacent(t)


def written(op: str, name: str, y, x):
    """y, an output of x's shape and dtype, channels side by side."""
    check(op, name, y, x.dtype, x.shape)
    if y.stride(1) != 1 and y.shape[1] != 1:
        raise RuntimeError(f"{op}: {name}: want channels side by side (stride 1), got strides {y.stride()}")
    return y


def floats(op: str, name: str, v, *shape):
    """v, contiguous float32 of this shape; None stays None."""
    if v is None:
        return None
    check(op, name, v, torch.float32, shape)
    return v.contiguous()


def state(op: str, name: str, v, dtype, *shape):
    """v, which is changed in place."""
    check(op, name, v, dtype, shape)
    if not v.is_contiguous():
        raise RuntimeError(f"{op}: {name}: want contiguous memory, got strides {v.stride()}")
    return v


def rows_of(x) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


# ------------------------------------------------------------------------------------------ launchers


def batch_norm_stats(x):
    op = "batch_norm_stats"
    x = activation(op, "x", x)
    rows, C = rows_of(x), x.shape[1]
    if rows == 0:
        mean = x.new_full((C,), float("nan"), dtype=torch.float32)
        return mean, mean.clone()
    strides, how = addressing(x)
    tile = tile_of("sums", C, x.element_size(), how["ALIGN"])
    slab, slabs = slabs_of(rows, C, tile)
    partial = statistics_scratch(x, slabs, C)
    grid = (slabs, triton.cdiv(C, tile["BLOCK_C"]))
    verbs.launch(
        batch_norm_stats_kernel, grid, x, partial, rows, slab, slabs, C, *x.shape[2:], *strides, **how, **tile
    )
    return merge_statistics(partial, slabs, C)


def batch_norm_fold(mean, var, gamma, beta, eps):
    op, C = "batch_norm_fold", mean.shape[0]
    mean, var, gamma, beta = (
        floats(op, name, v, C) for name, v in (("mean", mean), ("var", var), ("gamma", gamma), ("beta", beta))
    )
    rstd, affine = torch.empty_like(mean), mean.new_empty(2, C)
    grid, args = (triton.cdiv(C, VECTOR),), (mean, var, gamma, beta, eps, rstd, affine, C)
    verbs.launch(batch_norm_fold_kernel, grid, *args, BLOCK_C=VECTOR, num_warps=4)
    return rstd, affine


def batch_norm_update_running(
    running_mean, running_var, num_batches_tracked, mean, var, shift, count, momentum
) -> None:
    op, C = "batch_norm_update_running", mean.shape[0]
    state(op, "running_mean", running_mean, torch.float32, C)
    state(op, "running_var", running_var, torch.float32, C)
    if num_batches_tracked is not None:
        state(op, "num_batches_tracked", num_batches_tracked, torch.int64)
    elif momentum is None:
        raise RuntimeError(f"{op}: momentum: want a number where nothing counts batches, got None")
    if count < 2:
        raise RuntimeError(f"{op}: count: want at least 2 values per channel, got {count}")
    mean, var, shift = (
        floats(op, name, v, C) for name, v in (("mean", mean), ("var", var), ("shift", shift))
    )
    args = (running_mean, running_var, num_batches_tracked, mean, var, shift, count, momentum, C)
    verbs.launch(batch_norm_update_running_kernel, (1,), *args, BLOCK_C=RUNNING, num_warps=1)


def batch_norm_apply(x, affine, residual, residual_affine, relu):
    y = empty_channels_last(x, x.shape)
    _apply("batch_norm_apply", x, affine, residual, residual_affine, relu, y)
    return y


def batch_norm_apply_into(x, affine, residual, residual_affine, relu, y) -> None:
    _apply("batch_norm_apply_into", x, affine, residual, residual_affine, relu, y)


def _apply(op, x, affine, residual, residual_affine, relu, y):
    x = activation(op, "x", x)
    residual, y = like(op, "residual", residual, x), written(op, "y", y, x)
    rows, C = rows_of(x), x.shape[1]
    if residual is None and residual_affine is not None:
        raise RuntimeError(f"{op}: residual: want the tensor that residual_affine is of, got None")
    affine = floats(op, "affine", affine, 2, C)
    residual_affine = floats(op, "residual_affine", residual_affine, 2, C)
    if rows == 0:
        return
    strides, how = addressing(x, residual, y)
    tile = tile_of("pass", C, x.element_size(), how["ALIGN"])
    args = (x, affine, residual, residual_affine, y, rows, C, *x.shape[2:], *strides)
    verbs.launch(batch_norm_apply_kernel, grid_of(rows, C, tile), *args, RELU=relu, **how, **tile)


def _finished(op, partial, which, mean, rstd, gamma, affine, count):
    """(dgamma, dbeta, finish) of the sums in rows 0 and `which` of partial [parts, rows, C]."""
    parts, sums, C = partial.shape
    dgamma, dbeta, finish = torch.empty_like(mean), torch.empty_like(mean), mean.new_empty(6, C)
    args = (partial, mean, rstd, gamma, affine, dgamma, dbeta, finish, parts, count, C)
    grid = (triton.cdiv(C, MERGED_CHANNELS),)
    tile = {"BLOCK_PARTS": MERGED_PARTS, "BLOCK_C": MERGED_CHANNELS, "num_warps": 4}
    verbs.launch(batch_norm_bwd_finish_kernel, grid, *args, ROWS=sums, WHICH=which, **tile)
    return dgamma, dbeta, finish


def batch_norm_bwd_finish(sums, mean, rstd, gamma, count):
    op, C = "batch_norm_bwd_finish", mean.shape[0]
    if count < 1:
        raise RuntimeError(f"{op}: count: want at least 1 value per channel, got {count}")
    sums = floats(op, "sums", sums, 2, C)
    mean, rstd, gamma = (
        floats(op, name, v, C) for name, v in (("mean", mean), ("rstd", rstd), ("gamma", gamma))
    )
    return _finished(op, sums[None], 1, mean, rstd, gamma, None, count)


def batch_norm_bwd_reduce(dz, x, mean, rstd, gamma, affine, z, want_g):
    op, C = "batch_norm_bwd_reduce", x.shape[1]
    affine = None if z is not None else floats(op, "affine", affine, 2, C)
    branch = _branch(op, "", x, mean, rstd, gamma)
    partial, g = _reduced(op, dz, z, branch, None, affine, want_g)
    *vectors, count = *branch[1:], max(rows_of(x), 1)
    dgamma, dbeta, finish = _finished(op, partial, 1, *vectors, affine, count)
    return dgamma, dbeta, finish, g


def batch_norm_bwd_reduce_pair(dz, z, x, mean, rstd, gamma, other_x, other_mean, other_rstd, other_gamma):
    op, count = "batch_norm_bwd_reduce_pair", max(rows_of(x), 1)
    main = _branch(op, "", x, mean, rstd, gamma)
    other = _branch(op, "other_", other_x, other_mean, other_rstd, other_gamma)
    like(op, "other_x", other_x, x)
    partial, g = _reduced(op, dz, z, main, other, None, True)
    dgamma, dbeta, finish = _finished(op, partial, 1, *main[1:], None, count)
    other_dgamma, _, other_finish = _finished(op, partial, 2, *other[1:], None, count)
    return dgamma, other_dgamma, dbeta, finish, other_finish, g


def _branch(op, prefix, x, mean, rstd, gamma):
    """(x, mean, rstd, gamma) of a normalisation, readable."""
    x = activation(op, f"{prefix}x", x)
    vectors = (("mean", mean), ("rstd", rstd), ("gamma", gamma))
    return x, *(floats(op, f"{prefix}{name}", v, x.shape[1]) for name, v in vectors)


def _reduced(op, dz, z, main, other, affine, want_g):
    """(partial [slabs, 2 or 3, C], g): the sums of each slab."""
    x, mean, rstd, _ = main
    other_x, other_mean, other_rstd, _ = (None,) * 4 if other is None else other
    dz, z = like(op, "dz", dz, x), like(op, "z", z, x)
    g = empty_channels_last(x, x.shape) if want_g else None
    rows, C = rows_of(x), x.shape[1]
    strides, how = addressing(dz, x, z, other_x, g)
    tile = tile_of("sums", C, x.element_size(), how["ALIGN"])
    slab, slabs = slabs_of(rows, C, tile)
    partial = mean.new_empty(slabs, 2 if other is None else 3, C)
    tensors = (dz, x, z, other_x, affine, mean, rstd, other_mean, other_rstd, g, partial)
    args = (*tensors, rows, slab, C, *x.shape[2:], *strides)
    grid = (slabs, triton.cdiv(C, tile["BLOCK_C"]))
    verbs.launch(batch_norm_bwd_reduce_kernel, grid, *args, **how, **tile)
    return partial, g if want_g else x.new_empty(0)


def batch_norm_bwd_apply(dz, x, finish, z, want_g):
    op = "batch_norm_bwd_apply"
    x = activation(op, "x", x)
    dz, z = like(op, "dz", dz, x), like(op, "z", z, x)
    rows, C = rows_of(x), x.shape[1]
    finish = floats(op, "finish", finish, 6, C)
    dx = empty_channels_last(x, x.shape)
    g = torch.empty_like(dx) if want_g else None
    if rows > 0:
        strides, how = addressing(dz, x, z, dx, g)
        tile = tile_of("pass", C, x.element_size(), how["ALIGN"])
        args = (dz, x, finish, z, dx, g, rows, C, *x.shape[2:], *strides)
        verbs.launch(batch_norm_bwd_apply_kernel, grid_of(rows, C, tile), *args, **how, **tile)
    return dx, g if want_g else x.new_empty(0)


def _pooled(op, x):
    """(x, readable; [N, C, H//2, W//2])"""
    x = activation(op, "x", x)
    n, c, h, w = x.shape
    if h < 2 or w < 2:
        raise RuntimeError(f"{op}: x: want an image of at least 2x2, got {list(x.shape)}")
    return x, (n, c, h // 2, w // 2)


def batch_norm_pool(x, affine):
    op = "batch_norm_pool"
    x, shape = _pooled(op, x)
    y, C = empty_channels_last(x, shape), x.shape[1]
    affine = floats(op, "affine", affine, 2, C)
    squares = rows_of(y)
    if squares > 0:
        strides, align = _square_strides(x, y)
        tile = tile_of("pool", C, x.element_size(), align)
        args = (x, affine, y, squares, C, *shape[2:], *strides)
        verbs.launch(batch_norm_pool_kernel, grid_of(squares, C, tile), *args, ALIGN=align, **tile)
    return y


def batch_norm_pool_bwd(dy, x, act, want_y, dx):
    op = "batch_norm_pool_bwd"
    x, shape = _pooled(op, x)
    dy, dx, C = like(op, "dy", dy, x, shape), written(op, "dx", dx, x), x.shape[1]
    act = floats(op, "act", act, 4, C)
    y = empty_channels_last(x, shape) if want_y else None
    squares = x.shape[0] * triton.cdiv(x.shape[2], 2) * triton.cdiv(x.shape[3], 2)
    strides, align = _square_strides(dy, x, dx, y)
    tile = tile_of("pool sums", C, x.element_size(), align)
    slab, slabs = slabs_of(squares, C, tile)
    partial, sums = act.new_empty(slabs, 2, C), act.new_empty(2, C)
    args = (dy, x, act, dx, y, partial, squares, slab, C, *x.shape[2:], *strides)
    grid = (slabs, triton.cdiv(C, tile["BLOCK_C"]))
    verbs.launch(batch_norm_pool_bwd_kernel, grid, *args, ALIGN=align, **tile)
    merge_sums(partial, sums)
    return sums, y if want_y else x.new_empty(0)


def _square_strides(*tensors) -> tuple[list[int], int]:
    """(three strides for each tensor, ALIGN) for kernels that count squares of pixels."""
    strides = [number for t in tensors for number in pixel_strides(t)]
    align = alignment(next(t for t in tensors if t is not None).shape[1], *strides)
    return strides, align if align == 8 else 1


# ------------------------------------------------------------------------------------------ ahead of time


def configurations() -> list:
    """(kernel, signature, constexprs, options) of the launches: the launchers run on tensors without data,
    and what they would have launched is noted instead. Every tile with most flags; all flags at the
    widest."""
    noted, launch = {}, verbs.launch

    def note(kernel, grid, *args, **meta):
        options, types = {"num_warps": meta.pop("num_warps")}, {}
        for name, arg in zip(kernel.arg_names, args):
            if isinstance(arg, torch.Tensor):
                types[name] = "*i64" if arg.dtype is torch.int64 else POINTERS[arg.dtype]
            elif isinstance(arg, float):
                types[name] = "fp32"
            elif arg == 1:  # known to the compiler when it is launched, as multiples of 16 are
                meta[name] = 1
            elif arg is not None:
                types[name] = "i32:16" if arg % 16 == 0 else "i32"
        entry = (kernel, *signature(kernel, meta, **types), options)
        if kernel.__name__.startswith("batch_norm"):
            noted.setdefault(repr((kernel.__name__, *entry[1:])), entry)

    verbs.launch = note
    try:
        _run_per_channel(torch.empty(128, device="meta"))
        for dtype in DTYPES:
            for shape in ((4, c, 6, 10) for c in (128, 64, 32, 24, 16, 127, 15)):
                x = torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
                _run_passes(x, True, True)
                if shape[1] > 64:
                    _run_passes(x[:, :, 1:, 1:], True, True)
            x = torch.empty((4, 128, 6, 10), dtype=dtype, device="meta", memory_format=torch.channels_last)
            for masked, more in ((True, False), (False, True), (False, False)):
                _run_passes(x, masked, more)
        _run_passes(torch.empty(4, 1, 2, 2, device="meta"), True, True)
    finally:
        verbs.launch = launch
    return list(noted.values())


def _run_passes(x, masked, more):
    """Every pass over x: masked by its output where there is one, else by an affine or not at all; with more
    inputs and outputs or without."""
    v, table = x.new_empty(x.shape[1], dtype=torch.float32), x.new_empty(6, x.shape[1], dtype=torch.float32)
    z, residual_affine = x if masked else None, table[:2] if masked else None
    batch_norm_stats(x)
    batch_norm_apply(x, table[:2], x if more else None, residual_affine if more else None, masked)
    batch_norm_bwd_reduce(x, x, v, v, v, table[:2] if more else None, z, more)
    batch_norm_bwd_apply(x, x, table, z, more)
    if masked:
        batch_norm_bwd_reduce_pair(x, x, x, v, v, v, x, v, v, v)
    y = batch_norm_pool(x, table[:2])
    batch_norm_pool_bwd(y, x, table[:4], more, x)


def _run_per_channel(v):
    """Every kernel of one value per channel, with and without what may be absent."""
    table = v.new_empty(6, len(v))
    batches = torch.empty((), dtype=torch.int64, device=v.device)
    for gamma in (v, None):
        for beta in (v, None):
            batch_norm_fold(v, v, gamma, beta, 1e-5)
        batch_norm_bwd_finish(table[:2], v, v, gamma, 77)
    for shift in (v, None):
        for counter, momentum in ((batches, 0.1), (batches, None), (None, 0.1)):
            batch_norm_update_running(v, v, counter, v, v, shift, 77, momentum)
