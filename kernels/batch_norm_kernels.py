"""The kernels of batch normalisation; kernels/batch_norm.py launches them.

Pixels are the rows of a matrix, channels its columns; a pass over it is bound by memory alone. Strides and C
are multiples of ALIGN; FLAT: a pixel follows the one before at stride_w, over ends of rows and images.
"""

import triton
import triton.language as tl
from gconv.kernels.verbs import multiple, pixel_offset, relu, store_statistics

# ------------------------------------------------------------------------------------------ verbs


@triton.jit
def offsets(row, c, H, W, stride_n, stride_h, stride_w, ALIGN: tl.constexpr, FLAT: tl.constexpr):
    """Where channels c of the pixels `row` of a view [N, C, H, W] lie, in elements: [rows, channels]."""
    if FLAT:
        begin = row.to(tl.int64) * multiple(stride_w, ALIGN)
    else:
        strides_n, strides_h = multiple(stride_n, ALIGN), multiple(stride_h, ALIGN)
        begin = pixel_offset(row, H, W, strides_n, strides_h, multiple(stride_w, ALIGN))
    return begin[:, None] + c[None, :]


@triton.jit
def channels_of(C, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr):
    """(c, C, within) of a program's block: its channels, how many there are, where c < C."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    C = multiple(C, ALIGN)
    return c, C, c < C


@triton.jit
def row_of(table, row, C, c, within):
    """Row `row` of a table [rows, C] for channels c, to be broadcast over pixels."""
    return tl.load(table + row * C + c, mask=within, other=0.0)[None, :]


@triton.jit
def scaled(gamma, rstd, c, within):
    """(rstd, gamma*rstd) of channels c in float64; gamma None is 1."""
    r = tl.load(rstd + c, mask=within, other=0.0).to(tl.float64)
    if gamma is None:
        return r, r
    else:
        return r, tl.load(gamma + c, mask=within, other=0.0).to(tl.float64) * r


@triton.jit
def masked_gradient(
    dz, x, z, row, c, valid, a, b, H, W, dz_n, dz_h, dz_w, x_n, x_h, x_w, z_n, z_h, z_w,
    ALIGN: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """(g, x) in float32: dz where the ReLU let through, by its output z, or, z None, by a*x + b; and x."""
    d = tl.load(dz + offsets(row, c, H, W, dz_n, dz_h, dz_w, ALIGN, FLAT), mask=valid, other=0.0)
    v = tl.load(x + offsets(row, c, H, W, x_n, x_h, x_w, ALIGN, FLAT), mask=valid, other=0.0)
    d, v = d.to(tl.float32), v.to(tl.float32)
    if z is None:
        shut = a * v + b <= 0
    else:
        at = offsets(row, c, H, W, z_n, z_h, z_w, ALIGN, FLAT)
        shut = tl.load(z + at, mask=valid, other=0.0).to(tl.float32) <= 0
    return tl.where(shut, 0.0, d), v


@triton.jit
def store_sums(at, C, sum_g, sum_gx, rstd, c, within):
    """Puts sum g and rstd*sum_gx, each over the lanes of a tile, into two rows [C] at `at`."""
    tl.store(at, tl.sum(sum_g.to(tl.float64), 0).to(tl.float32), mask=within)
    total = tl.sum(sum_gx.to(tl.float64), 0) * tl.load(rstd + c, mask=within, other=0.0)
    tl.store(at + C, total.to(tl.float32), mask=within)


# ------------------------------------------------------------------------------------------ per channel


# computes: rstd = 1/sqrt(var + eps), affine = (gamma*rstd; beta - mean*gamma*rstd)
# grid:     blocks of channels
# tile:     [BLOCK_C channels]
# bytes:    28*C
# accum.:   float64
@triton.jit
def batch_norm_fold_kernel(mean, var, gamma, beta, eps, rstd, affine, C, BLOCK_C: tl.constexpr):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    within = c < C
    v = tl.load(var + c, mask=within, other=1.0).to(tl.float64)
    r = 1.0 / tl.sqrt(v + tl.cast(eps, tl.float64))
    scale = r
    if gamma is not None:
        scale = tl.load(gamma + c, mask=within, other=0.0).to(tl.float64) * r
    shift = -tl.load(mean + c, mask=within, other=0.0).to(tl.float64) * scale
    if beta is not None:
        shift += tl.load(beta + c, mask=within, other=0.0).to(tl.float64)
    tl.store(rstd + c, r.to(tl.float32), mask=within)
    tl.store(affine + c, scale.to(tl.float32), mask=within)
    tl.store(affine + C + c, shift.to(tl.float32), mask=within)


# computes: running <- (1 - momentum)*running + momentum*new; momentum None: 1/batches
# grid:     one program, for it both reads and moves the counter
# tile:     [BLOCK_C channels], one after the other
# bytes:    28*C
# accum.:   float64
@triton.jit(do_not_specialize=["count"])
def batch_norm_update_running_kernel(
    running_mean, running_var, batches, mean, var, shift, count, momentum, C, BLOCK_C: tl.constexpr
):
    if batches is not None:
        counted = tl.load(batches) + 1
    if momentum is None:
        share = 1.0 / counted.to(tl.float64)
    else:
        share = tl.cast(momentum, tl.float64)
    values = tl.cast(count, tl.float64)
    unbiased = values / (values - 1.0)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        within = c < C
        new = tl.load(mean + c, mask=within).to(tl.float64)
        if shift is not None:
            new += tl.load(shift + c, mask=within).to(tl.float64)
        old = tl.load(running_mean + c, mask=within).to(tl.float64)
        tl.store(running_mean + c, ((1.0 - share) * old + share * new).to(tl.float32), mask=within)
        new = tl.load(var + c, mask=within).to(tl.float64) * unbiased
        old = tl.load(running_var + c, mask=within).to(tl.float64)
        tl.store(running_var + c, ((1.0 - share) * old + share * new).to(tl.float32), mask=within)
    if batches is not None:
        tl.store(batches, counted)


# computes: dgamma, dbeta and finish [6, C] from rows 0 (sum g) and WHICH (sum g*xhat) of partial
#           [parts, ROWS, C], the mask of finish being affine [2, C], or none
# grid:     blocks of channels
# tile:     [BLOCK_PARTS parts, BLOCK_C channels]
# bytes:    8*parts*C read
# accum.:   float64, blocks of parts one after the other
@triton.jit(do_not_specialize=["count"])
def batch_norm_bwd_finish_kernel(
    partial, mean, rstd, gamma, affine, dgamma, dbeta, finish, parts, count, C,
    ROWS: tl.constexpr, WHICH: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    within = c < C
    sum_g = tl.zeros([BLOCK_C], tl.float64)
    sum_gx = tl.zeros([BLOCK_C], tl.float64)
    for first in range(0, parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        at = partial + part.to(tl.int64)[:, None] * (ROWS * C) + c[None, :]
        mask = (part < parts)[:, None] & within[None, :]
        sum_g += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float64), 0)
        sum_gx += tl.sum(tl.load(at + WHICH * C, mask=mask, other=0.0).to(tl.float64), 0)
    r, scale = scaled(gamma, rstd, c, within)
    values = tl.cast(count, tl.float64)
    tl.store(dbeta + c, sum_g.to(tl.float32), mask=within)
    tl.store(dgamma + c, sum_gx.to(tl.float32), mask=within)
    tl.store(finish + c, scale.to(tl.float32), mask=within)
    tl.store(finish + C + c, (-scale * r * sum_gx / values).to(tl.float32), mask=within)
    tl.store(finish + 2 * C + c, (-scale * sum_g / values).to(tl.float32), mask=within)
    tl.store(finish + 3 * C + c, tl.load(mean + c, mask=within, other=0.0), mask=within)
    a = tl.zeros([BLOCK_C], tl.float32)
    b = a + 1.0
    if affine is not None:
        a = tl.load(affine + c, mask=within, other=0.0)
        b = tl.load(affine + C + c, mask=within, other=0.0)
    tl.store(finish + 4 * C + c, a, mask=within)
    tl.store(finish + 5 * C + c, b, mask=within)


# ------------------------------------------------------------------------------------------ passes


# computes: (count, mean, M2) of a slab of pixels
# grid:     (slabs, blocks of channels)
# tile:     [BLOCK_ROWS pixels, BLOCK_C channels], along the slab
# bytes:    x once
# accum.:   float32: (mean, M2) of every BLOCK_ROWS-th pixel by Welford's recurrence; the lanes of a tile are
#           merged by Chan's rule, the slabs by merge_statistics
@triton.jit
def batch_norm_stats_kernel(
    x, partial, rows, slab, slabs, C, H, W, x_n, x_h, x_w,
    ALIGN: tl.constexpr, FLAT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK_ROWS)
    c, C, within = channels_of(C, ALIGN, BLOCK_C)
    first = tl.program_id(0) * slab
    last = tl.minimum(first + slab, rows)
    mean = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    step = 1.0
    for begin in range(first, last, BLOCK_ROWS):
        row = begin + lane
        valid = (row < last)[:, None]
        at = offsets(row, c, H, W, x_n, x_h, x_w, ALIGN, FLAT)
        v = tl.load(x + at, mask=valid & within[None, :], other=0.0).to(tl.float32)
        delta = tl.where(valid, v - mean, 0.0)
        mean += delta * (1.0 / step)
        m2 += delta * (v - mean)
        step += 1.0
    # A lane's last pixel may lie behind the end of the slab.
    count = tl.maximum((last - first - lane + BLOCK_ROWS - 1) // BLOCK_ROWS, 0).to(tl.float32)[:, None]
    total = (last - first).to(tl.float32)
    center = tl.sum(count * mean, 0) / total
    center += tl.sum(count * (mean - center[None, :]), 0) / total  # what rounding took
    d = mean - center[None, :]
    squares = tl.sum(m2 + count * d * d, 0)
    store_statistics(partial, tl.program_id(0), slabs, C, c, within, total, center, squares)


# computes: y = relu?(a*x + b [+ residual, or + c*residual + d])
# grid:     (blocks of pixels, blocks of channels)
# tile:     [BLOCK_ROWS pixels, BLOCK_C channels]
# bytes:    x, residual and y once
# accum.:   float32
@triton.jit
def batch_norm_apply_kernel(
    x, affine, residual, residual_affine, y, rows, C, H, W,
    x_n, x_h, x_w, residual_n, residual_h, residual_w, y_n, y_h, y_w,
    RELU: tl.constexpr, ALIGN: tl.constexpr, FLAT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c, C, within = channels_of(C, ALIGN, BLOCK_C)
    valid = (row < rows)[:, None] & within[None, :]
    at = offsets(row, c, H, W, x_n, x_h, x_w, ALIGN, FLAT)
    v = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    v = row_of(affine, 0, C, c, within) * v + row_of(affine, 1, C, c, within)
    if residual is not None:
        at = offsets(row, c, H, W, residual_n, residual_h, residual_w, ALIGN, FLAT)
        r = tl.load(residual + at, mask=valid, other=0.0).to(tl.float32)
        if residual_affine is not None:
            r = row_of(residual_affine, 0, C, c, within) * r + row_of(residual_affine, 1, C, c, within)
        v += r
    if RELU:
        v = relu(v)
    at = offsets(row, c, H, W, y_n, y_h, y_w, ALIGN, FLAT)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=valid)


# computes: g = dz*mask; of a slab sum g, sum g*xhat and, beside other_x, the same of that
# grid:     (slabs, blocks of channels)
# tile:     [BLOCK_ROWS pixels, BLOCK_C channels], along the slab
# bytes:    dz, x, z, other_x and g once
# accum.:   float32, over every BLOCK_ROWS-th pixel; the lanes of a tile in float64
@triton.jit
def batch_norm_bwd_reduce_kernel(
    dz, x, z, other_x, affine, mean, rstd, other_mean, other_rstd, g, partial, rows, slab, C, H, W,
    dz_n, dz_h, dz_w, x_n, x_h, x_w, z_n, z_h, z_w, other_n, other_h, other_w, g_n, g_h, g_w,
    ALIGN: tl.constexpr, FLAT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    SUMS: tl.constexpr = 2 if other_x is None else 3
    c, C, within = channels_of(C, ALIGN, BLOCK_C)
    first = tl.program_id(0) * slab
    last = tl.minimum(first + slab, rows)
    center = row_of(mean, 0, C, c, within)
    sum_g = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    sum_gx = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    a = tl.zeros([1, BLOCK_C], tl.float32)
    b = a + 1.0  # masks nothing
    if affine is not None:
        a = row_of(affine, 0, C, c, within)
        b = row_of(affine, 1, C, c, within)
    if other_x is not None:
        other_center = row_of(other_mean, 0, C, c, within)
        sum_go = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for begin in range(first, last, BLOCK_ROWS):
        row = begin + tl.arange(0, BLOCK_ROWS)
        valid = (row < last)[:, None] & within[None, :]
        d, v = masked_gradient(
            dz, x, z, row, c, valid, a, b, H, W, dz_n, dz_h, dz_w, x_n, x_h, x_w, z_n, z_h, z_w, ALIGN, FLAT
        )
        sum_g += d
        sum_gx += d * (v - center)
        if other_x is not None:
            at = offsets(row, c, H, W, other_n, other_h, other_w, ALIGN, FLAT)
            v = tl.load(other_x + at, mask=valid, other=0.0).to(tl.float32)
            sum_go += d * (v - other_center)
        if g is not None:
            at = offsets(row, c, H, W, g_n, g_h, g_w, ALIGN, FLAT)
            tl.store(g + at, d.to(g.dtype.element_ty), mask=valid)
    at = partial + tl.program_id(0).to(tl.int64) * (SUMS * C) + c
    store_sums(at, C, sum_g, sum_gx, rstd, c, within)
    if other_x is not None:
        total = tl.sum(sum_go.to(tl.float64), 0) * tl.load(other_rstd + c, mask=within, other=0.0)
        tl.store(at + 2 * C, total.to(tl.float32), mask=within)


# computes: g = dz*mask; dx = A*g + B*(x - mean) + C of finish [6, C]
# grid:     (blocks of pixels, blocks of channels)
# tile:     [BLOCK_ROWS pixels, BLOCK_C channels]
# bytes:    dz, x, z, dx and g once
# accum.:   float32
@triton.jit
def batch_norm_bwd_apply_kernel(
    dz, x, finish, z, dx, g, rows, C, H, W,
    dz_n, dz_h, dz_w, x_n, x_h, x_w, z_n, z_h, z_w, dx_n, dx_h, dx_w, g_n, g_h, g_w,
    ALIGN: tl.constexpr, FLAT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c, C, within = channels_of(C, ALIGN, BLOCK_C)
    valid = (row < rows)[:, None] & within[None, :]
    a, b = row_of(finish, 4, C, c, within), row_of(finish, 5, C, c, within)
    d, v = masked_gradient(
        dz, x, z, row, c, valid, a, b, H, W, dz_n, dz_h, dz_w, x_n, x_h, x_w, z_n, z_h, z_w, ALIGN, FLAT
    )
    if g is not None:
        at = offsets(row, c, H, W, g_n, g_h, g_w, ALIGN, FLAT)
        tl.store(g + at, d.to(g.dtype.element_ty), mask=valid)
    v = row_of(finish, 1, C, c, within) * (v - row_of(finish, 3, C, c, within))
    v += row_of(finish, 0, C, c, within) * d + row_of(finish, 2, C, c, within)
    at = offsets(row, c, H, W, dx_n, dx_h, dx_w, ALIGN, FLAT)
    tl.store(dx + at, v.to(dx.dtype.element_ty), mask=valid)


# computes: y = mean of relu(a*x + b) over squares of 2x2
# grid:     (blocks of squares, blocks of channels)
# tile:     [BLOCK_ROWS squares, BLOCK_C channels]
# bytes:    x and y once
# accum.:   float32
@triton.jit
def batch_norm_pool_kernel(
    x, affine, y, squares, C, H, W, x_n, x_h, x_w, y_n, y_h, y_w,
    ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    square = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c, C, within = channels_of(C, ALIGN, BLOCK_C)
    valid = (square < squares)[:, None] & within[None, :]
    a = row_of(affine, 0, C, c, within)
    b = row_of(affine, 1, C, c, within)
    x_n, x_h, x_w = multiple(x_n, ALIGN), multiple(x_h, ALIGN), multiple(x_w, ALIGN)
    # H and W of the squares; theirs are every second pixel's strides.
    corner = x + pixel_offset(square, H, W, x_n, 2 * x_h, 2 * x_w)[:, None] + c[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for i in tl.static_range(2):
        for j in tl.static_range(2):
            v = tl.load(corner + (i * x_h + j * x_w), mask=valid, other=0.0).to(tl.float32)
            total += relu(a * v + b)
    y_n, y_h, y_w = multiple(y_n, ALIGN), multiple(y_h, ALIGN), multiple(y_w, ALIGN)
    at = pixel_offset(square, H, W, y_n, y_h, y_w)[:, None] + c[None, :]
    tl.store(y + at, (0.25 * total).to(y.dtype.element_ty), mask=valid)


# computes: g = dy/4 of the square, masked by [not a*x + b <= 0]; dx = a*g, 0 in what is in no square; of a
#           slab sum g and sum g*xhat; and y = mean of relu(a*x + b) of the square
# grid:     (slabs of squares, blocks of channels)
# tile:     [BLOCK_ROWS squares, BLOCK_C channels], along the slab; squares cut off by the edge count
# bytes:    dy, x, dx and y once
# accum.:   float32, over every BLOCK_ROWS-th square; the lanes of a tile in float64
@triton.jit
def batch_norm_pool_bwd_kernel(
    dy, x, act, dx, y, partial, squares, slab, C, H, W, dy_n, dy_h, dy_w, x_n, x_h, x_w, dx_n, dx_h, dx_w,
    y_n, y_h, y_w, ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c, C, within = channels_of(C, ALIGN, BLOCK_C)
    first = tl.program_id(0) * slab
    last = tl.minimum(first + slab, squares)
    a = row_of(act, 0, C, c, within)
    b = row_of(act, 1, C, c, within)
    center = row_of(act, 2, C, c, within)
    dy_n, dy_h, dy_w = multiple(dy_n, ALIGN), multiple(dy_h, ALIGN), multiple(dy_w, ALIGN)
    x_n, x_h, x_w = multiple(x_n, ALIGN), multiple(x_h, ALIGN), multiple(x_w, ALIGN)
    dx_n, dx_h, dx_w = multiple(dx_n, ALIGN), multiple(dx_h, ALIGN), multiple(dx_w, ALIGN)
    if y is not None:
        y_n, y_h, y_w = multiple(y_n, ALIGN), multiple(y_h, ALIGN), multiple(y_w, ALIGN)
    high, wide = (H + 1) // 2, (W + 1) // 2
    sum_g = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    sum_gx = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for begin in range(first, last, BLOCK_ROWS):
        square = begin + tl.arange(0, BLOCK_ROWS)
        w = square % wide
        h = square // wide % high
        valid = (square < last)[:, None] & within[None, :]
        whole = ((h < H // 2) & (w < W // 2))[:, None]
        at = pixel_offset(square, high, wide, dy_n, dy_h, dy_w)[:, None] + c[None, :]
        d = 0.25 * tl.load(dy + at, mask=valid & whole, other=0.0).to(tl.float32)
        corner = pixel_offset(square, high, wide, x_n, 2 * x_h, 2 * x_w)[:, None] + c[None, :]
        dx_corner = pixel_offset(square, high, wide, dx_n, 2 * dx_h, 2 * dx_w)[:, None] + c[None, :]
        total = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
        for i in tl.static_range(2):
            for j in tl.static_range(2):
                inside = valid & ((2 * h + i < H) & (2 * w + j < W))[:, None]
                v = tl.load(x + corner + (i * x_h + j * x_w), mask=valid & whole, other=0.0).to(tl.float32)
                before = a * v + b
                g = tl.where(before <= 0, 0.0, d)
                total += relu(before)
                sum_g += g
                sum_gx += g * (v - center)
                g = tl.where(whole, a * g, 0.0).to(dx.dtype.element_ty)
                tl.store(dx + dx_corner + (i * dx_h + j * dx_w), g, mask=inside)
        if y is not None:
            at = pixel_offset(square, high, wide, y_n, y_h, y_w)[:, None] + c[None, :]
            tl.store(y + at, (0.25 * total).to(y.dtype.element_ty), mask=valid & whole)
    at = partial + tl.program_id(0).to(tl.int64) * (2 * C) + c
    store_sums(at, C, sum_g, sum_gx, act + 3 * C, c, within)
