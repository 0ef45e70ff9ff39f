// Packing the weights of a convolution into the fragments that its warps read.
#pragma once
#include "grouped_conv_params.h"
#include "grouped_conv_product.h"

namespace gconv::cuda {

constexpr int PACK_THREADS = 256;

// computes: packed [pass][strip][step][octet][kh][fragment] of weight [K, C/groups, 3, 3], 0 between groups
// grid:     blocks of PACK_THREADS weights
// tile:     one weight per thread
// bytes:    weight once (or twice: to the groups of a span), packed once
// accum.:   none
template <typename T>
GCONV_KERNEL(PACK_THREADS, 4)
void pack_weight_kernel(const PackParams p) {
  using P = Product<T>;
  const ConvCut& cut = p.cut;
  const int64_t at = int64_t(blockIdx.x) * PACK_THREADS + threadIdx.x;
  if (at >= p.total) return;
  int pass = 0;
  while (pass + 1 < p.passes && at >= p.pass[pass + 1].packed) ++pass;
  const ConvPass& taps = p.pass[pass];

  int64_t rest = at - taps.packed;
  const auto fragment = P::weight(int(rest % P::WEIGHTS));
  rest /= P::WEIGHTS;
  const int kh = int(rest % p.rows);
  rest /= p.rows;
  const int octet = int(rest % cut.share);
  rest /= cut.share;
  const int half_step = int(rest % taps.steps) * P::HALF_STEPS + fragment.half;
  const Strip strip = strip_of<P::OUT, UNIT<T>>(cut, int(rest / taps.steps));

  const int out = strip.first + octet * P::OUT + fragment.out;
  const int in = (strip.unit + half_step / taps.taps) * UNIT<T> + fragment.in;
  float value = 0.0f;
  if (half_step < cut.units * taps.taps && out < strip.end && in < cut.in &&
      in / cut.group_in == out / cut.group_out) {
    const int tap = taps.weight[half_step % taps.taps][kh];
    // The outer index of the weight counts the channels of all groups, the inner one those of a group.
    const int64_t outer = p.transposed ? in : out;
    const int64_t inner = p.transposed ? out % cut.group_out : in % cut.group_in;
    value = to_float(static_cast<const T*>(
        p.weight)[outer * p.stride_outer + inner * p.stride_inner + tap * p.stride_tap]);
  }
  if constexpr (sizeof(T) == 4 && P::HALF_STEPS == 2) value = float_of(tf32_bits(value));
  static_cast<T*>(p.packed)[at] = from_float<T>(value);
}

}  // namespace gconv::cuda
