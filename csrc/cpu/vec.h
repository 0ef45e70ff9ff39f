// Vector verbs, once per instruction set. A translation unit defines one of GCONV_ISA_AMX_BF16,
// GCONV_ISA_AVX512_BF16, GCONV_ISA_AVX512, GCONV_ISA_AVX2 or GCONV_ISA_PORTABLE before including this file
// and then writes its kernels in namespace gconv::GCONV_ISA_NS: the same source makes 16-, 8- and 4-lane
// kernels. The second is the third for bfloat16 alone, with instructions for it (conv_slots.h), and the first
// the second with tile registers (tile_registers.h). The pragma below raises the target for what follows
// only, so no standard-library function is compiled for it (the linker could keep that copy and run it on a
// CPU that lacks the instructions).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>

#include "tensor.h"

#if defined(GCONV_ISA_AMX_BF16)
#include <immintrin.h>
#define GCONV_ISA_AVX512_BF16
#define GCONV_ISA_AVX512
#define GCONV_ISA_NS amx_bf16
#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((                                                                                \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
#endif
#elif defined(GCONV_ISA_AVX512_BF16)
#include <immintrin.h>
#define GCONV_ISA_AVX512
#define GCONV_ISA_NS avx512_bf16
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif
#elif defined(GCONV_ISA_AVX512)
#include <immintrin.h>
#define GCONV_ISA_NS avx512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#elif defined(GCONV_ISA_AVX2)
#include <immintrin.h>
#define GCONV_ISA_NS avx2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#else
#define GCONV_ISA_NS portable
#endif

// Loops over accumulators must unroll completely, or the accumulators live in memory.
#define GCONV_UNROLL _Pragma("GCC unroll 64")
#define GCONV_INLINE inline __attribute__((always_inline))
#define GCONV_LAMBDA __attribute__((always_inline))

