// The weight gradient of grouped_conv, compiled once per instruction set.
//
// Computes: dw[k][c][kh][kw] = sum over images and pixels of dy[.., k] * x[.., c] at the tap's offset;
//   x and dy are packed rows (prologue or BN backward applied once per element, on load).
// Grid: split of the images x chunk of consecutive output vectors (LANES channels of dy).
// Tile: registers hold dw of one output vector: wide groups 1 x WGRAD_CHANNELS x 3 taps over all pixels
//   of a stripe of rows, x broadcast; narrow groups up to 3 x WGRAD_MIXED x 3 over one row of x, so each
//   packed vector of x is fetched once for all nine taps.
// Bytes moved: x and dy once per chunk; dw of a chunk stays in L1/L2.
// Accumulation: float32 in three levels (stripe or row, image, split), each in a fixed order.
#pragma once
#include "grouped_conv_rows.h"

namespace gconv {
namespace GCONV_ISA_NS {

constexpr int WGRAD_MIXED = LANES == 16 ? 2 : 1;
constexpr int64_t STRIPE_FLOATS = 32 * 1024;  // packed rows of one stripe: half of a small L2

struct WgradPass {
  DType dtype;
  GroupedConvShape shape;
  int64_t source_per_group, output_per_group;
  RowSource x, dy;
  void* dweight;
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

struct WgradRow {
  const float* x;        // packed row, first channel
  int64_t x_channel;     // floats to the next channel (mixed sources; broadcast ones lie side by side)
  const float* dy[3];    // packed row of each vertical tap
};

// acc[i][c][kw] += sum over a row of x[c] * dy[i].
template <int ROWS, int CHANNELS, bool BROADCAST, bool SLIDING>
GCONV_INLINE void wgrad_row(const WgradPass& p, const WgradRow& row, Vec (&acc)[ROWS][CHANNELS][3]) {
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
      GCONV_UNROLL
      for (int c = 0; c < CHANNELS; ++c) {
        const Vec value = BROADCAST ? set1(x[at + c]) : load(x + at + c * row.x_channel);
        GCONV_UNROLL
        for (int r = 0; r < ROWS; ++r) {
          GCONV_UNROLL
          for (int t = 0; t < 3; ++t) acc[r][c][t] = fma(value, dy[r][t], acc[r][c][t]);
        }
      }
    }
  } else {
    const int64_t step = p.shape.stride_w * LANES, tap = p.shape.dil_w * LANES;
    const float* x = row.x - (p.shape.pad_w + p.first_column) * LANES;
    for (int64_t ow = 0; ow < p.shape.ow; ++ow, x += step) {
      Vec dy[ROWS];
      GCONV_UNROLL
      for (int r = 0; r < ROWS; ++r) dy[r] = load(row.dy[r] + (ow + 2) * LANES);
      GCONV_UNROLL
      for (int c = 0; c < CHANNELS; ++c) {
        GCONV_UNROLL
        for (int t = 0; t < 3; ++t) {
          const Vec value = BROADCAST ? set1(x[t * tap + c]) : load(x + t * tap + c * row.x_channel);
          GCONV_UNROLL
          for (int r = 0; r < ROWS; ++r) acc[r][c][t] = fma(value, dy[r], acc[r][c][t]);
        }
      }
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
  WgradRow row{s.x, 1, {s.dy, nullptr, nullptr}};
  for (int64_t r = 0; r < s.rows; ++r) {
    wgrad_row<1, CHANNELS, true, SLIDING>(p, row, acc);
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

// dw of CHANNELS mixed channels from one row of x and the ROWS rows of dy it meets; adds to dw.
template <int ROWS, int CHANNELS, bool SLIDING>
void wgrad_mixed(const WgradPass& p, const WgradRow& row, float* const* out) {
  Vec acc[ROWS][CHANNELS][3];
  GCONV_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    GCONV_UNROLL
    for (int c = 0; c < CHANNELS; ++c) {
      GCONV_UNROLL
      for (int t = 0; t < 3; ++t) acc[r][c][t] = load(out[r] + (c * 9 + t) * LANES);
    }
  }
  wgrad_row<ROWS, CHANNELS, false, SLIDING>(p, row, acc);
  GCONV_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    GCONV_UNROLL
    for (int c = 0; c < CHANNELS; ++c) {
      GCONV_UNROLL
      for (int t = 0; t < 3; ++t) store(out[r] + (c * 9 + t) * LANES, acc[r][c][t]);
    }
  }
}

template <int CHANNELS, bool SLIDING>
void wgrad_mixed(const WgradPass& p, const WgradRow& row, int rows, float* const* out) {
  if (rows == 3)
    wgrad_mixed<3, CHANNELS, SLIDING>(p, row, out);
  else if (rows == 2)
    wgrad_mixed<2, CHANNELS, SLIDING>(p, row, out);
  else if (rows == 1)
    wgrad_mixed<1, CHANNELS, SLIDING>(p, row, out);
}

template <int CHANNELS>
void wgrad_mixed(const WgradPass& p, const WgradRow& row, int rows, float* const* out) {
  p.sliding() ? wgrad_mixed<CHANNELS, true>(p, row, rows, out)
              : wgrad_mixed<CHANNELS, false>(p, row, rows, out);
}

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

// Vectors [first, end) all lie in one group: one packed stripe of x serves them all.
template <typename T>
void wgrad_uniform(const WgradPass& p, int64_t image, int64_t first, int64_t end, float* dw,
                   Scratch& scratch) {
  const GroupedConvShape& s = p.shape;
  const int64_t channel = first * LANES / p.output_per_group * p.source_per_group;
  const int64_t block = p.columns * LANES;
  const int64_t blocks = (p.source_per_group + LANES - 1) / LANES;
  const int64_t x_row = blocks * block, dy_row = p.dy_columns() * LANES;
  const int64_t most = std::max<int64_t>(1, STRIPE_FLOATS / (x_row * s.stride_h + dy_row));
  const int64_t stripe = std::min(most, s.oh);
  const int64_t x_rows = (stripe - 1) * s.stride_h + 2 * s.dil_h + 1;
  float* x = scratch.floats(x_rows * x_row + stripe * dy_row);
  float* dy = x + x_rows * x_row;
  for (int64_t begin = 0; begin < s.oh; begin += stripe) {
    const int64_t rows = std::min(stripe, s.oh - begin);
    const int64_t origin = begin * s.stride_h - s.pad_h;  // source row of packed row 0
    for (int64_t i = 0; i < (rows - 1) * s.stride_h + 2 * s.dil_h + 1; ++i)
      if (origin + i >= 0 && origin + i < s.h)
        pack_row_blocks<T>(p.x, image, origin + i, channel, p.source_per_group,
                           RowColumns{p.first_column, p.columns, s.w}, x + i * x_row);
    for (int64_t v = first; v < end; ++v) {
      const int64_t k = v * LANES;
      for (int64_t i = 0; i < rows; ++i)
        pack_row_blocks<T>(p.dy, image, begin + i, k, std::min<int64_t>(LANES, s.k - k),
                           RowColumns{-2, p.dy_columns(), s.ow}, dy + i * dy_row);
      float* out = dw + (v - first) * p.vector_floats();
      for (int64_t kh = 0; kh < 3; ++kh) {
        const int64_t tap = origin + kh * s.dil_h;  // source row of output row `begin`
        const int64_t low = std::max<int64_t>(0, ceil_div(-tap, s.stride_h));
        const int64_t high = std::min(rows, floor_div(s.h - 1 - tap, s.stride_h) + 1);
        if (low >= high) continue;
        for (int64_t c = 0; c < p.source_per_group;) {
          const int64_t here = std::min<int64_t>(
              {WGRAD_CHANNELS, p.source_per_group - c, static_cast<int64_t>(LANES) - c % LANES});
          const WgradStripe part{
              x + (kh * s.dil_h + low * s.stride_h) * x_row + c / LANES * block + c % LANES,
              s.stride_h * x_row, dy + low * dy_row, high - low};
          wgrad_stripe<WGRAD_CHANNELS>(p, part, here, out + (c * 9 + kh * 3) * LANES);
          c += here;
        }
      }
    }
  }
}

// The lanes of vector v span groups: x as one vector per channel, row by row.
template <typename T>
void wgrad_spanning(const WgradPass& p, int64_t image, int64_t v, float* dw, Scratch& scratch) {
  const GroupedConvShape& s = p.shape;
  const int64_t k = v * LANES, lanes = std::min<int64_t>(LANES, s.k - k);
  const int64_t group = k / p.output_per_group, last_group = (k + lanes - 1) / p.output_per_group;
  const int64_t span = (last_group - group + 1) * p.source_per_group;
  const int64_t channel = group * p.source_per_group;
  int32_t lane_base[LANES];
  for (int64_t l = 0; l < LANES; ++l)
    lane_base[l] = l < lanes
                       ? static_cast<int32_t>(((k + l) / p.output_per_group - group) * p.source_per_group)
                       : 0;
  const int64_t next = p.columns * LANES, dy_row = p.dy_columns() * LANES;
  const int64_t ring = std::min(s.oh, 2 * s.dil_h + 1);
  const int64_t x_floats = p.source_per_group * next, span_floats = (span + LANES) / 16 * 16 + 16;
  float* x = scratch.floats(x_floats + ring * dy_row + span_floats + 2 * ring + 16);
  float* dy = x + x_floats;
  float* span_buffer = dy + ring * dy_row;
  int64_t* slots = reinterpret_cast<int64_t*>(span_buffer + span_floats);  // dy row of each slot
  for (int64_t i = 0; i < ring; ++i) slots[i] = -1;
  for (int64_t at = 0; at < s.h; ++at) {
    WgradRow row{x, next, {nullptr, nullptr, nullptr}};
    int taps[3], rows = 0;
    for (int kh = 0; kh < 3; ++kh) {
      const int64_t shifted = at + s.pad_h - kh * s.dil_h;
      if (shifted < 0 || shifted % s.stride_h != 0 || shifted / s.stride_h >= s.oh) continue;
      const int64_t oh = shifted / s.stride_h;
      float* packed = dy + oh % ring * dy_row;
      if (slots[oh % ring] != oh) {
        slots[oh % ring] = oh;
        pack_row_blocks<T>(p.dy, image, oh, k, lanes, RowColumns{-2, p.dy_columns(), s.ow}, packed);
      }
      row.dy[rows] = packed;
      taps[rows++] = kh;
    }
    if (rows == 0) continue;
    pack_row_mixed<T>(p.x, image, at, channel, span, p.source_per_group, lane_base,
                      RowColumns{p.first_column, p.columns, s.w}, x, span_buffer);
    for (int64_t c = 0; c < p.source_per_group;) {
      float* out[3];
      for (int r = 0; r < rows; ++r) out[r] = dw + (c * 9 + taps[r] * 3) * LANES;
      row.x = x + c * next;
      if (WGRAD_MIXED <= p.source_per_group - c) {
        wgrad_mixed<WGRAD_MIXED>(p, row, rows, out);
        c += WGRAD_MIXED;
      } else {
        wgrad_mixed<1>(p, row, rows, out);
        ++c;
      }
    }
  }
}

template <typename T>
void wgrad_task(const WgradPass& p, int64_t split, int64_t chunk, Scratch& rows, Scratch& image_dw) {
  const int64_t first = chunk * p.chunk, end = std::min(p.vectors(), first + p.chunk);
  const int64_t floats = (end - first) * p.vector_floats();
  float* total = p.partials + (split * p.vectors() + first) * p.vector_floats();
  float* dw = image_dw.floats(floats);
  std::memset(total, 0, sizeof(float) * static_cast<size_t>(floats));
  const Share images(p.shape.n, split, p.splits);
  for (int64_t image = images.begin; image < images.end; ++image) {
    std::memset(dw, 0, sizeof(float) * static_cast<size_t>(floats));
    for (int64_t v = first; v < end;) {
      const auto group_of = [&](int64_t channel) { return channel / p.output_per_group; };
      const auto uniform = [&](int64_t u) {
        return group_of(u * LANES) == group_of(std::min((u + 1) * LANES, p.shape.k) - 1);
      };
      float* out = dw + (v - first) * p.vector_floats();
      if (!uniform(v)) {
        wgrad_spanning<T>(p, image, v, out, rows);
        ++v;
        continue;
      }
      int64_t u = v + 1;
      while (u < end && uniform(u) && group_of(u * LANES) == group_of(v * LANES)) ++u;
      wgrad_uniform<T>(p, image, v, u, out, rows);
      v = u;
    }
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
  p.partials = q.workspace;
  p.chunk = std::min<int64_t>(p.vectors(), std::min<int64_t>(8, std::max<int64_t>(1, p.output_per_group / LANES)));
  p.splits = std::max<int64_t>(1, std::min(s.n, 64 / p.chunks()));
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

// Sums the splits in order and writes [K, C/groups, 3, 3].
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
        for (int64_t l = 0; l < lanes; ++l) out[l * terms + i] = lane[l];
      }
    }
  });
}

}  // namespace GCONV_ISA_NS
}  // namespace gconv
