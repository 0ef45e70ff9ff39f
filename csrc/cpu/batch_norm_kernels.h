// The passes of batch_norm over whole activations, compiled once per instruction set.
//
// Computes: stats, apply, bwd_reduce and bwd_apply of batch_norm.h; pool and pool_bwd are in
// batch_norm_pool.h. Grid: reductions: slab of rows x panel of channels (BatchNormSlabs); elementwise passes:
// any share of the rows. Tile: four rows x one vector of channels; reductions keep one accumulator per
// channel in L1, where each visit
//   takes four rows.
// Bytes moved: every operand once. The second look of stats, at a block's squared deviations, finds it in
// cache. Accumulation: float32 in a block of rows, then in a slab; double across slabs.
#pragma once
#include "cpu/batch_norm_pool.h"
#include "cpu/batch_norm_rows.h"

namespace gconv {
namespace GCONV_ISA_NS {
namespace batch_norm {

// Mean and M2 of x - pivot in rows [begin, end) of channels [c0, c1), merged into the slab's, where `before`
// rows are already. The pivot, a row of x itself, keeps float32 means as small as the spread of the values.
template <typename T>
void stats_block(const Rows<T>& x, const float* pivot, int64_t begin, int64_t end, int64_t c0, int64_t c1,
                 int64_t before, float* mean, float* m2) {
  alignas(64) float centre[PANEL], off[PANEL], square[PANEL];
  const int64_t width = c1 - c0;
  std::fill(centre, centre + width, 0.f);
  std::fill(off, off + width, 0.f);
  std::fill(square, square + width, 0.f);
  for_rows(begin, end, [&](int64_t r, auto rows) {
    constexpr int ROWS = decltype(rows)::value;
    const auto p = x.template group<ROWS>(r, end, c0);
    for_channels(0, width, [&](int64_t c, int lanes) {
      const Vec at = load_lanes(pivot + c, lanes);
      const Vec sum = sum_rows<ROWS>([&](int i) {
        prefetch(p.next[i] + c);
        return sub(load_lanes(p.at[i] + c, lanes), at);
      });
      store_lanes(centre + c, add(load_lanes(centre + c, lanes), sum), lanes);
    });
  });
  const float count = static_cast<float>(end - begin);
  for_channels(0, width, [&](int64_t c, int lanes) {
    store_lanes(centre + c, mul(load_lanes(centre + c, lanes), set1(1.f / count)), lanes);
  });
  // Deviations from a rounded centre do not sum to 0: what is left corrects both moments.
  for_rows(begin, end, [&](int64_t r, auto rows) {
    constexpr int ROWS = decltype(rows)::value;
    const T* p[ROWS];
    for (int i = 0; i < ROWS; ++i) p[i] = x.row(r + i) + c0;
    for_channels(0, width, [&](int64_t c, int lanes) {
      const Vec at = load_lanes(pivot + c, lanes), centred = load_lanes(centre + c, lanes);
      Vec d[ROWS];
      for (int i = 0; i < ROWS; ++i) d[i] = sub(sub(load_lanes(p[i] + c, lanes), at), centred);
      const Vec sum = sum_rows<ROWS>([&](int i) { return d[i]; });
      const Vec sum2 = sum_rows<ROWS>([&](int i) { return mul(d[i], d[i]); });
      store_lanes(off + c, add(load_lanes(off + c, lanes), sum), lanes);
      store_lanes(square + c, add(load_lanes(square + c, lanes), sum2), lanes);
    });
  });
  for_channels(0, width, [&](int64_t c, int lanes) {
    const Vec shift = mul(load_lanes(off + c, lanes), set1(1.f / count));
    const Vec block_mean = add(load_lanes(centre + c, lanes), shift);
    const Vec block_m2 = sub(load_lanes(square + c, lanes), mul(mul(shift, shift), set1(count)));
    Vec slab_mean = block_mean, slab_m2 = block_m2;
    if (before > 0) {
      slab_mean = load_lanes(mean + c, lanes), slab_m2 = load_lanes(m2 + c, lanes);
      chan_update(static_cast<float>(before), slab_mean, slab_m2, count, block_mean, block_m2);
    }
    store_lanes(mean + c, slab_mean, lanes);
    store_lanes(m2 + c, slab_m2, lanes);
  });
}

// The passes take a null pointer of the storage type from with_dtype.
template <typename T>
void stats(T*, const BatchNormStatsParams& p, int64_t ith, int64_t nth) {
  const Rows<T> x(p.shape, p.x);
  for_slabs(
      p.shape, ith, nth,
      [&](const BatchNormSlabs& plan, int64_t slab, int64_t begin, int64_t end, int64_t c0, int64_t c1) {
        alignas(64) float pivot[PANEL];
        const T* first = x.row(0) + c0;
        for_channels(0, c1 - c0, [&](int64_t c, int lanes) {
          store_lanes(pivot + c, load_lanes(first + c, lanes), lanes);
        });
        if (slab == 0) std::copy(pivot, pivot + (c1 - c0), p.workspace + plan.slabs * 2 * p.shape.c + c0);
        float* mean = p.workspace + slab * 2 * p.shape.c + c0;
        float* m2 = mean + p.shape.c;
        for (int64_t r = begin; r < end; r += plan.block_rows)
          stats_block(x, pivot, r, std::min(r + plan.block_rows, end), c0, c1, r - begin, mean, m2);
      });
}

// What apply adds.
enum class Residual { none, plain, scaled };

template <typename T, Residual RESIDUAL, bool RELU>
void apply_rows(const BatchNormApplyParams& p, int64_t ith, int64_t nth) {
  const Rows<T> x(p.shape, p.x), residual(p.shape, p.residual), y(p.shape, p.y);
  const float *a = p.affine, *b = p.affine + p.shape.c;
  const float *scale = p.residual_affine, *shift = scale == nullptr ? nullptr : scale + p.shape.c;
  const int64_t rows = p.shape.n * p.shape.h * p.shape.w;
  // In place, the line that is written has just been read: to stream it then takes longer.
  const bool in_place = p.y.data == p.residual.data || p.y.data == p.x.data;
  const bool stream = !in_place && streams<T>(p.y, rows, p.shape.c);
  const Share share(rows, ith, nth);
  for (int64_t r = share.begin; r < share.end; ++r) {
    const auto in = x.template group<1>(r, share.end, 0);
    typename Rows<T>::template Group<1> more{};
    if constexpr (RESIDUAL != Residual::none) more = residual.template group<1>(r, share.end, 0);
    T* out = y.row(r);
    for_channels(0, p.shape.c, [&](int64_t c, int lanes) {
      prefetch(in.next[0] + c);
      Vec v = fma(load_lanes(a + c, lanes), load_lanes(in.at[0] + c, lanes), load_lanes(b + c, lanes));
      if constexpr (RESIDUAL != Residual::none) {
        prefetch(more.next[0] + c);
        Vec r = load_lanes(more.at[0] + c, lanes);
        if constexpr (RESIDUAL == Residual::scaled)
          r = fma(load_lanes(scale + c, lanes), r, load_lanes(shift + c, lanes));
        v = add(v, r);
      }
      if constexpr (RELU) v = relu(v);
      write(out + c, v, lanes, stream);
    });
  }
  if (stream) stream_end();
}

template <typename T, Residual RESIDUAL>
void apply_to(const BatchNormApplyParams& p, int64_t ith, int64_t nth) {
  p.relu ? apply_rows<T, RESIDUAL, true>(p, ith, nth) : apply_rows<T, RESIDUAL, false>(p, ith, nth);
}

template <typename T>
void apply(T*, const BatchNormApplyParams& p, int64_t ith, int64_t nth) {
  if (p.residual.data == nullptr)
    apply_to<T, Residual::none>(p, ith, nth);
  else if (p.residual_affine == nullptr)
    apply_to<T, Residual::plain>(p, ith, nth);
  else
    apply_to<T, Residual::scaled>(p, ith, nth);
}

// Where the ReLU's mask comes from.
enum class Mask { none, from_x, from_z };

template <Mask MASK, typename T>
GCONV_INLINE Vec masked(Vec dz, Vec x, const T* z, const float* a, const float* b, int64_t c, int lanes) {
  if constexpr (MASK == Mask::from_z)
    return relu_mask(dz, load_lanes(z + c, lanes));
  else if constexpr (MASK == Mask::from_x)
    return relu_mask(dz, fma(load_lanes(a + c, lanes), x, load_lanes(b + c, lanes)));
  else
    return dz;
}

// BRANCHES: 2 where another normalisation shares the gradient.
template <typename T, Mask MASK, bool WANT_G, int BRANCHES>
void bwd_reduce_slabs(const BatchNormBwdReduceParams& p, int64_t ith, int64_t nth) {
  constexpr int64_t BLOCK_ROWS = 64;  // summed in plain float32
  constexpr int SUMS = 1 + BRANCHES;  // sum g, and sum g*(x - mean) of each branch
  const Rows<T> dz(p.shape, p.dz), z(p.shape, p.z), g_out(p.shape, p.g);
  const Rows<T> x[2] = {Rows<T>(p.shape, p.main.x), Rows<T>(p.shape, p.other.x)};
  const int64_t channels = p.shape.c;
  const bool stream = WANT_G && streams<T>(p.g, p.shape.n * p.shape.h * p.shape.w, channels);
  for_slabs(p.shape, ith, nth,
            [&](const auto&, int64_t slab, int64_t begin, int64_t end, int64_t c0, int64_t c1) {
              alignas(64) float in_block[SUMS][PANEL];
              const int64_t width = c1 - c0;
              const float* mean[2] = {p.main.mean + c0, BRANCHES == 2 ? p.other.mean + c0 : nullptr};
              const float* a = MASK == Mask::from_x ? p.affine + c0 : nullptr;
              const float* b = MASK == Mask::from_x ? a + channels : nullptr;
              float* sums = p.workspace + slab * 2 * SUMS * channels + c0;
              for (int i = 0; i < 2 * SUMS; ++i)
                std::fill(sums + i * channels, sums + i * channels + width, 0.f);
              for (int64_t block = begin; block < end; block += BLOCK_ROWS) {
                for (auto& sum : in_block) std::fill(sum, sum + width, 0.f);
                for_rows(block, std::min(block + BLOCK_ROWS, end), [&](int64_t r, auto rows) {
                  constexpr int ROWS = decltype(rows)::value;
                  const auto dz_rows = dz.template group<ROWS>(r, end, c0);
                  typename Rows<T>::template Group<ROWS> x_rows[BRANCHES], z_rows{}, g_rows{};
                  for (int k = 0; k < BRANCHES; ++k) x_rows[k] = x[k].template group<ROWS>(r, end, c0);
                  if constexpr (MASK == Mask::from_z) z_rows = z.template group<ROWS>(r, end, c0);
                  if constexpr (WANT_G) g_rows = g_out.template group<ROWS>(r, end, c0);
                  for_channels(0, width, [&](int64_t c, int lanes) {
                    Vec g[ROWS], off[BRANCHES][ROWS];
                    for (int i = 0; i < ROWS; ++i) {
                      prefetch(dz_rows.next[i] + c);
                      if constexpr (MASK == Mask::from_z) prefetch(z_rows.next[i] + c);
                      Vec value[BRANCHES];
                      for (int k = 0; k < BRANCHES; ++k) {
                        prefetch(x_rows[k].next[i] + c);
                        value[k] = load_lanes(x_rows[k].at[i] + c, lanes);
                        off[k][i] = sub(value[k], load_lanes(mean[k] + c, lanes));
                      }
                      const Vec raw = load_lanes(dz_rows.at[i] + c, lanes);
                      g[i] = masked<MASK>(raw, value[0], z_rows.at[i], a, b, c, lanes);
                      if constexpr (WANT_G) write(g_rows.at[i] + c, g[i], lanes, stream);
                    }
                    float* sum_g = in_block[0] + c;
                    const Vec total = sum_rows<ROWS>([&](int i) { return g[i]; });
                    store_lanes(sum_g, add(load_lanes(sum_g, lanes), total), lanes);
                    for (int k = 0; k < BRANCHES; ++k) {
                      float* sum_gx = in_block[1 + k] + c;
                      store_lanes(sum_gx, sum_products<ROWS>(load_lanes(sum_gx, lanes), g, off[k]), lanes);
                    }
                  });
                });
                for_channels(0, width, [&](int64_t c, int lanes) {
                  for (int k = 0; k < SUMS; ++k)
                    add_exactly(sums + 2 * k * channels + c, sums + (2 * k + 1) * channels + c,
                                load_lanes(in_block[k] + c, lanes), lanes);
                });
              }
            });
  if (stream) stream_end();
}

template <typename T, Mask MASK>
void bwd_reduce_masked(const BatchNormBwdReduceParams& p, int64_t ith, int64_t nth) {
  if (p.other.x.data)
    p.g.data ? bwd_reduce_slabs<T, MASK, true, 2>(p, ith, nth)
             : bwd_reduce_slabs<T, MASK, false, 2>(p, ith, nth);
  else
    p.g.data ? bwd_reduce_slabs<T, MASK, true, 1>(p, ith, nth)
             : bwd_reduce_slabs<T, MASK, false, 1>(p, ith, nth);
}

template <typename T>
void bwd_reduce(T*, const BatchNormBwdReduceParams& p, int64_t ith, int64_t nth) {
  if (p.z.data)
    bwd_reduce_masked<T, Mask::from_z>(p, ith, nth);
  else if (p.affine)
    bwd_reduce_masked<T, Mask::from_x>(p, ith, nth);
  else
    bwd_reduce_masked<T, Mask::none>(p, ith, nth);
}

template <typename T, Mask MASK, bool WANT_G>
void bwd_apply_rows(const BatchNormBwdApplyParams& p, int64_t ith, int64_t nth) {
  const Rows<T> dz(p.shape, p.dz), x(p.shape, p.x), z(p.shape, p.z), dx(p.shape, p.dx), g_out(p.shape, p.g);
  const int64_t channels = p.shape.c;
  const float *slope = p.finish, *tilt = slope + channels, *level = tilt + channels, *mean = level + channels;
  const float *a = mean + channels, *b = a + channels;
  const int64_t rows = p.shape.n * p.shape.h * p.shape.w;
  const bool stream = streams<T>(p.dx, rows, channels) && (!WANT_G || streams<T>(p.g, rows, channels));
  const Share share(rows, ith, nth);
  for (int64_t r = share.begin; r < share.end; ++r) {
    const auto dz_row = dz.template group<1>(r, share.end, 0), x_row = x.template group<1>(r, share.end, 0);
    typename Rows<T>::template Group<1> z_row{};
    if constexpr (MASK == Mask::from_z) z_row = z.template group<1>(r, share.end, 0);
    T* dx_row = dx.row(r);
    T* g_row = WANT_G ? g_out.row(r) : nullptr;
    for_channels(0, channels, [&](int64_t c, int lanes) {
      prefetch(dz_row.next[0] + c);
      prefetch(x_row.next[0] + c);
      if constexpr (MASK == Mask::from_z) prefetch(z_row.next[0] + c);
      const Vec value = load_lanes(x_row.at[0] + c, lanes), dz_value = load_lanes(dz_row.at[0] + c, lanes);
      const Vec g = masked<MASK>(dz_value, value, z_row.at[0], a, b, c, lanes);
      const Vec rest = fma(load_lanes(tilt + c, lanes), sub(value, load_lanes(mean + c, lanes)),
                           load_lanes(level + c, lanes));
      write(dx_row + c, fma(load_lanes(slope + c, lanes), g, rest), lanes, stream);
      if constexpr (WANT_G) write(g_row + c, g, lanes, stream);
    });
  }
  if (stream) stream_end();
}

template <typename T, Mask MASK>
void bwd_apply_masked(const BatchNormBwdApplyParams& p, int64_t ith, int64_t nth) {
  p.g.data ? bwd_apply_rows<T, MASK, true>(p, ith, nth) : bwd_apply_rows<T, MASK, false>(p, ith, nth);
}

template <typename T>
void bwd_apply(T*, const BatchNormBwdApplyParams& p, int64_t ith, int64_t nth) {
  if (p.z.data)
    bwd_apply_masked<T, Mask::from_z>(p, ith, nth);
  else
    bwd_apply_masked<T, Mask::from_x>(p, ith, nth);
}

constexpr BatchNormTable TABLE = {
    [](const BatchNormStatsParams& p, int64_t ith, int64_t nth) {
      with_dtype(p.dtype, [&](auto* type) { stats(type, p, ith, nth); });
    },
    [](const BatchNormApplyParams& p, int64_t ith, int64_t nth) {
      with_dtype(p.dtype, [&](auto* type) { apply(type, p, ith, nth); });
    },
    [](const BatchNormBwdReduceParams& p, int64_t ith, int64_t nth) {
      with_dtype(p.dtype, [&](auto* type) { bwd_reduce(type, p, ith, nth); });
    },
    [](const BatchNormBwdApplyParams& p, int64_t ith, int64_t nth) {
      with_dtype(p.dtype, [&](auto* type) { bwd_apply(type, p, ith, nth); });
    },
    [](const BatchNormPoolParams& p, int64_t ith, int64_t nth) {
      with_dtype(p.dtype, [&](auto* type) { pool(type, p, ith, nth); });
    },
    [](const BatchNormPoolBwdParams& p, int64_t ith, int64_t nth) {
      with_dtype(p.dtype, [&](auto* type) { pool_bwd(type, p, ith, nth); });
    },
};

}  // namespace batch_norm
}  // namespace GCONV_ISA_NS
}  // namespace gconv
