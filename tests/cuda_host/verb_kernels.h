// Kernels that try the verbs one by one, right and wrong.
#pragma once
#include "verbs.h"

namespace gconv::cuda {

// Words of `in` and `out` are 32 bits; what they hold is said at each kernel.
struct VerbParams {
  const uint32_t* in;
  uint32_t* out;
  int option;
};

void mma_words(DType dtype, bool tf32, bool half, const VerbParams& p, Stream stream);
void matrix_words(int matrices, bool transposed, const VerbParams& p, Stream stream);
void shuffle_words(const VerbParams& p, Stream stream);
void rounded_words(DType dtype, bool tf32, int64_t count, VerbParams p, Stream stream);
void copied_words(const VerbParams& p, Stream stream);
void turned_words(int threads, const VerbParams& p, Stream stream);
void faulty(int threads, int64_t shared_bytes, const VerbParams& p, Stream stream);

}  // namespace gconv::cuda
