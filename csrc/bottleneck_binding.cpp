// torch.ops.gconv.bottleneck_*: the ops of a bottleneck block, one after the other in one call. Between large
// kernels the caches are cold, and an op's way through the dispatcher takes tens of microseconds.
#include "conv_binding.h"

namespace gconv {

namespace {

using Tensors = std::vector<Tensor>;

// The layers in the order first, middle, last, shortcut; the last there where `down` has a stride.
std::tuple<Tensor, Tensors, Tensors> bottleneck_fwd_train(
    const Tensor& x, const OptionalTensor& residual, const Tensors& weights,
    const std::vector<OptionalTensor>& gammas, const std::vector<OptionalTensor>& betas,
    const std::vector<double>& eps, const Ints& first, const Ints& stride, const Ints& padding,
    const Ints& dilation, int64_t groups, const Ints& last, const Ints& down, const Tensors& running,
    const std::vector<double>& momenta) {
  const char* op = "bottleneck_fwd_train";
  const size_t layers = down.empty() ? 3 : 4;
  const auto check_count = [&](const char* name, size_t given) {
    check(given == layers, op, ": ", name, ": want one of each of the ", layers, " layers, got ", given);
  };
  check_count("weights", weights.size());
  check_count("gammas", gammas.size());
  check_count("betas", betas.size());
  check_count("eps", eps.size());
  check(running.empty() || running.size() == 3 * layers, op,
        ": running: want nothing or three tensors for each of the ", layers, " layers, got ", running.size());
  if (!running.empty()) check_count("momenta", momenta.size());
  check(down.empty() || !residual.has_value(), op, ": residual: want either it or down, got both");

  Tensors ys, tables, means, variances;
  const auto normalized = [&](const std::tuple<Tensor, Tensor, Tensor>& made) {
    const auto& [y, mean, var] = made;
    const size_t i = ys.size();
    tables.push_back(batch_norm_table(mean, var, gammas[i], betas[i], eps[i]));
    ys.push_back(y);
    means.push_back(mean);
    variances.push_back(var);
  };
  const auto affine = [&](size_t i) { return torch::stable::narrow(tables[i], 0, 0, 2); };
  normalized(pointwise_conv_fwd_stats(x, weights[0], first, std::nullopt));
  normalized(grouped_conv_fwd_stats(ys[0], weights[1], stride, padding, dilation, groups, affine(0)));
  normalized(pointwise_conv_fwd_stats(ys[1], weights[2], last, affine(1)));
  Tensor z;
  if (down.empty()) {
    z = batch_norm_apply(ys[2], affine(2), residual.has_value() ? *residual : x, std::nullopt, true);
  } else {
    normalized(pointwise_conv_fwd_stats(x, weights[3], down, std::nullopt));
    z = batch_norm_apply(ys[2], affine(2), ys[3], affine(3), true);
  }
  for (size_t i = 0; 3 * i < running.size(); ++i)  // last: a refused call changes no state
    batch_norm_update_running(running[3 * i], running[3 * i + 1], running[3 * i + 2], means[i], variances[i],
                              std::nullopt, ys[i].size(0) * ys[i].size(2) * ys[i].size(3), momenta[i]);
  return {z, ys, tables};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gconv, CPU, m) { m.impl("bottleneck_fwd_train", TORCH_BOX(&bottleneck_fwd_train)); }

}  // namespace gconv