namespace gconv {
namespace GCONV_ISA_NS {

// Storage types. Arithmetic is float32; these only name how a value lies in memory.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// A bfloat16 is the upper half of a float32: to round to nearest even, add just under half a unit
// (half a unit when the last kept bit is odd). A NaN must stay a NaN.
GCONV_INLINE uint16_t bf16_bits(float value) {
  uint32_t u;
  std::memcpy(&u, &value, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

GCONV_INLINE float bf16_value(uint16_t bits) {
  const uint32_t u = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &u, 4);
  return value;
}

GCONV_INLINE float f16_value(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 31u, mantissa = bits & 0x3ffu;
  uint32_t u;
  if (exponent == 31) {
    u = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    u = sign | ((exponent + 112u) << 23) | (mantissa << 13);
  } else {  // zero or subnormal: mantissa * 2^-24, exact in float32
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    std::memcpy(&u, &magnitude, 4);
    u |= sign;
  }
  float value;
  std::memcpy(&value, &u, 4);
  return value;
}

GCONV_INLINE uint16_t f16_bits(float value) {
  uint32_t u;
  std::memcpy(&u, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return sign | 0x7e00u;
  if (u >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  if (u < 0x38800000u) {  // below 2^-14: adding 0.5 leaves round(value * 2^24) in the low bits
    float magnitude;
    std::memcpy(&magnitude, &u, 4);
    magnitude += 0.5f;
    uint32_t shifted;
    std::memcpy(&shifted, &magnitude, 4);
    return sign | static_cast<uint16_t>(shifted - 0x3f000000u);
  }
  u += 0xfffu + ((u >> 13) & 1u);
  return sign | static_cast<uint16_t>((u - 0x38000000u) >> 13);
}

#if defined(GCONV_ISA_AVX512)

constexpr int LANES = 16;
// Output pixels a tile holds in registers: with one and with two vectors of channels per pixel.
constexpr int TILE_SINGLE = 14, TILE_PAIR = 8;
// Pixels whose sums a pointwise tile holds, two vectors of channels each.
#if defined(GCONV_ISA_AMX_BF16)
constexpr int POINT_PIXELS = 32;
#else
constexpr int POINT_PIXELS = 14;
#endif
// Narrow groups go in strips. Output columns of one, three rows of which are held in registers, or two where
// one of the grids is twice as fine.
constexpr bool STRIPS = true;
constexpr int STRIP_PIXELS = 6, STRIP_PIXELS_HALVE = 8, STRIP_PIXELS_TWICE = 10;
// Channels of dy whose nine weight-gradient accumulators a strip holds at once.
constexpr int OUTER_CHANNELS = 2;
// Input channels whose weight-gradient accumulators are held in registers at once.
constexpr int WGRAD_CHANNELS = 8;

struct Vec {
  __m512 v;
};
using Index = __m512i;

using Mask = __mmask16;
GCONV_INLINE __mmask16 lanes_mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

GCONV_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
GCONV_INLINE Vec set1(float s) { return {_mm512_set1_ps(s)}; }
GCONV_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
GCONV_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
GCONV_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
GCONV_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
GCONV_INLINE Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
GCONV_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
// maxps returns its second operand when one is NaN, so relu(NaN) is NaN.
GCONV_INLINE Vec relu(Vec a) { return {_mm512_max_ps(_mm512_setzero_ps(), a.v)}; }
// g where not (z <= 0), else 0: the gradient of ReLU, NaN passing through as in torch.
GCONV_INLINE Vec relu_mask(Vec g, Vec z) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z.v, _mm512_setzero_ps(), _CMP_NLE_UQ), g.v)};
}
GCONV_INLINE Vec choose(Mask first, Vec a, Vec b) { return {_mm512_mask_blend_ps(first, b.v, a.v)}; }
GCONV_INLINE Index index_load(const int32_t* p) { return _mm512_loadu_si512(p); }
GCONV_INLINE Index index_add(Index i, int32_t n) { return _mm512_add_epi32(i, _mm512_set1_epi32(n)); }
// lane l of the result is lane index[l] (modulo LANES) of a.
GCONV_INLINE Vec permute(Vec a, Index i) { return {_mm512_permutexvar_ps(i, a.v)}; }
GCONV_INLINE Vec gather(const float* p, Index i) { return {_mm512_i32gather_ps(i, p, 4)}; }
// Lane l of vector i becomes lane i of vector l: in 4x4 squares within the quarters, then of the quarters.
GCONV_INLINE void transpose(Vec (&v)[LANES]) {
  __m512d half[LANES];
  GCONV_UNROLL
  for (int b = 0; b < LANES; b += 4) {
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(v[b].v, v[b + 1].v));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(v[b].v, v[b + 1].v));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(v[b + 2].v, v[b + 3].v));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(v[b + 2].v, v[b + 3].v));
    half[b] = _mm512_unpacklo_pd(low01, low23), half[b + 1] = _mm512_unpackhi_pd(low01, low23);
    half[b + 2] = _mm512_unpacklo_pd(high01, high23), half[b + 3] = _mm512_unpackhi_pd(high01, high23);
  }
  GCONV_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_castpd_ps(half[i]), b = _mm512_castpd_ps(half[i + 4]);
    const __m512 c = _mm512_castpd_ps(half[i + 8]), d = _mm512_castpd_ps(half[i + 12]);
    const __m512 ab01 = _mm512_shuffle_f32x4(a, b, 0x44), cd01 = _mm512_shuffle_f32x4(c, d, 0x44);
    const __m512 ab23 = _mm512_shuffle_f32x4(a, b, 0xee), cd23 = _mm512_shuffle_f32x4(c, d, 0xee);
    v[i].v = _mm512_shuffle_f32x4(ab01, cd01, 0x88), v[i + 4].v = _mm512_shuffle_f32x4(ab01, cd01, 0xdd);
    v[i + 8].v = _mm512_shuffle_f32x4(ab23, cd23, 0x88), v[i + 12].v = _mm512_shuffle_f32x4(ab23, cd23, 0xdd);
  }
}

