// The verbs the CUDA kernels are written in: storage types, 16-byte copies, fragments, matrix products,
// shuffles, launches. Torch-free. nvcc compiles them to the instructions named here; any other compiler takes
// them from cuda_host.h (tests/cuda_host), which runs the same kernels on a CPU.
//
// A fragment is what one lane of a warp holds of a small matrix; the layouts are those of PTX's mma.sync.
// With g = lane / 4 and t = lane % 4, in words of 32 bits (two 16-bit values or one tf32, the lower index in
// the lower half):
//
//   A  16 rows x 32 bytes of K: a[0] (row g, word t), a[1] (g + 8, t), a[2] (g, t + 4), a[3] (g + 8, t + 4)
//   B  32 bytes of K x 8 columns: b[0] (word t, column g), b[1] (word t + 4, column g)
//   D  16 x 8 of float: d[0], d[1] (row g, columns 2t, 2t + 1), d[2], d[3] (row g + 8)
//
// A K of 32 bytes is 16 values of 16 bits or 8 of tf32; mma_half takes half of it, a[0], a[1] and b[0].
#pragma once
#include <cstdint>

#include "../tensor.h"

namespace gconv::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct tf32 {  // a float in memory, rounded to 10 bits of mantissa for the matrix unit
  float value;
};

// 16 bytes at an address that is a multiple of 16.
struct alignas(16) Chunk {
  uint32_t word[4];
};

constexpr int WARP = 32;

}  // namespace gconv::cuda

// Of functions that the host calls too; and of device functions that are called, for what is large and rare.
#if defined(__CUDACC__)
#define GCONV_HOST_DEVICE __host__ __device__ inline
#define GCONV_DEVICE_CALL static __device__ __noinline__
#else
#define GCONV_HOST_DEVICE inline
#define GCONV_DEVICE_CALL inline
#endif

#if !defined(__CUDACC__)
#include "cuda_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define GCONV_KERNEL(threads, blocks) __global__ __launch_bounds__(threads, blocks)
#define GCONV_DEVICE __device__ __forceinline__
#define GCONV_UNROLL _Pragma("unroll")

namespace gconv::cuda {

using Stream = cudaStream_t;

// ---- storage types

GCONV_DEVICE float to_float(float v) { return v; }
GCONV_DEVICE float to_float(tf32 v) { return v.value; }
GCONV_DEVICE float to_float(bf16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
GCONV_DEVICE float to_float(f16 v) { return __half2float(__ushort_as_half(v.bits)); }

// To nearest, ties to even.
template <typename T>
GCONV_DEVICE T from_float(float v);
template <>
GCONV_DEVICE float from_float<float>(float v) {
  return v;
}
template <>
GCONV_DEVICE tf32 from_float<tf32>(float v) {
  return {v};
}
template <>
GCONV_DEVICE bf16 from_float<bf16>(float v) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
}
template <>
GCONV_DEVICE f16 from_float<f16>(float v) {
  return {__half_as_ushort(__float2half_rn(v))};
}

GCONV_DEVICE uint32_t bits_of(float v) { return __float_as_uint(v); }
GCONV_DEVICE float float_of(uint32_t v) { return __uint_as_float(v); }

// ---- the block

GCONV_DEVICE int lane() { return int(threadIdx.x) % WARP; }
// The same in every lane, and known to be so.
GCONV_DEVICE int warp() { return __shfl_sync(0xffffffffu, int(threadIdx.x) / WARP, 0); }
GCONV_DEVICE void block_sync() { __syncthreads(); }
GCONV_DEVICE void warp_sync() { __syncwarp(); }

// The block's dynamic shared memory, aligned to 128 bytes.
GCONV_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char gconv_shared[];
  return gconv_shared;
}

// All 32 lanes take part.
template <typename T>
GCONV_DEVICE T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}

// ---- memory

