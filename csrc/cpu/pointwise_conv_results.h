// What a pass does to a tile's results while they are in L1, compiled once per instruction set: its epilogue,
// statistics or mask, and the stores.
#pragma once
#include "pointwise_conv_plan.h"

namespace gconv {
namespace GCONV_ISA_NS {
namespace pointwise {

// A tile's pixels where they are written, and where an epilogue reads.
struct TileResult {
  int64_t pixels;
  int64_t output_at[POINT_PIXELS], residual_at[POINT_PIXELS], mask_at[POINT_PIXELS];

  TileResult(const Pass& p, int64_t first, int64_t count) : pixels(count) {
    p.output_at.offsets(first, pixels, output_at);
    if (p.residual.data != nullptr) p.residual_at.offsets(first, pixels, residual_at);
    if (p.mask_act != nullptr) p.mask_at.offsets(first, pixels, mask_at);
  }
};

// Past the caches or into them.
template <bool STREAM, typename T>
GCONV_INLINE void leave(T* at, Vec y, int lanes) {
  if constexpr (STREAM)
    stream_as(at, y);
  else
    store_lanes(at, y, lanes);
}

// Writes one vector of a tile, or two neighbours: their 16-bit values are one cache line, which has to leave
// as one where it goes past the caches.
template <typename T, int VECTORS, bool AFFINE, bool RESIDUAL>
void store_results(const Pass& p, const TileResult& r, const float* values, int64_t step, int64_t channel,
                   int lanes) {
  T* out = static_cast<T*>(p.output.data) + channel;
  const T* residual = RESIDUAL ? static_cast<const T*>(p.residual.data) + channel : nullptr;
  if (VECTORS == 2) lanes = LANES;  // two are whole, and the compiler drops what a tail needs
  Vec scale[VECTORS], shift[VECTORS];
  GCONV_UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    scale[v] = AFFINE ? load_lanes(p.affine + channel + v * LANES, lanes) : zero();
    shift[v] = AFFINE ? load_lanes(p.affine + p.output_channels + channel + v * LANES, lanes) : zero();
  }
  const bool last_relu = p.relu, past_caches = p.stream && lanes == LANES;
  const auto write = [&](auto stream) GCONV_LAMBDA {
    for (int64_t i = 0; i < r.pixels; ++i) {
      GCONV_UNROLL
      for (int v = 0; v < VECTORS; ++v) {
        Vec y = load(values + v * step + i * LANES);
        if constexpr (AFFINE) y = fma(scale[v], y, shift[v]);
        if constexpr (RESIDUAL) y = add(y, load_lanes(residual + r.residual_at[i] + v * LANES, lanes));
        if (last_relu) y = relu(y);
        leave<decltype(stream)::value>(out + r.output_at[i] + v * LANES, y, lanes);
      }
    }
  };
  past_caches ? write(std::true_type()) : write(std::false_type());
}

// Results as they are, and their moments.
template <typename T, int VECTORS>
void store_counted(const Pass& p, const TileResult& r, const float* values, int64_t step, int64_t channel,
                   int lanes, Moments* moments) {
  T* out = static_cast<T*>(p.output.data) + channel;
  if (VECTORS == 2) lanes = LANES;
  const bool past_caches = p.stream && lanes == LANES;
  const auto result = [&](int v, int64_t i) GCONV_LAMBDA { return load(values + v * step + i * LANES); };
  Vec pivot[VECTORS], sum[VECTORS], squares[VECTORS];
  GCONV_UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    moments[v].begin_row(r.pixels, [&](int64_t i) GCONV_LAMBDA { return rounded_to(out, result(v, i)); });
    pivot[v] = moments[v].pivot;
    sum[v] = squares[v] = zero();
  }
  const auto write = [&](auto stream) GCONV_LAMBDA {
    for (int64_t i = 0; i < r.pixels; ++i) {
      GCONV_UNROLL
      for (int v = 0; v < VECTORS; ++v) {
        const Vec y = result(v, i), d = sub(rounded_to(out, y), pivot[v]);
        leave<decltype(stream)::value>(out + r.output_at[i] + v * LANES, y, lanes);
        sum[v] = add(sum[v], d);
        squares[v] = fma(d, d, squares[v]);
      }
    }
  };
  past_caches ? write(std::true_type()) : write(std::false_type());
  GCONV_UNROLL
  for (int v = 0; v < VECTORS; ++v) moments[v].end_row(r.pixels, sum[v], squares[v]);
}

// g = dx where the prologue's ReLU passed, stored, or a*g added to the output; and the sums of g and g*xhat,
// of g as it was stored or, added, before any rounding. Of one vector or two.
template <typename T, int VECTORS, bool ADD>
void store_masked(const Pass& p, const TileResult& r, const float* values, int64_t step, int64_t channel,
                  int lanes, CompensatedSum (*sums)[2]) {
  T* out = static_cast<T*>(p.output.data) + channel;
  const T* x = static_cast<const T*>(p.mask_x.data) + channel;
  if (VECTORS == 2) lanes = LANES;
  const bool past_caches = !ADD && p.stream && lanes == LANES;
  Vec act[VECTORS][4], sum[VECTORS], deviations[VECTORS];  // act: a, b, mean, rstd
  GCONV_UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    GCONV_UNROLL
    for (int i = 0; i < 4; ++i)
      act[v][i] = load_lanes(p.mask_act + i * p.output_channels + channel + v * LANES, lanes);
    sum[v] = deviations[v] = zero();
  }
  const auto pixels = [&](auto stream) GCONV_LAMBDA {
    for (int64_t i = 0; i < r.pixels; ++i) {
      GCONV_UNROLL
      for (int v = 0; v < VECTORS; ++v) {
        const Vec raw = load_lanes(x + r.mask_at[i] + v * LANES, lanes);
        Vec g = relu_mask(load(values + v * step + i * LANES), fma(act[v][0], raw, act[v][1]));
        T* at = out + r.output_at[i] + v * LANES;
        if constexpr (ADD) {
          store_lanes(at, fma(act[v][0], g, load_lanes(at, lanes)), lanes);
        } else {
          leave<decltype(stream)::value>(at, g, lanes);
          g = rounded_to(x, g);
        }
        sum[v] = add(sum[v], g);
        deviations[v] = fma(g, sub(raw, act[v][2]), deviations[v]);
      }
    }
  };
  past_caches ? pixels(std::true_type()) : pixels(std::false_type());
  GCONV_UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    sums[v][0].add(sum[v]);
    sums[v][1].add(mul(deviations[v], act[v][3]));
  }
}

