// The gathering pass of grouped_conv, compiled once per instruction set: forward and input gradient.
//
// Computes: every output pixel of 3x3 taps over one group's source channels. The forward reads x; the
//   input gradient reads dy through the mirrored, transposed weights, one residue class of columns
//   (modulo the stride) at a time, so that no tap meets a zero between the strides.
// Grid: image x stripe of output rows x chunk of consecutive output vectors (LANES channels).
// Tile: a few pixels of one row, their accumulators in registers; TILE_SINGLE pixels of one vector, or
//   TILE_PAIR pixels of two vectors of the same group. Each packed source pixel is fetched once per
//   (row, channel) and feeds all horizontal taps. (Tile registers: 32 pixels, fetched once per tap.)
// Bytes moved: source once per chunk (twice on stripe borders), output once, weights from L1/L2.
// Accumulation: float32, taps in a fixed order; statistics per output row, merged by Chan's rule.
//
// Source rows are packed on their way into the caches (grouped_conv_rows.h), so that every width of group
// uses all lanes and no tile meets a border, a prologue or a storage type. A stripe is worked off in bands
// of rows: pack the band's new source rows; compute it vector by vector, the weights staying in L1; write
// it out in the tensor's order.
#pragma once
#include "conv_sums.h"
#include "grouped_conv_pack.h"

namespace gconv {
namespace GCONV_ISA_NS {

// A run of computed pixels of a row, for a chunk: vector v of pixel w lies at row + v * row_floats + w *
// LANES.
struct RowResult {
  const float* row;
  int64_t row_floats;
  int64_t image, at;  // output row `at` of the image
  int64_t first_vector, vectors;
  int64_t first_column, width;  // of the output

