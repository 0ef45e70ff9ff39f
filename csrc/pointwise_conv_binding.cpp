// pointwise_conv for torch: schemas, checks, allocation and threads. The kernels are in cpu/.
#include "pointwise_conv.h"

#include "conv_binding.h"

namespace gconv {

namespace {

// The shape of a convolution of x with a weight [K, C, 1, 1].
PointwiseConvShape conv_shape(const char* op, const Tensor& x, const Tensor& weight, const Ints& stride) {
  check_pair(op, "stride", stride, 1, 2);
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  check_tensor(op, "weight", weight, x.scalar_type(), {weight.dim() > 0 ? weight.size(0) : 1, c, 1, 1});
  check(c >= 1 && weight.size(0) >= 1, op, ": weight: want at least one channel on each side, got ",
        Described{weight});
  check(h >= 1 && w >= 1, op, ": x: want an image with pixels, got ", Described{x});
  return {x.size(0),      h,         w,        c, (h - 1) / stride[0] + 1, (w - 1) / stride[1] + 1,
          weight.size(0), stride[0], stride[1]};
}

// weight itself where it is [K, C] in memory, in either of torch's layouts, else a copy that is.
Tensor dense_weight(const Tensor& weight) {
  const int64_t c = weight.size(1);
  const bool dense = (weight.size(0) == 1 || weight.stride(0) == c) && (c == 1 || weight.stride(1) == 1);
  return dense ? weight : torch::stable::contiguous(weight);
}

int64_t work_of(const PointwiseConvShape& s) {
  return s.n * s.oh * s.ow * s.k * std::max<int64_t>(1, s.c / 9);
}

// Tensors the params point into; they must outlive the stages.
struct Forward {
  PointwiseConvFwdParams p{};
  Tensor x, weight, y, workspace;

  Forward(const char* op, const Tensor& input, const Tensor& filters, const Ints& stride,
          const OptionalTensor& act) {
    p.dtype = activation_dtype(op, "x", input);
    p.isa = isa_current();
    p.shape = conv_shape(op, input, filters, stride);
    const PointwiseConvShape& s = p.shape;
    x = channels_adjacent(input);
    weight = dense_weight(filters);
    y = empty_channels_last({s.n, s.k, s.oh, s.ow}, x);
    p.x = view_of(x);
    p.weight = weight.const_data_ptr();
    p.act = channel_floats(op, "act", act, {2, s.c});
    p.y = writable_view_of(y);
  }

