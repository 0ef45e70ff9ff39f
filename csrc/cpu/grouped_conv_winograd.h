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
#include "grouped_conv_rows.h"

namespace gconv {
namespace GCONV_ISA_NS {

constexpr int POSITIONS = 16;       // of a tile's 4x4 transformed values
constexpr int WINOGRAD_TILES = 14;  // transformed together, if a row of tiles is not longer
constexpr int WINOGRAD_PAIR = LANES == 16 ? 14 : TILE_PAIR;

// What a tile's transforms cost, in multiplications of one output vector, as measured against the direct
// algorithm: `overhead` below.
constexpr int64_t WINOGRAD_OVERHEAD = LANES == 16 ? 300 : 250,
                  WINOGRAD_WGRAD_OVERHEAD = LANES == 16 ? 600 : 300;

// Whether to use it. It can where both sides have whole vectors of a group's channels, and pays where it
// saves more multiplications than the overhead: the direct algorithm leaves out taps in the padding and has
// no half-empty tiles.
inline bool uses_winograd(const GroupedConvShape& s, Winograd use, int64_t overhead) {
  const int64_t c = s.c / s.groups, k = s.k / s.groups;
  if (PAIRS || use == Winograd::never || c % LANES != 0 || k % LANES != 0) return false;
  if (s.stride_h != 1 || s.stride_w != 1 || s.dil_h != 1 || s.dil_w != 1) return false;
  if (use == Winograd::always) return true;
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

// Values [position][tile][..] in L1: a line more between positions than there is, or all of a tile's would
// fall into few sets.
constexpr int64_t position_floats(int64_t tiles, int64_t tile_floats) { return tiles * tile_floats + 16; }

// B^T d
GCONV_INLINE void input_transform(Vec d0, Vec d1, Vec d2, Vec d3, Vec (&v)[4]) {
  v[0] = sub(d0, d2), v[1] = add(d1, d2), v[2] = sub(d2, d1), v[3] = sub(d1, d3);
}
// A^T m
GCONV_INLINE void output_transform(const Vec (&m)[4], Vec* y0, Vec* y1) {
  *y0 = add(add(m[0], m[1]), m[2]);
  *y1 = sub(sub(m[1], m[2]), m[3]);
}
// A d, its last value negated: dweight_transform takes it back.
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
  g[0] = add(u[0], sum), g[1] = mul(half, sub(u[1], u[2])), g[2] = sub(sum, u[3]);
}

// One vector of channels of a row of tiles: rows[i] is the packed row i of the 4 the tiles read, out the
// first tile's place in [position][tile][channel].
inline void transform_inputs(const float* const (&rows)[4], int64_t tiles, float* out, int64_t position,
                             int64_t tile) {
  Vec d[4][4];  // [transformed row][column]: a tile's last two columns are the next one's first
  const auto column = [&](int64_t w, int at) GCONV_LAMBDA {
    Vec v[4];
    input_transform(load(rows[0] + w * LANES), load(rows[1] + w * LANES), load(rows[2] + w * LANES),
                    load(rows[3] + w * LANES), v);
    for (int i = 0; i < 4; ++i) d[i][at] = v[i];
  };
  column(0, 2);
  column(1, 3);
  for (int64_t t = 0; t < tiles; ++t, out += tile) {
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

// All channels of a group; a row that is null is one of zeros.
inline void transform_inputs(const float* const (&packed)[4], const float* zeros, int64_t channels,
                             int64_t columns, int64_t tiles, float* out, int64_t position) {
  for (int64_t c = 0; c < channels; c += LANES) {
    const float* rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = packed[i] == nullptr ? zeros : packed[i] + c * columns;
    transform_inputs(rows, tiles, out + c, position, channels);
  }
}

// The same of dy: 2x2 pixels of packed rows.
inline void transform_gradients(const float* row0, const float* row1, int64_t tiles, float* out,
                                int64_t position) {
  for (int64_t t = 0; t < tiles; ++t, out += LANES) {
    Vec d[2][4];
    for (int w = 0; w < 2; ++w) {
      const int64_t at = (2 * t + w) * LANES;
      gradient_transform(load(row0 + at), load(row1 + at), d[w]);
    }
    GCONV_UNROLL
    for (int i = 0; i < 4; ++i) {
      Vec v[4];
      gradient_transform(d[0][i], d[1][i], v);
      for (int j = 0; j < 4; ++j) store(out + (i * 4 + j) * position, v[j]);
    }
  }
}

// The tiles' products [position][tile][..] to two rows of results.
inline void transform_outputs(const float* m, int64_t position, int64_t tile, int64_t tiles, float* row0,
                              float* row1) {
  for (int64_t t = 0; t < tiles; ++t, m += tile) {
    Vec s[2][4];  // [output column][transformed row]
    GCONV_UNROLL
    for (int i = 0; i < 4; ++i) {
      Vec row[4];
      for (int j = 0; j < 4; ++j) row[j] = load(m + (i * 4 + j) * position);
      output_transform(row, &s[0][i], &s[1][i]);
    }
    for (int w = 0; w < 2; ++w) {
      Vec y0, y1;
      output_transform(s[w], &y0, &y1);
      store(row0 + (2 * t + w) * LANES, y0);
      store(row1 + (2 * t + w) * LANES, y1);
    }
  }
}

struct Product {
  const float* v;  // [tile][channel]
  int64_t v_tile;
  const float* u;  // [channel][LANES], of each vector
  int64_t u_vector;
  int64_t channels;
  float* m;  // [tile][vector][LANES]
};

// m = v u for one position. One sum over all channels of a wide group would lose digits.
template <int VECTORS, int TILES>
void multiply(const Product& a) {
  constexpr int64_t PARTIAL = 64;
  for (int64_t first = 0; first < a.channels; first += PARTIAL) {
    const int64_t end = std::min(a.channels, first + PARTIAL);
    Vec acc[TILES][VECTORS];
    GCONV_UNROLL
    for (int t = 0; t < TILES; ++t) {
      GCONV_UNROLL
      for (int i = 0; i < VECTORS; ++i) acc[t][i] = zero();
    }
    const float* u = a.u + first * LANES;
    for (int64_t c = first; c < end; ++c, u += LANES) {
      Vec weight[VECTORS];
      GCONV_UNROLL
      for (int i = 0; i < VECTORS; ++i) weight[i] = load(u + i * a.u_vector);
      GCONV_UNROLL
      for (int t = 0; t < TILES; ++t) {
        const Vec x = set1(a.v[t * a.v_tile + c]);
        GCONV_UNROLL
        for (int i = 0; i < VECTORS; ++i) acc[t][i] = fma(x, weight[i], acc[t][i]);
      }
    }
    GCONV_UNROLL
    for (int t = 0; t < TILES; ++t) {
      GCONV_UNROLL
      for (int i = 0; i < VECTORS; ++i) {
        float* m = a.m + (t * VECTORS + i) * LANES;
        store(m, first == 0 ? acc[t][i] : add(load(m), acc[t][i]));
      }
    }
  }
}

using MultiplyFunction = void (*)(const Product&);

template <int VECTORS, int TILES>
MultiplyFunction multiply_function(int64_t tiles) {
  if constexpr (TILES > 1)
    if (tiles < TILES) return multiply_function<VECTORS, TILES - 1>(tiles);
  return multiply<VECTORS, TILES>;
}

// `count` tiles of all positions, in even pieces.
inline void multiply_positions(const float* v, int64_t v_position, int64_t v_tile, const float* u,
                               int64_t u_vector, int64_t channels, float* m, int64_t m_position,
                               int64_t vectors, int64_t count) {
  const int64_t most = vectors == 2 ? WINOGRAD_PAIR : TILE_SINGLE;
  const EvenCut cut(count, most);
  const auto function = [&](int64_t tiles) {
    return vectors == 2 ? multiply_function<2, WINOGRAD_PAIR>(tiles)
                        : multiply_function<1, TILE_SINGLE>(tiles);
  };
  const MultiplyFunction run[2] = {function(cut.least), function(cut.least + (cut.longer > 0))};
  for (int64_t position = 0; position < POSITIONS; ++position) {
    Product a{v + position * v_position, v_tile, u + position * channels * LANES, u_vector, channels,
              m + position * m_position};
    for (int64_t piece = 0; piece < cut.count; ++piece) {
      const int64_t tiles = cut.least + (piece < cut.longer);
      run[piece < cut.longer](a);
      a.v += tiles * v_tile;
      a.m += tiles * vectors * LANES;
    }
  }
}

// du[channel][LANES] += v^T d for one position and LANES channels, over `tiles`.
inline void accumulate(const float* v, int64_t v_tile, const float* d, int64_t tiles, float* du) {
  Vec acc[LANES];
  GCONV_UNROLL
  for (int c = 0; c < LANES; ++c) acc[c] = load(du + c * LANES);
  for (int64_t t = 0; t < tiles; ++t, v += v_tile, d += LANES) {
    const Vec gradient = load(d);
    GCONV_UNROLL
    for (int c = 0; c < LANES; ++c) acc[c] = fma(set1(v[c]), gradient, acc[c]);
  }
  GCONV_UNROLL
  for (int c = 0; c < LANES; ++c) store(du + c * LANES, acc[c]);
}

// The weight gradient of one group from packed rows, [vector][position][channel][LANES].
struct WinogradGradient {
  int64_t channels, columns;   // of x: in the group, in a packed row
  int64_t source_h, output_w;  // rows of x, columns of dy
  int64_t x_image, dy_image;   // packed rows from one image to the next

  int64_t across() const { return (output_w + 1) / 2; }
  // Rows of tiles transformed together. With one vector of channels all of theirs stays in L1; with more it
  // is one position's that does, and the longer it runs the less often dw is loaded and stored.
  int64_t down() const {
    constexpr int64_t LONGEST = 56, POSITION_FLOATS = 4096;  // of x
    const int64_t tiles = channels > LANES
                              ? std::clamp<int64_t>(POSITION_FLOATS / channels, WINOGRAD_TILES, LONGEST)
                              : WINOGRAD_TILES;
    return std::max<int64_t>(1, tiles / across());
  }
  int64_t buffer_floats(int64_t vectors) const {
    const int64_t tiles = down() * across();
    const int64_t values = position_floats(tiles, channels) + vectors * position_floats(tiles, LANES);
    return POSITIONS * values + columns * LANES;
  }

  // Adds dw of `vectors` (one packed source of dy each) over `rows` rows of dy and the images; `origin` is
  // the source row of packed row 0.
  void run(const PackedSource& x, const PackedSource* dy, int64_t vectors, int64_t images, int64_t origin,
           int64_t rows, float* buffer, float* dw, RowPrefetch& next) const {
    float* zeros = buffer;
    std::fill(zeros, zeros + columns * LANES, 0.0f);
    const int64_t all = (rows + 1) / 2, step = even_piece(all, down());
    for (int64_t n = 0; n < images; ++n)
      for (int64_t first = 0; first < all; first += step) {
        const int64_t count = std::min(step, all - first), tiles = count * across();
        const int64_t x_position = position_floats(tiles, channels), position = position_floats(tiles, LANES);
        float *inputs = zeros + columns * LANES, *gradients = inputs + POSITIONS * x_position;
        for (int64_t row = 0; row < count; ++row) {
          const int64_t at = 2 * (first + row);
          const float* four[4];
          for (int64_t i = 0; i < 4; ++i) {
            const bool there = at + i < rows + 2 && origin + at + i >= 0 && origin + at + i < source_h;
            four[i] = there ? x.rows + (n * x_image + at + i) * x.row_floats : nullptr;
          }
          transform_inputs(four, zeros, channels, columns, across(), inputs + row * across() * channels,
                           x_position);
          for (int64_t v = 0; v < vectors; ++v) {
            const float* row0 = dy[v].rows + (n * dy_image + at) * dy[v].row_floats + 2 * LANES;
            const float* row1 = at + 1 < rows ? row0 + dy[v].row_floats : zeros;
            transform_gradients(row0, row1, across(),
                                gradients + v * POSITIONS * position + row * across() * LANES, position);
          }
        }
        for (int64_t i = 0; i < POSITIONS; ++i)
          for (int64_t v = 0; v < vectors; ++v) {
            for (int64_t c = 0; c < channels; c += LANES)
              accumulate(inputs + i * x_position + c, channels, gradients + (v * POSITIONS + i) * position,
                         tiles, dw + ((v * POSITIONS + i) * channels + c) * LANES);
            for (int64_t row = 0; row < count; ++row) next.step();
          }
      }
  }
};

// One vector's weights [channel][3][3][LANES] to [position][channel][LANES].
inline void transform_weights(const float* taps, int64_t channels, float* u) {
  for (int64_t c = 0; c < channels; ++c, taps += 9 * LANES, u += LANES) {
    Vec rows[3][4];
    for (int kh = 0; kh < 3; ++kh)
      weight_transform(load(taps + kh * 3 * LANES), load(taps + (kh * 3 + 1) * LANES),
                       load(taps + (kh * 3 + 2) * LANES), rows[kh]);
    for (int j = 0; j < 4; ++j) {
      Vec column[4];
      weight_transform(rows[0][j], rows[1][j], rows[2][j], column);
      for (int i = 0; i < 4; ++i) store(u + (i * 4 + j) * channels * LANES, column[i]);
    }
  }
}

// One vector's weight gradient, value(position, channel), to [channel][3][3][LANES].
template <typename Value>
GCONV_INLINE void transform_dweights(int64_t channels, float* taps, Value&& value) {
  for (int64_t c = 0; c < channels; ++c, taps += 9 * LANES) {
    Vec rows[4][3];
    for (int i = 0; i < 4; ++i) {
      Vec u[4];
      for (int j = 0; j < 4; ++j) u[j] = value(i * 4 + j, c);
      dweight_transform(u, rows[i]);
    }
    for (int kw = 0; kw < 3; ++kw) {
      const Vec column[4] = {rows[0][kw], rows[1][kw], rows[2][kw], rows[3][kw]};
      Vec g[3];
      dweight_transform(column, g);
      for (int kh = 0; kh < 3; ++kh) store(taps + (kh * 3 + kw) * LANES, g[kh]);
    }
  }
}

}  // namespace GCONV_ISA_NS
}  // namespace gconv