  template <typename T>
  GCONV_INLINE T* output(const Pass& p) const {
    return static_cast<T*>(p.output.data) + image * p.output.stride_n + at * p.output.stride_h +
           first_column * p.output.stride_w + first_vector * LANES;
  }
};

// g = dx where the prologue's ReLU passed, and the sums of g and g*xhat.
template <typename T>
void finish_input_gradient(const Pass& p, const RowResult& r, CompensatedSum (*sums)[2]) {
  constexpr int64_t PIXELS = 8;  // whose channels are finished together: they share pages, and the sums stay
  const int64_t channels = p.output_channels(), width = r.width;
  const int64_t out_step = p.output.stride_w, x_step = p.mask_x.stride_w;
  const bool stream = p.stream;
  for (int64_t w0 = 0; w0 < width; w0 += PIXELS)
    for (int64_t v = 0; v < r.vectors; ++v) {
      const int64_t channel = (r.first_vector + v) * LANES, end = std::min(width, w0 + PIXELS);
      const int lanes = static_cast<int>(std::min<int64_t>(LANES, channels - channel));
      const Vec a = load_lanes(p.mask_act + channel, lanes);
      const Vec b = load_lanes(p.mask_act + channels + channel, lanes);
      const Vec mean = load_lanes(p.mask_act + 2 * channels + channel, lanes);
      const Vec rstd = load_lanes(p.mask_act + 3 * channels + channel, lanes);
      T* out = r.output<T>(p) + v * LANES + w0 * out_step;
      const T* x = row_pointer<T>(p.mask_x, r.image, r.at, channel) + (r.first_column + w0) * x_step;
      const float* row = r.row + v * r.row_floats;
      Vec sum = zero(), sum_xhat = zero();
      for (int64_t w = w0; w < end; ++w, out += out_step, x += x_step) {
        const Vec raw = load_lanes(x, lanes);
        const Vec g = rounded_to(x, relu_mask(load(row + w * LANES), fma(a, raw, b)));
        if (stream && lanes == LANES)
          stream_as(out, g);
        else
          store_lanes(out, g, lanes);
        sum = add(sum, g);
        sum_xhat = fma(g, mul(sub(raw, mean), rstd), sum_xhat);
      }
      sums[v][0].add(sum);
      sums[v][1].add(sum_xhat);
    }
}

// Writes a row nearly in the order of the tensor: its cache lines then stream.
template <typename T, bool AFFINE, bool RESIDUAL>
void finish_forward(const Pass& p, const RowResult& r) {
  const int64_t channels = p.output_channels(), first = r.first_vector * LANES;
  const int64_t out_step = p.output.stride_w, residual_step = p.residual.stride_w;
  const T* residual_row =
      RESIDUAL ? row_pointer<T>(p.residual, r.image, r.at, first) + r.first_column * residual_step : nullptr;
  T* out_row = r.output<T>(p);
  const auto write = [&](int64_t v, int64_t begin, int64_t end, int lanes, auto relu_last,
                         auto stream) GCONV_LAMBDA {
    Vec scale = zero(), shift = zero();
    if constexpr (AFFINE) {
      scale = load_lanes(p.affine + first + v * LANES, lanes);
      shift = load_lanes(p.affine + channels + first + v * LANES, lanes);
    }
    const float* row = r.row + v * r.row_floats + begin * LANES;
    T* out = out_row + begin * out_step + v * LANES;
    const T* residual = RESIDUAL ? residual_row + begin * residual_step + v * LANES : nullptr;
    for (int64_t w = begin; w < end; ++w, row += LANES, out += out_step) {
      Vec y = load(row);
      if constexpr (AFFINE) y = fma(scale, y, shift);
      if constexpr (RESIDUAL) {
        y = add(y, load_lanes(residual, lanes));
        residual += residual_step;
      }
      if constexpr (decltype(relu_last)::value) y = relu(y);
      if constexpr (decltype(stream)::value)
        stream_as(out, y);
      else
        store_lanes(out, y, lanes);
    }
  };
  const auto write_all = [&](auto relu_last, auto stream) GCONV_LAMBDA {
    constexpr int64_t PIXELS = 8;
    const int64_t full = std::min(r.vectors, (channels - first) / LANES);
    const int tail = static_cast<int>(channels - first - full * LANES);
    for (int64_t w = 0; w < r.width; w += PIXELS) {
      const int64_t end = std::min(r.width, w + PIXELS);
      for (int64_t v = 0; v < full; ++v) write(v, w, end, LANES, relu_last, stream);
      if (full < r.vectors) write(full, w, end, tail, relu_last, std::false_type());
    }
  };
  if (p.relu)
    p.stream ? write_all(std::true_type(), std::true_type()) : write_all(std::true_type(), std::false_type());
  else
    p.stream ? write_all(std::false_type(), std::true_type())
             : write_all(std::false_type(), std::false_type());
}

template <typename T>
void finish_forward(const Pass& p, const RowResult& r) {
  const bool has_residual = p.residual.data != nullptr;
  if (p.affine != nullptr)
    has_residual ? finish_forward<T, true, true>(p, r) : finish_forward<T, true, false>(p, r);
  else
    has_residual ? finish_forward<T, false, true>(p, r) : finish_forward<T, false, false>(p, r);
}

// Writes a row and adds to what the task finds out about it.
template <typename T>
void finish_row(const Pass& p, const RowResult& r, TaskSums& sums) {
  p.mask_act != nullptr ? finish_input_gradient<T>(p, r, sums.gradients) : finish_forward<T>(p, r);
  if (!p.moments) return;
  for (int64_t v = 0; v < r.vectors; ++v) row_moments<T>(r.row + v * r.row_floats, r.width, &sums.moments[v]);
}

// The packed source rows of a task: rows within reach of the band, at row % ring_rows.
struct Band {
  int64_t image, first, rows;  // output rows
  int64_t ring_rows;
  float* results;       // [row of the band][vector][pixel][LANES]
  int64_t row_floats;   // of one vector in results
  int64_t band_floats;  // from one row of the band to the next
  float* expanded;      // ring of expanded rows, and its tags
  int64_t expanded_rows;
  int64_t* tags;  // source row in each slot of `expanded`
  float* span_buffer;
};

// How the columns of one class are computed in a run.
struct ClassRun {
  TileCut cut;
  int together = 1;  // vectors in a tile; scattered ones come with one only
  int64_t pixels = 0;
  int64_t first_tap = 0;  // floats from a row's weights to the first tap's
  int64_t reach = 0;      // columns from the first tap to the last

