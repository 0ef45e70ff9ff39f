// Chooses the instruction set's table for each stage of pointwise_conv.
#include "pointwise_conv.h"

#include "cpu/pointwise_conv_table.h"

namespace gconv {

namespace {

const PointwiseConvTable& table(const PointwiseConvFwdParams& p) {
  return GCONV_PAIRS_TABLE(pointwise_conv, p.isa, p.dtype, p.shape.c);
}
// Pixels make the weight gradient's pairs, a missing one being 0; the choice is the input gradient's all the
// same, so that one gradient alone has the bits of both.
const PointwiseConvTable& table(const PointwiseConvBwdParams& p) {
  return GCONV_PAIRS_TABLE(pointwise_conv, p.isa, p.dtype, p.shape.k);
}

}  // namespace

int64_t pointwise_conv_fwd_workspace(const PointwiseConvFwdParams& p) { return table(p).fwd_workspace(p); }
void pointwise_conv_fwd_pack_cpu(const PointwiseConvFwdParams& p, int64_t ith, int64_t nth) {
  table(p).fwd_pack(p, ith, nth);
}
void pointwise_conv_fwd_cpu(const PointwiseConvFwdParams& p, int64_t ith, int64_t nth) {
  table(p).fwd(p, ith, nth);
}
void pointwise_conv_fwd_merge_cpu(const PointwiseConvFwdParams& p, int64_t ith, int64_t nth) {
  table(p).fwd_merge(p, ith, nth);
}

int64_t pointwise_conv_packing(const PointwiseConvFwdParams& p) { return table(p).packing(p); }
int64_t pointwise_conv_packed_floats(const PointwiseConvFwdParams& p) { return table(p).packed_floats(p); }
void pointwise_conv_pack_weights_cpu(const PointwiseConvFwdParams& p, int64_t ith, int64_t nth) {
  table(p).pack_weights(p, ith, nth);
}

int64_t pointwise_conv_bwd_workspace(const PointwiseConvBwdParams& p) { return table(p).bwd_workspace(p); }
void pointwise_conv_bwd_pack_cpu(const PointwiseConvBwdParams& p, int64_t ith, int64_t nth) {
  table(p).bwd_pack(p, ith, nth);
}
void pointwise_conv_bwd_cpu(const PointwiseConvBwdParams& p, int64_t ith, int64_t nth) {
  table(p).bwd(p, ith, nth);
}
void pointwise_conv_bwd_merge_cpu(const PointwiseConvBwdParams& p, int64_t ith, int64_t nth) {
  table(p).bwd_merge(p, ith, nth);
}

}  // namespace gconv
