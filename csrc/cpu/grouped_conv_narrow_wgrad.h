// The weight gradient of grouped_conv for narrow groups, compiled once per instruction set.
//
// Computes: dw[k][c][kh][kw] = sum over images and pixels of dy[.., k] * x[.., c] at the tap's offset.
// Grid: split of the images x stripe of rows of dy x chunk of consecutive vectors (LANES channels). All
//   chunks pass over a block of rows before the next one.
// Tile: dw of OUTER_CHANNELS channels of dy in every group of a vector over tile_rows() rows of a strip, in
//   registers. Each vector of dy is spread over its groups' lanes once per channel and meets the nine vectors
//   of x around it as they lie: the lanes of dw are the input channels.
// Bytes moved: x and dy once, and two columns of x twice per strip (from L2, where a block of rows stays); dw
//   of a chunk and the staged rows of a tile stay in L1. The next tile's rows, be they the next strip's or
//   the next chunk's, are fetched while one is computed, a few lines per row and pair of channels.
// Accumulation: float32, pixels in a fixed order, in three levels (block of rows, split, splits).
#pragma once
#include "grouped_conv_narrow.h"
#include "grouped_conv_wgrad.h"

namespace gconv {
namespace GCONV_ISA_NS {

constexpr int64_t NARROW_DW_FLOATS = 5 * 1024;  // dw of a chunk: under half of L1
constexpr int64_t NARROW_WGRAD_TASKS = 32;
constexpr int OUTER_COLUMNS = 7;           // of dy in a strip: wider ones crowd the sets of L1
constexpr int OUTER_ROWS = PAIRS ? 1 : 2;  // of dy in a tile, at stride 1; more rows of x crowd L1
static_assert(2 * OUTER_ROWS + reach(Scale::same, OUTER_ROWS) <= FetchAhead::MOST / PER_SLOT);

// The staged rows of dy of a tile, of every vector of a chunk, and those of x around them. Distances in
// floats.
struct OuterStep {
  static constexpr int MOST_ROWS = reach(Scale::same, OUTER_ROWS);
  const float* dy;
  int64_t dy_row, dy_step;    // from one row and from one vector to the next
  const float* x[MOST_ROWS];  // at the first column's leftmost tap
  int64_t x_step[MOST_ROWS];  // 0 for a row of zeros
  float* dw;                  // [vector][channel of dy][9][LANES]
  int64_t dw_step;
  int rows, columns;  // of dy
  int vectors;
  int channels;  // of a group
  Index lanes;   // first channel of each lane's group
  FetchAhead ahead;
};

// dw of CHANNELS channels of dy: each spread vector of dy meets nine of x. COLUMNS in a strip; 0: any number.
template <int CHANNELS, int STRIDE, int COLUMNS>
GCONV_INLINE void outer_tile(const OuterStep& a, int64_t v, int first, float* dw) {
  Vec acc[CHANNELS][9];
  Index index[CHANNELS];
  GCONV_UNROLL
  for (int k = 0; k < CHANNELS; ++k) {
    index[k] = index_add(a.lanes, first + k);
    GCONV_UNROLL
    for (int t = 0; t < 9; ++t) acc[k][t] = load(dw + (k * 9 + t) * LANES);
  }
  for (int r = 0; r < a.rows; ++r) {
    a.ahead.fetch(v, first / CHANNELS * a.rows + r);
    const float* dy = a.dy + r * a.dy_row + v * a.dy_step;
    const float* x[3];
    GCONV_UNROLL
    for (int i = 0; i < 3; ++i) x[i] = a.x[r * STRIDE + i] + v * a.x_step[r * STRIDE + i];
    const int columns = COLUMNS > 0 ? COLUMNS : a.columns;
    for (int q = 0; q < columns; ++q) {
      const Vec value = load(dy);
      Vec spread[CHANNELS];
      GCONV_UNROLL
      for (int k = 0; k < CHANNELS; ++k) spread[k] = permute(value, index[k]);
      GCONV_UNROLL
      for (int t = 0; t < 9; ++t) {
        const Vec around = load(x[t / 3] + t % 3 * LANES);
        GCONV_UNROLL
        for (int k = 0; k < CHANNELS; ++k) acc[k][t] = multiply_add(around, spread[k], acc[k][t]);
      }
      dy += LANES;
      GCONV_UNROLL
      for (int i = 0; i < 3; ++i) x[i] += STRIDE * LANES;
    }
  }
  GCONV_UNROLL
  for (int k = 0; k < CHANNELS; ++k) {
    GCONV_UNROLL
    for (int t = 0; t < 9; ++t) store(dw + (k * 9 + t) * LANES, acc[k][t]);
  }
}

template <int CHANNELS, int STRIDE>
void outer_step(const OuterStep& a) {
  for (int64_t v = 0; v < a.vectors; ++v) {
    float* dw = a.dw + v * a.dw_step;
    for (int k = 0; k < a.channels; k += CHANNELS, dw += CHANNELS * 9 * LANES)
      a.columns == OUTER_COLUMNS ? outer_tile<CHANNELS, STRIDE, OUTER_COLUMNS>(a, v, k, dw)
                                 : outer_tile<CHANNELS, STRIDE, 0>(a, v, k, dw);
  }
}

// A group as wide as a vector gains nothing from it.
inline bool is_narrow_wgrad(const GroupedConvShape& s) { return is_narrow(s, LANES - 1); }

// By shape alone. Stripes of rows are splits too: each leaves its own partial result.
struct NarrowWgrad : WgradPass {
  int64_t images, stripes;  // splits = parts of the images * stripes
  int64_t blocks;           // of rows of a stripe, which stay in L2 for all chunks

