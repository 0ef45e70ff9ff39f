// Strassen's algorithm for a pass of pointwise_conv, compiled once per instruction set: halves of the pixels,
// of the source channels and of the output channels take 7 products instead of 8.
//
//   S1 = A21 + A22   S2 = S1 - A11   S3 = A11 - A21   S4 = A12 - S2          A: pixels x source channels
//   T1 = B12 - B11   T2 = B22 - T1   T3 = B22 - B12   T4 = B21 - T2          B: source x output channels
//   M1 = A11 B11   M2 = A12 B21   M3 = S4 B22   M4 = A22 T4   M5 = S1 T1   M6 = S2 T2   M7 = S3 T3
//   C11 = M1 + M2   C12 = M1 + M6 + M5 + M3   C21 = M1 + M6 + M7 + M4   C22 = M1 + M6 + M7 + M5
//
// That is Winograd's variant with 15 additions, one level deep (Higham, Accuracy and Stability of Numerical
// Algorithms, 2nd edition, section 23.1), T4 with the other sign. Any channels and pixels may be the halves:
// the source channels of a cut's first and second half, the first two and the last two of four vectors, the
// first and the second half of a run of pixels of one image, so that no image has to do with another.
//
// Additions of pixels and weights happen while they are packed. The products are summed up over the cuts each
// on its own, and combined once. Integers stay exact; an infinity may become NaN in the image that it is in.
#pragma once
#include "pointwise_conv_pack.h"
#include "pointwise_conv_results.h"

