// What a warp does with the results of its tile: the epilogues, the stores, statistics and sums.
#pragma once
#include "grouped_conv_params.h"
#include "grouped_conv_product.h"

namespace gconv::cuda {

// A pixel of a tile: lanes count its columns, then its bands, then its images. A lane beyond the last has the
// first pixel, not known. Kept in shared memory as one word, for the divisions.
struct TilePixel {
  int image, row, column;
  bool known;
};
constexpr int MOST_IMAGES = 16, MOST_BANDS = 8, MOST_COLUMNS = 256;  // of a tile
GCONV_DEVICE uint32_t pixel_word(const ConvParams& p, int lane_index) {
  const bool known = lane_index < p.lanes;
  const int at = known ? lane_index : 0, line = at / p.tile.w.count, image = line / p.bands;
  const int row = (line - image * p.bands) * ROWS, column = at - line * p.tile.w.count;
  return uint32_t(image) | uint32_t(row) << 8 | uint32_t(column) << 16 | uint32_t(!known) << 31;
}
GCONV_DEVICE TilePixel tile_pixel(const uint32_t* lanes, int lane_index) {
  const uint32_t word = lanes[lane_index];
  return {int(word & 255), int(word >> 8 & 255), int(word >> 16 & 0x7fff), word >> 31 == 0};
}

// A strip as a block keeps it in shared memory: its first channel, how many (0: no such strip), and where its
// units begin in a pixel of the tile, in bytes; and its number.
struct BlockStrip {
  int first, count, offset, strip;
};
GCONV_DEVICE BlockStrip block_strip(const Chunk* strips, int index) {
  const Chunk c = load_chunk(strips + index);
  return {int(c.word[0]), int(c.word[1]), int(c.word[2]), int(c.word[3])};
}

// What a block works on: its tile of pixels, by number, first image and first output, and the first input
// unit that it reads. Kept in shared memory before the strips, for registers are scarce while products are
// summed.
struct BlockTile {
  int64_t image, tile;
  int row, column, unit;
};
constexpr int BLOCK_TILE_CHUNKS = 2;
GCONV_DEVICE void put_block_tile(Chunk* strips, const BlockTile& t) {
  store_chunk(strips - 2,
              {{uint32_t(t.image), uint32_t(t.image >> 32), uint32_t(t.row), uint32_t(t.column)}});
  store_chunk(strips - 1, {{uint32_t(t.tile), uint32_t(t.unit), 0, 0}});
}
GCONV_DEVICE BlockTile block_tile(const Chunk* strips) {
  const Chunk a = load_chunk(strips - 2), b = load_chunk(strips - 1);
  return {int64_t(uint64_t(a.word[0]) | uint64_t(a.word[1]) << 32), int64_t(b.word[0]), int(a.word[2]),
          int(a.word[3]), int(b.word[1])};
}

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

// Whether it is so in every lane.
GCONV_DEVICE bool all_lanes(bool so) {
  int all = so;
  GCONV_UNROLL
  for (int mask = 1; mask < WARP; mask *= 2) all &= shuffle_xor(all, mask);
  return all != 0;
}

// ---- the results

template <typename T, int SHARE, bool BACKWARD>
struct Results {
  using P = Product<T>;
  static constexpr int CHANNELS = OCTETS * P::OUT;  // of a band
  static constexpr int N = OCTETS * P::VALUES;      // of a lane
  static constexpr int SLOT = 2 * CHANNELS + 1;  // what a warp tile leaves: two values per channel, a count

  const ConvParams& p;
  const Chunk* strips;  // of the warp's band of channels
  // Where channel 0 of this lane's pixels is in the first of their rows: in the output, and in the residual
  // or x.
  int64_t out[P::HALVES], other[P::HALVES];
  int rows[P::HALVES];        // so many of the ROWS there are
  BlockStrip unit[P::UNITS];  // from this lane's units on, to their strips' ends

