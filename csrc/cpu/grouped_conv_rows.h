// Image rows on their way to the grouped_conv tiles, in two steps.
//
// pack_row: from the tensor, in its order: to slots, prologue applied, padding zero. A packed row lies as
//   [block of LANES slots][column][LANES] and stays in L2.
// expand_row: where the lanes of an output vector span groups, from packed rows to one vector per
//   [block][column], lanes already where their group needs them (Fetch); a few rows that stay in L1.
// Every fetch then has a constant distance to the next column's. Narrow groups need neither:
// stage_row: from the tensor, a few columns of a row, to [vector of channels][column][its slots] in L1.
// Below, a channel of a packed or expanded row is a slot of it (conv_slots.h).
#pragma once
#include "conv_slots.h"
#include "grouped_conv.h"

namespace gconv {
namespace GCONV_ISA_NS {

// Packed column i holds source column first + i, or 0 outside [0, width).
struct RowColumns {
  int64_t first, count, width;
  int64_t begin() const { return std::min(count, std::max<int64_t>(0, -first)); }
  int64_t end() const { return std::max(begin(), std::min(count, width - first)); }
};

// How a vector of outputs gets its inputs.
enum class Fetch {
  broadcast,  // all lanes in one group: packed rows, one scalar feeds every lane
  direct,     // the same from the tensor itself
  twin,       // lanes span groups of even width: expanded, a block is two channels, alternating
  lanes,      // lanes span groups: expanded, a block is one channel, each lane its own group's
};

constexpr bool one_group(Fetch fetch) { return fetch == Fetch::broadcast || fetch == Fetch::direct; }

// Input channels in one block.
constexpr int block_channels(Fetch fetch) { return one_group(fetch) ? LANES : fetch == Fetch::twin ? 2 : 1; }

// The value that channel PART of a block gives at packed column `at`.
template <Fetch FETCH, int PART>
GCONV_INLINE Vec fetch_part(const float* at) {
  if constexpr (FETCH == Fetch::twin) return PART == 0 ? load_even_twice(at) : load_odd_twice(at);
  return one_group(FETCH) ? set1(at[PART]) : load(at);
}

// The input channels of one group, or those that one output vector spans.
struct PackedSource {
  Fetch fetch;
  int64_t group;      // broadcast only
  int64_t channel;    // first input channel
  int64_t span;       // input channels read
  int64_t per_group;  // input channels of one group
  float* rows;        // packed rows, one after the other
  int64_t row_floats;
  int32_t lane_base[LANES];  // first channel of each lane's group (twin: of each lane), from `channel`

  // Blocks of an expanded row.
  int64_t expanded_blocks() const { return (per_group + block_channels(fetch) - 1) / block_channels(fetch); }
};

// The sources that output vectors [first, first + count) read.
struct SourcePlan {
  static constexpr int64_t MOST = MOST_VECTORS;
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
      s.fetch = uniform                                             ? Fetch::broadcast
                : output_per_group % 2 == 0 && source_per_group > 1 ? Fetch::twin
                                                                    : Fetch::lanes;
      s.group = group;
      s.channel = group * source_per_group;
      s.span = (last_group - group + 1) * source_per_group;
      s.per_group = source_per_group;
      s.row_floats = (s.span + LANES - 1) / LANES * columns * LANES;
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
      sources[v] =
          PackedSource{Fetch::broadcast, v, lane0, std::min<int64_t>(LANES, outputs - lane0), LANES, nullptr,
                       columns * LANES,  {}};
      source_of[v] = static_cast<int>(v);
      row_floats += columns * LANES;
    }
    count = vectors;
  }

  // Floats that hold one pixel's span, with room for the odd channel a twin block reads past it.
  int64_t span_floats() const { return (widest + LANES) / 16 * 16 + 16; }

  // Where lanes do not span groups, reads the tensor itself.
  void read_direct() {
    for (int64_t i = 0; i < count; ++i) {
      if (sources[i].fetch != Fetch::broadcast) continue;
      row_floats -= sources[i].row_floats;
      sources[i].row_floats = 0;
      sources[i].fetch = Fetch::direct;
    }
  }

  void place(float* memory, int64_t rows) {
    for (int64_t i = 0; i < count; ++i) {
      sources[i].rows = memory;
      memory += rows * sources[i].row_floats;
    }
  }
};

