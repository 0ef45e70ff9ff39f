// The weight gradient of grouped_conv, compiled once per instruction set.
//
// Computes: dw[k][c][kh][kw] = sum over images and pixels of dy[.., k] * x[.., c] at the tap's offset;
//   x and dy are packed rows (prologue or BN backward applied once per element, on load), slots of images.
// Grid: split of the images x chunk of consecutive output vectors (LANES channels of dy).
// Tile: registers hold dw of one output vector. Lanes in one group: WGRAD_CHANNELS x 3 taps over all
//   pixels of a stripe of rows. Lanes across groups: WGRAD_ROWS x 2 x 3 over one row of x, so each packed
//   vector of x is fetched once for all taps of the rows of dy it meets.
// Bytes moved: x and dy once per chunk; dw of a chunk stays in L1/L2.
// Accumulation: float32 in three levels (stripe or row, image, split), each in a fixed order.
#pragma once
#include "grouped_conv_plan.h"

namespace gconv {
namespace GCONV_ISA_NS {

constexpr int WGRAD_ROWS = LANES == 16 ? 3 : 1;
constexpr int64_t BLOCK_FLOATS = 80 * 1024;  // packed rows of one block: a third of a megabyte
constexpr int64_t BLOCKS_PER_SUM = 32;
constexpr int64_t WGRAD_TASKS = 16;               // more of them leave more partial results to merge
constexpr int64_t WGRAD_WORK = int64_t{1} << 23;  // multiplications that are worth a task

// How a row is walked. In step with the taps, every column of x is fetched once and meets the neighbouring
// columns of dy that it reaches; a column whose outer taps all fall into the padding leaves them out.
enum class Walk {
  step1,  // stride 1, neighbouring taps: the columns of x in order
  step2,  // stride 2, neighbouring taps: an even and an odd column of x at a time
  taps,   // any: the columns of dy in order, x fetched anew for each tap
};

struct WgradPass {
  DType dtype;
  GroupedConvShape shape;
  int64_t source_per_group, output_per_group;
  bool winograd;
  RowSource x, dy;
  void* dweight;
  bool float_weight;  // dweight is of float32, whatever dtype is
  WeightLayout layout;
  float* partials;  // [splits][vectors][source_per_group][9][LANES]
  int64_t splits, chunk;
  int64_t first_column, columns;  // packed columns of x

