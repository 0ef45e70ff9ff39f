// How a call of the CUDA kernels on the CPU runs, for the bindings.
#pragma once
#include "../numpy_arrays.h"
#include "cuda_host.h"

namespace gconv::cuda {

struct Run : Arrays {
  host::Settings settings;
  bool tf32;                  // float32 products may be rounded to TF32
  bool channels_last_weight;  // weights are arrays [K, 3, 3, C/groups]

  Run(const std::string& dtype, const std::string& order, uint64_t seed, const std::string& without,
      int multiprocessors, int64_t shared_per_block, int64_t shared_per_multiprocessor, bool tf32,
      bool channels_last_weight)
      : Arrays(dtype), tf32(tf32), channels_last_weight(channels_last_weight) {
    settings.device = {multiprocessors, shared_per_block, shared_per_multiprocessor};
    settings.seed = seed;
    settings.without = without;
    if (order == "forward")
      settings.order = host::Order::forward;
    else if (order == "reversed")
      settings.order = host::Order::reversed;
    else if (order == "shuffled")
      settings.order = host::Order::shuffled;
    else
      throw std::invalid_argument("order: want forward, reversed or shuffled, got " + order);
  }

  static void bind(py::module_& m) {
    const Device d = host::Settings().device;
    py::class_<Run>(m, "Run", py::module_local())
        .def(py::init<std::string, std::string, uint64_t, std::string, int, int64_t, int64_t, bool, bool>(),
             py::arg("dtype"), py::kw_only(), py::arg("order") = "forward", py::arg("seed") = 0,
             py::arg("without") = "", py::arg("multiprocessors") = d.multiprocessors,
             py::arg("shared_per_block") = d.shared_per_block,
             py::arg("shared_per_multiprocessor") = d.shared_per_multiprocessor, py::arg("tf32") = false,
             py::arg("channels_last_weight") = false);
    m.def("passed", &host::passed, "The barriers and waits that the last call passed: 'verb file:line'.");
  }
};

}  // namespace gconv::cuda
