// Packing of image rows for the grouped_conv kernels: to float32, prologue applied, padding zero.
//
// A packed row lies as [block][column][LANES], so that every fetch has a constant distance to the next
// column. What a block holds depends on how the lanes of an output vector meet the groups (Fetch).
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

// How a vector of outputs gets its inputs from a packed row.
enum class Fetch {
  broadcast,  // all lanes in one group: a block is LANES channels, one scalar feeds every lane
  twin,       // lanes span groups of even width: a block is two channels, alternating in the lanes
  lanes,      // lanes span groups: a block is one channel, each lane holding its own group's
};

// Input channels in one block.
constexpr int block_channels(Fetch fetch) {
  return fetch == Fetch::broadcast ? LANES : fetch == Fetch::twin ? 2 : 1;
}

// The value that channel PART of a block gives at packed column `at`.
template <Fetch FETCH, int PART>
GCONV_INLINE Vec fetch_part(const float* at) {
  if constexpr (FETCH == Fetch::twin) return PART == 0 ? load_even_twice(at) : load_odd_twice(at);
  return FETCH == Fetch::broadcast ? set1(at[PART]) : load(at);
}

// The input channels of one group, or those that one output vector spans, as they are packed.
struct PackedSource {
  Fetch fetch;
  int64_t group;       // broadcast only
  int64_t channel;     // first input channel
  int64_t span;        // input channels read
  int64_t per_group;   // input channels of one group
  int64_t blocks;
  float* rows;         // packed rows, one after the other
  int64_t row_floats;
  int32_t lane_base[LANES];  // first channel of each lane's group (twin: of each lane), from `channel`
};

// The sources that output vectors [first, first + count) read.
struct SourcePlan {
  static constexpr int64_t MOST = 8;  // vectors of a chunk
  PackedSource sources[MOST];
  int source_of[MOST];
  int64_t count = 0, row_floats = 0, widest = 0;

  SourcePlan(int64_t first, int64_t vectors, int64_t outputs, int64_t output_per_group,
             int64_t source_per_group, int64_t columns) {
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t lane0 = (first + v) * LANES, lane_end = std::min(lane0 + LANES, outputs);
      const int64_t group = lane0 / output_per_group, last_group = (lane_end - 1) / output_per_group;
      const bool uniform = group == last_group;
      if (uniform && count > 0 && sources[count - 1].fetch == Fetch::broadcast &&
          sources[count - 1].group == group) {
        source_of[v] = static_cast<int>(count - 1);
        continue;
      }
      PackedSource& s = sources[count];
      s.fetch = uniform ? Fetch::broadcast
                : output_per_group % 2 == 0 && source_per_group > 1 ? Fetch::twin
                                                                    : Fetch::lanes;
      s.group = group;
      s.channel = group * source_per_group;
      s.span = (last_group - group + 1) * source_per_group;
      s.per_group = source_per_group;
      s.blocks = (source_per_group + block_channels(s.fetch) - 1) / block_channels(s.fetch);
      s.row_floats = s.blocks * columns * LANES;
      for (int64_t l = 0; l < LANES; ++l) {
        const int64_t at = std::min(lane0 + l, lane_end - 1);  // lanes past the tail repeat the last
        s.lane_base[l] = static_cast<int32_t>((at / output_per_group - group) * source_per_group +
                                              (s.fetch == Fetch::twin ? l % 2 : 0));
      }
      row_floats += s.row_floats;
      widest = std::max(widest, s.span);
      source_of[v] = static_cast<int>(count++);
    }
  }

  // The outputs' own channels, one block each: for the side of a gradient that lies in the lanes.
  SourcePlan(int64_t first, int64_t vectors, int64_t outputs, int64_t columns) {
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t lane0 = (first + v) * LANES;
      sources[v] = PackedSource{Fetch::broadcast, v, lane0, std::min<int64_t>(LANES, outputs - lane0),
                                LANES, 1, nullptr, columns * LANES, {}};
      source_of[v] = static_cast<int>(v);
      row_floats += columns * LANES;
    }
    count = vectors;
  }

  // Floats that hold one pixel's span, with room for the odd channel a twin block reads past it.
  int64_t span_floats() const { return (widest + LANES) / 16 * 16 + 16; }

  void place(float* memory, int64_t rows) {
    for (int64_t i = 0; i < count; ++i) {
      sources[i].rows = memory;
      memory += rows * sources[i].row_floats;
    }
  }
};

