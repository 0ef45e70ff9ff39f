"""What the Triton kernels share: verbs on tiles in registers, the merging of partial results, and the launch.

Kernels do not specialise on the values of integers: what alignment there is they learn from ALIGN, so the
variants that are compiled ahead of time are those that run. Partial results lie in memory one row per tile
and are merged in an order that depends on their number alone, so every result is bit-identical from run to
run.
"""

import torch
import triton
import triton.language as tl

from gconv import gpu

# ------------------------------------------------------------------------------------------ on tiles


@triton.jit
def multiple(value, ALIGN: tl.constexpr):
    """`value`, a multiple of ALIGN, written so that the compiler knows: it decides how wide a load may be."""
    return value // ALIGN * ALIGN


@triton.jit
def relu(v):
    """NaN stays NaN, as in torch."""
    return tl.where(v <= 0, 0.0, v)


@triton.jit
def activated(x, a, b):
    """relu(a*x + b) in float32, rounded to x's dtype. What a mask has left out becomes relu(b), not 0."""
    return relu(a * x.to(tl.float32) + b).to(x.dtype)


@triton.jit
def finish_vectors(finish, k, K, within):
    """The rows A, B, C, mean, a, b of finish [6, K] at channels k, 0 where not within."""
    scale = tl.load(finish + k, mask=within, other=0.0)
    slope = tl.load(finish + K + k, mask=within, other=0.0)
    offset = tl.load(finish + 2 * K + k, mask=within, other=0.0)
    mean = tl.load(finish + 3 * K + k, mask=within, other=0.0)
    a = tl.load(finish + 4 * K + k, mask=within, other=0.0)
    b = tl.load(finish + 5 * K + k, mask=within, other=0.0)
    return scale, slope, offset, mean, a, b


@triton.jit
def finished(dy, y, scale, slope, offset, mean, a, b):
    """A*(dy*[not a*y + b <= 0]) + B*(y - mean) + C, rounded to dy's dtype: the gradient that a convolution's
    backward works on; the vectors broadcast to dy. Of pixels that a mask has left out it makes C - B*mean,
    not 0."""
    y = y.to(tl.float32)
    g = tl.where(a * y + b <= 0, 0.0, dy.to(tl.float32))
    return (scale * g + slope * (y - mean) + offset).to(dy.dtype)


@triton.jit
def pixel_offset(pixel, H, W, stride_n, stride_h, stride_w):
    """Where the pixels (counted over images, rows and columns) of a view [N, C, H, W] begin, in elements:
    int64."""
    w = pixel % W
    row = pixel // W
    h = row % H
    n = row // H
    return n.to(tl.int64) * stride_n + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w


@triton.jit
def grouped_tile(pid, rows, columns, GROUP: tl.constexpr):
    """(row, column) of a tile in an order that walks GROUP rows of tiles column by column, so that programs
    that run at the same time share operands in L2."""
    per_group = GROUP * columns
    first = pid // per_group * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = pid % per_group
    return first + within % height, within // height


