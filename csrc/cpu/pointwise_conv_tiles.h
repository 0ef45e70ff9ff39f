// Pixels on their way to the pointwise_conv tiles, and the tiles.
//
// pack_tile: a few pixels from the tensor, in its order: to slots (conv_slots.h), prologue applied, as
//   [block of LANES channels][pixel][LANES], a channel or a pixel being PER_SLOT of them.
// multiply_tile: packed pixels times packed weights, one scalar of a pixel against one or two vectors of
//   output channels.
// add_outer: packed dy and packed x to a few rows of the weight gradient, one scalar of dy against one to
//   three vectors of x; the pixels are what is summed over, so both sides are as packed for multiply_tile.
//   Tile registers want the pixels of dy along a row: pack_rows.
#pragma once
#include "pointwise_conv_source.h"

namespace gconv {
namespace GCONV_ISA_NS {
namespace pointwise {

// Slots of a channel that a packed tile of so many pixels has.
constexpr int64_t pixel_slots(int64_t pixels) {
  return ((TILES ? POINT_PIXELS : pixels) + PER_SLOT - 1) / PER_SLOT;
}

// Up to two blocks of LANES channels in slots of pixels, where read(i) is pixel i in slots of channels.
template <typename Read>
GCONV_INLINE void pair_pixels(int64_t pixels, int64_t channels, const Read& read, float* packed) {
  const int64_t slots = pixel_slots(pixels);
  for (int64_t slot = 0, i = 0; slot < slots; ++slot, i += PER_SLOT, packed += LANES) {
    Vec lower, upper;
    interleave(i < pixels ? read(i) : zero(), i + 1 < pixels ? read(i + 1) : zero(), lower, upper);
    store(packed, lower);
    if (channels > LANES) store(packed + slots * LANES, upper);
  }
}

template <typename T, Prologue P, Slots S>
void pack_tile(const PointSource& s, int64_t first, int64_t pixels, int64_t channel, int64_t channels,
               float* packed) {
  int64_t x_at[POINT_PIXELS], y_at[POINT_PIXELS];
  s.x_at.offsets(first, pixels, x_at);
  if constexpr (P == Prologue::finish) s.y_at.offsets(first, pixels, y_at);
  const auto block = [&](int64_t c, int lanes) GCONV_LAMBDA {
    const int64_t first_channel = (channel + c) * SlotReader<T, P, S>::CHANNELS;
    const T* x = static_cast<const T*>(s.x.data) + first_channel;
    const T* y = P == Prologue::finish ? static_cast<const T*>(s.y.data) + first_channel : nullptr;
    const auto y_of = [&](int64_t i) GCONV_LAMBDA { return P == Prologue::finish ? y + y_at[i] : y; };
    if constexpr (PAIRS && S == Slots::pixels) {
      const Coefficients<P> coefficients(s, first_channel, lanes);
      const auto value = [&](int64_t i) GCONV_LAMBDA {
        return i < pixels ? coefficients.apply(x + x_at[i], y_of(i), lanes) : zero();
      };
      for (int64_t i = 0; i < (TILES ? POINT_PIXELS : pixels); i += PER_SLOT, packed += LANES)
        store(packed, pair_slots(value(i), value(i + 1)));
    } else {
      const SlotReader<T, P, S> slots(s, first_channel, lanes, false);
      for (int64_t i = 0; i < pixels; ++i, packed += LANES) store(packed, slots.read(x + x_at[i], y_of(i)));
    }
  };
  int64_t c = 0;
  if constexpr (PAIRS && S == Slots::pixels) {
    constexpr int64_t BOTH = 2 * LANES;  // channels of a vector in slots of channels
    for (; c + BOTH <= channels; c += BOTH, packed += 2 * pixel_slots(pixels) * LANES) {
      const SlotReader<T, P, Slots::channels> slots(s, channel + c, LANES, false);
      const T* x = static_cast<const T*>(s.x.data) + channel + c;
      const T* y = P == Prologue::finish ? static_cast<const T*>(s.y.data) + channel + c : nullptr;
      const auto read = [&](int64_t i) GCONV_LAMBDA {
        return slots.read(x + x_at[i], P == Prologue::finish ? y + y_at[i] : y);
      };
      pair_pixels(pixels, BOTH, read, packed);
    }
  }
  for (; c + LANES <= channels; c += LANES) block(c, LANES);
  if (c < channels) block(c, static_cast<int>(channels - c));
}

template <typename T, Slots S>
void pack_tile(const PointSource& s, int64_t first, int64_t pixels, int64_t channel, int64_t channels,
               float* packed) {
  with_prologue(s.prologue, [&](auto prologue) {
    pack_tile<T, decltype(prologue)::value, S>(s, first, pixels, channel, channels, packed);
  });
}

// Packed channels, as the rows of a weight gradient.
inline void turn_rows(int64_t channels, float* packed) {
  if constexpr (TILES) {
    static_assert(!TILES || POINT_PIXELS == LANES * PER_SLOT);
    for (int64_t c = 0; c < channels; c += LANES, packed += LANES * LANES) {
      Vec square[LANES];
      GCONV_UNROLL
      for (int i = 0; i < LANES; ++i) square[i] = load(packed + i * LANES);
      transpose(square);
      GCONV_UNROLL
      for (int i = 0; i < LANES; ++i) store(packed + i * LANES, square[i]);
    }
  }
}

// A tile of one side of a weight gradient whose channels are its rows.
template <typename T>
void pack_rows(const PointSource& s, int64_t first, int64_t pixels, int64_t channel, int64_t channels,
               float* packed) {
  pack_tile<T, Slots::pixels>(s, first, pixels, channel, channels, packed);
  turn_rows(channels, packed);
}

// The same, of pairs, from a tile packed in slots of channels.
inline void pack_rows(const float* slots, int64_t pixels, int64_t channels, float* packed) {
  const int64_t next = 2 * pixel_slots(pixels) * LANES;
  float* out = packed;
  for (int64_t c = 0; c < channels; c += 2 * LANES, slots += pixels * LANES, out += next)
    pair_pixels(pixels, channels - c, [&](int64_t i) GCONV_LAMBDA { return load(slots + i * LANES); }, out);
  turn_rows(channels, packed);
}

struct TileProduct {
  const float* pixels;   // packed
  int64_t count;         // of them
  const float* weights;  // [channel][vector][LANES]
  int64_t channels;      // summed over
  float* out;            // [vector][pixel][LANES]
  bool add;              // to what lies there
  Ahead* ahead;          // asked once per LANES channels
};

using TileFunction = void (*)(const TileProduct&);

// Times that a product of so many channels asks ahead.
inline int64_t requests(int64_t channels) { return (channels + LANES - 1) / LANES; }

#if defined(GCONV_ISA_AMX_BF16)
// A product of registers is a partial sum over LANES slots.
template <int ROWS, int VECTORS>
void multiply_tile(const TileProduct& t) {
  using Sums = TileSums<ROWS, VECTORS>;
  const TileSumsAt out{t.out, LANES, TILE_ROWS * LANES, whole_tiles(t.count) * LANES};
  t.add ? Sums::load(out) : Sums::clear();
  TilePair pixels{t.pixels, LANES, TILE_ROWS * LANES}, weights{t.weights, VECTORS * LANES, LANES};
  for (int64_t c = 0; c < t.channels; c += LANES) {
    t.ahead->fetch();
    Sums::multiply_add(pixels, weights);
    pixels.data += t.count * LANES;
    weights.data += LANES * VECTORS * LANES;
  }
  Sums::store(out);
}

inline TileFunction tile_function(int64_t vectors, int64_t pixels) {
  TileFunction function = nullptr;
  with_tiles(pixels, vectors, [&](auto rows, auto together) {
    function = multiply_tile<decltype(rows)::value, decltype(together)::value>;
  });
  return function;
}

// How a run of pixels is cut into tiles: all but the last are whole.
struct PointCut {
  int64_t all, count;