namespace gconv {
namespace GCONV_ISA_NS {
namespace pointwise {

// A run of pixels of an image; a second half that is one shorter ends in zeros.
struct Run {
  int64_t first, count;
  int64_t half() const { return (count + 1) / 2; }
};

// The left factors of the products, each as pack_tile packs a tile, of 2 * half source channels from
// `channel` on.
template <typename T, Prologue P>
void pack_run(const PointSource& s, const Run& run, int64_t channel, int64_t half, float* packed) {
  const int64_t pixels = run.half(), next = pixels * half;
  int64_t x_at[2 * POINT_PIXELS], y_at[2 * POINT_PIXELS];
  s.x_at.offsets(run.first, run.count, x_at);
  if constexpr (P == Prologue::finish) s.y_at.offsets(run.first, run.count, y_at);
  for (int64_t c = 0; c < half; c += LANES) {
    const int64_t low = channel + c, high = low + half;
    const Coefficients<P> of_low(s, low, LANES), of_high(s, high, LANES);
    const T* x = static_cast<const T*>(s.x.data);
    const T* y = P == Prologue::finish ? static_cast<const T*>(s.y.data) : nullptr;
    const auto value = [&](const Coefficients<P>& of, int64_t i, int64_t at) GCONV_LAMBDA {
      return of.apply(x + x_at[i] + at, P == Prologue::finish ? y + y_at[i] + at : y, LANES);
    };
    const auto pair = [&](int64_t i, bool both) GCONV_LAMBDA {
      const Vec a11 = value(of_low, i, low), a12 = value(of_high, i, high);
      const Vec a21 = both ? value(of_low, pixels + i, low) : zero();
      const Vec a22 = both ? value(of_high, pixels + i, high) : zero();
      const Vec s1 = add(a21, a22), s2 = sub(s1, a11);
      const Vec operands[PRODUCTS] = {a11, a12, sub(a12, s2), a22, s1, s2, sub(a11, a21)};
      GCONV_UNROLL
      for (int j = 0; j < PRODUCTS; ++j) store(packed + j * next, operands[j]);
      packed += LANES;
    };
    for (int64_t i = 0; i < run.count - pixels; ++i) pair(i, true);
    if (run.count < 2 * pixels) pair(pixels - 1, false);
  }
}

// Products, `floats` values each, to the four quarters of the result, in place of the first four.
inline void combine_products(float* m, int64_t floats) {
  for (int64_t i = 0; i < floats; i += LANES, m += LANES) {
    const Vec m1 = load(m), m5 = load(m + 4 * floats);
    const Vec u2 = add(m1, load(m + 5 * floats)), u3 = add(u2, load(m + 6 * floats));
    store(m, add(m1, load(m + floats)));
    store(m + floats, add(add(u2, m5), load(m + 2 * floats)));
    store(m + 2 * floats, add(u3, load(m + 3 * floats)));
    store(m + 3 * floats, add(u3, m5));
  }
}

// The packed run times the weights of a chunk, as compute_tile does it for a tile.
template <typename T>
void compute_run(const Pass& p, const Run& run, const float* packed, int64_t channel, int64_t channels,
                 int64_t first_vector, float* results, TaskSums& sums, Ahead& ahead) {
  const int64_t half = channels / 2, pixels = run.half(), second = run.count - pixels;
  const bool last = channel + channels == p.source_channels, partial = p.depth < p.source_channels;
  const TileResult tiles[2] = {{p, run.first, pixels}, {p, run.first + pixels, second}};
  const int64_t filled = second > 0 ? 2 : 1;  // of them
  for (int64_t v = 0; v < sums.vectors; v += 4) {
    const int64_t together = p.pair_vectors(first_vector + v), vector_floats = pixels * LANES;
    const int64_t floats = together * vector_floats;
    const float* weights =
        p.weight + (first_vector + v) * LANES * p.weight_rows() + channel / 2 * PRODUCTS * together * LANES;
    float* out = results + (partial ? product_floats(v) : 0);
    const TileFunction multiply = tile_function(together, pixels);
    for (int64_t j = 0; j < PRODUCTS; ++j) {
      if (last)
        for (const TileResult& tile : tiles)
          fetch_epilogue<T>(p, tile, first_vector + v, 2 * together, j, PRODUCTS);
      multiply({packed + j * pixels * half, pixels, weights + j * half * together * LANES, half,
                out + j * floats, channel > 0, &ahead});
    }
    if (!last) continue;
    combine_products(out, floats);
    for (int64_t i = 0; i < filled; ++i)
      store_vectors<T>(p, tiles[i], out + 2 * i * floats, vector_floats, first_vector, v, 2 * together, sums);
  }
  if (last && p.gaps()) fill_gaps<T>(p, run.first, run.count, first_vector, sums.vectors);
}

template <typename T>
void strassen_task(const Pass& p, int64_t block, int64_t chunk, Scratch& scratch) {
  const int64_t first_vector = chunk * p.chunk, begin = p.block_begin(block), end = p.block_begin(block + 1);
  const bool partial = p.depth < p.source_channels;
  TaskSums sums(std::min(p.vectors(), first_vector + p.chunk) - first_vector);
  Carve carve(scratch);
  const int64_t packed_floats = PRODUCTS * POINT_PIXELS * p.depth / 2;
  const int64_t run_floats = product_floats(partial ? p.chunk : 4);
  carve.reserve({packed_floats, run_floats * (partial ? p.block : 1)});
  float* packed = carve.take(packed_floats);
  float* results = carve.take(run_floats * (partial ? p.block : 1));
  for (int64_t channel = 0; channel < p.source_channels; channel += p.depth) {
    const int64_t channels = std::min(p.depth, p.source_channels - channel);
    for (int64_t i = begin; i < end; ++i) {
      const Run run{p.first_pixel(i), p.first_pixel(i + 1) - p.first_pixel(i)};
      with_prologue(p.source.prologue, [&](auto prologue) {
        pack_run<T, decltype(prologue)::value>(p.source, run, channel, channels / 2, packed);
      });
      float* out = results + (partial ? (i - begin) * run_floats : 0);
      const bool more = i + 1 < end;
      const int64_t next = more ? i + 1 : begin, next_channel = more ? channel : channel + channels;
      const int64_t next_channels = std::min(p.depth, p.source_channels - next_channel);
      Ahead ahead(requests(channels / 2) * PRODUCTS * ((sums.vectors + 3) / 4));
      if (next_channels > 0)
        ahead.add(p.source, p.first_pixel(next), p.first_pixel(next + 1) - p.first_pixel(next), next_channel,
                  next_channels, sizeof(T));
      compute_run<T>(p, run, packed, channel, channels, first_vector, out, sums, ahead);
    }
  }
  store_sums(p, block, first_vector, sums);
}

}  // namespace pointwise
}  // namespace GCONV_ISA_NS
}  // namespace gconv
