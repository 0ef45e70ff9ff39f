// torch.ops.gconv.batch_norm_*: schemas, checks, allocation and threads around batch_norm.h.
#include "batch_norm.h"
#include "torch_ops.h"

namespace gconv {

namespace {

// The activations of one call: the first gives shape and dtype, the others must agree with it.
struct Activations {
  const char* op;
  DType dtype;
  ScalarType scalar_type;
  BatchNormShape shape;

  Activations(const char* op_name, const char* name, const Tensor& x)
      : op(op_name),
        dtype(activation_dtype(op_name, name, x)),
        scalar_type(x.scalar_type()),
        shape{x.size(0), x.size(2), x.size(3), x.size(1)} {}
  Shape sizes() const { return {shape.n, shape.c, shape.h, shape.w}; }
  Shape vector() const { return {shape.c}; }
  Shape table(int64_t rows) const { return {rows, shape.c}; }
  int64_t elements() const { return shape.n * shape.h * shape.w * shape.c; }

  // The argument in a readable layout; whoever holds the result keeps a copy alive.
  OptionalTensor readable(const char* name, const OptionalTensor& t) const {
    if (!t.has_value()) return std::nullopt;
    check_tensor(op, name, *t, scalar_type, sizes());
    return channels_adjacent(*t);
  }
  Tensor readable(const char* name, const Tensor& t) const {
    check_tensor(op, name, t, scalar_type, sizes());
    return channels_adjacent(t);
  }
};

Nhwc view_of(const OptionalTensor& t) { return t.has_value() ? gconv::view_of(*t) : Nhwc{}; }

std::tuple<Tensor, Tensor> batch_norm_stats(const Tensor& x) {
  const Activations a("batch_norm_stats", "x", x);
  const Tensor input = channels_adjacent(x);
  Tensor mean = empty_floats(a.vector(), x), var = empty_floats(a.vector(), x);
  BatchNormStatsParams p{a.shape,         a.dtype,        isa_current(), gconv::view_of(input),
                         floats_of(mean), floats_of(var), nullptr};
  const Tensor workspace = empty_floats({batch_norm_stats_workspace(p)}, x);
  p.workspace = floats_of(workspace);
  run_stage(batch_norm_stats_cpu, p, a.elements());
  run_stage(batch_norm_stats_merge_cpu, p, workspace.numel());
  return {mean, var};
}

}  // namespace

// Counts the batch where there is a counter. Without a momentum the running statistics are the average over
// all batches counted.
void batch_norm_update_running(const Tensor& running_mean, const Tensor& running_var,
                               const OptionalTensor& num_batches_tracked, const Tensor& mean,
                               const Tensor& var, const OptionalTensor& shift, int64_t count,
                               std::optional<double> momentum) {
  const char* op = "batch_norm_update_running";
  check(mean.dim() == 1, op, ": mean: want float32 [C], got ", Described{mean});
  const int64_t c = mean.size(0);
  BatchNormUpdateRunningParams p{};
  p.c = c;
  p.mean = channel_floats(op, "mean", mean, {c});
  p.var = channel_floats(op, "var", var, {c});
  p.shift = channel_floats(op, "shift", shift, {c});
  channel_floats(op, "running_mean", running_mean, {c});
  channel_floats(op, "running_var", running_var, {c});
  p.running_mean = floats_of(running_mean);
  p.running_var = floats_of(running_var);
  check(count >= 2, op, ": count: want at least 2 values per channel, got ", count);
  p.count = count;
  if (num_batches_tracked.has_value())
    check_tensor(op, "num_batches_tracked", *num_batches_tracked, ScalarType::Long, {});
  else
    check(momentum.has_value(), op, ": momentum: want a number where nothing counts batches, got None");
  int64_t batches = 0;
  if (num_batches_tracked.has_value())
    batches = ++*static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr());
  p.momentum = momentum.has_value() ? *momentum : 1.0 / static_cast<double>(batches);
  run_stage(batch_norm_update_running_cpu, p, c);
}

