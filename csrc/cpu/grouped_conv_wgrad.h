// The weight gradient of grouped_conv, compiled once per instruction set.
//
// Computes: dw[k][c][kh][kw] = sum over images and pixels of dy[.., k] * x[.., c] at the tap's offset;
//   x and dy are packed rows (prologue or BN backward applied once per element, on load).
// Grid: split of the images x chunk of consecutive output vectors (LANES channels of dy).
// Tile: registers hold dw of one output vector. Lanes in one group: WGRAD_CHANNELS x 3 taps over all
//   pixels of a stripe of rows. Lanes across groups: WGRAD_ROWS x 2 x 3 over one row of x, so each packed
//   vector of x is fetched once for all taps of the rows of dy it meets.
// Bytes moved: x and dy once per chunk; dw of a chunk stays in L1/L2.
// Accumulation: float32 in three levels (stripe or row, image, split), each in a fixed order.
#pragma once
#include "grouped_conv_rows.h"

namespace gconv {
namespace GCONV_ISA_NS {

constexpr int WGRAD_ROWS = LANES == 16 ? 3 : 1;
constexpr int64_t STRIPE_FLOATS = 64 * 1024;  // packed rows of one stripe: a quarter of a megabyte

struct WgradPass {
  DType dtype;
  GroupedConvShape shape;
  int64_t source_per_group, output_per_group;
  RowSource x, dy;
  void* dweight;
  WeightLayout layout;
  float* partials;  // [splits][vectors][source_per_group][9][LANES]
  int64_t splits, chunk;
  int64_t first_column, columns;  // packed columns of x

