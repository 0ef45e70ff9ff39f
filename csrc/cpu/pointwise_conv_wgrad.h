// The weight gradient of pointwise_conv, compiled once per instruction set.
//
// Computes: dw[k][c] = sum over pixels of dy[.., k] * x[.., c], both packed (prologue or BN backward applied
//   once per element, on load).
// Grid: split of the pixels x chunk of rows (LANES channels of dy) x chunk of vectors (LANES channels of x).
// Tile: OUTER_ROWS channels of dy by OUTER_VECTORS vectors of x in registers, over the pixels of a block.
// (Tile registers: 32 by 2, a partial sum being that of 32 pixels.)
// Bytes moved: x once per chunk of rows, dy once per chunk of vectors; dw of a chunk stays in L2.
// Accumulation: float32 in three levels (block, split, all), each in a fixed order.
#pragma once
#include "pointwise_conv_pass.h"

namespace gconv {
namespace GCONV_ISA_NS {
namespace pointwise {

constexpr int64_t WGRAD_TASKS = 16;               // more of them leave more partial results to merge
constexpr int64_t WGRAD_WORK = int64_t{1} << 26;  // multiplications that are worth a task
constexpr int64_t LEAST_BLOCKS = 4;               // of a split

struct Wgrad {
  DType dtype;
  int64_t pixels;
  PointSource x, dy;
  void* dweight;
  bool float_weight;  // dweight is of float32, whatever dtype is
  float* partials;    // [splits][rows of all blocks of dy][floats of a row]; none for one split
  int64_t splits, row_chunk, vector_chunk;  // blocks of dy and vectors of x that a task takes

  int64_t row_chunks() const { return (dy.blocks() + row_chunk - 1) / row_chunk; }
  int64_t vector_chunks() const { return (x.blocks() + vector_chunk - 1) / vector_chunk; }
  int64_t tasks() const { return splits * row_chunks() * vector_chunks(); }
  int64_t wanted_tasks(int64_t least) const {
    return tasks_for(pixels * x.channels * dy.channels, least, WGRAD_WORK);
  }
  int64_t row_floats() const { return x.blocks() * LANES; }
  int64_t split_floats() const { return dy.blocks() * LANES * row_floats(); }
  int64_t partial_floats() const { return splits > 1 ? splits * split_floats() : 0; }
  // More would leave as much of partial results as there is to read, or too few pixels to each.
  int64_t most_splits() const {
    const int64_t inputs = pixels * (x.channels + dy.channels);
    const int64_t least = LEAST_BLOCKS * BLOCK_TILES * POINT_PIXELS;
    return std::max<int64_t>(1, std::min(inputs / (2 * split_floats()), pixels / least));
  }
};

// By shape alone, so that every thread count gives the same bits.
inline void plan_cuts(Wgrad& p) {
  p.row_chunk = even_piece(p.dy.blocks(), MOST_VECTORS);
  p.vector_chunk = even_piece(p.x.blocks(), MOST_VECTORS);
  const int64_t chunks = p.row_chunks() * p.vector_chunks();
  p.splits = std::min((p.wanted_tasks(WGRAD_TASKS) + chunks - 1) / chunks, p.most_splits());
}

// Times that a block of so many tiles asks ahead while it is added to a chunk of dw.
inline int64_t outer_requests(int64_t tiles, int64_t rows, int64_t vectors) {
  return tiles * ((rows + OUTER_ROWS - 1) / OUTER_ROWS) * EvenCut(vectors, OUTER_VECTORS).count;
}

// The blocks of a walk over pixels: evenly cut, into whole tiles but for the last.
struct BlockWalk {
  int64_t pixels;
  EvenCut tiles;