  GCONV_DEVICE Results(const ConvParams& params, const ConvPass& pass, const Chunk* block_strips, int band,
                       int lane_tile, const uint32_t* lanes)
      : p(params), strips(block_strips + band * (OCTETS / SHARE)) {
    const BlockTile at = block_tile(block_strips);
    GCONV_UNROLL
    for (int h = 0; h < P::HALVES; ++h) {
      const TilePixel pixel = tile_pixel(lanes, lane_tile * P::PIXELS + P::pixel(h));
      const int64_t n = at.image + pixel.image;
      const int row = (at.row + pixel.row) * step_h() + pass.parity_h;
      const int column = (at.column + pixel.column) * (BACKWARD ? p.step_w : 1) + pass.parity_w;
      const bool known = pixel.known && n < p.images && column < p.width && row < p.height;
      const int left = step_h() == 1 ? p.height - row : (p.height - row + 1) / 2;
      rows[h] = !known ? 0 : left < ROWS ? left : ROWS;
      out[h] = 0;
      other[h] = 0;
      if (known) {
        out[h] = n * p.out.stride_n + row * p.out.stride_h + column * p.out.stride_w;
        other[h] = n * p.residual.stride_n + row * p.residual.stride_h + column * p.residual.stride_w;
      }
    }
    GCONV_UNROLL
    for (int i = 0; i < P::UNITS; ++i) unit[i] = strip_from(P::unit_octet(i), P::unit_channel());
  }

  // The channels from one in an octet on, to its strip's end.
  GCONV_DEVICE BlockStrip strip_from(int octet, int channel) const {
    BlockStrip s = block_strip(strips, octet / SHARE);
    const int skip = octet % SHARE * P::OUT + channel;
    s.first += skip, s.count -= skip;
    return s;
  }

  GCONV_DEVICE int step_h() const { return BACKWARD ? p.step_h : 1; }
  GCONV_DEVICE bool known(int r, int h) const { return r < rows[h]; }
  // Whether all of this lane's pixels are.
  GCONV_DEVICE bool all_known() const { return rows[0] == ROWS && rows[P::HALVES - 1] == ROWS; }

  // Row `row` of the vectors at channel `i` of strip s.
  GCONV_DEVICE float coefficient(int row, const BlockStrip& s, int i) const {
    return i < s.count ? p.vectors[int64_t(row) * p.cut.out + s.first + i] : 0.0f;
  }

  GCONV_DEVICE void load_other(int r, int h, float (&v)[OCTETS][P::VALUES]) const {
    Chunk c[P::UNITS];
    GCONV_UNROLL
    for (int i = 0; i < P::UNITS; ++i) {
      const bool inside = known(r, h) && unit[i].count > 0;
      const T* from = static_cast<const T*>(p.residual.data) +
                      (other[h] + r * step_h() * p.residual.stride_h + unit[i].first);
      c[i] = {{0, 0, 0, 0}};
      if (p.out_aligned) {
        if (inside) c[i] = load_chunk_constant(from);
      } else if (inside) {
        c[i] = load_elements<T>(from, unit[i].count);
      }
    }
    P::from_units(c, v);
  }

  // f(a lane's channel, result, residual or x) of all results.
  template <typename F>
  GCONV_DEVICE void with_other(Accumulators& acc, const F& f) const {
    GCONV_UNROLL
    for (int r = 0; r < ROWS; ++r) GCONV_UNROLL
    for (int h = 0; h < P::HALVES; ++h) {
      float v[OCTETS][P::VALUES];
      load_other(r, h, v);
      GCONV_UNROLL
      for (int i = 0; i < N; ++i)
        f(i, acc[r][i / P::VALUES][h * P::VALUES + i % P::VALUES], v[i / P::VALUES][i % P::VALUES]);
    }
  }

  // Stores a row of results. Those of 16 bits are rounded here.
  GCONV_DEVICE void store(int r, const Accumulators& acc) const {
    GCONV_UNROLL
    for (int h = 0; h < P::HALVES; ++h) {
      float v[OCTETS][P::VALUES];
      GCONV_UNROLL
      for (int i = 0; i < N; ++i)
        v[i / P::VALUES][i % P::VALUES] = acc[r][i / P::VALUES][h * P::VALUES + i % P::VALUES];
      Chunk c[P::UNITS];
      P::to_units(v, c);
      GCONV_UNROLL
      for (int i = 0; i < P::UNITS; ++i) {
        if (!known(r, h) || unit[i].count <= 0) continue;
        T* to = static_cast<T*>(p.out.data) + (out[h] + r * step_h() * p.out.stride_h + unit[i].first);
        if (p.out_aligned)
          store_chunk(to, c[i]);
        else
          store_elements<T>(to, c[i], unit[i].count);
      }
    }
  }

