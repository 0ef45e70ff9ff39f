// The gathering pass of grouped_conv for narrow groups, compiled once per instruction set: one or several
// whole groups fill a vector, so that output vector v reads source vector v and nothing else. Forward and
// input gradient.
//
// Computes: what grouped_conv_pass.h does.
// Grid: image x stripe of output rows x chunk of consecutive vectors (LANES channels).
// Tile: strip_rows() rows of a strip of up to strip_pixels() output columns, walked down. Their sums stay in
//   registers over all channels and taps and leave from there. The source rows around them are staged in L1
//   (prologue, storage type and borders are dealt with there) or, where there is nothing to deal with, read
//   where they lie; each of their vectors is spread over its groups' lanes once per channel, one shuffle or
//   broadcast for up to nine multiplications.
// Bytes moved: source and output once, two columns of each strip twice (from L2); weights and staged rows
//   stay in L1. The rows of the next tile are fetched while one is computed, the next stripe while all chunks
//   pass over one.
// Accumulation: float32, channels and taps in a fixed order; statistics per strip, merged by Chan's rule.
#pragma once
#include "grouped_conv_pass.h"

namespace gconv {
namespace GCONV_ISA_NS {

// Output columns per source column.
enum class Scale { same, halve, twice };

inline Scale scale_of(const Pass& p) {
  return p.stride_h == 1 ? Scale::same : p.transposed ? Scale::twice : Scale::halve;
}

// Whole groups of at most `widest` channels fill a vector on both sides, and taps are a pixel's neighbours.
inline bool is_narrow(const GroupedConvShape& s, int64_t widest) {
  const int64_t group = s.c / s.groups;
  return STRIPS && group == s.k / s.groups && group <= widest && LANES % group == 0 && s.dil_h == 1 &&
         s.dil_w == 1 && s.pad_h == 1 && s.pad_w == 1 && s.stride_h == s.stride_w;
}

// One group fills a vector: a scalar feeds all lanes, no shuffle, and no register for its index.
inline bool broadcasts(const Pass& p) { return p.output_per_group == LANES; }

// Output rows and columns of a tile, whose sums are registers beside nine weights.
constexpr int strip_rows(Scale scale) { return scale == Scale::same ? 3 : 2; }
constexpr int strip_pixels(Scale scale, bool broadcast) {
  return scale == Scale::twice   ? STRIP_PIXELS_TWICE
         : scale == Scale::halve ? STRIP_PIXELS_HALVE
                                 : STRIP_PIXELS + (broadcast ? 1 : 0);
}

// Source rows (columns) around `count` output rows (columns); of an even first one where the output is the
// finer grid.
constexpr int reach(Scale scale, int count) {
  return scale == Scale::same ? count + 2 : scale == Scale::halve ? 2 * count + 1 : count / 2 + 1;
}
inline int64_t first_source(Scale scale, int64_t output) {
  return scale == Scale::same ? output - 1 : scale == Scale::twice ? output / 2 : 2 * output - 1;
}

// The output row (column), from the tile's first, that row (column) j around it feeds through packed tap t;
// may be outside.
constexpr int fed(Scale scale, int j, int t) {
  if (scale == Scale::same) return j - t;
  if (scale == Scale::twice) return 2 * j + 1 - t;
  return (j - t) % 2 == 0 ? (j - t) / 2 : -1;
}

// How a strip's vectors meet their source: staged rows, each lane its group's channel by a shuffle; the same
// where a vector is one group, by a broadcast; or a shuffle of the tensor's rows where they lie.
enum class Source { staged, one_group, in_place };

// A tile of every vector of a chunk; the steps lead from one vector to the next.
struct StripStep {
  static constexpr int MOST_ROWS = reach(Scale::halve, strip_rows(Scale::halve));
  const float* source[MOST_ROWS];    // rows around the tile, staged as [column][SOURCE_LANES]; null: outside
  int64_t source_step, column_step;  // the latter of rows in place
  bool left, right;                  // of rows in place: the first or the last column is outside
  const float* weight;               // packed
  int64_t weight_step;
  int vectors;
  int channels;  // of a group, in slots
  Index lanes;   // first slot of each lane's group
  FetchAhead ahead;
  LinePrefetch* below;  // rows of the next task
  float* out;           // results that do not leave directly, [row][pixel][LANES]
  int64_t out_row, out_step;
  // Whole vectors go from the registers to the tensor; null: to `out`.
  Value* direct;
  int64_t direct_row, direct_pixel;  // elements between its rows and pixels
  const float *scale, *shift;        // of the first vector; null: none
  bool relu, stream;
  bool lines;  // two vectors are a cache line, which leaves as a whole: the first waits for the second in
               // `out`
  Moments* moments;  // null: not wanted
};

// What finish_forward does, from the registers.
template <int PIXELS>
GCONV_INLINE void finish_direct(const StripStep& a, int row, int64_t v, Vec (&acc)[PIXELS]) {
  if (a.scale != nullptr) {
    const Vec scale = load(a.scale + v * LANES), shift = load(a.shift + v * LANES);
    GCONV_UNROLL
    for (int p = 0; p < PIXELS; ++p) acc[p] = fma(scale, acc[p], shift);
  }
  if (a.relu) {
    GCONV_UNROLL
    for (int p = 0; p < PIXELS; ++p) acc[p] = relu(acc[p]);
  }
  Value* out = a.direct + row * a.direct_row + v * LANES;
  if (a.moments != nullptr)
    a.moments[v].add_row(std::integral_constant<int64_t, PIXELS>(),
                         [&](int64_t p) GCONV_LAMBDA { return rounded_to(out, acc[p]); });
  if (PAIRS && a.lines && (v % 2 == 1 || v + 1 < a.vectors)) {
    float* kept = a.out + row * a.out_row + v / 2 * 2 * a.out_step;
    GCONV_UNROLL
    for (int p = 0; p < PIXELS; ++p) {
      if (v % 2 == 0)
        store(kept + p * LANES, acc[p]);
      else
        stream_slots(out - LANES + p * a.direct_pixel, pack_slots(load(kept + p * LANES), acc[p]));
    }
  } else if (a.stream) {
    GCONV_UNROLL
    for (int p = 0; p < PIXELS; ++p) stream_as(out + p * a.direct_pixel, acc[p]);
  } else {
    GCONV_UNROLL
    for (int p = 0; p < PIXELS; ++p) store_as(out + p * a.direct_pixel, acc[p]);
  }
}

template <Scale SCALE, int ROWS, int PIXELS, Source SOURCE>
void strip_step(const StripStep& a) {
  constexpr int AROUND = reach(SCALE, ROWS), COLUMNS = reach(SCALE, PIXELS);
  const int64_t column_step = SOURCE == Source::in_place ? a.column_step : SOURCE_LANES;
  LinePrefetch below = *a.below;
  for (int64_t v = 0; v < a.vectors; ++v) {
    below.renew();
    Vec acc[ROWS][PIXELS];
    GCONV_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      GCONV_UNROLL
      for (int p = 0; p < PIXELS; ++p) acc[r][p] = zero();
    }
    const float* weight = a.weight + v * a.weight_step;
    Index lanes = a.lanes;
    for (int c = 0; c < a.channels; ++c, lanes = index_add(lanes, 1), weight += WEIGHTS_PER_CHANNEL) {
      a.ahead.fetch<SOURCE == Source::in_place>(v, c);
      Vec w[3][3];
      GCONV_UNROLL
      for (int i = 0; i < 3; ++i) {
        GCONV_UNROLL
        for (int t = 0; t < 3; ++t) w[i][t] = load(weight + (3 * i + t) * LANES);
      }
      GCONV_UNROLL
      for (int k = 0; k < AROUND; ++k) {
        if (a.source[k] == nullptr) continue;
        const float* source = a.source[k] + v * a.source_step;
        below.step();
        GCONV_UNROLL
        for (int j = 0; j < COLUMNS; ++j) {
          if (SOURCE == Source::in_place && ((j == 0 && a.left) || (j == COLUMNS - 1 && a.right))) continue;
          const float* column = source + j * column_step;
          const Vec x = SOURCE == Source::one_group ? set1(column[c]) : permute(load_half(column), lanes);
          GCONV_UNROLL
          for (int i = 0; i < 3; ++i) {
            const int r = fed(SCALE, k, i);
            if (r < 0 || r >= ROWS) continue;
            GCONV_UNROLL
            for (int t = 0; t < 3; ++t) {
              const int p = fed(SCALE, j, t);
              if (p >= 0 && p < PIXELS) acc[r][p] = multiply_add(x, w[i][t], acc[r][p]);
            }
          }
        }
      }
    }
    GCONV_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      if (a.direct != nullptr) {
        finish_direct<PIXELS>(a, r, v, acc[r]);
        continue;
      }
      float* out = a.out + r * a.out_row + v * a.out_step;
      GCONV_UNROLL
      for (int p = 0; p < PIXELS; ++p) store(out + p * LANES, acc[r][p]);
    }
  }
  *a.below = below;
}