  int64_t vectors() const { return (shape.k + LANES - 1) / LANES; }
  int64_t chunks() const { return (vectors() + chunk - 1) / chunk; }
  int64_t vector_floats() const { return source_per_group * 9 * LANES; }
  // For so many tasks on a few cores. More splits than the pixels are worth would move more partial results
  // than input.
  int64_t most_splits(int64_t least_tasks) const {
    const int64_t work = 9 * shape.n * shape.oh * shape.ow * shape.k * source_per_group;
    const int64_t tasks = tasks_for(work, least_tasks, WGRAD_WORK);
    const int64_t inputs = shape.n * (shape.h * shape.w * shape.c + shape.oh * shape.ow * shape.k);
    return std::max<int64_t>(1, std::min(tasks / chunks(), inputs / (2 * vectors() * vector_floats())));
  }
  Walk walk() const {
    return shape.dil_w != 1 ? Walk::taps : shape.stride_w == 1 ? Walk::step1 : Walk::step2;
  }
  int64_t dy_columns() const { return shape.ow + 4; }  // two zero columns on each side
};

template <int COUNT, typename F>
GCONV_INLINE void each_constant(F&& f) {
  if constexpr (COUNT > 0) {
    each_constant<COUNT - 1>(f);
    f(std::integral_constant<int, COUNT - 1>());
  }
}

struct WgradRow {
  const float* x;      // packed row, first channel
  int64_t block;       // floats to the next block of channels
  const float* dy[3];  // packed row of each vertical tap
};

// acc[i][c][kw] += sum over a row of x[c] * dy[i].
template <int ROWS, int CHANNELS, Fetch FETCH, Walk WALK>
GCONV_INLINE void wgrad_row(const WgradPass& p, const WgradRow& row, Vec (&acc)[ROWS][CHANNELS][3]) {
  const auto value = [&](const float* x, auto channel) GCONV_LAMBDA {
    constexpr int C = decltype(channel)::value, PER_BLOCK = block_channels(FETCH);
    if constexpr (FETCH == Fetch::broadcast) return set1(x[C]);
    const Vec block = load(x + C / PER_BLOCK * row.block);
    if constexpr (FETCH == Fetch::twin) return C % 2 == 0 ? even_twice(block) : odd_twice(block);
    return block;
  };
  // One column of x against taps FIRST, FIRST + STEP, .. LAST; tap t meets column -t / STEP of dy.
  const auto column = [&](const float* x, int64_t dy_at, auto first, auto last, auto step) GCONV_LAMBDA {
    constexpr int FIRST = decltype(first)::value, LAST = decltype(last)::value, STEP = decltype(step)::value;
    Vec dy[ROWS][3];
    GCONV_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      GCONV_UNROLL
      for (int t = FIRST; t <= LAST; t += STEP) dy[r][t] = load(row.dy[r] + dy_at - t / STEP * LANES);
    }
    each_constant<CHANNELS>([&](auto c) GCONV_LAMBDA {
      const Vec x_c = value(x, c);
      GCONV_UNROLL
      for (int r = 0; r < ROWS; ++r) {
        GCONV_UNROLL
        for (int t = FIRST; t <= LAST; t += STEP) acc[r][c][t] = multiply_add(x_c, dy[r][t], acc[r][c][t]);
      }
    });
  };
  constexpr std::integral_constant<int, 0> t0{};
  constexpr std::integral_constant<int, 1> t1{};
  constexpr std::integral_constant<int, 2> t2{};
  constexpr int64_t ZEROS = 2 * LANES;  // of dy, on each side
  if constexpr (WALK == Walk::step1) {
    const float* x = row.x - p.first_column * LANES;
    const int64_t shift = p.shape.pad_w * LANES + ZEROS, end = p.shape.w * LANES;
    const int64_t whole = std::min(end, std::max<int64_t>(2 - p.shape.pad_w, 0) * LANES);
    const int64_t whole_end = std::min(end, std::max(whole, (p.shape.ow - p.shape.pad_w) * LANES));
    for (int64_t at = 0; at < whole; at += LANES) column(x + at, at + shift, t0, t1, t1);
    for (int64_t at = whole; at < whole_end; at += LANES) column(x + at, at + shift, t0, t2, t1);
    for (int64_t at = whole_end; at < end; at += LANES) column(x + at, at + shift, t1, t2, t1);
  } else if constexpr (WALK == Walk::step2) {
    const float* x = row.x - (p.shape.pad_w + p.first_column) * LANES;
    const int64_t end = p.shape.ow * LANES;
    if (p.shape.pad_w == 0) column(x, ZEROS, t0, t0, t2);
    column(x + LANES, ZEROS, t1, t1, t2);
    for (int64_t at = LANES; at < end; at += LANES) {
      column(x + 2 * at, at + ZEROS, t0, t2, t2);
      column(x + 2 * at + LANES, at + ZEROS, t1, t1, t2);
    }
    column(x + 2 * end, end + ZEROS, t2, t2, t2);
  } else {
    const int64_t step = p.shape.stride_w * LANES, tap = p.shape.dil_w * LANES;
    const float* x = row.x - (p.shape.pad_w + p.first_column) * LANES;
    for (int64_t ow = 0; ow < p.shape.ow; ++ow, x += step) {
      Vec dy[ROWS];
      GCONV_UNROLL
      for (int r = 0; r < ROWS; ++r) dy[r] = load(row.dy[r] + ow * LANES + ZEROS);
      each_constant<CHANNELS>([&](auto c) GCONV_LAMBDA {
        GCONV_UNROLL
        for (int t = 0; t < 3; ++t) {
          const Vec x_c = value(x + t * tap, c);
          GCONV_UNROLL
          for (int r = 0; r < ROWS; ++r) acc[r][c][t] = multiply_add(x_c, dy[r], acc[r][c][t]);
        }
      });
    }
  }
}

// Rows of several images (slots of two images' pixels): output row r of image i meets x + i*x_image +
// r*x_row.
struct WgradBlock {
  const float* x;  // packed row of the first valid output row's tap, at the channel block
  int64_t x_row, x_image;
  const float* dy;  // packed dy of the first valid output row
  int64_t dy_row, dy_image;
  int64_t rows, images;
  bool fresh;         // first to write its dw: nothing to add to
  RowPrefetch* next;  // takes a step with each row
};

// dw of CHANNELS broadcast channels and one vertical tap, over a block of rows; adds to out.
template <int CHANNELS, Walk WALK>
void wgrad_block(const WgradPass& p, const WgradBlock& b, float* out) {
  Vec acc[1][CHANNELS][3];
  GCONV_UNROLL
  for (int c = 0; c < CHANNELS; ++c) {
    GCONV_UNROLL
    for (int t = 0; t < 3; ++t) acc[0][c][t] = zero();
  }
  for (int64_t i = 0; i < b.images; ++i) {
    WgradRow row{b.x + i * b.x_image, 0, {b.dy + i * b.dy_image, nullptr, nullptr}};
    for (int64_t r = 0; r < b.rows; ++r) {
      wgrad_row<1, CHANNELS, Fetch::broadcast, WALK>(p, row, acc);
      b.next->step();
      row.x += b.x_row;
      row.dy[0] += b.dy_row;
    }
  }
  GCONV_UNROLL
  for (int c = 0; c < CHANNELS; ++c) {
    GCONV_UNROLL
    for (int t = 0; t < 3; ++t) {
      float* at = out + (c * 9 + t) * LANES;
      store(at, b.fresh ? acc[0][c][t] : add(load(at), acc[0][c][t]));
    }
  }
}

template <int CHANNELS>
void wgrad_block(const WgradPass& p, const WgradBlock& b, int64_t channels, float* out) {
  if (channels < CHANNELS) {
    if constexpr (CHANNELS > 1) return wgrad_block<CHANNELS - 1>(p, b, channels, out);
  }
  switch (p.walk()) {
    case Walk::step1:
      return wgrad_block<CHANNELS, Walk::step1>(p, b, out);
    case Walk::step2:
      return wgrad_block<CHANNELS, Walk::step2>(p, b, out);
    case Walk::taps:
      return wgrad_block<CHANNELS, Walk::taps>(p, b, out);
  }
}

// dw of CHANNELS channels from one row of x and the ROWS rows of dy it meets; adds to out.
template <int ROWS, int CHANNELS, Fetch FETCH, Walk WALK>
void wgrad_pairs(const WgradPass& p, const WgradRow& row, float* const* out) {
  Vec acc[ROWS][CHANNELS][3];
  GCONV_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    GCONV_UNROLL
    for (int c = 0; c < CHANNELS; ++c) {
      GCONV_UNROLL
      for (int t = 0; t < 3; ++t) acc[r][c][t] = zero();
    }
  }
  wgrad_row<ROWS, CHANNELS, FETCH, WALK>(p, row, acc);
  GCONV_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    GCONV_UNROLL
    for (int c = 0; c < CHANNELS; ++c) {
      GCONV_UNROLL
      for (int t = 0; t < 3; ++t) {
        float* at = out[r] + (c * 9 + t) * LANES;
        store(at, add(load(at), acc[r][c][t]));
      }
    }
  }
}

