// The stages of grouped_conv as one instruction set provides them.
#pragma once
#include "cpu/table.h"
#include "grouped_conv.h"

namespace gconv {

struct GroupedConvTable {
  Workspace<GroupedConvFwdParams> fwd_workspace;
  Stage<GroupedConvFwdParams> fwd_pack, fwd, fwd_merge;
  Workspace<GroupedConvFwdParams> packing, packed_floats;
  Stage<GroupedConvFwdParams> pack_weights;
  Workspace<GroupedConvBwdInputParams> bwd_input_workspace;
  Stage<GroupedConvBwdInputParams> bwd_input_pack, bwd_input, bwd_input_merge;
  Workspace<GroupedConvBwdWeightParams> bwd_weight_workspace;
  Stage<GroupedConvBwdWeightParams> bwd_weight, bwd_weight_merge;
  Stage<GroupedConvBwdParams> bwd;
};

GCONV_DECLARE_TABLES(GroupedConvTable, grouped_conv);
GCONV_DECLARE_PAIRS_TABLES(GroupedConvTable, grouped_conv);

}  // namespace gconv
