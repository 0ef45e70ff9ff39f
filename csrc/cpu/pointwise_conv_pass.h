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
#include "conv_sums.h"
#include "pointwise_conv_tiles.h"

namespace gconv {
namespace GCONV_ISA_NS {
namespace pointwise {

constexpr int64_t DEPTH = 256;  // source channels of a cut: a packed tile fills half of L1
constexpr int64_t SHARED_WEIGHT_FLOATS = 128 * 1024;  // packed weights that stay in L2 beside pixels
constexpr int64_t RESULT_FLOATS = 48 * 1024;          // a block's results between two cuts
constexpr int64_t PASS_TASKS = 32;
constexpr int64_t LEAST_TILES = TILES ? 4 : 8;  // of a block: below, weights are fetched for too few pixels

// A forward or an input gradient, told in one vocabulary: "source" is read, "output" written.
struct Pass {
  DType dtype;
  int64_t pixels;                            // that are computed
  int64_t source_channels, output_channels;  // source channels in slots
  bool transposed;
  PointSource source;
  const void* raw_weight;  // [K, C]
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
  int64_t block, chunk, depth;  // pixels, vectors and source channels that are computed together

  int64_t vectors() const { return (output_channels + LANES - 1) / LANES; }
  int64_t chunks() const { return (vectors() + chunk - 1) / chunk; }
  int64_t blocks() const { return (pixels + block - 1) / block; }
  int64_t tasks() const { return blocks() * chunks(); }
  int64_t block_pixels(int64_t at) const { return std::min(pixels, (at + 1) * block) - at * block; }
  int64_t weight_rows() const { return whole_tiles(source_channels); }
  int64_t weight_floats() const { return vectors() * LANES * weight_rows(); }
  int64_t packed_floats() const { return ahead != nullptr ? 0 : weight_floats(); }  // in the workspace
  int64_t partial_floats() const {
    return moments || mask_act != nullptr ? blocks() * 2 * output_channels : 0;
  }
  // Two vectors' weights lie together.
  int64_t pair_vectors(int64_t vector) const { return std::min<int64_t>(2, vectors() - vector / 2 * 2); }
  // An input gradient leaves pixels between those that are computed; adding leaves them as they are.
  bool gaps() const { return transposed && !add && (shape.stride_h > 1 || shape.stride_w > 1); }
};

// Cuts the work by shape alone, so that every thread count gives the same bits.
inline void plan_cuts(Pass& p) {
  p.chunk = 2 * even_piece((p.vectors() + 1) / 2, MOST_VECTORS / 2);
  p.depth = even_piece(p.source_channels, DEPTH);
  p.depth = (p.depth + LANES - 1) / LANES * LANES;
  const int64_t tiles = (p.pixels + POINT_PIXELS - 1) / POINT_PIXELS;
  const int64_t wanted = (PASS_TASKS + p.chunks() - 1) / p.chunks();
  int64_t most = std::max(LEAST_TILES, (tiles + wanted - 1) / wanted);
  if (p.source_channels > p.depth) most = std::min(most, RESULT_FLOATS / (p.chunk * LANES * POINT_PIXELS));
  p.block = std::max<int64_t>(1, even_piece(tiles, std::max<int64_t>(1, most))) * POINT_PIXELS;
}

// Output vector v as [source channel in slots][LANES], `step` floats from one to the next. Lanes past the
// tail repeat the last or are 0: what they compute is never stored.
template <typename T>
void pack_vector(const Pass& p, int64_t v, int64_t step, float* out) {
  const T* weight = static_cast<const T*>(p.raw_weight);
  if (p.transposed) {
    const int lanes = static_cast<int>(std::min<int64_t>(LANES, p.output_channels - v * LANES));
    const auto row = [&](int64_t k) { return load_lanes(weight + k * p.output_channels + v * LANES, lanes); };
    for (int64_t k = 0; k < p.source_channels; ++k)
      store(out + k * step, pair_slots(row(k * PER_SLOT), row(k * PER_SLOT + PER_SLOT - 1)));
    return;
  }
  const T* rows[LANES];
  for (int64_t l = 0; l < LANES; ++l)
    rows[l] = weight + std::min(v * LANES + l, p.output_channels - 1) * p.source_channels * PER_SLOT;
  Vec before = zero();
  for_columns(rows, p.source_channels * PER_SLOT, [&](int64_t c, Vec lanes) {
    if (!PAIRS || c % 2 == 1) store(out + c / PER_SLOT * step, pair_slots(PAIRS ? before : lanes, lanes));
    before = lanes;
  });
}

// A share of the weights, as [pair of vectors][source channel][vector][LANES]; tiles that are not whole end
// in zeros.
inline void pack_weights(const Pass& p, float* packed, int64_t ith, int64_t nth) {
  const Share share(p.vectors(), ith, nth);
  with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t v = share.begin; v < share.end; ++v) {
      const int64_t step = p.pair_vectors(v) * LANES;
      float* out = packed + v / 2 * 2 * LANES * p.weight_rows() + v % 2 * LANES;
      pack_vector<T>(p, v, step, out);
      for (int64_t c = p.source_channels; c < p.weight_rows(); ++c) store(out + c * step, zero());
    }
  });
}