using PairsFunction = void (*)(const WgradPass&, const WgradRow&, float* const*);

template <int ROWS, int CHANNELS, Fetch FETCH>
PairsFunction pairs_function(Walk walk) {
  return walk == Walk::step1 ? wgrad_pairs<ROWS, CHANNELS, FETCH, Walk::step1>
                             : wgrad_pairs<ROWS, CHANNELS, FETCH, Walk::taps>;
}

template <int ROWS, int CHANNELS>
PairsFunction pairs_function(Fetch fetch, Walk walk) {
  switch (fetch) {
    case Fetch::broadcast:
      return pairs_function<ROWS, CHANNELS, Fetch::broadcast>(walk);
    case Fetch::twin:
      return pairs_function<ROWS, CHANNELS, Fetch::twin>(walk);
    default:
      return pairs_function<ROWS, CHANNELS, Fetch::lanes>(walk);
  }
}

// By the rows of dy taken together (1 to WGRAD_ROWS) and the channels (1 or 2).
inline PairsFunction pairs_function(int rows, int64_t channels, Fetch fetch, Walk walk) {
  const bool two = channels > 1;
  if constexpr (WGRAD_ROWS == 3) {
    if (rows == 3) return two ? pairs_function<3, 2>(fetch, walk) : pairs_function<3, 1>(fetch, walk);
    if (rows == 2) return two ? pairs_function<2, 2>(fetch, walk) : pairs_function<2, 1>(fetch, walk);
  }
  return two ? pairs_function<1, 2>(fetch, walk) : pairs_function<1, 1>(fetch, walk);
}