// Each even (odd) element twice. From memory these cost a load and no shuffle, which would compete with
// the multiplications for a port; a compiler that sees both of one address shares the load and shuffles.
GCONV_INLINE Vec even_twice(Vec a) { return {_mm512_moveldup_ps(a.v)}; }
GCONV_INLINE Vec odd_twice(Vec a) { return {_mm512_movehdup_ps(a.v)}; }
GCONV_INLINE Vec load_even_twice(const float* p) {
  Vec a;
  asm("vmovsldup %1, %0" : "=v"(a.v) : "m"(*reinterpret_cast<const float (*)[16]>(p)));
  return a;
}
GCONV_INLINE Vec load_odd_twice(const float* p) {
  Vec a;
  asm("vmovshdup %1, %0" : "=v"(a.v) : "m"(*reinterpret_cast<const float (*)[16]>(p)));
  return a;
}

GCONV_INLINE Vec load_as(const float* p) { return load(p); }
GCONV_INLINE Vec load_as(const bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
GCONV_INLINE Vec load_as(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
GCONV_INLINE Vec load_as(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes_mask(n), p)}; }
GCONV_INLINE Vec load_as(const bf16* p, int n) {
  const __m256i bits = _mm256_maskz_loadu_epi16(lanes_mask(n), p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
GCONV_INLINE Vec load_as(const f16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_mask(n), p))};
}

#if defined(GCONV_ISA_AVX512_BF16)
// Values below 2^-126 become 0.
GCONV_INLINE __m256i to_bf16(Vec a) { return (__m256i)_mm512_cvtneps_pbh(a.v); }
#else
GCONV_INLINE __m256i to_bf16(Vec a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i upper = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(upper);
}
#endif
GCONV_INLINE __m256i to_f16(Vec a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

GCONV_INLINE void store_as(float* p, Vec a) { store(p, a); }
GCONV_INLINE void store_as(bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }
GCONV_INLINE void store_as(f16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16(a)); }
GCONV_INLINE void store_as(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, lanes_mask(n), a.v); }
GCONV_INLINE void store_as(bf16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, lanes_mask(n), to_bf16(a)); }
GCONV_INLINE void store_as(f16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, lanes_mask(n), to_f16(a)); }

// Past the caches: for results too large to stay there, it saves reading each line before writing it. The
// address must be a multiple of the vector's size; stream_end() before another thread reads.
GCONV_INLINE void stream_as(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
GCONV_INLINE void stream_as(bf16* p, Vec a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16(a));
}
GCONV_INLINE void stream_as(f16* p, Vec a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_f16(a)); }
GCONV_INLINE void stream_end() { _mm_sfence(); }

// The value as it reads back from storage.
GCONV_INLINE Vec rounded_to(const float*, Vec a) { return a; }
GCONV_INLINE Vec rounded_to(const bf16*, Vec a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(a)), 16))};
}
GCONV_INLINE Vec rounded_to(const f16*, Vec a) { return {_mm512_cvtph_ps(to_f16(a))}; }

#elif defined(GCONV_ISA_AVX2)

constexpr int LANES = 8;
constexpr int TILE_SINGLE = 10, TILE_PAIR = 4;
constexpr int POINT_PIXELS = 6;
constexpr bool STRIPS = false;  // too few registers
constexpr int STRIP_PIXELS = 2, STRIP_PIXELS_HALVE = 2, STRIP_PIXELS_TWICE = 2, OUTER_CHANNELS = 1;
constexpr int WGRAD_CHANNELS = 4;

struct Vec {
  __m256 v;
};
using Index = __m256i;

using Mask = __m256i;
GCONV_INLINE __m256i lanes_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

