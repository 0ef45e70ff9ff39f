// What a convolution reads, and what is done to each element on its way.
#pragma once
#include <type_traits>

#include "vec.h"

namespace gconv {
namespace GCONV_ISA_NS {

constexpr int64_t MOST_VECTORS = 16;  // of a chunk: vectors of output channels that a task computes

// Tasks of a stage of so many multiplications, by shape alone, so that every thread count gives the same
// bits: `least` keep a few cores busy, and as many more come with every further least * each multiplications,
// for larger batches run on more cores.
inline int64_t tasks_for(int64_t multiplications, int64_t least, int64_t each) {
  constexpr int64_t MOST = 256;
  return least * std::min(EvenCut(multiplications, least * each).count, MOST / least);
}

enum class Prologue {
  none,
  act,     // relu(a*x + b), coef = [2, C]
  finish,  // A*(dy*[not a*y + b <= 0]) + B*(y - mean) + C, coef = [6, C]
};

// Calls f with the prologue as a constant.
template <typename F>
GCONV_INLINE void with_prologue(Prologue prologue, F&& f) {
  switch (prologue) {
    case Prologue::none:
      return f(std::integral_constant<Prologue, Prologue::none>());
    case Prologue::act:
      return f(std::integral_constant<Prologue, Prologue::act>());
    case Prologue::finish:
      return f(std::integral_constant<Prologue, Prologue::finish>());
  }
}

// What rows are read from, and what is done to each element on its way.
struct RowSource {
  Nhwc x;
  Nhwc y;  // finish only
  Prologue prologue;
  const float* coef;  // rows of `channels` floats
  int64_t channels;   // in all groups together
};

// Per-channel coefficients of one vector of channels. Lanes past the tail are all zero.
template <Prologue P>
struct Coefficients {
  Vec v[P == Prologue::finish ? 6 : P == Prologue::act ? 2 : 1];
  GCONV_INLINE Coefficients(const RowSource& s, int64_t channel, int lanes) {
    constexpr int ROWS = P == Prologue::finish ? 6 : P == Prologue::act ? 2 : 0;
    for (int i = 0; i < ROWS; ++i) v[i] = load_lanes(s.coef + i * s.channels + channel, lanes);
  }
  template <typename T>
  GCONV_INLINE Vec apply(const T* x, const T* y, int lanes) const {
    const Vec raw = load_lanes(x, lanes);
    if constexpr (P == Prologue::none) return raw;
    if constexpr (P == Prologue::act) return relu(fma(v[0], raw, v[1]));
    if constexpr (P == Prologue::finish) {
      const Vec out = load_lanes(y, lanes);
      const Vec g = relu_mask(raw, fma(v[4], out, v[5]));
      return fma(v[0], g, fma(v[1], sub(out, v[3]), v[2]));
    }
  }
};

template <typename T>
GCONV_INLINE const T* row_pointer(const Nhwc& t, int64_t image, int64_t row, int64_t channel) {
  return static_cast<const T*>(t.data) + image * t.stride_n + row * t.stride_h + channel;
}

}  // namespace GCONV_ISA_NS
}  // namespace gconv