namespace {

void fold(const char* op, const Tensor& mean, const Tensor& var, const OptionalTensor& gamma,
          const OptionalTensor& beta, double eps, float* rstd, float* affine) {
  const int64_t c = mean.size(0);
  const BatchNormFoldParams p{c,
                              channel_floats(op, "mean", mean, {c}),
                              channel_floats(op, "var", var, {c}),
                              channel_floats(op, "gamma", gamma, {c}),
                              channel_floats(op, "beta", beta, {c}),
                              eps,
                              rstd,
                              affine};
  run_stage(batch_norm_fold_cpu, p, c);
}

}  // namespace

std::tuple<Tensor, Tensor> batch_norm_fold(const Tensor& mean, const Tensor& var, const OptionalTensor& gamma,
                                           const OptionalTensor& beta, double eps) {
  const char* op = "batch_norm_fold";
  check(mean.dim() == 1, op, ": mean: want float32 [C], got ", Described{mean});
  Tensor rstd = empty_floats({mean.size(0)}, mean), affine = empty_floats({2, mean.size(0)}, mean);
  fold(op, mean, var, gamma, beta, eps, floats_of(rstd), floats_of(affine));
  return {rstd, affine};
}

Tensor batch_norm_table(const Tensor& mean, const Tensor& var, const OptionalTensor& gamma,
                        const OptionalTensor& beta, double eps) {
  const int64_t c = mean.size(0);
  Tensor table = empty_floats({4, c}, mean);
  float* rows = floats_of(table);
  fold("batch_norm_table", mean, var, gamma, beta, eps, rows + 3 * c, rows);
  std::copy_n(floats_of(mean), c, rows + 2 * c);
  return table;
}

namespace {

void apply(const Activations& a, const Tensor& x, const Tensor& affine, const OptionalTensor& residual,
           const OptionalTensor& residual_affine, bool relu, const Tensor& y) {
  const Tensor input = channels_adjacent(x);
  const OptionalTensor more = a.readable("residual", residual);
  check(residual.has_value() || !residual_affine.has_value(), a.op,
        ": residual: want the tensor that residual_affine is of, got None");
  BatchNormApplyParams p{};
  p.shape = a.shape;
  p.dtype = a.dtype;
  p.isa = isa_current();
  p.x = gconv::view_of(input);
  p.affine = channel_floats(a.op, "affine", affine, a.table(2));
  p.residual = view_of(more);
  p.residual_affine = channel_floats(a.op, "residual_affine", residual_affine, a.table(2));
  p.relu = relu;
  p.y = writable_view_of(y);
  run_stage(batch_norm_apply_cpu, p, a.elements());
}

}  // namespace

Tensor batch_norm_apply(const Tensor& x, const Tensor& affine, const OptionalTensor& residual,
                        const OptionalTensor& residual_affine, bool relu) {
  const Activations a("batch_norm_apply", "x", x);
  const Tensor y = empty_channels_last(a.sizes(), x);
  apply(a, x, affine, residual, residual_affine, relu, y);
  return y;
}

// y may be the residual, or x.
void batch_norm_apply_into(const Tensor& x, const Tensor& affine, const OptionalTensor& residual,
                           const OptionalTensor& residual_affine, bool relu, const Tensor& y) {
  const Activations a("batch_norm_apply_into", "x", x);
  check_output(a.op, "y", y, a.scalar_type, a.sizes());
  apply(a, x, affine, residual, residual_affine, relu, y);
}

namespace {

// What the arguments of a branch are called.
struct BranchNames {
  const char *x, *mean, *rstd, *gamma;
};
constexpr BranchNames MAIN{"x", "mean", "rstd", "gamma"};
constexpr BranchNames OTHER{"other_x", "other_mean", "other_rstd", "other_gamma"};

// A branch's tensors; they must outlive the stages.
struct Branch {
  BatchNormBwdBranch p{};
  Tensor x, dgamma, finish;

