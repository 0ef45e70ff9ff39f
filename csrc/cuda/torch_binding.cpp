// The extension module gconv._cuda: importing it registers torch.ops.gconv_cuda.grouped_conv_*, the ops of
// gconv/schemas.inc on the CUDA C++ kernels, and two more arguments: whether float32 products may be rounded
// to TF32, and the stream, a cudaStream_t of the current device as an integer.
//
// The stream comes from Python and the CUDA runtime is linked statically, so nothing here needs torch's CUDA
// libraries: the module also links and loads beside a torch without CUDA. It is a module of its own, not a
// part of gconv._C, so that where it does not load the CPU kernels do.
#include <Python.h>

#include <string>

#include "../grouped_conv_binding.h"

#define GCONV_TEXT(...) #__VA_ARGS__
#define GCONV_EXPANDED_TEXT(...) GCONV_TEXT(__VA_ARGS__)

namespace gconv {

Tensor empty(const Shape& shape, ScalarType type, const Device& device, MemoryFormat format) {
  return torch::stable::empty({shape.size, static_cast<size_t>(shape.rank)}, type, std::nullopt, device,
                              std::nullopt, format);
}

namespace {

struct CudaKernels {
  static constexpr DeviceType DEVICE = DeviceType::CUDA;
  bool tf32;
  int64_t stream;

  template <typename Params>
  void prepare(Params& p) const {
    p.tf32 = tf32;
  }

  static int64_t workspace(const GroupedConvFwdParams& p) { return grouped_conv_fwd_workspace_cuda(p); }
  static int64_t workspace(const GroupedConvBwdInputParams& p) {
    return grouped_conv_bwd_input_workspace_cuda(p);
  }
  static int64_t workspace(const GroupedConvBwdWeightParams& p) {
    return grouped_conv_bwd_weight_workspace_cuda(p);
  }

  void run(const GroupedConvFwdParams& p, int64_t) const { grouped_conv_fwd_cuda(p, cuda_stream()); }
  void run(const GroupedConvBwdInputParams& p, int64_t) const {
    grouped_conv_bwd_input_cuda(p, cuda_stream());
  }
  void run(const GroupedConvBwdWeightParams& p, int64_t) const {
    grouped_conv_bwd_weight_cuda(p, cuda_stream());
  }
  void run(const GroupedConvBwdParams& p, int64_t workspace) const {
    run(p.input, workspace);
    run(p.weight, workspace);
  }

 private:
  void* cuda_stream() const { return reinterpret_cast<void*>(stream); }
};

using CudaOps = GroupedConvOps<CudaKernels, bool, int64_t>;

// What the kernels are compiled for: "sm_80,sm_90a,compute_90".
std::string architectures() { return GCONV_EXPANDED_TEXT(GCONV_CUDA_ARCHITECTURES); }

// Defines an op of schemas.inc where it is one of ours.
void define(torch::stable::detail::StableLibrary& m, std::string schema) {
  if (schema.rfind("grouped_conv_", 0) != 0) return;
  m.def(schema.insert(schema.find(") ->"), ", bool tf32=False, int stream=0").c_str());
}

}  // namespace

}  // namespace gconv

STABLE_TORCH_LIBRARY(gconv_cuda, m) {
  m.def("architectures() -> str");
#define GCONV_OP(schema) gconv::define(m, schema);
#include "../../gconv/schemas.inc"
#undef GCONV_OP
}

// For every backend: a tensor elsewhere is refused by the ops themselves, in one line.
STABLE_TORCH_LIBRARY_IMPL(gconv_cuda, CompositeExplicitAutograd, m) {
  m.impl("architectures", TORCH_BOX(&gconv::architectures));
  gconv::implement_grouped_conv<gconv::CudaOps>(m);
}

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&module); }
