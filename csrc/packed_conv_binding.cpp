// torch.ops.gconv.conv_pack and what takes its result: a convolution's weights packed once for many forwards.
// Other than in grouped_conv and pointwise_conv one op serves all kernel sizes.
#include "conv_binding.h"

namespace gconv {

namespace {

Tensor conv_pack(const Tensor& weight, const Ints& input_size, const Ints& stride, const Ints& padding,
                 const Ints& dilation, int64_t groups) {
  const char* op = "conv_pack";
  return is_pointwise(op, shape_of(op, "weight", weight), padding, groups)
             ? pointwise_conv_pack(weight, input_size, stride)
             : grouped_conv_pack(weight, input_size, stride, padding, dilation, groups);
}

Tensor run(const PackedCall& call, const OptionalTensor& into) {
  return is_pointwise(call.op, call.weight, call.padding, call.groups) ? pointwise_conv_fwd_packed(call, into)
                                                                       : grouped_conv_fwd_packed(call, into);
}

Tensor conv_fwd_packed(const Tensor& x, const Tensor& packed, const Ints& weight_size, const Ints& stride,
                       const Ints& padding, const Ints& dilation, int64_t groups, const OptionalTensor& act,
                       const OptionalTensor& affine, const OptionalTensor& residual, bool relu) {
  const char* op = "conv_fwd_packed";
  const Shape weight = shape_of(op, "weight_size", weight_size);
  return run({op, x, packed, weight, stride, padding, dilation, groups, act, affine, residual, relu},
             std::nullopt);
}

void conv_fwd_packed_into(const Tensor& x, const Tensor& packed, const Ints& weight_size, const Ints& stride,
                          const Ints& padding, const Ints& dilation, int64_t groups,
                          const OptionalTensor& act, const OptionalTensor& affine,
                          const OptionalTensor& residual, bool relu, const Tensor& y) {
  const char* op = "conv_fwd_packed_into";
  const Shape weight = shape_of(op, "weight_size", weight_size);
  run({op, x, packed, weight, stride, padding, dilation, groups, act, affine, residual, relu}, y);
}

}  // namespace

}  // namespace gconv

STABLE_TORCH_LIBRARY_IMPL(gconv, CPU, m) {
  m.impl("conv_pack", TORCH_BOX(&gconv::conv_pack));
  m.impl("conv_fwd_packed", TORCH_BOX(&gconv::conv_fwd_packed));
  m.impl("conv_fwd_packed_into", TORCH_BOX(&gconv::conv_fwd_packed_into));
}