using StripFunction = void (*)(const StripStep&);

template <Scale SCALE, Source SOURCE, int ROWS = strip_rows(SCALE),
          int PIXELS = strip_pixels(SCALE, SOURCE == Source::one_group)>
StripFunction strip_function(int rows, int pixels) {
  if (rows < ROWS) {
    if constexpr (ROWS > 1) return strip_function<SCALE, SOURCE, ROWS - 1, PIXELS>(rows, pixels);
  }
  constexpr int STEP = SCALE == Scale::twice ? 2 : 1;
  if (pixels < PIXELS) {
    if constexpr (PIXELS > STEP) return strip_function<SCALE, SOURCE, ROWS, PIXELS - STEP>(rows, pixels);
  }
  return strip_step<SCALE, ROWS, PIXELS, SOURCE>;
}

template <Source SOURCE>
StripFunction strip_function(Scale scale, int rows, int pixels) {
  if (scale == Scale::same) return strip_function<Scale::same, SOURCE>(rows, pixels);
  if constexpr (SOURCE != Source::in_place)
    return scale == Scale::halve ? strip_function<Scale::halve, SOURCE>(rows, pixels)
                                 : strip_function<Scale::twice, SOURCE>(rows, pixels);
  return nullptr;
}

inline StripFunction strip_function(Source source, Scale scale, int rows, int pixels) {
  switch (source) {
    case Source::staged:
      return strip_function<Source::staged>(scale, rows, pixels);
    case Source::one_group:
      return strip_function<Source::one_group>(scale, rows, pixels);
    default:
      return strip_function<Source::in_place>(scale, rows, pixels);
  }
}

