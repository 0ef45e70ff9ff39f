// The kernel of a convolution: the forward of grouped_conv, and its input gradient, which is one (at stride 2
// one for each parity of rows and columns) over dy.
#pragma once
#include "grouped_conv_results.h"

namespace gconv::cuda {

GCONV_DEVICE int divided(int a, int b) { return (a + b - 1) / b; }

// One warp tile's products with `units` units of each strip, from unit `from_unit` of the strip on.
template <typename T, int SHARE, int KH>
GCONV_DEVICE void accumulate(Accumulators& acc, const ConvParams& p, const ConvPass& pass,
                             const unsigned char* shared, const Chunk* strips, int pixel, int from_unit,
                             int units) {
  using P = Product<T>;
  constexpr int STEP = SHARE * KH * P::WEIGHTS;
  const int* offsets = reinterpret_cast<const int*>(shared + p.table_at) + pass.table;
  const int half_steps = units * pass.taps;
  GCONV_UNROLL
  for (int s = 0; s < OCTETS / SHARE; ++s) {
    const BlockStrip band = block_strip(strips, s);
    if (band.count == 0) continue;
    const unsigned char* from = shared + pixel + band.offset;
    const int64_t first_step = int64_t(band.strip) * pass.steps + from_unit * pass.taps / P::HALF_STEPS;
    const T* weights = static_cast<const T*>(p.packed) + (pass.packed + first_step * STEP);
    int at = P::load_half();
    for (; at + P::HALF_STEPS - 1 - P::load_half() < half_steps; at += P::HALF_STEPS, weights += STEP)
      P::template step<SHARE, KH, false>(acc, s * SHARE, from + offsets[at], p.tile.row_pitch, weights);
    if constexpr (P::HALF_STEPS == 2)
      if (half_steps % 2 != 0)
        P::template step<SHARE, KH, true>(acc, s * SHARE, from + offsets[half_steps - 1], p.tile.row_pitch,
                                          weights);
  }
}

// (mean, M2, count) of a channel over the block's warp tiles, or its two sums, in their order.
template <typename T, int SHARE, bool BACKWARD>
GCONV_DEVICE void store_partial(const ConvParams& p, const float* slots, const Chunk* strips,
                                int lane_tiles) {
  using R = Results<T, SHARE, BACKWARD>;
  using P = Product<T>;
  const int64_t tile = block_tile(strips).tile;
  for (int c = int(threadIdx.x); c < p.bands_per_block * R::CHANNELS; c += THREADS) {
    const int band = c / R::CHANNELS, channel = c % R::CHANNELS, octet = c / P::OUT;
    const BlockStrip s = block_strip(strips, octet / SHARE);
    const int within = octet % SHARE * P::OUT + channel % P::OUT;
    if (within >= s.count) continue;
    const int k = s.first + within;
    const float* slot = slots + band * lane_tiles * R::SLOT;
    if constexpr (BACKWARD) {
      float total = 0.0f, normal = 0.0f;
      for (int i = 0; i < lane_tiles; ++i) {
        total += slot[i * R::SLOT + channel];
        normal += slot[i * R::SLOT + R::CHANNELS + channel];
      }
      p.partial[2 * tile * p.cut.out + k] = total;
      p.partial[(2 * tile + 1) * p.cut.out + k] = normal;
    } else {
      // About the first warp tile's mean, so that nothing of the means' size is summed.
      const float origin = slot[channel];
      float count = 0.0f, shift = 0.0f, m2 = 0.0f;
      for (int i = 0; i < lane_tiles; ++i) {
        const float n = slot[i * R::SLOT + 2 * R::CHANNELS];
        count += n;
        shift += n > 0.0f ? n * (slot[i * R::SLOT + channel] - origin) : 0.0f;
      }
      shift = shift / count;
      for (int i = 0; i < lane_tiles; ++i) {
        const float n = slot[i * R::SLOT + 2 * R::CHANNELS];
        const float d = slot[i * R::SLOT + channel] - origin - shift;
        m2 += n > 0.0f ? slot[i * R::SLOT + R::CHANNELS + channel] + n * (d * d) : 0.0f;
      }
      p.partial[tile * p.cut.out + k] = origin + shift;
      p.partial[(p.tiles + tile) * p.cut.out + k] = m2;
      p.partial[2 * p.tiles * p.cut.out + tile] = count;  // the same from every block of the tile
    }
  }
}

// The strips of the block, the offsets of half-steps and the lanes of the tile.
template <typename T, int SHARE>
GCONV_DEVICE void make_tables(const ConvParams& p, unsigned char* shared, Chunk* strips, int lane_tiles) {
  using P = Product<T>;
  const int in_block = p.bands_per_block * (OCTETS / SHARE);
  const int first_strip = int(blockIdx.x % unsigned(p.channel_blocks)) * in_block;
  for (int i = int(threadIdx.x); i < in_block; i += THREADS) {
    Chunk c{{0, 0, 0, 0}};
    if (first_strip + i < p.cut.strips) {
      const Strip s = strip_of<P::OUT, UNIT<T>>(p.cut, first_strip + i);
      const int units = s.unit - block_tile(strips).unit;
      if (s.end > s.first)
        c = {{uint32_t(s.first), uint32_t(s.end - s.first), uint32_t(units) * 16, uint32_t(first_strip + i)}};
    }
    store_chunk(strips + i, c);
  }
  int* const offsets = reinterpret_cast<int*>(shared + p.table_at);
  const int units = p.cut.units < p.chunk ? p.cut.units : p.chunk;
  for (int pass = 0; pass < p.passes; ++pass) {
    const int taps = p.pass[pass].taps;
    for (int i = int(threadIdx.x); i < units * taps; i += THREADS)
      offsets[p.pass[pass].table + i] = i / taps * 16 + p.pass[pass].offset[i % taps];
  }
  uint32_t* const lanes = reinterpret_cast<uint32_t*>(shared + p.lanes_at);
  for (int i = int(threadIdx.x); i < lane_tiles * P::PIXELS; i += THREADS) lanes[i] = pixel_word(p, i);
}

// computes: y = conv(act(x), w), epilogue or statistics; or dx = conv_transpose(finish(dy), w), masked, sums
// grid:     (tiles of pixels x blocks of channels, the latter next to each other)
// tile:     bands of ROWS rows x columns x images; a warp has ROWS rows x 16 (float: 32) of its lanes x 4
//           octets
// bytes:    x (dy, and y with finish) once with the tile's halo, the output once, residual or x once
// accum.:   float, unit by unit, tap by tap; statistics by warp tile, block, then merge.h
template <typename T, int SHARE, int KH, bool BACKWARD>
GCONV_KERNEL(THREADS, BLOCKS<T>)
void grouped_conv_kernel(const ConvParams p) {
  using P = Product<T>;
  using R = Results<T, SHARE, BACKWARD>;
  constexpr int STRIPS = OCTETS / SHARE;
  unsigned char* const shared = shared_memory();
  Chunk* const strips = reinterpret_cast<Chunk*>(shared + p.strips_at) + BLOCK_TILE_CHUNKS;
  const uint32_t* const lanes = reinterpret_cast<const uint32_t*>(shared + p.lanes_at);
  float* const slots = reinterpret_cast<float*>(shared + p.slots_at);
  const bool whole = p.chunk >= p.block_units;
  const int lane_tiles = divided(p.lanes, P::PIXELS), work = lane_tiles * p.bands_per_block;
  if (threadIdx.x == 0) {
    const unsigned tile = blockIdx.x / unsigned(p.channel_blocks);
    const int first_strip = int(blockIdx.x % unsigned(p.channel_blocks)) * p.bands_per_block * STRIPS;
    const unsigned line = tile / unsigned(p.columns), column = tile % unsigned(p.columns);
    put_block_tile(strips, {int64_t(line / unsigned(p.row_tiles)) * p.tile.images, int64_t(tile),
                            int(line % unsigned(p.row_tiles)) * p.tile.h.count, int(column) * p.tile.w.count,
                            strip_of<P::OUT, UNIT<T>>(p.cut, first_strip).unit});
  }
  block_sync();

  for (int pass = 0; pass < (BACKWARD ? p.passes : 1); ++pass) {
    const ConvPass& taps = p.pass[pass];
    for (int unit = 0; unit < p.block_units; unit += p.chunk) {
      if (!whole || pass == 0) {
        if (pass > 0 || unit > 0) block_sync();
        const BlockTile at = block_tile(strips);
        const int left = p.block_units - unit;
        load_tile<T, THREADS, !BACKWARD, BACKWARD>(p.source, p.tile, at.image, at.row, at.column,
                                                   at.unit + unit, left < p.chunk ? left : p.chunk, shared);
        copy_commit();
        if (pass == 0 && unit == 0) make_tables<T, SHARE>(p, shared, strips, lane_tiles);
        copy_wait<0>();
        block_sync();
      }
      for (int begin = 0; begin < work; begin += WARPS) {
        const int item = begin + warp(), band = item / lane_tiles;
        if (item >= work || block_strip(strips + band * STRIPS, 0).count == 0) continue;
        const int lane_tile = item - band * lane_tiles;
        const TilePixel pixel = tile_pixel(lanes, lane_tile * P::PIXELS + P::load_pixel());
        const int pixel_at =
            pixel.row * p.tile.row_pitch + (pixel.image * p.tile.w.size + pixel.column) * p.tile.pitch;
        const int units = p.cut.units - unit < p.chunk ? p.cut.units - unit : p.chunk;
        Accumulators acc = {};
        float* const parked = reinterpret_cast<float*>(shared + p.parked_at) + threadIdx.x;
        if (unit > 0) {
          GCONV_UNROLL
          for (int i = 0; i < ROWS * OCTETS * 4; ++i)
            acc[i / (OCTETS * 4)][i / 4 % OCTETS][i % 4] = parked[i * THREADS];
        }
        accumulate<T, SHARE, KH>(acc, p, taps, shared, strips + band * STRIPS, pixel_at, unit, units);
        if (unit + p.chunk >= p.block_units) {
          R(p, taps, strips, band, lane_tile, lanes).finish(acc, slots + item * R::SLOT, pass == 0);
        } else {
          GCONV_UNROLL
          for (int i = 0; i < ROWS * OCTETS * 4; ++i)
            parked[i * THREADS] = acc[i / (OCTETS * 4)][i / 4 % OCTETS][i % 4];
        }
      }
    }
  }
  if (p.partial == nullptr) return;
  block_sync();
  store_partial<T, SHARE, BACKWARD>(p, slots, strips, lane_tiles);
}

}  // namespace gconv::cuda
