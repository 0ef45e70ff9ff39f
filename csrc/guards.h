// Whether a call is like an earlier one, for Python: what was decided then need not be decided again.
#pragma once
#include "python_api.h"

namespace gconv {

// make_guard(state, inputs, tensors, modules, by_contents, keeper) -> guard: writes down
//
//   state    (questions, places): what the questions, called without arguments, answer and what lies at the
//            places (dictionary, key)
//   inputs   of each tensor or None: type, layout, dtype, device, requires_grad, shape and strides
//   tensors  that the modules have: where they lie, with aliases that keep anything else from coming to lie
//            there; by_contents also how often they were written to and their requires_grad
//   modules  of each: its type, all attributes but the one that is `keeper`, which keeps the guard, and the
//            entries of those that are dictionaries, children included
PyObject* make_guard(PyObject* self, PyObject* const* args, Py_ssize_t count);

// guard_holds(guard, modules, keeper, *inputs) -> bool: whether all of it is as it was, by identity; shapes,
// strides, versions and addresses by value.
PyObject* guard_holds(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace gconv
