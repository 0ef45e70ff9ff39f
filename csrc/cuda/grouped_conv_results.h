// What a warp does with the results of its tile: the epilogues, the stores, statistics and sums.
#pragma once
#include "grouped_conv_params.h"
#include "grouped_conv_product.h"

namespace gconv::cuda {

// A pixel of a tile: lanes count its columns, then its bands, then its images. Beyond the last lane it is the
// first pixel, not known.
struct TilePixel {
  int image, row, column;
  bool known;
};
GCONV_DEVICE TilePixel tile_pixel(const ConvParams& p, int lane_index) {
  const bool known = lane_index < p.lanes;
  const int at = known ? lane_index : 0, line = at / p.tile.w.count;
  return {line / p.bands, line % p.bands * ROWS, at - line * p.tile.w.count, known};
}

// A strip as a block keeps it in shared memory: its first channel, how many (0: no such strip), and where its
// units begin in a pixel of the tile, in bytes.
struct BlockStrip {
  int first, count, offset;
};
GCONV_DEVICE BlockStrip block_strip(const Chunk* strips, int index) {
  const Chunk c = load_chunk(strips + index);
  return {int(c.word[0]), int(c.word[1]), int(c.word[2])};
}

struct WarpTile {
  int64_t image;          // of the block's tile
  int row, column;        // its first output
  int parity_h, parity_w;
  int lane_tile;
  const Chunk* strips;    // of the warp's band of channels
};

// ---- over the lanes that hold other pixels of the same channels

// The sum of v[i] over those lanes, i being the lane's number divided by 32 / N.
template <int N, int LOW_LANE>
GCONV_DEVICE float sum_pixels(float (&v)[N]) {
  int n = N;
  GCONV_UNROLL
  for (int mask = 16; mask >= LOW_LANE; mask /= 2) {
    if (n == 1) {
      v[0] += shuffle_xor(v[0], mask);
      continue;
    }
    n /= 2;
    const bool upper = lane() & mask;
    GCONV_UNROLL
    for (int i = 0; i < N / 2; ++i)
      if (i < n) {
        const float other = shuffle_xor(upper ? v[i] : v[i + n], mask);
        v[i] = (upper ? v[i + n] : v[i]) + other;
      }
  }
  return v[0];
}

// All N of what sum_pixels has left one of in each lane.
template <int N>
GCONV_DEVICE void gather_channels(float mine, float (&v)[N]) {
  v[0] = mine;
  int n = 1;
  GCONV_UNROLL
  for (int mask = WARP / N; mask <= 16; mask *= 2) {
    const bool upper = lane() & mask;
    GCONV_UNROLL
    for (int i = 0; i < N / 2; ++i)
      if (i < n) {
        const float other = shuffle_xor(v[i], mask);
        v[i + n] = upper ? v[i] : other;
        v[i] = upper ? other : v[i];
      }
    n *= 2;
  }
}

// ---- the results

template <typename T, int SHARE, bool BACKWARD>
struct Results {
  using P = Product<T>;
  static constexpr int CHANNELS = OCTETS * P::OUT;  // of a band
  static constexpr int N = OCTETS * P::VALUES;      // of a lane
  static constexpr int SLOT = 2 * CHANNELS + 1;     // what a warp tile leaves: two values per channel, a count

  const ConvParams& p;
  const WarpTile& at;
  int64_t out_at[P::HALVES], other_at[P::HALVES];
  int rows[P::HALVES];           // the first output row of this lane's pixel; height where it has none
  BlockStrip unit[P::UNITS];     // from this lane's units on, to their strips' ends

  GCONV_DEVICE Results(const ConvParams& params, const WarpTile& tile) : p(params), at(tile) {
    GCONV_UNROLL
    for (int h = 0; h < P::HALVES; ++h) {
      const TilePixel pixel = tile_pixel(p, at.lane_tile * P::PIXELS + P::pixel(h));
      const int64_t n = at.image + pixel.image;
      const int w = (at.column + pixel.column) * p.step_w + at.parity_w;
      const bool known = pixel.known && n < p.images && w < p.width;
      rows[h] = known ? (at.row + pixel.row) * p.step_h + at.parity_h : p.height;
      out_at[h] = n * p.out.stride_n + w * p.out.stride_w;
      other_at[h] = n * p.residual.stride_n + w * p.residual.stride_w;
    }
    GCONV_UNROLL
    for (int i = 0; i < P::UNITS; ++i) unit[i] = strip_from(P::unit_octet(i), P::unit_channel());
  }