// One row of every source into packed row `index`. A few pixels at a time, all their channels before the
// next: neighbouring channels share cache lines and pages, neighbouring pixels are kilobytes apart. The row
// `ahead` below is fetched into L2 meanwhile; past the last row that does nothing.
template <typename T, Prologue P, Slots S>
void pack_row(const RowSource& s, const SourcePlan& plan, const RowImages& images, int64_t row, int64_t index,
              const RowColumns& columns, int64_t ahead) {
  constexpr int64_t PIXELS = 8;
  const int64_t begin = columns.begin(), end = columns.end(), block = columns.count * LANES;
  const int64_t x_step = s.x.stride_w, y_step = s.y.stride_w;
  const int64_t x_ahead = ahead * s.x.stride_h, y_ahead = ahead * s.y.stride_h;
  for (int64_t i = 0; i < plan.count; ++i) {
    const PackedSource& source = plan.sources[i];
    float* packed = source.rows + index * source.row_floats;
    for (int64_t b = 0; b < source.row_floats; b += block) {
      for (int64_t c = 0; c < begin; ++c) store(packed + b + c * LANES, zero());
      for (int64_t c = end; c < columns.count; ++c) store(packed + b + c * LANES, zero());
    }
  }
  for (int64_t at = begin; at < end; at += PIXELS) {
    const int64_t last = std::min(end, at + PIXELS);
    for (int64_t i = 0; i < plan.count; ++i) {
      const PackedSource& source = plan.sources[i];
      if (source.fetch == Fetch::direct) continue;
      float* packed = source.rows + index * source.row_floats;
      for (int64_t c = 0; c < source.span; c += LANES, packed += block) {
        const int64_t channel = (source.channel + c) * SlotReader<T, P, S>::CHANNELS;
        const int lanes = static_cast<int>(std::min<int64_t>(LANES, source.span - c));
        const SlotReader<T, P, S> slots(s, channel, lanes, images.both);
        const T* x = row_pointer<T>(s.x, images.first, row, channel) + (columns.first + at) * x_step;
        const T* y = nullptr;
        if constexpr (P == Prologue::finish)
          y = row_pointer<T>(s.y, images.first, row, channel) + (columns.first + at) * y_step;
        for (int64_t w = at; w < last; ++w) {
          __builtin_prefetch(x + x_ahead, 0, 2);
          if constexpr (P == Prologue::finish) __builtin_prefetch(y + y_ahead, 0, 2);
          store(packed + w * LANES, slots.read(x, y));
          x += x_step;
          if constexpr (P == Prologue::finish) y += y_step;
        }
      }
    }
  }
}

template <typename T, Slots S>
void pack_row(const RowSource& s, const SourcePlan& plan, const RowImages& images, int64_t row, int64_t index,
              const RowColumns& columns, int64_t ahead) {
  with_prologue(s.prologue, [&](auto prologue) {
    pack_row<T, decltype(prologue)::value, S>(s, plan, images, row, index, columns, ahead);
  });
}

// Rows that are packed next, fetched into L2 while the present ones are computed: a few pixels in each of
// `steps` steps, for many at once would hold up the loads of the computation.
class RowPrefetch {
 public:
  // Rows [row, row_end) of images [image, image_end): `channels` from `channel` on of each pixel.
  template <typename T>
  void add(const Nhwc& t, int64_t image, int64_t image_end, int64_t row, int64_t row_end, int64_t width,
           int64_t channel, int64_t channels) {
    if (image >= image_end || row >= row_end || width == 0) return;
    constexpr int64_t SIZE = sizeof(T);
    const T* first = row_pointer<T>(t, image, row, channel);
    ranges_[count_++] = Range{reinterpret_cast<const char*>(first),
                              channels * SIZE,
                              t.stride_w * SIZE,
                              t.stride_h * SIZE,
                              t.stride_n * SIZE,
                              width,
                              row_end - row,
                              image_end - image};
    pixels_ += width * (row_end - row) * (image_end - image);
  }
  // What packing those rows of a source will read.
  template <typename T>
  void add(const RowSource& s, int64_t image, int64_t image_end, int64_t row, int64_t row_end, int64_t width,
           int64_t channel, int64_t channels) {
    add<T>(s.x, image, image_end, row, row_end, width, channel, channels);
    if (s.prologue == Prologue::finish) add<T>(s.y, image, image_end, row, row_end, width, channel, channels);
  }
  void spread(int64_t steps) { steps_ = std::max<int64_t>(steps, 1); }
  void step() {
    for (due_ += pixels_; due_ >= steps_; due_ -= steps_)
      if (at_ < count_) pixel();
  }

