// Both gradients of pointwise_conv in one walk over the pixels, compiled once per instruction set.
//
// Computes: dx = w' . dy and dw = dy (x) x of the same block of pixels, one after the other.
// Grid: split of the pixels x chunk of vectors (LANES channels of x, of dx and of dw).
// Tile: those of the two gradients alone.
// Bytes moved: dy, and y, once per chunk; x and dx once; a chunk's weights and its dw stay in L2.
// Accumulation: as alone; each task leaves a partial dw and partial sums.
//
// dy is read, finished and packed once for both, and the mask of dx finds in the caches the x that dw has
// read. With more channels of dy than JOINT_CHANNELS, dw or the weights would leave L2, for more than is
// saved.
#pragma once
#include "pointwise_conv_wgrad.h"

namespace gconv {
namespace GCONV_ISA_NS {
namespace pointwise {

constexpr int64_t JOINT_CHANNELS = 512;
constexpr int64_t JOINT_FLOATS = 64 * 1024;  // of a chunk's weights, and of its dw
constexpr int64_t JOINT_TASKS = 16;
constexpr int64_t LEAST_CHUNK = 4;  // vectors: dy is packed for each chunk anew

struct Backward {
  Pass dx;   // output.data null: not wanted
  Wgrad dw;  // dweight null: not wanted
  bool joint;

  int64_t tasks() const { return dw.splits * dx.chunks(); }
};

// By shape alone, so that every thread count gives the same bits, and one gradient alone those of both.
inline void plan_joint(Backward& b) {
  Pass& p = b.dx;
  const int64_t pairs = (p.vectors() + 1) / 2, most = b.dw.most_splits();
  const int64_t wanted = b.dw.wanted_tasks(JOINT_TASKS);
  int64_t fitting = std::min(MOST_VECTORS, JOINT_FLOATS / (LANES * b.dw.dy.blocks() * LANES));
  int64_t splits;
  for (;; fitting -= 2) {
    p.chunk = 2 * even_piece(pairs, std::max<int64_t>(1, fitting / 2));
    splits = std::min(most, (wanted + p.chunks() - 1) / p.chunks());
    if (splits * p.chunks() >= JOINT_TASKS || fitting <= LEAST_CHUNK) break;
  }
  p.block = std::max<int64_t>(1, (point_tiles(p.pixels) + splits - 1) / splits) * POINT_PIXELS;
  b.dw.splits = std::max<int64_t>(1, p.blocks());
}

template <typename T>
void joint_task(const Backward& b, int64_t split, int64_t chunk, Scratch& scratch) {
  const Pass& p = b.dx;
  const Wgrad& g = b.dw;
  const bool want_dx = p.output.data != nullptr, want_dw = g.dweight != nullptr;
  const int64_t first_vector = chunk * p.chunk, channel = first_vector * LANES;
  const int64_t vectors = std::min(p.vectors(), first_vector + p.chunk) - first_vector;
  const int64_t channels = std::min(g.x.channels - channel, vectors * LANES);
  const int64_t depth = p.depth * PER_SLOT, rows = g.dy.channels;
  TaskSums sums(vectors);

  Carve carve(scratch);
  const int64_t dy_floats = tile_floats(depth / LANES), x_floats = tile_floats(vectors);
  const int64_t slot_floats = PAIRS ? POINT_PIXELS * p.depth : 0;
  const int64_t dw_floats = g.dy.blocks() * LANES * vectors * LANES;
  const bool partial = p.depth < p.source_channels;
  const int64_t result_floats = (partial ? BLOCK_TILES * p.chunk : 2) * POINT_PIXELS * LANES;
  carve.reserve({BLOCK_TILES * dy_floats, BLOCK_TILES * x_floats, slot_floats, dw_floats, result_floats});
  const PackedTiles dy{carve.take(BLOCK_TILES * dy_floats), dy_floats};
  const PackedTiles x{carve.take(BLOCK_TILES * x_floats), x_floats};
  float* slots = carve.take(slot_floats);
  float* dw = carve.take(dw_floats);
  float* results = carve.take(result_floats);

  const int64_t begin = split * p.block, pixels = p.block_pixels(split);
  if (pixels == 0) std::memset(dw, 0, sizeof(float) * static_cast<size_t>(dw_floats));
  const BlockWalk walk(pixels);
  for (int64_t i = 0, first = begin; first < begin + pixels; ++i) {
    const int64_t length = walk.length(i, first - begin), after = first + length;
    const int64_t next = walk.length(i + 1, after - begin);
    const PointCut cut(length);
    Ahead ahead(want_dx * cut.count * requests(p.source_channels) * ((vectors + 1) / 2) +
                want_dw * outer_requests(cut.count, rows, vectors));
    ahead.add(g.dy, after, next, 0, rows, sizeof(T));
    ahead.add(g.x, after, next, channel, channels, sizeof(T));
    if (want_dw) pack_block(g.x, cut, first, channel, channels, x, pack_tile<T, Slots::pixels>);
    for (int64_t row = 0; row < rows; row += depth) {
      const int64_t here = std::min(depth, rows - row);
      for (int64_t tile = 0; tile < cut.count; ++tile) {
        const int64_t at = first + cut.first(tile), count = cut.pixels(tile);
        float* packed = dy.data + tile * dy.tile_floats;
        if (!PAIRS || !want_dx) pack_rows<T>(g.dy, at, count, row, here, packed);
        if (!want_dx) continue;
        if constexpr (PAIRS) {  // dx sums pairs of channels, dw pairs of pixels
          pack_tile<T, Slots::channels>(p.source, at, count, row / PER_SLOT, here / PER_SLOT, slots);
          if (want_dw) pack_rows(slots, count, here, packed);
          packed = slots;
        }
        float* out = results + (partial ? tile * POINT_PIXELS * p.chunk * LANES : 0);
        compute_tile<T>(p, cut, tile, at, packed, row / PER_SLOT, here / PER_SLOT, first_vector, out, sums,
                        ahead);
      }
      if (want_dw) add_block(cut, dy, x, here, vectors, i == 0, dw + row * vectors * LANES, ahead);
    }
    first = after;
  }
  if (want_dw) store_chunk<T>(g, split, 0, rows, channel, channels, dw, vectors * LANES);
  if (want_dx && pixels > 0) store_sums(p, split, first_vector, sums);  // there is a place for each block's
}

inline void run_joint(Backward b, int64_t ith, int64_t nth) {
  static thread_local Scratch scratch;
  const Share share(b.tasks(), ith, nth);
  const int64_t chunks = b.dx.chunks();
  with_dtype(b.dx.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    b.dx.stream = streams_output<T>(b.dx);
    for (int64_t i = share.begin; i < share.end; ++i) joint_task<T>(b, i / chunks, i % chunks, scratch);
    if (b.dx.stream) stream_end();
  });
}

// The weight gradient first: dx leaves past the caches, and reading after that would wait.
inline void run_backward(const Backward& b, int64_t ith, int64_t nth) {
  if (b.joint) return run_joint(b, ith, nth);
  if (b.dw.dweight != nullptr) run_wgrad(b.dw, ith, nth);
  if (b.dx.output.data != nullptr) run_pass(b.dx, ith, nth);
}

}  // namespace pointwise
}  // namespace GCONV_ISA_NS
}  // namespace gconv