  // y = relu?(c*acc + d + residual).
  GCONV_DEVICE void epilogue(Accumulators& acc) const {
    if (p.vectors != nullptr) {
      GCONV_UNROLL
      for (int o = 0; o < OCTETS; ++o) {
        const BlockStrip s = strip_from(o, P::channel());
        GCONV_UNROLL
        for (int i = 0; i < P::VALUES; ++i) {
          const float scale = coefficient(0, s, i), shift = coefficient(1, s, i);
          GCONV_UNROLL
          for (int r = 0; r < ROWS; ++r) GCONV_UNROLL
          for (int h = 0; h < P::HALVES; ++h)
            acc[r][o][h * P::VALUES + i] = scale * acc[r][o][h * P::VALUES + i] + shift;
        }
      }
    }
    if (p.residual.data != nullptr) with_other(acc, [](int, float& y, float residual) { y += residual; });
    if (p.relu) {
      GCONV_UNROLL
      for (int i = 0; i < ROWS * OCTETS * 4; ++i) {
        float& y = acc[i / (OCTETS * 4)][i / 4 % OCTETS][i % 4];
        y = relu(y);
      }
    }
  }

  // acc as it is stored.
  GCONV_DEVICE void round(Accumulators& acc) const {
    if constexpr (sizeof(T) == 2) {
      GCONV_UNROLL
      for (int i = 0; i < ROWS * OCTETS * 4; i += 2) {
        float (&d)[4] = acc[i / (OCTETS * 4)][i / 4 % OCTETS];
        const uint32_t word = pair_bits<T>(d[i % 4], d[i % 4 + 1]);
        d[i % 4] = to_float(T{uint16_t(word)}), d[i % 4 + 1] = to_float(T{uint16_t(word >> 16)});
      }
    }
  }

  GCONV_DEVICE static float value(const Accumulators& acc, int i, int r, int h) {
    return acc[r][i / P::VALUES][h * P::VALUES + i % P::VALUES];
  }

  // What a warp tile leaves of its statistics: of each channel the mean and the sum of squares about it.
  GCONV_DEVICE void leave(float* slot, float mean, float m2, float count) const {
    if (!has_channel()) return;
    slot[own_channel()] = mean;
    slot[CHANNELS + own_channel()] = m2;
    slot[2 * CHANNELS] = count;
  }

  // Where every pixel of the warp tile is known: (mean, M2) of a lane's pixels, then of two lanes at a time.
  // All means are those of a power of 2 of values, added in pairs.
  GCONV_DEVICE void statistics_of_all(const Accumulators& acc, float* slot) const {
    constexpr int PIXELS = ROWS * P::HALVES;
    float mean[N], m2[N];
    GCONV_UNROLL
    for (int i = 0; i < N; ++i) {
      float v[PIXELS];
      GCONV_UNROLL
      for (int j = 0; j < PIXELS; ++j) v[j] = value(acc, i, j / P::HALVES, j % P::HALVES);
      GCONV_UNROLL
      for (int n = PIXELS / 2; n > 0; n /= 2) GCONV_UNROLL
      for (int j = 0; j < PIXELS / 2; ++j)
        if (j < n) v[j] += v[j + n];
      mean[i] = v[0] * (1.0f / PIXELS), m2[i] = 0.0f;
      GCONV_UNROLL
      for (int j = 0; j < PIXELS; ++j) {
        const float d = value(acc, i, j / P::HALVES, j % P::HALVES) - mean[i];
        m2[i] += d * d;
      }
    }
    int n = N;
    float half_count = PIXELS / 2;
    GCONV_UNROLL
    for (int mask = 16; mask >= P::LOW_LANE; mask /= 2) {
      const bool upper = lane() & mask, split = n > 1;
      if (split) n /= 2;
      GCONV_UNROLL
      for (int i = 0; i < N; ++i)
        if (i < n) {
          const int j = split ? i + n : i;
          const float other_mean = shuffle_xor(upper || !split ? mean[i] : mean[j], mask);
          const float other_m2 = shuffle_xor(upper || !split ? m2[i] : m2[j], mask);
          const float own_mean = upper ? mean[j] : mean[i], own_m2 = upper ? m2[j] : m2[i];
          const float d = own_mean - other_mean;
          mean[i] = 0.5f * own_mean + 0.5f * other_mean;
          m2[i] = own_m2 + other_m2 + d * d * half_count;
        }
      half_count *= 2;
    }
    leave(slot, mean[0], m2[0], 2 * half_count);
  }