GCONV_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
GCONV_INLINE Vec set1(float s) { return {_mm256_set1_ps(s)}; }
GCONV_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
GCONV_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
GCONV_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
GCONV_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
GCONV_INLINE Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
GCONV_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
GCONV_INLINE Vec relu(Vec a) { return {_mm256_max_ps(_mm256_setzero_ps(), a.v)}; }
GCONV_INLINE Vec relu_mask(Vec g, Vec z) {
  return {_mm256_and_ps(_mm256_cmp_ps(z.v, _mm256_setzero_ps(), _CMP_NLE_UQ), g.v)};
}
GCONV_INLINE Vec choose(Mask first, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(first))};
}
GCONV_INLINE Index index_load(const int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
GCONV_INLINE Index index_add(Index i, int32_t n) { return _mm256_add_epi32(i, _mm256_set1_epi32(n)); }
GCONV_INLINE Vec permute(Vec a, Index i) { return {_mm256_permutevar8x32_ps(a.v, i)}; }
GCONV_INLINE Vec gather(const float* p, Index i) { return {_mm256_i32gather_ps(p, i, 4)}; }
GCONV_INLINE void transpose(Vec (&v)[LANES]) {
  __m256 half[LANES];
  GCONV_UNROLL
  for (int b = 0; b < LANES; b += 4) {
    const __m256 low01 = _mm256_unpacklo_ps(v[b].v, v[b + 1].v);
    const __m256 high01 = _mm256_unpackhi_ps(v[b].v, v[b + 1].v);
    const __m256 low23 = _mm256_unpacklo_ps(v[b + 2].v, v[b + 3].v);
    const __m256 high23 = _mm256_unpackhi_ps(v[b + 2].v, v[b + 3].v);
    half[b] = _mm256_shuffle_ps(low01, low23, 0x44), half[b + 1] = _mm256_shuffle_ps(low01, low23, 0xee);
    half[b + 2] = _mm256_shuffle_ps(high01, high23, 0x44);
    half[b + 3] = _mm256_shuffle_ps(high01, high23, 0xee);
  }
  GCONV_UNROLL
  for (int i = 0; i < 4; ++i) {
    v[i].v = _mm256_permute2f128_ps(half[i], half[i + 4], 0x20);
    v[i + 4].v = _mm256_permute2f128_ps(half[i], half[i + 4], 0x31);
  }
}

GCONV_INLINE Vec even_twice(Vec a) { return {_mm256_moveldup_ps(a.v)}; }
GCONV_INLINE Vec odd_twice(Vec a) { return {_mm256_movehdup_ps(a.v)}; }
GCONV_INLINE Vec load_even_twice(const float* p) {
  Vec a;
  asm("vmovsldup %1, %0" : "=x"(a.v) : "m"(*reinterpret_cast<const float (*)[8]>(p)));
  return a;
}
GCONV_INLINE Vec load_odd_twice(const float* p) {
  Vec a;
  asm("vmovshdup %1, %0" : "=x"(a.v) : "m"(*reinterpret_cast<const float (*)[8]>(p)));
  return a;
}

GCONV_INLINE Vec from_bf16(__m128i bits) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
GCONV_INLINE __m128i to_bf16(Vec a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i upper = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}
GCONV_INLINE __m128i to_f16(Vec a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

// AVX2 masks no 16-bit loads: a partial vector of those goes through a small buffer.
GCONV_INLINE __m128i load16(const void* p, int n) {
  uint16_t part[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  std::memcpy(part, p, 2 * static_cast<size_t>(n));
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(part));
}
GCONV_INLINE void store16(void* p, __m128i bits, int n) {
  uint16_t part[8];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(part), bits);
  std::memcpy(p, part, 2 * static_cast<size_t>(n));
}

GCONV_INLINE Vec load_as(const float* p) { return load(p); }
GCONV_INLINE Vec load_as(const bf16* p) {
  return from_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
GCONV_INLINE Vec load_as(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
GCONV_INLINE Vec load_as(const float* p, int n) { return {_mm256_maskload_ps(p, lanes_mask(n))}; }
GCONV_INLINE Vec load_as(const bf16* p, int n) { return from_bf16(load16(p, n)); }
GCONV_INLINE Vec load_as(const f16* p, int n) { return {_mm256_cvtph_ps(load16(p, n))}; }

GCONV_INLINE void store_as(float* p, Vec a) { store(p, a); }
GCONV_INLINE void store_as(bf16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(a)); }
GCONV_INLINE void store_as(f16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_f16(a)); }
GCONV_INLINE void store_as(float* p, Vec a, int n) { _mm256_maskstore_ps(p, lanes_mask(n), a.v); }
GCONV_INLINE void store_as(bf16* p, Vec a, int n) { store16(p, to_bf16(a), n); }
GCONV_INLINE void store_as(f16* p, Vec a, int n) { store16(p, to_f16(a), n); }

GCONV_INLINE void stream_as(float* p, Vec a) { _mm256_stream_ps(p, a.v); }
GCONV_INLINE void stream_as(bf16* p, Vec a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bf16(a)); }
GCONV_INLINE void stream_as(f16* p, Vec a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_f16(a)); }
GCONV_INLINE void stream_end() { _mm_sfence(); }