  void run() {
    const PointwiseConvShape& s = p.shape;
    const int64_t floats = pointwise_conv_fwd_workspace(p);
    workspace = empty_floats({floats}, x);
    p.workspace = floats_of(workspace);
    run_stage(pointwise_conv_fwd_pack_cpu, p, s.c * s.k);
    run_stage(pointwise_conv_fwd_cpu, p, work_of(s));
    if (p.mean != nullptr) run_stage(pointwise_conv_fwd_merge_cpu, p, s.n * s.k);
  }
};

}  // namespace

Tensor pointwise_conv_fwd(const Tensor& x, const Tensor& weight, const Ints& stride,
                          const OptionalTensor& act, const OptionalTensor& affine,
                          const OptionalTensor& residual, bool relu) {
  const char* op = "pointwise_conv_fwd";
  Forward f(op, x, weight, stride, act);
  const PointwiseConvShape& s = f.p.shape;
  f.p.affine = channel_floats(op, "affine", affine, {2, s.k});
  f.p.relu = relu;
  Tensor added;
  if (residual.has_value()) {
    added = activation(op, "residual", *residual, x.scalar_type(), {s.n, s.k, s.oh, s.ow});
    f.p.residual = view_of(added);
  }
  f.run();
  return f.y;
}

std::tuple<Tensor, Tensor, Tensor> pointwise_conv_fwd_stats(const Tensor& x, const Tensor& weight,
                                                            const Ints& stride, const OptionalTensor& act) {
  Forward f("pointwise_conv_fwd_stats", x, weight, stride, act);
  Tensor mean = empty_floats({f.p.shape.k}, f.x), var = empty_floats({f.p.shape.k}, f.x);
  f.p.mean = floats_of(mean);
  f.p.var = floats_of(var);
  f.run();
  return {f.y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> pointwise_conv_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                      const Ints& stride, const OptionalTensor& y,
                                                      const OptionalTensor& finish, const OptionalTensor& act,
                                                      const OptionalTensor& residual, bool want_dx,
                                                      bool want_dweight, bool channels_last) {
  const char* op = "pointwise_conv_bwd";
  Gradient<PointwiseConvBwdParams> g;
  PointwiseConvBwdParams& p = g.p;
  p.dtype = activation_dtype(op, "x", x);
  p.isa = isa_current();
  p.shape = conv_shape(op, x, weight, stride);
  const PointwiseConvShape& s = p.shape;
  const ScalarType type = x.scalar_type();
  const Shape input{s.n, s.c, s.h, s.w};
  g.take(op, {dy, y, finish}, type);
  check(!act.has_value() || !residual.has_value(), op, ": residual: want none together with act");
  p.act = channel_floats(op, "act", act, {4, s.c});
  Tensor dx = empty({0}, type, x), dweight = empty({0}, type, x), sums = empty_floats({0}, x);
  Tensor source = x, filters, added;
  if (want_dweight || (want_dx && act.has_value())) {
    source = channels_adjacent(x);
    p.x = view_of(source);
  }
  if (residual.has_value()) added = activation(op, "residual", *residual, type, input);
  if (want_dx) {
    filters = dense_weight(weight);
    p.weight = filters.const_data_ptr();
    dx = empty_channels_last(input, x);
    p.dx = writable_view_of(dx);
    if (residual.has_value()) p.residual = view_of(added);
    if (act.has_value()) {
      sums = empty_floats({2, s.c}, x);
      p.sums = floats_of(sums);
    }
  }
  if (want_dweight) {
    const Shape size{s.k, s.c, 1, 1};
    dweight = torch::stable::empty({size.size, 4}, type, std::nullopt, x.device(), std::nullopt,
                                   channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
    p.dweight = dweight.mutable_data_ptr();
  }
  g.workspace = empty_floats({pointwise_conv_bwd_workspace(p)}, x);
  p.workspace = floats_of(g.workspace);
  if (p.dx.data != nullptr) run_stage(pointwise_conv_bwd_pack_cpu, p, s.c * s.k);  // null: no images
  if (want_dx || want_dweight) {
    run_stage(pointwise_conv_bwd_cpu, p, (want_dx + want_dweight) * work_of(s));
    run_stage(pointwise_conv_bwd_merge_cpu, p, s.c * s.k);
  }
  return {dx, dweight, sums};
}

}  // namespace gconv

STABLE_TORCH_LIBRARY_FRAGMENT(gconv, m) {
  m.def(
      "pointwise_conv_fwd(Tensor x, Tensor weight, SymInt[] stride, Tensor? act, Tensor? affine, "
      "Tensor? residual, bool relu) -> Tensor");
  m.def(
      "pointwise_conv_fwd_stats(Tensor x, Tensor weight, SymInt[] stride, Tensor? act) "
      "-> (Tensor y, Tensor mean, Tensor var)");
  m.def(
      "pointwise_conv_bwd(Tensor dy, Tensor x, Tensor weight, SymInt[] stride, Tensor? y, Tensor? finish, "
      "Tensor? act, Tensor? residual, bool want_dx, bool want_dweight, bool channels_last) "
      "-> (Tensor dx, Tensor dweight, Tensor sums)");
}

STABLE_TORCH_LIBRARY_IMPL(gconv, CPU, m) {
  m.impl("pointwise_conv_fwd", TORCH_BOX(&gconv::pointwise_conv_fwd));
  m.impl("pointwise_conv_fwd_stats", TORCH_BOX(&gconv::pointwise_conv_fwd_stats));
  m.impl("pointwise_conv_bwd", TORCH_BOX(&gconv::pointwise_conv_bwd));
}
