// grouped_conv for torch: schemas, checks, allocation and threads. The kernels are in cpu/.
#include "grouped_conv.h"

#include "conv_binding.h"

namespace gconv {

namespace {

struct Geometry {
  const char* op;
  const Ints &stride, &padding, &dilation;
  int64_t groups;

  // The shape of a convolution of [n, c, h, w] with a weight [k, c/groups, 3, 3].
  GroupedConvShape shape(int64_t n, int64_t c, int64_t h, int64_t w, const Shape& weight) const {
    check_pair(op, "stride", stride, 1, 2);
    check_pair(op, "dilation", dilation, 1, INT32_MAX);
    check_pair(op, "padding", padding, 0, 2 * std::min(dilation[0], dilation[1]));
    check(groups >= 1 && c % groups == 0, op, ": groups: want a divisor of the ", c, " input channels, got ",
          groups);
    const int64_t k = weight.size[0];
    check(weight.rank == 4 && weight.size[1] == c / groups && weight.size[2] == 3 && weight.size[3] == 3, op,
          ": weight: want [K, C/groups, 3, 3] with C/groups = ", c / groups, ", got ", weight);
    check(k >= 1 && c >= 1 && k % groups == 0, op, ": weight: want K divisible by groups = ", groups,
          ", got K = ", k);
    GroupedConvShape s{n,      h,         w,         c,          0,          0,           k,
                       groups, stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
    const int64_t reach_h = h + 2 * s.pad_h - 2 * s.dil_h, reach_w = w + 2 * s.pad_w - 2 * s.dil_w;
    check(h >= 1 && w >= 1 && reach_h >= 1 && reach_w >= 1, op, ": x: want a padded size of at least ",
          Shape{2 * s.dil_h + 1, 2 * s.dil_w + 1}, ", got ", Shape{h + 2 * s.pad_h, w + 2 * s.pad_w});
    s.oh = (reach_h - 1) / s.stride_h + 1;
    s.ow = (reach_w - 1) / s.stride_w + 1;
    return s;
  }
};

bool is_channels_last(const Tensor& w) {
  return w.stride(0) == w.size(1) * 9 && w.stride(1) == 1 && w.stride(2) == 3 * w.size(1) &&
         w.stride(3) == w.size(1);
}

WeightLayout weight_layout(int64_t channels, bool channels_last) {
  return channels_last ? WeightLayout{1, channels} : WeightLayout{9, 1};
}

// weight itself in either of torch's two layouts, else a contiguous copy.
Tensor dense_weight(const Tensor& weight) {
  return is_channels_last(weight) ? weight : torch::stable::contiguous(weight);
}

Tensor workspace_floats(int64_t floats, const Tensor& like) { return empty_floats({floats}, like); }

// What a convolution costs, in the elements that run_stage counts.
int64_t work_of(const GroupedConvShape& s) {
  return s.n * s.oh * s.ow * s.k * std::max<int64_t>(1, s.c / s.groups);
}
int64_t weight_work(const GroupedConvShape& s) { return s.k * (s.c / s.groups) * 9; }

// The kernels that run an op on `t`.
template <typename Params>
void choose_kernels(const char* op, const char* name, const Tensor& t, Params& p) {
  p.dtype = activation_dtype(op, name, t);
  p.isa = isa_current();
  p.winograd = winograd_current();
}

// Tensors the params point into; they must outlive the stages.
struct Forward : Output<GroupedConvFwdParams> {
  Tensor x, weight, workspace;

  Forward(const char* op, const Tensor& input, const Tensor& filters, const Geometry& geometry,
          const OptionalTensor& act, const OptionalTensor& into)
      : x(input), weight(filters) {
    choose_kernels(op, "x", x, p);
    p.shape = geometry.shape(x.size(0), x.size(1), x.size(2), x.size(3), shape_of(op, "weight", weight));
    const GroupedConvShape& s = p.shape;
    check_tensor(op, "weight", weight, x.scalar_type(), shape_of(op, "weight", weight));
    x = channels_adjacent(x);
    weight = dense_weight(weight);
    p.x = view_of(x);
    p.weight = weight.const_data_ptr();
    p.layout = weight_layout(s.c / s.groups, is_channels_last(weight));
    p.act = channel_floats(op, "act", act, {2, s.c});
    place(op, x, into);
  }

