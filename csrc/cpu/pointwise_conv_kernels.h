// The pointwise_conv stages of one instruction set: params to passes, workspace, merging.
// Included last by pointwise_conv_<isa>.cpp; pointwise_conv.cpp chooses among their tables.
#pragma once
#include "pointwise_conv_bwd.h"
#include "pointwise_conv_table.h"

namespace gconv {
namespace GCONV_ISA_NS {
namespace pointwise {

// The pixels of x or dx that are taken, and those of y or dy.
inline PixelGrid taken(const PointwiseConvShape& s, const Nhwc& t) {
  return PixelGrid(t, s.n, s.oh, s.ow, s.stride_h, s.stride_w);
}
inline PixelGrid all(const PointwiseConvShape& s, const Nhwc& t) {
  return PixelGrid(t, s.n, s.oh, s.ow, 1, 1);
}

inline PointSource source_of_x(const PointwiseConvShape& s, const Nhwc& x, const float* act) {
  return {RowSource{x, Nhwc{}, act != nullptr ? Prologue::act : Prologue::none, act, s.c}, taken(s, x), {}};
}
inline PointSource source_of_dy(const PointwiseConvBwdParams& q) {
  const Prologue prologue = q.finish != nullptr ? Prologue::finish : Prologue::none;
  return {RowSource{q.dy, q.y, prologue, q.finish, q.shape.k}, all(q.shape, q.dy), all(q.shape, q.y)};
}

// What both directions share: cuts and workspace.
template <typename Params>
Pass plan(const Params& q, int64_t source_channels, int64_t output_channels, const float* ahead,
          Use strassen) {
  Pass p{};
  p.ahead = ahead;
  p.dtype = q.dtype;
  p.shape = q.shape;
  p.pixels = q.shape.n * q.shape.oh * q.shape.ow;
  p.source_channels = source_channels / PER_SLOT, p.output_channels = output_channels;
  p.raw_weight = q.weight, p.float_weight = q.float_weight;
  p.residual = q.residual;
  p.strassen = uses_strassen(strassen, source_channels, output_channels, p.image_pixels());
  p.strassen ? plan_strassen(p) : plan_direct(p);
  p.weight = ahead != nullptr ? ahead : q.workspace;
  p.partials = q.workspace == nullptr ? nullptr : q.workspace + p.packed_floats();
  return p;
}

inline Pass plan_forward(const PointwiseConvFwdParams& q) {
  const PointwiseConvShape& s = q.shape;
  Pass p = plan(q, s.c, s.k, q.packed, q.strassen);
  p.source = source_of_x(s, q.x, q.act);
  p.affine = q.affine;
  p.relu = q.relu;
  p.moments = q.mean != nullptr;
  p.output = q.y;
  p.output_at = all(s, q.y), p.residual_at = all(s, q.residual);
  return p;
}

// Whether both gradients go in one walk over the pixels.
inline bool joint(const PointwiseConvShape& s) { return s.k <= JOINT_CHANNELS; }

inline Pass plan_input_gradient(const PointwiseConvBwdParams& q) {
  const PointwiseConvShape& s = q.shape;
  Pass p = plan(q, s.k, s.c, nullptr, joint(s) ? Use::never : q.strassen);
  p.transposed = true;
  p.source = source_of_dy(q);
  p.mask_x = q.x, p.mask_act = q.act, p.add = q.add;
  p.output = q.dx;
  p.output_at = taken(s, q.dx), p.residual_at = taken(s, q.residual), p.mask_at = taken(s, q.x);
  return p;
}

// Workspace of a pass: packed weights, then the partial sums.
inline int64_t pass_floats(const Pass& p) { return p.packed_floats() + p.partial_floats(); }

inline Wgrad plan_weight_gradient(const PointwiseConvBwdParams& q) {
  Wgrad p{};
  p.dtype = q.dtype;
  p.pixels = q.shape.n * q.shape.oh * q.shape.ow;
  p.x = source_of_x(q.shape, q.x, q.act), p.dy = source_of_dy(q);
  p.dweight = q.dweight, p.float_weight = q.float_weight;
  plan_cuts(p);
  return p;
}

inline int64_t input_gradient_floats(const Backward& b) {
  return b.dx.output.data == nullptr ? 0 : (pass_floats(b.dx) + 15) / 16 * 16;
}

inline Backward plan_backward(const PointwiseConvBwdParams& q) {
  Backward b{plan_input_gradient(q), plan_weight_gradient(q), joint(q.shape)};
  if (b.joint) plan_joint(b);
  b.dw.partials = q.workspace == nullptr ? nullptr : q.workspace + input_gradient_floats(b);
  return b;
}

int64_t packing(const PointwiseConvFwdParams& q) { return packing_of(q.dtype, plan_forward(q).strassen); }
int64_t packed_floats(const PointwiseConvFwdParams& q) { return plan_forward(q).weight_floats(); }
void pack_ahead(const PointwiseConvFwdParams& q, int64_t ith, int64_t nth) {
  pack_weights(plan_forward(q), q.workspace, ith, nth);
}

int64_t fwd_workspace(const PointwiseConvFwdParams& q) { return pass_floats(plan_forward(q)); }
void fwd_pack(const PointwiseConvFwdParams& q, int64_t ith, int64_t nth) {
  if (q.packed == nullptr) pack_ahead(q, ith, nth);
}
void fwd(const PointwiseConvFwdParams& q, int64_t ith, int64_t nth) {
  const TileRegisters tiles;
  run_pass(plan_forward(q), ith, nth);
}
void fwd_merge(const PointwiseConvFwdParams& q, int64_t ith, int64_t nth) {
  const Pass p = plan_forward(q);
  const auto pixels = [&](int64_t i) { return p.block_pixels(i); };
  merge_moments(p.partials, p.blocks(), p.output_channels, pixels, q.mean, q.var, ith, nth);
}

int64_t bwd_workspace(const PointwiseConvBwdParams& q) {
  const Backward b = plan_backward(q);
  return input_gradient_floats(b) + (q.dweight == nullptr ? 0 : b.dw.partial_floats());
}
void bwd_pack(const PointwiseConvBwdParams& q, int64_t ith, int64_t nth) {
  pack_weights(plan_input_gradient(q), q.workspace, ith, nth);
}
void bwd(const PointwiseConvBwdParams& q, int64_t ith, int64_t nth) {
  const TileRegisters tiles;
  run_backward(plan_backward(q), ith, nth);
}
void bwd_merge(const PointwiseConvBwdParams& q, int64_t ith, int64_t nth) {
  const Backward b = plan_backward(q);
  if (q.dweight != nullptr) merge_wgrad(b.dw, ith, nth);
  if (q.sums == nullptr) return;
  merge_sums(b.dx.partials, b.dx.blocks(), 2 * b.dx.output_channels, q.sums, ith, nth);
}

constexpr PointwiseConvTable TABLE = {fwd_workspace, fwd_pack,      fwd,        fwd_merge,
                                      packing,       packed_floats, pack_ahead, bwd_workspace,
                                      bwd_pack,      bwd,           bwd_merge};

}  // namespace pointwise
}  // namespace GCONV_ISA_NS

const PointwiseConvTable GCONV_TABLE_NAME(pointwise_conv, GCONV_ISA_NS) = GCONV_ISA_NS::pointwise::TABLE;

}  // namespace gconv
