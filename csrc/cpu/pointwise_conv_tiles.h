// Pixels on their way to the pointwise_conv tiles, and the tiles.
//
// pack_tile: a few pixels from the tensor, in its order: to float32, prologue applied, as
//   [block of LANES channels][pixel][LANES].
// multiply_tile: packed pixels times packed weights, one scalar of a pixel against one or two vectors of
//   output channels.
// add_outer: packed dy and packed x to a few rows of the weight gradient, one scalar of dy against one to
//   three vectors of x; the pixels are what is summed over, so both sides are as packed for multiply_tile.
#pragma once
#include <type_traits>

#include "conv_source.h"
#include "pointwise_conv.h"

namespace gconv {
namespace GCONV_ISA_NS {
namespace pointwise {

// The pixels of a tensor, or every step-th of them, numbered in order: where each lies, in elements.
class PixelGrid {
 public:
  PixelGrid() = default;
  PixelGrid(const Nhwc& t, int64_t images, int64_t rows, int64_t columns, int64_t step_h, int64_t step_w)
      : columns_(columns),
        rows_(rows),
        image_(t.stride_n),
        row_(t.stride_h * step_h),
        column_(t.stride_w * step_w) {
    if (rows_ == 1 || row_ == columns_ * column_) {  // rows, and then images, that run on are one long row
      columns_ *= rows_, rows_ = 1;
      if (images == 1 || image_ == columns_ * column_) columns_ *= images;
    }
  }
  // Of pixels [first, first + count).
  void offsets(int64_t first, int64_t count, int64_t* at) const {
    const int64_t line = first / columns_;
    int64_t w = first % columns_, h = line % rows_, image = line / rows_;
    int64_t here = image * image_ + h * row_ + w * column_;
    for (int64_t i = 0; i < count; ++i, here += column_, ++w) {
      if (w == columns_) {
        w = 0;
        if (++h == rows_) h = 0, ++image;
        here = image * image_ + h * row_;
      }
      at[i] = here;
    }
  }

