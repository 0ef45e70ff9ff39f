#include "guards.h"

#include <cstdint>

// A guard is the tuple (state, inputs, tensors, modules) of what `make_guard` saw; `guard_holds` looks at the
// same things in the same order. It stands before each call, between large kernels, where everything it
// touches is cold: so it reads pointers and asks torch for as little as it can.
namespace gconv {

namespace {

// A reference that is dropped at the end of the scope.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_;
};

// The names that are asked for, made once.
struct Names {
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* layout = PyUnicode_InternFromString("layout");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* version = PyUnicode_InternFromString("_version");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* detach = PyUnicode_InternFromString("detach");
};
const Names& names() {
  static const Names made;
  return made;
}

// What the walks below do with the next thing they come to: each returns whether to go on. A walk that stops
// leaves an exception or, of a comparison alone, none.

class Recorder {
 public:
  Recorder() : list_(PyList_New(0)) {}
  bool same(PyObject* object) { return list_ && PyList_Append(list_.get(), object) == 0; }
  bool equal(PyObject* object) { return same(object); }
  PyObject* tuple() { return list_ ? PyList_AsTuple(list_.get()) : nullptr; }

 private:
  Owned list_;
};

class Comparer {
 public:
  explicit Comparer(PyObject* seen) : seen_(seen), size_(PyTuple_Size(seen)) {}
  bool same(PyObject* object) { return at_ < size_ && PyTuple_GetItem(seen_, at_++) == object; }
  bool equal(PyObject* object) {
    return at_ < size_ && PyObject_RichCompareBool(PyTuple_GetItem(seen_, at_++), object, Py_EQ) == 1;
  }
  bool done() const { return at_ == size_; }

 private:
  PyObject* seen_;
  Py_ssize_t size_, at_ = 0;
};

template <typename Visitor>
bool attribute(PyObject* object, PyObject* name, Visitor& v) {
  const Owned value(PyObject_GetAttr(object, name));
  return value && v.same(value.get());
}

template <typename Visitor>
bool equal_attribute(PyObject* object, PyObject* name, Visitor& v) {
  const Owned value(PyObject_GetAttr(object, name));
  return value && v.equal(value.get());
}

template <typename Visitor>
bool equal_result(PyObject* object, PyObject* method, Visitor& v) {
  const Owned value(PyObject_CallMethodObjArgs(object, method, nullptr));
  return value && v.equal(value.get());
}

// What kind of tensor it is. First what says that the rest can be asked for.
template <typename Visitor>
bool walk_kind(PyObject* tensor, Visitor& v) {
  const Names& n = names();
  if (tensor == Py_None) return v.same(tensor);
  return v.same(reinterpret_cast<PyObject*>(Py_TYPE(tensor))) && attribute(tensor, n.layout, v) &&
         attribute(tensor, n.dtype, v) && attribute(tensor, n.is_cpu, v) &&
         attribute(tensor, n.requires_grad, v) && equal_attribute(tensor, n.shape, v) &&
         equal_result(tensor, n.stride, v);
}

// Which tensors they are and where they lie; by contents also how often they were written to and whether a
// gradient is wanted.
template <typename Visitor>
bool walk_tensors(PyObject* tensors, bool by_contents, Visitor& v) {
  const Names& n = names();
  for (Py_ssize_t i = 0; i < PyTuple_Size(tensors); ++i) {
    PyObject* tensor = PyTuple_GetItem(tensors, i);
    if (!v.same(tensor)) return false;
    if (tensor == Py_None) continue;
    if (!equal_result(tensor, n.data_ptr, v)) return false;
    if (by_contents && !(attribute(tensor, n.requires_grad, v) && equal_attribute(tensor, n.version, v)))
      return false;
  }
  return true;
}

template <typename Visitor>
bool walk_module(PyObject* module, PyObject* keeper, Visitor& v);

// The entries of a module's dictionary (`outer`) and of the dictionaries in it: parameters, buffers, hooks
// and children, whose own are walked too. No key is None, so None can stand for the end. If it held its
// keeper too, a guard would hold itself, and what it has seen would stay until the garbage is collected.
template <typename Visitor>
bool walk_dict(PyObject* dict, PyObject* keeper, bool outer, bool children, Visitor& v) {
  PyObject *key, *value;
  Py_ssize_t at = 0;
  while (PyDict_Next(dict, &at, &key, &value)) {
    if (!v.same(key) || !v.same(value == keeper ? Py_None : value)) return false;
    if (children && value != Py_None && !walk_module(value, keeper, v)) return false;
    if (!outer || !PyDict_Check(value)) continue;
    const bool modules = PyDict_Size(value) > 0 && PyUnicode_Check(key) &&
                         PyUnicode_CompareWithASCIIString(key, "_modules") == 0;
    if (!walk_dict(value, keeper, false, modules, v)) return false;
  }
  return v.same(Py_None);
}

template <typename Visitor>
bool walk_module(PyObject* module, PyObject* keeper, Visitor& v) {
  if (!v.same(reinterpret_cast<PyObject*>(Py_TYPE(module)))) return false;
  const Owned dict(PyObject_GenericGetDict(module, nullptr));
  return dict && walk_dict(dict.get(), keeper, true, false, v);
}

template <typename Visitor>
bool walk_modules(PyObject* modules, PyObject* keeper, Visitor& v) {
  for (Py_ssize_t i = 0; i < PyTuple_Size(modules); ++i)
    if (!walk_module(PyTuple_GetItem(modules, i), keeper, v)) return false;
  return true;
}

// state: (questions, places): what to call without arguments, and (dictionary, key) where to look.
template <typename Visitor>
bool walk_state(PyObject* state, Visitor& v) {
  PyObject* questions = PyTuple_GetItem(state, 0);
  for (Py_ssize_t i = 0; i < PyTuple_Size(questions); ++i) {
    const Owned answer(PyObject_CallNoArgs(PyTuple_GetItem(questions, i)));
    if (!answer || !v.same(answer.get())) return false;
  }
  PyObject* places = PyTuple_GetItem(state, 1);
  for (Py_ssize_t i = 0; i < PyTuple_Size(places); ++i) {
    PyObject* place = PyTuple_GetItem(places, i);
    PyObject* value = PyDict_GetItemWithError(PyTuple_GetItem(place, 0), PyTuple_GetItem(place, 1));
    if (PyErr_Occurred() || !v.same(value == nullptr ? Py_None : value)) return false;
  }
  return true;
}

// Aliases of the tensors, so that nothing else can come to lie where they do.
PyObject* aliases_of(PyObject* tensors) {
  Recorder recorder;
  for (Py_ssize_t i = 0; i < PyTuple_Size(tensors); ++i) {
    PyObject* tensor = PyTuple_GetItem(tensors, i);
    if (tensor == Py_None) continue;
    const Owned alias(PyObject_CallMethodObjArgs(tensor, names().detach, nullptr));
    if (!alias || !recorder.same(alias.get())) return nullptr;
  }
  return recorder.tuple();
}

enum Part { STATE, STATE_SEEN, INPUTS, BY_CONTENTS, TENSORS, TENSORS_SEEN, MODULES, ALIASES, PARTS };

bool is_guard(PyObject* object) { return PyTuple_Check(object) && PyTuple_Size(object) == PARTS; }

bool check(bool right, const char* what) {
  if (!right) PyErr_SetString(PyExc_TypeError, what);
  return right;
}

template <typename Walk>
PyObject* recorded(const Walk& walk) {
  Recorder recorder;
  return walk(recorder) ? recorder.tuple() : nullptr;
}

template <typename Walk>
bool compares(PyObject* seen, const Walk& walk) {
  Comparer comparer(seen);
  return walk(comparer) && comparer.done();
}

}  // namespace