  explicit PointCut(int64_t pixels) : all(pixels), count(std::max<int64_t>(1, point_tiles(pixels))) {}
  int64_t first(int64_t tile) const { return tile * POINT_PIXELS; }
  int64_t pixels(int64_t tile) const { return std::min<int64_t>(POINT_PIXELS, all - first(tile)); }
  TileFunction function(int64_t tile, int64_t vectors) const { return tile_function(vectors, pixels(tile)); }
};
#else
// One float32 sum over all channels would lose digits that blocked matrix products keep. Of pairs they are
// lost to 16-bit values anyway.
constexpr int64_t PARTIAL = PAIRS ? 256 : 64;

template <int VECTORS, int PIXELS>
void multiply_tile(const TileProduct& t) {
  const float *pixels = t.pixels, *weights = t.weights;
  bool more = t.add;
  for (int64_t first = 0; first < t.channels; first += PARTIAL, more = true) {
    Vec sum[VECTORS][PIXELS];
    GCONV_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      GCONV_UNROLL
      for (int p = 0; p < PIXELS; ++p) sum[v][p] = zero();
    }
    for (int64_t left = std::min(PARTIAL, t.channels - first); left > 0; left -= LANES) {
      const int64_t here = std::min<int64_t>(left, LANES);
      t.ahead->fetch();
      for (int64_t c = 0; c < here; ++c, weights += VECTORS * LANES) {
        Vec weight[VECTORS];
        GCONV_UNROLL
        for (int v = 0; v < VECTORS; ++v) weight[v] = load(weights + v * LANES);
        GCONV_UNROLL
        for (int p = 0; p < PIXELS; ++p) {
          const Vec x = set1(pixels[p * LANES + c]);
          GCONV_UNROLL
          for (int v = 0; v < VECTORS; ++v) sum[v][p] = multiply_add(x, weight[v], sum[v][p]);
        }
      }
      pixels += PIXELS * LANES;
    }
    GCONV_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      GCONV_UNROLL
      for (int p = 0; p < PIXELS; ++p) {
        float* out = t.out + (v * PIXELS + p) * LANES;
        store(out, more ? add(load(out), sum[v][p]) : sum[v][p]);
      }
    }
  }
}

// By the pixels of a tile, at most PIXELS: one vector and two.
template <int PIXELS = POINT_PIXELS>
TileFunction tile_function(int64_t vectors, int64_t pixels) {
  if (pixels < PIXELS) {
    if constexpr (PIXELS > 1) return tile_function<PIXELS - 1>(vectors, pixels);
  }
  return vectors == 2 ? multiply_tile<2, PIXELS> : multiply_tile<1, PIXELS>;
}

// How a run of pixels is cut into tiles: evenly, and of pairs into even ones but for the last pixel, which a
// weight gradient would pair with none.
struct PointCut : EvenCut {
  int64_t all;
  TileFunction run[2][2] = {};  // [longer][two vectors]

