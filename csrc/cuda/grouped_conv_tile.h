// The halo tile of a grouped convolution: the pixels and channels that a block's outputs read, in shared
// memory, with what is to be done to them done on the way in.
//
// Channels come in units of 16 bytes. A tile is [rows][images][columns] pixels of `pitch` bytes, an odd
// number of units, so that neighbouring pixels lie in different banks for load_matrices; a pixel's units lie
// side by side. An output at local row i, column j of image m meets its tap (kh, kw) at tile row h.tap[kh] +
// i and tile column m * w.size + w.tap[kw] + j whatever the stride and dilation: one address and an offset
// that is the same for all lanes. To that end the inputs of an axis are sorted into segments: at stride 2 the
// even ones and the odd ones, and where the taps lie further apart than the tile is long, one for each tap.
//
// To use it: on the host tile_axis() makes both axes from what an output reads (forward_offsets; {0, 0, 0}
// for a tensor that is read as it lies, as the dy of a weight gradient), Tile::of() the tile, and TileSource
// says where it comes from. In the kernel every thread of a block calls
//
//   load_tile<T, THREADS>(source, tile, image, row, column, first_unit, units, shared);
//   copy_commit();      // needed where the source is read as it is: those copies are asynchronous
//   copy_wait<0>();
//   block_sync();
//
// with (image, row, column) the block's first output. Whatever is outside the image, or beyond the last
// channel, is 0, after the prologue too. For two stages leave the barrier and the wait until the next tile
// has been started. A pixel's channels c of unit u are those from (first_unit + u) * UNIT<T>.
#pragma once
#include <type_traits>

#include "verbs.h"

namespace gconv::cuda {

template <typename T>
constexpr int UNIT = 16 / int(sizeof(T));

// Output i of a tile, of `count`, reads input step * (first + i) + offset[k] for its tap k: offsets in
// inputs.
struct TileAxis {
  int step, count;
  int size;                 // of the tile along this axis: segments * length
  int length, jump;         // of a segment, in entries, and the inputs between two of them
  int base0, base1, base2;  // where the segments begin, in inputs from step * first
  int tap[3];               // where tap k of output 0 lies; that of output i is i further
};

inline TileAxis tile_axis(int step, const int (&offset)[3], int count) {
  int low = offset[0], high = offset[0];
  for (int k : {1, 2}) {
    if (offset[k] < low) low = offset[k];
    if (offset[k] > high) high = offset[k];
  }
  TileAxis axis{step, count, 0, 0, 0, 0, 0, 0, {}};
  const int together = count + (high - low) / step;
  if (step * int64_t(together) <= 3 * int64_t(count)) {
    axis.length = together, axis.size = step * together, axis.jump = step;
    axis.base0 = low, axis.base1 = low + 1;
    for (int k = 0; k < 3; ++k) axis.tap[k] = (offset[k] - low) % step * together + (offset[k] - low) / step;
  } else {
    axis.length = count, axis.size = 3 * count, axis.jump = step;
    axis.base0 = offset[0], axis.base1 = offset[1], axis.base2 = offset[2];
    for (int k = 0; k < 3; ++k) axis.tap[k] = k * count;
  }
  return axis;
}

// What output i of a forward convolution reads, from stride * i on.
struct Offsets {
  int tap[3];
};
inline Offsets forward_offsets(int64_t pad, int64_t dil) {
  return {{int(-pad), int(dil - pad), int(2 * dil - pad)}};
}

struct Tile {
  TileAxis h, w;
  int images;            // side by side
  int pitch, row_pitch;  // bytes from a pixel to the next, and from a row to the next

  static Tile of(const TileAxis& h, const TileAxis& w, int images, int units) {
    const int pitch = (units | 1) * 16;
    return {h, w, images, pitch, images * w.size * pitch};
  }
  int64_t bytes() const { return int64_t(h.size) * row_pitch; }
};

enum class Prologue : int32_t { none, act, finish };

// An activation [images, h, w, c] and what is done to it on load: relu(a*x + b) with act [2, c]; or with
// finish [6, c] A*(x*[not a*y + b <= 0]) + B*(y - mean) + C. Both are computed in float and rounded to T.
struct TileSource {
  Nhwc x, y;           // y with finish only
  const float* table;  // act or finish
  Prologue prologue;
  bool aligned;  // units may be loaded whole: is_aligned() of what is read
  int64_t images;
  int h, w, c;
};

// True if every unit of a view lies whole at a multiple of 16 bytes.
inline bool is_aligned(const Nhwc& v, int64_t n, int64_t h, int64_t w, int64_t c, int64_t element) {
  const auto whole = [&](int64_t size, int64_t stride) { return size <= 1 || stride * element % 16 == 0; };
  return reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && c * element % 16 == 0 && whole(n, v.stride_n) &&
         whole(h, v.stride_h) && whole(w, v.stride_w);
}

inline TileSource tile_source(const Nhwc& x, const float* act, int64_t n, int64_t h, int64_t w, int64_t c,
                              int64_t element) {
  return {x,      Nhwc{}, act,   act ? Prologue::act : Prologue::none, is_aligned(x, n, h, w, c, element), n,
          int(h), int(w), int(c)};
}
inline TileSource tile_source(const Nhwc& dy, const Nhwc& y, const float* finish, int64_t n, int64_t h,
                              int64_t w, int64_t c, int64_t element) {
  TileSource s = tile_source(dy, nullptr, n, h, w, c, element);
  if (finish != nullptr) {
    s.y = y, s.table = finish, s.prologue = Prologue::finish;
    s.aligned = s.aligned && is_aligned(y, n, h, w, c, element);
  }
  return s;
}

// ---- units in registers

template <typename T>
GCONV_DEVICE float unit_value(const Chunk& c, int i) {
  if constexpr (sizeof(T) == 2)
    return to_float(T{uint16_t(c.word[i / 2] >> (i % 2 * 16))});
  else
    return float_of(c.word[i]);
}

// Two values as one word, the first in the lower half.
template <typename T>
GCONV_DEVICE uint32_t pair_bits(float first, float second) {
  return uint32_t(from_float<T>(first).bits) | uint32_t(from_float<T>(second).bits) << 16;
}

template <typename T>
GCONV_DEVICE Chunk unit_of(const float (&v)[UNIT<T>]) {
  Chunk c;
  GCONV_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2)
      c.word[i] = pair_bits<T>(v[2 * i], v[2 * i + 1]);
    else
      c.word[i] = bits_of(v[i]);
  }
  return c;
}