// Packed weights of a chunk: under half of L1. One group per vector has so many weights that they are read
// from L2 instead: longer runs of each pixel are worth more.
constexpr int64_t NARROW_WEIGHT_FLOATS = 5 * 1024, BROADCAST_WEIGHT_FLOATS = 20 * 1024;
constexpr int64_t STRIPE_BYTES = 700 * 1024;  // of the source: it and the next one stay in L2

// Where several chunks pass over a stripe one after the other, its rows stay in L2 for all of them.
inline void plan_narrow(Pass& p) {
  plan_grid(p, broadcasts(p) ? BROADCAST_WEIGHT_FLOATS : NARROW_WEIGHT_FLOATS, 2);
  if (p.chunks() == 1) return;
  const int64_t row_bytes = p.source_w * p.source.channels * (p.dtype == DType::f32 ? 4 : 2);
  const int64_t wanted = (p.source_h * row_bytes + STRIPE_BYTES - 1) / STRIPE_BYTES;
  p.stripes = std::max(p.stripes, std::min(wanted, p.output_h / 4));
}

// A chunk's staged rows and the results of a tile, in L1; sizes in floats, one vector's after the other's.
struct StripBuffers {
  int64_t ring;  // staged rows, row r at r % ring
  int64_t row_floats, staged_floats;
  float *staged, *rows;

  StripBuffers(const Pass& p, int64_t vectors, Scratch& scratch) {
    const Scale scale = scale_of(p);
    const int pixels = strip_pixels(scale, broadcasts(p)), most = strip_rows(scale);
    ring = reach(scale, most);
    row_floats = pixels * LANES, staged_floats = reach(scale, pixels) * SOURCE_LANES;
    Carve carve(scratch);
    carve.reserve({vectors * ring * staged_floats, vectors * most * row_floats});
    staged = carve.take(vectors * ring * staged_floats);
    rows = carve.take(vectors * most * row_floats);
  }
};

// Where a strip lies: `pixels` output columns from `first`, of which `width` exist. Strips are cut in the
// coarser of the two grids, evenly.
struct Strip {
  int64_t first, pixels, width;
  RowColumns source;  // staged columns

  static int64_t units(const Pass& p, Scale scale) { return scale == Scale::twice ? p.source_w : p.output_w; }
  static int64_t count(const Pass& p, Scale scale) {
    const int64_t pixels = strip_pixels(scale, broadcasts(p)),
                  most = scale == Scale::twice ? pixels / 2 : pixels;
    return (units(p, scale) + most - 1) / most;
  }
  Strip(const Pass& p, Scale scale, int64_t index) {
    const Share share(units(p, scale), index, count(p, scale));
    const int64_t step = scale == Scale::twice ? 2 : 1;
    first = step * share.begin;
    pixels = step * (share.end - share.begin);
    width = std::min(pixels, p.output_w - first);
    source = RowColumns{first_source(scale, first), reach(scale, static_cast<int>(pixels)), p.source_w};
  }
};

