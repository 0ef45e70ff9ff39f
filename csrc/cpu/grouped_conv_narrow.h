// The gathering pass of grouped_conv for narrow groups, compiled once per instruction set: one or several
// whole groups fill a vector, so that output vector v reads source vector v and nothing else. Forward and
// input gradient.
//
// Computes: what grouped_conv_pass.h does, as the scattering of source pixels: pixel (r, j) goes through nine
//   taps to three output rows (two or one where the source is the finer grid).
// Grid: image x stripe of output rows x chunk of consecutive vectors (LANES channels).
// Tile: a strip of up to strip_pixels() output columns, walked down row by row. A source row is staged in L1
//   (prologue, storage type and borders are dealt with there); each of its vectors is spread over its groups'
//   lanes once per channel, one shuffle or broadcast for nine multiplications. The output rows in flight are
//   the accumulators; between rows they rest in L1. A complete row leaves from the registers.
// Bytes moved: source and output once, two columns of each strip twice (from L2); weights and rows in flight
//   stay in L1. The next row is fetched while a row is computed, the next stripe while all chunks pass over
//   one.
// Accumulation: float32, taps in a fixed order; statistics per strip, merged by Chan's rule.
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

// Output columns of a strip: three rows of them in registers, two where the stride leaves only two.
constexpr int strip_pixels(Scale scale, bool broadcast) {
  return scale == Scale::same    ? STRIP_PIXELS + (broadcast ? 1 : 0)
         : scale == Scale::halve ? STRIP_PIXELS_HALVE
                                 : STRIP_PIXELS / 2 * 2;
}
constexpr int strip_rows(Scale scale) { return scale == Scale::halve ? 2 : 3; }

// Staged columns that `pixels` output columns need.
constexpr int staged_columns(Scale scale, int pixels) {
  return scale == Scale::same ? pixels + 2 : scale == Scale::halve ? 2 * pixels + 1 : pixels / 2 + 1;
}

// The output column, from the strip's first, that staged column j feeds through packed tap t; may be outside.
constexpr int fed_pixel(Scale scale, int j, int t) {
  if (scale == Scale::same) return j - t;
  if (scale == Scale::twice) return 2 * j + 1 - t;
  return (j - t) % 2 == 0 ? (j - t) / 2 : -1;
}

// The output row that source row r feeds through packed tap i, or -1 where the stride skips it.
inline int64_t fed_row(Scale scale, int64_t r, int64_t i) {
  if (scale == Scale::same) return r + 1 - i;
  if (scale == Scale::twice) return 2 * r + 1 - i;
  return (r + 1 - i) % 2 == 0 ? (r + 1 - i) / 2 : -1;
}
inline int64_t first_source_row(Scale scale, int64_t output) {
  return scale == Scale::same ? output - 1 : scale == Scale::twice ? output / 2 : 2 * output - 1;
}
inline int64_t last_source_row(Scale scale, int64_t output) {
  return scale == Scale::same ? output + 1 : scale == Scale::twice ? (output + 1) / 2 : 2 * output + 1;
}

// Sums of a strip about the mean of its first row, which is near enough to the strip's that little cancels.
struct StripMoments {
  Vec pivot, sum, squares;
  // value(p) is pixel p of a row, as stored.
  template <typename Pixels, typename Value>
  GCONV_INLINE void add_row(Pixels pixels, bool first, const Value& value) {
    if (first) {
      Vec total = value(0);
      for (int64_t p = 1; p < pixels; ++p) total = add(total, value(p));
      pivot = mul(total, set1(1.0f / static_cast<float>(pixels)));
      sum = squares = zero();
    }
    Vec row_sum = zero(), row_squares = zero();
    for (int64_t p = 0; p < pixels; ++p) {
      const Vec d = sub(value(p), pivot);
      row_sum = add(row_sum, d);
      row_squares = fma(d, d, row_squares);
    }
    sum = add(sum, row_sum);
    squares = add(squares, row_squares);
  }
  GCONV_INLINE void merge_into(Moments* total, int64_t count) const {
    const Vec mean = mul(sum, set1(1.0f / static_cast<float>(count)));
    total->merge(static_cast<float>(count), add(pivot, mean), sub(squares, mul(sum, mean)));
  }
};

