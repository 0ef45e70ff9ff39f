// The ops as C++ functions, for an op that runs several of them. They check and allocate as when called from
// Python.
#pragma once
#include <tuple>
#include <vector>

#include "torch_tensors.h"

namespace gconv {

using Ints = std::vector<int64_t>;

// The arguments of a forward by weights that were packed ahead, of a weight of that size.
struct PackedCall {
  const char* op;
  const Tensor &x, &packed;
  const Shape& weight;
  const Ints &stride, &padding, &dilation;
  int64_t groups;
  const OptionalTensor &act, &affine, &residual;
  bool relu;
};

Tensor grouped_conv_pack(const Tensor& weight, const Ints& input_size, const Ints& stride,
                         const Ints& padding, const Ints& dilation, int64_t groups);
Tensor grouped_conv_fwd_packed(const PackedCall& call, const OptionalTensor& into);
Tensor pointwise_conv_pack(const Tensor& weight, const Ints& input_size, const Ints& stride);
Tensor pointwise_conv_fwd_packed(const PackedCall& call, const OptionalTensor& into);
std::tuple<Tensor, Tensor, Tensor> grouped_conv_fwd_stats(const Tensor& x, const Tensor& weight,
                                                          const Ints& stride, const Ints& padding,
                                                          const Ints& dilation, int64_t groups,
                                                          const OptionalTensor& act);
std::tuple<Tensor, Tensor, Tensor> grouped_conv_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                    const Ints& stride, const Ints& padding,
                                                    const Ints& dilation, int64_t groups,
                                                    const OptionalTensor& y, const OptionalTensor& finish,
                                                    const OptionalTensor& act, bool want_dx,
                                                    bool want_dweight, bool channels_last);
Tensor pointwise_conv_fwd(const Tensor& x, const Tensor& weight, const Ints& stride,
                          const OptionalTensor& act, const OptionalTensor& affine,
                          const OptionalTensor& residual, bool relu);
std::tuple<Tensor, Tensor, Tensor> pointwise_conv_fwd_stats(const Tensor& x, const Tensor& weight,
                                                            const Ints& stride, const OptionalTensor& act);
std::tuple<Tensor, Tensor, Tensor> pointwise_conv_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                      const Ints& stride, const OptionalTensor& y,
                                                      const OptionalTensor& finish, const OptionalTensor& act,
                                                      const OptionalTensor& residual, bool want_dx,
                                                      bool want_dweight, bool channels_last);
void batch_norm_update_running(const Tensor& running_mean, const Tensor& running_var,
                               const OptionalTensor& num_batches_tracked, const Tensor& mean,
                               const Tensor& var, const OptionalTensor& shift, int64_t count,
                               std::optional<double> momentum);
std::tuple<Tensor, Tensor> batch_norm_fold(const Tensor& mean, const Tensor& var, const OptionalTensor& gamma,
                                           const OptionalTensor& beta, double eps);
// [4, C]: the affine a and b, mean and rstd.
Tensor batch_norm_table(const Tensor& mean, const Tensor& var, const OptionalTensor& gamma,
                        const OptionalTensor& beta, double eps);
Tensor batch_norm_apply(const Tensor& x, const Tensor& affine, const OptionalTensor& residual,
                        const OptionalTensor& residual_affine, bool relu);
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_bwd_reduce(const Tensor& dz, const Tensor& x,
                                                                 const Tensor& mean, const Tensor& rstd,
                                                                 const OptionalTensor& gamma,
                                                                 const OptionalTensor& affine,
                                                                 const OptionalTensor& z, bool want_g);
std::tuple<Tensor, Tensor> batch_norm_bwd_apply(const Tensor& dz, const Tensor& x, const Tensor& finish,
                                                const OptionalTensor& z, bool want_g);

}  // namespace gconv
