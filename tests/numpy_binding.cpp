// The torch-free kernels for NumPy, so that they can be tested on their own and under sanitizers.
//
// The workspace is allocated here, filled with NaN and guarded behind its end, and a stage's shares run on
// threads of their own.
#include <memory>
#include <thread>
#include <vector>

#include "amx_emulator.h"
#include "batch_norm.h"
#include "numpy_arrays.h"
#include "pointwise_conv.h"

using namespace gconv;

namespace {

// Whether the AMX kernels run here on the emulator: the CPU lacks AMX alone, and the binary has them.
bool emulates_amx() {
#if defined(GCONV_AMX)
  static const bool emulated =
      isa_supported(Isa::avx512_bf16) && !isa_supported(Isa::amx_bf16) && (amx_emulator::install(), true);
  return emulated;
#else
  return false;
#endif
}
bool can_run(Isa isa) { return isa_supported(isa) || (isa == Isa::amx_bf16 && emulates_amx()); }

struct Run : Arrays {
  Isa isa;
  int64_t threads;
  Use winograd, strassen;
  bool ahead;  // forwards get their weights packed
  Run(const std::string& isa_text, const std::string& dtype_text, int64_t thread_count,
      const std::string& winograd_text, const std::string& strassen_text, bool packs_ahead)
      : Arrays(dtype_text), threads(thread_count), ahead(packs_ahead) {
    if (!use_from_name(winograd_text.c_str(), &winograd))
      throw std::invalid_argument("winograd: " + winograd_text);
    if (!use_from_name(strassen_text.c_str(), &strassen))
      throw std::invalid_argument("strassen: " + strassen_text);
    if (!isa_from_name(isa_text.c_str(), &isa) || !can_run(isa))
      throw std::invalid_argument("isa: " + isa_text);
  }

  template <typename Params>
  void stage(void (*f)(const Params&, int64_t, int64_t), const Params& p) const {
    std::vector<std::thread> others;
    for (int64_t ith = 1; ith < threads; ++ith)
      others.emplace_back([&p, f, ith, this] { f(p, ith, threads); });
    f(p, 0, threads);
    for (std::thread& t : others) t.join();
  }

