// The weights of grouped_conv as its tiles read them.
#pragma once
#include "grouped_conv_plan.h"

namespace gconv {
namespace GCONV_ISA_NS {

// Vector v of [K, C/groups, 3, 3] to [source channel][3][3][LANES]; for the input gradient the roles of the
// channels are exchanged and the taps mirrored. Lanes past the tail repeat the last: what they compute is
// never stored. T is what the activations are of, W what the weights are.
template <typename T, typename W>
void pack_vector(const Pass& p, int64_t v, float* out) {
  const W* weight = static_cast<const W*>(p.raw_weight);
  const auto put = [](float* to, Vec lanes) { store(to, rounded_from<W, T>(lanes)); };
  const WeightLayout layout = p.layout;
  const int64_t per_group = p.output_per_group, channels = p.source_per_group * PER_SLOT;
  const int64_t kernel = 9 * (p.transposed ? per_group : channels);
  const int64_t last = p.output_channels() - 1;
  const W* rows[LANES];
  for (int64_t l = 0; l < LANES; ++l) {
    const int64_t channel = std::min(v * LANES + l, last);
    const int64_t group = channel / per_group, within = channel % per_group;
    rows[l] = p.transposed ? weight + group * channels * kernel + within * layout.stride_c
                           : weight + channel * kernel;
  }
  if (!p.transposed) {
    const bool by_tap = layout.stride_tap == 1;
    const int64_t inner = by_tap ? 1 : channels;
    int64_t c = 0, t = 0;
    for_columns(rows, kernel, [&](int64_t i, Vec lanes) {
      put(out + (by_tap ? i : c * 9 + t) * LANES, lanes);
      if (++c == inner) c = 0, ++t;
    });
  } else if (layout.stride_tap == 1) {
    for (int64_t c = 0; c < channels; ++c, out += 9 * LANES) {
      for_columns(rows, 9, [&](int64_t i, Vec lanes) { put(out + (8 - i) * LANES, lanes); });
      for (const W*& row : rows) row += kernel;
    }
  } else {
    const bool adjacent = v * LANES % per_group + LANES <= per_group;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t t = 0; t < 9; ++t, out += LANES) {
        const int64_t at = c * kernel + (8 - t) * layout.stride_tap;
        put(out, adjacent ? load_as(rows[0] + at) : load_column(rows, at));
      }
  }
}

// One vector's weights [channel][3][3][LANES] to slots.
inline void pair_channels(const float* taps, int64_t slots, float* packed) {
  for (int64_t i = 0; i < slots; ++i, taps += PER_SLOT * WEIGHTS_PER_CHANNEL)
    for (int64_t t = 0; t < WEIGHTS_PER_CHANNEL; t += LANES, packed += LANES)
      store(packed, pair_slots(load(taps + t), load(taps + WEIGHTS_PER_CHANNEL + t)));
}

// The vectors [first, end), side by side.
inline void pack_vectors(const Pass& p, int64_t first, int64_t end, float* packed) {
  static thread_local Scratch scratch;
  with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t v = first; v < end; ++v, packed += p.weight_floats()) {
      const int64_t channels = p.source_per_group * PER_SLOT;
      float* taps = p.winograd || PAIRS ? scratch.floats(channels * WEIGHTS_PER_CHANNEL) : packed;
      p.float_weight ? pack_vector<T, float>(p, v, taps) : pack_vector<T, T>(p, v, taps);
      if (PAIRS) {
        pair_channels(taps, p.source_per_group, packed);
        std::fill(packed + p.source_per_group * WEIGHTS_PER_CHANNEL, packed + p.weight_floats(), 0.0f);
      } else if (p.winograd) {
        transform_weights(taps, channels, packed);
      }
    }
  });
}

}  // namespace GCONV_ISA_NS
}  // namespace gconv