template <typename T>
GCONV_DEVICE_CALL Chunk load_elements(const T* from, int channels) {
  Chunk c{{0, 0, 0, 0}};
  GCONV_UNROLL
  for (int i = 0; i < UNIT<T>; ++i)
    if (i < channels) {
      if constexpr (sizeof(T) == 2)
        c.word[i / 2] |= uint32_t(from[i].bits) << (i % 2 * 16);
      else
        c.word[i] = bits_of(to_float(from[i]));
    }
  return c;
}

template <typename T>
GCONV_DEVICE_CALL void store_elements(T* to, const Chunk c, int channels) {
  GCONV_UNROLL
  for (int i = 0; i < UNIT<T>; ++i)
    if (i < channels) {
      if constexpr (sizeof(T) == 2)
        to[i].bits = uint16_t(c.word[i / 2] >> (i % 2 * 16));
      else
        to[i] = T{float_of(c.word[i])};
    }
}

// `channels` values from `from` on, at most a unit; the rest is 0.
template <typename T>
GCONV_DEVICE Chunk load_unit(const T* from, int channels, bool aligned) {
  if (!aligned) return load_elements<T>(from, channels);
  return channels > 0 ? load_chunk_constant(from) : Chunk{{0, 0, 0, 0}};
}

template <typename T>
GCONV_DEVICE void store_unit(T* to, const Chunk& c, int channels, bool aligned) {
  if (!aligned)
    store_elements<T>(to, c, channels);
  else if (channels > 0)
    store_chunk(to, c);
}

// Rows 0.. of a table [rows, c] at the channels of a unit, 0 beyond the last.
template <typename T, int ROWS>
GCONV_DEVICE void load_vectors(float (&v)[ROWS][UNIT<T>], const float* table, int c, int channel) {
  GCONV_UNROLL
  for (int r = 0; r < ROWS; ++r) GCONV_UNROLL
  for (int i = 0; i < UNIT<T>; ++i) v[r][i] = channel + i < c ? table[int64_t(r) * c + channel + i] : 0.0f;
}

// NaN stays NaN, as in torch.
GCONV_DEVICE float relu(float v) { return v <= 0.0f ? 0.0f : v; }

template <typename T>
GCONV_DEVICE Chunk activated(const Chunk& x, const float (&v)[2][UNIT<T>]) {
  float z[UNIT<T>];
  GCONV_UNROLL
  for (int i = 0; i < UNIT<T>; ++i) z[i] = relu(v[0][i] * unit_value<T>(x, i) + v[1][i]);
  return unit_of<T>(z);
}

template <typename T>
GCONV_DEVICE Chunk finished(const Chunk& dy, const Chunk& other, const float (&v)[6][UNIT<T>]) {
  float z[UNIT<T>];
  GCONV_UNROLL
  for (int i = 0; i < UNIT<T>; ++i) {
    const float y = unit_value<T>(other, i);
    const float g = v[4][i] * y + v[5][i] <= 0.0f ? 0.0f : unit_value<T>(dy, i);
    z[i] = v[0][i] * g + v[1][i] * (y - v[3][i]) + v[2][i];
  }
  return unit_of<T>(z);
}

// ---- the tile

// The input at entry `at` of an axis, where the tile's first output is `first`.
GCONV_DEVICE int tile_input(const TileAxis& axis, int first, int at) {
  const int segment = int(at >= axis.length) + int(at >= 2 * axis.length);
  const int base = segment == 0 ? axis.base0 : segment == 1 ? axis.base1 : axis.base2;
  return first * axis.step + base + (at - segment * axis.length) * axis.jump;
}

