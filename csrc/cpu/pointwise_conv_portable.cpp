#define GCONV_ISA_PORTABLE
#include "pointwise_conv_kernels.h"