// Per-channel coefficients of one vector of channels. Lanes past the tail are all zero.
template <Prologue P>
struct Coefficients {
  Vec v[P == Prologue::finish ? 6 : P == Prologue::act ? 2 : 1];
  GCONV_INLINE Coefficients(const RowSource& s, int64_t channel, int lanes) {
    constexpr int ROWS = P == Prologue::finish ? 6 : P == Prologue::act ? 2 : 0;
    for (int i = 0; i < ROWS; ++i) v[i] = load_lanes(s.coef + i * s.channels + channel, lanes);
  }
  // Also fetches the row below: a pixel's channels are a small piece of a wide row, which hardware
  // prefetchers follow badly. A prefetch past the last row does nothing.
  template <typename T>
  GCONV_INLINE Vec apply(const T* x, const T* y, const RowSource& s, int lanes) const {
    __builtin_prefetch(x + s.x.stride_h, 0, 2);
    const Vec raw = load_lanes(x, lanes);
    if constexpr (P == Prologue::none) return raw;
    if constexpr (P == Prologue::act) return relu(fma(v[0], raw, v[1]));
    if constexpr (P == Prologue::finish) {
      __builtin_prefetch(y + s.y.stride_h, 0, 2);
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

// Packed columns [begin, end) of one source.
template <typename T, Prologue P>
void pack_columns(const RowSource& s, const PackedSource& source, const T* x, const T* y,
                  const RowColumns& columns, int64_t begin, int64_t end, float* packed,
                  float* span_buffer) {
  const int64_t block = columns.count * LANES;
  const auto x_at = [&](int64_t i) { return x + (columns.first + i) * s.x.stride_w; };
  const auto y_at = [&](int64_t i, int64_t c) {
    return P == Prologue::finish ? y + (columns.first + i) * s.y.stride_w + c : nullptr;
  };
  if (source.fetch == Fetch::broadcast) {
    for (int64_t c = 0; c < source.span; c += LANES, packed += block) {
      const int lanes = static_cast<int>(std::min<int64_t>(LANES, source.span - c));
      const Coefficients<P> coefficients(s, source.channel + c, lanes);
      for (int64_t i = begin; i < end; ++i)
        store(packed + i * LANES, coefficients.apply(x_at(i) + c, y_at(i, c), s, lanes));
    }
    return;
  }
  const Index base = index_load(source.lane_base);
  const int32_t step = block_channels(source.fetch);
  if (source.span <= LANES) {
    const int lanes = static_cast<int>(source.span);
    const Coefficients<P> coefficients(s, source.channel, lanes);
    for (int64_t i = begin; i < end; ++i) {
      const Vec value = coefficients.apply(x_at(i), y_at(i, 0), s, lanes);
      float* out = packed + i * LANES;
      Index index = base;
      for (int64_t b = 0; b < source.blocks; ++b, out += block) {
        store(out, permute(value, index));
        index = index_add(index, step);
      }
    }
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t c = 0; c < source.span; c += LANES) {
      const int lanes = static_cast<int>(std::min<int64_t>(LANES, source.span - c));
      const Coefficients<P> coefficients(s, source.channel + c, lanes);
      store(span_buffer + c, coefficients.apply(x_at(i) + c, y_at(i, c), s, lanes));
    }
    float* out = packed + i * LANES;
    Index index = base;
    for (int64_t b = 0; b < source.blocks; ++b, out += block) {
      store(out, gather(span_buffer, index));
      index = index_add(index, step);
    }
  }
}

// One row of every source into packed row `slot`. A few pixels at a time, all their channels before the
// next: neighbouring channels share cache lines and pages, neighbouring pixels are kilobytes apart.
template <typename T, Prologue P>
void pack_row(const RowSource& s, SourcePlan& plan, int64_t image, int64_t row, int64_t slot,
              const RowColumns& columns, float* span_buffer) {
  constexpr int64_t PIXELS = 8;
  const int64_t begin = columns.begin(), end = columns.end();
  for (int64_t i = 0; i < plan.count; ++i) {
    const PackedSource& source = plan.sources[i];
    float* packed = source.rows + slot * source.row_floats;
    for (int64_t b = 0; b < source.blocks; ++b, packed += columns.count * LANES) {
      for (int64_t c = 0; c < begin; ++c) store(packed + c * LANES, zero());
      for (int64_t c = end; c < columns.count; ++c) store(packed + c * LANES, zero());
    }
  }
  for (int64_t at = begin; at < end; at += PIXELS)
    for (int64_t i = 0; i < plan.count; ++i) {
      const PackedSource& source = plan.sources[i];
      const T* x = row_pointer<T>(s.x, image, row, source.channel);
      const T* y = P == Prologue::finish ? row_pointer<T>(s.y, image, row, source.channel) : nullptr;
      pack_columns<T, P>(s, source, x, y, columns, at, std::min(end, at + PIXELS),
                         source.rows + slot * source.row_floats, span_buffer);
    }
}

template <typename T>
void pack_row(const RowSource& s, SourcePlan& plan, int64_t image, int64_t row, int64_t slot,
              const RowColumns& columns, float* span_buffer) {
  switch (s.prologue) {
    case Prologue::none:
      return pack_row<T, Prologue::none>(s, plan, image, row, slot, columns, span_buffer);
    case Prologue::act:
      return pack_row<T, Prologue::act>(s, plan, image, row, slot, columns, span_buffer);
    case Prologue::finish:
      return pack_row<T, Prologue::finish>(s, plan, image, row, slot, columns, span_buffer);
  }
}

}  // namespace GCONV_ISA_NS
}  // namespace gconv