  Branch(const Activations& a, const BranchNames& names, const Tensor& input, const Tensor& mean,
         const Tensor& rstd, const OptionalTensor& gamma)
      : x(a.readable(names.x, input)),
        dgamma(empty_floats(a.vector(), input)),
        finish(empty_floats(a.table(6), input)) {
    p.x = gconv::view_of(x);
    p.mean = channel_floats(a.op, names.mean, mean, a.vector());
    p.rstd = channel_floats(a.op, names.rstd, rstd, a.vector());
    p.gamma = channel_floats(a.op, names.gamma, gamma, a.vector());
    p.dgamma = floats_of(dgamma);
    p.finish = floats_of(finish);
  }
};

// dbeta and g.
std::tuple<Tensor, Tensor> reduce(const Activations& a, const Tensor& dz, const Branch& main,
                                  const Branch* other, const OptionalTensor& affine, const OptionalTensor& z,
                                  bool want_g) {
  const Tensor gradient = a.readable("dz", dz);
  const OptionalTensor output = a.readable("z", z);
  BatchNormBwdReduceParams p{};
  p.shape = a.shape;
  p.dtype = a.dtype;
  p.isa = isa_current();
  p.dz = gconv::view_of(gradient);
  p.main = main.p;
  if (other != nullptr) p.other = other->p;
  p.affine = channel_floats(a.op, "affine", affine, a.table(2));
  p.z = view_of(output);
  Tensor dbeta = empty_floats(a.vector(), dz);
  Tensor g = want_g ? empty_channels_last(a.sizes(), dz) : empty({0}, a.scalar_type, dz);
  p.dbeta = floats_of(dbeta);
  if (want_g) p.g = writable_view_of(g);
  const Tensor workspace = empty_floats({batch_norm_bwd_reduce_workspace(p)}, dz);
  p.workspace = floats_of(workspace);
  run_stage(batch_norm_bwd_reduce_cpu, p, a.elements());
  run_stage(batch_norm_bwd_reduce_merge_cpu, p, workspace.numel());
  return {dbeta, g};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_bwd_reduce(const Tensor& dz, const Tensor& x,
                                                                 const Tensor& mean, const Tensor& rstd,
                                                                 const OptionalTensor& gamma,
                                                                 const OptionalTensor& affine,
                                                                 const OptionalTensor& z, bool want_g) {
  const Activations a("batch_norm_bwd_reduce", "x", x);
  const Branch main(a, MAIN, x, mean, rstd, gamma);
  auto [dbeta, g] = reduce(a, dz, main, nullptr, affine, z, want_g);
  return {main.dgamma, dbeta, main.finish, g};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_bwd_reduce_pair(
    const Tensor& dz, const Tensor& z, const Tensor& x, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& gamma, const Tensor& other_x, const Tensor& other_mean, const Tensor& other_rstd,
    const OptionalTensor& other_gamma) {
  const Activations a("batch_norm_bwd_reduce_pair", "x", x);
  const Branch main(a, MAIN, x, mean, rstd, gamma);
  const Branch other(a, OTHER, other_x, other_mean, other_rstd, other_gamma);
  auto [dbeta, g] = reduce(a, dz, main, &other, std::nullopt, z, true);
  return {main.dgamma, other.dgamma, dbeta, main.finish, other.finish, g};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_bwd_finish(const Tensor& sums, const Tensor& mean,
                                                         const Tensor& rstd, const OptionalTensor& gamma,
                                                         int64_t count) {
  const char* op = "batch_norm_bwd_finish";
  check(mean.dim() == 1, op, ": mean: want float32 [C], got ", Described{mean});
  check(count >= 1, op, ": count: want at least 1 value per channel, got ", count);
  const int64_t c = mean.size(0);
  Tensor dgamma = empty_floats({c}, mean), dbeta = empty_floats({c}, mean),
         finish = empty_floats({6, c}, mean);
  const BatchNormBwdFinishParams p{c,
                                   channel_floats(op, "sums", sums, {2, c}),
                                   channel_floats(op, "mean", mean, {c}),
                                   channel_floats(op, "rstd", rstd, {c}),
                                   channel_floats(op, "gamma", gamma, {c}),
                                   count,
                                   floats_of(dgamma),
                                   floats_of(dbeta),
                                   floats_of(finish)};
  run_stage(batch_norm_bwd_finish_cpu, p, c);
  return {dgamma, dbeta, finish};
}

std::tuple<Tensor, Tensor> batch_norm_bwd_apply(const Tensor& dz, const Tensor& x, const Tensor& finish,
                                                const OptionalTensor& z, bool want_g) {
  const Activations a("batch_norm_bwd_apply", "x", x);
  const Tensor input = channels_adjacent(x), gradient = a.readable("dz", dz);
  const OptionalTensor output = a.readable("z", z);
  BatchNormBwdApplyParams p{};
  p.shape = a.shape;
  p.dtype = a.dtype;
  p.isa = isa_current();
  p.dz = gconv::view_of(gradient);
  p.x = gconv::view_of(input);
  p.finish = channel_floats(a.op, "finish", finish, a.table(6));
  p.z = view_of(output);
  Tensor dx = empty_channels_last(a.sizes(), x);
  Tensor g = want_g ? empty_channels_last(a.sizes(), x) : empty({0}, a.scalar_type, x);
  p.dx = writable_view_of(dx);
  if (want_g) p.g = writable_view_of(g);
  run_stage(batch_norm_bwd_apply_cpu, p, a.elements());
  return {dx, g};
}

namespace {

// x's activations, and the shape of what pooling by 2x2 makes of them.
struct Pooled : Activations {
  Shape pooled;

  Pooled(const char* op_name, const Tensor& x)
      : Activations(op_name, "x", x), pooled{shape.n, shape.c, shape.h / 2, shape.w / 2} {
    check(shape.h >= 2 && shape.w >= 2, op, ": x: want an image of at least 2x2, got ", Described{x});
  }
};

Tensor batch_norm_pool(const Tensor& x, const Tensor& affine) {
  const Pooled a("batch_norm_pool", x);
  const Tensor input = channels_adjacent(x), y = empty_channels_last(a.pooled, x);
  const BatchNormPoolParams p{a.shape,
                              a.dtype,
                              isa_current(),
                              gconv::view_of(input),
                              channel_floats(a.op, "affine", affine, a.table(2)),
                              writable_view_of(y)};
  run_stage(batch_norm_pool_cpu, p, a.elements());
  return y;
}

std::tuple<Tensor, Tensor> batch_norm_pool_bwd(const Tensor& dy, const Tensor& x, const Tensor& act,
                                               bool want_y, const Tensor& dx) {
  const Pooled a("batch_norm_pool_bwd", x);
  check_tensor(a.op, "dy", dy, a.scalar_type, a.pooled);
  check_output(a.op, "dx", dx, a.scalar_type, a.sizes());
  const Tensor gradient = channels_adjacent(dy), input = channels_adjacent(x);
  Tensor sums = empty_floats(a.table(2), x);
  Tensor y = want_y ? empty_channels_last(a.pooled, x) : empty({0}, a.scalar_type, x);
  BatchNormPoolBwdParams p{};
  p.shape = a.shape;
  p.dtype = a.dtype;
  p.isa = isa_current();
  p.dy = gconv::view_of(gradient);
  p.x = gconv::view_of(input);
  p.act = channel_floats(a.op, "act", act, a.table(4));
  p.dx = writable_view_of(dx);
  p.sums = floats_of(sums);
  if (want_y) p.y = writable_view_of(y);
  const Tensor workspace = empty_floats({batch_norm_pool_bwd_workspace(p)}, x);
  p.workspace = floats_of(workspace);
  run_stage(batch_norm_pool_bwd_cpu, p, a.elements());
  run_stage(batch_norm_pool_bwd_merge_cpu, p, workspace.numel());
  return {sums, y};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gconv, CPU, m) {
  m.impl("batch_norm_stats", TORCH_BOX(&batch_norm_stats));
  m.impl("batch_norm_fold", TORCH_BOX(&batch_norm_fold));
  m.impl("batch_norm_update_running", TORCH_BOX(&batch_norm_update_running));
  m.impl("batch_norm_apply", TORCH_BOX(&batch_norm_apply));
  m.impl("batch_norm_apply_into", TORCH_BOX(&batch_norm_apply_into));
  m.impl("batch_norm_bwd_reduce", TORCH_BOX(&batch_norm_bwd_reduce));
  m.impl("batch_norm_bwd_reduce_pair", TORCH_BOX(&batch_norm_bwd_reduce_pair));
  m.impl("batch_norm_bwd_finish", TORCH_BOX(&batch_norm_bwd_finish));
  m.impl("batch_norm_bwd_apply", TORCH_BOX(&batch_norm_bwd_apply));
  m.impl("batch_norm_pool", TORCH_BOX(&batch_norm_pool));
  m.impl("batch_norm_pool_bwd", TORCH_BOX(&batch_norm_pool_bwd));
}

}  // namespace gconv
