// The verbs of csrc/cuda/verbs.h on a CPU, so that the CUDA kernels run, and are tested, without a GPU.
//
// A block's threads are fibres. The 32 lanes of a warp run one after another, each up to its next warp verb
// or barrier; a warp runs until all its lanes are at a barrier or have ended, then the next warp does. In
// which order is for the caller to choose (settings()), so that a kernel that lacks a barrier reads, in one
// order or another, what has not been written or what has been overwritten. What must hold on a GPU is
// checked: all 32 lanes meet in one warp verb at one place of the source, all threads of a block in one
// barrier, addresses of 16 bytes are aligned, shared memory ends where the launch said (AddressSanitizer sees
// one byte too far; without it a canary shows what was written there). A violation ends the launch with an
// exception that says which kernel, block and warp, and where in the source.
//
// Shared memory holds NaN when a block starts, and so does the destination of an asynchronous copy until its
// thread waits for it: the copy is done no sooner. `mma` adds its products in float, in the order of K, and
// their sum to the accumulator.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>
#include <type_traits>
#include <vector>

#define GCONV_ISA_PORTABLE
#include "../../csrc/cpu/vec.h"
#include "../../csrc/cuda/verbs.h"

#define GCONV_KERNEL(threads, blocks)
#define GCONV_DEVICE inline
#undef GCONV_UNROLL
#define GCONV_UNROLL

struct HostIndex {
  unsigned x, y, z;
};
inline HostIndex threadIdx{0, 0, 0}, blockIdx{0, 0, 0}, blockDim{1, 1, 1}, gridDim{1, 1, 1};