GCONV_DEVICE Chunk load_chunk(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
GCONV_DEVICE void store_chunk(void* p, const Chunk& c) {
  *static_cast<uint4*>(p) = make_uint4(c.word[0], c.word[1], c.word[2], c.word[3]);
}
// Of memory that no thread writes while the kernel runs.
GCONV_DEVICE Chunk load_chunk_constant(const void* p) {
  const uint4 v = __ldg(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}

GCONV_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Starts a copy of 16 bytes to shared memory; zeros arrive where `inside` is false, and `from` is not read.
GCONV_DEVICE void copy_async(void* shared, const void* from, bool inside) {
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(from),
               "r"(bytes)
               : "memory");
}
// Closes a group of copies.
GCONV_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's groups but the last PENDING; others see them after a barrier.
template <int PENDING>
GCONV_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- fragments

// Matrices of 8 rows x 16 bytes from shared memory; lane i names row i % 8 of matrix i / 8 (lanes beyond the
// matrices are not looked at but must hold a shared address), and word m of lane l is word l % 4 of row l / 4
// of matrix m.
// load_matrices_transposed: the same with each matrix of 8 x 8 values of 16 bits transposed.
#define GCONV_LOAD_MATRICES(NAME, LAYOUT)                                                     \
  GCONV_DEVICE void NAME(uint32_t (&r)[4], const void* row) {                                 \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" LAYOUT ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                             \
                 : "r"(shared_address(row))                                                   \
                 : "memory");                                                                 \
  }                                                                                           \
  GCONV_DEVICE void NAME(uint32_t (&r)[2], const void* row) {                                 \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" LAYOUT ".shared.b16 {%0, %1}, [%2];"         \
                 : "=r"(r[0]), "=r"(r[1])                                                     \
                 : "r"(shared_address(row))                                                   \
                 : "memory");                                                                 \
  }
GCONV_LOAD_MATRICES(load_matrices, "")
GCONV_LOAD_MATRICES(load_matrices_transposed, ".trans")
#undef GCONV_LOAD_MATRICES

// Rounds a float for the matrix unit; the bits of a tf32 are those of a float.
GCONV_DEVICE uint32_t tf32_bits(float v) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
}

// d += a b with values of type T: K of 32 bytes, and of 16.
template <typename T>
GCONV_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <typename T>
GCONV_DEVICE void mma_half(float (&d)[4], const uint32_t (&a)[2], uint32_t b);

#define GCONV_MMA(T, K, HALF_K, TYPE)                                                       \
  template <>                                                                               \
  GCONV_DEVICE void mma<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned.m16n8k" K ".row.col.f32." TYPE "." TYPE                  \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"     \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));       \
  }                                                                                         \
  template <>                                                                               \
  GCONV_DEVICE void mma_half<T>(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {        \
    asm volatile("mma.sync.aligned.m16n8k" HALF_K ".row.col.f32." TYPE "." TYPE             \
                 ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                 \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                           \
                 : "r"(a[0]), "r"(a[1]), "r"(b));                                           \
  }
GCONV_MMA(bf16, "16", "8", "bf16")
GCONV_MMA(f16, "16", "8", "f16")
GCONV_MMA(tf32, "8", "4", "tf32")
#undef GCONV_MMA

// ---- launches

inline void check_cuda(cudaError_t status, const char* op) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(status));
}

// Starts `kernel` on one argument, a struct; an error of the launch is thrown, naming `op`.
template <typename Params>
void launch(const char* op, void (*kernel)(Params), int64_t blocks, int threads, int64_t shared_bytes,
            Stream stream, const Params& params) {
  if (blocks == 0) return;
  if (shared_bytes > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
               op);
  kernel<<<dim3(unsigned(blocks)), dim3(unsigned(threads)), size_t(shared_bytes), stream>>>(params);
  check_cuda(cudaGetLastError(), op);
}

// Of the current device.
struct Device {
  int multiprocessors;
  int64_t shared_per_block, shared_per_multiprocessor;  // bytes; the first is what a block may opt in to
};
inline Device current_device(const char* op) {
  int index = 0, n = 0, block = 0, all = 0;
  check_cuda(cudaGetDevice(&index), op);
  check_cuda(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, index), op);
  check_cuda(cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), op);
  check_cuda(cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index), op);
  return {n, block, all};
}

}  // namespace gconv::cuda
#endif
