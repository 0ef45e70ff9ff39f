#if defined(__x86_64__)
#define GCONV_ISA_AVX2
#include "batch_norm_kernels.h"

const gconv::BatchNormTable gconv::batch_norm_avx2 = gconv::avx2::batch_norm::TABLE;

#include "vec_end.h"
#endif