// The pixels between those of an input gradient's [first, first + pixels): 0, or the residual.
template <typename T>
void fill_gaps(const Pass& p, int64_t first, int64_t pixels, int64_t first_vector, int64_t vectors) {
  const PointwiseConvShape& s = p.shape;
  const int64_t channel = first_vector * LANES;
  const int64_t channels = std::min(p.output_channels - channel, vectors * LANES);
  const auto fill = [&](int64_t image, int64_t h, int64_t w) {
    T* out = static_cast<T*>(p.output.data) + image * p.output.stride_n + h * p.output.stride_h +
             w * p.output.stride_w + channel;
    const T* residual = nullptr;
    if (p.residual.data != nullptr)
      residual = static_cast<const T*>(p.residual.data) + image * p.residual.stride_n +
                 h * p.residual.stride_h + w * p.residual.stride_w + channel;
    for (int64_t c = 0; c < channels; c += LANES) {
      const int lanes = static_cast<int>(std::min<int64_t>(LANES, channels - c));
      const Vec value = residual == nullptr ? zero() : load_lanes(residual + c, lanes);
      if (p.stream && lanes == LANES)
        stream_as(out + c, value);
      else
        store_lanes(out + c, value, lanes);
    }
  };
  for (int64_t i = first; i < first + pixels; ++i) {
    const int64_t image = i / (s.oh * s.ow), row = i / s.ow % s.oh * s.stride_h,
                  column = i % s.ow * s.stride_w;
    for (int64_t h = row; h < std::min(s.h, row + s.stride_h); ++h)
      for (int64_t w = column; w < std::min(s.w, column + s.stride_w); ++w)
        if (h != row || w != column) fill(image, h, w);
  }
}

