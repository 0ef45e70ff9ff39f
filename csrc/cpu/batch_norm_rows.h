// How the passes of batch_norm walk over activations: rows (pixels) and their channels, slabs of rows, sums.
#pragma once
#include "cpu/batch_norm_table.h"
#include "cpu/vec.h"

namespace gconv {
namespace GCONV_ISA_NS {
namespace batch_norm {

// Into L2: in front of L1 a core has few line buffers, which loads that miss need too.
GCONV_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// The rows (pixels) of an activation, numbered as if they lay in one line. Where one stride serves all of
// them no division is needed to find one; slices and expanded tensors mostly keep that property, crops do
// not.
template <typename T>
class Rows {
 public:
  Rows(const BatchNormShape& s, const Nhwc& x)
      : data_(static_cast<T*>(x.data)),
        h_(s.h),
        w_(s.w),
        n_stride_(x.stride_n),
        h_stride_(x.stride_h),
        w_stride_(x.stride_w),
        ahead_(std::max<int64_t>(4, AHEAD_BYTES / (s.c * static_cast<int64_t>(sizeof(T))))) {
    const int64_t sizes[3] = {s.w, s.h, s.n}, strides[3] = {x.stride_w, x.stride_h, x.stride_n};
    int64_t count = 1;
    for (int i = 0; i < 3; ++i) {
      if (sizes[i] == 1) continue;  // whatever its stride, it is never taken
      if (count == 1)
        row_stride_ = strides[i];
      else if (strides[i] != count * row_stride_)
        one_stride_ = false;
      count *= sizes[i];
    }
  }
  bool absent() const { return data_ == nullptr; }
  GCONV_INLINE T* row(int64_t r) const {
    if (one_stride_) return data_ + r * row_stride_;
    const int64_t line = r / w_;
    return data_ + (line / h_) * n_stride_ + (line % h_) * h_stride_ + (r % w_) * w_stride_;
  }

  // Channel c of ROWS rows from r on, and of those AHEAD_BYTES further: what to fetch while these are worked
  // on.
  template <int ROWS>
  struct Group {
    T *at[ROWS], *next[ROWS];
  };
  template <int ROWS>
  GCONV_INLINE Group<ROWS> group(int64_t r, int64_t end, int64_t c) const {
    Group<ROWS> g;
    for (int i = 0; i < ROWS; ++i) {
      g.at[i] = row(r + i) + c;
      g.next[i] = row(std::min(r + i + ahead_, end - 1)) + c;
    }
    return g;
  }
  static constexpr int64_t AHEAD_BYTES = 8 * 1024;

 private:
  T* data_;
  int64_t h_, w_, n_stride_, h_stride_, w_stride_;
  int64_t row_stride_ = 0;
  int64_t ahead_;  // rows
  bool one_stride_ = true;
};

// Calls f(c, lanes) for every vector of channels in [begin, end); lanes is LANES except perhaps in the last.
template <typename F>
GCONV_INLINE void for_channels(int64_t begin, int64_t end, F&& f) {
  int64_t c = begin;
  for (; c + LANES <= end; c += LANES) f(c, LANES);
  if (c < end) f(c, static_cast<int>(end - c));
}

// Calls f(first row, number of rows) for every four rows in [begin, end), then for each of the rest.
template <typename F>
GCONV_INLINE void for_rows(int64_t begin, int64_t end, F&& f) {
  int64_t r = begin;
  for (; r + 4 <= end; r += 4) f(r, std::integral_constant<int, 4>());
  for (; r < end; ++r) f(r, std::integral_constant<int, 1>());
}

// The sum of f(0) ... f(ROWS - 1), as a tree.
template <int ROWS, typename F>
GCONV_INLINE Vec sum_rows(F&& f) {
  if constexpr (ROWS == 1)
    return f(0);
  else
    return add(add(f(0), f(1)), add(f(2), f(3)));
}

// s + a[0]*b[0] + ... + a[ROWS - 1]*b[ROWS - 1], as a tree. Which product joins which sum is said here: left
// to the compiler it would differ between kernels that must agree.
template <int ROWS>
GCONV_INLINE Vec sum_products(Vec s, const Vec* a, const Vec* b) {
  if constexpr (ROWS == 1)
    return fma(a[0], b[0], s);
  else
    return add(s, add(fma(a[0], b[0], mul(a[1], b[1])), fma(a[2], b[2], mul(a[3], b[3]))));
}

constexpr int64_t PANEL = BatchNormSlabs::PANEL;

// Calls f(slab, first row, end row, first channel, end channel) for the share of the slabs x panels.
template <typename F>
GCONV_INLINE void for_slabs(const BatchNormShape& shape, int64_t ith, int64_t nth, F&& f) {
  const BatchNormSlabs plan(shape);
  const Share share(plan.slabs * plan.panels, ith, nth);
  for (int64_t unit = share.begin; unit < share.end; ++unit) {
    const int64_t slab = unit / plan.panels, begin = slab * plan.slab_rows, c0 = unit % plan.panels * PANEL;
    const int64_t end = begin + plan.rows_of(slab), c1 = std::min(c0 + PANEL, shape.c);
    f(plan, slab, begin, end, c0, c1);
  }
}

// Stores a vector of an output; `stream` says whether the whole of it goes past the caches.
template <typename T>
GCONV_INLINE void write(T* p, Vec v, int lanes, bool stream) {
  if (stream && lanes == LANES)
    stream_as(p, v);
  else
    store_lanes(p, v, lanes);
}

// Adds b to the sum held in high + low without loss (Knuth's two-sum).
GCONV_INLINE void add_exactly(float* high, float* low, Vec b, int lanes) {
  const Vec a = load_lanes(high, lanes), sum = add(a, b), b_seen = sub(sum, a);
  const Vec lost = add(sub(a, sub(sum, b_seen)), sub(b, b_seen));
  store_lanes(high, sum, lanes);
  store_lanes(low, add(load_lanes(low, lanes), lost), lanes);
}

}  // namespace batch_norm
}  // namespace GCONV_ISA_NS
}  // namespace gconv
