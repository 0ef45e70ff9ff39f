// The ops of grouped_conv for torch, whatever runs their kernels: checks, layout and allocation. A set of
// kernels is a struct with
//
//   DEVICE             whose tensors it takes
//   prepare(p)         sets what concerns it alone in the params of an op
//   workspace(p)       how many floats of scratch memory the op needs
//   run(p, workspace)  the op, all stages of it, with so many floats in p.workspace; of GroupedConvBwdParams
//                      those of the input gradient
#pragma once
#include "conv_binding.h"
#include "grouped_conv.h"

namespace gconv {

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

inline bool is_channels_last(const Tensor& w) {
  return w.stride(0) == w.size(1) * 9 && w.stride(1) == 1 && w.stride(2) == 3 * w.size(1) &&
         w.stride(3) == w.size(1);
}

inline WeightLayout weight_layout(int64_t channels, bool channels_last) {
  return channels_last ? WeightLayout{1, channels} : WeightLayout{9, 1};
}

// weight itself in either of torch's two layouts, else a contiguous copy.
inline Tensor dense_weight(const Tensor& weight) {
  return is_channels_last(weight) ? weight : torch::stable::contiguous(weight);
}

// The scratch memory of an op, on the device of `like`.
template <typename Kernels, typename Params>
Tensor reserve(const Kernels& kernels, Params& p, const Tensor& like) {
  kernels.prepare(p);
  const Tensor workspace = empty_floats({kernels.workspace(p)}, like);
  p.workspace = floats_of(workspace);
  return workspace;
}

// Tensors the params point into; they must outlive the stages.
struct Forward : Output<GroupedConvFwdParams> {
  Tensor x, weight, workspace;

  Forward(DeviceType home, const char* op, const Tensor& input, const Tensor& filters,
          const Geometry& geometry, const OptionalTensor& act, const OptionalTensor& into)
      : Forward(home, op, input, shape_of(op, "weight", filters), geometry, act, into) {
    p.float_weight = check_weight(op, filters, x.scalar_type(), shape_of(op, "weight", filters), x.device());
    weight = dense_weight(filters);
    p.weight = weight.const_data_ptr();
    p.layout = weight_layout(p.shape.c / p.shape.groups, is_channels_last(weight));
  }
  // Without a weight, whose size alone is known.
  Forward(DeviceType home, const char* op, const Tensor& input, const Shape& weight_size,
          const Geometry& geometry, const OptionalTensor& act, const OptionalTensor& into)
      : x(input), weight(input) {
    p.dtype = activation_dtype(op, "x", x, home);
    p.shape = geometry.shape(x.size(0), x.size(1), x.size(2), x.size(3), weight_size);
    x = channels_adjacent(x);
    p.x = view_of(x);
    p.act = channel_floats(op, "act", act, {2, p.shape.c}, x.device());
    place(op, x, into);
  }

  template <typename Kernels>
  void run(const Kernels& kernels) {
    workspace = reserve(kernels, p, x);
    kernels.run(p, workspace.numel());
  }
};

inline Ints sizes_of(const char* op, const char* name, const Tensor& t) {
  check(t.dim() == 4, op, ": ", name, ": want 4 dimensions, got ", Described{t});
  return {t.size(0), t.size(1), t.size(2), t.size(3)};
}

struct InputGradient : Gradient<GroupedConvBwdInputParams> {
  Tensor weight, x, sums, dx;

