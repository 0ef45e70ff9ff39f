#include "verb_kernels.h"

namespace gconv::cuda {
namespace {

// Each warp: in [lane][10] = a[4], b[2], d[4]; out [lane][4].
template <typename T, bool HALF>
GCONV_KERNEL(64, 1)
void mma_kernel(const VerbParams p) {
  const uint32_t* in = p.in + 10 * threadIdx.x;
  float d[4] = {float_of(in[6]), float_of(in[7]), float_of(in[8]), float_of(in[9])};
  if constexpr (HALF) {
    const uint32_t a[2] = {in[0], in[1]};
    mma_half<T>(d, a, in[4]);
  } else {
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]}, b[2] = {in[4], in[5]};
    mma<T>(d, a, b);
  }
  for (int i = 0; i < 4; ++i) p.out[4 * threadIdx.x + i] = bits_of(d[i]);
}

template <typename T>
void mma_of(bool half, const VerbParams& p, Stream stream) {
  launch("mma", half ? mma_kernel<T, true> : mma_kernel<T, false>, 1, 64, 0, stream, p);
}

// in [lane] = the byte offset of its row, then 1024 words that go to shared memory; out [lane][MATRICES].
template <int MATRICES, bool TRANSPOSED>
GCONV_KERNEL(32, 1)
void matrix_kernel(const VerbParams p) {
  unsigned char* shared = shared_memory();
  for (int i = lane(); i < 1024; i += WARP) reinterpret_cast<uint32_t*>(shared)[i] = p.in[WARP + i];
  warp_sync();
  uint32_t r[MATRICES];
  const unsigned char* row = shared + p.in[lane()];
  if constexpr (TRANSPOSED)
    load_matrices_transposed(r, row);
  else
    load_matrices(r, row);
  for (int i = 0; i < MATRICES; ++i) p.out[MATRICES * lane() + i] = r[i];
}

// out [lane] = in [lane ^ option], and the same of its double as a float.
GCONV_KERNEL(64, 1) void shuffle_kernel(const VerbParams p) {
  const uint32_t word = p.in[threadIdx.x];
  p.out[threadIdx.x] = shuffle_xor(word, p.option);
  p.out[64 + threadIdx.x] = bits_of(shuffle_xor(2.0f * float_of(word), p.option));
}

// in: floats; out: the bits of the stored value, and of that as a float again.
template <typename T>
GCONV_KERNEL(32, 1)
void rounded_kernel(const VerbParams p) {
  for (int i = lane(); i < p.option; i += WARP) {
    const T v = from_float<T>(float_of(p.in[i]));
    if constexpr (sizeof(T) == 2)
      p.out[i] = v.bits;
    else
      p.out[i] = tf32_bits(to_float(v));
    p.out[p.option + i] = bits_of(to_float(v));
  }
}

// in [3][32][4] words come in three groups of copies, those of odd lanes in the third as zeros; out
// [3][32][4] is what shared memory holds after a wait for all but `option` groups (0, 1, 2, or 3: no wait).
GCONV_KERNEL(32, 1) void copied_kernel(const VerbParams p) {
  unsigned char* shared = shared_memory();
  for (int group = 0; group < 3; ++group) {
    const int at = 16 * (group * WARP + lane());
    copy_async(shared + at, p.in + at / 4, group < 2 || lane() % 2 == 0);
    copy_commit();
  }
  if (p.option == 0) copy_wait<0>();
  if (p.option == 1) copy_wait<1>();
  if (p.option == 2) copy_wait<2>();
  for (int group = 0; group < 3; ++group) {
    const int at = 16 * (group * WARP + lane());
    store_chunk(p.out + at / 4, load_chunk(shared + at));
  }
  copy_wait<0>();
}

// Through shared memory: out [i] = in [threads - 1 - i], then the same of in + 1. A barrier that is
// left out shows in some order of the warps: the first and third when what is read is not there yet, the
// second when what is still to be read is overwritten.
GCONV_KERNEL(256, 1) void turned_kernel(const VerbParams p) {
  auto* shared = reinterpret_cast<uint32_t*>(shared_memory());
  const int threads = int(blockDim.x), i = int(threadIdx.x), other = threads - 1 - i;
  shared[i] = p.in[i];
  block_sync();
  p.out[i] = shared[other];
  block_sync();
  shared[i] = p.in[i] + 1;
  block_sync();
  p.out[threads + i] = shared[other];
  shared[threads + i] = p.in[i] + 2;
  warp_sync();
  p.out[2 * threads + i] = shared[threads + (i ^ (WARP - 1))];
}