// One vector of a task, or two, `step` floats apart; `channel` is the first of the first.
template <typename T, int VECTORS>
void store_some(const Pass& p, const TileResult& r, const float* values, int64_t step, int64_t channel,
                int lanes, TaskSums& sums, int64_t v) {
  if (p.moments) return store_counted<T, VECTORS>(p, r, values, step, channel, lanes, &sums.moments[v]);
  if (p.mask_act != nullptr)
    return p.add ? store_masked<T, VECTORS, true>(p, r, values, step, channel, lanes, &sums.gradients[v])
                 : store_masked<T, VECTORS, false>(p, r, values, step, channel, lanes, &sums.gradients[v]);
  const bool residual = p.residual.data != nullptr;
  if (p.affine != nullptr)
    residual ? store_results<T, VECTORS, true, true>(p, r, values, step, channel, lanes)
             : store_results<T, VECTORS, true, false>(p, r, values, step, channel, lanes);
  else
    residual ? store_results<T, VECTORS, false, true>(p, r, values, step, channel, lanes)
             : store_results<T, VECTORS, false, false>(p, r, values, step, channel, lanes);
}

// Vectors [v, v + count) of a task that begins at first_vector.
template <typename T>
void store_vectors(const Pass& p, const TileResult& r, const float* values, int64_t step,
                   int64_t first_vector, int64_t v, int64_t count, TaskSums& sums) {
  for (const int64_t end = v + count; v < end;) {
    const int64_t channel = (first_vector + v) * LANES;
    const bool two = v + 1 < end && channel + 2 * LANES <= p.output_channels;
    if (two)
      store_some<T, 2>(p, r, values, step, channel, LANES, sums, v);
    else
      store_some<T, 1>(p, r, values, step, channel,
                       static_cast<int>(std::min<int64_t>(LANES, p.output_channels - channel)), sums, v);
    v += 1 + two, values += (1 + two) * step;
  }
}

// What the epilogues of `count` vectors will read, a share of the pixels at a time.
template <typename T>
GCONV_INLINE void fetch_epilogue(const Pass& p, const TileResult& r, int64_t vector, int64_t count,
                                 int64_t ith, int64_t nth) {
  constexpr int64_t LINE = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t at = vector * LANES, end = std::min(p.output_channels, at + count * LANES);
  const Share share(r.pixels, ith, nth);
  const auto fetch = [&](const Nhwc& t, const int64_t* pixels_at) GCONV_LAMBDA {
    for (int64_t i = share.begin; i < share.end; ++i)
      for (int64_t c = at; c < end; c += LINE)
        __builtin_prefetch(static_cast<const T*>(t.data) + pixels_at[i] + c, 0, 2);
  };
  if (p.residual.data != nullptr) fetch(p.residual, r.residual_at);
  if (p.mask_act == nullptr) return;
  fetch(p.mask_x, r.mask_at);
  if (p.add) fetch(p.output, r.output_at);
}

inline void store_sums(const Pass& p, int64_t block, int64_t first_vector, TaskSums& sums) {
  if (p.moments || p.mask_act != nullptr)
    sums.store_partials(p.partials + block * 2 * p.output_channels, p.output_channels, first_vector,
                        p.moments);
}

}  // namespace pointwise
}  // namespace GCONV_ISA_NS
}  // namespace gconv