// The work of a task whose lanes do not span groups, cut into blocks of rows: a stripe of an image or, where
// they are small, several images. Images are counted in units, those of a slot.
struct WgradBlocks {
  int64_t images, images_end;  // of the split
  int64_t channel, channels;   // of x: the groups that the chunk meets
  int64_t lane, lanes;         // channels of dy
  int64_t stripe, stripes;     // rows of dy in a stripe, stripes of an image
  int64_t together;            // images in a block
  int64_t blocks;

  WgradBlocks(const WgradPass& p, int64_t split, int64_t chunk) {
    const GroupedConvShape& s = p.shape;
    const Share share(image_units(s.n), split, p.splits);
    images = share.begin, images_end = share.end;
    lane = chunk * p.chunk * LANES;
    lanes = std::min(s.k, lane + p.chunk * LANES) - lane;
    const int64_t group = lane / p.output_per_group, last = (lane + lanes - 1) / p.output_per_group;
    channel = group * p.source_per_group;
    channels = (last - group + 1) * p.source_per_group;
    const int64_t x_floats = p.columns * channels, dy_floats = p.dy_columns() * lanes;
    const int64_t most = std::max<int64_t>(1, BLOCK_FLOATS / (x_floats * s.stride_h + dy_floats));
    stripes = (s.oh + most - 1) / most;
    stripe = (s.oh + stripes - 1) / stripes;
    stripes = (s.oh + stripe - 1) / stripe;
    const int64_t fitting =
        stripes > 1 ? 1 : std::max<int64_t>(1, BLOCK_FLOATS / (x_rows(p) * x_floats + stripe * dy_floats));
    const int64_t batches = (images_end - images + fitting - 1) / fitting;
    together = (images_end - images + batches - 1) / std::max<int64_t>(batches, 1);
    blocks = batches * stripes;
  }
  // Packed rows of x that a stripe takes.
  int64_t x_rows(const WgradPass& p) const { return (stripe - 1) * p.shape.stride_h + 2 * p.shape.dil_h + 1; }
  int64_t image(int64_t block) const { return images + block / stripes * together; }
  int64_t image_end(int64_t block) const { return std::min(image(block) + together, images_end); }
  int64_t row(int64_t block) const { return block % stripes * stripe; }
  int64_t row_end(const WgradPass& p, int64_t block) const {
    return std::min(row(block) + stripe, p.shape.oh);
  }

