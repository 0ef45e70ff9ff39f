// The extension module and what concerns no single op: importing gconv._C registers the torch operators.
#include <Python.h>

#include <string>

#include "cpu/isa.h"
#include "torch_tensors.h"

namespace gconv {

namespace {

std::string cpu_isa() { return isa_name(isa_current()); }

void set_cpu_isa(std::string name) {
  Isa isa;
  check(isa_from_name(name.c_str(), &isa), "set_cpu_isa: isa: want ", ISA_NAMES, ", got ", name);
  isa_set(isa);
}

std::string cpu_winograd() { return winograd_name(winograd_current()); }

void set_cpu_winograd(std::string name) {
  Winograd use;
  check(winograd_from_name(name.c_str(), &use), "set_cpu_winograd: use: want never, auto or always, got ",
        name);
  winograd_set(use);
}

}  // namespace

}  // namespace gconv

STABLE_TORCH_LIBRARY(gconv, m) {
  m.def("cpu_isa() -> str");
  m.def("set_cpu_isa(str isa) -> ()");
  m.def("cpu_winograd() -> str");
  m.def("set_cpu_winograd(str use) -> ()");
#define GCONV_OP(schema) m.def(schema);
#include "../gconv/schemas.inc"
#undef GCONV_OP
}

// No argument is a tensor, so there is no backend to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(gconv, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&gconv::cpu_isa));
  m.impl("set_cpu_isa", TORCH_BOX(&gconv::set_cpu_isa));
  m.impl("cpu_winograd", TORCH_BOX(&gconv::cpu_winograd));
  m.impl("set_cpu_winograd", TORCH_BOX(&gconv::set_cpu_winograd));
}

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
