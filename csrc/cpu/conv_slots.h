// Slots: what the multiplications of a convolution read.
//
// Rows and weights are brought to vectors of 32-bit slots before they are multiplied. A slot is one float32
// or, where the instruction set multiplies pairs (PAIRS), two bfloat16 that one instruction multiplies with
// those of another slot and adds to a float32: half the instructions, half the bytes. The two are
// neighbouring channels in the forward and the input gradient, where products are summed over channels, and
// one channel at two pixels in the weight gradient, where they are summed over pixels. To broadcast, to
// shuffle and to move slots is the same for both.
#pragma once
#include <array>
#include <type_traits>

#include "conv_source.h"

namespace gconv {
namespace GCONV_ISA_NS {

#if defined(GCONV_ISA_AVX512_BF16)
constexpr bool PAIRS = true;

// a*b + c. The products are exact; each lane's are added one after the other; values below 2^-126 count as 0.
GCONV_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
  return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
}
// 2 * LANES values one after the other, two to a slot.
GCONV_INLINE Vec pack_slots(Vec low, Vec high) { return {(__m512)_mm512_cvtne2ps_pbh(high.v, low.v)}; }
// Lane l: (first[l], second[l]).
GCONV_INLINE Vec pair_slots(Vec first, Vec second) {
  const __m512i low = _mm512_cvtepu16_epi32(to_bf16(first)), high = _mm512_cvtepu16_epi32(to_bf16(second));
  return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
}
// Of two vectors of 2 * LANES values the lower (first[i], second[i]), and the upper.
GCONV_INLINE void interleave(Vec first, Vec second, Vec& lower, Vec& upper) {
  alignas(64) static constexpr std::array<int16_t, 64> PLACES = [] {
    std::array<int16_t, 64> places{};
    for (int i = 0; i < 32; ++i)
      places[2 * i] = static_cast<int16_t>(i), places[2 * i + 1] = static_cast<int16_t>(32 + i);
    return places;
  }();
  const auto pick = [&](const int16_t* places) GCONV_LAMBDA {
    const __m512i at = _mm512_load_si512(places);
    return Vec{_mm512_castsi512_ps(
        _mm512_permutex2var_epi16(_mm512_castps_si512(first.v), at, _mm512_castps_si512(second.v)))};
  };
  lower = pick(PLACES.data());
  upper = pick(PLACES.data() + 32);
}
GCONV_INLINE void stream_slots(bf16* out, Vec slots) {
  _mm512_stream_ps(reinterpret_cast<float*>(out), slots.v);
}
GCONV_INLINE void copy_as(bf16* out, const bf16* x, int n) {
  const __m256i bits = _mm256_maskz_loadu_epi16(lanes_mask(n), x);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bits);
}
// The first half of a vector; the second is undefined.
GCONV_INLINE Vec load_half(const float* p) { return {_mm512_castps256_ps512(_mm256_loadu_ps(p))}; }
#else
constexpr bool PAIRS = false;

GCONV_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
GCONV_INLINE Vec pack_slots(Vec low, Vec) { return low; }
GCONV_INLINE Vec pair_slots(Vec first, Vec) { return first; }
GCONV_INLINE void interleave(Vec first, Vec second, Vec& lower, Vec& upper) { lower = first, upper = second; }
GCONV_INLINE void stream_slots(float* out, Vec slots) { stream_as(out, slots); }
GCONV_INLINE Vec load_half(const float* p) { return load(p); }
#endif

// Whether pairs are multiplied a tile at a time (tile_registers.h).
#if defined(GCONV_ISA_AMX_BF16)
constexpr bool TILES = true;
#else
constexpr bool TILES = false;
#endif

constexpr int PER_SLOT = PAIRS ? 2 : 1;
// Slots of LANES channels where a slot is PER_SLOT of them.
constexpr int SOURCE_LANES = LANES / PER_SLOT;
// What LANES values are in slots.
using Value = std::conditional_t<PAIRS, bf16, float>;