  template <typename T>
  void prefetch(const WgradPass& p, int64_t block, RowPrefetch* next) const {
    const GroupedConvShape& s = p.shape;
    const int64_t first = row(block) * s.stride_h - s.pad_h;
    const int64_t end = (row_end(p, block) - 1) * s.stride_h + 2 * s.dil_h + 1 - s.pad_h;
    const int64_t kept = row(block) == 0 ? 0 : std::max<int64_t>(0, 2 * s.dil_h + 1 - s.stride_h);
    const int64_t begin_image = image(block) * PER_SLOT,
                  end_image = std::min(s.n, image_end(block) * PER_SLOT);
    next->add<T>(p.x, begin_image, end_image, std::max<int64_t>(0, first + kept), std::min(s.h, end), s.w,
                 channel, channels);
    next->add<T>(p.dy, begin_image, end_image, row(block), row_end(p, block), s.ow, lane, lanes);
  }
};

// The packed rows of a block.
struct PackedBlock {
  int64_t images, origin, rows;  // source row of packed row 0, rows of dy
  int64_t x_rows, stripe;        // packed rows from one image to the next, of x and dy
  bool fresh;                    // dw starts with this block
  RowPrefetch* next;
};

// dw of a few channels and one vertical tap takes all pixels of the block without leaving the registers.
inline void add_by_taps(const WgradPass& p, const PackedBlock& packed, int64_t vectors, const SourcePlan& x,
                        const SourcePlan& dy, float* dw) {
  const GroupedConvShape& s = p.shape;
  const int64_t block = p.columns * LANES;
  packed.next->spread(vectors * 3 * ceil_div(p.source_per_group, WGRAD_CHANNELS) * packed.images *
                      packed.rows);
  for (int64_t v = 0; v < vectors; ++v) {
    const PackedSource& source = x.sources[x.source_of[v]];
    const PackedSource& gradient = dy.sources[v];
    float* out = dw + v * p.vector_floats();
    for (int64_t kh = 0; kh < 3; ++kh) {
      const int64_t tap = packed.origin + kh * s.dil_h;  // source row of output row `begin`
      const int64_t low = std::max<int64_t>(0, ceil_div(-tap, s.stride_h));
      const int64_t high = std::max(low, std::min(packed.rows, floor_div(s.h - 1 - tap, s.stride_h) + 1));
      if (low == high && !packed.fresh) continue;
      const float* first = source.rows + (kh * s.dil_h + low * s.stride_h) * source.row_floats;
      for (int64_t c = 0; c < p.source_per_group;) {
        const int64_t channels = std::min<int64_t>(
            {WGRAD_CHANNELS, p.source_per_group - c, static_cast<int64_t>(LANES) - c % LANES});
        const WgradBlock part{first + c / LANES * block + c % LANES,
                              s.stride_h * source.row_floats,
                              packed.x_rows * source.row_floats,
                              gradient.rows + low * gradient.row_floats,
                              gradient.row_floats,
                              packed.stripe * gradient.row_floats,
                              high - low,
                              packed.images,
                              packed.fresh,
                              packed.next};
        wgrad_block<WGRAD_CHANNELS>(p, part, channels, out + (c * 9 + kh * 3) * LANES);
        c += channels;
      }
    }
  }
}

