// Chooses the instruction set's table for each stage of pointwise_conv.
#include "pointwise_conv.h"

#include "cpu/pointwise_conv_table.h"

namespace gconv {

namespace {

const PointwiseConvTable& table(Isa isa) { return GCONV_TABLE(pointwise_conv, isa); }

}  // namespace

int64_t pointwise_conv_fwd_workspace(const PointwiseConvFwdParams& p) {
  return table(p.isa).fwd_workspace(p);
}
void pointwise_conv_fwd_pack_cpu(const PointwiseConvFwdParams& p, int64_t ith, int64_t nth) {
  table(p.isa).fwd_pack(p, ith, nth);
}
void pointwise_conv_fwd_cpu(const PointwiseConvFwdParams& p, int64_t ith, int64_t nth) {
  table(p.isa).fwd(p, ith, nth);
}
void pointwise_conv_fwd_merge_cpu(const PointwiseConvFwdParams& p, int64_t ith, int64_t nth) {
  table(p.isa).fwd_merge(p, ith, nth);
}

int64_t pointwise_conv_bwd_workspace(const PointwiseConvBwdParams& p) {
  return table(p.isa).bwd_workspace(p);
}
void pointwise_conv_bwd_pack_cpu(const PointwiseConvBwdParams& p, int64_t ith, int64_t nth) {
  table(p.isa).bwd_pack(p, ith, nth);
}
void pointwise_conv_bwd_cpu(const PointwiseConvBwdParams& p, int64_t ith, int64_t nth) {
  table(p.isa).bwd(p, ith, nth);
}
void pointwise_conv_bwd_merge_cpu(const PointwiseConvBwdParams& p, int64_t ith, int64_t nth) {
  table(p.isa).bwd_merge(p, ith, nth);
}

}  // namespace gconv