// What tells apart the forms that packed weights have: those of two instruction sets may be one.
constexpr int64_t packing_of(DType dtype, bool transformed) {
  return LANES + 32 * TILES + 64 * PAIRS + 128 * transformed + 256 * static_cast<int64_t>(dtype);
}

// What the values of a slot are: of neighbouring channels, or of a channel at several pixels.
enum class Slots { channels, pixels };

// Where a row is read: of an image or, for slots of pixels, of this one and the next if there is one.
struct RowImages {
  int64_t first;
  bool both;
};
// The images of unit `unit`, PER_SLOT of n images.
inline RowImages images_of(int64_t unit, int64_t n) {
  return {unit * PER_SLOT, PAIRS && unit * PER_SLOT + 1 < n};
}
inline int64_t image_units(int64_t n) { return (n + PER_SLOT - 1) / PER_SLOT; }

// Reads a vector of slots, prologue applied: LANES slots from a channel on, of which `lanes` exist.
template <typename T, Prologue P, Slots S>
class SlotReader {
 public:
  static constexpr int CHANNELS = S == Slots::channels ? PER_SLOT : 1;  // of a slot

  GCONV_INLINE SlotReader(const RowSource& s, int64_t channel, int lanes, bool both)
      : lanes_(lanes),
        both_(both),
        low_(s, channel, low_lanes()),
        high_(s, CHANNELS == 2 ? channel + LANES : 0, CHANNELS == 2 ? high_lanes() : 0),
        x_image_(s.x.stride_n),
        y_image_(s.y.stride_n) {}

  GCONV_INLINE Vec read(const T* x, const T* y) const {
    if constexpr (!PAIRS) {
      return low_.apply(x, y, lanes_);
    } else if constexpr (S == Slots::pixels) {
      const Vec first = low_.apply(x, y, lanes_);
      return pair_slots(first, both_ ? low_.apply(x + x_image_, next(y, y_image_), lanes_) : zero());
    } else if constexpr (P == Prologue::none) {
      return load_lanes(reinterpret_cast<const float*>(x), lanes_);
    } else {
      const Vec high = high_.apply(x + LANES, next(y, LANES), high_lanes());
      return pack_slots(low_.apply(x, y, low_lanes()), high);
    }
  }

 private:
  GCONV_INLINE int low_lanes() const { return std::min(LANES, lanes_ * CHANNELS); }
  GCONV_INLINE int high_lanes() const { return lanes_ * CHANNELS - low_lanes(); }
  static GCONV_INLINE const T* next(const T* y, int64_t distance) {
    return P == Prologue::finish ? y + distance : nullptr;
  }
  int lanes_;
  bool both_;
  Coefficients<P> low_, high_;
  int64_t x_image_, y_image_;
};

// Copies LANES channels, of which `lanes` exist, to slots of their own: SOURCE_LANES or, of pixels, LANES.
template <typename T, Prologue P, Slots S>
class VectorReader {
 public:
  GCONV_INLINE VectorReader(const RowSource& s, int64_t channel, int lanes, bool both)
      : lanes_(lanes), values_(values(s, channel, lanes, both)) {}

  GCONV_INLINE void copy(const T* x, const T* y, float* out) const {
    if constexpr (!HALF)
      store(out, values_.read(x, y));
    else if constexpr (P == Prologue::none)
      copy_as(reinterpret_cast<Value*>(out), x, lanes_);
    else
      store_as(reinterpret_cast<Value*>(out), values_.apply(x, y, lanes_));
  }
  GCONV_INLINE void clear(float* out) const {
    if constexpr (HALF)
      store_as(reinterpret_cast<Value*>(out), zero());
    else
      store(out, zero());
  }

 private:
  static constexpr bool HALF = PAIRS && S == Slots::channels;
  using Values = std::conditional_t<HALF, Coefficients<P>, SlotReader<T, P, S>>;
  static GCONV_INLINE Values values(const RowSource& s, int64_t channel, int lanes, bool both) {
    if constexpr (HALF)
      return Values(s, channel, lanes);
    else
      return Values(s, channel, lanes, both);
  }
  int lanes_;
  Values values_;
};

}  // namespace GCONV_ISA_NS
}  // namespace gconv
