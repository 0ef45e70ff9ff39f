// torch.ops.gconv.conv_bn_relu_*: the ops of a training step, one after the other in one call. Between large
// kernels the caches are cold, and an op's way through the dispatcher takes tens of microseconds.
#include "torch_ops.h"

namespace gconv {

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_relu_fwd_train(
    const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding, const Ints& dilation,
    int64_t groups, const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& residual,
    double eps, bool relu) {
  auto [y, mean, var] = grouped_conv_fwd_stats(x, weight, stride, padding, dilation, groups, std::nullopt);
  auto [rstd, affine] = batch_norm_fold(mean, var, gamma, beta, eps);
  Tensor z = batch_norm_apply(y, affine, residual, relu);
  return {z, y, mean, var, rstd, affine};
}

Ints sizes_of(const char* name, const Tensor& t) {
  check(t.dim() == 4, "conv_bn_relu_bwd: ", name, ": want 4 dimensions, got ", Described{t});
  return {t.size(0), t.size(1), t.size(2), t.size(3)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_relu_bwd(
    const Tensor& dz, const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding,
    const Ints& dilation, int64_t groups, const Tensor& y, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& gamma, const OptionalTensor& affine, const OptionalTensor& z, bool want_dx,
    bool want_dweight, bool want_g, bool weight_channels_last) {
  const Ints input_size = sizes_of("x", x), weight_size = sizes_of("weight", weight);
  auto [dgamma, dbeta, finish] = batch_norm_bwd_reduce(dz, y, mean, rstd, gamma, affine, z);
  // The convolution's gradients finish dz as they load it, unless its mask or the residual asks for a pass.
  Tensor dy = dz;
  OptionalTensor raw = y, table = finish, dx, dweight, g;
  if (want_g || (z.has_value() && (want_dx || want_dweight))) {
    std::tie(dy, g) = batch_norm_bwd_apply(dz, y, finish, z, want_g);
    raw = table = std::nullopt;
  }
  if (want_dx)
    dx = std::get<0>(grouped_conv_bwd_input(dy, weight, input_size, stride, padding, dilation, groups, raw,
                                            table, std::nullopt, std::nullopt));
  if (want_dweight)
    dweight = grouped_conv_bwd_weight(dy, x, weight_size, stride, padding, dilation, groups, raw, table,
                                      std::nullopt, weight_channels_last);
  for (OptionalTensor* unwanted : {&dx, &dweight, &g})
    if (!unwanted->has_value()) *unwanted = empty({0}, x.scalar_type(), x);
  return {*dx, *dweight, dgamma, dbeta, *g};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gconv, m) {
  m.def(
      "conv_bn_relu_fwd_train(Tensor x, Tensor weight, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
      "SymInt groups, Tensor? gamma, Tensor? beta, Tensor? residual, float eps, bool relu) "
      "-> (Tensor z, Tensor y, Tensor mean, Tensor var, Tensor rstd, Tensor affine)");
  m.def(
      "conv_bn_relu_bwd(Tensor dz, Tensor x, Tensor weight, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, SymInt groups, Tensor y, Tensor mean, Tensor rstd, Tensor? gamma, Tensor? affine, "
      "Tensor? z, bool want_dx, bool want_dweight, bool want_g, bool weight_channels_last) "
      "-> (Tensor dx, Tensor dweight, Tensor dgamma, Tensor dbeta, Tensor g)");
}

STABLE_TORCH_LIBRARY_IMPL(gconv, CPU, m) {
  m.impl("conv_bn_relu_fwd_train", TORCH_BOX(&conv_bn_relu_fwd_train));
  m.impl("conv_bn_relu_bwd", TORCH_BOX(&conv_bn_relu_bwd));
}

}  // namespace gconv