 private:
  struct Range {
    const char* data;
    int64_t bytes, column, row, image;  // bytes of a pixel, and from one to the next
    int64_t columns, rows, images;
  };
  void pixel() {
    const Range& r = ranges_[at_];
    const char* data = r.data + image_ * r.image + row_ * r.row + column_ * r.column;
    for (int64_t i = 0; i < r.bytes; i += 64) __builtin_prefetch(data + i, 0, 2);
    if (++column_ < r.columns) return;
    column_ = 0;
    if (++row_ < r.rows) return;
    row_ = 0;
    if (++image_ < r.images) return;
    image_ = 0;
    ++at_;
  }
  Range ranges_[4];
  int64_t count_ = 0, pixels_ = 0, steps_ = 1, due_ = 0;
  int64_t at_ = 0, image_ = 0, row_ = 0, column_ = 0;
};

// Whole rows that are read next, fetched into L2 while the present ones are computed: line by line in the
// order of memory, a few in each of `steps` steps. A core has few line buffers; bursts hold up the loads of
// the computation.
class LinePrefetch {
 public:
  // Rows [row, row_end) of an image, all channels.
  template <typename T>
  void add(const RowSource& s, int64_t image, int64_t row, int64_t row_end, int64_t width) {
    add<T>(s.x, image, row, row_end, width * s.channels);
    if (s.prologue == Prologue::finish) add<T>(s.y, image, row, row_end, width * s.channels);
  }
  void spread(int64_t steps) {
    int64_t lines = 0;
    steps = std::max<int64_t>(1, steps);
    for (int64_t i = 0; i < count_; ++i) lines += (ranges_[i].end - ranges_[i].at + LINE - 1) / LINE;
    lines_ = static_cast<int>((lines + steps - 1) / steps);
  }
  // Every few steps: the next range where one is through.
  GCONV_INLINE void renew() {
    if (now_.at < now_.end) return;
    if (next_ < count_)
      now_ = ranges_[next_++];
    else
      lines_ = 0;
  }
  GCONV_INLINE void step() {
    for (int i = 0; i < lines_; ++i, now_.at += LINE) __builtin_prefetch(now_.at, 0, 2);
  }

 private:
  static constexpr int64_t LINE = 64;
  struct Range {
    const char *at, *end;
  };
  // Rows with gaps between them are left alone.
  template <typename T>
  void add(const Nhwc& t, int64_t image, int64_t row, int64_t row_end, int64_t row_elements) {
    if (row >= row_end || t.stride_h != row_elements) return;
    const char* first = reinterpret_cast<const char*>(row_pointer<T>(t, image, row, 0));
    ranges_[count_++] = {first, first + (row_end - row) * row_elements * static_cast<int64_t>(sizeof(T))};
  }
  Range ranges_[4], now_{};
  int64_t count_ = 0, next_ = 0;
  int lines_ = 0;
};

// Columns [begin, end) of a packed row of `columns` columns, expanded to [block][end - begin][LANES].
// span_buffer holds one pixel's channels where they do not fit a vector.
inline void expand_row(const PackedSource& source, const float* packed, int64_t columns, int64_t begin,
                       int64_t end, float* expanded, float* span_buffer) {
  const Index base = index_load(source.lane_base);
  const int32_t step = block_channels(source.fetch);
  const int64_t blocks = source.expanded_blocks(), block = (end - begin) * LANES;
  if (source.span <= LANES) {
    Index index = base;
    packed += begin * LANES;
    for (int64_t b = 0; b < blocks; ++b, index = index_add(index, step), expanded += block)
      for (int64_t i = 0; i < block; i += LANES) store(expanded + i, permute(load(packed + i), index));
    return;
  }
  for (int64_t i = begin; i < end; ++i, expanded += LANES) {
    for (int64_t c = 0; c < source.span; c += LANES)
      store(span_buffer + c, load(packed + (c * columns) + i * LANES));
    Index index = base;
    for (int64_t b = 0; b < blocks; ++b, index = index_add(index, step))
      store(expanded + b * block, gather(span_buffer, index));
  }
}