  InputGradient(DeviceType home, const char* op, const OutputGradient& from, const Tensor& filters,
                const Ints& input_size, const Geometry& geometry, const OptionalTensor& raw_input,
                const OptionalTensor& act)
      : weight(filters) {
    p.dtype = activation_dtype(op, "dy", from.dy, home);
    const ScalarType type = from.dy.scalar_type();
    const Shape input = shape_of(op, "input_size", input_size);
    check(input.size[0] >= 0 && input.size[1] >= 0, op, ": input_size: want sizes of at least 0, got ",
          input);
    p.shape = geometry.shape(input.size[0], input.size[1], input.size[2], input.size[3],
                             shape_of(op, "weight", weight));
    const GroupedConvShape& s = p.shape;
    p.float_weight = check_weight(op, weight, type, shape_of(op, "weight", weight), from.dy.device());
    take(op, from, from.dy);
    weight = dense_weight(weight);
    p.weight = weight.const_data_ptr();
    p.layout = weight_layout(s.c / s.groups, is_channels_last(weight));
    check(act.has_value() == raw_input.has_value(), op, ": ", raw_input.has_value() ? "act" : "x",
          ": want act and x together, got only ", raw_input.has_value() ? "x" : "act");
    sums = act.has_value() ? empty_floats({2, s.c}, dy) : empty_floats({0}, dy);
    if (act.has_value()) {
      x = activation(op, "x", *raw_input, type, input, dy.device());
      p.x = view_of(x);
      p.act = channel_floats(op, "act", act, {4, s.c}, dy.device());
      p.sums = floats_of(sums);
    }
    dx = empty_channels_last(input, dy);
    p.dx = writable_view_of(dx);
  }
};

struct WeightGradient : Gradient<GroupedConvBwdWeightParams> {
  Tensor x, dweight;

  // act may have rows beyond its first two, a and b. The weight is of x's type or, `float_weight`, of
  // float32.
  WeightGradient(DeviceType home, const char* op, const OutputGradient& from, const Tensor& input,
                 const Ints& weight_size, bool float_weight, const Geometry& geometry,
                 const OptionalTensor& act, int64_t act_rows, bool channels_last)
      : x(input) {
    p.float_weight = float_weight;
    p.dtype = activation_dtype(op, "x", x, home);
    const ScalarType type = x.scalar_type();
    const Shape size = shape_of(op, "weight_size", weight_size);
    p.shape = geometry.shape(x.size(0), x.size(1), x.size(2), x.size(3), size);
    const GroupedConvShape& s = p.shape;
    take(op, from, x);
    x = channels_adjacent(x);
    p.x = view_of(x);
    p.act = channel_floats(op, "act", act, {act_rows, s.c}, x.device());
    dweight = empty(size, float_weight ? ScalarType::Float : type, x,
                    channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
    p.dweight = dweight.mutable_data_ptr();
    p.layout = weight_layout(s.c / s.groups, channels_last);
  }
};

// The ops as their schemas have them; what a set of kernels needs to know of a call comes last.
template <typename Kernels, typename... Context>
struct GroupedConvOps {
  static Tensor fwd(const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding,
                    const Ints& dilation, int64_t groups, const OptionalTensor& act,
                    const OptionalTensor& affine, const OptionalTensor& residual, bool relu,
                    Context... context) {
    const char* op = "grouped_conv_fwd";
    const Geometry geometry{op, stride, padding, dilation, groups};
    Forward f(Kernels::DEVICE, op, x, weight, geometry, act, std::nullopt);
    f.epilogue(op, affine, residual, relu);
    f.run(Kernels{context...});
    return f.y;
  }

  static std::tuple<Tensor, Tensor> fwd_into(const Tensor& x, const Tensor& weight, const Ints& stride,
                                             const Ints& padding, const Ints& dilation, int64_t groups,
                                             const OptionalTensor& act, const OptionalTensor& affine,
                                             const OptionalTensor& residual, bool relu, bool want_stats,
                                             const Tensor& y, Context... context) {
    const char* op = "grouped_conv_fwd_into";
    const Geometry geometry{op, stride, padding, dilation, groups};
    Forward f(Kernels::DEVICE, op, x, weight, geometry, act, y);
    f.epilogue(op, affine, residual, relu);
    f.statistics(op, want_stats);
    f.run(Kernels{context...});
    return {f.mean, f.var};
  }

  static std::tuple<Tensor, Tensor, Tensor> fwd_stats(const Tensor& x, const Tensor& weight,
                                                      const Ints& stride, const Ints& padding,
                                                      const Ints& dilation, int64_t groups,
                                                      const OptionalTensor& act, Context... context) {
    const char* op = "grouped_conv_fwd_stats";
    const Geometry geometry{op, stride, padding, dilation, groups};
    Forward f(Kernels::DEVICE, op, x, weight, geometry, act, std::nullopt);
    f.statistics(op, true);
    f.run(Kernels{context...});
    return {f.y, f.mean, f.var};
  }

