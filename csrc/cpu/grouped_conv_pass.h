// The gathering pass of grouped_conv, compiled once per instruction set: forward and input gradient.
//
// Computes: every output pixel of 3x3 taps over one group's source channels. The forward reads x; the
//   input gradient reads dy through the mirrored, transposed weights, one residue class of columns
//   (modulo the stride) at a time, so that no tap meets a zero between the strides.
// Grid: image x stripe of output rows x chunk of consecutive output vectors (LANES channels).
// Tile: a few pixels of one row, their accumulators in registers; TILE_SINGLE pixels of one vector, or
//   TILE_PAIR pixels of two vectors of the same group. Each packed source pixel is fetched once per
//   (row, channel) and feeds all horizontal taps.
// Bytes moved: source once per chunk (twice on stripe borders), output once, weights from L1/L2.
// Accumulation: float32, taps in a fixed order; statistics per output row, merged by Chan's rule.
//
// Source rows are packed on their way into the caches (grouped_conv_rows.h), each once per stripe, so that
// every width of group uses all lanes and no tile meets a border, a prologue or a storage type.
#pragma once
#include "grouped_conv_rows.h"

namespace gconv {
namespace GCONV_ISA_NS {

struct TileArgs {
  const float* source[3];   // packed row of each vertical tap, at the tile's first column
  const float* weight[3];   // packed weights of each vertical tap, first vector
  int rows;                 // vertical taps inside the image
  int channels;             // source channels per group
  int64_t block;            // floats between channel blocks of the packed row
  int64_t pair;             // floats from the first vector's weights to the second's
  bool skip_first, skip_last;  // the outermost columns are padding: nothing to add
  float* out;               // result of the first vector, LANES floats per pixel
  int64_t out_step;         // floats between the tile's pixels in out
  int64_t out_pair;         // floats from the first vector's results to the second's
  int taps;                 // scattered taps only: how many, where, and their weights
  int step;
  int offset[3];
  int tap[3];
};

// Weights lie [vector][channel][3][3][LANES].
constexpr int WEIGHTS_PER_CHANNEL = 9 * LANES;

// Calls channel(source, weights, part) for every source channel of a packed row, in order.
template <Fetch FETCH, typename Channel>
GCONV_INLINE void each_channel(const TileArgs& a, const float* block, const float* w,
                               const Channel& channel) {
  constexpr int PER_BLOCK = block_channels(FETCH);
  for (int c0 = 0; c0 < a.channels; c0 += PER_BLOCK, block += a.block) {
    const int here = std::min(PER_BLOCK, a.channels - c0);
    if constexpr (FETCH == Fetch::broadcast) {
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
      if (j == 0 && TAPS == 3 && skip_first) continue;
      if (j == COLUMNS - 1 && TAPS == 3 && skip_last) continue;
      const Vec x = fetch_part<FETCH, PART>(s + j * LANES);
      GCONV_UNROLL
      for (int t = 0; t < TAPS; ++t) {
        if (j - t < 0 || (j - t) % STEP != 0 || (j - t) / STEP >= PIXELS) continue;
        GCONV_UNROLL
        for (int v = 0; v < VECTORS; ++v)
          acc[v][(j - t) / STEP] = fma(x, weight[v][t], acc[v][(j - t) / STEP]);
      }
    }
  };
  for (int r = 0; r < a.rows; ++r) each_channel<FETCH>(a, a.source[r], a.weight[r], channel);
  GCONV_UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    GCONV_UNROLL
    for (int p = 0; p < PIXELS; ++p) store(a.out + v * a.out_pair + p * a.out_step, acc[v][p]);
  }
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
        acc[p] = fma(fetch_part<FETCH, PART>(column + p * a.step * LANES), weight, acc[p]);
    }
  };
  for (int r = 0; r < a.rows; ++r) each_channel<FETCH>(a, a.source[r], a.weight[r], channel);
  GCONV_UNROLL
  for (int p = 0; p < PIXELS; ++p) store(a.out + p * a.out_step, acc[p]);
}