  explicit PointCut(int64_t pixels)
      : EvenCut((pixels + PER_SLOT - 1) / PER_SLOT, POINT_PIXELS / PER_SLOT), all(pixels) {
    for (int64_t more = 0; more < 2; ++more)
      for (int64_t vectors = 1; vectors <= 2; ++vectors)
        if (const int64_t whole = PER_SLOT * (least + more); whole > 0 && whole <= POINT_PIXELS)
          run[more][vectors - 1] = tile_function(vectors, whole);
  }
  int64_t whole(int64_t tile) const { return PER_SLOT * (least + (tile < longer)); }
  int64_t first(int64_t tile) const { return PER_SLOT * (tile * least + std::min(tile, longer)); }
  int64_t pixels(int64_t tile) const { return std::min(whole(tile), all - first(tile)); }
  TileFunction function(int64_t tile, int64_t vectors) const {
    return pixels(tile) == whole(tile) ? run[tile < longer][vectors - 1]
                                       : tile_function(vectors, pixels(tile));
  }
};
#endif

// Rows that add_outer takes, those past the last but of whole vectors, and vectors.
constexpr int OUTER_ROWS = TILES ? 2 * TILE_ROWS : WGRAD_CHANNELS;
constexpr int OUTER_VECTORS = LANES == 4 || TILES ? 2 : 3;

// The packed tiles of a block of pixels: tile t lies at t * tile_floats, its blocks of channels one after the
// other.
struct PackedTiles {
  float* data;
  int64_t tile_floats;
  const float* block(int64_t tile, int64_t slots, int64_t at) const {
    return data + tile * tile_floats + at * slots * LANES;
  }
};

#if defined(GCONV_ISA_AMX_BF16)
// out[row][vector] += sum over the pixels of dy[row0 + row] * x[vector0 + vector].
inline void add_outer(int64_t vectors, int64_t rows, const PointCut& cut, const PackedTiles& dy, int64_t row,
                      const PackedTiles& x, int64_t vector, bool fresh, float* out, int64_t out_row,
                      Ahead& ahead) {
  with_tiles(rows, vectors, [&](auto row_tiles, auto together) {
    using Sums = TileSums<decltype(row_tiles)::value, decltype(together)::value>;
    constexpr int64_t SLOTS = pixel_slots(POINT_PIXELS);
    const TileSumsAt at{out, out_row, TILE_ROWS * out_row, LANES};
    fresh ? Sums::clear() : Sums::load(at);
    for (int64_t tile = 0; tile < cut.count; ++tile) {
      ahead.fetch();
      Sums::multiply_add({dy.block(tile, SLOTS, row / LANES), LANES, TILE_ROWS * LANES},
                         {x.block(tile, SLOTS, vector), LANES, SLOTS * LANES});
    }
    Sums::store(at);
  });
}
#else
// out[row][vector] += sum over the pixels of dy[row0 + row] * x[vector0 + vector].
template <int VECTORS>
void add_outer(const PointCut& cut, const PackedTiles& dy, int64_t row, const PackedTiles& x, int64_t vector,
               bool fresh, float* out, int64_t out_row, Ahead& ahead) {
  Vec sum[OUTER_ROWS][VECTORS];
  GCONV_UNROLL
  for (int r = 0; r < OUTER_ROWS; ++r) {
    GCONV_UNROLL
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = zero();
  }
  for (int64_t tile = 0; tile < cut.count; ++tile) {
    ahead.fetch();
    const int64_t slots = pixel_slots(cut.pixels(tile)), next = slots * LANES;
    const float* dy_at = dy.block(tile, slots, row / LANES) + row % LANES;
    const float* x_at = x.block(tile, slots, vector);
    for (int64_t p = 0; p < slots; ++p, dy_at += LANES, x_at += LANES) {
      Vec value[VECTORS];
      GCONV_UNROLL
      for (int v = 0; v < VECTORS; ++v) value[v] = load(x_at + v * next);
      GCONV_UNROLL
      for (int r = 0; r < OUTER_ROWS; ++r) {
        const Vec g = set1(dy_at[r]);
        GCONV_UNROLL
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = multiply_add(g, value[v], sum[r][v]);
      }
    }
  }
  GCONV_UNROLL
  for (int r = 0; r < OUTER_ROWS; ++r) {
    GCONV_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      float* at = out + r * out_row + v * LANES;
      store(at, fresh ? sum[r][v] : add(load(at), sum[r][v]));
    }
  }
}

inline void add_outer(int64_t vectors, int64_t, const PointCut& cut, const PackedTiles& dy, int64_t row,
                      const PackedTiles& x, int64_t vector, bool fresh, float* out, int64_t out_row,
                      Ahead& ahead) {
  const auto add = vectors == 3 ? add_outer<3> : vectors == 2 ? add_outer<2> : add_outer<1>;
  add(cut, dy, row, x, vector, fresh, out, out_row, ahead);
}
#endif

}  // namespace pointwise
}  // namespace GCONV_ISA_NS
}  // namespace gconv
