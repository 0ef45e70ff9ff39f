// What the NumPy bindings of the kernels share: arrays as arguments, the workspace, and the parameters of
// grouped_conv.
//
// Activations are arrays [N, H, W, C] whose channels lie side by side, other strides as they come; bfloat16
// travels as uint16. Outputs are written into the caller's arrays.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#include "grouped_conv.h"

namespace gconv {

namespace py = pybind11;

using Pair = std::array<int64_t, 2>;

// Arrays of one storage type.
struct Arrays {
  DType dtype;
  explicit Arrays(const std::string& dtype_text) {
    if (dtype_text == "float32")
      dtype = DType::f32;
    else if (dtype_text == "bfloat16")
      dtype = DType::bf16;
    else if (dtype_text == "float16")
      dtype = DType::f16;
    else
      throw std::invalid_argument("dtype: " + dtype_text);
  }
  py::ssize_t item_size() const { return dtype == DType::f32 ? 4 : 2; }

  Nhwc activation(const char* name, const py::object& o, std::array<int64_t, 4> shape) const {
    if (o.is_none()) return {};
    const py::array a = o.cast<py::array>();
    if (a.itemsize() != item_size() || a.ndim() != 4) throw std::invalid_argument(name);
    for (int i = 0; i < 4; ++i)
      if (a.shape(i) != shape[i]) throw std::invalid_argument(name);
    if (a.shape(3) > 1 && a.size() > 0 && a.strides(3) != a.itemsize()) throw std::invalid_argument(name);
    return {const_cast<void*>(a.data()), a.strides(0) / item_size(), a.strides(1) / item_size(),
            a.strides(2) / item_size()};
  }

  void* contiguous(const char* name, const py::object& o, int64_t size) const {
    const py::array a = o.cast<py::array>();
    if (a.itemsize() != item_size() || a.size() != size || !(a.flags() & py::array::c_style))
      throw std::invalid_argument(name);
    return const_cast<void*>(a.data());
  }
};

// A table of float32, one column per channel; null for None.
inline float* floats(const char* name, const py::object& o, int64_t size) {
  if (o.is_none()) return nullptr;
  const py::array a = o.cast<py::array>();
  if (!py::isinstance<py::array_t<float>>(a) || a.size() != size || !(a.flags() & py::array::c_style))
    throw std::invalid_argument(name);
  return const_cast<float*>(static_cast<const float*>(a.data()));
}

// Floats of NaN, and behind them bytes that nobody may write: it throws at its end if somebody did. Under
// AddressSanitizer it has the exact size instead.
class NanFilled {
 public:
  NanFilled(int64_t floats, size_t alignment) : bytes_(static_cast<size_t>(floats) * sizeof(float)) {
    void* p = nullptr;
    if (posix_memalign(&p, alignment, bytes_ + GUARD) != 0) throw std::bad_alloc();
    data_ = static_cast<float*>(p);
    for (int64_t i = 0; i < floats; ++i) data_[i] = std::numeric_limits<float>::quiet_NaN();
    std::memset(guard(), BYTE, GUARD);
  }
  NanFilled(const NanFilled&) = delete;
  NanFilled& operator=(const NanFilled&) = delete;
  ~NanFilled() noexcept(false) {
    bool whole = true;
    for (size_t i = 0; i < GUARD; ++i) whole = whole && guard()[i] == BYTE;
    std::free(data_);
    if (!whole && std::uncaught_exceptions() == 0)
      throw std::runtime_error("a kernel wrote past the workspace");
  }
  float* data() const { return data_; }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t GUARD = 0;
#else
  static constexpr size_t GUARD = 4096;
#endif
  static constexpr unsigned char BYTE = 0xa5;
  unsigned char* guard() const { return reinterpret_cast<unsigned char*>(data_) + bytes_; }
  size_t bytes_;
  float* data_;
};

inline GroupedConvShape conv_shape(const std::array<int64_t, 4>& input, int64_t k, Pair stride, Pair pad,
                                   Pair dilation, int64_t groups) {
  GroupedConvShape s{};
  s.n = input[0], s.h = input[1], s.w = input[2], s.c = input[3];
  s.k = k, s.groups = groups;
  s.stride_h = stride[0], s.stride_w = stride[1];
  s.pad_h = pad[0], s.pad_w = pad[1];
  s.dil_h = dilation[0], s.dil_w = dilation[1];
  s.oh = (s.h + 2 * s.pad_h - 2 * s.dil_h - 1) / s.stride_h + 1;
  s.ow = (s.w + 2 * s.pad_w - 2 * s.dil_w - 1) / s.stride_w + 1;
  return s;
}

inline std::array<int64_t, 4> in_shape(const GroupedConvShape& s) { return {s.n, s.h, s.w, s.c}; }
inline std::array<int64_t, 4> out_shape(const GroupedConvShape& s) { return {s.n, s.oh, s.ow, s.k}; }
inline int64_t weight_size(const GroupedConvShape& s) { return s.k * (s.c / s.groups) * 9; }

inline GroupedConvFwdParams fwd_params(const Arrays& arrays, const GroupedConvShape& s, py::object x,
                                       py::object weight, py::object act, py::object affine,
                                       py::object residual, bool relu, py::object y, py::object mean,
                                       py::object var) {
  GroupedConvFwdParams p{};
  p.shape = s, p.dtype = arrays.dtype;
  p.x = arrays.activation("x", x, in_shape(s));
  p.weight = arrays.contiguous("weight", weight, weight_size(s));
  p.layout = {9, 1};
  p.act = floats("act", act, 2 * s.c);
  p.affine = floats("affine", affine, 2 * s.k);
  p.residual = arrays.activation("residual", residual, out_shape(s));
  p.relu = relu;
  p.y = arrays.activation("y", y, out_shape(s));
  p.mean = floats("mean", mean, s.k);
  p.var = floats("var", var, s.k);
  return p;
}

// What both gradients are given.
template <typename Params>
Params gradient_params(const Arrays& arrays, const GroupedConvShape& s, py::object dy, py::object y,
                       py::object finish, py::object x) {
  Params p{};
  p.shape = s, p.dtype = arrays.dtype;
  p.dy = arrays.activation("dy", dy, out_shape(s));
  p.y = arrays.activation("y", y, out_shape(s));
  p.finish = floats("finish", finish, 6 * s.k);
  p.x = arrays.activation("x", x, in_shape(s));
  p.layout = {9, 1};
  return p;
}

inline GroupedConvBwdInputParams bwd_input_params(const Arrays& arrays, const GroupedConvShape& s,
                                                  py::object dy, py::object weight, py::object y,
                                                  py::object finish, py::object x, py::object act,
                                                  py::object dx, py::object sums) {
  auto p = gradient_params<GroupedConvBwdInputParams>(arrays, s, dy, y, finish, x);
  p.weight = arrays.contiguous("weight", weight, weight_size(s));
  p.act = floats("act", act, 4 * s.c);
  p.dx = arrays.activation("dx", dx, in_shape(s));
  p.sums = floats("sums", sums, 2 * s.c);
  return p;
}

inline GroupedConvBwdWeightParams bwd_weight_params(const Arrays& arrays, const GroupedConvShape& s,
                                                    py::object dy, py::object x, py::object y,
                                                    py::object finish, py::object act, py::object dweight) {
  auto p = gradient_params<GroupedConvBwdWeightParams>(arrays, s, dy, y, finish, x);
  p.act = floats("act", act, 2 * s.c);
  p.dweight = arrays.contiguous("dweight", dweight, weight_size(s));
  return p;
}

}  // namespace gconv
