// Between torch's tensors and the kernels' views: checks, layout, allocation, threads. The only place, with
// the binding files that include it, that knows torch (by its stable ABI).
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "tensor.h"

namespace gconv {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::DeviceType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::ostream& operator<<(std::ostream& out, const Device& device) {
  if (device.is_cpu()) return out << "cpu";
  if (device.type() == DeviceType::Meta) return out << "meta";
  out << (device.is_cuda() ? "cuda" : "another device");
  return device.has_index() ? out << ':' << device.index() : out;
}

// One line naming the op, the argument, what it wants and what it got.
template <typename... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) [[likely]]
    return;
  std::ostringstream line;
  (line << ... << parts);
  throw std::runtime_error(line.str());
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(type);
  }
}

struct Shape {
  int64_t size[4];
  int64_t rank;
  Shape(std::initializer_list<int64_t> sizes) : rank(0) {
    for (int64_t s : sizes) size[rank++] = s;
  }
};

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << '[';
  for (int64_t i = 0; i < shape.rank; ++i) out << (i ? ", " : "") << shape.size[i];
  return out << ']';
}

// "float32 [8, 64, 56, 56]"
struct Described {
  const Tensor& tensor;
};

inline std::ostream& operator<<(std::ostream& out, const Described& d) {
  out << dtype_name(d.tensor.scalar_type()) << " [";
  for (int64_t i = 0; i < d.tensor.dim(); ++i) out << (i ? ", " : "") << d.tensor.size(i);
  return out << ']';
}

inline bool has_shape(const Tensor& t, const Shape& shape) {
  if (t.dim() != shape.rank) return false;
  for (int64_t i = 0; i < shape.rank; ++i)
    if (t.size(i) != shape.size[i]) return false;
  return true;
}

// The storage type of an op for tensors on such a device, taken from its first activation of rank 4.
inline DType activation_dtype(const char* op, const char* name, const Tensor& x,
                              DeviceType home = DeviceType::CPU) {
  const ScalarType type = x.scalar_type();
  check(x.dim() == 4 && x.device().type() == home, op, ": ", name, ": want a ",
        home == DeviceType::CPU ? "CPU" : "CUDA", " tensor [N, C, H, W], got ", Described{x}, " on ",
        x.device());
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op, ": ", name,
        ": want float32, bfloat16 or float16, got ", Described{x});
  return type == ScalarType::Float ? DType::f32 : type == ScalarType::BFloat16 ? DType::bf16 : DType::f16;
}

inline void check_tensor(const char* op, const char* name, const Tensor& t, ScalarType type,
                         const Shape& shape, const Device& home = DeviceType::CPU) {
  check(t.scalar_type() == type && has_shape(t, shape), op, ": ", name, ": want ", dtype_name(type), " ",
        shape, ", got ", Described{t});
  check(t.device() == home, op, ": ", name, ": want a tensor on ", home, ", got one on ", t.device());
}

// Whether a weight is float32 beside activations of another type: the CPU's kernels round it as they read it.
inline bool check_weight(const char* op, const Tensor& weight, ScalarType type, const Shape& shape,
                         const Device& home = DeviceType::CPU) {
  const bool wider = home.type() == DeviceType::CPU && type != ScalarType::Float &&
                     weight.scalar_type() == ScalarType::Float;
  check_tensor(op, "weight", weight, wider ? ScalarType::Float : type, shape, home);
  return wider;
}

// A float32 vector or table of vectors, one entry per channel.
inline const float* channel_floats(const char* op, const char* name, const Tensor& t, const Shape& shape,
                                   const Device& home = DeviceType::CPU) {
  check_tensor(op, name, t, ScalarType::Float, shape, home);
  check(t.is_contiguous(), op, ": ", name, ": want a contiguous tensor, got strides of a view");
  return static_cast<const float*>(t.const_data_ptr());
}

inline const float* channel_floats(const char* op, const char* name, const OptionalTensor& t,
                                   const Shape& shape, const Device& home = DeviceType::CPU) {
  return t.has_value() ? channel_floats(op, name, *t, shape, home) : nullptr;
}

// x itself where its channels lie side by side (any other strides, 0 included), else a channels_last copy.
inline Tensor channels_adjacent(const Tensor& x) {
  if (x.size(1) == 1 || x.stride(1) == 1) return x;
  return torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}

inline Nhwc view_of(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(2), x.stride(3)};
}

inline Nhwc writable_view_of(const Tensor& x) {
  return {x.mutable_data_ptr(), x.stride(0), x.stride(2), x.stride(3)};
}

// A tensor that an op writes to: as it is, or not at all.
inline void check_output(const char* op, const char* name, const Tensor& t, ScalarType type,
                         const Shape& shape, const Device& home = DeviceType::CPU) {
  check_tensor(op, name, t, type, shape, home);
  bool apart = true;
  for (int64_t i : {0, 2, 3}) apart = apart && (t.size(i) <= 1 || t.stride(i) >= t.size(1));
  const bool adjacent = t.size(1) <= 1 || t.stride(1) == 1;
  check((adjacent && apart) || t.numel() == 0, op, ": ", name,
        ": want channels side by side and pixels apart (channels_last or a slice of it), got strides ",
        Shape{t.stride(0), t.stride(1), t.stride(2), t.stride(3)});
}

// An uninitialized tensor. Each extension defines where it lies (torch_tensors.cpp, cuda/torch_binding.cpp).
Tensor empty(const Shape& shape, ScalarType type, const Device& device,
             MemoryFormat format = MemoryFormat::Contiguous);

inline Tensor empty(const Shape& shape, ScalarType type, const Tensor& like,
                    MemoryFormat format = MemoryFormat::Contiguous) {
  return empty(shape, type, like.device(), format);
}

inline Tensor empty_channels_last(const Shape& shape, const Tensor& like) {
  return empty(shape, like.scalar_type(), like, MemoryFormat::ChannelsLast);
}

inline Tensor empty_floats(const Shape& shape, const Tensor& like) {
  return empty(shape, ScalarType::Float, like);
}

inline float* floats_of(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// Runs one stage on torch's own threads, with no more of them than `work` elements are worth.
template <typename Params>
void run_stage(void (*stage)(const Params&, int64_t, int64_t), const Params& params, int64_t work) {
  constexpr int64_t GRAIN = 16384;  // elements: about the time that waking a thread costs
  int64_t nth = torch::stable::get_num_threads();
  nth = std::max<int64_t>(1, std::min(nth, work / GRAIN));
  if (nth == 1) return stage(params, 0, 1);
  torch::stable::parallel_for(0, nth, 1, [&](int64_t begin, int64_t end) {
    for (int64_t ith = begin; ith < end; ++ith) stage(params, ith, nth);
  });
}

}  // namespace gconv
