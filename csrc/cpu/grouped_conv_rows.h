// Packing of one image row for the grouped_conv kernels: to float32, prologue applied, padding zero.
#pragma once
#include <type_traits>

#include "grouped_conv.h"
#include "vec.h"

namespace gconv {
namespace GCONV_ISA_NS {

enum class Prologue {
  none,
  act,     // relu(a*x + b), coef = [2, C]
  finish,  // A*(dy*[not a*y + b <= 0]) + B*(y - mean) + C, coef = [6, C]
};

// What rows are read from, and what is done to each element on its way.
struct RowSource {
  Nhwc x;
  Nhwc y;              // finish only
  Prologue prologue;
  const float* coef;   // rows of `channels` floats
  int64_t channels;    // in all groups together
};

// Packed column i holds source column first + i, or 0 outside [0, width).
struct RowColumns {
  int64_t first, count, width;
  int64_t begin() const { return std::min(count, std::max<int64_t>(0, -first)); }
  int64_t end() const { return std::max(begin(), std::min(count, width - first)); }
};

// Per-channel coefficients of one vector of channels. Lanes past the tail are all zero.
template <Prologue P>
struct Coefficients {
  Vec v[P == Prologue::finish ? 6 : P == Prologue::act ? 2 : 1];
  GCONV_INLINE Coefficients(const RowSource& s, int64_t channel, int lanes) {
    constexpr int ROWS = P == Prologue::finish ? 6 : P == Prologue::act ? 2 : 0;
    for (int i = 0; i < ROWS; ++i) v[i] = load_lanes(s.coef + i * s.channels + channel, lanes);
  }
  template <typename T>
  GCONV_INLINE Vec apply(const T* x, const T* y, int lanes) const {
    const Vec raw = load_lanes(x, lanes);
    if constexpr (P == Prologue::none) return raw;
    if constexpr (P == Prologue::act) return relu(fma(v[0], raw, v[1]));
    if constexpr (P == Prologue::finish) {
      const Vec out = load_lanes(y, lanes);
      const Vec g = relu_mask(raw, fma(v[4], out, v[5]));
      return fma(v[0], g, fma(v[1], sub(out, v[3]), v[2]));
    }
  }
};

template <typename T>
GCONV_INLINE const T* row_pointer(const Nhwc& t, int64_t image, int64_t row, int64_t channel) {
  return static_cast<const T*>(t.data) + image * t.stride_n + row * t.stride_h + channel;
}

inline void zero_columns(float* packed, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) store(packed + i * LANES, zero());
}

// Channels [channel, channel + span) as blocks of LANES: packed[block][column][LANES].
template <typename T, Prologue P>
void pack_row_blocks(const RowSource& s, int64_t image, int64_t row, int64_t channel, int64_t span,
                     const RowColumns& columns, float* packed) {
  const int64_t begin = columns.begin(), end = columns.end();
  for (int64_t c = 0; c < span; c += LANES, packed += columns.count * LANES) {
    const int lanes = static_cast<int>(std::min<int64_t>(LANES, span - c));
    const Coefficients<P> coefficients(s, channel + c, lanes);
    const T* x = row_pointer<T>(s.x, image, row, channel + c);
    const T* y = P == Prologue::finish ? row_pointer<T>(s.y, image, row, channel + c) : nullptr;
    zero_columns(packed, 0, begin);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t w = columns.first + i;
      const T* at_y = P == Prologue::finish ? y + w * s.y.stride_w : nullptr;
      store(packed + i * LANES, coefficients.apply(x + w * s.x.stride_w, at_y, lanes));
    }
    zero_columns(packed, end, columns.count);
  }
}

// One vector per channel of a group, each lane from its own group: packed[channel][column][LANES].
// lane_base[l] is the first channel of lane l's group, counted from `channel`. span_buffer holds one
// pixel's channels where they do not fit a vector.
template <typename T, Prologue P>
void pack_row_mixed(const RowSource& s, int64_t image, int64_t row, int64_t channel, int64_t span,
                    int64_t per_group, const int32_t* lane_base, const RowColumns& columns,
                    float* packed, float* span_buffer) {
  const int64_t begin = columns.begin(), end = columns.end();
  const int64_t next = columns.count * LANES;
  const Index base = index_load(lane_base);
  const T* x = row_pointer<T>(s.x, image, row, channel);
  const T* y = P == Prologue::finish ? row_pointer<T>(s.y, image, row, channel) : nullptr;
  for (int64_t c = 0; c < per_group; ++c) {
    zero_columns(packed + c * next, 0, begin);
    zero_columns(packed + c * next, end, columns.count);
  }
  if (span <= LANES) {
    const int lanes = static_cast<int>(span);
    const Coefficients<P> coefficients(s, channel, lanes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t w = columns.first + i;
      const T* at_y = P == Prologue::finish ? y + w * s.y.stride_w : nullptr;
      const Vec value = coefficients.apply(x + w * s.x.stride_w, at_y, lanes);
      float* out = packed + i * LANES;
      for (int64_t c = 0; c < per_group; ++c, out += next)
        store(out, permute(value, index_add(base, static_cast<int32_t>(c))));
    }
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    const int64_t w = columns.first + i;
    for (int64_t c = 0; c < span; c += LANES) {
      const int lanes = static_cast<int>(std::min<int64_t>(LANES, span - c));
      const Coefficients<P> coefficients(s, channel + c, lanes);
      const T* at_y = P == Prologue::finish ? y + w * s.y.stride_w + c : nullptr;
      store(span_buffer + c, coefficients.apply(x + w * s.x.stride_w + c, at_y, lanes));
    }
    float* out = packed + i * LANES;
    for (int64_t c = 0; c < per_group; ++c, out += next)
      store(out, gather(span_buffer, index_add(base, static_cast<int32_t>(c))));
  }
}

template <typename T>
void pack_row_blocks(const RowSource& s, int64_t image, int64_t row, int64_t channel, int64_t span,
                     const RowColumns& columns, float* packed) {
  switch (s.prologue) {
    case Prologue::none:
      return pack_row_blocks<T, Prologue::none>(s, image, row, channel, span, columns, packed);
    case Prologue::act:
      return pack_row_blocks<T, Prologue::act>(s, image, row, channel, span, columns, packed);
    case Prologue::finish:
      return pack_row_blocks<T, Prologue::finish>(s, image, row, channel, span, columns, packed);
  }
}

template <typename T>
void pack_row_mixed(const RowSource& s, int64_t image, int64_t row, int64_t channel, int64_t span,
                    int64_t per_group, const int32_t* lane_base, const RowColumns& columns,
                    float* packed, float* span_buffer) {
  switch (s.prologue) {
    case Prologue::none:
      return pack_row_mixed<T, Prologue::none>(s, image, row, channel, span, per_group, lane_base, columns,
                                               packed, span_buffer);
    case Prologue::act:
      return pack_row_mixed<T, Prologue::act>(s, image, row, channel, span, per_group, lane_base, columns,
                                              packed, span_buffer);
    case Prologue::finish:
      return pack_row_mixed<T, Prologue::finish>(s, image, row, channel, span, per_group, lane_base, columns,
                                                 packed, span_buffer);
  }
}

}  // namespace GCONV_ISA_NS
}  // namespace gconv
