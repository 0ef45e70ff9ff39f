// How a forward or an input gradient of grouped_conv is cut and which columns its taps reach: by shape alone,
// so that every number of threads gives the same bits.
#pragma once
#include "grouped_conv_tiles.h"
#include "grouped_conv_winograd.h"

namespace gconv {
namespace GCONV_ISA_NS {

constexpr int64_t SHARED_WEIGHT_FLOATS = 128 * 1024;  // packed weights that stay in L2 beside rows

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

// What is computed in one go: rows of an image and channels.
struct PassTask {
  int64_t image, stripe, chunk;
};

// One residue class of output columns and the taps that reach it.
struct ColumnClass {
  int64_t first, step, count;  // output columns first + q * step, q < count
  int64_t source_step;         // source column of tap t at q: q * source_step + offset[t]
  int taps;
  int tap[3];  // horizontal index into the packed weights, ascending offset
  int64_t offset[3];
  TileKind kind;
};

// A forward or an input gradient, told in one vocabulary: "source" is read, "output" written.
struct Pass {
  DType dtype;
  int64_t n, source_h, source_w, output_h, output_w;
  int64_t groups, source_per_group, output_per_group;  // source channels in slots
  bool transposed;
  bool winograd;  // tiles of 2x2 output pixels
  bool narrow;    // strips of columns
  bool tiles;     // vectors of one group by tile registers
  int64_t stride_h, pad_h, dil_h;
  RowSource source;
  const void* raw_weight;  // as torch keeps it
  bool float_weight;       // of float32, whatever dtype is
  WeightLayout layout;
  const float* ahead;   // all weights, packed before the call; null: packed by it
  const float* weight;  // packed, of vectors from first_packed on
  int64_t first_packed;
  const float* affine;  // forward epilogue
  Nhwc residual;
  bool relu;
  bool moments;  // (mean, M2) of the output into partials
  Nhwc mask_x;   // input-gradient epilogue
  const float* mask_act;
  Nhwc output;
  bool stream;                    // write it past the caches
  float* partials;                // [images * stripes][2][output channels]
  int64_t stripes, chunk;         // rows are cut into stripes, output vectors into chunks
  int64_t band;                   // output rows computed together
  int64_t first_column, columns;  // packed columns: source columns first_column + [0, columns)
  ColumnClass classes[2];
  int class_count;
  int64_t reach_columns;  // columns that taps reach beyond a run on one side, at most
  bool direct;            // broadcast sources are read where they lie, not packed

  int64_t output_channels() const { return groups * output_per_group; }
  // Multiplications, nine for each pixel of the coarser grid.
  int64_t work() const {
    const int64_t pixels = n * std::min(output_h * output_w, source_h * source_w);
    return 9 * pixels * output_channels() * source_per_group * PER_SLOT;
  }
  int64_t vectors() const { return (output_channels() + LANES - 1) / LANES; }
  int64_t chunks() const { return (vectors() + chunk - 1) / chunk; }
  // Packed weights of one vector, tiles being whole.
  int64_t weight_rows() const { return tiles ? whole_tiles(source_per_group) : source_per_group; }
  int64_t weight_floats() const {
    return weight_rows() * (winograd ? POSITIONS * LANES : WEIGHTS_PER_CHANNEL);
  }
  // Pixels of a computed row, and those of whole tiles behind each class's last.
  int64_t row_pixels() const {
    int64_t pixels = output_w;
    if (tiles)
      for (int c = 0; c < class_count; ++c)
        pixels = std::max(pixels, classes[c].first + whole_tiles(classes[c].count) * classes[c].step);
    return pixels;
  }
  // Columns past the last of a packed row that whole tiles read.
  int64_t columns_beyond() const { return tiles ? (TILE_ROWS - 1) * classes[0].source_step : 0; }
  // Unless they are packed ahead, large weights are packed chunk by chunk by the thread that uses them next;
  // others once, for all threads.
  bool by_chunk() const { return vectors() * weight_floats() > SHARED_WEIGHT_FLOATS; }
  bool packs_chunks() const { return by_chunk() && ahead == nullptr; }
  int64_t packed_weight_floats() const {
    return by_chunk() || ahead != nullptr ? 0 : vectors() * weight_floats();
  }
  const float* weights_of(int64_t vector) const { return weight + (vector - first_packed) * weight_floats(); }
  int64_t partial_rows() const { return n * stripes; }
  int64_t tile_columns() const { return (output_w + 1) / 2; }
  // Output rows of a stripe; whole tiles but for the last.
  Share stripe_rows(int64_t stripe) const {
    const bool pairs = winograd || (narrow && transposed && stride_h == 2);
    if (!pairs) return Share(output_h, stripe, stripes);
    Share rows((output_h + 1) / 2, stripe, stripes);
    rows.begin *= 2, rows.end = std::min(output_h, 2 * rows.end);
    return rows;
  }

  int64_t tasks() const { return partial_rows() * chunks(); }
  // Tasks in turn share what is dearer to fetch anew: the weights of a chunk, or the rows of a stripe.
  PassTask task(int64_t index) const {
    const int64_t at = by_chunk() ? index % partial_rows() : index / chunks();
    return {at / stripes, at % stripes, by_chunk() ? index / partial_rows() : index % chunks()};
  }