// Every vector's lanes lie in one group: x and dy of a block are packed and added to dw. Meanwhile the next
// block is fetched, the last time that of the task `after`, if any.
template <typename T>
void wgrad_by_blocks(const WgradPass& p, const WgradBlocks& task, const WgradBlocks* after, int64_t vectors,
                     SourcePlan& x, SourcePlan& dy, float* total, Scratch& scratch, Scratch& sums) {
  const GroupedConvShape& s = p.shape;
  const int64_t floats = vectors * p.vector_floats();
  if (task.blocks == 0) {  // no images
    std::memset(total, 0, sizeof(float) * static_cast<size_t>(floats));
    return;
  }
  const int64_t x_rows = task.x_rows(p), stripe = task.stripe;
  const int64_t x_floats = task.together * x_rows * x.row_floats;
  const int64_t dy_floats = task.together * stripe * dy.row_floats;
  Carve carve(scratch);
  carve.reserve({x_floats, dy_floats});
  x.place(carve.take(x_floats), task.together * x_rows);
  dy.place(carve.take(dy_floats), task.together * stripe);
  // One sum over very many blocks would lose digits: every so often it is added to the total.
  const bool gather = task.blocks > BLOCKS_PER_SUM;
  float* dw = gather ? sums.floats(floats) : total;
  if (gather) std::memset(total, 0, sizeof(float) * static_cast<size_t>(floats));
  const RowColumns x_columns{p.first_column, p.columns, s.w}, dy_columns{-2, p.dy_columns(), s.ow};
  for (int64_t at = 0; at < task.blocks; ++at) {
    const int64_t image = task.image(at), images = task.image_end(at) - image;
    const int64_t begin = task.row(at), rows = task.row_end(p, at) - begin;
    const int64_t origin = begin * s.stride_h - s.pad_h;  // source row of packed row 0
    for (int64_t n = 0; n < images; ++n) {
      const RowImages from = images_of(image + n, s.n);
      for (int64_t i = 0; i < (rows - 1) * s.stride_h + 2 * s.dil_h + 1; ++i)
        if (origin + i >= 0 && origin + i < s.h)
          pack_row<T, Slots::pixels>(p.x, x, from, origin + i, n * x_rows + i, x_columns, 0);
      for (int64_t i = 0; i < rows; ++i)
        pack_row<T, Slots::pixels>(p.dy, dy, from, begin + i, n * stripe + i, dy_columns, 0);
    }
    RowPrefetch next;
    if (at + 1 < task.blocks)
      task.prefetch<T>(p, at + 1, &next);
    else if (after != nullptr && after->blocks > 0)
      after->prefetch<T>(p, 0, &next);
    const PackedBlock packed{images, origin, rows, x_rows, stripe, at % BLOCKS_PER_SUM == 0, &next};
    add_by_taps(p, packed, vectors, x, dy, dw);
    if (!gather || ((at + 1) % BLOCKS_PER_SUM != 0 && at + 1 < task.blocks)) continue;
    for (int64_t i = 0; i < floats; i += LANES) store(total + i, add(load(total + i), load(dw + i)));
  }
}