// The first slot of each lane's group.
inline Index group_lanes(int64_t lanes_per_group, int64_t slots_per_group) {
  int32_t first[LANES];
  for (int64_t l = 0; l < LANES; ++l) first[l] = static_cast<int32_t>(l / lanes_per_group * slots_per_group);
  return index_load(first);
}

// The vectors [first_vector, first_vector + vectors) of a stripe of rows of one image.
struct NarrowTile {
  int64_t image;
  Share rows;
  int64_t first_vector, vectors;
};

// Source rows that the strip's tile [row, row + count) reads, those before `fresh` excepted.
template <typename T>
void fetch_rows(const Pass& p, int64_t image, int64_t channel, const Strip& strip, int64_t row, int64_t count,
                int64_t fresh, FetchAhead* ahead) {
  const Scale scale = scale_of(p);
  const int64_t first = first_source(scale, row), end = first + reach(scale, static_cast<int>(count));
  for (int64_t r = std::max(first, fresh); r < std::min(p.source_h, end); ++r)
    ahead->add<T>(p.source, {image, false}, r, channel, strip.source);
}

// Whether rows are read where they lie: as they are, and pixels so near to each other that the lines that a
// vector's tile reads fit the few sets of L1 that they fall into.
template <typename T>
bool reads_in_place(const Pass& p, const NarrowTile& tile) {
  constexpr int64_t LINES =
      reach(Scale::same, strip_rows(Scale::same)) * reach(Scale::same, strip_pixels(Scale::same, false));
  constexpr int64_t WAY_BYTES = 4096, OTHERS = 2;  // ways for weights and results
  const RowSource& s = p.source;
  return std::is_same_v<T, Value> && !broadcasts(p) && scale_of(p) == Scale::same &&
         s.prologue == Prologue::none && (tile.first_vector + tile.vectors) * LANES <= s.channels &&
         s.x.stride_w % PER_SLOT == 0 &&
         LINES * s.x.stride_w * static_cast<int64_t>(sizeof(T)) <= (l1_ways() - OTHERS) * WAY_BYTES;
}