@triton.jit
def sum_rows(v):
    """Sum over the first dimension of v [rows, columns], rows a multiple of 16: in two steps, so that
    rounding errors grow with 16 + rows/16 terms in whatever order a step is done."""
    parts = tl.reshape(v, [v.shape[0] // 16, 16, v.shape[1]])
    return tl.sum(tl.sum(parts, 1), 0)


@triton.jit
def statistics(v, valid):
    """(count, mean, M2) over the rows of v [rows, channels] float32 where valid [rows, 1]: M2 is the sum of
    squares about the tile's own mean."""
    count = tl.sum(valid.to(tl.float32))
    mean = sum_rows(tl.where(valid, v, 0.0)) / tl.maximum(count, 1.0)
    d = tl.where(valid, v - mean[None, :], 0.0)
    return count, mean, sum_rows(d * d)


@triton.jit
def store_statistics(partial, tile, tiles, C, c, within, count, mean, m2):
    """Puts (count, mean, M2) of channels c into the scratch of `statistics_scratch`. Programs that share a
    tile but not channels write the same count."""
    tl.store(partial + tile.to(tl.int64) * C + c, mean, mask=within)
    tl.store(partial + (tile + tiles).to(tl.int64) * C + c, m2, mask=within)
    tl.store(partial + 2 * tl.cast(tiles, tl.int64) * C + tile, count)


@triton.jit
def merged(count, mean, m2, other_count, other_mean, other_m2):
    """(count, mean, M2) of two sets (Chan, Golub & LeVeque 1983, "Algorithms for computing the sample
    variance", equation 2.1)."""
    total = count + other_count
    share = other_count / tl.maximum(total, 1.0)
    delta = other_mean - mean
    return total, mean + delta * share, m2 + other_m2 + delta * delta * (count * share)


# ------------------------------------------------------------------------------------------ merging

# One tile of the merging kernels: 128 bytes of a row for coalescing, rows enough to hide latency.
BLOCK_T, BLOCK_C = 32, 32
ONE_LEVEL = 128  # so many rows are merged at once; more in groups first, about GROUPS, for parallelism
GROUPS = 64


# computes: (count, mean, M2) of SPAN tiles as one; FINAL: their mean and biased variance
# grid:     (groups of tiles, blocks of channels)
# tile:     [BLOCK_T tiles, BLOCK_C channels]
# bytes:    8*tiles*C read
# accum.:   float64, groups of BLOCK_T tiles about their own mean, then one after the other
@triton.jit(do_not_specialize=["tiles", "C", "span", "groups"])
def merge_statistics_kernel(
    partial, out, mean_out, var_out, tiles, C, span, groups,
    FINAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    within = c < C
    first = group * span
    last = tl.minimum(first + span, tiles)
    means = partial
    squares = partial + tl.cast(tiles, tl.int64) * C
    counts = squares + tl.cast(tiles, tl.int64) * C

    # A row of the result like every other, so that loops carry one shape.
    count = tl.zeros([BLOCK_C], tl.float64)
    mean = tl.zeros([BLOCK_C], tl.float64)
    m2 = tl.zeros([BLOCK_C], tl.float64)
    for begin in range(first, last, BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        known = t < last
        at = t.to(tl.int64)[:, None] * C + c[None, :]
        mask = known[:, None] & within[None, :]
        n = tl.load(counts + t, mask=known, other=0.0).to(tl.float64)[:, None]
        mu = tl.load(means + at, mask=mask, other=0.0).to(tl.float64)
        sq = tl.load(squares + at, mask=mask, other=0.0).to(tl.float64)
        block_count = tl.sum(n, 0)
        block_mean = tl.sum(n * mu, 0) / tl.maximum(block_count, 1.0)
        d = mu - block_mean[None, :]
        count, mean, m2 = merged(
            count, mean, m2, block_count, block_mean, tl.sum(tl.where(mask, sq + n * d * d, 0.0), 0)
        )
    if FINAL:
        tl.store(mean_out + c, mean.to(mean_out.dtype.element_ty), mask=within)
        tl.store(var_out + c, (m2 / count).to(var_out.dtype.element_ty), mask=within)
    else:
        # The count is the same in every channel; every program of a group writes it.
        store_statistics(out, group, groups, C, c, within, tl.max(count, 0), mean, m2)


# computes: out[group] = sum of SPAN rows of partial [parts, L]
# grid:     (groups of rows, blocks of L)
# tile:     [BLOCK_T rows, BLOCK_L elements]
# bytes:    4*parts*L read
# accum.:   float64 if WIDE, else float32; groups of BLOCK_T rows, then one after the other
@triton.jit(do_not_specialize=["parts", "L", "span"])
def merge_sums_kernel(
    partial, out, parts, L, span, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr
):
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    group = tl.program_id(0)
    at = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    within = at < L
    first = group * span
    last = tl.minimum(first + span, parts)
    total = tl.zeros([BLOCK_L], dtype)
    for begin in range(first, last, BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        mask = (t < last)[:, None] & within[None, :]
        rows = tl.load(partial + t.to(tl.int64)[:, None] * L + at[None, :], mask=mask, other=0.0)
        total += tl.sum(rows.to(dtype), 0)
    tl.store(out + group.to(tl.int64) * L + at, total.to(out.dtype.element_ty), mask=within)


def _grouping(parts: int) -> tuple[int, int]:
    """(span, groups): how many rows the first of two levels merges into one, and into how many; one level
    where groups is 1."""
    if parts <= ONE_LEVEL:
        return max(parts, 1), 1
    span = triton.cdiv(triton.cdiv(parts, GROUPS), BLOCK_T) * BLOCK_T
    return span, triton.cdiv(parts, span)


def statistics_scratch(x, tiles: int, C: int) -> torch.Tensor:
    """Where `tiles` tiles put their (count, mean, M2): means [tiles, C], M2 [tiles, C] and counts [tiles] in
    one allocation."""
    return torch.empty(tiles * (2 * C + 1), dtype=torch.float32, device=x.device)


def merge_statistics(partial, tiles: int, C: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, var): float32 [C] mean and biased variance of what `store_statistics` has put into `partial`; of
    nothing 0 and NaN."""
    mean = partial.new_empty(C, dtype=torch.float32)
    var = torch.empty_like(mean)
    blocks = triton.cdiv(C, BLOCK_C)
    meta = {"BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C, "num_warps": 4}
    span, groups = _grouping(tiles)
    if groups > 1:
        rows = partial.new_empty(groups * (2 * C + 1), dtype=torch.float64)
        args = (partial, rows, None, None, tiles, C, span, groups)
        launch(merge_statistics_kernel, (groups, blocks), *args, FINAL=False, **meta)
        partial, tiles, span = rows, groups, groups
    args = (partial, None, mean, var, tiles, C, span, 1)
    launch(merge_statistics_kernel, (1, blocks), *args, FINAL=True, **meta)
    return mean, var


def merge_sums(partial, out, wide: bool = True) -> None:
    """out = partial summed over its first dimension, in float64 if wide, else in float32; both contiguous in
    memory, out of any dtype."""
    parts, L = partial.shape[0], out.numel()
    blocks = triton.cdiv(L, BLOCK_C)
    meta = {"WIDE": wide, "BLOCK_T": BLOCK_T, "BLOCK_L": BLOCK_C, "num_warps": 4}
    span, groups = _grouping(parts)
    if groups > 1:
        rows = partial.new_empty((groups, L), dtype=torch.float64 if wide else torch.float32)
        launch(merge_sums_kernel, (groups, blocks), partial, rows, parts, L, span, **meta)
        partial, parts, span = rows, groups, groups
    launch(merge_sums_kernel, (1, blocks), partial, out, parts, L, span, **meta)


# ------------------------------------------------------------------------------------------ launching


def launch(kernel, grid: tuple[int, ...], *args, **meta):
    """Runs a kernel on the device of its first argument, a tensor, and on that device's current stream; what
    Triton compiled for it, or None.

    Multiplications and additions are fused: Triton's default is about to change, and a mask must be computed
    as its forward was.
    """
    with torch.cuda.device_of(args[0]):
        return kernel[grid](*args, enable_fp_fusion=True, **meta)


def dot_tile(*sizes: int) -> None:
    """Asserts that a tl.dot has sizes which a GPU takes: the interpreter takes all."""
    assert min(sizes) >= 16, f"tl.dot: want at least 16 rows, columns and terms, got {sizes}"


def dot_precision(x) -> str:
    """`input_precision` of a tl.dot: that of torch's own convolutions."""
    return "tf32" if gpu.tf32(x) else "ieee"


def operands(dtype: torch.dtype, precision: str) -> str:
    """By what tables of tiles tell the operands of a tl.dot: "16-bit", "tf32" or, without a matrix unit,
    "float32"."""
    if dtype is not torch.float32:
        return "16-bit"
    return "tf32" if precision == "tf32" else "float32"


def alignment(*sizes: int) -> int:
    """The largest power of two, at most 8 (16 bytes of a 16-bit type), that divides all sizes: ALIGN of
    `multiple`."""
    return next(a for a in (8, 4, 2, 1) if all(size % a == 0 for size in sizes))


def wide_loads(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether channels can be loaded 16 bytes at a time: sizes are numbers of channels and strides. Where
    they cannot every element has an address of its own, and only small tiles leave registers enough."""
    return alignment(*sizes) * dtype.itemsize >= 16


def channels_adjacent(x):
    """x itself where a pixel's channels lie side by side, else a channels_last copy."""
    adjacent = x.stride(1) == 1 or x.shape[1] == 1
    return x if adjacent else x.contiguous(memory_format=torch.channels_last)


def pixel_strides(x) -> tuple[int, int, int]:
    """Between images, rows and columns of x [N, C, H, W], in elements; zeros for None."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(2), x.stride(3))


def check(op: str, name: str, t, dtype: torch.dtype, shape) -> None:
    """Raises RuntimeError, in one line, where a tensor is not what a kernel would read or write."""
    if t.dtype is not dtype or tuple(t.shape) != tuple(shape):
        raise RuntimeError(
            f"{op}: {name}: want {_described(dtype, shape)}, got {_described(t.dtype, t.shape)}"
        )


def check_output(op: str, name: str, t, dtype: torch.dtype, shape) -> None:
    """`check` of a tensor that a kernel writes to, which no copy can stand for."""
    check(op, name, t, dtype, shape)
    if t.stride(1) != 1 and t.shape[1] != 1:
        raise RuntimeError(f"{op}: {name}: want channels side by side, got strides {list(t.stride())}")


def _described(dtype, shape) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


# ------------------------------------------------------------------------------------------ ahead of time

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}


def signature(kernel, constants: dict, **types: str) -> tuple[dict, dict]:
    """(signature, constexprs) of a kernel for ahead-of-time compilation, from its constants and the types of
    its run-time arguments; arguments that neither names are None."""
    named, constexprs = {}, {}
    for name in kernel.arg_names:
        if name in types:
            named[name] = types[name]
        else:
            named[name] = "constexpr"
            constexprs[name] = constants.get(name)
    return named, constexprs


def configurations() -> list:
    """(kernel, signature, constexprs, options) of every way the merging kernels are launched."""
    result = []
    options = {"num_warps": 4}
    for source, final in (("*fp32", True), ("*fp32", False), ("*fp64", True)):
        outs = {"mean_out": "*fp32", "var_out": "*fp32"} if final else {"out": "*fp64"}
        constants = {"FINAL": final, "BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C}
        sizes = dict.fromkeys(("tiles", "C", "span", "groups"), "i32")
        types = signature(merge_statistics_kernel, constants, partial=source, **outs, **sizes)
        result.append((merge_statistics_kernel, *types, options))
    for source, out, wide in (
        ("*fp32", "*fp64", True), ("*fp64", "*fp32", True), ("*fp32", "*fp32", True),
        *(("*fp32", POINTERS[dtype], False) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    ):  # fmt: skip
        constants = {"WIDE": wide, "BLOCK_T": BLOCK_T, "BLOCK_L": BLOCK_C}
        sizes = dict.fromkeys(("parts", "L", "span"), "i32")
        types = signature(merge_sums_kernel, constants, partial=source, out=out, **sizes)
        result.append((merge_sums_kernel, *types, options))
    return result
