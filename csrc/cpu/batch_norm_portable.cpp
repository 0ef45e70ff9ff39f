#define GCONV_ISA_PORTABLE
#include "batch_norm_kernels.h"

const gconv::BatchNormTable gconv::batch_norm_portable = gconv::portable::batch_norm::TABLE;