  explicit NarrowWgrad(const WgradPass& pass) : WgradPass(pass) {
    const int64_t fitting = std::min(NARROW_DW_FLOATS / vector_floats(), SourcePlan::MOST);
    chunk = even_piece(vectors(), std::max<int64_t>(2, fitting));
    images = std::min(image_units(shape.n), most_splits(NARROW_WGRAD_TASKS));
    stripes = std::max<int64_t>(
        1, std::min(most_splits(NARROW_WGRAD_TASKS) / std::max<int64_t>(images, 1), shape.oh / 8));
    splits = images * stripes;
    const int64_t dy_row = shape.ow * shape.k * (dy.prologue == Prologue::finish ? 2 : 1);
    const int64_t rows = shape.oh / stripes, element = dtype == DType::f32 ? 4 : 2;
    const int64_t bytes = rows * (shape.stride_h * shape.w * shape.c + dy_row) * element;
    blocks = std::max<int64_t>(1, std::min((bytes + STRIPE_BYTES - 1) / STRIPE_BYTES, rows / 4));
  }
  int64_t tile_rows() const { return shape.stride_h == 2 ? 1 : OUTER_ROWS; }
  Scale input_scale() const { return shape.stride_h == 2 ? Scale::halve : Scale::same; }
};

// A chunk's staged rows and dw, in L1; sizes in floats, one vector's after the other's.
struct OuterBuffers {
  int64_t ring;  // staged rows of x, row r at r % ring
  int64_t dy_floats, x_floats, dw_floats;
  float *dy, *x, *dw, *nothing;

  OuterBuffers(const NarrowWgrad& p, int64_t vectors, Scratch& scratch)
      : ring(reach(p.input_scale(), static_cast<int>(p.tile_rows()))),
        dy_floats(OUTER_COLUMNS * LANES),
        x_floats(reach(p.input_scale(), OUTER_COLUMNS) * LANES),
        dw_floats(vectors * p.vector_floats()) {
    Carve carve(scratch);
    carve.reserve({vectors * p.tile_rows() * dy_floats, vectors * ring * x_floats, dw_floats, x_floats});
    dy = carve.take(vectors * p.tile_rows() * dy_floats);
    x = carve.take(vectors * ring * x_floats);
    dw = carve.take(dw_floats);
    nothing = carve.take(x_floats);
    std::fill(nothing, nothing + x_floats, 0.f);
  }
};

// A tile: rows and columns of dy, and the rows of x around it that were not staged for the tile above.
struct OuterTile {
  RowImages images;
  Share rows, columns, fresh;
  int64_t first_vector, vectors;
  bool starts_chunk, ends_chunk, ends_block;