// One or two vectors' results for a tile.
struct TileResult {
  const float* values;  // [vector][pixel][LANES]
  int64_t vector;       // first output vector
  int64_t pixels;
  int64_t output_at[POINT_PIXELS], residual_at[POINT_PIXELS], mask_at[POINT_PIXELS];
};

// Writes a vector of a tile.
template <typename T, bool AFFINE, bool RESIDUAL>
void store_results(const Pass& p, const TileResult& r, const float* values, int64_t channel, int lanes) {
  T* out = static_cast<T*>(p.output.data) + channel;
  const T* residual = RESIDUAL ? static_cast<const T*>(p.residual.data) + channel : nullptr;
  Vec scale = zero(), shift = zero();
  if constexpr (AFFINE) {
    scale = load_lanes(p.affine + channel, lanes);
    shift = load_lanes(p.affine + p.output_channels + channel, lanes);
  }
  const bool last_relu = p.relu, stream = p.stream && lanes == LANES;
  for (int64_t i = 0; i < r.pixels; ++i) {
    Vec y = load(values + i * LANES);
    if constexpr (AFFINE) y = fma(scale, y, shift);
    if constexpr (RESIDUAL) y = add(y, load_lanes(residual + r.residual_at[i], lanes));
    if (last_relu) y = relu(y);
    if (stream)
      stream_as(out + r.output_at[i], y);
    else
      store_lanes(out + r.output_at[i], y, lanes);
  }
}

// g = dx where the prologue's ReLU passed, stored, or a*g added to the output; and the sums of g and g*xhat,
// of g as it was stored or, added, before any rounding.
template <typename T, bool ADD>
void store_masked(const Pass& p, const TileResult& r, const float* values, int64_t channel, int lanes,
                  CompensatedSum (&sums)[2]) {
  T* out = static_cast<T*>(p.output.data) + channel;
  const T* x = static_cast<const T*>(p.mask_x.data) + channel;
  const auto row = [&](int64_t i) { return load_lanes(p.mask_act + i * p.output_channels + channel, lanes); };
  const Vec a = row(0), b = row(1), mean = row(2), rstd = row(3);
  const bool stream = p.stream && lanes == LANES;
  Vec sum = zero(), deviations = zero();
  for (int64_t i = 0; i < r.pixels; ++i) {
    const Vec raw = load_lanes(x + r.mask_at[i], lanes);
    Vec g = relu_mask(load(values + i * LANES), fma(a, raw, b));
    T* at = out + r.output_at[i];
    if constexpr (ADD) {
      store_lanes(at, fma(a, g, load_lanes(at, lanes)), lanes);
    } else {
      g = rounded_to(x, g);
      if (stream)
        stream_as(at, g);
      else
        store_lanes(at, g, lanes);
    }
    sum = add(sum, g);
    deviations = fma(g, sub(raw, mean), deviations);
  }
  sums[0].add(sum);
  sums[1].add(mul(deviations, rstd));
}

// The pixels between those of an input gradient's tile: 0, or the residual.
template <typename T>
void fill_gaps(const Pass& p, int64_t first, int64_t pixels, int64_t channel, int64_t channels) {
  const PointwiseConvShape& s = p.shape;
  const auto fill = [&](int64_t image, int64_t h, int64_t w) {
    T* out = static_cast<T*>(p.output.data) + image * p.output.stride_n + h * p.output.stride_h +
             w * p.output.stride_w + channel;
    const T* residual = nullptr;
    if (p.residual.data != nullptr)
      residual = static_cast<const T*>(p.residual.data) + image * p.residual.stride_n +
                 h * p.residual.stride_h + w * p.residual.stride_w + channel;
    for (int64_t c = 0; c < channels; c += LANES) {
      const int lanes = static_cast<int>(std::min<int64_t>(LANES, channels - c));
      const Vec value = residual == nullptr ? zero() : load_lanes(residual + c, lanes);
      if (p.stream && lanes == LANES)
        stream_as(out + c, value);
      else
        store_lanes(out + c, value, lanes);
    }
  };
  for (int64_t i = first; i < first + pixels; ++i) {
    const int64_t image = i / (s.oh * s.ow), row = i / s.ow % s.oh * s.stride_h,
                  column = i % s.ow * s.stride_w;
    for (int64_t h = row; h < std::min(s.h, row + s.stride_h); ++h)
      for (int64_t w = column; w < std::min(s.w, column + s.stride_w); ++w)
        if (h != row || w != column) fill(image, h, w);
  }
}