using TileFunction = void (*)(const TileArgs&);

enum TileKind { three_taps, three_taps_step2, two_taps, one_tap, scattered };

template <Fetch FETCH, int VECTORS, int PIXELS>
TileFunction tile_function(TileKind kind, int pixels) {
  if (pixels < PIXELS) {
    if constexpr (PIXELS > 1) return tile_function<FETCH, VECTORS, PIXELS - 1>(kind, pixels);
  }
  switch (kind) {
    case three_taps: return tile_shared<3, 1, FETCH, VECTORS, PIXELS>;
    case three_taps_step2: return tile_shared<3, 2, FETCH, VECTORS, PIXELS>;
    case two_taps: return tile_shared<2, 1, FETCH, VECTORS, PIXELS>;
    case one_tap: return tile_shared<1, 1, FETCH, VECTORS, PIXELS>;
    default: break;
  }
  if constexpr (VECTORS == 1) return tile_scattered<FETCH, PIXELS>;
  return nullptr;
}

// How a row of pixels is cut: `wide` tiles of pixels + 1, then `count - wide` of pixels.
struct TileCut {
  int64_t count, wide, pixels;
  TileFunction run[2];  // of pixels and of pixels + 1
};

// How a vector is computed: by its fetch, or two broadcast vectors of one group together.
enum TileLanes { broadcast_lanes, twin_lanes, own_lanes, pair_lanes, tile_lanes };

inline TileLanes lanes_of(Fetch fetch, int vectors) {
  if (vectors == 2) return pair_lanes;
  return fetch == Fetch::broadcast ? broadcast_lanes : fetch == Fetch::twin ? twin_lanes : own_lanes;
}

inline TileFunction tile_function(TileKind kind, TileLanes lanes, int pixels) {
  switch (lanes) {
    case broadcast_lanes: return tile_function<Fetch::broadcast, 1, TILE_SINGLE>(kind, pixels);
    case twin_lanes: return tile_function<Fetch::twin, 1, TILE_SINGLE>(kind, pixels);
    case own_lanes: return tile_function<Fetch::lanes, 1, TILE_SINGLE>(kind, pixels);
    default: return tile_function<Fetch::broadcast, 2, TILE_PAIR>(kind, pixels);
  }
}

inline TileCut cut_row(TileKind kind, TileLanes lanes, int64_t pixels) {
  const int64_t most = lanes == pair_lanes ? TILE_PAIR : TILE_SINGLE;
  TileCut cut;
  cut.count = (pixels + most - 1) / most;
  cut.pixels = pixels / cut.count;
  cut.wide = pixels % cut.count;
  cut.run[0] = tile_function(kind, lanes, static_cast<int>(cut.pixels));
  cut.run[1] = cut.wide > 0 ? tile_function(kind, lanes, static_cast<int>(cut.pixels) + 1) : nullptr;
  return cut;
}

// One residue class of output columns: which taps reach it and how its tiles are cut.
struct ColumnClass {
  int64_t first, step, count;  // output columns first + q * step, q < count
  int64_t source_step;         // source column of tap t at q: q * source_step + offset[t]
  int taps;
  int tap[3];                  // horizontal index into the packed weights, ascending offset
  int64_t offset[3];
  TileKind kind;
  TileCut cut[tile_lanes];     // scattered taps have no pairs
};