// Some vector's lanes span groups: x row by row, against the rows of dy that it meets.
template <typename T>
void wgrad_by_rows(const WgradPass& p, const RowImages& images, int64_t vectors, SourcePlan& x,
                   SourcePlan& dy, float* dw, Scratch& scratch) {
  const GroupedConvShape& s = p.shape;
  const int64_t ring = std::min(s.oh, 2 * s.dil_h + 1);
  int64_t expanded_floats = 0;
  for (int64_t i = 0; i < x.count; ++i)
    expanded_floats = std::max(expanded_floats, x.sources[i].expanded_blocks() * p.columns * LANES);
  Carve carve(scratch);
  carve.reserve({x.row_floats, ring * dy.row_floats, expanded_floats, x.span_floats(), 2 * ring});
  x.place(carve.take(x.row_floats), 1);
  dy.place(carve.take(ring * dy.row_floats), ring);
  float* expanded = carve.take(expanded_floats);
  float* span_buffer = carve.take(x.span_floats());
  int64_t* slots = reinterpret_cast<int64_t*>(carve.take(2 * ring));  // dy row in each slot
  std::fill(slots, slots + ring, -1);
  const RowColumns x_columns{p.first_column, p.columns, s.w}, dy_columns{-2, p.dy_columns(), s.ow};
  for (int64_t at = 0; at < s.h; ++at) {
    int taps[3], meets = 0;
    int64_t slot[3];
    for (int kh = 0; kh < 3; ++kh) {
      const int64_t shifted = at + s.pad_h - kh * s.dil_h;
      if (shifted < 0 || shifted % s.stride_h != 0 || shifted / s.stride_h >= s.oh) continue;
      const int64_t oh = shifted / s.stride_h;
      slot[meets] = oh % ring;
      taps[meets++] = kh;
      if (slots[oh % ring] == oh) continue;
      slots[oh % ring] = oh;
      pack_row<T, Slots::pixels>(p.dy, dy, images, oh, oh % ring, dy_columns, 1);
    }
    if (meets == 0) continue;
    pack_row<T, Slots::pixels>(p.x, x, images, at, 0, x_columns, 1);
    for (int64_t v = 0; v < vectors; ++v) {
      const PackedSource& source = x.sources[x.source_of[v]];
      const PackedSource& gradient = dy.sources[v];
      const bool broadcast = source.fetch == Fetch::broadcast;
      if (!broadcast) expand_row(source, source.rows, p.columns, 0, p.columns, expanded, span_buffer);
      for (int first = 0; first < meets; first += WGRAD_ROWS) {
        const int rows = std::min(WGRAD_ROWS, meets - first);
        WgradRow row{nullptr, p.columns * LANES, {nullptr, nullptr, nullptr}};
        for (int r = 0; r < rows; ++r) row.dy[r] = gradient.rows + slot[first + r] * gradient.row_floats;
        for (int64_t c = 0; c < p.source_per_group; c += 2) {
          const int per_block = block_channels(source.fetch);
          row.x =
              (broadcast ? source.rows : expanded) + c / per_block * row.block + (broadcast ? c % LANES : 0);
          float* out[3];
          for (int r = 0; r < rows; ++r)
            out[r] = dw + v * p.vector_floats() + (c * 9 + taps[first + r] * 3) * LANES;
          pairs_function(rows, p.source_per_group - c, source.fetch, p.walk())(p, row, out);
        }
      }
    }
  }
}

template <typename T>
void wgrad_task(const WgradPass& p, int64_t split, int64_t chunk, bool last, Scratch& rows,
                Scratch& image_dw) {
  const int64_t first = chunk * p.chunk, vectors = std::min(p.vectors(), first + p.chunk) - first;
  const int64_t floats = vectors * p.vector_floats();
  float* total = p.partials + (split * p.vectors() + first) * p.vector_floats();
  SourcePlan x(first, vectors, p.shape.k, p.output_per_group, p.source_per_group, p.columns);
  SourcePlan dy(first, vectors, p.shape.k, p.dy_columns());
  const bool uniform = std::all_of(x.sources, x.sources + x.count, [](const PackedSource& source) {
    return source.fetch == Fetch::broadcast;
  });
  if (uniform) {
    const WgradBlocks task(p, split, chunk);
    const bool same_split = chunk + 1 < p.chunks();
    const WgradBlocks after(p, same_split ? split : split + 1, same_split ? chunk + 1 : 0);
    return wgrad_by_blocks<T>(p, task, last ? nullptr : &after, vectors, x, dy, total, rows, image_dw);
  }
  std::memset(total, 0, sizeof(float) * static_cast<size_t>(floats));
  const Share units(image_units(p.shape.n), split, p.splits);
  float* dw = image_dw.floats(floats);
  for (int64_t unit = units.begin; unit < units.end; ++unit) {
    std::memset(dw, 0, sizeof(float) * static_cast<size_t>(floats));
    wgrad_by_rows<T>(p, images_of(unit, p.shape.n), vectors, x, dy, dw, rows);
    for (int64_t i = 0; i < floats; i += LANES) store(total + i, add(load(total + i), load(dw + i)));
  }
}

