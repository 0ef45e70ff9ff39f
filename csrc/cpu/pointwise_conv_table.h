// The stages of pointwise_conv as one instruction set provides them.
#pragma once
#include "cpu/table.h"
#include "pointwise_conv.h"

namespace gconv {

struct PointwiseConvTable {
  Workspace<PointwiseConvFwdParams> fwd_workspace;
  Stage<PointwiseConvFwdParams> fwd_pack, fwd, fwd_merge;
  Workspace<PointwiseConvFwdParams> packing, packed_floats;
  Stage<PointwiseConvFwdParams> pack_weights;
  Workspace<PointwiseConvBwdParams> bwd_workspace;
  Stage<PointwiseConvBwdParams> bwd_pack, bwd, bwd_merge;
};

GCONV_DECLARE_TABLES(PointwiseConvTable, pointwise_conv);
GCONV_DECLARE_PAIRS_TABLES(PointwiseConvTable, pointwise_conv);

}  // namespace gconv
