#include "isa.h"

#if defined(GCONV_AMX)
#define GCONV_ISA_AMX_BF16
#include "grouped_conv_kernels.h"
#include "vec_end.h"
#endif
