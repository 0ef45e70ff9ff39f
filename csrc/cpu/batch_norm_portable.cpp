#define GCONV_ISA_PORTABLE
#include "cpu/batch_norm_pass.h"