  ClassRun() = default;
  ClassRun(const ColumnClass& k, Fetch fetch, int vectors, int64_t run_pixels)
      : together(k.kind == scattered ? 1 : vectors), pixels(run_pixels) {
    cut = TileCut(k.kind, lanes_of(fetch, together), pixels);
    if (k.taps == 0) return;
    first_tap = k.kind == scattered ? 0 : k.tap[0] * LANES;
    reach = k.offset[k.taps - 1] - k.offset[0];
  }
};

// One or two vectors of a band, over columns [q_begin, q_end) of every residue class.
inline void compute_vectors(const Pass& p, const PackedSource& source, const Band& band, int64_t vector,
                            int vectors, float* results, int64_t q_begin, int64_t q_end) {
  const bool expand = !one_group(source.fetch);
  const int64_t vector_floats = p.weight_floats();
  // The packed columns that the run reads; an expanded row holds just these.
  int64_t column_begin = 0, column_end = p.columns;
  if (expand) {
    column_begin = p.columns, column_end = 0;
    for (int c = 0; c < p.class_count; ++c) {
      const ColumnClass& k = p.classes[c];
      const int64_t end = std::min(q_end, k.count);
      if (k.taps == 0 || end <= q_begin) continue;
      column_begin = std::min(column_begin, q_begin * k.source_step + k.offset[0] - p.first_column);
      column_end =
          std::max(column_end, (end - 1) * k.source_step + k.offset[k.taps - 1] - p.first_column + 1);
    }
    std::fill(band.tags, band.tags + band.expanded_rows, -1);
  }
  const int64_t columns = std::max<int64_t>(column_end - column_begin, 0);
  const int64_t expanded_floats = source.expanded_blocks() * columns * LANES;

  const float* weights = p.weights_of(vector);
  ClassRun runs[2];
  for (int c = 0; c < p.class_count; ++c)
    runs[c] = ClassRun(p.classes[c], source.fetch, vectors,
                       std::max<int64_t>(std::min(q_end, p.classes[c].count) - q_begin, 0));
  TileArgs tile;
  tile.channels = static_cast<int>(p.source_per_group);
  const int64_t column_floats = source.fetch == Fetch::direct ? p.source.x.stride_w : LANES;
  tile.block = source.fetch == Fetch::direct ? LANES : columns * LANES;
  tile.column = column_floats;
  tile.pair = vector_floats;
  tile.out_pair = band.row_floats;
  for (int64_t row = 0; row < band.rows; ++row) {
    const float* first_row[3];
    const float* tap_weights[3];
    tile.rows = 0;
    for (int64_t i = 0; i < 3; ++i) {
      const int64_t at = p.source_row(band.first + row, p.transposed ? 2 - i : i);
      if (at < 0) continue;
      const float* packed = source.rows + at % band.ring_rows * source.row_floats;
      if (source.fetch == Fetch::direct)
        packed =
            row_pointer<float>(p.source.x, band.image, at, source.channel) + p.first_column * column_floats;
      if (expand && columns > 0) {
        const int64_t slot = at % band.expanded_rows;
        float* expanded = band.expanded + slot * expanded_floats;
        if (band.tags[slot] != at)
          expand_row(source, packed, p.columns, column_begin, column_end, expanded, band.span_buffer);
        band.tags[slot] = at;
        packed = expanded;
      }
      first_row[tile.rows] = packed;
      tap_weights[tile.rows++] = weights + i * 3 * LANES;
    }
    for (int c = 0; c < p.class_count; ++c) {
      const ColumnClass& k = p.classes[c];
      const ClassRun& run = runs[c];
      float* out = results + row * band.band_floats + (k.first + q_begin * k.step) * LANES;
      if (tile.rows == 0 || k.taps == 0) {
        for (int v = 0; v < vectors; ++v)
          for (int64_t q = 0; q < run.pixels; ++q)
            store(out + v * band.row_floats + q * k.step * LANES, zero());
        continue;
      }
      tile.out_step = k.step * LANES;
      tile.taps = k.taps;
      tile.step = static_cast<int>(k.source_step);
      for (int t = 0; t < k.taps; ++t) {
        tile.offset[t] = static_cast<int>(k.offset[t] - k.offset[0]);
        tile.tap[t] = k.tap[t];
      }
#if defined(GCONV_ISA_AMX_BF16)
      if (p.tiles && !expand) {
        for (int r = 0; r < tile.rows; ++r) {
          tile.source[r] = first_row[r] + (k.offset[0] - p.first_column) * LANES;
          tile.weight[r] = tap_weights[r];
        }
        tile.out = out;
        tile_products(tile, run.pixels, vectors);
        continue;
      }
#endif
      for (int v = 0; v < vectors; v += run.together) {
        for (int r = 0; r < tile.rows; ++r)
          tile.weight[r] = tap_weights[r] + run.first_tap + v * vector_floats;
        tile.out = out + v * band.row_floats;
        int64_t column = q_begin * k.source_step + k.offset[0];  // source column of the first tap
        for (int64_t t = 0; t < run.cut.count; ++t) {
          const bool longer = t < run.cut.longer;
          const int64_t pixels = run.cut.least + longer;
          for (int r = 0; r < tile.rows; ++r)
            tile.source[r] = first_row[r] + (column - p.first_column - column_begin) * column_floats;
          tile.skip_first = column < 0;
          tile.skip_last = column + (pixels - 1) * k.source_step + run.reach >= p.source_w;
          run.cut.run[longer](tile);
          column += pixels * k.source_step;
          tile.out += pixels * tile.out_step;
        }
      }
    }
  }
}

// Output columns (per residue class) whose expanded rows stay in L1, in whole tiles.
inline int64_t expanded_run(const Pass& p, const PackedSource& source, int64_t expanded_rows) {
  const int64_t all = p.classes[0].count;
  const int64_t columns = EXPANDED_FLOATS / (expanded_rows * source.expanded_blocks() * LANES);
  const int64_t fitting = (columns - 2 * p.reach_columns) / p.classes[0].source_step / TILE_SINGLE;
  return even_piece(all, std::max<int64_t>(1, fitting) * TILE_SINGLE);
}

inline void store_partials(const Pass& p, TaskSums& sums, int64_t image, int64_t stripe,
                           int64_t first_vector) {
  if (!p.moments && p.mask_act == nullptr) return;
  const int64_t channels = p.output_channels();
  sums.store_partials(p.partials + (image * p.stripes + stripe) * 2 * channels, channels, first_vector,
                      p.moments);
}

template <typename T>
void pass_task(const Pass& p, int64_t index, Scratch& scratch) {
  const auto [image, stripe, chunk] = p.task(index);
  const int64_t first_vector = chunk * p.chunk;
  const int64_t vectors = std::min(p.vectors(), first_vector + p.chunk) - first_vector;
  const int64_t channels = p.output_channels();
  SourcePlan plan(first_vector, vectors, channels, p.output_per_group, p.source_per_group, p.columns);
  const Share rows = p.stripe_rows(stripe);
  if (p.direct) plan.read_direct();

  Band band;
  band.image = image;
  const int64_t fresh = p.transposed ? p.band : p.band * p.stride_h;
  band.ring_rows = std::max<int64_t>(1, std::min(fresh + 2 * p.dil_h, p.source_h));
  band.row_floats = (p.row_pixels() * LANES + 15) / 16 * 16;
  band.band_floats = vectors * band.row_floats;
  band.expanded_rows = std::min(2 * p.dil_h + 1, p.source_h);
  int64_t expanded_floats = 0;
  for (int64_t i = 0; i < plan.count; ++i) {
    const PackedSource& s = plan.sources[i];
    if (one_group(s.fetch)) continue;
    const int64_t run = expanded_run(p, s, band.expanded_rows);
    const int64_t columns = std::min(p.columns, run * p.classes[0].source_step + 2 * p.reach_columns);
    expanded_floats = std::max(expanded_floats, band.expanded_rows * s.expanded_blocks() * columns * LANES);
  }
  Carve carve(scratch);
  const int64_t tag_rows = band.ring_rows + band.expanded_rows;
  const int64_t packed_floats = band.ring_rows * plan.row_floats + p.columns_beyond() * LANES;
  carve.reserve(
      {packed_floats, p.band * band.band_floats, expanded_floats, plan.span_floats(), 2 * tag_rows});
  plan.place(carve.take(packed_floats), band.ring_rows);
  band.results = carve.take(p.band * band.band_floats);
  band.expanded = carve.take(expanded_floats);
  band.span_buffer = carve.take(plan.span_floats());
  int64_t* packed_tags = reinterpret_cast<int64_t*>(carve.take(2 * tag_rows));
  band.tags = packed_tags + band.ring_rows;
  std::fill(packed_tags, packed_tags + band.ring_rows, -1);

  TaskSums sums(vectors);
  const RowColumns columns{p.first_column, p.columns, p.source_w};
  for (band.first = rows.begin; band.first < rows.end; band.first += p.band) {
    band.rows = std::min(p.band, rows.end - band.first);
    for (int64_t row = 0; row < band.rows; ++row)
      for (int64_t kh = 0; kh < 3; ++kh) {
        const int64_t at = p.source_row(band.first + row, kh);
        if (at < 0 || packed_tags[at % band.ring_rows] == at) continue;
        packed_tags[at % band.ring_rows] = at;
        pack_row<T, Slots::channels>(p.source, plan, {image, false}, at, at % band.ring_rows, columns, 1);
      }
    for (int64_t v = 0; v < vectors;) {
      const PackedSource& s = plan.sources[plan.source_of[v]];
      const bool broadcast = one_group(s.fetch);
      const int together = broadcast && v + 1 < vectors && plan.source_of[v + 1] == plan.source_of[v] ? 2 : 1;
      const int64_t all = p.classes[0].count;
      const int64_t run = broadcast ? all : expanded_run(p, s, band.expanded_rows);
      for (int64_t q = 0; q < all; q += run)
        compute_vectors(p, s, band, first_vector + v, together, band.results + v * band.row_floats, q,
                        std::min(all, q + run));
      v += together;
    }
    for (int64_t row = 0; row < band.rows; ++row) {
      const RowResult result{band.results + row * band.band_floats,
                             band.row_floats,
                             image,
                             band.first + row,
                             first_vector,
                             vectors,
                             0,
                             p.output_w};
      finish_row<T>(p, result, sums);
    }
  }
  store_partials(p, sums, image, stripe, first_vector);
}

// A share of a pass's tasks, a part at a time, as task(p, T*, index, end of the share, scratch).
class PassTasks {
 public:
  PassTasks(const Pass& pass, int64_t ith, int64_t nth)
      : p_(pass), share_(pass.tasks(), ith, nth), done_(share_.begin) {}