  void run() {
    const GroupedConvShape& s = p.shape;
    const int64_t floats = grouped_conv_fwd_workspace(p);
    workspace = workspace_floats(floats, x);
    p.workspace = floats_of(workspace);
    run_stage(grouped_conv_fwd_pack_cpu, p, floats);
    run_stage(grouped_conv_fwd_cpu, p, work_of(s));
    if (p.mean != nullptr) run_stage(grouped_conv_fwd_merge_cpu, p, s.n * s.k);
  }
};

Tensor grouped_conv_fwd(const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding,
                        const Ints& dilation, int64_t groups, const OptionalTensor& act,
                        const OptionalTensor& affine, const OptionalTensor& residual, bool relu) {
  const char* op = "grouped_conv_fwd";
  Forward f(op, x, weight, Geometry{op, stride, padding, dilation, groups}, act, std::nullopt);
  f.epilogue(op, affine, residual, relu);
  f.run();
  return f.y;
}

std::tuple<Tensor, Tensor> grouped_conv_fwd_into(const Tensor& x, const Tensor& weight, const Ints& stride,
                                                 const Ints& padding, const Ints& dilation, int64_t groups,
                                                 const OptionalTensor& act, const OptionalTensor& affine,
                                                 const OptionalTensor& residual, bool relu, bool want_stats,
                                                 const Tensor& y) {
  const char* op = "grouped_conv_fwd_into";
  Forward f(op, x, weight, Geometry{op, stride, padding, dilation, groups}, act, y);
  f.epilogue(op, affine, residual, relu);
  f.statistics(op, want_stats);
  f.run();
  return {f.mean, f.var};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> grouped_conv_fwd_stats(const Tensor& x, const Tensor& weight,
                                                          const Ints& stride, const Ints& padding,
                                                          const Ints& dilation, int64_t groups,
                                                          const OptionalTensor& act) {
  const char* op = "grouped_conv_fwd_stats";
  Forward f(op, x, weight, Geometry{op, stride, padding, dilation, groups}, act, std::nullopt);
  f.statistics(op, true);
  f.run();
  return {f.y, f.mean, f.var};
}

namespace {

Ints sizes_of(const char* op, const char* name, const Tensor& t) {
  check(t.dim() == 4, op, ": ", name, ": want 4 dimensions, got ", Described{t});
  return {t.size(0), t.size(1), t.size(2), t.size(3)};
}

struct InputGradient : Gradient<GroupedConvBwdInputParams> {
  Tensor weight, x, sums, dx;

  InputGradient(const char* op, const OutputGradient& from, const Tensor& filters, const Ints& input_size,
                const Geometry& geometry, const OptionalTensor& raw_input, const OptionalTensor& act)
      : weight(filters) {
    choose_kernels(op, "dy", from.dy, p);
    const ScalarType type = from.dy.scalar_type();
    const Shape input = shape_of(op, "input_size", input_size);
    check(input.size[0] >= 0 && input.size[1] >= 0, op, ": input_size: want sizes of at least 0, got ",
          input);
    p.shape = geometry.shape(input.size[0], input.size[1], input.size[2], input.size[3],
                             shape_of(op, "weight", weight));
    const GroupedConvShape& s = p.shape;
    check_tensor(op, "weight", weight, type, shape_of(op, "weight", weight));
    take(op, from, type);
    weight = dense_weight(weight);
    p.weight = weight.const_data_ptr();
    p.layout = weight_layout(s.c / s.groups, is_channels_last(weight));
    check(act.has_value() == raw_input.has_value(), op, ": ", raw_input.has_value() ? "act" : "x",
          ": want act and x together, got only ", raw_input.has_value() ? "x" : "act");
    sums = act.has_value() ? empty_floats({2, s.c}, dy) : empty_floats({0}, dy);
    if (act.has_value()) {
      x = activation(op, "x", *raw_input, type, input);
      p.x = view_of(x);
      p.act = channel_floats(op, "act", act, {4, s.c});
      p.sums = floats_of(sums);
    }
    dx = empty_channels_last(input, dy);
    p.dx = writable_view_of(dx);
  }

  void pack() {
    const int64_t floats = grouped_conv_bwd_input_workspace(p);
    workspace = workspace_floats(floats, dy);
    p.workspace = floats_of(workspace);
    run_stage(grouped_conv_bwd_input_pack_cpu, p, floats);
  }
  void merge() const {
    if (p.sums != nullptr) run_stage(grouped_conv_bwd_input_merge_cpu, p, p.shape.n * p.shape.c);
  }
};

struct WeightGradient : Gradient<GroupedConvBwdWeightParams> {
  Tensor x, dweight;

  // act may have rows beyond its first two, a and b.
  WeightGradient(const char* op, const OutputGradient& from, const Tensor& input, const Ints& weight_size,
                 const Geometry& geometry, const OptionalTensor& act, int64_t act_rows, bool channels_last)
      : x(input) {
    choose_kernels(op, "x", x, p);
    const ScalarType type = x.scalar_type();
    const Shape size = shape_of(op, "weight_size", weight_size);
    p.shape = geometry.shape(x.size(0), x.size(1), x.size(2), x.size(3), size);
    const GroupedConvShape& s = p.shape;
    take(op, from, type);
    x = channels_adjacent(x);
    p.x = view_of(x);
    p.act = channel_floats(op, "act", act, {act_rows, s.c});
    dweight = torch::stable::empty({size.size, 4}, type, std::nullopt, x.device(), std::nullopt,
                                   channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
    p.dweight = dweight.mutable_data_ptr();
    p.layout = weight_layout(s.c / s.groups, channels_last);
    workspace = workspace_floats(grouped_conv_bwd_weight_workspace(p), x);
    p.workspace = floats_of(workspace);
  }

  void merge() const { run_stage(grouped_conv_bwd_weight_merge_cpu, p, weight_work(p.shape)); }
};

std::tuple<Tensor, Tensor> grouped_conv_bwd_input(const Tensor& dy, const Tensor& weight,
                                                  const Ints& input_size, const Ints& stride,
                                                  const Ints& padding, const Ints& dilation, int64_t groups,
                                                  const OptionalTensor& y, const OptionalTensor& finish,
                                                  const OptionalTensor& x, const OptionalTensor& act) {
  const char* op = "grouped_conv_bwd_input";
  const Geometry geometry{op, stride, padding, dilation, groups};
  InputGradient input(op, {dy, y, finish}, weight, input_size, geometry, x, act);
  input.pack();
  run_stage(grouped_conv_bwd_input_cpu, input.p, work_of(input.p.shape));
  input.merge();
  return {input.dx, input.sums};
}

Tensor grouped_conv_bwd_weight(const Tensor& dy, const Tensor& x, const Ints& weight_size, const Ints& stride,
                               const Ints& padding, const Ints& dilation, int64_t groups,
                               const OptionalTensor& y, const OptionalTensor& finish,
                               const OptionalTensor& act, bool channels_last) {
  const char* op = "grouped_conv_bwd_weight";
  const Geometry geometry{op, stride, padding, dilation, groups};
  const WeightGradient weight(op, {dy, y, finish}, x, weight_size, geometry, act, 2, channels_last);
  run_stage(grouped_conv_bwd_weight_cpu, weight.p, work_of(weight.p.shape));
  weight.merge();
  return weight.dweight;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> grouped_conv_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                    const Ints& stride, const Ints& padding,
                                                    const Ints& dilation, int64_t groups,
                                                    const OptionalTensor& y, const OptionalTensor& finish,
                                                    const OptionalTensor& act, bool want_dx,
                                                    bool want_dweight, bool channels_last) {
  const char* op = "grouped_conv_bwd";
  const Geometry geometry{op, stride, padding, dilation, groups};
  const OutputGradient from{dy, y, finish};
  std::optional<InputGradient> input;
  std::optional<WeightGradient> filters;
  const OptionalTensor raw = act.has_value() ? OptionalTensor(x) : std::nullopt;
  if (want_dx) input.emplace(op, from, weight, sizes_of(op, "x", x), geometry, raw, act);
  if (want_dweight)
    filters.emplace(op, from, x, sizes_of(op, "weight", weight), geometry, act, 4, channels_last);
  if (input) input->pack();
  if (input && filters)
    run_stage(grouped_conv_bwd_cpu, GroupedConvBwdParams{input->p, filters->p}, 2 * work_of(input->p.shape));
  else if (input)
    run_stage(grouped_conv_bwd_input_cpu, input->p, work_of(input->p.shape));
  else if (filters)
    run_stage(grouped_conv_bwd_weight_cpu, filters->p, work_of(filters->p.shape));
  if (input) input->merge();
  if (filters) filters->merge();
  const auto nothing = [&] { return empty({0}, x.scalar_type(), x); };
  return {input ? input->dx : nothing(), filters ? filters->dweight : nothing(),
          input ? input->sums : empty_floats({0}, x)};
}

}  // namespace gconv

STABLE_TORCH_LIBRARY_IMPL(gconv, CPU, m) {
  m.impl("grouped_conv_fwd", TORCH_BOX(&gconv::grouped_conv_fwd));
  m.impl("grouped_conv_fwd_into", TORCH_BOX(&gconv::grouped_conv_fwd_into));
  m.impl("grouped_conv_fwd_stats", TORCH_BOX(&gconv::grouped_conv_fwd_stats));
  m.impl("grouped_conv_bwd_input", TORCH_BOX(&gconv::grouped_conv_bwd_input));
  m.impl("grouped_conv_bwd_weight", TORCH_BOX(&gconv::grouped_conv_bwd_weight));
  m.impl("grouped_conv_bwd", TORCH_BOX(&gconv::grouped_conv_bwd));
}
