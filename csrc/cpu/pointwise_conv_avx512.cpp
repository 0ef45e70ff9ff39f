#if defined(__x86_64__)
#define GCONV_ISA_AVX512
#include "pointwise_conv_kernels.h"
#include "vec_end.h"
#endif