  // The channels from one in an octet on, to its strip's end.
  GCONV_DEVICE BlockStrip strip_from(int octet, int channel) const {
    BlockStrip s = block_strip(at.strips, octet / SHARE);
    const int skip = octet % SHARE * P::OUT + channel;
    s.first += skip, s.count -= skip;
    return s;
  }

  GCONV_DEVICE int row(int r, int h) const { return rows[h] + r * p.step_h; }
  GCONV_DEVICE bool known(int r, int h) const { return row(r, h) < p.height; }

  // Row `row` of the vectors at channel `i` of strip s.
  GCONV_DEVICE float coefficient(int row, const BlockStrip& s, int i) const {
    return i < s.count ? p.vectors[int64_t(row) * p.cut.out + s.first + i] : 0.0f;
  }

  GCONV_DEVICE void load_other(int r, int h, float (&v)[OCTETS][P::VALUES]) const {
    Chunk c[P::UNITS];
    GCONV_UNROLL
    for (int i = 0; i < P::UNITS; ++i) {
      const bool inside = known(r, h) && unit[i].count > 0;
      const T* from = static_cast<const T*>(p.residual.data);
      if (inside) from += other_at[h] + row(r, h) * p.residual.stride_h + unit[i].first;
      c[i] = load_unit<T>(from, inside ? unit[i].count : 0, p.out_aligned);
    }
    P::from_units(c, v);
  }

  GCONV_DEVICE void store(int r, int h, const float (&v)[OCTETS][P::VALUES]) const {
    Chunk c[P::UNITS];
    P::to_units(v, c);
    GCONV_UNROLL
    for (int i = 0; i < P::UNITS; ++i) {
      if (!known(r, h) || unit[i].count <= 0) continue;
      T* to = static_cast<T*>(p.out.data) + (out_at[h] + row(r, h) * p.out.stride_h + unit[i].first);
      store_unit<T>(to, c[i], unit[i].count, p.out_aligned);
    }
  }

  // y = relu?(c*acc + d + residual); with statistics acc becomes y as stored.
  GCONV_DEVICE void forward(Accumulators& acc) const {
    if (p.vectors != nullptr) {
      GCONV_UNROLL
      for (int o = 0; o < OCTETS; ++o) {
        const BlockStrip s = strip_from(o, P::channel());
        GCONV_UNROLL
        for (int i = 0; i < P::VALUES; ++i) {
          const float scale = coefficient(0, s, i), shift = coefficient(1, s, i);
          GCONV_UNROLL
          for (int r = 0; r < ROWS; ++r)
            GCONV_UNROLL
          for (int h = 0; h < P::HALVES; ++h)
            acc[r][o][h * P::VALUES + i] = scale * acc[r][o][h * P::VALUES + i] + shift;
        }
      }
    }
    GCONV_UNROLL
    for (int r = 0; r < ROWS; ++r)
      GCONV_UNROLL
    for (int h = 0; h < P::HALVES; ++h) {
      float v[OCTETS][P::VALUES] = {};
      if (p.residual.data != nullptr) load_other(r, h, v);
      GCONV_UNROLL
      for (int i = 0; i < N; ++i) {
        float& y = v[i / P::VALUES][i % P::VALUES];
        float& a = acc[r][i / P::VALUES][h * P::VALUES + i % P::VALUES];
        y += a;
        if (p.relu) y = relu(y);
        a = to_float(from_float<T>(y));
      }
      store(r, h, v);
    }
  }

