// The ops as C++ functions, for an op that runs several of them. They check and allocate as when called from
// Python.
#pragma once
#include <tuple>
#include <vector>

#include "torch_tensors.h"

namespace gconv {

using Ints = std::vector<int64_t>;

std::tuple<Tensor, Tensor, Tensor> grouped_conv_fwd_stats(const Tensor& x, const Tensor& weight,
                                                          const Ints& stride, const Ints& padding,
                                                          const Ints& dilation, int64_t groups,
                                                          const OptionalTensor& act);
std::tuple<Tensor, Tensor> grouped_conv_bwd_input(const Tensor& dy, const Tensor& weight,
                                                  const Ints& input_size, const Ints& stride,
                                                  const Ints& padding, const Ints& dilation, int64_t groups,
                                                  const OptionalTensor& y, const OptionalTensor& finish,
                                                  const OptionalTensor& x, const OptionalTensor& act);
Tensor grouped_conv_bwd_weight(const Tensor& dy, const Tensor& x, const Ints& weight_size, const Ints& stride,
                               const Ints& padding, const Ints& dilation, int64_t groups,
                               const OptionalTensor& y, const OptionalTensor& finish,
                               const OptionalTensor& act, bool channels_last);
std::tuple<Tensor, Tensor> batch_norm_fold(const Tensor& mean, const Tensor& var, const OptionalTensor& gamma,
                                           const OptionalTensor& beta, double eps);
Tensor batch_norm_apply(const Tensor& x, const Tensor& affine, const OptionalTensor& residual, bool relu);
std::tuple<Tensor, Tensor, Tensor> batch_norm_bwd_reduce(const Tensor& dz, const Tensor& x,
                                                         const Tensor& mean, const Tensor& rstd,
                                                         const OptionalTensor& gamma,
                                                         const OptionalTensor& affine,
                                                         const OptionalTensor& z);
std::tuple<Tensor, Tensor> batch_norm_bwd_apply(const Tensor& dz, const Tensor& x, const Tensor& finish,
                                                const OptionalTensor& z, bool want_g);

}  // namespace gconv