inline WgradPass plan_wgrad(const GroupedConvBwdWeightParams& q) {
  WgradPass p{};
  const GroupedConvShape& s = q.shape;
  p.dtype = q.dtype;
  p.shape = s;
  p.source_per_group = s.c / s.groups;
  p.output_per_group = s.k / s.groups;
  p.x = RowSource{q.x, Nhwc{}, q.act != nullptr ? Prologue::act : Prologue::none, q.act, s.c};
  p.dy = RowSource{q.dy, q.y, q.finish != nullptr ? Prologue::finish : Prologue::none, q.finish, s.k};
  p.winograd = uses_winograd(s, q.winograd, winograd_wgrad_overhead());
  p.dweight = q.dweight, p.float_weight = q.float_weight;
  p.layout = q.layout;
  p.partials = q.workspace;
  p.chunk = std::min(p.vectors(), p.output_per_group < LANES ? SourcePlan::MOST : SourcePlan::MOST / 2);
  p.splits = std::max<int64_t>(1, std::min(image_units(s.n), p.most_splits(WGRAD_TASKS)));
  p.first_column = -s.pad_w;
  p.columns = std::max(s.w + 2 * s.pad_w, (s.ow - 1) * s.stride_w + 2 * s.dil_w + 1);
  return p;
}

// A share of the tasks, each as task(p, T*, split, chunk, last of the share?, scratch, scratch); after(part,
// parts) whenever so much of it is done.
template <typename Task, typename After>
void run_wgrad(const WgradPass& p, int64_t ith, int64_t nth, const Task& task, const After& after) {
  static thread_local Scratch rows, image_dw;
  const int64_t chunks = p.chunks();
  const Share share(p.splits * chunks, ith, nth);
  with_dtype(p.dtype, [&](auto* type) {
    for (int64_t i = share.begin; i < share.end; ++i) {
      task(p, type, i / chunks, i % chunks, i + 1 == share.end, rows, image_dw);
      after(i + 1 - share.begin, share.end - share.begin);
    }
  });
}

constexpr auto wide_wgrad_task = [](const WgradPass& p, auto* type, int64_t split, int64_t chunk, bool last,
                                    Scratch& rows, Scratch& image_dw) {
  wgrad_task<std::remove_pointer_t<decltype(type)>>(p, split, chunk, last, rows, image_dw);
};

// Vector i of output vector v, the splits summed in order.
inline Vec sum_splits(const WgradPass& p, int64_t v, int64_t i) {
  const float* partial = p.partials + v * p.vector_floats() + i * LANES;
  Vec sum = zero();
  for (int64_t split = 0; split < p.splits; ++split)
    sum = add(sum, load(partial + split * p.vectors() * p.vector_floats()));
  return sum;
}

// Sums the splits and writes dweight, an output channel's weights in the order of memory.
inline void merge_wgrad(const WgradPass& p, int64_t ith, int64_t nth) {
  const int64_t terms = p.source_per_group * 9;
  const bool by_tap = p.layout.stride_tap == 1;
  const Share share(p.vectors(), ith, nth);
  with_weight_dtype(p.dtype, p.float_weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t v = share.begin; v < share.end; ++v) {
      const int64_t k = v * LANES, lanes = std::min<int64_t>(LANES, p.shape.k - k);
      T* out = static_cast<T*>(p.dweight) + k * terms;
      for (int64_t first = 0; first < terms; first += LANES) {
        const int columns = static_cast<int>(std::min<int64_t>(LANES, terms - first));
        Vec square[LANES];
        for (int i = 0; i < LANES; ++i) {
          const int64_t at = std::min<int64_t>(first + i, terms - 1);
          const int64_t c = at % p.source_per_group, t = at / p.source_per_group;
          square[i] = sum_splits(p, v, by_tap ? at : c * 9 + t);
        }
        transpose(square);
        for (int64_t l = 0; l < lanes; ++l) store_lanes(out + l * terms + first, square[l], columns);
      }
    }
  });
}

}  // namespace GCONV_ISA_NS
}  // namespace gconv
