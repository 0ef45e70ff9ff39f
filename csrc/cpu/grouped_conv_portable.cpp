#define GCONV_ISA_PORTABLE
#include "grouped_conv_kernels.h"