// Columns [first, first + count) of a row, every vector of a chunk: to slots, prologue applied, zero outside
// the image.
template <typename T, Prologue P, Slots S>
void stage_row(const RowSource& s, const RowImages& images, int64_t row, int64_t channel, int64_t vectors,
               const RowColumns& columns, float* staged, int64_t staged_step) {
  constexpr int64_t COLUMN = S == Slots::channels ? SOURCE_LANES : LANES;
  const int64_t begin = columns.begin(), end = columns.end();
  const int64_t x_pixel = s.x.stride_w, y_pixel = s.y.stride_w;
  const T* x_row = row_pointer<T>(s.x, images.first, row, channel) + (columns.first + begin) * x_pixel;
  const T* y_row = nullptr;
  if constexpr (P == Prologue::finish)
    y_row = row_pointer<T>(s.y, images.first, row, channel) + (columns.first + begin) * y_pixel;
  const auto stage = [&](int64_t v, int lanes) GCONV_LAMBDA {
    const VectorReader<T, P, S> slots(s, channel + v * LANES, lanes, images.both);
    float* out = staged + v * staged_step;
    for (int64_t j = 0; j < begin; ++j) slots.clear(out + j * COLUMN);
    const T *x = x_row + v * LANES, *y = y_row;
    if constexpr (P == Prologue::finish) y += v * LANES;
    for (int64_t j = begin; j < end; ++j) {
      slots.copy(x, y, out + j * COLUMN);
      x += x_pixel;
      if constexpr (P == Prologue::finish) y += y_pixel;
    }
    for (int64_t j = end; j < columns.count; ++j) slots.clear(out + j * COLUMN);
  };
  const int64_t full = std::min(vectors, (s.channels - channel) / LANES);
  for (int64_t v = 0; v < full; ++v) stage(v, LANES);
  if (full < vectors) stage(full, static_cast<int>(s.channels - channel - full * LANES));
}

template <typename T, Slots S>
void stage_row(const RowSource& s, const RowImages& images, int64_t row, int64_t channel, int64_t vectors,
               const RowColumns& columns, float* staged, int64_t staged_step) {
  with_prologue(s.prologue, [&](auto prologue) {
    stage_row<T, decltype(prologue)::value, S>(s, images, row, channel, vectors, columns, staged,
                                               staged_step);
  });
}

// Columns of a chunk that the next row will read: fetched into L2 while this one is computed, a vector at a
// time, for a core has few line buffers. Byte distances; past the last row a fetch does nothing.
struct FetchAhead {
  static constexpr int MOST = 8 * PER_SLOT;
  const char* at[MOST];
  int64_t pixel[MOST], vector;
  int columns[MOST], part_columns[MOST];
  int rows = 0;

  // What staging that row of a source will read.
  template <typename T>
  void add(const RowSource& s, const RowImages& images, int64_t row, int64_t channel, const RowColumns& c) {
    for (int64_t i = 0; i <= images.both; ++i) {
      add<T>(s.x, images.first + i, row, channel, c);
      if (s.prologue == Prologue::finish) add<T>(s.y, images.first + i, row, channel, c);
    }
  }
  template <typename T>
  void add(const Nhwc& t, int64_t image, int64_t row, int64_t channel, const RowColumns& c) {
    constexpr int64_t BYTES = static_cast<int64_t>(sizeof(T));
    at[rows] = reinterpret_cast<const char*>(row_pointer<T>(t, image, row, channel) +
                                             (c.first + c.begin()) * t.stride_w);
    pixel[rows] = t.stride_w * BYTES;
    vector = LANES * BYTES;
    columns[rows++] = static_cast<int>(c.end() - c.begin());
  }
  // Vector v of the chunk.
  GCONV_INLINE void fetch(int64_t v) const {
    for (int i = 0; i < rows; ++i) {
      const char* line = at[i] + v * vector;
      for (int j = 0; j < columns[i]; ++j, line += pixel[i]) __builtin_prefetch(line, 0, 2);
    }
  }
  // The same in parts, where a vector has more lines than the core has buffers for them; into L1 what is read
  // where it lies.
  void split(int parts) {
    for (int i = 0; i < rows; ++i) part_columns[i] = (columns[i] + parts - 1) / parts;
  }
  template <bool INTO_L1 = false>
  GCONV_INLINE void fetch(int64_t v, int part) const {
    for (int i = 0; i < rows; ++i) {
      const int begin = part_columns[i] * part, end = std::min(columns[i], begin + part_columns[i]);
      const char* line = at[i] + v * vector + begin * pixel[i];
      for (int j = begin; j < end; ++j, line += pixel[i]) __builtin_prefetch(line, 0, INTO_L1 ? 3 : 2);
    }
  }
};

}  // namespace GCONV_ISA_NS
}  // namespace gconv