  // The parameters with this run's kernels chosen.
  template <typename Params>
  Params chosen(Params p) const {
    p.isa = isa, p.winograd = winograd;
    return p;
  }
};

// A cache line's alignment, as the kernels are promised.
struct Workspace : NanFilled {
  explicit Workspace(int64_t floats) : NanFilled(floats, 64) {}
};

// Packs the weights of a forward before it, if the run is of that kind.
template <typename Params>
std::unique_ptr<Workspace> pack_ahead(const Run& run, Params& p, int64_t (*floats)(const Params&),
                                      void (*pack)(const Params&, int64_t, int64_t)) {
  if (!run.ahead) return nullptr;
  auto packed = std::make_unique<Workspace>(floats(p));
  p.workspace = packed->data();
  run.stage(pack, p);
  p.packed = packed->data();
  p.weight = nullptr;
  return packed;
}

void conv_fwd(const Run& run, std::array<int64_t, 4> input, int64_t k, Pair stride, Pair pad, Pair dilation,
              int64_t groups, py::object x, py::object weight, py::object act, py::object affine,
              py::object residual, bool relu, py::object y, py::object mean, py::object var) {
  const GroupedConvShape s = conv_shape(input, k, stride, pad, dilation, groups);
  GroupedConvFwdParams p =
      run.chosen(fwd_params(run, s, x, weight, act, affine, residual, relu, y, mean, var));
  const auto packed = pack_ahead(run, p, grouped_conv_packed_floats, grouped_conv_pack_weights_cpu);
  const Workspace workspace(grouped_conv_fwd_workspace(p));
  p.workspace = workspace.data();
  run.stage(grouped_conv_fwd_pack_cpu, p);
  run.stage(grouped_conv_fwd_cpu, p);
  if (p.mean) run.stage(grouped_conv_fwd_merge_cpu, p);
}

void conv_bwd_input(const Run& run, std::array<int64_t, 4> input, int64_t k, Pair stride, Pair pad,
                    Pair dilation, int64_t groups, py::object dy, py::object weight, py::object y,
                    py::object finish, py::object x, py::object act, py::object dx, py::object sums) {
  const GroupedConvShape s = conv_shape(input, k, stride, pad, dilation, groups);
  GroupedConvBwdInputParams p = run.chosen(bwd_input_params(run, s, dy, weight, y, finish, x, act, dx, sums));
  const Workspace workspace(grouped_conv_bwd_input_workspace(p));
  p.workspace = workspace.data();
  run.stage(grouped_conv_bwd_input_pack_cpu, p);
  run.stage(grouped_conv_bwd_input_cpu, p);
  if (p.sums) run.stage(grouped_conv_bwd_input_merge_cpu, p);
}

void conv_bwd_weight(const Run& run, std::array<int64_t, 4> input, int64_t k, Pair stride, Pair pad,
                     Pair dilation, int64_t groups, py::object dy, py::object x, py::object y,
                     py::object finish, py::object act, py::object dweight) {
  const GroupedConvShape s = conv_shape(input, k, stride, pad, dilation, groups);
  GroupedConvBwdWeightParams p = run.chosen(bwd_weight_params(run, s, dy, x, y, finish, act, dweight));
  const Workspace workspace(grouped_conv_bwd_weight_workspace(p));
  p.workspace = workspace.data();
  run.stage(grouped_conv_bwd_weight_cpu, p);
  run.stage(grouped_conv_bwd_weight_merge_cpu, p);
}

void conv_bwd(const Run& run, std::array<int64_t, 4> input, int64_t k, Pair stride, Pair pad, Pair dilation,
              int64_t groups, py::object dy, py::object x, py::object weight, py::object y, py::object finish,
              py::object act, py::object dx, py::object dweight, py::object sums) {
  const GroupedConvShape s = conv_shape(input, k, stride, pad, dilation, groups);
  const py::object raw = act.is_none() ? py::none() : x;
  GroupedConvBwdParams p{run.chosen(bwd_input_params(run, s, dy, weight, y, finish, raw, act, dx, sums)),
                         run.chosen(bwd_weight_params(run, s, dy, x, y, finish, py::none(), dweight))};
  p.weight.act = p.input.act;
  const Workspace input_workspace(grouped_conv_bwd_input_workspace(p.input));
  const Workspace weight_workspace(grouped_conv_bwd_weight_workspace(p.weight));
  p.input.workspace = input_workspace.data();
  p.weight.workspace = weight_workspace.data();
  run.stage(grouped_conv_bwd_input_pack_cpu, p.input);
  run.stage(grouped_conv_bwd_cpu, p);
  if (p.input.sums) run.stage(grouped_conv_bwd_input_merge_cpu, p.input);
  run.stage(grouped_conv_bwd_weight_merge_cpu, p.weight);
}

PointwiseConvShape pointwise_shape(const std::array<int64_t, 4>& input, int64_t k, Pair stride) {
  return {
      input[0], input[1],  input[2], input[3], (input[1] - 1) / stride[0] + 1, (input[2] - 1) / stride[1] + 1,
      k,        stride[0], stride[1]};
}

void pointwise_fwd(const Run& run, std::array<int64_t, 4> input, int64_t k, Pair stride, py::object x,
                   py::object weight, py::object act, py::object affine, py::object residual, bool relu,
                   py::object y, py::object mean, py::object var) {
  const PointwiseConvShape s = pointwise_shape(input, k, stride);
  const std::array<int64_t, 4> output{s.n, s.oh, s.ow, s.k};
  PointwiseConvFwdParams p{};
  p.shape = s, p.dtype = run.dtype, p.isa = run.isa, p.strassen = run.strassen;
  p.x = run.activation("x", x, input);
  p.weight = run.contiguous("weight", weight, s.k * s.c);
  p.act = floats("act", act, 2 * s.c);
  p.affine = floats("affine", affine, 2 * s.k);
  p.residual = run.activation("residual", residual, output);
  p.relu = relu;
  p.y = run.activation("y", y, output);
  p.mean = floats("mean", mean, s.k);
  p.var = floats("var", var, s.k);
  const auto packed = pack_ahead(run, p, pointwise_conv_packed_floats, pointwise_conv_pack_weights_cpu);
  const Workspace workspace(pointwise_conv_fwd_workspace(p));
  p.workspace = workspace.data();
  run.stage(pointwise_conv_fwd_pack_cpu, p);
  run.stage(pointwise_conv_fwd_cpu, p);
  if (p.mean) run.stage(pointwise_conv_fwd_merge_cpu, p);
}

void pointwise_bwd(const Run& run, std::array<int64_t, 4> input, int64_t k, Pair stride, py::object dy,
                   py::object x, py::object weight, py::object y, py::object finish, py::object act,
                   py::object residual, py::object dx, py::object dweight, py::object sums, bool add) {
  const PointwiseConvShape s = pointwise_shape(input, k, stride);
  const std::array<int64_t, 4> output{s.n, s.oh, s.ow, s.k};
  PointwiseConvBwdParams p{};
  p.shape = s, p.dtype = run.dtype, p.isa = run.isa, p.strassen = run.strassen;
  p.dy = run.activation("dy", dy, output);
  p.y = run.activation("y", y, output);
  p.finish = floats("finish", finish, 6 * s.k);
  p.x = run.activation("x", x, input);
  p.act = floats("act", act, 4 * s.c);
  p.weight = run.contiguous("weight", weight, s.k * s.c);
  p.residual = run.activation("residual", residual, input);
  p.dx = run.activation("dx", dx, input);
  p.add = add;
  p.sums = floats("sums", sums, 2 * s.c);
  p.dweight = dweight.is_none() ? nullptr : run.contiguous("dweight", dweight, s.k * s.c);
  const Workspace workspace(pointwise_conv_bwd_workspace(p));
  p.workspace = workspace.data();
  if (p.dx.data != nullptr) run.stage(pointwise_conv_bwd_pack_cpu, p);
  run.stage(pointwise_conv_bwd_cpu, p);
  run.stage(pointwise_conv_bwd_merge_cpu, p);
}

void norm_stats(const Run& run, std::array<int64_t, 4> s, py::object x, py::object mean, py::object var) {
  BatchNormStatsParams p{};
  p.shape = {s[0], s[1], s[2], s[3]}, p.dtype = run.dtype, p.isa = run.isa;
  p.x = run.activation("x", x, s);
  p.mean = floats("mean", mean, s[3]);
  p.var = floats("var", var, s[3]);
  const Workspace workspace(batch_norm_stats_workspace(p));
  p.workspace = workspace.data();
  run.stage(batch_norm_stats_cpu, p);
  run.stage(batch_norm_stats_merge_cpu, p);
}

void norm_fold(const Run& run, int64_t c, py::object mean, py::object var, py::object gamma, py::object beta,
               double eps, py::object rstd, py::object affine) {
  const BatchNormFoldParams p{c,
                              floats("mean", mean, c),
                              floats("var", var, c),
                              floats("gamma", gamma, c),
                              floats("beta", beta, c),
                              eps,
                              floats("rstd", rstd, c),
                              floats("affine", affine, 2 * c)};
  run.stage(batch_norm_fold_cpu, p);
}

void norm_update_running(const Run& run, int64_t c, py::object mean, py::object var, py::object shift,
                         int64_t count, double momentum, py::object running_mean, py::object running_var) {
  const BatchNormUpdateRunningParams p{c,
                                       floats("mean", mean, c),
                                       floats("var", var, c),
                                       floats("shift", shift, c),
                                       count,
                                       momentum,
                                       floats("running_mean", running_mean, c),
                                       floats("running_var", running_var, c)};
  run.stage(batch_norm_update_running_cpu, p);
}

void norm_apply(const Run& run, std::array<int64_t, 4> s, py::object x, py::object affine,
                py::object residual, py::object residual_affine, bool relu, py::object y) {
  BatchNormApplyParams p{};
  p.shape = {s[0], s[1], s[2], s[3]}, p.dtype = run.dtype, p.isa = run.isa;
  p.x = run.activation("x", x, s);
  p.affine = floats("affine", affine, 2 * s[3]);
  p.residual = run.activation("residual", residual, s);
  p.residual_affine = floats("residual_affine", residual_affine, 2 * s[3]);
  p.relu = relu;
  p.y = run.activation("y", y, s);
  run.stage(batch_norm_apply_cpu, p);
}

BatchNormBwdBranch bwd_branch(const Run& run, std::array<int64_t, 4> s, py::object x, py::object mean,
                              py::object rstd, py::object gamma, py::object dgamma, py::object finish) {
  return {run.activation("x", x, s),    floats("mean", mean, s[3]),     floats("rstd", rstd, s[3]),
          floats("gamma", gamma, s[3]), floats("dgamma", dgamma, s[3]), floats("finish", finish, 6 * s[3])};
}

// `other`: x, mean, rstd, gamma, dgamma and finish of another branch, or nothing.
void norm_bwd_reduce(const Run& run, std::array<int64_t, 4> s, py::object dz, py::object x, py::object mean,
                     py::object rstd, py::object gamma, py::object affine, py::object z, py::object dgamma,
                     py::object dbeta, py::object finish, py::object g, std::vector<py::object> other) {
  BatchNormBwdReduceParams p{};
  p.shape = {s[0], s[1], s[2], s[3]}, p.dtype = run.dtype, p.isa = run.isa;
  p.dz = run.activation("dz", dz, s);
  p.main = bwd_branch(run, s, x, mean, rstd, gamma, dgamma, finish);
  if (!other.empty())
    p.other =
        bwd_branch(run, s, other.at(0), other.at(1), other.at(2), other.at(3), other.at(4), other.at(5));
  p.affine = floats("affine", affine, 2 * s[3]);
  p.z = run.activation("z", z, s);
  p.dbeta = floats("dbeta", dbeta, s[3]);
  p.g = run.activation("g", g, s);
  const Workspace workspace(batch_norm_bwd_reduce_workspace(p));
  p.workspace = workspace.data();
  run.stage(batch_norm_bwd_reduce_cpu, p);
  run.stage(batch_norm_bwd_reduce_merge_cpu, p);
}

void norm_bwd_finish(const Run& run, int64_t c, py::object sums, py::object mean, py::object rstd,
                     py::object gamma, int64_t count, py::object dgamma, py::object dbeta,
                     py::object finish) {
  const BatchNormBwdFinishParams p{c,
                                   floats("sums", sums, 2 * c),
                                   floats("mean", mean, c),
                                   floats("rstd", rstd, c),
                                   floats("gamma", gamma, c),
                                   count,
                                   floats("dgamma", dgamma, c),
                                   floats("dbeta", dbeta, c),
                                   floats("finish", finish, 6 * c)};
  run.stage(batch_norm_bwd_finish_cpu, p);
}

void norm_bwd_apply(const Run& run, std::array<int64_t, 4> s, py::object dz, py::object x, py::object finish,
                    py::object z, py::object dx, py::object g) {
  BatchNormBwdApplyParams p{};
  p.shape = {s[0], s[1], s[2], s[3]}, p.dtype = run.dtype, p.isa = run.isa;
  p.dz = run.activation("dz", dz, s);
  p.x = run.activation("x", x, s);
  p.finish = floats("finish", finish, 6 * s[3]);
  p.z = run.activation("z", z, s);
  p.dx = run.activation("dx", dx, s);
  p.g = run.activation("g", g, s);
  run.stage(batch_norm_bwd_apply_cpu, p);
}

void norm_pool(const Run& run, std::array<int64_t, 4> s, py::object x, py::object affine, py::object y) {
  BatchNormPoolParams p{};
  p.shape = {s[0], s[1], s[2], s[3]}, p.dtype = run.dtype, p.isa = run.isa;
  p.x = run.activation("x", x, s);
  p.affine = floats("affine", affine, 2 * s[3]);
  p.y = run.activation("y", y, {s[0], s[1] / 2, s[2] / 2, s[3]});
  run.stage(batch_norm_pool_cpu, p);
}

void norm_pool_bwd(const Run& run, std::array<int64_t, 4> s, py::object dy, py::object x, py::object act,
                   py::object dx, py::object sums, py::object y) {
  const std::array<int64_t, 4> pooled{s[0], s[1] / 2, s[2] / 2, s[3]};
  BatchNormPoolBwdParams p{};
  p.shape = {s[0], s[1], s[2], s[3]}, p.dtype = run.dtype, p.isa = run.isa;
  p.dy = run.activation("dy", dy, pooled);
  p.x = run.activation("x", x, s);
  p.act = floats("act", act, 4 * s[3]);
  p.dx = run.activation("dx", dx, s);
  p.sums = floats("sums", sums, 2 * s[3]);
  p.y = run.activation("y", y, pooled);
  const Workspace workspace(batch_norm_pool_bwd_workspace(p));
  p.workspace = workspace.data();
  run.stage(batch_norm_pool_bwd_cpu, p);
  run.stage(batch_norm_pool_bwd_merge_cpu, p);
}

// The sums [16][16] of float32 plus rows [16][32] times columns [16][16][2] of bfloat16, as tiles shaped by
// a configuration of 64 bytes.
void tile_product(py::bytes configuration, py::object sums, py::object rows, py::object columns) {
  if (!can_run(Isa::amx_bf16)) throw std::invalid_argument("isa: amx_bf16");
  const Arrays pairs("bfloat16");
  alignas(64) char shapes[64];
  const std::string given = configuration;
  if (given.size() != sizeof shapes) throw std::invalid_argument("configuration");
  std::memcpy(shapes, given.data(), sizeof shapes);
  amx_emulator::tile_product(shapes, floats("sums", sums, 256), pairs.contiguous("rows", rows, 512),
                             pairs.contiguous("columns", columns, 512));
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (Isa isa : ISAS)
    if (can_run(isa)) names.push_back(isa_name(isa));
  return names;
}

}  // namespace

