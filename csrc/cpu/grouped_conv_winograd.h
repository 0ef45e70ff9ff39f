// Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray 2016, arXiv 1509.09308, section 4.1), compiled once
// per instruction set: a tile of 2x2 pixels takes 16 multiplications per pair of channels instead of 36.
//
//   y  = A^T [(G g G^T) . (B^T d B)] A       d: 4x4 inputs, g: 3x3 weights, . position by position
//   dg = G^T [sum (B^T d B) . (A dy A^T)] G  the sum is over all tiles of all images
//
// Per position the sums over channels (forward) or tiles (weight gradient) are matrix products of packed
// operands. Every transform is a sum or a difference, G's halves are exact: integers stay exact, and float32
// errors stay within 1.3 of a direct algorithm's. An infinity may become NaN.
#pragma once
#include "cpu/isa.h"
#include "grouped_conv_rows.h"

namespace gconv {
namespace GCONV_ISA_NS {

constexpr int POSITIONS = 16;       // of a tile's 4x4 transformed values
constexpr int WINOGRAD_TILES = 14;  // transformed together, if a row of tiles is not longer

// What a tile's transforms cost, in multiplications of one output vector, as measured against the direct
// algorithm: `overhead` below. On Zen 4, which starts one multiplication a cycle, they are worth twice as
// much as on the Xeon. Zen 5 starts two, but in its forwards the transforms cost no more of them.
inline int64_t winograd_overhead() {
  if (LANES != 16) return 250;
  return amd_family() >= ZEN4_FAMILY ? 150 : 300;
}
inline int64_t winograd_wgrad_overhead() {
  if (LANES != 16) return 300;
  return amd_family() > ZEN4_FAMILY ? 280 : amd_family() == ZEN4_FAMILY ? 150 : 600;
}

// Whether to use it. It can where a vector holds channels of one group or of two neighbours, and pays where
// it saves more multiplications than the overhead: the direct algorithm leaves out taps in the padding and
// has no half-empty tiles.
inline bool uses_winograd(const GroupedConvShape& s, Use use, int64_t overhead) {
  const int64_t c = s.c / s.groups, k = s.k / s.groups;
  if (PAIRS || use == Use::never || c < LANES || k < LANES) return false;
  if (s.stride_h != 1 || s.stride_w != 1 || s.dil_h != 1 || s.dil_w != 1) return false;
  if (use == Use::always) return true;
  const auto taps = [](int64_t size, int64_t out, int64_t pad) {
    int64_t inside = 0;
    for (int64_t kh = 0; kh < 3; ++kh)
      inside += std::max<int64_t>(0, std::min(out, size + pad - kh) - std::max<int64_t>(0, pad - kh));
    return inside;
  };
  const int64_t tiles = ((s.oh + 1) / 2) * ((s.ow + 1) / 2);
  const int64_t saved = taps(s.h, s.oh, s.pad_h) * taps(s.w, s.ow, s.pad_w) - POSITIONS * tiles;
  return std::min(c, k) * saved >= overhead * tiles;
}

// The output vectors that begin in a group, and the lanes of the last that the next group has.
struct GroupVectors {
  int64_t begin, end;
  int last_lanes;  // of the last vector that belong to the group; LANES: it spans no two groups

