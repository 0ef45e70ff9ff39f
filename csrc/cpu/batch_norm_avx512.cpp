#if defined(__x86_64__)
#define GCONV_ISA_AVX512
#include "batch_norm_kernels.h"

const gconv::BatchNormTable gconv::batch_norm_avx512 = gconv::avx512::batch_norm::TABLE;

#include "vec_end.h"
#endif