template <typename T>
void store_vector(const Pass& p, const TileResult& r, const float* values, int64_t vector, Moments* moments,
                  CompensatedSum (&sums)[2]) {
  const int64_t channel = vector * LANES;
  const int lanes = static_cast<int>(std::min<int64_t>(LANES, p.output_channels - channel));
  if (p.mask_act != nullptr)
    return p.add ? store_masked<T, true>(p, r, values, channel, lanes, sums)
                 : store_masked<T, false>(p, r, values, channel, lanes, sums);
  const bool residual = p.residual.data != nullptr;
  if (p.affine != nullptr)
    residual ? store_results<T, true, true>(p, r, values, channel, lanes)
             : store_results<T, true, false>(p, r, values, channel, lanes);
  else
    residual ? store_results<T, false, true>(p, r, values, channel, lanes)
             : store_results<T, false, false>(p, r, values, channel, lanes);
  if (p.moments) row_moments<T>(values, r.pixels, moments);
}

// Asks for a tile's pixels of a tensor, which arrive while the tile is multiplied.
template <typename T>
GCONV_INLINE void fetch_ahead(const Nhwc& t, const int64_t* at, int64_t pixels, int64_t channel,
                              int64_t channels) {
  constexpr int64_t LINE = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t c = 0; c < channels; c += LINE)
      __builtin_prefetch(static_cast<const T*>(t.data) + at[i] + channel + c);
}

// The pixels [first, first + pixels), packed, times the weights of a chunk, for source channels [channel,
// channel + channels): into `results`, and after the last of them to the output.
template <typename T>
void compute_tile(const Pass& p, const PointCut& cut, int64_t tile, int64_t first, const float* packed,
                  int64_t channel, int64_t channels, int64_t first_vector, float* results, TaskSums& sums) {
  const int64_t pixels = cut.pixels(tile), vector_floats = whole_tiles(pixels) * LANES;
  const bool last = channel + channels == p.source_channels, partial = p.depth < p.source_channels;
  TileResult result;
  result.pixels = pixels;
  if (last) {
    p.output_at.offsets(first, pixels, result.output_at);
    if (p.residual.data != nullptr) p.residual_at.offsets(first, pixels, result.residual_at);
    if (p.mask_act != nullptr) p.mask_at.offsets(first, pixels, result.mask_at);
  }
  for (int64_t v = 0; v < sums.vectors; v += 2) {
    const int64_t together = std::min<int64_t>(2, sums.vectors - v), vector = first_vector + v;
    float* out = results + (partial ? v * vector_floats : 0);
    if (last && p.mask_act != nullptr) {
      const int64_t at = vector * LANES, width = std::min(p.output_channels - at, together * LANES);
      fetch_ahead<T>(p.mask_x, result.mask_at, pixels, at, width);
      if (p.add) fetch_ahead<T>(p.output, result.output_at, pixels, at, width);
    }
    const float* weights = p.weight + vector * LANES * p.weight_rows() + channel * together * LANES;
    cut.function(tile, together)({packed, pixels, weights, channels, out, channel > 0});
    if (!last) continue;
    for (int64_t i = 0; i < together; ++i)
      store_vector<T>(p, result, out + i * vector_floats, vector + i, &sums.moments[v + i],
                      sums.gradients[v + i]);
  }
  if (last && p.gaps()) {
    const int64_t begin = first_vector * LANES;
    fill_gaps<T>(p, first, pixels, begin, std::min(p.output_channels, begin + sums.vectors * LANES) - begin);
  }
}

inline void store_sums(const Pass& p, int64_t block, int64_t first_vector, const TaskSums& sums) {
  if (p.moments || p.mask_act != nullptr)
    sums.store_partials(p.partials + block * 2 * p.output_channels, p.output_channels, first_vector,
                        p.moments);
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
      compute_tile<T>(p, cut, tile, at, packed, channel, channels, first_vector, out, sums);
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
    for (int64_t i = share.begin; i < share.end; ++i)
      pass_task<T>(p, by_chunk ? i % blocks : i / chunks, by_chunk ? i / blocks : i % chunks, scratch);
    if (p.stream) stream_end();
  });
}

}  // namespace pointwise
}  // namespace GCONV_ISA_NS
}  // namespace gconv