  RowColumns dy_columns(const NarrowWgrad& p) const {
    return {columns.begin, columns.end - columns.begin, p.shape.ow};
  }
  RowColumns x_columns(const NarrowWgrad& p) const {
    const int count = static_cast<int>(columns.end - columns.begin);
    return {columns.begin * p.shape.stride_w - 1, reach(p.input_scale(), count), p.shape.w};
  }
};

// The tiles of the vectors [begin, end) of a split, in the order in which they are computed: down a strip,
// strip by strip, chunk by chunk, block of rows by block of rows.
class OuterWalk {
 public:
  OuterWalk(const NarrowWgrad& p, int64_t split, int64_t first_vector, int64_t end_vector)
      : p_(p),
        units_(image_units(p.shape.n), split / p.stripes, p.images),
        stripe_(p.shape.oh, split % p.stripes, p.stripes),
        begin_(first_vector),
        end_(end_vector),
        strips_((p.shape.ow + OUTER_COLUMNS - 1) / OUTER_COLUMNS),
        unit_(units_.begin),
        first_(begin_),
        rows_(stripe_) {
    start_block();
  }

  bool done() const { return unit_ == units_.end; }

  void advance() {
    if (++tile_ < tiles_) return;
    tile_ = 0;
    if (++strip_ < strips_) return;
    strip_ = 0;
    if ((first_ += p_.chunk) < end_) return;
    first_ = begin_;
    if (++block_ == p_.blocks) block_ = 0, ++unit_;
    start_block();
  }

  OuterTile at() const {
    const Share rows = rows_.part(tile_, tiles_);
    Share fresh = rows;
    fresh.begin = tile_ > 0 ? x_end(rows_.part(tile_ - 1, tiles_))
                            : std::max<int64_t>(0, first_source(p_.input_scale(), rows.begin));
    fresh.end = x_end(rows);
    const bool ends_chunk = strip_ + 1 == strips_ && tile_ + 1 == tiles_;
    return {images_of(unit_, p_.shape.n),
            rows,
            Share(p_.shape.ow, strip_, strips_),
            fresh,
            first_,
            std::min(end_ - first_, p_.chunk),
            strip_ == 0 && tile_ == 0,
            ends_chunk,
            ends_chunk && first_ + p_.chunk >= end_};
  }

 private:
  void start_block() {
    rows_ = stripe_.part(block_, p_.blocks);
    tiles_ = (rows_.end - rows_.begin + p_.tile_rows() - 1) / p_.tile_rows();
  }
  int64_t x_end(const Share& rows) const {
    const Scale scale = p_.input_scale();
    return std::min(p_.shape.h, first_source(scale, rows.end - 1) + reach(scale, 1));
  }

