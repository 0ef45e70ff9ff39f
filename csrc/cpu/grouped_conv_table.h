// The stages of grouped_conv as one instruction set provides them.
#pragma once
#include "grouped_conv.h"

namespace gconv {

template <typename Params>
using Workspace = int64_t (*)(const Params&);
template <typename Params>
using Stage = void (*)(const Params&, int64_t ith, int64_t nth);

struct GroupedConvTable {
  Workspace<GroupedConvFwdParams> fwd_workspace;
  Stage<GroupedConvFwdParams> fwd_pack, fwd, fwd_merge;
  Workspace<GroupedConvBwdInputParams> bwd_input_workspace;
  Stage<GroupedConvBwdInputParams> bwd_input_pack, bwd_input, bwd_input_merge;
  Workspace<GroupedConvBwdWeightParams> bwd_weight_workspace;
  Stage<GroupedConvBwdWeightParams> bwd_weight, bwd_weight_merge;
  Stage<GroupedConvBwdParams> bwd;
};

extern const GroupedConvTable grouped_conv_portable;
#if defined(__x86_64__)
extern const GroupedConvTable grouped_conv_avx2, grouped_conv_avx512, grouped_conv_avx512_bf16;
#endif

}  // namespace gconv
