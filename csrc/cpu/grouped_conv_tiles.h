// The register tiles of grouped_conv_pass.h: a few pixels of one row, over one group's source channels.
#pragma once
#include "grouped_conv_rows.h"
#include "tile_registers.h"

namespace gconv {
namespace GCONV_ISA_NS {

struct TileArgs {
  const float* source[3];      // packed row of each vertical tap, at the tile's first column
  const float* weight[3];      // packed weights of each vertical tap, first vector
  int rows;                    // vertical taps inside the image
  int channels;                // source channels per group
  int64_t block;               // floats between channel blocks of a row
  int64_t column;              // Fetch::direct: floats between columns of a row, LANES otherwise
  int64_t pair;                // floats from the first vector's weights to the second's
  bool skip_first, skip_last;  // the outermost columns are padding: nothing to add
  float* out;                  // result of the first vector, LANES floats per pixel
  int64_t out_step;            // floats between the tile's pixels in out
  int64_t out_pair;            // floats from the first vector's results to the second's
  int taps;                    // scattered taps only: how many, where, and their weights
  int step;
  int offset[3];
  int tap[3];
};

// Weights lie [vector][channel][3][3][LANES].
constexpr int WEIGHTS_PER_CHANNEL = 9 * LANES;

// Calls channel(source, weights, part) for every source channel of a row of taps, in order, and flush()
// after each partial sum. One float32 sum over all terms of a wide group would lose digits that blocked
// matrix products keep; a narrow group has too few terms to matter.
template <Fetch FETCH, typename Channel, typename Flush>
GCONV_INLINE void each_channel(const TileArgs& a, const Channel& channel, const Flush& flush) {
  constexpr int PER_BLOCK = block_channels(FETCH), PARTIAL = 64;
  constexpr int NARROW = LANES == 4 ? 8 : 24;  // without fused multiply-add every product is rounded too
  for (int r = 0; r < a.rows; ++r) {
    const float* block = a.source[r];
    const float* w = a.weight[r];
    for (int c0 = 0; c0 < a.channels; c0 += PER_BLOCK, block += a.block) {
      if (a.channels > NARROW && c0 % PARTIAL == 0 && r + c0 > 0) flush();
      const int here = std::min(PER_BLOCK, a.channels - c0);
      if constexpr (one_group(FETCH)) {
        for (int c = 0; c < here; ++c, w += WEIGHTS_PER_CHANNEL)
          channel(block + c, w, std::integral_constant<int, 0>());
      } else {
        channel(block, w, std::integral_constant<int, 0>());
        w += WEIGHTS_PER_CHANNEL;
        if (here == 1) continue;
        channel(block, w, std::integral_constant<int, 1>());
        w += WEIGHTS_PER_CHANNEL;
      }
    }
  }
}

// Horizontal taps on neighbouring columns: source column j feeds pixel (j - t) / STEP through tap t.
template <int TAPS, int STEP, Fetch FETCH, int VECTORS, int PIXELS>
void tile_shared(const TileArgs& a) {
  constexpr int COLUMNS = (PIXELS - 1) * STEP + TAPS;
  constexpr int TAP_FLOATS = TAPS == 2 ? 2 * LANES : LANES;  // two taps are the outer ones of three
  Vec acc[VECTORS][PIXELS];
  GCONV_UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    GCONV_UNROLL
    for (int p = 0; p < PIXELS; ++p) acc[v][p] = zero();
  }
  const bool skip_first = a.skip_first, skip_last = a.skip_last;
  const int64_t column = FETCH == Fetch::direct ? a.column : LANES;
  const auto channel = [&](const float* s, const float* w, auto part) GCONV_LAMBDA {
    constexpr int PART = decltype(part)::value;
    Vec weight[VECTORS][TAPS];
    GCONV_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      GCONV_UNROLL
      for (int t = 0; t < TAPS; ++t) weight[v][t] = load(w + v * a.pair + t * TAP_FLOATS);
    }
    GCONV_UNROLL
    for (int j = 0; j < COLUMNS; ++j) {
      if (j == 0 && skip_first) continue;
      if (j == COLUMNS - 1 && skip_last) continue;
      const Vec x = fetch_part<FETCH, PART>(s + j * column);
      GCONV_UNROLL
      for (int t = 0; t < TAPS; ++t) {
        if (j - t < 0 || (j - t) % STEP != 0 || (j - t) / STEP >= PIXELS) continue;
        GCONV_UNROLL
        for (int v = 0; v < VECTORS; ++v)
          acc[v][(j - t) / STEP] = multiply_add(x, weight[v][t], acc[v][(j - t) / STEP]);
      }
    }
  };
  bool flushed = false;
  const auto flush = [&]() GCONV_LAMBDA {
    GCONV_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      GCONV_UNROLL
      for (int p = 0; p < PIXELS; ++p) {
        float* out = a.out + v * a.out_pair + p * a.out_step;
        store(out, flushed ? add(load(out), acc[v][p]) : acc[v][p]);
        acc[v][p] = zero();
      }
    }
    flushed = true;
  };
  each_channel<FETCH>(a, channel, flush);
  flush();
}

