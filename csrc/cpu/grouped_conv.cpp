// Chooses the instruction set's table for each stage of grouped_conv.
#include "grouped_conv.h"

#include "cpu/grouped_conv_table.h"

namespace gconv {

namespace {

template <typename Params>
const GroupedConvTable& table(const Params& p, int64_t summed) {
  return GCONV_PAIRS_TABLE(grouped_conv, p.isa, p.dtype, summed);
}
const GroupedConvTable& table(const GroupedConvFwdParams& p) { return table(p, p.shape.c / p.shape.groups); }
const GroupedConvTable& table(const GroupedConvBwdInputParams& p) {
  return table(p, p.shape.k / p.shape.groups);
}
// Pixels of two images make a pair here, a missing one being 0.
const GroupedConvTable& table(const GroupedConvBwdWeightParams& p) { return table(p, 0); }

}  // namespace

int64_t grouped_conv_fwd_workspace(const GroupedConvFwdParams& p) { return table(p).fwd_workspace(p); }
void grouped_conv_fwd_pack_cpu(const GroupedConvFwdParams& p, int64_t ith, int64_t nth) {
  table(p).fwd_pack(p, ith, nth);
}
void grouped_conv_fwd_cpu(const GroupedConvFwdParams& p, int64_t ith, int64_t nth) {
  table(p).fwd(p, ith, nth);
}
void grouped_conv_fwd_merge_cpu(const GroupedConvFwdParams& p, int64_t ith, int64_t nth) {
  table(p).fwd_merge(p, ith, nth);
}

int64_t grouped_conv_packing(const GroupedConvFwdParams& p) { return table(p).packing(p); }
int64_t grouped_conv_packed_floats(const GroupedConvFwdParams& p) { return table(p).packed_floats(p); }
void grouped_conv_pack_weights_cpu(const GroupedConvFwdParams& p, int64_t ith, int64_t nth) {
  table(p).pack_weights(p, ith, nth);
}

int64_t grouped_conv_bwd_input_workspace(const GroupedConvBwdInputParams& p) {
  return table(p).bwd_input_workspace(p);
}
void grouped_conv_bwd_input_pack_cpu(const GroupedConvBwdInputParams& p, int64_t ith, int64_t nth) {
  table(p).bwd_input_pack(p, ith, nth);
}
void grouped_conv_bwd_input_cpu(const GroupedConvBwdInputParams& p, int64_t ith, int64_t nth) {
  table(p).bwd_input(p, ith, nth);
}
void grouped_conv_bwd_input_merge_cpu(const GroupedConvBwdInputParams& p, int64_t ith, int64_t nth) {
  table(p).bwd_input_merge(p, ith, nth);
}

int64_t grouped_conv_bwd_weight_workspace(const GroupedConvBwdWeightParams& p) {
  return table(p).bwd_weight_workspace(p);
}
void grouped_conv_bwd_weight_cpu(const GroupedConvBwdWeightParams& p, int64_t ith, int64_t nth) {
  table(p).bwd_weight(p, ith, nth);
}
void grouped_conv_bwd_weight_merge_cpu(const GroupedConvBwdWeightParams& p, int64_t ith, int64_t nth) {
  table(p).bwd_weight_merge(p, ith, nth);
}
void grouped_conv_bwd_cpu(const GroupedConvBwdParams& p, int64_t ith, int64_t nth) {
  const GroupedConvTable &input = table(p.input), &weight = table(p.weight);
  if (&input == &weight) return input.bwd(p, ith, nth);
  weight.bwd_weight(p.weight, ith, nth);
  input.bwd_input(p.input, ith, nth);
}

}  // namespace gconv