GCONV_INLINE Vec rounded_to(const float*, Vec a) { return a; }
GCONV_INLINE Vec rounded_to(const bf16*, Vec a) { return from_bf16(to_bf16(a)); }
GCONV_INLINE Vec rounded_to(const f16*, Vec a) { return {_mm256_cvtph_ps(to_f16(a))}; }

#else  // portable: 4 lanes in the compiler's own vectors (SSE2, NEON or plain scalars)

constexpr int LANES = 4;
constexpr int TILE_SINGLE = 8, TILE_PAIR = 4;
constexpr int POINT_PIXELS = 5;
constexpr bool STRIPS = false;  // too few registers
constexpr int STRIP_PIXELS = 2, STRIP_PIXELS_HALVE = 2, STRIP_PIXELS_TWICE = 2, OUTER_CHANNELS = 1;
constexpr int WGRAD_CHANNELS = 4;

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

struct Vec {
  Float4 v;
};
using Index = Int4;

using Mask = Int4;
GCONV_INLINE Mask lanes_mask(int n) { return Int4{0, 1, 2, 3} < Int4{n, n, n, n}; }
GCONV_INLINE Vec choose(Mask first, Vec a, Vec b) { return {first ? a.v : b.v}; }
GCONV_INLINE Vec zero() { return {Float4{0, 0, 0, 0}}; }
GCONV_INLINE Vec set1(float s) { return {Float4{s, s, s, s}}; }
GCONV_INLINE Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.v, p, 16);
  return a;
}
GCONV_INLINE void store(float* p, Vec a) { std::memcpy(p, &a.v, 16); }
GCONV_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
GCONV_INLINE Vec add(Vec a, Vec b) { return {a.v + b.v}; }
GCONV_INLINE Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
GCONV_INLINE Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
GCONV_INLINE Vec keep_unless(Int4 drop, Vec a) {
  Int4 bits;
  std::memcpy(&bits, &a.v, 16);
  bits &= ~drop;
  Vec kept;
  std::memcpy(&kept.v, &bits, 16);
  return kept;
}
GCONV_INLINE Vec relu_mask(Vec g, Vec z) { return keep_unless(z.v <= zero().v, g); }
GCONV_INLINE Vec relu(Vec a) { return relu_mask(a, a); }
GCONV_INLINE Index index_load(const int32_t* p) {
  Int4 i;
  std::memcpy(&i, p, 16);
  return i;
}
GCONV_INLINE Index index_add(Index i, int32_t n) { return i + Int4{n, n, n, n}; }
GCONV_INLINE Vec gather(const float* p, Index i) { return {Float4{p[i[0]], p[i[1]], p[i[2]], p[i[3]]}}; }
GCONV_INLINE Vec permute(Vec a, Index i) {
  return {Float4{a.v[i[0] & 3], a.v[i[1] & 3], a.v[i[2] & 3], a.v[i[3] & 3]}};
}
GCONV_INLINE void transpose(Vec (&v)[LANES]) {
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < i; ++j) {
      const float upper = v[j].v[i];
      v[j].v[i] = v[i].v[j];
      v[i].v[j] = upper;
    }
}
GCONV_INLINE Vec even_twice(Vec a) { return {Float4{a.v[0], a.v[0], a.v[2], a.v[2]}}; }
GCONV_INLINE Vec odd_twice(Vec a) { return {Float4{a.v[1], a.v[1], a.v[3], a.v[3]}}; }
GCONV_INLINE Vec load_even_twice(const float* p) { return even_twice(load(p)); }
GCONV_INLINE Vec load_odd_twice(const float* p) { return odd_twice(load(p)); }

GCONV_INLINE float value_of(float x) { return x; }
GCONV_INLINE float value_of(bf16 x) { return bf16_value(x.bits); }
GCONV_INLINE float value_of(f16 x) { return f16_value(x.bits); }
GCONV_INLINE void assign(float* p, float x) { *p = x; }
GCONV_INLINE void assign(bf16* p, float x) { p->bits = bf16_bits(x); }
GCONV_INLINE void assign(f16* p, float x) { p->bits = f16_bits(x); }