  static std::tuple<Tensor, Tensor> bwd_input(const Tensor& dy, const Tensor& weight, const Ints& input_size,
                                              const Ints& stride, const Ints& padding, const Ints& dilation,
                                              int64_t groups, const OptionalTensor& y,
                                              const OptionalTensor& finish, const OptionalTensor& x,
                                              const OptionalTensor& act, Context... context) {
    const char* op = "grouped_conv_bwd_input";
    const Geometry geometry{op, stride, padding, dilation, groups};
    InputGradient input(Kernels::DEVICE, op, {dy, y, finish}, weight, input_size, geometry, x, act);
    run_gradient(Kernels{context...}, input);
    return {input.dx, input.sums};
  }

  static Tensor bwd_weight(const Tensor& dy, const Tensor& x, const Ints& weight_size, const Ints& stride,
                           const Ints& padding, const Ints& dilation, int64_t groups, const OptionalTensor& y,
                           const OptionalTensor& finish, const OptionalTensor& act, bool channels_last,
                           Context... context) {
    const char* op = "grouped_conv_bwd_weight";
    const Geometry geometry{op, stride, padding, dilation, groups};
    WeightGradient weight(Kernels::DEVICE, op, {dy, y, finish}, x, weight_size, false, geometry, act, 2,
                          channels_last);
    run_gradient(Kernels{context...}, weight);
    return weight.dweight;
  }

  static std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                const Ints& stride, const Ints& padding, const Ints& dilation,
                                                int64_t groups, const OptionalTensor& y,
                                                const OptionalTensor& finish, const OptionalTensor& act,
                                                bool want_dx, bool want_dweight, bool channels_last,
                                                Context... context) {
    const char* op = "grouped_conv_bwd";
    const Kernels kernels{context...};
    const DeviceType home = Kernels::DEVICE;
    const Geometry geometry{op, stride, padding, dilation, groups};
    const OutputGradient from{dy, y, finish};
    std::optional<InputGradient> input;
    std::optional<WeightGradient> filters;
    const OptionalTensor raw = act.has_value() ? OptionalTensor(x) : std::nullopt;
    if (want_dx) input.emplace(home, op, from, weight, sizes_of(op, "x", x), geometry, raw, act);
    if (want_dweight) {
      const bool wider =
          check_weight(op, weight, x.scalar_type(), shape_of(op, "weight", weight), x.device());
      filters.emplace(home, op, from, x, sizes_of(op, "weight", weight), wider, geometry, act, 4,
                      channels_last);
    }
    if (input && filters) {
      input->workspace = reserve(kernels, input->p, x);
      filters->workspace = reserve(kernels, filters->p, x);
      kernels.run(GroupedConvBwdParams{input->p, filters->p}, input->workspace.numel());
    } else if (input) {
      run_gradient(kernels, *input);
    } else if (filters) {
      run_gradient(kernels, *filters);
    }
    const auto nothing = [&] { return empty({0}, x.scalar_type(), x); };
    return {input ? input->dx : nothing(), filters ? filters->dweight : nothing(),
            input ? input->sums : empty_floats({0}, x)};
  }

 private:
  template <typename Gradient>
  static void run_gradient(const Kernels& kernels, Gradient& gradient) {
    gradient.workspace = reserve(kernels, gradient.p, gradient.dy);
    kernels.run(gradient.p, gradient.workspace.numel());
  }
};

// For STABLE_TORCH_LIBRARY_IMPL: the ops of `Ops`, a GroupedConvOps, under the names of the schemas.
template <typename Ops>
void implement_grouped_conv(torch::stable::detail::StableLibrary& m) {
  m.impl("grouped_conv_fwd", TORCH_BOX(&Ops::fwd));
  m.impl("grouped_conv_fwd_into", TORCH_BOX(&Ops::fwd_into));
  m.impl("grouped_conv_fwd_stats", TORCH_BOX(&Ops::fwd_stats));
  m.impl("grouped_conv_bwd_input", TORCH_BOX(&Ops::bwd_input));
  m.impl("grouped_conv_bwd_weight", TORCH_BOX(&Ops::bwd_weight));
  m.impl("grouped_conv_bwd", TORCH_BOX(&Ops::bwd));
}

}  // namespace gconv