  GroupVectors(int64_t group, int64_t per_group, int64_t groups)
      : begin((group * per_group + LANES - 1) / LANES), end(((group + 1) * per_group + LANES - 1) / LANES) {
    const int64_t own = (group + 1) * per_group - (end - 1) * LANES;
    last_lanes = static_cast<int>(group + 1 < groups ? own : LANES);
  }
  bool spans(int64_t vector) const { return vector + 1 == end && last_lanes < LANES; }
};

// Transformed values lie [block of LANES channels][position][tile][LANES]: a line more between positions than
// there is, or all of a tile's would fall into few sets of L1.
constexpr int64_t position_floats(int64_t tiles) { return tiles * LANES + 16; }
constexpr int64_t block_floats(int64_t tiles) { return POSITIONS * position_floats(tiles); }

// B^T d, its last value negated: A^T then adds all products of the last row and column, and the products with
// A d, whose last value is negated too, are as they should be.
GCONV_INLINE void input_transform(Vec d0, Vec d1, Vec d2, Vec d3, Vec (&v)[4]) {
  v[0] = sub(d0, d2), v[1] = add(d1, d2), v[2] = sub(d2, d1), v[3] = sub(d3, d1);
}
// A d, its last value negated.
GCONV_INLINE void gradient_transform(Vec d0, Vec d1, Vec (&v)[4]) {
  v[0] = d0, v[1] = add(d0, d1), v[2] = sub(d0, d1), v[3] = d1;
}
// G g
GCONV_INLINE void weight_transform(Vec g0, Vec g1, Vec g2, Vec (&u)[4]) {
  const Vec half = set1(0.5f), outer = add(g0, g2);
  u[0] = g0, u[1] = mul(half, add(outer, g1)), u[2] = mul(half, sub(outer, g1)), u[3] = g2;
}
// G^T u
GCONV_INLINE void dweight_transform(const Vec (&u)[4], Vec (&g)[3]) {
  const Vec half = set1(0.5f), sum = mul(half, add(u[1], u[2]));
  g[0] = add(u[0], sum), g[1] = mul(half, sub(u[1], u[2])), g[2] = add(sum, u[3]);
}

// Where a row of tiles reads the tensor: at most LANES channels of an image, zero outside of it.
struct TileSource {
  const RowSource* source;
  int64_t image, height, width;
  int64_t row, column;  // of the first tile's first value
  int64_t channel;
  int lanes;
};

// Rows [row, row + ROWS) of a tile source, prologue applied.
template <typename T, Prologue P, int ROWS>
class TileRows {
 public:
  GCONV_INLINE explicit TileRows(const TileSource& s)
      : coefficients_(*s.source, s.channel, s.lanes),
        lanes_(s.lanes),
        width_(s.width),
        x_step_(s.source->x.stride_w),
        y_step_(s.source->y.stride_w) {
    for (int i = 0; i < ROWS; ++i) {
      const int64_t row = s.row + i;
      x_[i] = y_[i] = nullptr;
      if (row < 0 || row >= s.height) continue;
      x_[i] = row_pointer<T>(s.source->x, s.image, row, s.channel);
      if constexpr (P == Prologue::finish) y_[i] = row_pointer<T>(s.source->y, s.image, row, s.channel);
    }
  }
  GCONV_INLINE void column(int64_t w, Vec (&d)[ROWS]) const {
    const bool inside = w >= 0 && w < width_;
    GCONV_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      d[i] = zero();
      if (!inside || x_[i] == nullptr) continue;
      const T* y = nullptr;
      if constexpr (P == Prologue::finish) y = y_[i] + w * y_step_;
      d[i] = coefficients_.apply(x_[i] + w * x_step_, y, lanes_);
    }
  }