// Puts what `make` makes of what `read` reads into the tile, down one column of units; BATCH reads are under
// way together. h < 0 stands for a row that is not there.
template <int BATCH, typename Read, typename Make>
GCONV_DEVICE void fill_column(const TileSource& source, const Tile& tile, int row, bool inside,
                              unsigned char* to, const Read& read, const Make& make) {
  for (int begin = 0; begin < tile.h.size; begin += BATCH) {
    decltype(read(0)) v[BATCH];
    uint32_t known = 0;
    GCONV_UNROLL
    for (int i = 0; i < BATCH; ++i) {
      const int h = tile_input(tile.h, row, begin + i);
      const bool within = inside && begin + i < tile.h.size && h >= 0 && h < source.h;
      known |= uint32_t(within) << i;
      v[i] = read(within ? h : -1);
    }
    GCONV_UNROLL
    for (int i = 0; i < BATCH; ++i)
      if (begin + i < tile.h.size)
        store_chunk(to + (begin + i) * tile.row_pitch, known >> i & 1 ? make(v[i]) : Chunk{{0, 0, 0, 0}});
  }
}

template <int N>
using Batch = std::integral_constant<int, N>;

struct TwoChunks {
  Chunk first, second;
};

// Each thread walks down a column of units, so that all but the row is worked out once. ACT, FINISH: whether
// the source may have that prologue.
template <typename T, int THREADS, bool ACT = true, bool FINISH = true>
GCONV_DEVICE void load_tile(const TileSource& source, const Tile& tile, int64_t image, int row, int column,
                            int first_unit, int units, unsigned char* shared) {
  const int slots = tile.images * tile.w.size * units;
  const T* const x_data = static_cast<const T*>(source.x.data);
  const T* const y_data = static_cast<const T*>(source.y.data);
  for (int slot = int(threadIdx.x); slot < slots; slot += THREADS) {
    const int u = slot % units, pixel = slot / units;
    const int64_t n = image + pixel / tile.w.size;
    const int w = tile_input(tile.w, column, pixel % tile.w.size);
    const int channel = (first_unit + u) * UNIT<T>;
    const int channels = source.c - channel;
    const bool inside = channels > 0 && n < source.images && w >= 0 && w < source.w;
    unsigned char* to = shared + pixel * tile.pitch + u * 16;
    const int64_t x_at = n * source.x.stride_n + w * source.x.stride_w + channel;
    const int64_t y_at = n * source.y.stride_n + w * source.y.stride_w + channel;
    const auto fill = [&](auto batch, const auto& read, const auto& make) {
      fill_column<decltype(batch)::value>(source, tile, row, inside, to, read, make);
    };
    // Reads what is there at row h of a tensor: whole units, or the last one's few channels.
    const auto whole = [&](const T* data, int64_t at, int64_t stride_h, int h) {
      return h < 0 ? Chunk{{0, 0, 0, 0}} : load_chunk_constant(data + at + h * stride_h);
    };
    const auto by_element = [&](const T* data, int64_t at, int64_t stride_h, int h) {
      return load_elements<T>(data + (h < 0 ? 0 : at + h * stride_h), h < 0 ? 0 : channels);
    };
    if (source.prologue == Prologue::none) {
      if (source.aligned) {
        for (int begin = 0; begin < tile.h.size; begin += tile.h.length) {
          int h = tile_input(tile.h, row, begin);
          const T* from = x_data + (x_at + h * source.x.stride_h);
          const int64_t further = tile.h.jump * source.x.stride_h;
          for (int i = 0; i < tile.h.length; ++i) {
            copy_async(to, from, inside && unsigned(h) < unsigned(source.h));
            h += tile.h.jump, from += further, to += tile.row_pitch;
          }
        }
      } else {
        fill(
            Batch<1>{}, [&](int h) { return by_element(x_data, x_at, source.x.stride_h, h); },
            [](const Chunk& c) { return c; });
      }
    } else if (ACT && (!FINISH || source.prologue == Prologue::act)) {
      float v[2][UNIT<T>];
      load_vectors<T>(v, source.table, source.c, channel);
      const auto make = [&](const Chunk& c) { return activated<T>(c, v); };
      if (source.aligned)
        fill(Batch<8>{}, [&](int h) { return whole(x_data, x_at, source.x.stride_h, h); }, make);
      else
        fill(Batch<1>{}, [&](int h) { return by_element(x_data, x_at, source.x.stride_h, h); }, make);
    } else if constexpr (FINISH) {
      float v[6][UNIT<T>];
      load_vectors<T>(v, source.table, source.c, channel);
      const auto make = [&](const TwoChunks& c) { return finished<T>(c.first, c.second, v); };
      const auto both = [&](const auto& read) {
        return [&](int h) {
          return TwoChunks{read(x_data, x_at, source.x.stride_h, h),
                           read(y_data, y_at, source.y.stride_h, h)};
        };
      };
      if (source.aligned)
        fill(Batch<4>{}, both(whole), make);
      else
        fill(Batch<1>{}, both(by_element), make);
    }
  }
}

}  // namespace gconv::cuda
