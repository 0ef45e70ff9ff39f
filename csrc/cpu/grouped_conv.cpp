// Chooses the instruction set's table for each stage of grouped_conv.
#include "grouped_conv.h"

#include "cpu/grouped_conv_table.h"

namespace gconv {

namespace {

const GroupedConvTable& table(Isa isa) { return GCONV_TABLE(grouped_conv, isa); }

}  // namespace

int64_t grouped_conv_fwd_workspace(const GroupedConvFwdParams& p) { return table(p.isa).fwd_workspace(p); }
void grouped_conv_fwd_pack_cpu(const GroupedConvFwdParams& p, int64_t ith, int64_t nth) {
  table(p.isa).fwd_pack(p, ith, nth);
}
void grouped_conv_fwd_cpu(const GroupedConvFwdParams& p, int64_t ith, int64_t nth) {
  table(p.isa).fwd(p, ith, nth);
}
void grouped_conv_fwd_merge_cpu(const GroupedConvFwdParams& p, int64_t ith, int64_t nth) {
  table(p.isa).fwd_merge(p, ith, nth);
}

int64_t grouped_conv_bwd_input_workspace(const GroupedConvBwdInputParams& p) {
  return table(p.isa).bwd_input_workspace(p);
}
void grouped_conv_bwd_input_pack_cpu(const GroupedConvBwdInputParams& p, int64_t ith, int64_t nth) {
  table(p.isa).bwd_input_pack(p, ith, nth);
}
void grouped_conv_bwd_input_cpu(const GroupedConvBwdInputParams& p, int64_t ith, int64_t nth) {
  table(p.isa).bwd_input(p, ith, nth);
}
void grouped_conv_bwd_input_merge_cpu(const GroupedConvBwdInputParams& p, int64_t ith, int64_t nth) {
  table(p.isa).bwd_input_merge(p, ith, nth);
}

int64_t grouped_conv_bwd_weight_workspace(const GroupedConvBwdWeightParams& p) {
  return table(p.isa).bwd_weight_workspace(p);
}
void grouped_conv_bwd_weight_cpu(const GroupedConvBwdWeightParams& p, int64_t ith, int64_t nth) {
  table(p.isa).bwd_weight(p, ith, nth);
}
void grouped_conv_bwd_weight_merge_cpu(const GroupedConvBwdWeightParams& p, int64_t ith, int64_t nth) {
  table(p.isa).bwd_weight_merge(p, ith, nth);
}
void grouped_conv_bwd_cpu(const GroupedConvBwdParams& p, int64_t ith, int64_t nth) {
  table(p.input.isa).bwd(p, ith, nth);
}

}  // namespace gconv