  // (mean, M2) of each channel of acc about its own mean, and the count.
  GCONV_DEVICE void statistics(const Accumulators& acc, float* slot) const {
    float count = 0.0f;
    GCONV_UNROLL
    for (int r = 0; r < ROWS; ++r)
      GCONV_UNROLL
    for (int h = 0; h < P::HALVES; ++h) count += known(r, h) ? 1.0f : 0.0f;
    GCONV_UNROLL
    for (int mask = P::LOW_LANE; mask <= 16; mask *= 2) count += shuffle_xor(count, mask);
    const float share = 1.0f / (count > 1.0f ? count : 1.0f);

    const auto value = [&](int i, int r, int h) {
      return acc[r][i / P::VALUES][h * P::VALUES + i % P::VALUES];
    };
    float v[N], mean[N], squares[N];
    GCONV_UNROLL
    for (int i = 0; i < N; ++i) {
      v[i] = 0.0f;
      GCONV_UNROLL
      for (int r = 0; r < ROWS; ++r)
        GCONV_UNROLL
      for (int h = 0; h < P::HALVES; ++h) v[i] += known(r, h) ? value(i, r, h) : 0.0f;
    }
    const float own_mean = sum_pixels<N, P::LOW_LANE>(v) * share;
    gather_channels<N>(own_mean, mean);
    GCONV_UNROLL
    for (int i = 0; i < N; ++i) {
      v[i] = squares[i] = 0.0f;
      GCONV_UNROLL
      for (int r = 0; r < ROWS; ++r)
        GCONV_UNROLL
      for (int h = 0; h < P::HALVES; ++h) {
        const float d = known(r, h) ? value(i, r, h) - mean[i] : 0.0f;
        v[i] += d, squares[i] += d * d;
      }
    }
    // The rounding of the mean leaves a small sum of deviations: Chan, Golub & LeVeque's correction.
    const float rest = sum_pixels<N, P::LOW_LANE>(v), m2 = sum_pixels<N, P::LOW_LANE>(squares);
    const int channel = own_channel();
    slot[channel] = own_mean + rest * share;
    slot[CHANNELS + channel] = m2 - rest * (rest * share);
    slot[2 * CHANNELS] = count;
  }

  // The channel of the band whose sum sum_pixels leaves in this lane.
  GCONV_DEVICE static int own_channel() {
    const int i = lane() / (WARP / N);
    return i / P::VALUES * P::OUT + P::channel() + i % P::VALUES;
  }

  // dx = acc where a*x + b > 0, with the sums of dx and dx*(x - mean)*rstd; added to the slot unless `first`.
  GCONV_DEVICE void masked(const Accumulators& acc, float* slot, bool first) const {
    float a[N], b[N], mean[N], total[N], normal[N];
    GCONV_UNROLL
    for (int i = 0; i < N; ++i) {
      const BlockStrip s = strip_from(i / P::VALUES, P::channel());
      a[i] = coefficient(0, s, i % P::VALUES), b[i] = coefficient(1, s, i % P::VALUES);
      mean[i] = coefficient(2, s, i % P::VALUES);
      total[i] = normal[i] = 0.0f;
    }
    GCONV_UNROLL
    for (int r = 0; r < ROWS; ++r)
      GCONV_UNROLL
    for (int h = 0; h < P::HALVES; ++h) {
      float v[OCTETS][P::VALUES];
      load_other(r, h, v);
      GCONV_UNROLL
      for (int i = 0; i < N; ++i) {
        float& x = v[i / P::VALUES][i % P::VALUES];
        float g = acc[r][i / P::VALUES][h * P::VALUES + i % P::VALUES];
        if (a[i] * x + b[i] <= 0.0f) g = 0.0f;
        total[i] += known(r, h) ? g : 0.0f;
        normal[i] += known(r, h) ? g * (x - mean[i]) : 0.0f;
        x = g;
      }
      store(r, h, v);
    }
    float rstd[N];
    GCONV_UNROLL
    for (int i = 0; i < N; ++i) {
      rstd[i] = coefficient(3, strip_from(i / P::VALUES, P::channel()), i % P::VALUES);
      normal[i] *= rstd[i];
    }
    const float sum = sum_pixels<N, P::LOW_LANE>(total), sum_normal = sum_pixels<N, P::LOW_LANE>(normal);
    const int channel = own_channel();
    slot[channel] = first ? sum : slot[channel] + sum;
    slot[CHANNELS + channel] = first ? sum_normal : slot[CHANNELS + channel] + sum_normal;
  }

  GCONV_DEVICE void finish(Accumulators& acc, float* slot, bool first) const {
    if constexpr (BACKWARD) {
      if (p.vectors != nullptr) {
        masked(acc, slot, first);
        return;
      }
      GCONV_UNROLL
      for (int r = 0; r < ROWS; ++r)
        GCONV_UNROLL
      for (int h = 0; h < P::HALVES; ++h) {
        float v[OCTETS][P::VALUES];
        GCONV_UNROLL
        for (int i = 0; i < N; ++i)
          v[i / P::VALUES][i % P::VALUES] = acc[r][i / P::VALUES][h * P::VALUES + i % P::VALUES];
        store(r, h, v);
      }
    } else {
      forward(acc);
      if (p.partial != nullptr) statistics(acc, slot);
    }
  }
};

}  // namespace gconv::cuda