PyObject* make_guard(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!check(
          count == 6 && PyTuple_Check(args[0]) && PyTuple_Size(args[0]) == 2 && PyTuple_Check(args[1]) &&
              PyTuple_Check(args[2]) && PyTuple_Check(args[3]),
          "make_guard: want (state, inputs, tensors, modules, by_contents, keeper), the first four tuples"))
    return nullptr;
  PyObject *state = args[0], *inputs = args[1], *tensors = args[2], *modules = args[3];
  const int by_contents = PyObject_IsTrue(args[4]);
  if (by_contents < 0) return nullptr;
  const Owned state_seen(recorded([&](auto& v) { return walk_state(state, v); }));
  const Owned inputs_seen(recorded([&](auto& v) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(inputs); ++i)
      if (!walk_kind(PyTuple_GetItem(inputs, i), v)) return false;
    return true;
  }));
  if (!state_seen || !inputs_seen) return nullptr;
  const Owned tensors_seen(recorded([&](auto& v) { return walk_tensors(tensors, by_contents, v); }));
  const Owned modules_seen(recorded([&](auto& v) { return walk_modules(modules, args[5], v); }));
  if (!tensors_seen || !modules_seen) return nullptr;
  const Owned aliases(aliases_of(tensors));
  if (!aliases) return nullptr;
  return PyTuple_Pack(PARTS, state, state_seen.get(), inputs_seen.get(), by_contents ? Py_True : Py_False,
                      tensors, tensors_seen.get(), modules_seen.get(), aliases.get());
}

PyObject* guard_holds(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!check(count >= 3 && is_guard(args[0]) && PyTuple_Check(args[1]),
             "guard_holds: want (guard, modules, keeper, *inputs), modules a tuple"))
    return nullptr;
  const auto part = [&](Part which) { return PyTuple_GetItem(args[0], which); };
  const bool holds = compares(part(STATE_SEEN), [&](auto& v) { return walk_state(part(STATE), v); }) &&
                     compares(part(INPUTS),
                              [&](auto& v) {
                                for (Py_ssize_t i = 3; i < count; ++i)
                                  if (!walk_kind(args[i], v)) return false;
                                return true;
                              }) &&
                     compares(part(MODULES), [&](auto& v) { return walk_modules(args[1], args[2], v); }) &&
                     compares(part(TENSORS_SEEN), [&](auto& v) {
                       return walk_tensors(part(TENSORS), part(BY_CONTENTS) == Py_True, v);
                     });
  if (PyErr_Occurred()) return nullptr;
  return PyBool_FromLong(holds);
}

}  // namespace gconv
