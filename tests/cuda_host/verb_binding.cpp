// The kernels of verb_kernels.cu for NumPy: arrays of uint32.
#include "run.h"
#include "verb_kernels.h"

using namespace gconv::cuda;
namespace py = pybind11;

namespace {

using Words = py::array_t<uint32_t, py::array::c_style>;

VerbParams params(const Run& run, const Words& in, Words& out, int option) {
  host::set(run.settings);
  return {in.data(), out.mutable_data(), option};
}

}  // namespace

PYBIND11_MODULE(gconv_cuda_verbs, m) {
  Run::bind(m);
#if defined(__SANITIZE_ADDRESS__)
  m.attr("SANITIZED") = true;
#else
  m.attr("SANITIZED") = false;
#endif
  m.def("mma", [](const Run& run, bool half, const Words& in, Words out) {
    mma_words(run.dtype, run.tf32, half, params(run, in, out, 0), nullptr);
  });
  m.def("matrices", [](const Run& run, int matrices, bool transposed, const Words& in, Words out) {
    matrix_words(matrices, transposed, params(run, in, out, 0), nullptr);
  });
  m.def("shuffle", [](const Run& run, int mask, const Words& in, Words out) {
    shuffle_words(params(run, in, out, mask), nullptr);
  });
  m.def("rounded", [](const Run& run, const Words& in, Words out) {
    rounded_words(run.dtype, run.tf32, in.size(), params(run, in, out, 0), nullptr);
  });
  m.def("copied", [](const Run& run, int pending, const Words& in, Words out) {
    copied_words(params(run, in, out, pending), nullptr);
  });
  m.def("turned", [](const Run& run, const Words& in, Words out) {
    turned_words(int(in.size()), params(run, in, out, 0), nullptr);
  });
  m.def(
      "faulty",
      [](const Run& run, int option, const Words& in, Words out, int threads, int64_t shared_bytes) {
        faulty(threads, shared_bytes, params(run, in, out, option), nullptr);
      },
      py::arg("run"), py::arg("option"), py::arg("in"), py::arg("out"), py::arg("threads") = 64,
      py::arg("shared_bytes") = 1024);
}