PYBIND11_MODULE(gconv_kernels_numpy, m) {
  py::class_<Run>(m, "Run").def(py::init<std::string, std::string, int64_t, std::string, std::string, bool>(),
                                py::arg("isa"), py::arg("dtype"), py::arg("threads") = 1,
                                py::arg("winograd") = "auto", py::arg("strassen") = "auto",
                                py::arg("ahead") = false);
  m.def("supported_isas", &supported_isas);
  m.def("emulates_amx", &emulates_amx);
  m.def("emulated_products", &amx_emulator::products);
  m.def("corrupt_emulated_product", &amx_emulator::corrupt_after);
  m.def("emulated_tiles_configured", &amx_emulator::configured);
  m.def("tile_product", &tile_product);
  m.def("grouped_conv_fwd", &conv_fwd);
  m.def("grouped_conv_bwd_input", &conv_bwd_input);
  m.def("grouped_conv_bwd_weight", &conv_bwd_weight);
  m.def("grouped_conv_bwd", &conv_bwd);
  m.def("pointwise_conv_fwd", &pointwise_fwd);
  m.def("pointwise_conv_bwd", &pointwise_bwd);
  m.def("batch_norm_stats", &norm_stats);
  m.def("batch_norm_fold", &norm_fold);
  m.def("batch_norm_update_running", &norm_update_running);
  m.def("batch_norm_apply", &norm_apply);
  m.def("batch_norm_bwd_reduce", &norm_bwd_reduce);
  m.def("batch_norm_bwd_finish", &norm_bwd_finish);
  m.def("batch_norm_bwd_apply", &norm_bwd_apply);
  m.def("batch_norm_pool", &norm_pool);
  m.def("batch_norm_pool_bwd", &norm_pool_bwd);
}
