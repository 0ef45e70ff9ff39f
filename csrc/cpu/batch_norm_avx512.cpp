#if defined(__x86_64__)
#define GCONV_ISA_AVX512
#include "cpu/batch_norm_pass.h"
#endif