// The rows of a strip, top to bottom; last, those of `beside`, the strip after it if there is one, are asked
// for.
template <typename T>
void narrow_strip(const Pass& p, const NarrowTile& tile, const Strip& strip, const Strip* beside,
                  const StripBuffers& buffers, TaskSums& sums, LinePrefetch* below) {
  const Scale scale = scale_of(p);
  const int64_t image = tile.image, vectors = tile.vectors, channel = tile.first_vector * LANES;
  const int64_t most = strip_rows(scale);
  const Share& rows = tile.rows;
  const int pixels = static_cast<int>(strip.pixels);
  const bool in_place = reads_in_place<T>(p, tile);
  const Source from = in_place ? Source::in_place : broadcasts(p) ? Source::one_group : Source::staged;
  const StripFunction functions[3] = {strip_function(from, scale, 1, pixels),
                                      strip_function(from, scale, 2, pixels),
                                      strip_function(from, scale, 3, pixels)};
  const int64_t strides = p.output.stride_n | p.output.stride_h | p.output.stride_w | channel;
  const bool direct = std::is_same_v<T, Value> && p.residual.data == nullptr && p.mask_act == nullptr &&
                      strip.width == strip.pixels && channel + vectors * LANES <= p.output_channels();
  StripStep step;
  step.source_step = in_place ? SOURCE_LANES : buffers.ring * buffers.staged_floats;
  step.column_step = p.source.x.stride_w / PER_SLOT;
  step.left = strip.source.first < 0;
  step.right = strip.source.first + strip.source.count > p.source_w;
  step.weight = p.weights_of(tile.first_vector), step.weight_step = p.source_per_group * WEIGHTS_PER_CHANNEL;
  step.vectors = static_cast<int>(vectors), step.channels = static_cast<int>(p.source_per_group);
  step.lanes = group_lanes(p.output_per_group, p.source_per_group);
  step.out = buffers.rows, step.out_row = buffers.row_floats, step.out_step = most * buffers.row_floats;
  step.direct_row = p.output.stride_h, step.direct_pixel = p.output.stride_w;
  step.scale = p.affine == nullptr ? nullptr : p.affine + channel;
  step.shift = p.affine == nullptr ? nullptr : p.affine + p.output_channels() + channel;
  step.relu = p.relu, step.stream = p.stream;
  step.lines = p.stream && reinterpret_cast<uintptr_t>(p.output.data) % 64 == 0 && strides % (2 * LANES) == 0;
  step.moments = p.moments ? sums.moments : nullptr;
  step.below = below;
  int64_t staged = std::max<int64_t>(0, first_source(scale, rows.begin));  // rows before it are
  for (int64_t o = rows.begin; o < rows.end; o += most) {
    const int count = static_cast<int>(std::min(most, rows.end - o));
    const int64_t first = first_source(scale, o), around = reach(scale, count);
    const int64_t end = std::min(p.source_h, first + around);
    for (; !in_place && staged < end; ++staged)
      stage_row<T, Slots::channels>(p.source, {image, false}, staged, channel, vectors, strip.source,
                                    buffers.staged + staged % buffers.ring * buffers.staged_floats,
                                    step.source_step);
    for (int64_t k = 0; k < around; ++k) {
      const int64_t r = first + k;
      if (r < 0 || r >= end)
        step.source[k] = nullptr;
      else if (in_place)
        step.source[k] = reinterpret_cast<const float*>(row_pointer<T>(p.source.x, image, r, channel) +
                                                        strip.source.first * p.source.x.stride_w);
      else
        step.source[k] = buffers.staged + r % buffers.ring * buffers.staged_floats;
    }
    step.ahead = FetchAhead();
    if (o + count < rows.end)
      fetch_rows<T>(p, image, channel, strip, o + count, std::min(most, rows.end - o - count), end,
                    &step.ahead);
    else if (beside != nullptr)
      fetch_rows<T>(p, image, channel, *beside, rows.begin, std::min(most, rows.end - rows.begin), 0,
                    &step.ahead);
    step.ahead.split(step.channels);
    if (direct)
      step.direct = static_cast<Value*>(p.output.data) + image * p.output.stride_n + o * p.output.stride_h +
                    strip.first * p.output.stride_w + channel;
    else
      step.direct = nullptr;
    functions[count - 1](step);
    for (int64_t r = 0; !direct && r < count; ++r) {
      const RowResult result{step.out + r * step.out_row, step.out_step, image,       o + r,
                             tile.first_vector,           vectors,       strip.first, strip.width};
      finish_row<T>(p, result, sums);
    }
  }
}

// Task `index`; meanwhile the next stripe of those before task `end` is fetched, if there is one.
template <typename T>
void narrow_task(const Pass& p, int64_t index, int64_t end, Scratch& scratch) {
  const auto [image, stripe, chunk] = p.task(index);
  const Scale scale = scale_of(p);
  const int64_t first_vector = chunk * p.chunk;
  const int64_t vectors = std::min(p.vectors(), first_vector + p.chunk) - first_vector;
  const NarrowTile tile{image, p.stripe_rows(stripe), first_vector, vectors};
  const StripBuffers buffers(p, vectors, scratch);
  TaskSums sums(vectors);
  LinePrefetch below;
  const int64_t next = (index / p.chunks() + 1) * p.chunks();
  if (next < end && p.chunks() > 1 && !p.by_chunk()) {
    // Each chunk's pass fetches its share of the next stripe's rows in the order of the tensor, all channels.
    const PassTask after = p.task(next);
    const Share part = p.source_rows(after.stripe).part(chunk, p.chunks());
    below.add<T>(p.source, after.image, part.begin, part.end, p.source_w);
    const Share source = p.source_rows(stripe);
    below.spread((source.end - source.begin) * vectors * Strip::count(p, scale) * p.source_per_group);
  }
  // A gradient that is finished on load has two sources, more rows than FetchAhead takes at once.
  const int64_t strips = Strip::count(p, scale),
                followed = p.source.prologue == Prologue::finish ? 0 : strips;
  for (int64_t s = 0; s < strips; ++s) {
    const Strip strip(p, scale, s), beside(p, scale, std::min(s + 1, strips - 1));
    narrow_strip<T>(p, tile, strip, s + 1 < followed ? &beside : nullptr, buffers, sums, &below);
    for (int64_t v = 0; p.moments && v < vectors; ++v) sums.moments[v].end_run();
  }
  store_partials(p, sums, image, stripe, first_vector);
}

constexpr auto strip_task = [](const Pass& p, auto* type, int64_t index, int64_t end, Scratch& scratch) {
  narrow_task<std::remove_pointer_t<decltype(type)>>(p, index, end, scratch);
};

}  // namespace GCONV_ISA_NS
}  // namespace gconv
