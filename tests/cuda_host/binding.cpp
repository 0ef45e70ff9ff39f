// The CUDA kernels' launchers for NumPy, on the CPU.
#include "run.h"

using namespace gconv;
using gconv::cuda::Run;

namespace {

template <typename Params>
Params chosen(const Run& run, Params p) {
  p.tf32 = run.tf32;
  if (run.channels_last_weight) p.layout = {1, p.shape.c / p.shape.groups};
  return p;
}

template <typename Params>
void call(const Run& run, Params p, int64_t (*workspace_size)(const Params&),
          void (*launcher)(const Params&, void*)) {
  cuda::host::set(run.settings);
  const NanFilled workspace(workspace_size(p), 512);
  p.workspace = workspace.data();
  launcher(p, nullptr);
}

void conv_fwd(const Run& run, std::array<int64_t, 4> input, int64_t k, Pair stride, Pair pad, Pair dilation,
              int64_t groups, py::object x, py::object weight, py::object act, py::object affine,
              py::object residual, bool relu, py::object y, py::object mean, py::object var) {
  const GroupedConvShape s = conv_shape(input, k, stride, pad, dilation, groups);
  call(run, chosen(run, fwd_params(run, s, x, weight, act, affine, residual, relu, y, mean, var)),
       grouped_conv_fwd_workspace_cuda, grouped_conv_fwd_cuda);
}

void conv_bwd_input(const Run& run, std::array<int64_t, 4> input, int64_t k, Pair stride, Pair pad,
                    Pair dilation, int64_t groups, py::object dy, py::object weight, py::object y,
                    py::object finish, py::object x, py::object act, py::object dx, py::object sums) {
  const GroupedConvShape s = conv_shape(input, k, stride, pad, dilation, groups);
  call(run, chosen(run, bwd_input_params(run, s, dy, weight, y, finish, x, act, dx, sums)),
       grouped_conv_bwd_input_workspace_cuda, grouped_conv_bwd_input_cuda);
}

void conv_bwd_weight(const Run& run, std::array<int64_t, 4> input, int64_t k, Pair stride, Pair pad,
                     Pair dilation, int64_t groups, py::object dy, py::object x, py::object y,
                     py::object finish, py::object act, py::object dweight) {
  const GroupedConvShape s = conv_shape(input, k, stride, pad, dilation, groups);
  call(run, chosen(run, bwd_weight_params(run, s, dy, x, y, finish, act, dweight)),
       grouped_conv_bwd_weight_workspace_cuda, grouped_conv_bwd_weight_cuda);
}

}  // namespace

PYBIND11_MODULE(gconv_cuda_host, m) {
  Run::bind(m);
  m.def("grouped_conv_fwd", &conv_fwd);
  m.def("grouped_conv_bwd_input", &conv_bwd_input);
  m.def("grouped_conv_bwd_weight", &conv_bwd_weight);
}
