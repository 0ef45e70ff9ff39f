// The weights of pointwise_conv as its products read them, compiled once per instruction set.
#pragma once
#include "pointwise_conv_plan.h"

namespace gconv {
namespace GCONV_ISA_NS {
namespace pointwise {

// Source channels [first, first + count) in slots of output vector v as [channel][LANES], `step` floats from
// one to the next. Lanes past the tail repeat the last or are 0: what they compute is never stored.
// T is what the activations are of, W what the weights are.
template <typename T, typename W>
void pack_vector(const Pass& p, int64_t v, int64_t first, int64_t count, int64_t step, float* out) {
  const W* weight = static_cast<const W*>(p.raw_weight);
  if (p.transposed) {
    const int lanes = static_cast<int>(std::min<int64_t>(LANES, p.output_channels - v * LANES));
    const auto row = [&](int64_t k) {
      return rounded_from<W, T>(load_lanes(weight + k * p.output_channels + v * LANES, lanes));
    };
    for (int64_t k = first; k < first + count; ++k, out += step)
      store(out, pair_slots(row(k * PER_SLOT), row(k * PER_SLOT + PER_SLOT - 1)));
    return;
  }
  const W* rows[LANES];
  for (int64_t l = 0; l < LANES; ++l)
    rows[l] =
        weight + (std::min(v * LANES + l, p.output_channels - 1) * p.source_channels + first) * PER_SLOT;
  Vec before = zero();
  for_columns(rows, count * PER_SLOT, [&](int64_t c, Vec column) {
    const Vec lanes = rounded_from<W, T>(column);
    if (!PAIRS || c % 2 == 1) store(out + c / PER_SLOT * step, pair_slots(PAIRS ? before : lanes, lanes));
    before = lanes;
  });
}

// Two vectors' weights, as [source channel][vector][LANES]; tiles that are not whole end in zeros.
template <typename T, typename W>
void pack_direct(const Pass& p, float* packed, int64_t ith, int64_t nth) {
  const Share share(p.vectors(), ith, nth);
  for (int64_t v = share.begin; v < share.end; ++v) {
    const int64_t step = p.pair_vectors(v) * LANES;
    float* out = packed + v / 2 * 2 * LANES * p.weight_rows() + v % 2 * LANES;
    pack_vector<T, W>(p, v, 0, p.source_channels, step, out);
    for (int64_t c = p.source_channels; c < p.weight_rows(); ++c) store(out + c * step, zero());
  }
}

// Four vectors' weights, or the last two's, as [cut][product][source channel][vector][LANES], a product
// having half of the cut's channels and half of the vectors.
template <typename T, typename W>
void pack_strassen(const Pass& p, float* packed, int64_t ith, int64_t nth) {
  static thread_local Scratch scratch;
  float* b1 = scratch.floats(2 * p.depth * LANES);
  float* b2 = b1 + p.depth * LANES;
  const Share share(p.vectors() / 2, ith, nth);
  for (int64_t i = share.begin; i < share.end; ++i) {
    const int64_t v = i / 2 * 4, together = p.pair_vectors(v), step = together * LANES;
    float* out = packed + v * LANES * p.weight_rows() + i % 2 * LANES;
    for (int64_t first = 0; first < p.source_channels; first += p.depth) {
      const int64_t half = std::min(p.depth, p.source_channels - first) / 2, next = half * step;
      pack_vector<T, W>(p, v + i % 2, first, 2 * half, LANES, b1);
      pack_vector<T, W>(p, v + i % 2 + together, first, 2 * half, LANES, b2);
      for (int64_t c = 0; c < half; ++c, out += step) {
        const Vec b11 = load(b1 + c * LANES), b21 = load(b1 + (half + c) * LANES);
        const Vec b12 = load(b2 + c * LANES), b22 = load(b2 + (half + c) * LANES);
        const Vec t1 = sub(b12, b11), t2 = sub(b22, t1);
        const Vec operands[PRODUCTS] = {b11, b21, b22, sub(b21, t2), t1, t2, sub(b22, b12)};
        GCONV_UNROLL
        for (int j = 0; j < PRODUCTS; ++j) store(out + j * next, operands[j]);
      }
      out += (PRODUCTS - 1) * next;
    }
  }
}

// A share of the weights.
inline void pack_weights(const Pass& p, float* packed, int64_t ith, int64_t nth) {
  with_dtype(p.dtype, [&](auto* type) {
    with_weight_dtype(p.dtype, p.float_weight, [&](auto* weight_type) {
      using T = std::remove_pointer_t<decltype(type)>;
      using W = std::remove_pointer_t<decltype(weight_type)>;
      if constexpr (std::is_same_v<W, T> || std::is_same_v<W, float>) {
        if constexpr (!PAIRS)
          if (p.strassen) return pack_strassen<T, W>(p, packed, ith, nth);
        pack_direct<T, W>(p, packed, ith, nth);
      }
    });
  });
}

}  // namespace pointwise
}  // namespace GCONV_ISA_NS
}  // namespace gconv
