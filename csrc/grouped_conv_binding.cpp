// grouped_conv for torch on a CPU: the stages of each op on torch's own threads. The kernels are in cpu/.
#include "grouped_conv_binding.h"

namespace gconv {

namespace {

// What a convolution costs, in the elements that run_stage counts.
int64_t work_of(const GroupedConvShape& s) {
  return s.n * s.oh * s.ow * s.k * std::max<int64_t>(1, s.c / s.groups);
}
int64_t weight_work(const GroupedConvShape& s) { return s.k * (s.c / s.groups) * 9; }

struct CpuKernels {
  static constexpr DeviceType DEVICE = DeviceType::CPU;

  template <typename Params>
  static void prepare(Params& p) {
    p.isa = isa_current();
    p.winograd = winograd_current();
  }

  static int64_t workspace(const GroupedConvFwdParams& p) { return grouped_conv_fwd_workspace(p); }
  static int64_t workspace(const GroupedConvBwdInputParams& p) { return grouped_conv_bwd_input_workspace(p); }
  static int64_t workspace(const GroupedConvBwdWeightParams& p) {
    return grouped_conv_bwd_weight_workspace(p);
  }

  static void run(const GroupedConvFwdParams& p, int64_t workspace) {
    if (p.packed == nullptr) run_stage(grouped_conv_fwd_pack_cpu, p, workspace);
    run_stage(grouped_conv_fwd_cpu, p, work_of(p.shape));
    if (p.mean != nullptr) run_stage(grouped_conv_fwd_merge_cpu, p, p.shape.n * p.shape.k);
  }
  static void run(const GroupedConvBwdInputParams& p, int64_t workspace) {
    run_stage(grouped_conv_bwd_input_pack_cpu, p, workspace);
    run_stage(grouped_conv_bwd_input_cpu, p, work_of(p.shape));
    merge(p);
  }
  static void run(const GroupedConvBwdWeightParams& p, int64_t) {
    run_stage(grouped_conv_bwd_weight_cpu, p, work_of(p.shape));
    merge(p);
  }
  static void run(const GroupedConvBwdParams& p, int64_t workspace) {
    run_stage(grouped_conv_bwd_input_pack_cpu, p.input, workspace);
    run_stage(grouped_conv_bwd_cpu, p, 2 * work_of(p.input.shape));
    merge(p.input);
    merge(p.weight);
  }

 private:
  static void merge(const GroupedConvBwdInputParams& p) {
    if (p.sums != nullptr) run_stage(grouped_conv_bwd_input_merge_cpu, p, p.shape.n * p.shape.c);
  }
  static void merge(const GroupedConvBwdWeightParams& p) {
    run_stage(grouped_conv_bwd_weight_merge_cpu, p, weight_work(p.shape));
  }
};

using CpuOps = GroupedConvOps<CpuKernels>;

}  // namespace

Tensor grouped_conv_pack(const Tensor& weight, const Ints& input_size, const Ints& stride,
                         const Ints& padding, const Ints& dilation, int64_t groups) {
  const char* op = "conv_pack";
  const Shape input = shape_of(op, "input_size", input_size), size = shape_of(op, "weight", weight);
  GroupedConvFwdParams p{};
  p.dtype = activation_dtype(op, "weight", weight);
  CpuKernels::prepare(p);
  const Geometry geometry{op, stride, padding, dilation, groups};
  p.shape = geometry.shape(input.size[0], input.size[1], input.size[2], input.size[3], size);
  const Tensor dense = dense_weight(weight);
  p.weight = dense.const_data_ptr();
  p.layout = weight_layout(size.size[1], is_channels_last(dense));
  const auto header = PackedHeader::of(grouped_conv_packing(p), size, groups);
  return pack_ahead(p, header, grouped_conv_packed_floats(p), dense, grouped_conv_pack_weights_cpu);
}

Tensor grouped_conv_fwd_packed(const PackedCall& call, const OptionalTensor& into) {
  const Geometry geometry{call.op, call.stride, call.padding, call.dilation, call.groups};
  Forward f(DeviceType::CPU, call.op, call.x, call.weight, geometry, call.act, into);
  CpuKernels::prepare(f.p);
  const auto header = PackedHeader::of(grouped_conv_packing(f.p), call.weight, call.groups);
  f.p.packed = packed_ahead(call.op, call.packed, header, grouped_conv_packed_floats(f.p), call.weight);
  f.epilogue(call.op, call.affine, call.residual, call.relu);
  f.run(CpuKernels{});
  return f.y;
}

std::tuple<Tensor, Tensor, Tensor> grouped_conv_fwd_stats(const Tensor& x, const Tensor& weight,
                                                          const Ints& stride, const Ints& padding,
                                                          const Ints& dilation, int64_t groups,
                                                          const OptionalTensor& act) {
  return CpuOps::fwd_stats(x, weight, stride, padding, dilation, groups, act);
}

std::tuple<Tensor, Tensor, Tensor> grouped_conv_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                    const Ints& stride, const Ints& padding,
                                                    const Ints& dilation, int64_t groups,
                                                    const OptionalTensor& y, const OptionalTensor& finish,
                                                    const OptionalTensor& act, bool want_dx,
                                                    bool want_dweight, bool channels_last) {
  return CpuOps::bwd(dy, x, weight, stride, padding, dilation, groups, y, finish, act, want_dx, want_dweight,
                     channels_last);
}

}  // namespace gconv

STABLE_TORCH_LIBRARY_IMPL(gconv, CPU, m) { gconv::implement_grouped_conv<gconv::CpuOps>(m); }