// What a kernel must not do, by number.
GCONV_KERNEL(64, 1) void faulty_kernel(const VerbParams p) {
  unsigned char* shared = shared_memory();
  uint32_t r[4];
  const uint32_t a[4] = {}, b[2] = {};
  float d[4] = {};
  const bool low = lane() < 16, first = threadIdx.x < 32;
  switch (p.option) {
    case 0:  // half of a warp in a verb
      if (low) shuffle_xor(1, 1);
      break;
    case 1:  // two verbs
      if (low)
        warp_sync();
      else
        shuffle_xor(1, 1);
      break;
    case 2:  // one verb at two places
      if (low)
        shuffle_xor(1, 1);
      else
        shuffle_xor(1, 2);
      break;
    case 3:  // half of a warp at the barrier
      if (low) block_sync();
      break;
    case 4:  // one warp at the barrier
      if (first) block_sync();
      break;
    case 5:  // a barrier and a warp verb
      if (low)
        block_sync();
      else
        warp_sync();
      break;
    case 6:  // two barriers
      if (first)
        block_sync();
      else
        block_sync();
      break;
    case 7:
      load_chunk(p.in + 1);
      break;
    case 8:
      store_chunk(p.out + 2, {});
      break;
    case 9:
      load_chunk_constant(p.in + 3);
      break;
    case 10:
      copy_async(shared + 8, p.in, true);
      break;
    case 11:
      copy_async(shared, p.in + 1, true);
      break;
    case 12:
      copy_async(p.out, p.in, true);
      break;
    case 13:  // one misaligned row of the 32
      load_matrices(r, shared + 16 * lane() + (lane() == 31 ? 8 : 0));
      break;
    case 14:  // a row that ends behind shared memory
      load_matrices(r, shared + (lane() == 5 ? 1024 : 16 * lane()));
      break;
    case 15:  // an address nobody looks at, but not of shared memory
      load_matrices_transposed(reinterpret_cast<uint32_t (&)[2]>(r), low ? shared : (const void*)p.in);
      break;
    case 16:
      shuffle_xor(1, 32);
      break;
    case 17:  // lanes of one warp in products of two types
      if (low)
        mma<bf16>(d, a, b);
      else
        mma<f16>(d, a, b);
      break;
    case 18:  // a thread that ends before a barrier
      if (threadIdx.x == 40) return;
      block_sync();
      break;
    case 19:  // one byte too far
      if (threadIdx.x == 0) shared[1024] = 1;
      break;
    case 20:
      shared_address(p.in);
      break;
    default:  // nothing is wrong
      block_sync();
      load_matrices(r, shared + 16 * lane());
      mma<bf16>(d, a, b);
      p.out[threadIdx.x] = 1;
  }
}

}  // namespace

void mma_words(DType dtype, bool tf32_products, bool half, const VerbParams& p, Stream stream) {
  if (dtype == DType::bf16)
    mma_of<bf16>(half, p, stream);
  else if (dtype == DType::f16)
    mma_of<f16>(half, p, stream);
  else if (tf32_products)
    mma_of<tf32>(half, p, stream);
}

void matrix_words(int matrices, bool transposed, const VerbParams& p, Stream stream) {
  const auto kernel = matrices == 4 ? (transposed ? matrix_kernel<4, true> : matrix_kernel<4, false>)
                                    : (transposed ? matrix_kernel<2, true> : matrix_kernel<2, false>);
  launch("matrices", kernel, 1, 32, 4096, stream, p);
}

void shuffle_words(const VerbParams& p, Stream stream) {
  launch("shuffle", shuffle_kernel, 1, 64, 0, stream, p);
}

void rounded_words(DType dtype, bool tf32_values, int64_t count, VerbParams p, Stream stream) {
  p.option = int(count);
  const auto kernel = dtype == DType::bf16  ? rounded_kernel<bf16>
                      : dtype == DType::f16 ? rounded_kernel<f16>
                      : tf32_values         ? rounded_kernel<tf32>
                                            : rounded_kernel<float>;
  launch("rounded", kernel, 1, 32, 0, stream, p);
}

void copied_words(const VerbParams& p, Stream stream) {
  launch("copied", copied_kernel, 1, 32, 3 * 32 * 16, stream, p);
}

void turned_words(int threads, const VerbParams& p, Stream stream) {
  launch("turned", turned_kernel, 1, threads, 8 * threads, stream, p);
}

void faulty(int threads, int64_t shared_bytes, const VerbParams& p, Stream stream) {
  launch("faulty", faulty_kernel, 2, threads, shared_bytes, stream, p);
}

}  // namespace gconv::cuda
