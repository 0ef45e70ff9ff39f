// A forward or an input gradient of pointwise_conv, and how its work is cut, compiled once per instruction
// set.
#pragma once
#include "conv_sums.h"
#include "pointwise_conv_tiles.h"

namespace gconv {
namespace GCONV_ISA_NS {
namespace pointwise {

constexpr int64_t DEPTH = 256;  // source channels of a cut: a packed tile fills half of L1
constexpr int64_t SHARED_WEIGHT_FLOATS = 128 * 1024;  // packed weights that stay in L2 beside pixels
constexpr int64_t RESULT_FLOATS = 48 * 1024;          // a block's results between two cuts
constexpr int64_t PASS_TASKS = 32, PASS_WORK = int64_t{1} << 25;  // multiplications that are worth a task
constexpr int64_t LEAST_TILES = TILES ? 4 : 8;  // of a block: below, weights are fetched for too few pixels

// By Strassen's algorithm (pointwise_conv_strassen.h).
constexpr int64_t PRODUCTS = 7;    // of halves: of source channels, of output channels and of pixels
constexpr int64_t LEAST_RUNS = 4;  // of a block, as LEAST_TILES

// A forward or an input gradient, told in one vocabulary: "source" is read, "output" written.
struct Pass {
  DType dtype;
  int64_t pixels;                            // that are computed
  int64_t source_channels, output_channels;  // source channels in slots
  bool transposed;
  PointSource source;
  const void* raw_weight;  // [K, C]
  bool float_weight;       // of float32, whatever dtype is
  const float* ahead;      // weights packed before the call; null: by its first stage, into the workspace
  const float* weight;     // packed
  const float* affine;     // forward epilogue
  bool relu;
  bool moments;   // (mean, M2) of the output into partials
  Nhwc residual;  // added to the output
  Nhwc mask_x;    // input-gradient epilogue
  const float* mask_act;
  bool add;  // to the output, what the prologue's affine makes of the masked gradient
  Nhwc output;
  PixelGrid output_at, residual_at, mask_at;
  PointwiseConvShape shape;
  bool stream;                  // write it past the caches
  float* partials;              // [blocks][2][output channels]
  int64_t block, chunk, depth;  // units, vectors and source channels that are computed together
  // By Strassen's algorithm a unit is a run of pixels of an image, both its halves a tile; else a pixel.
  bool strassen;
  EvenCut runs;  // of an image

  int64_t work() const { return pixels * source_channels * PER_SLOT * output_channels; }
  int64_t vectors() const { return (output_channels + LANES - 1) / LANES; }
  int64_t chunks() const { return (vectors() + chunk - 1) / chunk; }
  int64_t image_pixels() const { return shape.oh * shape.ow; }
  int64_t units() const { return strassen ? shape.n * runs.count : pixels; }
  int64_t blocks() const { return (units() + block - 1) / block; }
  int64_t tasks() const { return blocks() * chunks(); }
  int64_t first_pixel(int64_t unit) const {
    if (!strassen) return unit;
    const int64_t run = unit % runs.count;
    return unit / runs.count * image_pixels() + run * runs.least + std::min(run, runs.longer);
  }
  int64_t block_begin(int64_t at) const { return std::min(units(), at * block); }
  int64_t block_pixels(int64_t at) const {
    return first_pixel(block_begin(at + 1)) - first_pixel(block_begin(at));
  }
  int64_t weight_rows() const {
    return strassen ? source_channels / 4 * PRODUCTS : whole_tiles(source_channels);
  }
  int64_t weight_floats() const { return vectors() * LANES * weight_rows(); }
  int64_t packed_floats() const { return ahead != nullptr ? 0 : weight_floats(); }  // in the workspace
  int64_t partial_floats() const {
    return moments || mask_act != nullptr ? blocks() * 2 * output_channels : 0;
  }
  // Two vectors' weights lie together; by Strassen's algorithm those of the first two and of the last two of
  // four.
  int64_t pair_vectors(int64_t vector) const {
    return strassen ? std::min<int64_t>(2, (vectors() - vector / 4 * 4) / 2)
                    : std::min<int64_t>(2, vectors() - vector / 2 * 2);
  }
  // An input gradient leaves pixels between those that are computed; adding leaves them as they are.
  bool gaps() const { return transposed && !add && (shape.stride_h > 1 || shape.stride_w > 1); }
};

// Whether Strassen's algorithm is used: by the shape of an image alone, so that no result depends on the
// batch. It can where halves are whole vectors. It pays where the additions are spread over enough channels
// of the other side, and the packing of 7/4 of the weights over enough pixels; with fewer source channels its
// rounding errors are nearly twice those of a sum in order.
inline bool uses_strassen(Use use, int64_t source_channels, int64_t output_channels, int64_t image_pixels) {
  constexpr int64_t HALVES = 2 * LANES, LEAST_SOURCE = 256, LEAST_OUTPUT = 64;
  constexpr int64_t LEAST_PIXELS = LANES == 16 ? 12 * 12 : 24 * 24;
  if (PAIRS || use == Use::never || source_channels % HALVES != 0 || output_channels % HALVES != 0)
    return false;
  if (use == Use::always) return true;
  return LANES > 4 && source_channels >= LEAST_SOURCE && output_channels >= LEAST_OUTPUT &&
         image_pixels >= LEAST_PIXELS;
}

// The most units of a block: so few that there are tasks enough, at least `least` of them.
inline int64_t most_units(const Pass& p, int64_t units, int64_t least) {
  const int64_t tasks = tasks_for(p.work(), PASS_TASKS, PASS_WORK);
  const int64_t wanted = (tasks + p.chunks() - 1) / p.chunks();
  return std::max(least, (units + wanted - 1) / wanted);
}

// Cuts the work by shape alone, so that every thread count gives the same bits.
inline void plan_direct(Pass& p) {
  p.chunk = 2 * even_piece((p.vectors() + 1) / 2, MOST_VECTORS / 2);
  p.depth = even_piece(p.source_channels, DEPTH);
  p.depth = (p.depth + LANES - 1) / LANES * LANES;
  const int64_t tiles = point_tiles(p.pixels);
  int64_t most = most_units(p, tiles, LEAST_TILES);
  if (p.source_channels > p.depth) most = std::min(most, RESULT_FLOATS / (p.chunk * LANES * POINT_PIXELS));
  p.block = std::max<int64_t>(1, even_piece(tiles, std::max<int64_t>(1, most))) * POINT_PIXELS;
}

// Floats of the products of a run with the weights of so many vectors.
inline int64_t product_floats(int64_t vectors) { return PRODUCTS * vectors / 2 * POINT_PIXELS * LANES; }

inline void plan_strassen(Pass& p) {
  constexpr int64_t HALVES = 2 * LANES;
  p.runs = EvenCut(p.image_pixels(), 2 * POINT_PIXELS);
  p.chunk = 4 * even_piece((p.vectors() + 3) / 4, MOST_VECTORS / 4);
  p.depth = (even_piece(p.source_channels, DEPTH) + HALVES - 1) / HALVES * HALVES;
  int64_t most = most_units(p, p.units(), LEAST_RUNS);
  if (p.source_channels > p.depth) most = std::min(most, RESULT_FLOATS / product_floats(p.chunk));
  p.block = std::max<int64_t>(1, even_piece(p.units(), std::max<int64_t>(1, most)));
}

}  // namespace pointwise
}  // namespace GCONV_ISA_NS
}  // namespace gconv
