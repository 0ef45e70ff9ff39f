// What a convolution finds out about its results while they are in L1: the batch statistics of a forward, the
// two sums of an input gradient. Each task leaves one partial result per channel; they are merged in order.
#pragma once
#include "conv_source.h"

namespace gconv {
namespace GCONV_ISA_NS {

// Count, mean and M2 of one vector's values. Rows come with their own moments (row_moments), or are summed up
// about a pivot, the mean of the first of them, which is near enough to the others' for little to cancel;
// after RUN values the next row gives a new one.
struct Moments {
  static constexpr float RUN = 128;
  float count;
  Vec mean, m2;
  float run;  // values about the pivot
  Vec pivot, sum, squares;

  GCONV_INLINE void reset() {
    mean = m2 = sum = squares = zero();
    count = run = 0;
  }
  GCONV_INLINE void merge(float n, Vec other_mean, Vec other_m2) {
    chan_update(count, mean, m2, n, other_mean, other_m2);
    count += n;
  }
  // Before a row of pixels: value(w) is one of them, as stored.
  template <typename Pixels, typename Value>
  GCONV_INLINE void begin_row(Pixels pixels, const Value& value) {
    if (run >= RUN) end_run();
    if (run > 0) return;
    Vec total = value(0);
    for (int64_t w = 1; w < pixels; ++w) total = add(total, value(w));
    pivot = mul(total, set1(1.0f / static_cast<float>(pixels)));
  }
  // After it: the sums of its deviations from the pivot.
  GCONV_INLINE void end_row(int64_t pixels, Vec row_sum, Vec row_squares) {
    sum = add(sum, row_sum);
    squares = add(squares, row_squares);
    run += static_cast<float>(pixels);
  }
  template <typename Pixels, typename Value>
  GCONV_INLINE void add_row(Pixels pixels, const Value& value) {
    begin_row(pixels, value);
    Vec row_sum = zero(), row_squares = zero();
    for (int64_t w = 0; w < pixels; ++w) {
      const Vec d = sub(value(w), pivot);
      row_sum = add(row_sum, d);
      row_squares = fma(d, d, row_squares);
    }
    end_row(pixels, row_sum, row_squares);
  }
  // Before the moments are read.
  void end_run() {
    if (run == 0) return;
    const Vec off = mul(sum, set1(1.0f / run));
    merge(run, add(pivot, off), relu(sub(squares, mul(sum, off))));
    sum = squares = zero();
    run = 0;
  }
};

// Sum of value(w) over a row of pixels, as four sums side by side: a quarter of the latency, and of the
// terms.
template <typename Value>
GCONV_INLINE Vec sum_pixels(int64_t pixels, const Value& value) {
  Vec part[4] = {zero(), zero(), zero(), zero()};
  int64_t w = 0;
  for (; w + 4 <= pixels; w += 4)
    for (int i = 0; i < 4; ++i) part[i] = add(part[i], value(w + i));
  for (; w < pixels; ++w) part[0] = add(part[0], value(w));
  return add(add(part[0], part[1]), add(part[2], part[3]));
}

// Adds one vector's pixels, [pixels][LANES]: two passes over the values as they were stored.
template <typename T>
void row_moments(const float* row, int64_t pixels, Moments* moments) {
  const T* storage = nullptr;
  const Vec per_pixel = set1(1.0f / static_cast<float>(pixels));
  const auto value = [&](int64_t w) GCONV_LAMBDA { return rounded_to(storage, load(row + w * LANES)); };
  const Vec mean = mul(sum_pixels(pixels, value), per_pixel);
  const Vec rest = sum_pixels(pixels, [&](int64_t w) GCONV_LAMBDA { return sub(value(w), mean); });
  const Vec m2 = sum_pixels(pixels, [&](int64_t w) GCONV_LAMBDA {
    const Vec d = sub(value(w), mean);
    return mul(d, d);
  });
  // The rounding of the mean leaves a small sum of deviations: Chan, Golub & LeVeque's correction.
  const Vec correction = mul(rest, per_pixel);
  moments->merge(static_cast<float>(pixels), add(mean, correction), sub(m2, mul(rest, correction)));
}

// What a task finds out about its vectors, for the merge.
struct TaskSums {
  int64_t vectors;
  Moments moments[MOST_VECTORS];
  CompensatedSum gradients[MOST_VECTORS][2];

  explicit TaskSums(int64_t count) : vectors(count) {
    for (int64_t v = 0; v < vectors; ++v) {
      moments[v].reset();
      gradients[v][0].reset();
      gradients[v][1].reset();
    }
  }
  // Into [2][channels]: (mean, M2) of a forward, else the two sums.
  void store_partials(float* partial, int64_t channels, int64_t first_vector, bool statistics) {
    for (int64_t v = 0; v < vectors; ++v) {
      moments[v].end_run();
      const int64_t channel = (first_vector + v) * LANES;
      const int lanes = static_cast<int>(std::min<int64_t>(LANES, channels - channel));
      store_lanes(partial + channel, statistics ? moments[v].mean : gradients[v][0].total, lanes);
      store_lanes(partial + channels + channel, statistics ? moments[v].m2 : gradients[v][1].total, lanes);
    }
  }
};

constexpr int64_t MERGED_CHANNELS = 64;  // merged together: partial results lie channels side by side

// Chan's merge of `count` tasks' (mean, M2) in order, in float64; task i saw pixels(i) values per channel.
template <typename Pixels>
void merge_moments(const float* partials, int64_t count, int64_t channels, const Pixels& pixels, float* mean,
                   float* var, int64_t ith, int64_t nth) {
  const Share share(channels, ith, nth);
  for (int64_t first = share.begin; first < share.end; first += MERGED_CHANNELS) {
    const int64_t block = std::min(MERGED_CHANNELS, share.end - first);
    double seen = 0, merged[MERGED_CHANNELS] = {}, m2[MERGED_CHANNELS] = {};
    for (int64_t i = 0; i < count; ++i) {
      const double here = static_cast<double>(pixels(i));
      const double total = seen + here, weight = here / total, between = seen * weight;
      const float* partial_mean = partials + i * 2 * channels + first;
      const float* partial_m2 = partial_mean + channels;
      for (int64_t c = 0; c < block; ++c) {
        const double delta = partial_mean[c] - merged[c];
        merged[c] += delta * weight;
        m2[c] += partial_m2[c] + delta * delta * between;
      }
      seen = total;
    }
    const bool empty = seen == 0;
    for (int64_t c = 0; c < block; ++c) {
      mean[first + c] = empty ? std::nanf("") : static_cast<float>(merged[c]);
      var[first + c] = empty ? std::nanf("") : static_cast<float>(m2[c] / seen);
    }
  }
}

// Sums `count` tasks' `floats` partial sums in order, in float64.
inline void merge_sums(const float* partials, int64_t count, int64_t floats, float* sums, int64_t ith,
                       int64_t nth) {
  const Share share(floats, ith, nth);
  for (int64_t first = share.begin; first < share.end; first += MERGED_CHANNELS) {
    const int64_t block = std::min(MERGED_CHANNELS, share.end - first);
    double total[MERGED_CHANNELS] = {};
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < block; ++c) total[c] += partials[i * floats + first + c];
    for (int64_t c = 0; c < block; ++c) sums[first + c] = static_cast<float>(total[c]);
  }
}

}  // namespace GCONV_ISA_NS
}  // namespace gconv
