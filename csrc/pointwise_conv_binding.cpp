// pointwise_conv for torch: schemas, checks, allocation and threads. The kernels are in cpu/.
#include "pointwise_conv.h"

#include "conv_binding.h"

namespace gconv {

namespace {

// The shape of a convolution of an image, the argument `name`, with a weight [K, C, 1, 1], of which k is
// known.
template <typename Given>
PointwiseConvShape conv_shape(const char* op, const char* name, const Shape& image, const Given& given,
                              int64_t k, const Ints& stride) {
  check_pair(op, "stride", stride, 1, 2);
  const int64_t c = image.size[1], h = image.size[2], w = image.size[3];
  check(c >= 1 && k >= 1, op, ": weight: want at least one channel on each side, got ", Shape{k, c, 1, 1});
  check(h >= 1 && w >= 1, op, ": ", name, ": want an image with pixels, got ", given);
  return {image.size[0], h, w, c, (h - 1) / stride[0] + 1, (w - 1) / stride[1] + 1, k, stride[0], stride[1]};
}
PointwiseConvShape conv_shape(const char* op, const Tensor& x, int64_t k, const Ints& stride) {
  const Shape image{x.size(0), x.size(1), x.size(2), x.size(3)};
  return conv_shape(op, "x", image, Described{x}, k, stride);
}
PointwiseConvShape conv_shape(const char* op, const Tensor& x, const Tensor& weight, const Ints& stride,
                              bool* float_weight) {
  const int64_t k = weight.dim() > 0 ? weight.size(0) : 1;
  *float_weight = check_weight(op, weight, x.scalar_type(), {k, x.size(1), 1, 1});
  return conv_shape(op, x, k, stride);
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
struct Forward : Output<PointwiseConvFwdParams> {
  Tensor x, weight, workspace;

  Forward(const char* op, const Tensor& input, const Tensor& filters, const Ints& stride,
          const OptionalTensor& act, const OptionalTensor& into) {
    p.dtype = activation_dtype(op, "x", input);
    p.shape = conv_shape(op, input, filters, stride, &p.float_weight);
    weight = dense_weight(filters);
    p.weight = weight.const_data_ptr();
    read(op, input, act, into);
  }
  Forward(const PackedCall& call, const OptionalTensor& into) : weight(call.packed) {
    p.dtype = activation_dtype(call.op, "x", call.x);
    check(call.weight.size[1] == call.x.size(1), call.op,
          ": weight_size: want [K, C, 1, 1] with C = ", call.x.size(1), ", got ", call.weight);
    p.shape = conv_shape(call.op, call.x, call.weight.size[0], call.stride);
    read(call.op, call.x, call.act, into);
    const auto header = PackedHeader::of(pointwise_conv_packing(p), call.weight, 1);
    p.packed = packed_ahead(call.op, weight, header, pointwise_conv_packed_floats(p), call.weight);
    epilogue(call.op, call.affine, call.residual, call.relu);
  }

  void run() {
    const PointwiseConvShape& s = p.shape;
    const int64_t floats = pointwise_conv_fwd_workspace(p);
    workspace = empty_floats({floats}, x);
    p.workspace = floats_of(workspace);
    if (p.packed == nullptr) run_stage(pointwise_conv_fwd_pack_cpu, p, s.c * s.k);
    run_stage(pointwise_conv_fwd_cpu, p, work_of(s));
    if (p.mean != nullptr) run_stage(pointwise_conv_fwd_merge_cpu, p, s.n * s.k);
  }

 private:
  void read(const char* op, const Tensor& input, const OptionalTensor& act, const OptionalTensor& into) {
    p.isa = isa_current(), p.strassen = strassen_current();
    x = channels_adjacent(input);
    p.x = view_of(x);
    p.act = channel_floats(op, "act", act, {2, p.shape.c});
    place(op, x, into);
  }
};

// The gradients of one call; what they point into must outlive the stages.
struct Backward : Gradient<PointwiseConvBwdParams> {
  const char* op;
  Tensor x, weight, residual, dx, dweight, sums;

  Backward(const char* name, const OutputGradient& from, const Tensor& input, const Tensor& filters,
           const Ints& stride, const OptionalTensor& act)
      : op(name), x(input), weight(filters) {
    p.dtype = activation_dtype(op, "x", x);
    p.isa = isa_current(), p.strassen = strassen_current();
    p.shape = conv_shape(op, x, weight, stride, &p.float_weight);
    take(op, from, x);
    p.act = channel_floats(op, "act", act, {4, p.shape.c});
    dx = empty({0}, x.scalar_type(), x), dweight = empty({0}, x.scalar_type(), x),
    sums = empty_floats({0}, x);
  }
  Shape input_size() const { return {p.shape.n, p.shape.c, p.shape.h, p.shape.w}; }

  void to_input(const Tensor& to) {
    dx = to;
    p.dx = writable_view_of(dx);
    weight = dense_weight(weight);
    p.weight = weight.const_data_ptr();
    if (p.act == nullptr) return;
    read_input();
    sums = empty_floats({2, p.shape.c}, x);
    p.sums = floats_of(sums);
  }
  void to_weight(bool channels_last) {
    read_input();
    const Shape size{p.shape.k, p.shape.c, 1, 1};
    dweight = empty(size, p.float_weight ? ScalarType::Float : x.scalar_type(), x,
                    channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
    p.dweight = dweight.mutable_data_ptr();
  }
  void run(bool want_dx, bool want_dweight) {
    const PointwiseConvShape& s = p.shape;
    if (!want_dx && !want_dweight) return;
    workspace = empty_floats({pointwise_conv_bwd_workspace(p)}, x);
    p.workspace = floats_of(workspace);
    if (p.dx.data != nullptr) run_stage(pointwise_conv_bwd_pack_cpu, p, s.c * s.k);  // null: no images
    run_stage(pointwise_conv_bwd_cpu, p, (want_dx + want_dweight) * work_of(s));
    run_stage(pointwise_conv_bwd_merge_cpu, p, s.c * s.k);
  }

 private:
  void read_input() {
    x = channels_adjacent(x);
    p.x = view_of(x);
  }
};

}  // namespace

Tensor pointwise_conv_fwd(const Tensor& x, const Tensor& weight, const Ints& stride,
                          const OptionalTensor& act, const OptionalTensor& affine,
                          const OptionalTensor& residual, bool relu) {
  const char* op = "pointwise_conv_fwd";
  Forward f(op, x, weight, stride, act, std::nullopt);
  f.epilogue(op, affine, residual, relu);
  f.run();
  return f.y;
}

std::tuple<Tensor, Tensor> pointwise_conv_fwd_into(const Tensor& x, const Tensor& weight, const Ints& stride,
                                                   const OptionalTensor& act, const OptionalTensor& affine,
                                                   const OptionalTensor& residual, bool relu, bool want_stats,
                                                   const Tensor& y) {
  const char* op = "pointwise_conv_fwd_into";
  Forward f(op, x, weight, stride, act, y);
  f.epilogue(op, affine, residual, relu);
  f.statistics(op, want_stats);
  f.run();
  return {f.mean, f.var};
}

std::tuple<Tensor, Tensor, Tensor> pointwise_conv_fwd_stats(const Tensor& x, const Tensor& weight,
                                                            const Ints& stride, const OptionalTensor& act) {
  const char* op = "pointwise_conv_fwd_stats";
  Forward f(op, x, weight, stride, act, std::nullopt);
  f.statistics(op, true);
  f.run();
  return {f.y, f.mean, f.var};
}

Tensor pointwise_conv_pack(const Tensor& weight, const Ints& input_size, const Ints& stride) {
  const char* op = "conv_pack";
  const Shape input = shape_of(op, "input_size", input_size), size = shape_of(op, "weight", weight);
  PointwiseConvFwdParams p{};
  p.dtype = activation_dtype(op, "weight", weight);
  p.isa = isa_current(), p.strassen = strassen_current();
  check(input.size[1] == size.size[1], op, ": weight: want [K, ", input.size[1], ", 1, 1], got ", size);
  p.shape = conv_shape(op, "input_size", input, input, size.size[0], stride);
  const Tensor dense = dense_weight(weight);
  p.weight = dense.const_data_ptr();
  const auto header = PackedHeader::of(pointwise_conv_packing(p), size, 1);
  return pack_ahead(p, header, pointwise_conv_packed_floats(p), dense, pointwise_conv_pack_weights_cpu);
}

Tensor pointwise_conv_fwd_packed(const PackedCall& call, const OptionalTensor& into) {
  Forward f(call, into);
  f.run();
  return f.y;
}

std::tuple<Tensor, Tensor, Tensor> pointwise_conv_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                      const Ints& stride, const OptionalTensor& y,
                                                      const OptionalTensor& finish, const OptionalTensor& act,
                                                      const OptionalTensor& residual, bool want_dx,
                                                      bool want_dweight, bool channels_last) {
  const char* op = "pointwise_conv_bwd";
  Backward b(op, {dy, y, finish}, x, weight, stride, act);
  check(!act.has_value() || !residual.has_value(), op, ": residual: want none together with act");
  if (residual.has_value())
    b.residual = activation(op, "residual", *residual, x.scalar_type(), b.input_size());
  if (want_dx) b.to_input(empty_channels_last(b.input_size(), x));
  if (want_dx && residual.has_value()) b.p.residual = view_of(b.residual);
  if (want_dweight) b.to_weight(channels_last);
  b.run(want_dx, want_dweight);
  return {b.dx, b.dweight, b.sums};
}

std::tuple<Tensor, Tensor> pointwise_conv_bwd_add(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                  const Ints& stride, const OptionalTensor& y,
                                                  const OptionalTensor& finish, const Tensor& act,
                                                  const Tensor& dx, bool want_dweight, bool channels_last) {
  const char* op = "pointwise_conv_bwd_add";
  Backward b(op, {dy, y, finish}, x, weight, stride, act);
  check_output(op, "dx", dx, x.scalar_type(), b.input_size());
  b.p.add = true;
  b.to_input(dx);
  if (want_dweight) b.to_weight(channels_last);
  b.run(true, want_dweight);
  return {b.dweight, b.sums};
}

}  // namespace gconv

STABLE_TORCH_LIBRARY_IMPL(gconv, CPU, m) {
  m.impl("pointwise_conv_fwd", TORCH_BOX(&gconv::pointwise_conv_fwd));
  m.impl("pointwise_conv_fwd_into", TORCH_BOX(&gconv::pointwise_conv_fwd_into));
  m.impl("pointwise_conv_fwd_stats", TORCH_BOX(&gconv::pointwise_conv_fwd_stats));
  m.impl("pointwise_conv_bwd", TORCH_BOX(&gconv::pointwise_conv_bwd));
  m.impl("pointwise_conv_bwd_add", TORCH_BOX(&gconv::pointwise_conv_bwd_add));
}