  explicit BlockWalk(int64_t all) : pixels(all), tiles(point_tiles(all), BLOCK_TILES) {}
  // Pixels of block i, the first of which is `first`; none past the last.
  int64_t length(int64_t i, int64_t first) const {
    return std::min(pixels - first, (tiles.least + (i < tiles.longer)) * POINT_PIXELS);
  }
};

// Pixels of both sides, packed, to the rows and vectors of a chunk of dw.
inline void add_block(const PointCut& cut, const PackedTiles& dy, const PackedTiles& x, int64_t rows,
                      int64_t vectors, bool fresh, float* dw, Ahead& ahead) {
  const EvenCut groups(vectors, OUTER_VECTORS);
  const int64_t row_floats = vectors * LANES;
  for (int64_t g = 0, v = 0; g < groups.count; ++g) {
    const int64_t together = groups.least + (g < groups.longer);
    for (int64_t row = 0; row < rows; row += OUTER_ROWS) {
      add_outer(together, rows - row, cut, dy, row, x, v, fresh, dw + row * row_floats + v * LANES,
                row_floats, ahead);
    }
    v += together;
  }
}

// A chunk of dw, which starts at row and channel, to the partial results or, of the only split, to dweight.
template <typename T>
void store_chunk(const Wgrad& p, int64_t split, int64_t row, int64_t rows, int64_t channel, int64_t channels,
                 const float* dw, int64_t dw_row) {
  if (p.splits > 1) {
    float* out = p.partials + split * p.split_floats() + row * p.row_floats() + channel;
    for (int64_t r = 0; r < rows; ++r, out += p.row_floats(), dw += dw_row)
      std::memcpy(out, dw, sizeof(float) * static_cast<size_t>(dw_row));
    return;
  }
  const auto rounded = [&](auto* out) {
    out += row * p.x.channels + channel;
    for (int64_t r = 0; r < rows; ++r, out += p.x.channels, dw += dw_row)
      for (int64_t c = 0; c < channels; c += LANES)
        store_lanes(out + c, load(dw + c), static_cast<int>(std::min<int64_t>(LANES, channels - c)));
  };
  p.float_weight ? rounded(static_cast<float*>(p.dweight)) : rounded(static_cast<T*>(p.dweight));
}

// The tiles of a block of pixels of one side, channels [channel, channel + channels), by `pack`.
template <typename Pack>
void pack_block(const PointSource& s, const PointCut& cut, int64_t first, int64_t channel, int64_t channels,
                const PackedTiles& packed, const Pack& pack) {
  for (int64_t tile = 0; tile < cut.count; ++tile)
    pack(s, first + cut.first(tile), cut.pixels(tile), channel, channels,
         packed.data + tile * packed.tile_floats);
}

// Floats of a packed tile: an odd number of eighths of L1's sets apart, so that a block's tiles spread over
// them.
inline int64_t tile_floats(int64_t blocks) {
  constexpr int64_t EIGHTH = 128;
  const int64_t eighths = (blocks * POINT_PIXELS * LANES + EIGHTH - 1) / EIGHTH;
  return (eighths | 1) * EIGHTH;
}

template <typename T>
void wgrad_task(const Wgrad& p, int64_t task, Scratch& scratch) {
  const int64_t split = task / (p.row_chunks() * p.vector_chunks());
  const int64_t block = task / p.vector_chunks() % p.row_chunks() * p.row_chunk;
  const int64_t vector = task % p.vector_chunks() * p.vector_chunk;
  const int64_t blocks = std::min(p.dy.blocks() - block, p.row_chunk);
  const int64_t vectors = std::min(p.x.blocks() - vector, p.vector_chunk);
  const int64_t row = block * LANES, rows = std::min(p.dy.channels - row, blocks * LANES);
  const int64_t channel = vector * LANES, channels = std::min(p.x.channels - channel, vectors * LANES);
  Carve carve(scratch);
  const int64_t dy_floats = tile_floats(blocks), x_floats = tile_floats(vectors);
  carve.reserve({BLOCK_TILES * dy_floats, BLOCK_TILES * x_floats, blocks * LANES * vectors * LANES});
  const PackedTiles dy{carve.take(BLOCK_TILES * dy_floats), dy_floats};
  const PackedTiles x{carve.take(BLOCK_TILES * x_floats), x_floats};
  float* dw = carve.take(blocks * LANES * vectors * LANES);
  Share share(point_tiles(p.pixels), split, p.splits);
  share.begin *= POINT_PIXELS, share.end = std::min(p.pixels, share.end * POINT_PIXELS);
  if (share.begin == share.end)
    std::memset(dw, 0, sizeof(float) * static_cast<size_t>(blocks * LANES * vectors * LANES));
  const BlockWalk walk(share.end - share.begin);
  for (int64_t i = 0, first = share.begin; first < share.end; ++i) {
    const int64_t pixels = walk.length(i, first - share.begin), after = first + pixels;
    const PointCut cut(pixels);
    pack_block(p.dy, cut, first, row, rows, dy, pack_rows<T>);
    pack_block(p.x, cut, first, channel, channels, x, pack_tile<T, Slots::pixels>);
    const int64_t next = walk.length(i + 1, after - share.begin);
    Ahead ahead(outer_requests(cut.count, rows, vectors));
    ahead.add(p.dy, after, next, row, rows, sizeof(T));
    ahead.add(p.x, after, next, channel, channels, sizeof(T));
    add_block(cut, dy, x, rows, vectors, i == 0, dw, ahead);
    first = after;
  }
  store_chunk<T>(p, split, row, rows, channel, channels, dw, vectors * LANES);
}

inline void run_wgrad(const Wgrad& p, int64_t ith, int64_t nth) {
  static thread_local Scratch scratch;
  const Share share(p.tasks(), ith, nth);
  with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t task = share.begin; task < share.end; ++task) wgrad_task<T>(p, task, scratch);
  });
}

// Sums the splits in order.
inline void merge_wgrad(const Wgrad& p, int64_t ith, int64_t nth) {
  if (p.splits == 1) return;
  const Share share(p.dy.channels, ith, nth);
  with_weight_dtype(p.dtype, p.float_weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t row = share.begin; row < share.end; ++row) {
      const float* partial = p.partials + row * p.row_floats();
      T* out = static_cast<T*>(p.dweight) + row * p.x.channels;
      for (int64_t c = 0; c < p.x.channels; c += LANES) {
        Vec sum = zero();
        for (int64_t split = 0; split < p.splits; ++split)
          sum = add(sum, load(partial + split * p.split_floats() + c));
        store_lanes(out + c, sum, static_cast<int>(std::min<int64_t>(LANES, p.x.channels - c)));
      }
    }
  });
}

}  // namespace pointwise
}  // namespace GCONV_ISA_NS
}  // namespace gconv