  // Source rows that the taps of a stripe's output rows reach.
  Share source_rows(int64_t stripe) const {
    Share rows = stripe_rows(stripe);
    const int64_t first = rows.begin, last = rows.end - 1;
    rows.begin = transposed ? ceil_div(first + pad_h - 2 * dil_h, stride_h) : first * stride_h - pad_h;
    rows.end = (transposed ? floor_div(last + pad_h, stride_h) : last * stride_h + 2 * dil_h - pad_h) + 1;
    rows.begin = std::max<int64_t>(0, rows.begin);
    rows.end = std::min(source_h, rows.end);
    return rows;
  }

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
    const bool neighbours =
        (k.taps < 2 || k.offset[1] - k.offset[0] == 1) && (k.taps < 3 || k.offset[2] - k.offset[1] == 1);
    k.kind = scattered;
    if (neighbours && k.source_step == 1)
      k.kind = k.taps == 3 ? three_taps : k.taps == 2 ? two_taps : one_tap;
    else if (neighbours && k.source_step == 2 && k.taps == 3)
      k.kind = three_taps_step2;
    if (k.kind == two_taps && k.tap[1] - k.tap[0] != 2) k.kind = scattered;
    if (k.taps > 0) {
      low = std::min(low, k.offset[0]);
      high = std::max(high, (k.count - 1) * k.source_step + k.offset[k.taps - 1] + 1);
    }
    p.classes[p.class_count++] = k;
  }
  p.first_column = low;
  p.reach_columns = 2 * dil + 2;
  p.columns = std::max<int64_t>(high - low, 1);
}

// Whether vectors of one group read the tensor itself: values as they are, and no column outside it but the
// first and the last of a row, which tiles leave out. A stride that is no constant costs tiles of one vector
// more than packing does, and what more than one pair of vectors reads is better packed once. So are the
// twice as many columns of a forward of stride 2: pixels a power of two apart crowd few sets of L1.
inline bool reads_direct(const Pass& p) {
  if (!p.transposed && p.stride_h == 2) return false;
  for (int c = 0; c < p.class_count; ++c)
    if (p.classes[c].kind == scattered) return false;
  return p.dtype == DType::f32 && p.source.prologue == Prologue::none &&
         p.output_per_group / LANES / 2 == 1 && p.first_column >= -1 &&
         p.first_column + p.columns <= p.source_w + 1;
}

// Whether tile registers compute a pass: wide groups, whose channels fill at least half of a tile's slots.
inline bool uses_tiles(const Pass& p) {
  return TILES && p.output_per_group >= LANES && p.source_per_group >= LANES / 2;
}

constexpr int64_t CHUNK_WEIGHT_FLOATS = 32 * 1024;  // packed weights of a chunk: half of a small L2
constexpr int64_t BAND_FLOATS = 128 * 1024;         // packed rows and results of a band
constexpr int64_t EXPANDED_FLOATS = 6 * 1024;       // expanded rows of one vector: half of L1
constexpr int64_t PASS_TASKS = 32, PASS_WORK = int64_t{1} << 23;  // multiplications that are worth a task

// Cuts the work by shape alone, so that every thread count gives the same bits: into chunks of vectors whose
// packed weights take at most `weight_floats`, but of `least` vectors, and into stripes of rows.
inline void plan_grid(Pass& p, int64_t weight_floats, int64_t least) {
  const int64_t fitting = weight_floats / p.weight_floats();
  p.chunk = even_piece(p.vectors(), std::max(least, std::min(fitting, SourcePlan::MOST)));
  const int64_t tasks = std::max<int64_t>(p.n * p.chunks(), 1);
  const int64_t wanted = tasks_for(p.work(), PASS_TASKS, PASS_WORK);
  p.stripes = std::max<int64_t>(1, std::min((wanted + tasks - 1) / tasks, p.output_h / 8));
}

// A chunk reads and writes whole runs of cache lines, the longer the better, while its weights still fit
// beside its rows.
inline void plan_work(Pass& p) {
  p.direct = reads_direct(p);
  plan_grid(p, CHUNK_WEIGHT_FLOATS, SourcePlan::MOST / 2);
  const int64_t source_floats = p.columns * p.chunk * SOURCE_LANES *
                                std::max<int64_t>(1, p.source_per_group * PER_SLOT / p.output_per_group);
  const int64_t result_floats = p.row_pixels() * p.chunk * LANES;
  const int64_t kept = 2 * p.dil_h;
  const int64_t fresh = p.transposed ? 1 : p.stride_h;
  const int64_t rows = (BAND_FLOATS - kept * source_floats) / (fresh * source_floats + result_floats);
  const int64_t tallest = (p.output_h + p.stripes - 1) / p.stripes;
  p.band = std::max<int64_t>(1, even_piece(tallest, std::max<int64_t>(1, rows)));
}

// A band's tiles, weights and results of one or two vectors stay in L1.
inline void plan_winograd(Pass& p) {
  plan_grid(p, CHUNK_WEIGHT_FLOATS, SourcePlan::MOST / 2);
  const int64_t tallest = ((p.output_h + 1) / 2 + p.stripes - 1) / p.stripes;
  p.band =
      std::max<int64_t>(1, 2 * even_piece(tallest, std::max<int64_t>(1, WINOGRAD_TILES / p.tile_columns())));
}

}  // namespace GCONV_ISA_NS
}  // namespace gconv
