// The grouped_conv stages of one instruction set: params to passes, weight packing, merging.
// Included last by grouped_conv_<isa>.cpp; grouped_conv.cpp chooses among their tables.
#pragma once
#include "grouped_conv_narrow.h"
#include "grouped_conv_narrow_wgrad.h"
#include "grouped_conv_pass.h"
#include "grouped_conv_table.h"
#include "grouped_conv_wgrad.h"
#include "grouped_conv_winograd_pass.h"
#include "grouped_conv_winograd_wgrad.h"

namespace gconv {
namespace GCONV_ISA_NS {

// Workspace of a pass: packed weights, then the partial statistics.
inline int64_t pass_floats(const Pass& p) {
  const bool partials = p.moments || p.mask_act != nullptr;
  return p.packed_weight_floats() + (partials ? p.partial_rows() * 2 * p.output_channels() : 0);
}

// What both directions share: geometry, columns, algorithm, grid, weights and workspace.
template <typename Params>
void plan(Pass& p, const Params& q) {
  const GroupedConvShape& s = q.shape;
  p.dtype = q.dtype;
  p.n = s.n;
  p.groups = s.groups;
  p.stride_h = s.stride_h, p.pad_h = s.pad_h, p.dil_h = s.dil_h;
  plan_columns(p, s.stride_w, s.pad_w, s.dil_w);
  p.winograd = uses_winograd(s, q.winograd, winograd_overhead());
  p.tiles = uses_tiles(p);
  // The backward of a stride leaves too few columns per scalar of a wider group.
  p.narrow = !p.winograd && !p.tiles && is_narrow(s, scale_of(p) == Scale::twice ? LANES - 1 : LANES);
  p.narrow ? plan_narrow(p) : p.winograd ? plan_winograd(p) : plan_work(p);
  p.raw_weight = q.weight, p.layout = q.layout, p.float_weight = q.float_weight;
  p.weight = p.ahead != nullptr ? p.ahead : q.workspace;
  p.partials = q.workspace == nullptr ? nullptr : q.workspace + p.packed_weight_floats();
}

inline Pass plan_forward(const GroupedConvFwdParams& q) {
  const GroupedConvShape& s = q.shape;
  Pass p{};
  p.source_h = s.h, p.source_w = s.w, p.output_h = s.oh, p.output_w = s.ow;
  p.source_per_group = s.c / s.groups / PER_SLOT, p.output_per_group = s.k / s.groups;
  p.transposed = false;
  p.source = RowSource{q.x, Nhwc{}, q.act != nullptr ? Prologue::act : Prologue::none, q.act, s.c};
  p.affine = q.affine;
  p.residual = q.residual;
  p.relu = q.relu;
  p.moments = q.mean != nullptr;
  p.output = q.y;
  p.ahead = q.packed;
  plan(p, q);
  return p;
}

inline Pass plan_input_gradient(const GroupedConvBwdInputParams& q) {
  const GroupedConvShape& s = q.shape;
  Pass p{};
  p.source_h = s.oh, p.source_w = s.ow, p.output_h = s.h, p.output_w = s.w;
  p.source_per_group = s.k / s.groups / PER_SLOT, p.output_per_group = s.c / s.groups;
  p.transposed = true;
  p.source = RowSource{q.dy, q.y, q.finish != nullptr ? Prologue::finish : Prologue::none, q.finish, s.k};
  p.mask_x = q.x;
  p.mask_act = q.act;
  p.output = q.dx;
  plan(p, q);
  return p;
}

// A share of all weights, packed ahead.
inline void pack_all(const Pass& p, float* packed, int64_t ith, int64_t nth) {
  const Share share(p.vectors(), ith, nth);
  pack_vectors(p, share.begin, share.end, packed + share.begin * p.weight_floats());
}

// A share of the weights that all threads use, in the call.
inline void pack_share(const Pass& p, float* packed, int64_t ith, int64_t nth) {
  if (p.packed_weight_floats() > 0) pack_all(p, packed, ith, nth);
}

// Up to part / parts of the tasks.
inline void run_part(PassTasks& tasks, int64_t part, int64_t parts) {
  tasks.narrow()     ? tasks.run(part, parts, strip_task)
  : tasks.winograd() ? tasks.run(part, parts, tile_task)
                     : tasks.run(part, parts, wide_task);
}
inline void run_pass(const Pass& p, int64_t ith, int64_t nth) {
  PassTasks tasks(p, ith, nth);
  run_part(tasks, 1, 1);
}

int64_t packing(const GroupedConvFwdParams& q) { return packing_of(q.dtype, plan_forward(q).winograd); }
int64_t packed_floats(const GroupedConvFwdParams& q) {
  const Pass p = plan_forward(q);
  return p.vectors() * p.weight_floats();
}
void pack_weights(const GroupedConvFwdParams& q, int64_t ith, int64_t nth) {
  pack_all(plan_forward(q), q.workspace, ith, nth);
}

int64_t fwd_workspace(const GroupedConvFwdParams& q) { return pass_floats(plan_forward(q)); }
void fwd_pack(const GroupedConvFwdParams& q, int64_t ith, int64_t nth) {
  pack_share(plan_forward(q), q.workspace, ith, nth);
}
void fwd(const GroupedConvFwdParams& q, int64_t ith, int64_t nth) {
  const TileRegisters tiles;
  run_pass(plan_forward(q), ith, nth);
}

void fwd_merge(const GroupedConvFwdParams& q, int64_t ith, int64_t nth) {
  const Pass p = plan_forward(q);
  const auto pixels = [&](int64_t i) {
    const Share rows = p.stripe_rows(i % p.stripes);
    return (rows.end - rows.begin) * p.output_w;
  };
  merge_moments(p.partials, p.partial_rows(), p.output_channels(), pixels, q.mean, q.var, ith, nth);
}

int64_t bwd_input_workspace(const GroupedConvBwdInputParams& q) {
  return pass_floats(plan_input_gradient(q));
}
void bwd_input_pack(const GroupedConvBwdInputParams& q, int64_t ith, int64_t nth) {
  pack_share(plan_input_gradient(q), q.workspace, ith, nth);
}
void bwd_input(const GroupedConvBwdInputParams& q, int64_t ith, int64_t nth) {
  const TileRegisters tiles;
  run_pass(plan_input_gradient(q), ith, nth);
}
void bwd_input_merge(const GroupedConvBwdInputParams& q, int64_t ith, int64_t nth) {
  const Pass p = plan_input_gradient(q);
  merge_sums(p.partials, p.partial_rows(), 2 * p.output_channels(), q.sums, ith, nth);
}

int64_t bwd_weight_workspace(const GroupedConvBwdWeightParams& q) {
  const WgradPass p = is_narrow_wgrad(q.shape) ? NarrowWgrad(plan_wgrad(q)) : plan_wgrad(q);
  return p.splits * p.vectors() * p.vector_floats();
}
// after(part, parts) whenever so much of the share is done.
template <typename After>
void run_weight_gradient(const GroupedConvBwdWeightParams& q, int64_t ith, int64_t nth, const After& after) {
  const WgradPass p = plan_wgrad(q);
  is_narrow_wgrad(q.shape) ? run_narrow_wgrad(NarrowWgrad(p), ith, nth, after)
  : p.winograd             ? run_wgrad(p, ith, nth, tile_wgrad_task, after)
                           : run_wgrad(p, ith, nth, wide_wgrad_task, after);
}
void bwd_weight(const GroupedConvBwdWeightParams& q, int64_t ith, int64_t nth) {
  run_weight_gradient(q, ith, nth, [](int64_t, int64_t) {});
}
void bwd_weight_merge(const GroupedConvBwdWeightParams& q, int64_t ith, int64_t nth) {
  const WgradPass p = plan_wgrad(q);
  is_narrow_wgrad(q.shape) ? merge_narrow_wgrad(NarrowWgrad(p), ith, nth) : merge_wgrad(p, ith, nth);
}

// Both gradients. The weight gradient first: dx leaves past the caches, and reading after that would wait.
// Narrow groups go in step, image by image: what one has read of dy and y the other finds in L2. Wide ones do
// not: their packed rows and weights crowd L2.
void bwd(const GroupedConvBwdParams& q, int64_t ith, int64_t nth) {
  const TileRegisters tiles;
  const bool in_step = is_narrow_wgrad(q.input.shape);
  PassTasks input(plan_input_gradient(q.input), ith, nth);
  run_weight_gradient(q.weight, ith, nth, [&](int64_t part, int64_t parts) {
    if (in_step) run_part(input, part, parts);
  });
  run_part(input, 1, 1);
}

}  // namespace GCONV_ISA_NS

const GroupedConvTable GCONV_TABLE_NAME(grouped_conv, GCONV_ISA_NS) = {GCONV_ISA_NS::fwd_workspace,
                                                                       GCONV_ISA_NS::fwd_pack,
                                                                       GCONV_ISA_NS::fwd,
                                                                       GCONV_ISA_NS::fwd_merge,
                                                                       GCONV_ISA_NS::packing,
                                                                       GCONV_ISA_NS::packed_floats,
                                                                       GCONV_ISA_NS::pack_weights,
                                                                       GCONV_ISA_NS::bwd_input_workspace,
                                                                       GCONV_ISA_NS::bwd_input_pack,
                                                                       GCONV_ISA_NS::bwd_input,
                                                                       GCONV_ISA_NS::bwd_input_merge,
                                                                       GCONV_ISA_NS::bwd_weight_workspace,
                                                                       GCONV_ISA_NS::bwd_weight,
                                                                       GCONV_ISA_NS::bwd_weight_merge,
                                                                       GCONV_ISA_NS::bwd};

}  // namespace gconv