// One staged source row of every vector of a chunk; the steps lead from one vector to the next.
struct StripStep {
  const float* source;  // staged, [column][SOURCE_LANES]
  int64_t source_step;
  const float* in[3];  // sums so far of each output row fed, [pixel][LANES]
  int64_t in_step[3];
  float* out[3];
  int64_t out_step;
  const float* weight[3];  // packed weights of each row's vertical tap, first channel
  int64_t weight_step;
  int vectors;
  int channels;  // of a group, in slots
  Index lanes;   // first slot of each lane's group
  FetchAhead ahead;
  LinePrefetch* below;  // rows of the next task
  // Complete rows of whole vectors go from the registers to the tensor; null: to `out` as well.
  Value* direct[3];
  int64_t direct_pixel;        // elements between its pixels
  const float *scale, *shift;  // of the first vector; null: none
  bool relu, stream;
  bool lines;  // two vectors are a cache line, which leaves as a whole: the first waits for the second in
               // `out`
  StripMoments* moments;  // null: not wanted
  bool first[3];          // the row is the stripe's first
};

// What finish_forward does, from the registers.
template <int PIXELS>
GCONV_INLINE void finish_direct(const StripStep& a, int r, int64_t v, Vec (&acc)[PIXELS]) {
  if (a.scale != nullptr) {
    const Vec scale = load(a.scale + v * LANES), shift = load(a.shift + v * LANES);
    GCONV_UNROLL
    for (int p = 0; p < PIXELS; ++p) acc[p] = fma(scale, acc[p], shift);
  }
  if (a.relu) {
    GCONV_UNROLL
    for (int p = 0; p < PIXELS; ++p) acc[p] = relu(acc[p]);
  }
  Value* out = a.direct[r] + v * LANES;
  if (a.moments != nullptr)
    a.moments[v].add_row(std::integral_constant<int64_t, PIXELS>(), a.first[r],
                         [&](int64_t p) GCONV_LAMBDA { return rounded_to(out, acc[p]); });
  if (PAIRS && a.lines && (v % 2 == 1 || v + 1 < a.vectors)) {
    float* kept = a.out[r] + v / 2 * 2 * a.out_step;
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

// Whether the next row's lines are fetched a few per channel: where a vector's are more than the core has
// line buffers. Otherwise all before the first channel.
constexpr bool fetch_by_channel(Scale scale) { return scale == Scale::halve; }

template <Scale SCALE, int ROWS, int PIXELS, bool BROADCAST>
void strip_step(const StripStep& a) {
  constexpr int COLUMNS = staged_columns(SCALE, PIXELS);
  LinePrefetch below = *a.below;
  for (int64_t v = 0; v < a.vectors; ++v) {
    if constexpr (!fetch_by_channel(SCALE)) a.ahead.fetch(v);
    below.renew();
    Vec acc[ROWS][PIXELS];
    const float* weight[ROWS];
    GCONV_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const float* in = a.in[r] + v * a.in_step[r];
      weight[r] = a.weight[r] + v * a.weight_step;
      GCONV_UNROLL
      for (int p = 0; p < PIXELS; ++p) acc[r][p] = load(in + p * LANES);
    }
    const float* source = a.source + v * a.source_step;
    Index lanes = a.lanes;
    for (int c = 0; c < a.channels; ++c, lanes = index_add(lanes, 1)) {
      if constexpr (fetch_by_channel(SCALE)) a.ahead.fetch(v, c);
      below.step();
      Vec w[ROWS][3];
      GCONV_UNROLL
      for (int r = 0; r < ROWS; ++r) {
        GCONV_UNROLL
        for (int t = 0; t < 3; ++t) w[r][t] = load(weight[r] + t * LANES);
        weight[r] += WEIGHTS_PER_CHANNEL;
      }
      GCONV_UNROLL
      for (int j = 0; j < COLUMNS; ++j) {
        const float* column = source + j * SOURCE_LANES;
        const Vec x = BROADCAST ? set1(column[c]) : permute(load_half(column), lanes);
        GCONV_UNROLL
        for (int t = 0; t < 3; ++t) {
          const int p = fed_pixel(SCALE, j, t);
          if (p < 0 || p >= PIXELS) continue;
          GCONV_UNROLL
          for (int r = 0; r < ROWS; ++r) acc[r][p] = multiply_add(x, w[r][t], acc[r][p]);
        }
      }
    }
    GCONV_UNROLL
    for (int r = ROWS - 1; r >= 0; --r) {  // upper rows come last
      if (a.direct[r] != nullptr) {
        finish_direct<PIXELS>(a, r, v, acc[r]);
        continue;
      }
      float* out = a.out[r] + v * a.out_step;
      GCONV_UNROLL
      for (int p = 0; p < PIXELS; ++p) store(out + p * LANES, acc[r][p]);
    }
  }
  *a.below = below;
}

using StripFunction = void (*)(const StripStep&);

template <Scale SCALE, bool BROADCAST, int ROWS = strip_rows(SCALE),
          int PIXELS = strip_pixels(SCALE, BROADCAST)>
StripFunction strip_function(int rows, int pixels) {
  if (rows < ROWS) {
    if constexpr (ROWS > 1) return strip_function<SCALE, BROADCAST, ROWS - 1, PIXELS>(rows, pixels);
  }
  constexpr int STEP = SCALE == Scale::twice ? 2 : 1;
  if (pixels < PIXELS) {
    if constexpr (PIXELS > STEP) return strip_function<SCALE, BROADCAST, ROWS, PIXELS - STEP>(rows, pixels);
  }
  return strip_step<SCALE, ROWS, PIXELS, BROADCAST>;
}

template <bool BROADCAST>
StripFunction strip_function(Scale scale, int rows, int pixels) {
  switch (scale) {
    case Scale::same:
      return strip_function<Scale::same, BROADCAST>(rows, pixels);
    case Scale::halve:
      return strip_function<Scale::halve, BROADCAST>(rows, pixels);
    default:
      return strip_function<Scale::twice, BROADCAST>(rows, pixels);
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

// A chunk's staged row and rows in flight, in L1; sizes in floats, one vector's after the other's.
struct StripBuffers {
  static constexpr int RING = 4;  // output rows in flight, at row % RING
  int64_t row_floats, staged_floats;
  float *rows, *staged, *nothing;

  StripBuffers(const Pass& p, int64_t vectors, Scratch& scratch) {
    const int pixels = strip_pixels(scale_of(p), broadcasts(p));
    row_floats = pixels * LANES, staged_floats = staged_columns(scale_of(p), pixels) * SOURCE_LANES;
    Carve carve(scratch);
    carve.reserve({vectors * RING * row_floats, vectors * staged_floats, row_floats});
    rows = carve.take(vectors * RING * row_floats);
    staged = carve.take(vectors * staged_floats);
    nothing = carve.take(row_floats);
    std::fill(nothing, nothing + row_floats, 0.f);
  }
  // Of the first vector; the next lie RING * row_floats on.
  float* row(int64_t at) const { return rows + at % RING * row_floats; }
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
    const int64_t source_first = scale == Scale::same    ? first - 1
                                 : scale == Scale::halve ? 2 * first - 1
                                                         : share.begin;
    source = RowColumns{source_first, staged_columns(scale, static_cast<int>(pixels)), p.source_w};
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

// The rows of a strip, top to bottom.
template <typename T>
void narrow_strip(const Pass& p, const NarrowTile& tile, const Strip& strip, const StripBuffers& buffers,
                  StripMoments* moments, CompensatedSum (*sums)[2], LinePrefetch* below) {
  const Scale scale = scale_of(p);
  const int64_t image = tile.image, vectors = tile.vectors, channel = tile.first_vector * LANES;
  const Share& rows = tile.rows;
  const int pixels = static_cast<int>(strip.pixels);
  const auto function = broadcasts(p) ? strip_function<true> : strip_function<false>;
  const StripFunction functions[3] = {function(scale, 1, pixels), function(scale, 2, pixels),
                                      function(scale, 3, pixels)};
  StripStep step;
  step.source = buffers.staged, step.source_step = buffers.staged_floats;
  step.out_step = StripBuffers::RING * buffers.row_floats;
  step.weight_step = p.source_per_group * WEIGHTS_PER_CHANNEL;
  step.vectors = static_cast<int>(vectors), step.channels = static_cast<int>(p.source_per_group);
  step.lanes = group_lanes(p.output_per_group, p.source_per_group);
  step.direct_pixel = p.output.stride_w;
  step.scale = p.affine == nullptr ? nullptr : p.affine + channel;
  step.shift = p.affine == nullptr ? nullptr : p.affine + p.output_channels() + channel;
  step.relu = p.relu, step.stream = p.stream;
  const int64_t strides = p.output.stride_n | p.output.stride_h | p.output.stride_w | channel;
  step.lines = p.stream && reinterpret_cast<uintptr_t>(p.output.data) % 64 == 0 && strides % (2 * LANES) == 0;
  step.moments = p.moments ? moments : nullptr;
  step.below = below;
  const bool direct = std::is_same_v<T, Value> && p.residual.data == nullptr && p.mask_act == nullptr &&
                      strip.width == strip.pixels && channel + vectors * LANES <= p.output_channels();
  int64_t next = rows.begin;  // output row to be written next, where they do not leave directly
  const int64_t last = last_source_row(scale, rows.end - 1);
  for (int64_t r = first_source_row(scale, rows.begin); r <= last; ++r) {
    if (r >= 0 && r < p.source_h) {
      stage_row<T, Slots::channels>(p.source, {image, false}, r, channel, vectors, strip.source,
                                    buffers.staged, buffers.staged_floats);
      int fed = 0;
      for (int i = 0; i < 3; ++i) {
        const int64_t o = fed_row(scale, r, i);
        if (o < rows.begin || o >= rows.end) continue;
        const bool fresh = r == std::max<int64_t>(0, first_source_row(scale, o));
        const bool complete = r == std::min(last_source_row(scale, o), p.source_h - 1);
        step.out[fed] = buffers.row(o);
        step.in[fed] = fresh ? buffers.nothing : step.out[fed];
        step.in_step[fed] = fresh ? 0 : step.out_step;
        step.direct[fed] = direct && complete
                               ? static_cast<Value*>(p.output.data) + image * p.output.stride_n +
                                     o * p.output.stride_h + strip.first * p.output.stride_w + channel
                               : nullptr;
        step.first[fed] = o == rows.begin;
        step.weight[fed++] = p.weights_of(tile.first_vector) + i * 3 * LANES;
      }
      step.ahead = FetchAhead();
      if (r + 1 < p.source_h) {
        step.ahead.add<T>(p.source, {image, false}, r + 1, channel, strip.source);
        if (fetch_by_channel(scale)) step.ahead.split(step.channels);
      }
      if (fed > 0) functions[fed - 1](step);
    }
    for (; !direct && next < rows.end && last_source_row(scale, next) <= r; ++next) {
      const RowResult result{buffers.row(next), step.out_step, image,       next,
                             tile.first_vector, vectors,       strip.first, strip.width};
      if (p.mask_act != nullptr)
        finish_input_gradient<T>(p, result, sums);
      else
        finish_forward<T>(p, result);
      for (int64_t v = 0; p.moments && v < vectors; ++v) {
        const float* row = result.row + v * result.row_floats;
        const T* storage = nullptr;
        moments[v].add_row(strip.width, next == rows.begin,
                           [&](int64_t w) { return rounded_to(storage, load(row + w * LANES)); });
      }
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
  StripMoments strip_moments[SourcePlan::MOST];
  TaskSums sums(vectors);
  LinePrefetch below;
  const int64_t next = (index / p.chunks() + 1) * p.chunks();
  if (next < end && p.chunks() > 1 && !p.by_chunk()) {
    // Each chunk's pass fetches its share of the next stripe's rows in the order of the tensor, all channels.
    const PassTask after = p.task(next);
    const Share rows = p.source_rows(after.stripe), part(rows.end - rows.begin, chunk, p.chunks());
    below.add<T>(p.source, after.image, rows.begin + part.begin, rows.begin + part.end, p.source_w);
    const Share source = p.source_rows(stripe);
    below.spread((source.end - source.begin) * vectors * Strip::count(p, scale) * p.source_per_group);
  }
  for (int64_t s = 0; s < Strip::count(p, scale); ++s) {
    const Strip strip(p, scale, s);
    narrow_strip<T>(p, tile, strip, buffers, strip_moments, sums.gradients, &below);
    for (int64_t v = 0; p.moments && v < vectors; ++v)
      strip_moments[v].merge_into(&sums.moments[v], (tile.rows.end - tile.rows.begin) * strip.width);
  }
  store_partials(p, sums, image, stripe, first_vector);
}

constexpr auto strip_task = [](const Pass& p, auto* type, int64_t index, int64_t end, Scratch& scratch) {
  narrow_task<std::remove_pointer_t<decltype(type)>>(p, index, end, scratch);
};

}  // namespace GCONV_ISA_NS
}  // namespace gconv