// A forward or an input gradient, told in one vocabulary: "source" is read, "output" written.
struct Pass {
  DType dtype;
  int64_t n, source_h, source_w, output_h, output_w;
  int64_t groups, source_per_group, output_per_group;
  bool transposed;
  int64_t stride_h, pad_h, dil_h;
  RowSource source;
  const float* weight;      // packed
  const float* affine;      // forward epilogue
  Nhwc residual;
  bool relu;
  bool moments;             // (mean, M2) of the output into partials
  Nhwc mask_x;              // input-gradient epilogue
  const float* mask_act;
  Nhwc output;
  float* partials;          // [images * stripes][2][output channels]
  int64_t stripes, chunk;   // rows are cut into stripes, output vectors into chunks
  int64_t first_column, columns;  // packed columns: source columns first_column + [0, columns)
  ColumnClass classes[2];
  int class_count;

  int64_t output_channels() const { return groups * output_per_group; }
  int64_t vectors() const { return (output_channels() + LANES - 1) / LANES; }
  int64_t chunks() const { return (vectors() + chunk - 1) / chunk; }
  int64_t packed_weight_floats() const { return vectors() * source_per_group * WEIGHTS_PER_CHANNEL; }
  int64_t partial_rows() const { return n * stripes; }

  // Source row of vertical tap kh for an output row, or -1 where the tap falls outside or between.
  int64_t source_row(int64_t row, int64_t kh) const {
    int64_t at;
    if (transposed) {
      at = row + pad_h - kh * dil_h;
      if (at < 0 || at % stride_h != 0) return -1;
      at /= stride_h;
    } else {
      at = row * stride_h + kh * dil_h - pad_h;
    }
    return at >= 0 && at < source_h ? at : -1;
  }
};

inline void plan_columns(Pass& p, int64_t stride, int64_t pad, int64_t dil) {
  p.class_count = 0;
  int64_t low = 0, high = 0;
  const int64_t residues = p.transposed ? stride : 1;
  for (int64_t residue = 0; residue < residues; ++residue) {
    ColumnClass k{};
    k.first = residue;
    k.step = residues;
    k.count = p.output_w > residue ? (p.output_w - residue + residues - 1) / residues : 0;
    k.source_step = p.transposed ? 1 : stride;
    for (int i = 0; i < 3; ++i) {
      const int64_t tap = p.transposed ? 2 - i : i;  // ascending offset; packed weights are mirrored
      if (!p.transposed) {
        k.offset[k.taps] = tap * dil - pad;
      } else {
        const int64_t at = residue + pad - tap * dil;
        if (((at % stride) + stride) % stride != 0) continue;
        k.offset[k.taps] = at / stride;
      }
      k.tap[k.taps++] = i;
    }
    if (k.count == 0) continue;
    const bool neighbours = (k.taps < 2 || k.offset[1] - k.offset[0] == 1) &&
                            (k.taps < 3 || k.offset[2] - k.offset[1] == 1);
    k.kind = scattered;
    if (neighbours && k.source_step == 1)
      k.kind = k.taps == 3 ? three_taps : k.taps == 2 ? two_taps : one_tap;
    else if (neighbours && k.source_step == 2 && k.taps == 3)
      k.kind = three_taps_step2;
    if (k.kind == two_taps && k.tap[1] - k.tap[0] != 2) k.kind = scattered;
    for (TileLanes lanes : {broadcast_lanes, twin_lanes, own_lanes, pair_lanes})
      if (k.kind != scattered || lanes != pair_lanes) k.cut[lanes] = cut_row(k.kind, lanes, k.count);
    if (k.taps > 0) {
      low = std::min(low, k.offset[0]);
      high = std::max(high, (k.count - 1) * k.source_step + k.offset[k.taps - 1] + 1);
    }
    p.classes[p.class_count++] = k;
  }
  p.first_column = low;
  p.columns = std::max<int64_t>(high - low, 1);
}

// By shape alone, so that every thread count gives the same bits. A chunk of several vectors reads and
// writes whole runs of cache lines; where lanes span groups its packed rows are wider.
inline void plan_work(Pass& p) {
  const int64_t chunk = p.output_per_group < LANES ? SourcePlan::MOST / 2 : SourcePlan::MOST;
  p.chunk = std::min(p.vectors(), chunk);
  const int64_t tasks = std::max<int64_t>(p.n * p.chunks(), 1);
  const int64_t wanted = (32 + tasks - 1) / tasks;
  p.stripes = std::max<int64_t>(1, std::min(wanted, p.output_h / 8));
}