template <typename T>
GCONV_INLINE Vec load_as(const T* p) {
  return {Float4{value_of(p[0]), value_of(p[1]), value_of(p[2]), value_of(p[3])}};
}
GCONV_INLINE Vec load_as(const float* p) { return load(p); }
template <typename T>
GCONV_INLINE Vec load_as(const T* p, int n) {
  Float4 a = {0, 0, 0, 0};
  for (int i = 0; i < n; ++i) a[i] = value_of(p[i]);
  return {a};
}
template <typename T>
GCONV_INLINE void store_as(T* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) assign(p + i, a.v[i]);
}
template <typename T>
GCONV_INLINE void store_as(T* p, Vec a) {
  store_as(p, a, LANES);
}
GCONV_INLINE void store_as(float* p, Vec a) { store(p, a); }
template <typename T>
GCONV_INLINE void stream_as(T* p, Vec a) {
  store_as(p, a);
}
GCONV_INLINE void stream_end() {}
GCONV_INLINE Vec rounded_to(const float*, Vec a) { return a; }
template <typename T>
GCONV_INLINE Vec rounded_to(const T*, Vec a) {
  T stored[LANES];
  store_as(stored, a);
  return load_as(stored);
}

#endif

// The full form where every lane counts, the masked one on a tail.
template <typename T>
GCONV_INLINE Vec load_lanes(const T* p, int n) {
  return n == LANES ? load_as(p) : load_as(p, n);
}
template <typename T>
GCONV_INLINE void store_lanes(T* p, Vec a, int n) {
  if (n == LANES)
    store_as(p, a);
  else
    store_as(p, a, n);
}

// Element i of each of LANES rows.
template <typename T>
GCONV_INLINE Vec load_column(const T* const* rows, int64_t i) {
  alignas(64) T lanes[LANES];
  for (int l = 0; l < LANES; ++l) lanes[l] = rows[l][i];
  return load_as(lanes);
}

// The first `columns` of these, at most LANES. To transpose a square pays off from half of its columns on.
template <typename T>
GCONV_INLINE void load_columns(const T* const* rows, int columns, Vec (&v)[LANES]) {
#if defined(GCONV_ISA_AVX512) || defined(GCONV_ISA_AVX2)
  if (columns > LANES / 2) {
    for (int l = 0; l < LANES; ++l) v[l] = load_lanes(rows[l], columns);
    return transpose(v);
  }
#endif
  for (int i = 0; i < columns; ++i) v[i] = load_column(rows, i);
}

// Calls f(i, element i of each of LANES rows) for every i below `count`.
template <typename T, typename F>
GCONV_INLINE void for_columns(const T* const* rows, int64_t count, F&& f) {
  const auto block = [&](int64_t first, int columns) GCONV_LAMBDA {
    const T* at[LANES];
    for (int l = 0; l < LANES; ++l) at[l] = rows[l] + first;
    Vec v[LANES];
    load_columns(at, columns, v);
    for (int i = 0; i < columns; ++i) f(first + i, v[i]);
  };
  int64_t first = 0;
  for (; first + LANES <= count; first += LANES) block(first, LANES);
  if (first < count) block(first, static_cast<int>(count - first));
}

// Whether an output of `pixels` x `channels` should be streamed: it is larger than the caches that a reader
// right after it would find it in, and every vector of it is aligned. A slice of a wider buffer goes by the
// same rule: its reader reads the rest as well, and takes as long either way.
template <typename T>
inline bool streams(const Nhwc& out, int64_t pixels, int64_t channels) {
  constexpr int64_t LARGE = 4 << 20, VECTOR = LANES * static_cast<int64_t>(sizeof(T));
  const int64_t strides = out.stride_n | out.stride_h | out.stride_w;
  return pixels * channels * static_cast<int64_t>(sizeof(T)) > LARGE &&
         reinterpret_cast<uintptr_t>(out.data) % VECTOR == 0 && strides % LANES == 0;
}

