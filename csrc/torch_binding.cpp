// The extension module and what concerns no single op: importing gconv._C registers the torch operators.
#include "guards.h"

#include <string>
#include <tuple>
#include <vector>

#include "cpu/caching_allocator.h"
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

Use use_of(const char* op, const std::string& name) {
  Use use;
  check(use_from_name(name.c_str(), &use), op, ": use: want never, auto or always, got ", name);
  return use;
}

std::string cpu_winograd() { return use_name(winograd_current()); }
void set_cpu_winograd(std::string name) { winograd_set(use_of("set_cpu_winograd", name)); }
std::string cpu_strassen() { return use_name(strassen_current()); }
void set_cpu_strassen(std::string name) { strassen_set(use_of("set_cpu_strassen", name)); }

void set_cpu_cache_limit(int64_t bytes) {
  check(bytes >= 0, "set_cpu_cache_limit: bytes: want at least 0, got ", bytes);
  cache_limit_set(bytes);
}

std::tuple<int64_t, int64_t> cpu_cache_use() {
  const CacheUse use = cache_use();
  return {use.allocated, use.cached};
}

Tensor cpu_empty(std::vector<int64_t> size, ScalarType type, bool channels_last) {
  check(size.size() == 4, "cpu_empty: size: want 4 sizes, got ", size.size());
  for (int64_t s : size) check(s >= 0, "cpu_empty: size: want sizes of at least 0, got ", s);
  return empty({size[0], size[1], size[2], size[3]}, type, Device(DeviceType::CPU),
               channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace

}  // namespace gconv

STABLE_TORCH_LIBRARY(gconv, m) {
  m.def("cpu_isa() -> str");
  m.def("set_cpu_isa(str isa) -> ()");
  m.def("cpu_winograd() -> str");
  m.def("set_cpu_winograd(str use) -> ()");
  m.def("cpu_strassen() -> str");
  m.def("set_cpu_strassen(str use) -> ()");
  m.def("cpu_cache_limit() -> int");
  m.def("set_cpu_cache_limit(int bytes) -> ()");
  m.def("cpu_cache_use() -> (int allocated, int cached)");
  m.def("empty_cpu_cache() -> ()");
  m.def("cpu_empty(int[] size, ScalarType dtype, bool channels_last) -> Tensor");
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
  m.impl("cpu_strassen", TORCH_BOX(&gconv::cpu_strassen));
  m.impl("set_cpu_strassen", TORCH_BOX(&gconv::set_cpu_strassen));
  m.impl("cpu_cache_limit", TORCH_BOX(&gconv::cache_limit));
  m.impl("set_cpu_cache_limit", TORCH_BOX(&gconv::set_cpu_cache_limit));
  m.impl("cpu_cache_use", TORCH_BOX(&gconv::cpu_cache_use));
  m.impl("empty_cpu_cache", TORCH_BOX(&gconv::empty_cache));
  m.impl("cpu_empty", TORCH_BOX(&gconv::cpu_empty));
}

// What packed weights depend on besides the call, as one number. No op, for it is asked before each
// convolution: an op's way through the dispatcher takes twenty times as long.
static PyObject* cpu_settings(PyObject*, PyObject*) {
  try {
    const long isa = static_cast<long>(gconv::isa_current());
    const long winograd = static_cast<long>(gconv::winograd_current());
    return PyLong_FromLong(16 * isa + 4 * winograd + static_cast<long>(gconv::strassen_current()));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

// The signature of METH_FASTCALL, as a method table holds it.
template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyCFunction fast_call() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

static PyMethodDef methods[] = {{"cpu_settings", cpu_settings, METH_NOARGS, nullptr},
                                {"make_guard", fast_call<gconv::make_guard>(), METH_FASTCALL, nullptr},
                                {"guard_holds", fast_call<gconv::guard_holds>(), METH_FASTCALL, nullptr},
                                {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