  bool narrow() const { return p_.narrow; }
  bool winograd() const { return p_.winograd; }

  // Up to part / parts of the share.
  template <typename Task>
  void run(int64_t part, int64_t parts, const Task& task) {
    static thread_local Scratch scratch, weights;
    const int64_t end = share_.begin + (share_.end - share_.begin) * part / parts;
    with_dtype(p_.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      p_.stream = streams<T>(p_.output, p_.n * p_.output_h * p_.output_w, p_.output_channels());
      for (; done_ < end; ++done_) {
        const int64_t chunk = p_.task(done_).chunk;
        if (p_.packs_chunks() && packed_ != chunk) {
          packed_ = chunk;
          p_.first_packed = chunk * p_.chunk;
          float* memory = weights.floats(p_.chunk * p_.weight_floats());
          pack_vectors(p_, p_.first_packed, std::min(p_.vectors(), p_.first_packed + p_.chunk), memory);
          p_.weight = memory;
        }
        task(p_, type, done_, share_.end, scratch);
      }
      if (p_.stream && done_ == share_.end) stream_end();
    });
  }

 private:
  Pass p_;
  Share share_;
  int64_t done_, packed_ = -1;  // chunk in `weights`
};

constexpr auto wide_task = [](const Pass& p, auto* type, int64_t index, int64_t, Scratch& scratch) {
  pass_task<std::remove_pointer_t<decltype(type)>>(p, index, scratch);
};

}  // namespace GCONV_ISA_NS
}  // namespace gconv