// Where one row of a chunk goes: rows[v] at pixel w is row + v * row_floats + w * LANES.
struct RowResult {
  float* row;
  int64_t row_floats;
  int64_t image, at;            // output row `at` of the image
  int64_t first_vector, vectors;
};

constexpr int64_t EPILOGUE_PIXELS = 8;  // as in pack_row: channels before pixels

// g = dx where the prologue's ReLU passed, and the sums of g and g*xhat.
template <typename T>
void finish_input_gradient(const Pass& p, const RowResult& r, Vec (*sums)[2]) {
  const int64_t channels = p.output_channels();
  for (int64_t w0 = 0; w0 < p.output_w; w0 += EPILOGUE_PIXELS)
    for (int64_t v = 0; v < r.vectors; ++v) {
      const int64_t channel = (r.first_vector + v) * LANES;
      const int lanes = static_cast<int>(std::min<int64_t>(LANES, channels - channel));
      const Vec a = load_lanes(p.mask_act + channel, lanes);
      const Vec b = load_lanes(p.mask_act + channels + channel, lanes);
      const Vec mean = load_lanes(p.mask_act + 2 * channels + channel, lanes);
      const Vec rstd = load_lanes(p.mask_act + 3 * channels + channel, lanes);
      T* out = static_cast<T*>(p.output.data) + r.image * p.output.stride_n + r.at * p.output.stride_h +
               channel;
      const T* x = row_pointer<T>(p.mask_x, r.image, r.at, channel);
      const float* row = r.row + v * r.row_floats;
      Vec sum = sums[v][0], sum_xhat = sums[v][1];
      for (int64_t w = w0; w < std::min(p.output_w, w0 + EPILOGUE_PIXELS); ++w) {
        const Vec raw = load_lanes(x + w * p.mask_x.stride_w, lanes);
        const Vec g = rounded_to(out, relu_mask(load(row + w * LANES), fma(a, raw, b)));
        store_lanes(out + w * p.output.stride_w, g, lanes);
        sum = add(sum, g);
        sum_xhat = fma(g, mul(sub(raw, mean), rstd), sum_xhat);
      }
      sums[v][0] = sum;
      sums[v][1] = sum_xhat;
    }
}

template <typename T>
void finish_forward(const Pass& p, const RowResult& r) {
  const int64_t channels = p.output_channels();
  const bool has_affine = p.affine != nullptr, has_residual = p.residual.data != nullptr;
  for (int64_t w0 = 0; w0 < p.output_w; w0 += EPILOGUE_PIXELS)
    for (int64_t v = 0; v < r.vectors; ++v) {
      const int64_t channel = (r.first_vector + v) * LANES;
      const int lanes = static_cast<int>(std::min<int64_t>(LANES, channels - channel));
      const Vec scale = has_affine ? load_lanes(p.affine + channel, lanes) : zero();
      const Vec shift = has_affine ? load_lanes(p.affine + channels + channel, lanes) : zero();
      T* out = static_cast<T*>(p.output.data) + r.image * p.output.stride_n + r.at * p.output.stride_h +
               channel;
      const T* residual = has_residual ? row_pointer<T>(p.residual, r.image, r.at, channel) : nullptr;
      const float* row = r.row + v * r.row_floats;
      for (int64_t w = w0; w < std::min(p.output_w, w0 + EPILOGUE_PIXELS); ++w) {
        Vec y = load(row + w * LANES);
        if (has_affine) y = fma(scale, y, shift);
        if (has_residual) y = add(y, load_lanes(residual + w * p.residual.stride_w, lanes));
        if (p.relu) y = relu(y);
        store_lanes(out + w * p.output.stride_w, y, lanes);
      }
    }
}

