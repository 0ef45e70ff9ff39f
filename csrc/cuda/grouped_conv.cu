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

template <typename T>
ConvPlan forward_plan(const GroupedConvFwdParams& p) {
  const GroupedConvShape& s = p.shape;
  const TileSource source = tile_source(p.x, p.act, s.n, s.h, s.w, s.c, sizeof(T));
  const ConvAxis h = forward_axis(s.h, s.oh, s.stride_h, s.pad_h, s.dil_h);
  const ConvAxis w = forward_axis(s.w, s.ow, s.stride_w, s.pad_w, s.dil_w);
  const Device device = current_device("grouped_conv_fwd");
  Planner<T, false> planner{source, h, w, device, s.n, p.mean != nullptr, 0};
  planner.run(s.c, s.k, s.groups);
  ConvParams& q = planner.plan.p;
  q.source = source;
  q.images = s.n, q.height = int(s.oh), q.width = int(s.ow), q.step_h = q.step_w = 1;
  q.out = p.y;
  q.vectors = p.affine, q.residual = p.residual, q.relu = p.relu;
  q.out_aligned = is_aligned(p.y, s.n, s.oh, s.ow, s.k, sizeof(T)) &&
                  (p.residual.data == nullptr || is_aligned(p.residual, s.n, s.oh, s.ow, s.k, sizeof(T)));
  return planner.plan;
}

template <typename T>
ConvPlan backward_plan(const GroupedConvBwdInputParams& p) {
  const GroupedConvShape& s = p.shape;
  const TileSource source = tile_source(p.dy, p.y, p.finish, s.n, s.oh, s.ow, s.k, sizeof(T));
  const ConvAxis h = backward_axis(s.h, s.oh, s.stride_h, s.pad_h, s.dil_h);
  const ConvAxis w = backward_axis(s.w, s.ow, s.stride_w, s.pad_w, s.dil_w);
  const Device device = current_device("grouped_conv_bwd_input");
  Planner<T, true> planner{source, h, w, device, s.n, p.act != nullptr, 0};
  planner.run(s.k, s.c, s.groups);
  ConvParams& q = planner.plan.p;
  q.source = source;
  q.images = s.n, q.height = int(s.h), q.width = int(s.w);
  q.step_h = int(s.stride_h), q.step_w = int(s.stride_w);
  q.out = p.dx;
  q.vectors = p.act;
  if (p.act != nullptr) q.residual = p.x;
  q.out_aligned = is_aligned(p.dx, s.n, s.h, s.w, s.c, sizeof(T)) &&
                  (p.act == nullptr || is_aligned(p.x, s.n, s.h, s.w, s.c, sizeof(T)));
  return planner.plan;
}

bool is_empty(const GroupedConvShape& s) { return s.n == 0 || s.oh == 0 || s.ow == 0; }

}  // namespace
}  // namespace cuda

int64_t grouped_conv_fwd_workspace_cuda(const GroupedConvFwdParams& p) {
  using namespace cuda;
  const int64_t k = p.shape.k;
  if (is_empty(p.shape)) return statistics_workspace(0, k);
  return with_type(p, [&](auto type) {
    const ConvPlan plan = forward_plan<decltype(type)>(p);
    return plan.packed_floats(sizeof(type)) + (p.mean != nullptr ? statistics_workspace(plan.p.tiles, k) : 0);
  });
}

void grouped_conv_fwd_cuda(const GroupedConvFwdParams& p, void* stream) {
  using namespace cuda;
  const char* op = "grouped_conv_fwd";
  const Stream on = static_cast<Stream>(stream);
  float* partial = p.workspace;
  int64_t tiles = 0;
  if (!is_empty(p.shape))
    with_type(p, [&](auto type) {
      using T = decltype(type);
      ConvPlan plan = forward_plan<T>(p);
      partial += plan.packed_floats(sizeof(T));
      tiles = plan.p.tiles;
      plan.p.packed = p.workspace;
      plan.p.partial = p.mean != nullptr ? partial : nullptr;
      const int64_t outer = p.shape.c / p.shape.groups * 9;
      const PackParams pack{p.weight, outer, p.layout.stride_c, p.layout.stride_tap, false};
      run_conv<T, false>(op, plan, pack, p.workspace, on);
    });
  if (p.mean != nullptr) merge_statistics(op, partial, tiles, p.shape.k, p.mean, p.var, on);
}

int64_t grouped_conv_bwd_input_workspace_cuda(const GroupedConvBwdInputParams& p) {
  using namespace cuda;
  const int64_t c = p.shape.c;
  if (is_empty(p.shape)) return sums_workspace(0, 2 * c);
  return with_type(p, [&](auto type) {
    const ConvPlan plan = backward_plan<decltype(type)>(p);
    return plan.packed_floats(sizeof(type)) + (p.act != nullptr ? sums_workspace(plan.p.tiles, 2 * c) : 0);
  });
}

void grouped_conv_bwd_input_cuda(const GroupedConvBwdInputParams& p, void* stream) {
  using namespace cuda;
  const char* op = "grouped_conv_bwd_input";
  const Stream on = static_cast<Stream>(stream);
  float* partial = p.workspace;
  int64_t tiles = 0;
  if (!is_empty(p.shape))
    with_type(p, [&](auto type) {
      using T = decltype(type);
      ConvPlan plan = backward_plan<T>(p);
      partial += plan.packed_floats(sizeof(T));
      tiles = plan.p.tiles;
      plan.p.packed = p.workspace;
      plan.p.partial = p.act != nullptr ? partial : nullptr;
      const int64_t outer = p.shape.c / p.shape.groups * 9;
      const PackParams pack{p.weight, outer, p.layout.stride_c, p.layout.stride_tap, true};
      run_conv<T, true>(op, plan, pack, p.workspace, on);
    });
  if (p.sums != nullptr) merge_sums(op, partial, tiles, 2 * p.shape.c, p.sums, on);
}

}  // namespace gconv