namespace gconv::cuda {

using Stream = void*;

struct Device {
  int multiprocessors;
  int64_t shared_per_block, shared_per_multiprocessor;
};

// ---- what runs the blocks

namespace host {

using Site = std::source_location;

// In which order the blocks of a launch, the warps of a block and the lanes of a warp run.
enum class Order { forward, reversed, shuffled };

struct Settings {
  Device device{132, 227 * 1024, 228 * 1024};
  Order order = Order::forward;
  uint64_t seed = 0;    // of Order::shuffled
  std::string without;  // "file:line" of a barrier or wait that does nothing: a defect that a test must see
};
const Settings& settings();
// Sets them for the launches that follow, and forgets what those before have passed.
void set(const Settings& settings);
// The barriers and waits passed since: "verb file:line".
std::vector<std::string> passed();

// Runs `body` for every thread of every block.
void run(const char* op, int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& body,
         const Site& site);

// Ends the launch with an exception.
[[noreturn]] void fault(const char* verb, const Site& site, const std::string& what);

// `mine` of each lane.
using Lanes = void* const (&)[WARP];

// Returns when all lanes of the warp are here and perform(lanes) has been called, once.
void meet(const char* verb, void (*perform)(Lanes), void* mine, const Site& site);

void check_aligned(const char* verb, const void* p, const Site& site);
// 16 bytes of shared memory, aligned.
void check_shared_row(const char* verb, const void* p, const Site& site);
void check_shared_address(const char* verb, const void* p, const Site& site);

void copy_async(void* shared, const void* from, bool inside, const Site& site);
void copy_commit();
void copy_wait(int pending, const Site& site);

unsigned char* shared_memory();
void block_sync(const Site& site);
void warp_sync(const Site& site);

}  // namespace host

// ---- storage types

inline float to_float(float v) { return v; }
inline float to_float(tf32 v) { return v.value; }
inline float to_float(bf16 v) { return portable::bf16_value(v.bits); }
inline float to_float(f16 v) { return portable::f16_value(v.bits); }

template <typename T>
inline T from_float(float v) {
  if constexpr (std::is_same_v<T, bf16>)
    return {std::isnan(v) ? uint16_t(0x7fff) : portable::bf16_bits(v)};
  else if constexpr (std::is_same_v<T, f16>)
    return {std::isnan(v) ? uint16_t(0x7fff) : portable::f16_bits(v)};
  else
    return {v};
}

inline uint32_t bits_of(float v) { return std::bit_cast<uint32_t>(v); }
inline float float_of(uint32_t v) { return std::bit_cast<float>(v); }

// ---- the block

inline int lane() { return int(threadIdx.x) % WARP; }
inline int warp(const host::Site& site = host::Site::current()) {
  host::meet("warp", [](host::Lanes) {}, nullptr, site);
  return int(threadIdx.x) / WARP;
}
inline void block_sync(const host::Site& site = host::Site::current()) { host::block_sync(site); }
inline void warp_sync(const host::Site& site = host::Site::current()) { host::warp_sync(site); }

inline unsigned char* shared_memory() { return host::shared_memory(); }

template <typename T>
inline T shuffle_xor(T v, int mask, const host::Site& site = host::Site::current()) {
  struct Lane {
    T value, result;
    int mask;
  } mine{v, v, mask};
  if (mask < 0 || mask >= WARP) host::fault("shuffle_xor", site, "mask is " + std::to_string(mask));
  host::meet(
      "shuffle_xor",
      [](host::Lanes lanes) {
        for (int i = 0; i < WARP; ++i) {
          Lane& to = *static_cast<Lane*>(lanes[i]);
          to.result = static_cast<const Lane*>(lanes[i ^ to.mask])->value;
        }
      },
      &mine, site);
  return mine.result;
}

// ---- memory

inline Chunk load_chunk(const void* p, const host::Site& site = host::Site::current()) {
  host::check_aligned("load_chunk", p, site);
  Chunk c;
  std::memcpy(&c, p, sizeof c);
  return c;
}
inline void store_chunk(void* p, const Chunk& c, const host::Site& site = host::Site::current()) {
  host::check_aligned("store_chunk", p, site);
  std::memcpy(p, &c, sizeof c);
}
inline Chunk load_chunk_constant(const void* p, const host::Site& site = host::Site::current()) {
  host::check_aligned("load_chunk_constant", p, site);
  Chunk c;
  std::memcpy(&c, p, sizeof c);
  return c;
}

inline uint32_t shared_address(const void* p, const host::Site& site = host::Site::current()) {
  host::check_shared_address("shared_address", p, site);
  return uint32_t(static_cast<const unsigned char*>(p) - host::shared_memory());
}

inline void copy_async(void* shared, const void* from, bool inside,
                       const host::Site& site = host::Site::current()) {
  host::copy_async(shared, from, inside, site);
}
inline void copy_commit() { host::copy_commit(); }
template <int PENDING>
inline void copy_wait(const host::Site& site = host::Site::current()) {
  static_assert(PENDING >= 0);
  host::copy_wait(PENDING, site);
}

// ---- fragments

namespace host {

struct MatrixLane {
  uint32_t* r;
  const void* row;
  const Site& site;
};

template <int MATRICES, bool TRANSPOSED>
void load_matrices(Lanes lanes) {
  uint16_t values[MATRICES][8][8];
  for (int i = 0; i < WARP; ++i) {
    const MatrixLane& from = *static_cast<const MatrixLane*>(lanes[i]);
    if (i >= 8 * MATRICES) {
      check_shared_address("load_matrices", from.row, from.site);
      continue;
    }
    check_shared_row("load_matrices", from.row, from.site);
    std::memcpy(values[i / 8][i % 8], from.row, 16);
  }
  for (int i = 0; i < WARP; ++i)
    for (int m = 0; m < MATRICES; ++m) {
      const int row = i / 4, column = i % 4 * 2;
      const uint16_t low = TRANSPOSED ? values[m][column][row] : values[m][row][column];
      const uint16_t high = TRANSPOSED ? values[m][column + 1][row] : values[m][row][column + 1];
      static_cast<MatrixLane*>(lanes[i])->r[m] = low | uint32_t(high) << 16;
    }
}

struct MmaLane {
  float* d;
  const uint32_t *a, *b;
};

// The value that the matrix unit takes from a word: the `index`-th of 16 bits, or the upper 19 bits of a
// tf32.
template <typename T>
float operand(uint32_t word, int index) {
  if constexpr (std::is_same_v<T, tf32>)
    return float_of(word & 0xffffe000u);
  else
    return to_float(T{uint16_t(word >> (16 * index))});
}
// The 65536 values of f16 are converted once.
const float* f16_values();
template <>
inline float operand<f16>(uint32_t word, int index) {
  return f16_values()[uint16_t(word >> (16 * index))];
}

// WORDS of K: 8, or 4 for half of it.
template <typename T, int WORDS>
void mma(Lanes lanes) {
  constexpr int VALUES = std::is_same_v<T, tf32> ? 1 : 2, K = WORDS * VALUES;
  using Row = float __attribute__((vector_size(32)));
  float a[16][K];
  Row b[K];
  for (int i = 0; i < WARP; ++i) {
    const MmaLane& from = *static_cast<const MmaLane*>(lanes[i]);
    const int g = i / 4, t = i % 4;
    for (int half = 0; half < WORDS / 4; ++half)
      for (int v = 0; v < VALUES; ++v) {
        const int k = (t + 4 * half) * VALUES + v;
        a[g][k] = operand<T>(from.a[2 * half], v);
        a[g + 8][k] = operand<T>(from.a[2 * half + 1], v);
        b[k][g] = operand<T>(from.b[half], v);
      }
  }
  for (int row = 0; row < 16; ++row) {
    Row sum = {};
    for (int k = 0; k < K; ++k) sum += a[row][k] * b[k];
    for (int column = 0; column < 8; ++column)
      static_cast<MmaLane*>(lanes[row % 8 * 4 + column / 2])->d[row / 8 * 2 + column % 2] += sum[column];
  }
}

}  // namespace host

#define GCONV_LOAD_MATRICES(NAME, MATRICES, TRANSPOSED)                        \
  inline void NAME(uint32_t (&r)[MATRICES], const void* row,                   \
                   const host::Site& site = host::Site::current()) {           \
    host::MatrixLane mine{r, row, site};                                       \
    host::meet(#NAME, host::load_matrices<MATRICES, TRANSPOSED>, &mine, site); \
  }
GCONV_LOAD_MATRICES(load_matrices, 4, false)
GCONV_LOAD_MATRICES(load_matrices, 2, false)
GCONV_LOAD_MATRICES(load_matrices_transposed, 4, true)
GCONV_LOAD_MATRICES(load_matrices_transposed, 2, true)
#undef GCONV_LOAD_MATRICES

inline uint32_t tf32_bits(float v) {
  if (std::isnan(v)) return 0x7fffffffu;
  return (bits_of(v) + 0x1000u) & 0xffffe000u;  // halves go away from zero; an infinity stays one
}

template <typename T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                const host::Site& site = host::Site::current()) {
  host::MmaLane mine{d, a, b};
  host::meet("mma", host::mma<T, 8>, &mine, site);
}
template <typename T>
inline void mma_half(float (&d)[4], const uint32_t (&a)[2], uint32_t b,
                     const host::Site& site = host::Site::current()) {
  host::MmaLane mine{d, a, &b};
  host::meet("mma_half", host::mma<T, 4>, &mine, site);
}

// ---- launches

template <typename Params>
void launch(const char* op, void (*kernel)(Params), int64_t blocks, int threads, int64_t shared_bytes, Stream,
            const Params& params, const host::Site& site = host::Site::current()) {
  static_assert(sizeof(Params) <= 4096, "CUDA's limit of a kernel's parameters");
  host::run(op, blocks, threads, shared_bytes, [&] { kernel(params); }, site);
}

inline Device current_device(const char*) { return host::settings().device; }

}  // namespace gconv::cuda