  // The same of any pixels, in two passes.
  GCONV_DEVICE void statistics_of_some(const Accumulators& acc, float* slot) const {
    float count = 0.0f;
    GCONV_UNROLL
    for (int h = 0; h < P::HALVES; ++h) count += float(rows[h]);
    GCONV_UNROLL
    for (int mask = P::LOW_LANE; mask <= 16; mask *= 2) count += shuffle_xor(count, mask);
    const float share = 1.0f / (count > 1.0f ? count : 1.0f);
    float v[N], mean[N], squares[N];
    GCONV_UNROLL
    for (int i = 0; i < N; ++i) {
      v[i] = 0.0f;
      GCONV_UNROLL
      for (int r = 0; r < ROWS; ++r) GCONV_UNROLL
      for (int h = 0; h < P::HALVES; ++h) v[i] += known(r, h) ? value(acc, i, r, h) : 0.0f;
    }
    const float own_mean = sum_pixels<N, P::LOW_LANE>(v) * share;
    gather_channels<N>(own_mean, mean);
    GCONV_UNROLL
    for (int i = 0; i < N; ++i) {
      v[i] = squares[i] = 0.0f;
      GCONV_UNROLL
      for (int r = 0; r < ROWS; ++r) GCONV_UNROLL
      for (int h = 0; h < P::HALVES; ++h) {
        const float d = known(r, h) ? value(acc, i, r, h) - mean[i] : 0.0f;
        v[i] += d, squares[i] += d * d;
      }
    }
    // The rounding of the mean leaves a small sum of deviations: Chan, Golub & LeVeque's correction.
    const float rest = sum_pixels<N, P::LOW_LANE>(v), m2 = sum_pixels<N, P::LOW_LANE>(squares);
    leave(slot, own_mean + rest * share, m2 - rest * (rest * share), count);
  }

  // The channel of the band whose sum sum_pixels leaves in this lane.
  GCONV_DEVICE static int own_channel() {
    const int i = lane() / (WARP / N);
    return i / P::VALUES * P::OUT + P::channel() + i % P::VALUES;
  }

  // Of lanes that have the same one, the first.
  GCONV_DEVICE static bool has_channel() { return lane() % (WARP / N) < P::OUT / P::VALUES; }

  // acc where a*x + b > 0, else 0, and its sums, alone and times (x - mean)*rstd; added to the slot unless
  // `first`.
  GCONV_DEVICE void mask(Accumulators& acc, float* slot, bool first) const {
    if (!all_known()) {
      GCONV_UNROLL
      for (int i = 0; i < ROWS * OCTETS * 4; ++i)
        if (!known(i / (OCTETS * 4), i % 4 / P::VALUES)) acc[i / (OCTETS * 4)][i / 4 % OCTETS][i % 4] = 0.0f;
    }
    float a[N], b[N], mean[N], total[N], normal[N];
    GCONV_UNROLL
    for (int i = 0; i < N; ++i) {
      const BlockStrip s = strip_from(i / P::VALUES, P::channel());
      a[i] = coefficient(0, s, i % P::VALUES), b[i] = coefficient(1, s, i % P::VALUES);
      mean[i] = coefficient(2, s, i % P::VALUES);
      total[i] = normal[i] = 0.0f;
    }
    with_other(acc, [&](int i, float& g, float x) {
      if (a[i] * x + b[i] <= 0.0f) g = 0.0f;
      total[i] += g;
      normal[i] += g * (x - mean[i]);
    });
    GCONV_UNROLL
    for (int i = 0; i < N; ++i)
      normal[i] *= coefficient(3, strip_from(i / P::VALUES, P::channel()), i % P::VALUES);
    const float sum = sum_pixels<N, P::LOW_LANE>(total), sum_normal = sum_pixels<N, P::LOW_LANE>(normal);
    if (!has_channel()) return;
    const int channel = own_channel();
    slot[channel] = first ? sum : slot[channel] + sum;
    slot[CHANNELS + channel] = first ? sum_normal : slot[CHANNELS + channel] + sum_normal;
  }

  GCONV_DEVICE void finish(Accumulators& acc, float* slot, bool first) const {
    if constexpr (BACKWARD) {
      if (p.vectors != nullptr) mask(acc, slot, first);
    } else {
      epilogue(acc);
      if (p.partial != nullptr) round(acc);
    }
    GCONV_UNROLL
    for (int r = 0; r < ROWS; ++r) store(r, acc);
    if constexpr (!BACKWARD) {
      if (p.partial == nullptr) return;
      if (all_lanes(all_known()))
        statistics_of_all(acc, slot);
      else
        statistics_of_some(acc, slot);
    }
  }
};

}  // namespace gconv::cuda
