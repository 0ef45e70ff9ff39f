#if defined(__x86_64__)
#define GCONV_ISA_AVX512
#include "grouped_conv_kernels.h"
#endif
