// The gathering pass of pointwise_conv, compiled once per instruction set: forward and input gradient.
//
// Computes: every pixel's output channels from its source channels. The forward reads x, the input gradient
//   dy through the transposed weights; a stride only means that one side's pixels are some of its tensor's.
// Grid: block of pixels x chunk of output vectors (LANES channels).
// Tile: POINT_PIXELS pixels of two vectors in registers (tile registers: 32 pixels).
// Bytes moved: source once per chunk, output once; a chunk's weights stream from L2, once per tile.
// Accumulation: float32, source channels in order, in cuts of DEPTH; statistics per tile, merged by Chan's
// rule.
//
// A tile's pixels are packed into L1 and computed for all vectors of the chunk before the next: the output is
// written in the order of the tensor. What is done to the results happens while they are in L1.
#pragma once
#include "pointwise_conv_strassen.h"

namespace gconv {
namespace GCONV_ISA_NS {
namespace pointwise {

// The pixels [first, first + pixels), packed, times the weights of a chunk, for source channels [channel,
// channel + channels): into `results`, and after the last of them to the output.
template <typename T>
void compute_tile(const Pass& p, const PointCut& cut, int64_t tile, int64_t first, const float* packed,
                  int64_t channel, int64_t channels, int64_t first_vector, float* results, TaskSums& sums,
                  Ahead& ahead) {
  const int64_t pixels = cut.pixels(tile), vector_floats = whole_tiles(pixels) * LANES;
  const bool last = channel + channels == p.source_channels, partial = p.depth < p.source_channels;
  const TileResult result(p, first, pixels);
  for (int64_t v = 0; v < sums.vectors; v += 2) {
    const int64_t together = std::min<int64_t>(2, sums.vectors - v), vector = first_vector + v;
    float* out = results + (partial ? v * vector_floats : 0);
    if (last) fetch_epilogue<T>(p, result, vector, together, 0, 1);
    const float* weights = p.weight + vector * LANES * p.weight_rows() + channel * together * LANES;
    cut.function(tile, together)({packed, pixels, weights, channels, out, channel > 0, &ahead});
    if (last) store_vectors<T>(p, result, out, vector_floats, first_vector, v, together, sums);
  }
  if (last && p.gaps()) fill_gaps<T>(p, first, pixels, first_vector, sums.vectors);
}

// Floats that a block's results take between cuts, or those of two vectors of a tile.
inline int64_t result_floats(const Pass& p) {
  return (p.depth < p.source_channels ? p.block * p.chunk : 2 * POINT_PIXELS) * LANES;
}

template <typename T>
void pass_task(const Pass& p, int64_t block, int64_t chunk, Scratch& scratch) {
  const int64_t first_vector = chunk * p.chunk, first = block * p.block;
  TaskSums sums(std::min(p.vectors(), first_vector + p.chunk) - first_vector);
  const PointCut cut(p.block_pixels(block));
  Carve carve(scratch);
  const int64_t packed_floats = POINT_PIXELS * p.depth;
  carve.reserve({packed_floats, result_floats(p)});
  float* packed = carve.take(packed_floats);
  float* results = carve.take(result_floats(p));
  for (int64_t channel = 0; channel < p.source_channels; channel += p.depth) {
    const int64_t channels = std::min(p.depth, p.source_channels - channel);
    for (int64_t tile = 0; tile < cut.count; ++tile) {
      const int64_t at = first + cut.first(tile);
      pack_tile<T, Slots::channels>(p.source, at, cut.pixels(tile), channel, channels, packed);
      float* out = p.depth < p.source_channels ? results + tile * POINT_PIXELS * p.chunk * LANES : results;
      const bool more = tile + 1 < cut.count;
      const int64_t next = more ? tile + 1 : 0, next_channel = more ? channel : channel + channels;
      const int64_t next_channels = std::min(p.depth, p.source_channels - next_channel);
      Ahead ahead(requests(channels) * ((sums.vectors + 1) / 2));
      if (next_channels > 0)
        ahead.add(p.source, first + cut.first(next), cut.pixels(next), next_channel * PER_SLOT,
                  next_channels * PER_SLOT, sizeof(T));
      compute_tile<T>(p, cut, tile, at, packed, channel, channels, first_vector, out, sums, ahead);
    }
  }
  store_sums(p, block, first_vector, sums);
}

// Whether results go past the caches.
template <typename T>
bool streams_output(const Pass& p) {
  const int64_t pixels = p.transposed ? p.shape.h * p.shape.w : p.shape.oh * p.shape.ow;
  return !p.add && streams<T>(p.output, p.shape.n * pixels, p.output_channels);
}

// A share of the tasks. Those in turn share what is dearer to fetch anew: the weights of a chunk, or the
// pixels of a block.
inline void run_pass(Pass p, int64_t ith, int64_t nth) {
  static thread_local Scratch scratch;
  const Share share(p.tasks(), ith, nth);
  const bool by_chunk = p.weight_floats() > SHARED_WEIGHT_FLOATS;
  const int64_t blocks = p.blocks(), chunks = p.chunks();
  with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    p.stream = streams_output<T>(p);
    auto task = pass_task<T>;
    if constexpr (!PAIRS)
      if (p.strassen) task = strassen_task<T>;
    for (int64_t i = share.begin; i < share.end; ++i)
      task(p, by_chunk ? i % blocks : i / chunks, by_chunk ? i / blocks : i % chunks, scratch);
    if (p.stream) stream_end();
  });
}

}  // namespace pointwise
}  // namespace GCONV_ISA_NS
}  // namespace gconv