// Taps at any distance (dilation): one fetch per pixel and tap.
template <Fetch FETCH, int PIXELS>
void tile_scattered(const TileArgs& a) {
  Vec acc[PIXELS];
  GCONV_UNROLL
  for (int p = 0; p < PIXELS; ++p) acc[p] = zero();
  const auto channel = [&](const float* s, const float* w, auto part) GCONV_LAMBDA {
    constexpr int PART = decltype(part)::value;
    for (int t = 0; t < a.taps; ++t) {
      const Vec weight = load(w + a.tap[t] * LANES);
      const float* column = s + a.offset[t] * LANES;
      GCONV_UNROLL
      for (int p = 0; p < PIXELS; ++p)
        acc[p] = multiply_add(fetch_part<FETCH, PART>(column + p * a.step * LANES), weight, acc[p]);
    }
  };
  bool flushed = false;
  const auto flush = [&]() GCONV_LAMBDA {
    GCONV_UNROLL
    for (int p = 0; p < PIXELS; ++p) {
      float* out = a.out + p * a.out_step;
      store(out, flushed ? add(load(out), acc[p]) : acc[p]);
      acc[p] = zero();
    }
    flushed = true;
  };
  each_channel<FETCH>(a, channel, flush);
  flush();
}

#if defined(GCONV_ISA_AMX_BF16)
// One or two tile registers of pixels by one or two vectors of a group, all taps at any distance: partial
// sums over LANES slots of a tap.
template <int ROWS, int VECTORS>
void tile_product(const TileArgs& a) {
  using Sums = TileSums<ROWS, VECTORS>;
  const int64_t pixel = a.step * LANES;
  Sums::clear();
  for (int r = 0; r < a.rows; ++r) {
    const float *block = a.source[r], *w = a.weight[r];
    for (int c = 0; c < a.channels; c += LANES, block += a.block, w += LANES * WEIGHTS_PER_CHANNEL)
      for (int t = 0; t < a.taps; ++t)
        Sums::multiply_add({block + a.offset[t] * LANES, pixel, TILE_ROWS * pixel},
                           {w + a.tap[t] * LANES, WEIGHTS_PER_CHANNEL, a.pair});
  }
  Sums::store({a.out, a.out_step, TILE_ROWS * a.out_step, a.out_pair});
}

// A run of pixels, in whole tiles: there is room behind the last.
inline void tile_products(TileArgs a, int64_t pixels, int64_t vectors) {
  const EvenCut cut(whole_tiles(pixels) / TILE_ROWS, 2);
  for (int64_t i = 0; i < cut.count; ++i) {
    const int64_t here = (cut.least + (i < cut.longer)) * TILE_ROWS;
    with_tiles(here, vectors, [&](auto rows, auto together) {
      tile_product<decltype(rows)::value, decltype(together)::value>(a);
    });
    for (int r = 0; r < a.rows; ++r) a.source[r] += here * a.step * LANES;
    a.out += here * a.out_step;
  }
}
#endif

using TileFunction = void (*)(const TileArgs&);

enum TileKind { three_taps, three_taps_step2, two_taps, one_tap, scattered };

template <Fetch FETCH, int VECTORS, int PIXELS>
TileFunction tile_function(TileKind kind, int pixels) {
  if (pixels < PIXELS) {
    if constexpr (PIXELS > 1) return tile_function<FETCH, VECTORS, PIXELS - 1>(kind, pixels);
  }
  switch (kind) {
    case three_taps:
      return tile_shared<3, 1, FETCH, VECTORS, PIXELS>;
    case three_taps_step2:
      return tile_shared<3, 2, FETCH, VECTORS, PIXELS>;
    case two_taps:
      return tile_shared<2, 1, FETCH, VECTORS, PIXELS>;
    case one_tap:
      return tile_shared<1, 1, FETCH, VECTORS, PIXELS>;
    default:
      break;
  }
  if constexpr (VECTORS == 1 && FETCH != Fetch::direct) return tile_scattered<FETCH, PIXELS>;
  return nullptr;
}

// How a vector is computed: by its fetch, or two broadcast vectors of one group together.
enum TileLanes { broadcast_lanes, direct_lanes, twin_lanes, own_lanes, pair_lanes, direct_pair_lanes };

inline TileLanes lanes_of(Fetch fetch, int vectors) {
  if (fetch == Fetch::direct) return vectors == 2 ? direct_pair_lanes : direct_lanes;
  if (vectors == 2) return pair_lanes;
  return fetch == Fetch::broadcast ? broadcast_lanes : fetch == Fetch::twin ? twin_lanes : own_lanes;
}

inline TileFunction tile_function(TileKind kind, TileLanes lanes, int pixels) {
  switch (lanes) {
    case broadcast_lanes:
      return tile_function<Fetch::broadcast, 1, TILE_SINGLE>(kind, pixels);
    case direct_lanes:
      return tile_function<Fetch::direct, 1, TILE_SINGLE>(kind, pixels);
    case twin_lanes:
      return tile_function<Fetch::twin, 1, TILE_SINGLE>(kind, pixels);
    case own_lanes:
      return tile_function<Fetch::lanes, 1, TILE_SINGLE>(kind, pixels);
    case pair_lanes:
      return tile_function<Fetch::broadcast, 2, TILE_PAIR>(kind, pixels);
    default:
      return tile_function<Fetch::direct, 2, TILE_PAIR>(kind, pixels);
  }
}

// How a run of pixels is cut into tiles.
struct TileCut : EvenCut {
  TileFunction run[2] = {nullptr, nullptr};  // of `least` pixels and of one more

  TileCut() = default;
  TileCut(TileKind kind, TileLanes lanes, int64_t run_pixels) {
    const bool pair = lanes == pair_lanes || lanes == direct_pair_lanes;
    if (run_pixels == 0) return;
    static_cast<EvenCut&>(*this) = EvenCut(run_pixels, pair ? TILE_PAIR : TILE_SINGLE);
    run[0] = tile_function(kind, lanes, static_cast<int>(least));
    if (longer > 0) run[1] = tile_function(kind, lanes, static_cast<int>(least) + 1);
  }
};

}  // namespace GCONV_ISA_NS
}  // namespace gconv