  int64_t vectors() const { return (shape.k + LANES - 1) / LANES; }
  int64_t chunks() const { return (vectors() + chunk - 1) / chunk; }
  int64_t vector_floats() const { return source_per_group * 9 * LANES; }
  // Sliding: x columns in order, each against the three neighbouring columns of dy.
  bool sliding() const { return shape.stride_w == 1 && shape.dil_w == 1; }
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
  const float* x;        // packed row, first channel
  int64_t block;         // floats to the next block of channels
  const float* dy[3];    // packed row of each vertical tap
};

// acc[i][c][kw] += sum over a row of x[c] * dy[i].
template <int ROWS, int CHANNELS, Fetch FETCH, bool SLIDING>
GCONV_INLINE void wgrad_row(const WgradPass& p, const WgradRow& row, Vec (&acc)[ROWS][CHANNELS][3]) {
  const auto value = [&](const float* x, auto channel) GCONV_LAMBDA {
    constexpr int C = decltype(channel)::value, PER_BLOCK = block_channels(FETCH);
    if constexpr (FETCH == Fetch::broadcast) return set1(x[C]);
    const Vec block = load(x + C / PER_BLOCK * row.block);
    if constexpr (FETCH == Fetch::twin) return C % 2 == 0 ? even_twice(block) : odd_twice(block);
    return block;
  };
  if constexpr (SLIDING) {
    const float* x = row.x - p.first_column * LANES;
    const int64_t shift = (p.shape.pad_w + 2) * LANES;
    for (int64_t at = 0; at < p.shape.w * LANES; at += LANES) {
      Vec dy[ROWS][3];
      GCONV_UNROLL
      for (int r = 0; r < ROWS; ++r) {
        GCONV_UNROLL
        for (int t = 0; t < 3; ++t) dy[r][t] = load(row.dy[r] + at + shift - t * LANES);
      }
      each_constant<CHANNELS>([&](auto c) GCONV_LAMBDA {
        const Vec x_c = value(x + at, c);
        GCONV_UNROLL
        for (int r = 0; r < ROWS; ++r) {
          GCONV_UNROLL
          for (int t = 0; t < 3; ++t) acc[r][c][t] = fma(x_c, dy[r][t], acc[r][c][t]);
        }
      });
    }
  } else {
    const int64_t step = p.shape.stride_w * LANES, tap = p.shape.dil_w * LANES;
    const float* x = row.x - (p.shape.pad_w + p.first_column) * LANES;
    for (int64_t ow = 0; ow < p.shape.ow; ++ow, x += step) {
      Vec dy[ROWS];
      GCONV_UNROLL
      for (int r = 0; r < ROWS; ++r) dy[r] = load(row.dy[r] + (ow + 2) * LANES);
      each_constant<CHANNELS>([&](auto c) GCONV_LAMBDA {
        GCONV_UNROLL
        for (int t = 0; t < 3; ++t) {
          const Vec x_c = value(x + t * tap, c);
          GCONV_UNROLL
          for (int r = 0; r < ROWS; ++r) acc[r][c][t] = fma(x_c, dy[r], acc[r][c][t]);
        }
      });
    }
  }
}

struct WgradStripe {
  const float* x;       // packed row of the first valid output row's tap, at the channel block
  int64_t x_row;        // floats from one output row's source row to the next
  const float* dy;      // packed dy of the first valid output row
  int64_t rows;
};

// dw of CHANNELS broadcast channels and one vertical tap, over a stripe; adds to out.
template <int CHANNELS, bool SLIDING>
void wgrad_stripe(const WgradPass& p, const WgradStripe& s, float* out) {
  Vec acc[1][CHANNELS][3];
  GCONV_UNROLL
  for (int c = 0; c < CHANNELS; ++c) {
    GCONV_UNROLL
    for (int t = 0; t < 3; ++t) acc[0][c][t] = zero();
  }
  WgradRow row{s.x, 0, {s.dy, nullptr, nullptr}};
  for (int64_t r = 0; r < s.rows; ++r) {
    wgrad_row<1, CHANNELS, Fetch::broadcast, SLIDING>(p, row, acc);
    row.x += s.x_row;
    row.dy[0] += p.dy_columns() * LANES;
  }
  GCONV_UNROLL
  for (int c = 0; c < CHANNELS; ++c) {
    GCONV_UNROLL
    for (int t = 0; t < 3; ++t) {
      float* at = out + (c * 9 + t) * LANES;
      store(at, add(load(at), acc[0][c][t]));
    }
  }
}

template <int CHANNELS>
void wgrad_stripe(const WgradPass& p, const WgradStripe& s, int64_t channels, float* out) {
  if (channels < CHANNELS) {
    if constexpr (CHANNELS > 1) return wgrad_stripe<CHANNELS - 1>(p, s, channels, out);
  }
  p.sliding() ? wgrad_stripe<CHANNELS, true>(p, s, out) : wgrad_stripe<CHANNELS, false>(p, s, out);
}

// dw of CHANNELS channels from one row of x and the ROWS rows of dy it meets; adds to out.
template <int ROWS, int CHANNELS, Fetch FETCH, bool SLIDING>
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
  wgrad_row<ROWS, CHANNELS, FETCH, SLIDING>(p, row, acc);
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

template <int ROWS, int CHANNELS>
PairsFunction pairs_function(Fetch fetch, bool sliding) {
  switch (fetch) {
    case Fetch::broadcast:
      return sliding ? wgrad_pairs<ROWS, CHANNELS, Fetch::broadcast, true>
                     : wgrad_pairs<ROWS, CHANNELS, Fetch::broadcast, false>;
    case Fetch::twin:
      return sliding ? wgrad_pairs<ROWS, CHANNELS, Fetch::twin, true>
                     : wgrad_pairs<ROWS, CHANNELS, Fetch::twin, false>;
    default:
      return sliding ? wgrad_pairs<ROWS, CHANNELS, Fetch::lanes, true>
                     : wgrad_pairs<ROWS, CHANNELS, Fetch::lanes, false>;
  }
}

// By the rows of dy taken together (1 to WGRAD_ROWS) and the channels (1 or 2).
inline PairsFunction pairs_function(int rows, int64_t channels, Fetch fetch, bool sliding) {
  const bool two = channels > 1;
  if constexpr (WGRAD_ROWS == 3) {
    if (rows == 3) return two ? pairs_function<3, 2>(fetch, sliding) : pairs_function<3, 1>(fetch, sliding);
    if (rows == 2) return two ? pairs_function<2, 2>(fetch, sliding) : pairs_function<2, 1>(fetch, sliding);
  }
  return two ? pairs_function<1, 2>(fetch, sliding) : pairs_function<1, 1>(fetch, sliding);
}

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

// Every vector's lanes lie in one group: x and dy of a stripe are packed, then dw of each block of
// channels and each vertical tap takes all pixels of the stripe without leaving the registers.
template <typename T>
void wgrad_by_stripes(const WgradPass& p, int64_t image, int64_t vectors, SourcePlan& x, SourcePlan& dy,
                      float* dw, Scratch& scratch) {
  const GroupedConvShape& s = p.shape;
  const int64_t block = p.columns * LANES;
  const int64_t most = std::max<int64_t>(1, STRIPE_FLOATS / (x.row_floats * s.stride_h + dy.row_floats));
  const int64_t stripe = std::min(most, s.oh);
  const int64_t reach = 2 * s.dil_h + 1, x_rows = (stripe - 1) * s.stride_h + reach;
  float* memory = scratch.floats(x_rows * x.row_floats + stripe * dy.row_floats);
  x.place(memory, x_rows);
  dy.place(memory + x_rows * x.row_floats, stripe);
  const RowColumns x_columns{p.first_column, p.columns, s.w}, dy_columns{-2, p.dy_columns(), s.ow};
  for (int64_t begin = 0; begin < s.oh; begin += stripe) {
    const int64_t rows = std::min(stripe, s.oh - begin);
    const int64_t origin = begin * s.stride_h - s.pad_h;  // source row of packed row 0
    for (int64_t i = 0; i < (rows - 1) * s.stride_h + reach; ++i)
      if (origin + i >= 0 && origin + i < s.h)
        pack_row<T>(p.x, x, image, origin + i, i, x_columns);
    for (int64_t i = 0; i < rows; ++i) pack_row<T>(p.dy, dy, image, begin + i, i, dy_columns);
    for (int64_t v = 0; v < vectors; ++v) {
      const PackedSource& source = x.sources[x.source_of[v]];
      const PackedSource& gradient = dy.sources[v];
      float* out = dw + v * p.vector_floats();
      for (int64_t kh = 0; kh < 3; ++kh) {
        const int64_t tap = origin + kh * s.dil_h;  // source row of output row `begin`
        const int64_t low = std::max<int64_t>(0, ceil_div(-tap, s.stride_h));
        const int64_t high = std::min(rows, floor_div(s.h - 1 - tap, s.stride_h) + 1);
        if (low >= high) continue;
        const float* first = source.rows + (kh * s.dil_h + low * s.stride_h) * source.row_floats;
        for (int64_t c = 0; c < p.source_per_group;) {
          const int64_t here = std::min<int64_t>(
              {WGRAD_CHANNELS, p.source_per_group - c, static_cast<int64_t>(LANES) - c % LANES});
          const WgradStripe part{first + c / LANES * block + c % LANES, s.stride_h * source.row_floats,
                                 gradient.rows + low * gradient.row_floats, high - low};
          wgrad_stripe<WGRAD_CHANNELS>(p, part, here, out + (c * 9 + kh * 3) * LANES);
          c += here;
        }
      }
    }
  }
}

// Some vector's lanes span groups: x row by row, against the rows of dy that it meets.
template <typename T>
void wgrad_by_rows(const WgradPass& p, int64_t image, int64_t vectors, SourcePlan& x, SourcePlan& dy,
                   float* dw, Scratch& scratch) {
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
      pack_row<T>(p.dy, dy, image, oh, oh % ring, dy_columns);
    }
    if (meets == 0) continue;
    pack_row<T>(p.x, x, image, at, 0, x_columns);
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
          row.x = (broadcast ? source.rows : expanded) + c / per_block * row.block + (broadcast ? c % LANES : 0);
          float* out[3];
          for (int r = 0; r < rows; ++r)
            out[r] = dw + v * p.vector_floats() + (c * 9 + taps[first + r] * 3) * LANES;
          pairs_function(rows, p.source_per_group - c, source.fetch, p.sliding())(p, row, out);
        }
      }
    }
  }
}

