// torch.ops.gconv.conv_bn_relu_*: the ops of a training step, one after the other in one call. Between large
// kernels the caches are cold, and an op's way through the dispatcher takes tens of microseconds.
#include "conv_binding.h"

namespace gconv {

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_relu_fwd_train(
    const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding, const Ints& dilation,
    int64_t groups, const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& residual,
    double eps, bool relu, const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, const OptionalTensor& shift, std::optional<double> momentum) {
  const char* op = "conv_bn_relu_fwd_train";
  check(running_mean.has_value() == running_var.has_value(), op, ": ",
        running_mean.has_value() ? "running_var" : "running_mean", ": want both running statistics or none");
  auto [y, mean, var] =
      is_pointwise(op, shape_of(op, "weight", weight), padding, groups)
          ? pointwise_conv_fwd_stats(x, weight, stride, std::nullopt)
          : grouped_conv_fwd_stats(x, weight, stride, padding, dilation, groups, std::nullopt);
  auto [rstd, affine] = batch_norm_fold(mean, var, gamma, beta, eps);
  Tensor z = batch_norm_apply(y, affine, residual, std::nullopt, relu);
  if (running_mean.has_value())  // last: a refused call changes no state
    batch_norm_update_running(*running_mean, *running_var, num_batches_tracked, mean, var, shift,
                              y.size(0) * y.size(2) * y.size(3), momentum);
  return {z, y, mean, rstd, affine};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_relu_bwd(
    const Tensor& dz, const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding,
    const Ints& dilation, int64_t groups, const Tensor& y, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& gamma, const OptionalTensor& affine, const OptionalTensor& z, bool want_dx,
    bool want_dweight, bool want_g, bool weight_channels_last) {
  const char* op = "conv_bn_relu_bwd";
  // The convolution's gradients finish dz as they load it. A mask that only z knows is applied before.
  const bool masked = want_g || (z.has_value() && (want_dx || want_dweight));
  auto [dgamma, dbeta, finish, g] = batch_norm_bwd_reduce(dz, y, mean, rstd, gamma, affine, z, masked);
  const Tensor& dy = masked ? g : dz;
  auto [dx, dweight, sums] =
      is_pointwise(op, shape_of(op, "weight", weight), padding, groups)
          ? pointwise_conv_bwd(dy, x, weight, stride, y, finish, std::nullopt, std::nullopt, want_dx,
                               want_dweight, weight_channels_last)
          : grouped_conv_bwd(dy, x, weight, stride, padding, dilation, groups, y, finish, std::nullopt,
                             want_dx, want_dweight, weight_channels_last);
  return {dx, dweight, dgamma, dbeta, want_g ? g : empty({0}, x.scalar_type(), x)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gconv, CPU, m) {
  m.impl("conv_bn_relu_fwd_train", TORCH_BOX(&conv_bn_relu_fwd_train));
  m.impl("conv_bn_relu_bwd", TORCH_BOX(&conv_bn_relu_bwd));
}

}  // namespace gconv