 private:
  Coefficients<P> coefficients_;
  int lanes_;
  const T *x_[ROWS], *y_[ROWS];
  int64_t width_, x_step_, y_step_;
};

// B^T d B of a row of tiles; out is the first tile's place in [position][tile][LANES].
template <typename T, Prologue P>
void transform_inputs(const TileSource& s, int64_t tiles, float* out, int64_t position) {
  const TileRows<T, P, 4> rows(s);
  Vec d[4][4];  // [transformed row][column]: a tile's last two columns are the next one's first
  const auto column = [&](int64_t w, int at) GCONV_LAMBDA {
    Vec x[4], v[4];
    rows.column(s.column + w, x);
    input_transform(x[0], x[1], x[2], x[3], v);
    for (int i = 0; i < 4; ++i) d[i][at] = v[i];
  };
  column(0, 2);
  column(1, 3);
  for (int64_t t = 0; t < tiles; ++t, out += LANES) {
    for (int i = 0; i < 4; ++i) d[i][0] = d[i][2], d[i][1] = d[i][3];
    column(2 * t + 2, 2);
    column(2 * t + 3, 3);
    GCONV_UNROLL
    for (int i = 0; i < 4; ++i) {
      Vec v[4];
      input_transform(d[i][0], d[i][1], d[i][2], d[i][3], v);
      for (int j = 0; j < 4; ++j) store(out + (i * 4 + j) * position, v[j]);
    }
  }
}

// All channels of a group, for a band of `all` tiles.
template <typename T>
void transform_inputs(TileSource s, int64_t channels, int64_t tiles, float* out, int64_t all) {
  with_prologue(s.source->prologue, [&](auto prologue) {
    for (int64_t c = 0; c < channels; c += LANES, s.channel += LANES, out += block_floats(all)) {
      s.lanes = static_cast<int>(std::min<int64_t>(LANES, channels - c));
      transform_inputs<T, decltype(prologue)::value>(s, tiles, out, position_floats(all));
    }
  });
}

// A dy A^T of a row of tiles.
template <typename T>
void transform_gradients(const TileSource& s, int64_t tiles, float* out, int64_t position) {
  with_prologue(s.source->prologue, [&](auto prologue) {
    const TileRows<T, decltype(prologue)::value, 2> rows(s);
    for (int64_t t = 0; t < tiles; ++t, out += LANES) {
      Vec d[2][4];
      for (int w = 0; w < 2; ++w) {
        Vec dy[2];
        rows.column(s.column + 2 * t + w, dy);
        gradient_transform(dy[0], dy[1], d[w]);
      }
      GCONV_UNROLL
      for (int i = 0; i < 4; ++i) {
        Vec v[4];
        gradient_transform(d[0][i], d[1][i], v);
        for (int j = 0; j < 4; ++j) store(out + (i * 4 + j) * position, v[j]);
      }
    }
  });
}

// Tiles that are multiplied together: their accumulators, two to a vector, fill the registers.
constexpr int WINOGRAD_SINGLE = LANES == 16 ? 14 : 6, WINOGRAD_PAIR = WINOGRAD_SINGLE / 2;

struct TileProducts {
  const float* v;  // inputs, from the first tile on
  int64_t second;  // from there to the next group's, if the vector spans two
  Mask first;      // lanes of the first of them
  int64_t v_block, v_position;
  const float* u;  // weights [column][outer?][channel][2][LANES] of each vector
  int64_t u_vector;
  int64_t channels;
  float* row[2];   // results, the tiles' upper and lower rows, two pixels to a tile
  int64_t vector;  // floats from one vector's results to the next's
};

// The two rows of the U of one vector that meet in one place: the inner or the outer ones of a column.
constexpr int64_t weight_place(int64_t row, int64_t column, int64_t channels) {
  const int64_t outer = row == 0 || row == 3, second = row >= 2;
  return (column * 2 + outer) * channels * 2 * LANES + second * LANES;
}

// Adds one column of A^T [..] A to the results. Along a column A^T is m1 + m2 and m1 - m2, in two
// accumulators that then go on with m0 and m3, so that two values per column are stored instead of four. The
// columns come in the order 1, 2, 0, 3: the first finds nothing there, the second makes sum and difference.
// One sum over all channels of a wide group would lose digits.
template <int VECTORS, int TILES, bool SPAN>
void multiply_column(const TileProducts& a, int column) {
  constexpr int64_t PARTIAL = 32;
  for (int64_t first = 0; first < a.channels; first += PARTIAL) {
    const int64_t end = std::min(a.channels, first + PARTIAL);
    Vec acc[2][TILES][VECTORS];
    GCONV_UNROLL
    for (int t = 0; t < TILES; ++t) {
      GCONV_UNROLL
      for (int i = 0; i < VECTORS; ++i) acc[0][t][i] = acc[1][t][i] = zero();
    }
    const auto accumulate_rows = [&](int64_t row0, int64_t row1) GCONV_LAMBDA {
      const float* u = a.u + weight_place(row0, column, a.channels) + first * 2 * LANES;
      for (int64_t c0 = first; c0 < end; c0 += LANES) {
        const float* block = a.v + c0 / LANES * a.v_block;
        const float* rows[2] = {block + (row0 * 4 + column) * a.v_position,
                                block + (row1 * 4 + column) * a.v_position};
        const int64_t here = std::min<int64_t>(LANES, end - c0);
        for (int64_t c = 0; c < here; ++c, u += 2 * LANES) {
          GCONV_UNROLL
          for (int r = 0; r < 2; ++r) {
            Vec weight[VECTORS];
            GCONV_UNROLL
            for (int i = 0; i < VECTORS; ++i) weight[i] = load(u + r * LANES + i * a.u_vector);
            GCONV_UNROLL
            for (int t = 0; t < TILES; ++t) {
              const float* at = rows[r] + t * LANES + c;
              const Vec x = SPAN ? choose(a.first, set1(at[0]), set1(at[a.second])) : set1(at[0]);
              GCONV_UNROLL
              for (int i = 0; i < VECTORS; ++i) acc[r][t][i] = fma(x, weight[i], acc[r][t][i]);
            }
          }
        }
      }
    };
    accumulate_rows(1, 2);
    GCONV_UNROLL
    for (int t = 0; t < TILES; ++t) {
      GCONV_UNROLL
      for (int i = 0; i < VECTORS; ++i) {
        const Vec m1 = acc[0][t][i], m2 = acc[1][t][i];
        acc[0][t][i] = add(m1, m2), acc[1][t][i] = sub(m1, m2);
      }
    }
    accumulate_rows(0, 3);
    const auto each_result = [&](auto&& f) GCONV_LAMBDA {
      GCONV_UNROLL
      for (int r = 0; r < 2; ++r) {
        GCONV_UNROLL
        for (int i = 0; i < VECTORS; ++i) {
          GCONV_UNROLL
          for (int t = 0; t < TILES; ++t) f(a.row[r] + i * a.vector + t * 2 * LANES, acc[r][t][i]);
        }
      }
    };
    if (column == 1 && first == 0) {
      each_result([](float* out, Vec sum) GCONV_LAMBDA { store(out, sum); });
    } else if (column == 2) {
      const int64_t right = first == 0 ? 0 : LANES;
      each_result([right](float* out, Vec sum) GCONV_LAMBDA {
        const Vec y0 = load(out), y1 = load(out + right);
        store(out, add(y0, sum));
        store(out + LANES, sub(y1, sum));
      });
    } else {
      const int64_t right = column == 3 ? LANES : 0;
      each_result([right](float* out, Vec sum)
                      GCONV_LAMBDA { store(out + right, add(load(out + right), sum)); });
    }
  }
}

using MultiplyFunction = void (*)(const TileProducts&, int column);

template <int VECTORS, int TILES, bool SPAN = false>
MultiplyFunction multiply_function(int64_t tiles) {
  if constexpr (TILES > 1)
    if (tiles < TILES) return multiply_function<VECTORS, TILES - 1, SPAN>(tiles);
  return multiply_column<VECTORS, TILES, SPAN>;
}

// One or two vectors of `tiles` tiles, in even pieces; with `second` one vector. `next` takes four steps.
inline void multiply_tiles(const TileProducts& products, int64_t vectors, int64_t tiles, RowPrefetch& next) {
  const EvenCut cut(tiles, vectors == 2 ? WINOGRAD_PAIR : WINOGRAD_SINGLE);
  const auto function = [&](int64_t piece) {
    return vectors == 2           ? multiply_function<2, WINOGRAD_PAIR>(piece)
           : products.second != 0 ? multiply_function<1, WINOGRAD_SINGLE, true>(piece)
                                  : multiply_function<1, WINOGRAD_SINGLE>(piece);
  };
  const MultiplyFunction run[2] = {function(cut.least), function(cut.least + (cut.longer > 0))};
  for (int column : {1, 2, 0, 3}) {
    TileProducts a = products;
    for (int64_t piece = 0; piece < cut.count; ++piece) {
      const bool longer = piece < cut.longer;
      run[longer](a, column);
      a.v += (cut.least + longer) * LANES;
      for (float*& row : a.row) row += (cut.least + longer) * 2 * LANES;
    }
    next.step();
  }
}

// du[channel][LANES] += v^T d for one position and `count` of COUNT channels, over `tiles`; fresh: nothing to
// add to. The lanes of a vector that spans two groups meet the v of their own.
template <int COUNT, bool SPAN>
void accumulate(const float* v, int64_t second, Mask first, const float* d, int64_t tiles, int64_t count,
                bool fresh, float* du) {
  Vec acc[COUNT];
  GCONV_UNROLL
  for (int c = 0; c < COUNT; ++c) acc[c] = fresh || c >= count ? zero() : load(du + c * LANES);
  for (int64_t t = 0; t < tiles; ++t, v += LANES, d += LANES) {
    const Vec gradient = load(d);
    GCONV_UNROLL
    for (int c = 0; c < COUNT; ++c) {
      const Vec x = SPAN ? choose(first, set1(v[c]), set1(v[c + second])) : set1(v[c]);
      acc[c] = fma(x, gradient, acc[c]);
    }
  }
  GCONV_UNROLL
  for (int c = 0; c < COUNT; ++c)
    if (c < count) store(du + c * LANES, acc[c]);
}

// At most LANES channels; second 0: one group.
inline void accumulate(const float* v, int64_t second, Mask first, const float* d, int64_t tiles,
                       int64_t count, bool fresh, float* du) {
  const bool half = count <= LANES / 2;
  const auto run = second == 0 ? half ? accumulate<LANES / 2, false> : accumulate<LANES, false>
                   : half      ? accumulate<LANES / 2, true>
                               : accumulate<LANES, true>;
  run(v, second, first, d, tiles, count, fresh, du);
}

// One vector's weights [channel][3][3][LANES] to [column][outer?][channel][2][LANES].
inline void transform_weights(const float* taps, int64_t channels, float* u) {
  for (int64_t c = 0; c < channels; ++c, taps += 9 * LANES, u += 2 * LANES) {
    Vec rows[3][4];
    for (int kh = 0; kh < 3; ++kh)
      weight_transform(load(taps + kh * 3 * LANES), load(taps + (kh * 3 + 1) * LANES),
                       load(taps + (kh * 3 + 2) * LANES), rows[kh]);
    for (int j = 0; j < 4; ++j) {
      Vec column[4];
      weight_transform(rows[0][j], rows[1][j], rows[2][j], column);
      for (int i = 0; i < 4; ++i) store(u + weight_place(i, j, channels), column[i]);
    }
  }
}

// One vector's weight gradient [position][channel][LANES] to [channel][3][3][LANES]; fresh: nothing to add
// to.
inline void transform_dweights(const float* du, int64_t channels, bool fresh, float* taps) {
  for (int64_t c = 0; c < channels; ++c, du += LANES, taps += 9 * LANES) {
    Vec rows[4][3];
    for (int i = 0; i < 4; ++i) {
      Vec u[4];
      for (int j = 0; j < 4; ++j) u[j] = load(du + (i * 4 + j) * channels * LANES);
      dweight_transform(u, rows[i]);
    }
    for (int kw = 0; kw < 3; ++kw) {
      const Vec column[4] = {rows[0][kw], rows[1][kw], rows[2][kw], rows[3][kw]};
      Vec g[3];
      dweight_transform(column, g);
      for (int kh = 0; kh < 3; ++kh) {
        float* tap = taps + (kh * 3 + kw) * LANES;
        store(tap, fresh ? g[kh] : add(load(tap), g[kh]));
      }
    }
  }
}

}  // namespace GCONV_ISA_NS
}  // namespace gconv