template <typename T>
void wgrad_task(const WgradPass& p, int64_t split, int64_t chunk, Scratch& rows, Scratch& image_dw) {
  const int64_t first = chunk * p.chunk, vectors = std::min(p.vectors(), first + p.chunk) - first;
  const int64_t floats = vectors * p.vector_floats();
  float* total = p.partials + (split * p.vectors() + first) * p.vector_floats();
  float* dw = image_dw.floats(floats);
  SourcePlan x(first, vectors, p.shape.k, p.output_per_group, p.source_per_group, p.columns);
  SourcePlan dy(first, vectors, p.shape.k, p.dy_columns());
  const bool uniform = std::all_of(x.sources, x.sources + x.count, [](const PackedSource& source) {
    return source.fetch == Fetch::broadcast;
  });
  std::memset(total, 0, sizeof(float) * static_cast<size_t>(floats));
  const Share images(p.shape.n, split, p.splits);
  for (int64_t image = images.begin; image < images.end; ++image) {
    std::memset(dw, 0, sizeof(float) * static_cast<size_t>(floats));
    if (uniform)
      wgrad_by_stripes<T>(p, image, vectors, x, dy, dw, rows);
    else
      wgrad_by_rows<T>(p, image, vectors, x, dy, dw, rows);
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
  p.dweight = q.dweight;
  p.layout = q.layout;
  p.partials = q.workspace;
  p.chunk = std::min(p.vectors(), p.output_per_group < LANES ? SourcePlan::MOST : SourcePlan::MOST / 2);
  // More splits than the pixels are worth would move more partial results than input.
  const int64_t inputs = s.n * (s.h * s.w * s.c + s.oh * s.ow * s.k);
  const int64_t worth = inputs / (2 * p.vectors() * p.vector_floats());
  p.splits = std::max<int64_t>(1, std::min({s.n, 32 / p.chunks(), worth}));
  p.first_column = -s.pad_w;
  p.columns = std::max(s.w + 2 * s.pad_w, (s.ow - 1) * s.stride_w + 2 * s.dil_w + 1);
  return p;
}

inline void run_wgrad(const WgradPass& p, int64_t ith, int64_t nth) {
  static thread_local Scratch rows, image_dw;
  const int64_t chunks = p.chunks();
  const Share share(p.splits * chunks, ith, nth);
  with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t task = share.begin; task < share.end; ++task)
      wgrad_task<T>(p, task / chunks, task % chunks, rows, image_dw);
  });
}

// Sums the splits in order and writes dweight.
inline void merge_wgrad(const WgradPass& p, int64_t ith, int64_t nth) {
  const int64_t terms = p.source_per_group * 9;
  const Share share(p.vectors(), ith, nth);
  with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t v = share.begin; v < share.end; ++v) {
      const int64_t k = v * LANES, lanes = std::min<int64_t>(LANES, p.shape.k - k);
      T* out = static_cast<T*>(p.dweight) + k * terms;
      for (int64_t i = 0; i < terms; ++i) {
        Vec sum = zero();
        for (int64_t split = 0; split < p.splits; ++split)
          sum = add(sum, load(p.partials + ((split * p.vectors() + v) * terms + i) * LANES));
        T lane[LANES];
        store_as(lane, sum);
        T* at = out + i / 9 * p.layout.stride_c + i % 9 * p.layout.stride_tap;
        for (int64_t l = 0; l < lanes; ++l) at[l * terms] = lane[l];
      }
    }
  });
}

}  // namespace GCONV_ISA_NS
}  // namespace gconv