// (mean, M2) of `count` values and those of n others to those of all: Chan, Golub & LeVeque's (1979) update.
GCONV_INLINE void chan_update(float count, Vec& mean, Vec& m2, float n, Vec other_mean, Vec other_m2) {
  const float share = n / (count + n);
  const Vec delta = sub(other_mean, mean);
  mean = fma(delta, set1(share), mean);
  m2 = add(m2, fma(mul(delta, delta), set1(count * share), other_m2));
}

// A float32 sum of each lane that carries what rounding drops (Kahan 1965).
struct CompensatedSum {
  Vec total, lost;
  GCONV_INLINE void reset() { total = lost = zero(); }
  GCONV_INLINE void add(Vec term) {
    const Vec y = sub(term, lost);
    const Vec next = GCONV_ISA_NS::add(total, y);
    lost = sub(sub(next, total), y);
    total = next;
  }
};

// Scratch of one thread, kept between calls: fresh pages cost more than small kernels do.
class Scratch {
 public:
  float* floats(int64_t n) {
    if (n > size_) {
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
      const size_t bytes = (static_cast<size_t>(n) * sizeof(float) + 63) / 64 * 64;
      if (posix_memalign(reinterpret_cast<void**>(&data_), 64, bytes) != 0) throw std::bad_alloc();
      size_ = n;
    }
    return data_;
  }
  ~Scratch() { std::free(data_); }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

// Cuts one scratch into pieces that begin on cache lines.
class Carve {
 public:
  explicit Carve(Scratch& scratch) : scratch_(scratch) {}
  void reserve(std::initializer_list<int64_t> pieces) {
    int64_t floats = 0;
    for (int64_t piece : pieces) floats += rounded(piece);
    next_ = scratch_.floats(floats);
  }
  float* take(int64_t floats) {
    float* piece = next_;
    next_ += rounded(floats);
    return piece;
  }

 private:
  static int64_t rounded(int64_t floats) { return (floats + 15) / 16 * 16; }
  Scratch& scratch_;
  float* next_ = nullptr;
};

// The share [begin, end) of `ith` of `nth` among `total` equal pieces.
struct Share {
  int64_t begin, end;
  Share(int64_t total, int64_t ith, int64_t nth) : begin(total * ith / nth), end(total * (ith + 1) / nth) {}
  // A share of this one.
  Share part(int64_t ith, int64_t nth) const {
    Share share(end - begin, ith, nth);
    share.begin += begin, share.end += begin;
    return share;
  }
};

// The fewest even pieces of `total` that are at most `most` long: the first `longer` of them have least + 1.
struct EvenCut {
  int64_t count = 0, least = 0, longer = 0;
  EvenCut() = default;
  EvenCut(int64_t total, int64_t most)
      : count(std::max<int64_t>(1, (total + most - 1) / most)), least(total / count), longer(total % count) {}
};

// The longest of them.
inline int64_t even_piece(int64_t total, int64_t most) {
  const EvenCut cut(total, most);
  return cut.least + (cut.longer > 0);
}

// Calls f with a null pointer of the storage type, so that f is compiled once per type.
template <typename F>
GCONV_INLINE void with_dtype(DType dtype, F&& f) {
#if defined(GCONV_ISA_AVX512_BF16)
  (void)dtype;
  f(static_cast<bf16*>(nullptr));
#else
  if (dtype == DType::f32)
    f(static_cast<float*>(nullptr));
  else if (dtype == DType::bf16)
    f(static_cast<bf16*>(nullptr));
  else
    f(static_cast<f16*>(nullptr));
#endif
}

// The same for weights, which may be float32 beside activations of another type.
template <typename F>
GCONV_INLINE void with_weight_dtype(DType dtype, bool float_weight, F&& f) {
  float_weight ? f(static_cast<float*>(nullptr)) : with_dtype(dtype, f);
}

// What was loaded as W, as a T stores it.
template <typename W, typename T>
GCONV_INLINE Vec rounded_from(Vec a) {
  return std::is_same_v<W, T> ? a : rounded_to(static_cast<const T*>(nullptr), a);
}

}  // namespace GCONV_ISA_NS
}  // namespace gconv