 private:
  int64_t columns_ = 1, rows_ = 1, image_ = 0, row_ = 0, column_ = 0;
};

// What is read, pixel by pixel.
struct PointSource : RowSource {
  PixelGrid x_at, y_at;
  int64_t blocks() const { return (channels + LANES - 1) / LANES; }
};

template <typename T, Prologue P>
void pack_tile(const PointSource& s, int64_t first, int64_t pixels, int64_t channel, int64_t channels,
               float* packed) {
  int64_t x_at[POINT_PIXELS], y_at[POINT_PIXELS];
  s.x_at.offsets(first, pixels, x_at);
  if constexpr (P == Prologue::finish) s.y_at.offsets(first, pixels, y_at);
  const T* x = static_cast<const T*>(s.x.data) + channel;
  const T* y = nullptr;
  if constexpr (P == Prologue::finish) y = static_cast<const T*>(s.y.data) + channel;
  const auto block = [&](int64_t c, int lanes) GCONV_LAMBDA {
    const Coefficients<P> coefficients(s, channel + c, lanes);
    for (int64_t i = 0; i < pixels; ++i, packed += LANES) {
      if constexpr (P == Prologue::finish)
        store(packed, coefficients.apply(x + x_at[i] + c, y + y_at[i] + c, lanes));
      else
        store(packed, coefficients.apply(x + x_at[i] + c, x, lanes));
    }
  };
  int64_t c = 0;
  for (; c + LANES <= channels; c += LANES) block(c, LANES);
  if (c < channels) block(c, static_cast<int>(channels - c));
}

template <typename T>
void pack_tile(const PointSource& s, int64_t first, int64_t pixels, int64_t channel, int64_t channels,
               float* packed) {
  switch (s.prologue) {
    case Prologue::none:
      return pack_tile<T, Prologue::none>(s, first, pixels, channel, channels, packed);
    case Prologue::act:
      return pack_tile<T, Prologue::act>(s, first, pixels, channel, channels, packed);
    case Prologue::finish:
      return pack_tile<T, Prologue::finish>(s, first, pixels, channel, channels, packed);
  }
}

struct TileProduct {
  const float* pixels;   // packed
  const float* weights;  // [channel][vector][LANES]
  int64_t channels;      // summed over
  float* out;            // [vector][pixel][LANES]
  bool add;              // to what lies there
};

// One float32 sum over all channels would lose digits that blocked matrix products keep.
constexpr int64_t PARTIAL = 64;

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
      for (int64_t c = 0; c < here; ++c, weights += VECTORS * LANES) {
        Vec weight[VECTORS];
        GCONV_UNROLL
        for (int v = 0; v < VECTORS; ++v) weight[v] = load(weights + v * LANES);
        GCONV_UNROLL
        for (int p = 0; p < PIXELS; ++p) {
          const Vec x = set1(pixels[p * LANES + c]);
          GCONV_UNROLL
          for (int v = 0; v < VECTORS; ++v) sum[v][p] = fma(x, weight[v], sum[v][p]);
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

using TileFunction = void (*)(const TileProduct&);

// By the pixels of a tile, at most PIXELS: one vector and two.
template <int PIXELS = POINT_PIXELS>
TileFunction tile_function(int64_t vectors, int64_t pixels) {
  if (pixels < PIXELS) {
    if constexpr (PIXELS > 1) return tile_function<PIXELS - 1>(vectors, pixels);
  }
  return vectors == 2 ? multiply_tile<2, PIXELS> : multiply_tile<1, PIXELS>;
}

// How a run of pixels is cut into tiles: the first `longer` of them have least + 1.
struct PointCut : EvenCut {
  TileFunction run[2][2] = {};  // [longer][two vectors]

  explicit PointCut(int64_t pixels) : EvenCut(pixels, POINT_PIXELS) {
    for (int64_t more = 0; more < 2; ++more)
      for (int64_t vectors = 1; vectors <= 2; ++vectors)
        if (least + more > 0 && least + more <= POINT_PIXELS)
          run[more][vectors - 1] = tile_function(vectors, least + more);
  }
  int64_t pixels(int64_t tile) const { return least + (tile < longer); }
  int64_t first(int64_t tile) const { return tile * least + std::min(tile, longer); }
  TileFunction function(int64_t tile, int64_t vectors) const { return run[tile < longer][vectors - 1]; }
};

constexpr int OUTER_ROWS = WGRAD_CHANNELS;  // divides LANES
constexpr int OUTER_VECTORS = LANES == 4 ? 2 : 3;

// The packed tiles of a block of pixels: tile t lies at t * tile_floats, its blocks of channels one after the
// other.
struct PackedTiles {
  float* data;
  int64_t tile_floats;
  const float* block(int64_t tile, int64_t pixels, int64_t at) const {
    return data + tile * tile_floats + at * pixels * LANES;
  }
};

// out[row][vector] += sum over the pixels of dy[row0 + row] * x[vector0 + vector].
template <int VECTORS>
void add_outer(const PointCut& cut, const PackedTiles& dy, int64_t row, const PackedTiles& x, int64_t vector,
               bool fresh, float* out, int64_t out_row) {
  Vec sum[OUTER_ROWS][VECTORS];
  GCONV_UNROLL
  for (int r = 0; r < OUTER_ROWS; ++r) {
    GCONV_UNROLL
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = zero();
  }
  for (int64_t tile = 0; tile < cut.count; ++tile) {
    const int64_t pixels = cut.pixels(tile), next = pixels * LANES;
    const float* dy_at = dy.block(tile, pixels, row / LANES) + row % LANES;
    const float* x_at = x.block(tile, pixels, vector);
    for (int64_t p = 0; p < pixels; ++p, dy_at += LANES, x_at += LANES) {
      Vec value[VECTORS];
      GCONV_UNROLL
      for (int v = 0; v < VECTORS; ++v) value[v] = load(x_at + v * next);
      GCONV_UNROLL
      for (int r = 0; r < OUTER_ROWS; ++r) {
        const Vec g = set1(dy_at[r]);
        GCONV_UNROLL
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = fma(g, value[v], sum[r][v]);
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

}  // namespace pointwise
}  // namespace GCONV_ISA_NS
}  // namespace gconv