// Two passes over a row that is still in L1, of the values as they were stored.
template <typename T>
void row_moments(const Pass& p, const float* row, Moments* moments) {
  const T* storage = nullptr;
  const Vec per_pixel = set1(1.0f / static_cast<float>(p.output_w));
  Vec sum = zero();
  for (int64_t w = 0; w < p.output_w; ++w) sum = add(sum, rounded_to(storage, load(row + w * LANES)));
  const Vec mean = mul(sum, per_pixel);
  Vec m2 = zero(), rest = zero();
  for (int64_t w = 0; w < p.output_w; ++w) {
    const Vec d = sub(rounded_to(storage, load(row + w * LANES)), mean);
    m2 = fma(d, d, m2);
    rest = add(rest, d);
  }
  // The rounding of the mean leaves a small sum of deviations: Chan, Golub & LeVeque's correction.
  const Vec correction = mul(rest, per_pixel);
  moments->merge(static_cast<float>(p.output_w), add(mean, correction), sub(m2, mul(rest, correction)));
}

inline void compute_row(const Pass& p, const PackedSource& source, int64_t ring_rows, int64_t at,
                        int64_t vector, int vectors, float* row, int64_t row_pair) {
  TileArgs args;
  args.rows = 0;
  const int64_t vector_floats = p.source_per_group * WEIGHTS_PER_CHANNEL;
  const float* first_row[3];
  for (int64_t i = 0; i < 3; ++i) {
    const int64_t kh = p.transposed ? 2 - i : i;
    const int64_t source_row = p.source_row(at, kh);
    if (source_row < 0) continue;
    first_row[args.rows] = source.rows + (source_row % ring_rows) * source.row_floats;
    args.weight[args.rows] = p.weight + vector * vector_floats + i * 3 * LANES;
    ++args.rows;
  }
  args.channels = static_cast<int>(p.source_per_group);
  args.block = p.columns * LANES;
  args.pair = vector_floats;
  args.out_pair = row_pair;
  for (int c = 0; c < p.class_count; ++c) {
    const ColumnClass& k = p.classes[c];
    if (args.rows == 0 || k.taps == 0) {
      for (int v = 0; v < vectors; ++v)
        for (int64_t q = 0; q < k.count; ++q)
          store(row + v * row_pair + (k.first + q * k.step) * LANES, zero());
      continue;
    }
    // Scattered tiles come with one vector only.
    const int together = k.kind == scattered ? 1 : vectors;
    TileArgs tile = args;
    tile.out_step = k.step * LANES;
    tile.taps = k.taps;
    tile.step = static_cast<int>(k.source_step);
    const int64_t base = k.kind == scattered ? 0 : k.tap[0] * LANES;
    for (int t = 0; t < k.taps; ++t) {
      tile.offset[t] = static_cast<int>(k.offset[t] - k.offset[0]);
      tile.tap[t] = k.tap[t];
    }
    const TileCut& cut = k.cut[lanes_of(source.fetch, together)];
    const int64_t reach = k.offset[k.taps - 1] - k.offset[0];
    for (int v = 0; v < vectors; v += together) {
      for (int r = 0; r < args.rows; ++r) tile.weight[r] = args.weight[r] + base + v * vector_floats;
      float* out = row + v * row_pair + k.first * LANES;
      int64_t column = k.offset[0];
      for (int64_t t = 0; t < cut.count; ++t) {
        const bool wide = t < cut.wide;
        const int64_t pixels = cut.pixels + wide;
        for (int r = 0; r < args.rows; ++r)
          tile.source[r] = first_row[r] + (column - p.first_column) * LANES;
        tile.skip_first = column < 0;
        tile.skip_last = column + (pixels - 1) * k.source_step + reach >= p.source_w;
        tile.out = out;
        cut.run[wide](tile);
        column += pixels * k.source_step;
        out += pixels * tile.out_step;
      }
    }
  }
}