  const NarrowWgrad& p_;
  const Share units_, stripe_;
  const int64_t begin_, end_, strips_;
  int64_t unit_, block_ = 0, first_, strip_ = 0, tile_ = 0;
  Share rows_;  // of the block
  int64_t tiles_ = 0;
};

// The chunks [chunk, chunk_end) of a split; done() after each block of rows.
template <typename T, typename Done>
void outer_task(const NarrowWgrad& p, int64_t split, int64_t chunk, int64_t chunk_end, Scratch& scratch,
                const Done& done) {
  const GroupedConvShape& s = p.shape;
  const OuterBuffers buffers(p, p.chunk, scratch);
  const Scale scale = p.input_scale();
  const int64_t begin = chunk * p.chunk, end = std::min(p.vectors(), chunk_end * p.chunk);
  float* totals = p.partials + split * p.vectors() * p.vector_floats();
  std::fill(totals + begin * p.vector_floats(), totals + end * p.vector_floats(), 0.f);
  const bool paired = p.source_per_group % OUTER_CHANNELS == 0;
  const auto function = s.stride_h == 1 ? (paired ? outer_step<OUTER_CHANNELS, 1> : outer_step<1, 1>)
                                        : (paired ? outer_step<OUTER_CHANNELS, 2> : outer_step<1, 2>);
  const int64_t x_step = buffers.ring * buffers.x_floats;
  OuterStep step;
  step.dy = buffers.dy, step.dy_row = buffers.dy_floats, step.dy_step = p.tile_rows() * buffers.dy_floats;
  step.dw = buffers.dw, step.dw_step = p.vector_floats();
  step.channels = static_cast<int>(p.source_per_group);
  step.lanes = group_lanes(p.source_per_group, p.source_per_group);
  OuterWalk walk(p, split, begin, end);
  if (walk.done()) return;
  bool last = false;
  for (OuterTile tile = walk.at(), next = tile; !last; tile = next) {
    const int64_t channel = tile.first_vector * LANES, floats = tile.vectors * p.vector_floats();
    if (tile.starts_chunk) std::fill(buffers.dw, buffers.dw + floats, 0.f);
    for (int64_t r = tile.rows.begin; r < tile.rows.end; ++r)
      stage_row<T, Slots::pixels>(p.dy, tile.images, r, channel, tile.vectors, tile.dy_columns(p),
                                  buffers.dy + (r - tile.rows.begin) * step.dy_row, step.dy_step);
    for (int64_t r = tile.fresh.begin; r < tile.fresh.end; ++r)
      stage_row<T, Slots::pixels>(p.x, tile.images, r, channel, tile.vectors, tile.x_columns(p),
                                  buffers.x + r % buffers.ring * buffers.x_floats, x_step);
    step.rows = static_cast<int>(tile.rows.end - tile.rows.begin);
    step.columns = static_cast<int>(tile.columns.end - tile.columns.begin);
    step.vectors = static_cast<int>(tile.vectors);
    for (int64_t k = 0; k < reach(scale, step.rows); ++k) {
      const int64_t r = first_source(scale, tile.rows.begin) + k;
      const bool inside = r >= 0 && r < s.h;
      step.x[k] = inside ? buffers.x + r % buffers.ring * buffers.x_floats : buffers.nothing;
      step.x_step[k] = inside ? x_step : 0;
    }
    step.ahead = FetchAhead();
    walk.advance();
    last = walk.done();
    if (!last) {
      next = walk.at();
      const int64_t first = next.first_vector * LANES;
      for (int64_t r = next.rows.begin; r < next.rows.end; ++r)
        step.ahead.add<T>(p.dy, next.images, r, first, next.dy_columns(p));
      for (int64_t r = next.fresh.begin; r < next.fresh.end; ++r)
        step.ahead.add<T>(p.x, next.images, r, first, next.x_columns(p));
      step.ahead.split(step.rows * std::max(1, step.channels / OUTER_CHANNELS));
    }
    function(step);
    if (tile.ends_chunk) {
      float* total = totals + tile.first_vector * p.vector_floats();
      for (int64_t i = 0; i < floats; i += LANES)
        store(total + i, add(load(total + i), load(buffers.dw + i)));
    }
    if (tile.ends_block) done();
  }
}

// A share of the tasks; after(part, parts) whenever so much of it is done.
template <typename After>
void run_narrow_wgrad(const NarrowWgrad& p, int64_t ith, int64_t nth, const After& after) {
  static thread_local Scratch scratch;
  const int64_t chunks = p.chunks();
  const Share share(p.splits * chunks, ith, nth);
  with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t task = share.begin; task < share.end;) {
      const int64_t chunk = task % chunks, count = std::min(chunks - chunk, share.end - task);
      const Share units(image_units(p.shape.n), task / chunks / p.stripes, p.images);
      const int64_t blocks = (units.end - units.begin) * p.blocks;
      int64_t done = (task - share.begin) * blocks;  // in parts of a task
      outer_task<T>(p, task / chunks, chunk, chunk + count, scratch,
                    [&] { after(done += count, (share.end - share.begin) * blocks); });
      task += count;
    }
  });
}

// Writes dweight. Lane l of channel i / 9 is input channel l % per_group of that output channel of its group.
inline void merge_narrow_wgrad(const NarrowWgrad& p, int64_t ith, int64_t nth) {
  const int64_t per_group = p.source_per_group;
  const Share share(p.vectors(), ith, nth);
  with_weight_dtype(p.dtype, p.float_weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t v = share.begin; v < share.end; ++v) {
      const int64_t lanes = std::min<int64_t>(LANES, p.shape.k - v * LANES);
      for (int64_t i = 0; i < per_group * 9; ++i) {
        T lane[LANES];
        store_as(lane, sum_splits(p, v, i));
        for (int64_t l = 0; l < lanes; ++l) {
          const int64_t k = v * LANES + l / per_group * per_group + i / 9;
          T* out = static_cast<T*>(p.dweight) + k * per_group * 9;
          out[l % per_group * p.layout.stride_c + i % 9 * p.layout.stride_tap] = lane[l];
        }
      }
    }
  });
}

}  // namespace GCONV_ISA_NS
}  // namespace gconv
