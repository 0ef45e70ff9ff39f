// grouped_conv on a CUDA device: forward and input gradient. Weights are packed, the convolution runs, and
// what its tiles leave of statistics or sums is merged.
#include "../grouped_conv.h"

#include <stdexcept>

#include "grouped_conv_fwd.h"
#include "grouped_conv_pack.h"
#include "grouped_conv_plan.h"

namespace gconv {

namespace cuda {
namespace {

template <typename T, int SHARE, int KH, bool BACKWARD>
void launch_conv(const char* op, const ConvPlan& plan, Stream stream) {
  launch(op, grouped_conv_kernel<T, SHARE, KH, BACKWARD>, plan.blocks, THREADS, plan.shared_bytes, stream,
         plan.p);
}

template <typename T, bool BACKWARD>
void run_conv(const char* op, const ConvPlan& plan, PackParams pack, void* packed, Stream stream) {
  pack.packed = packed;
  pack.total = plan.packed_weights;
  pack.cut = plan.p.cut;
  pack.rows = plan.rows_of_weights;
  pack.passes = plan.p.passes;
  std::copy(plan.p.pass, plan.p.pass + 4, pack.pass);
  launch(op, pack_weight_kernel<T>, ceil_div(pack.total, PACK_THREADS), PACK_THREADS, 0, stream, pack);
  const auto with_share = [&](auto kh) {
    constexpr int KH = decltype(kh)::value;
    if (plan.p.cut.share == 1)
      launch_conv<T, 1, KH, BACKWARD>(op, plan, stream);
    else if (plan.p.cut.share == 4)
      launch_conv<T, 4, KH, BACKWARD>(op, plan, stream);
    else if constexpr (sizeof(T) == 2)
      launch_conv<T, 2, KH, BACKWARD>(op, plan, stream);
  };
  if (plan.rows_of_weights == 3)
    with_share(std::integral_constant<int, 3>{});
  else
    with_share(std::integral_constant<int, 1>{});
}

// Calls f with a value of the storage type that an op computes in.
template <typename Params, typename F>
auto with_type(const Params& p, const F& f) {
  if (p.dtype == DType::bf16) return f(bf16{});
  if (p.dtype == DType::f16) return f(f16{});
  if (p.tf32) return f(tf32{});
  return f(float{});
}

// The plan of a convolution of `source` to [images, h.out, w.out, out channels]; `wanted`: statistics or
// sums.
template <typename T, bool BACKWARD>
ConvPlan planned(const TileSource& source, const ConvAxis& h, const ConvAxis& w, int64_t out, int64_t groups,
                 bool wanted) {
  const Device device = current_device(BACKWARD ? "grouped_conv_bwd_input" : "grouped_conv_fwd");
  Planner<T, BACKWARD> planner{source, h, w, device, source.images, wanted, 0};
  planner.run(source.c, out, groups);
  ConvParams& p = planner.plan.p;
  p.source = source;
  p.images = source.images, p.height = h.out, p.width = w.out, p.step_h = h.parities, p.step_w = w.parities;
  return planner.plan;
}

// Where results go, and what goes into them besides.
template <typename T>
void put_results(ConvPlan& plan, const Nhwc& out, const Nhwc& residual, const float* vectors) {
  ConvParams& p = plan.p;
  const auto aligned = [&](const Nhwc& v) {
    return v.data == nullptr || is_aligned(v, p.images, p.height, p.width, p.cut.out, sizeof(T));
  };
  p.out = out, p.residual = residual, p.vectors = vectors;
  p.out_aligned = aligned(out) && aligned(residual);
}

template <typename T>
ConvPlan plan_of(const GroupedConvFwdParams& p) {
  const GroupedConvShape& s = p.shape;
  ConvPlan plan = planned<T, false>(tile_source(p.x, p.act, s.n, s.h, s.w, s.c, sizeof(T)),
                                    forward_axis(s.h, s.oh, s.stride_h, s.pad_h, s.dil_h),
                                    forward_axis(s.w, s.ow, s.stride_w, s.pad_w, s.dil_w), s.k, s.groups,
                                    p.mean != nullptr);
  put_results<T>(plan, p.y, p.residual, p.affine);
  plan.p.relu = p.relu;
  return plan;
}

template <typename T>
ConvPlan plan_of(const GroupedConvBwdInputParams& p) {
  const GroupedConvShape& s = p.shape;
  ConvPlan plan = planned<T, true>(tile_source(p.dy, p.y, p.finish, s.n, s.oh, s.ow, s.k, sizeof(T)),
                                   backward_axis(s.h, s.oh, s.stride_h, s.pad_h, s.dil_h),
                                   backward_axis(s.w, s.ow, s.stride_w, s.pad_w, s.dil_w), s.c, s.groups,
                                   p.act != nullptr);
  put_results<T>(plan, p.dx, p.act != nullptr ? p.x : Nhwc{}, p.act);
  return plan;
}

bool is_empty(const GroupedConvShape& s) { return s.n == 0 || s.oh == 0 || s.ow == 0; }

// Where the tiles of a convolution have left their partial results, and how many there are.
struct Partial {
  float* at;
  int64_t tiles;
};

// Everything but the merge; `wanted`: statistics or sums are.
template <bool BACKWARD, typename Params>
Partial convolve(const char* op, const Params& p, bool wanted, Stream stream) {
  Partial partial{p.workspace, 0};
  if (is_empty(p.shape)) return partial;
  with_type(p, [&](auto type) {
    using T = decltype(type);
    ConvPlan plan = plan_of<T>(p);
    partial = {p.workspace + plan.packed_floats(sizeof(T)), plan.p.tiles};
    plan.p.packed = p.workspace;
    plan.p.partial = wanted ? partial.at : nullptr;
    const int64_t outer = p.shape.c / p.shape.groups * 9;
    const PackParams pack{p.weight, outer, p.layout.stride_c, p.layout.stride_tap, BACKWARD};
    run_conv<T, BACKWARD>(op, plan, pack, p.workspace, stream);
  });
  return partial;
}

// Floats of packed weights and, given their tiles, of partial results.
template <typename Params, typename F>
int64_t workspace(const Params& p, bool wanted, const F& partial_floats) {
  if (is_empty(p.shape)) return partial_floats(0);
  return with_type(p, [&](auto type) {
    const ConvPlan plan = plan_of<decltype(type)>(p);
    return plan.packed_floats(sizeof(type)) + (wanted ? partial_floats(plan.p.tiles) : 0);
  });
}

}  // namespace
}  // namespace cuda

int64_t grouped_conv_fwd_workspace_cuda(const GroupedConvFwdParams& p) {
  return cuda::workspace(p, p.mean != nullptr,
                         [&](int64_t tiles) { return cuda::statistics_workspace(tiles, p.shape.k); });
}

void grouped_conv_fwd_cuda(const GroupedConvFwdParams& p, void* stream) {
  const char* op = "grouped_conv_fwd";
  const auto on = static_cast<cuda::Stream>(stream);
  const auto [partial, tiles] = cuda::convolve<false>(op, p, p.mean != nullptr, on);
  if (p.mean != nullptr) cuda::merge_statistics(op, partial, tiles, p.shape.k, p.mean, p.var, on);
}

int64_t grouped_conv_bwd_input_workspace_cuda(const GroupedConvBwdInputParams& p) {
  return cuda::workspace(p, p.act != nullptr,
                         [&](int64_t tiles) { return cuda::sums_workspace(tiles, 2 * p.shape.c); });
}

void grouped_conv_bwd_input_cuda(const GroupedConvBwdInputParams& p, void* stream) {
  const char* op = "grouped_conv_bwd_input";
  const auto on = static_cast<cuda::Stream>(stream);
  const auto [partial, tiles] = cuda::convolve<true>(op, p, p.act != nullptr, on);
  if (p.act != nullptr) cuda::merge_sums(op, partial, tiles, 2 * p.shape.c, p.sums, on);
}

}  // namespace gconv
