// The passes of batch_norm before an average pool of 2x2, compiled once per instruction set.
//
// Computes: pool and pool_bwd of batch_norm.h.
// Grid: pool: any share of the squares; pool_bwd: slab of squares x panel of channels (BatchNormSlabs).
// Tile: the four pixels of a square x one vector of channels; the sums as in bwd_reduce.
// Bytes moved: every operand once. Accumulation: float32 in a block, then without loss in a slab; double
// across slabs.
#pragma once
#include "cpu/batch_norm_rows.h"

namespace gconv {
namespace GCONV_ISA_NS {
namespace batch_norm {

// An activation of size [n, h, w] as the squares of its pooled shape, one to a row.
template <typename T>
class Squares : public Rows<T> {
 public:
  static constexpr int PIXELS = 4;
  Squares(const BatchNormShape& pooled, const Nhwc& x)
      : Rows<T>(pooled, {x.data, x.stride_n, 2 * x.stride_h, 2 * x.stride_w}),
        offset_{0, x.stride_w, x.stride_h, x.stride_h + x.stride_w} {}
  // Where its pixels lie, from the first.
  GCONV_INLINE int64_t offset(int pixel) const { return offset_[pixel]; }

 private:
  int64_t offset_[PIXELS];
};

// Loads a vector of a square's pixels and what the affine makes of them.
template <typename T>
GCONV_INLINE void load_square(const Squares<T>& x, const typename Rows<T>::template Group<1>& at, int64_t c,
                              int lanes, Vec a, Vec b, Vec (&raw)[4], Vec (&value)[4]) {
  for (int i = 0; i < 4; ++i) {
    prefetch(at.next[0] + x.offset(i) + c);
    raw[i] = load_lanes(at.at[0] + x.offset(i) + c, lanes);
    value[i] = fma(a, raw[i], b);
  }
}

GCONV_INLINE Vec pooled(const Vec (&value)[4]) {
  return mul(sum_rows<4>([&](int i) { return relu(value[i]); }), set1(0.25f));
}

template <typename T>
void pool(T*, const BatchNormPoolParams& p, int64_t ith, int64_t nth) {
  const BatchNormShape shape = p.pooled();
  const Squares<T> x(shape, p.x);
  const Rows<T> y(shape, p.y);
  const float *a = p.affine, *b = a + shape.c;
  const int64_t squares = shape.n * shape.h * shape.w;
  const bool stream = streams<T>(p.y, squares, shape.c);
  const Share share(squares, ith, nth);
  for (int64_t r = share.begin; r < share.end; ++r) {
    const auto in = x.template group<1>(r, share.end, 0);
    T* out = y.row(r);
    for_channels(0, shape.c, [&](int64_t c, int lanes) {
      Vec raw[4], value[4];
      load_square(x, in, c, lanes, load_lanes(a + c, lanes), load_lanes(b + c, lanes), raw, value);
      write(out + c, pooled(value), lanes, stream);
    });
  }
  if (stream) stream_end();
}

// Zeros in the row and column that belong to no square, of those that border on this one.
template <typename T>
void clear_dropped(const BatchNormPoolBwdParams& p, const BatchNormShape& pooled, int64_t square, int64_t c0,
                   int64_t c1, bool stream) {
  const int64_t w = square % pooled.w, line = square / pooled.w, h = line % pooled.h, n = line / pooled.h;
  const int64_t bottom = h + 1 == pooled.h ? p.shape.h : 2 * h + 2;
  const int64_t right = w + 1 == pooled.w ? p.shape.w : 2 * w + 2;
  for (int64_t y = 2 * h; y < bottom; ++y)
    for (int64_t x = 2 * w; x < right; ++x) {
      if (y < 2 * h + 2 && x < 2 * w + 2) continue;
      T* out = static_cast<T*>(p.dx.data) + n * p.dx.stride_n + y * p.dx.stride_h + x * p.dx.stride_w;
      for_channels(c0, c1, [&](int64_t c, int lanes) { write(out + c, zero(), lanes, stream); });
    }
}

template <typename T, bool WANT_Y>
void pool_bwd_slabs(const BatchNormPoolBwdParams& p, int64_t ith, int64_t nth) {
  constexpr int64_t BLOCK_SQUARES = 16;  // summed in plain float32
  const BatchNormShape shape = p.pooled();
  const Squares<T> x(shape, p.x), dx(shape, p.dx);
  const Rows<T> dy(shape, p.dy), y_out(shape, p.y);
  const int64_t channels = shape.c;
  const bool stream = streams<T>(p.dx, p.shape.n * p.shape.h * p.shape.w, channels);
  const bool stream_y = WANT_Y && streams<T>(p.y, shape.n * shape.h * shape.w, channels);
  const bool dropped = p.shape.h % 2 != 0 || p.shape.w % 2 != 0;
  for_slabs(shape, ith, nth,
            [&](const auto&, int64_t slab, int64_t begin, int64_t end, int64_t c0, int64_t c1) {
              alignas(64) float in_block[2][PANEL];
              const int64_t width = c1 - c0;
              const float *a = p.act + c0, *b = a + channels, *mean = b + channels;
              float* sums = p.workspace + slab * 4 * channels + c0;
              for (int i = 0; i < 4; ++i) std::fill(sums + i * channels, sums + i * channels + width, 0.f);
              for (int64_t block = begin; block < end; block += BLOCK_SQUARES) {
                for (auto& sum : in_block) std::fill(sum, sum + width, 0.f);
                for (int64_t r = block; r < std::min(block + BLOCK_SQUARES, end); ++r) {
                  const auto in = x.template group<1>(r, end, c0), from = dy.template group<1>(r, end, c0);
                  T* out = dx.row(r) + c0;
                  T* y = WANT_Y ? y_out.row(r) + c0 : nullptr;
                  for_channels(0, width, [&](int64_t c, int lanes) {
                    prefetch(from.next[0] + c);
                    const Vec scale = load_lanes(a + c, lanes), centre = load_lanes(mean + c, lanes);
                    const Vec quarter = mul(load_lanes(from.at[0] + c, lanes), set1(0.25f));
                    Vec raw[4], value[4], g[4], off[4];
                    load_square(x, in, c, lanes, scale, load_lanes(b + c, lanes), raw, value);
                    for (int i = 0; i < 4; ++i) {
                      g[i] = relu_mask(quarter, value[i]);
                      off[i] = sub(raw[i], centre);
                      write(out + dx.offset(i) + c, mul(scale, g[i]), lanes, stream);
                    }
                    if constexpr (WANT_Y) write(y + c, pooled(value), lanes, stream_y);
                    float *sum_g = in_block[0] + c, *sum_gx = in_block[1] + c;
                    const Vec total = sum_rows<4>([&](int i) { return g[i]; });
                    store_lanes(sum_g, add(load_lanes(sum_g, lanes), total), lanes);
                    store_lanes(sum_gx, sum_products<4>(load_lanes(sum_gx, lanes), g, off), lanes);
                  });
                  if (dropped) clear_dropped<T>(p, shape, r, c0, c1, stream);
                }
                for_channels(0, width, [&](int64_t c, int lanes) {
                  for (int k = 0; k < 2; ++k)
                    add_exactly(sums + 2 * k * channels + c, sums + (2 * k + 1) * channels + c,
                                load_lanes(in_block[k] + c, lanes), lanes);
                });
              }
            });
  if (stream || stream_y) stream_end();
}

template <typename T>
void pool_bwd(T*, const BatchNormPoolBwdParams& p, int64_t ith, int64_t nth) {
  p.y.data ? pool_bwd_slabs<T, true>(p, ith, nth) : pool_bwd_slabs<T, false>(p, ith, nth);
}

}  // namespace batch_norm
}  // namespace GCONV_ISA_NS
}  // namespace gconv
