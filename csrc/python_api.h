// Python's C API as far as every Python from 3.10 on has it: one build serves them all.
#pragma once
#undef Py_LIMITED_API
#define Py_LIMITED_API 0x030a0000
#include <Python.h>