template <typename T>
void pass_task(const Pass& p, int64_t image, int64_t stripe, int64_t chunk, Scratch& scratch) {
  const int64_t first_vector = chunk * p.chunk;
  const int64_t vectors = std::min(p.vectors(), first_vector + p.chunk) - first_vector;
  const int64_t channels = p.output_channels();
  SourcePlan plan(first_vector, vectors, channels, p.output_per_group, p.source_per_group, p.columns);

  // Only the source rows within reach of an output row are kept, in a ring.
  const int64_t ring_rows = std::max<int64_t>(1, std::min(2 * p.dil_h + 1, p.source_h));
  const int64_t row_floats = (p.output_w * LANES + 15) / 16 * 16;
  float* ring = scratch.floats(ring_rows * (plan.row_floats + 2) + vectors * row_floats +
                               plan.span_floats() + 16);
  plan.place(ring, ring_rows);
  float* row = ring + (ring_rows * plan.row_floats + 15) / 16 * 16;
  float* span_buffer = row + vectors * row_floats;
  int64_t* slots = reinterpret_cast<int64_t*>(span_buffer + plan.span_floats());  // row in each slot
  std::fill(slots, slots + ring_rows, -1);

  Moments moments[SourcePlan::MOST];
  Vec sums[SourcePlan::MOST][2];
  for (int64_t v = 0; v < vectors; ++v) {
    moments[v].reset();
    sums[v][0] = sums[v][1] = zero();
  }
  const RowColumns columns{p.first_column, p.columns, p.source_w};
  const Share rows(p.output_h, stripe, p.stripes);
  for (int64_t at = rows.begin; at < rows.end; ++at) {
    for (int64_t kh = 0; kh < 3; ++kh) {
      const int64_t source_row = p.source_row(at, kh);
      if (source_row < 0 || slots[source_row % ring_rows] == source_row) continue;
      slots[source_row % ring_rows] = source_row;
      pack_row<T>(p.source, plan, image, source_row, source_row % ring_rows, columns, span_buffer);
    }
    for (int64_t v = 0; v < vectors;) {
      const PackedSource& s = plan.sources[plan.source_of[v]];
      const bool pair = v + 1 < vectors && s.fetch == Fetch::broadcast &&
                        plan.source_of[v + 1] == plan.source_of[v];
      compute_row(p, s, ring_rows, at, first_vector + v, pair ? 2 : 1, row + v * row_floats, row_floats);
      v += pair ? 2 : 1;
    }
    const RowResult result{row, row_floats, image, at, first_vector, vectors};
    if (p.mask_act != nullptr)
      finish_input_gradient<T>(p, result, sums);
    else
      finish_forward<T>(p, result);
    if (p.moments)
      for (int64_t v = 0; v < vectors; ++v) row_moments<T>(p, row + v * row_floats, &moments[v]);
  }
  if (!p.moments && p.mask_act == nullptr) return;
  float* partial = p.partials + (image * p.stripes + stripe) * 2 * channels;
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t channel = (first_vector + v) * LANES;
    const int lanes = static_cast<int>(std::min<int64_t>(LANES, channels - channel));
    store_lanes(partial + channel, p.moments ? moments[v].mean : sums[v][0], lanes);
    store_lanes(partial + channels + channel, p.moments ? moments[v].m2 : sums[v][1], lanes);
  }
}

inline void run_pass(const Pass& p, int64_t ith, int64_t nth) {
  static thread_local Scratch scratch;
  const int64_t chunks = p.chunks();
  const Share share(p.n * p.stripes * chunks, ith, nth);
  with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t task = share.begin; task < share.end; ++task)
      pass_task<T>(p, task / chunks / p.stripes, task / chunks % p.stripes, task % chunks, scratch);
  });
}

}  // namespace GCONV_ISA_NS
}  // namespace gconv
