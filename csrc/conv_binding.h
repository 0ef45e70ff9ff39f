// What the convolutions' bindings share: checks of shapes and what a gradient starts from.
#pragma once
#include <cstring>

#include "torch_ops.h"

namespace gconv {

inline void check_pair(const char* op, const char* name, const Ints& v, int64_t low, int64_t high) {
  const bool ok = v.size() == 2 && v[0] >= low && v[1] >= low && v[0] <= high && v[1] <= high;
  if (ok) [[likely]]
    return;
  std::ostringstream got;
  for (size_t i = 0; i < v.size(); ++i) got << (i ? ", " : "") << v[i];
  check(false, op, ": ", name, ": want 2 integers from ", low, " to ",
        high < INT32_MAX ? std::to_string(high) : "2^31", ", got [", got.str(), "]");
}

inline Shape shape_of(const char* op, const char* name, const Tensor& t) {
  Shape shape{};
  check(t.dim() <= 4, op, ": ", name, ": want 4 dimensions, got ", t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) shape.size[shape.rank++] = t.size(i);
  return shape;
}

inline Shape shape_of(const char* op, const char* name, const Ints& sizes) {
  check(sizes.size() == 4, op, ": ", name, ": want 4 sizes, got ", sizes.size());
  return Shape{sizes[0], sizes[1], sizes[2], sizes[3]};
}

// Whether the kernel is 1x1; then nothing else may be said of it but its stride.
inline bool is_pointwise(const char* op, const Shape& weight, const Ints& padding, int64_t groups) {
  if (weight.rank != 4 || weight.size[2] != 1 || weight.size[3] != 1) return false;
  check_pair(op, "padding", padding, 0, 0);
  check(groups == 1, op, ": groups: want 1 with a 1x1 kernel, got ", groups);
  return true;
}

// Weights packed ahead are a vector of floats: this header, then the weights, as far from a line's start.
struct PackedHeader {
  int64_t packing, k, channels, groups, taps, unused[3];

  static constexpr int64_t FLOATS = 16;
  static PackedHeader of(int64_t packing, const Shape& weight, int64_t groups) {
    return {packing, weight.size[0], weight.size[1], groups, weight.size[2] * weight.size[3], {}};
  }
};
static_assert(sizeof(PackedHeader) == PackedHeader::FLOATS * sizeof(float));

// `pack`, a stage, of a weight of that size, by the params p.
template <typename Params>
Tensor pack_ahead(Params& p, const PackedHeader& header, int64_t floats, const Tensor& weight,
                  void (*pack)(const Params&, int64_t, int64_t)) {
  Tensor packed = empty_floats({PackedHeader::FLOATS + floats}, weight);
  std::memcpy(packed.mutable_data_ptr(), &header, sizeof(header));
  p.workspace = floats_of(packed) + PackedHeader::FLOATS;
  run_stage(pack, p, weight.numel());
  return packed;
}

// The weights in a vector that pack_ahead made with such a header.
inline const float* packed_ahead(const char* op, const Tensor& packed, const PackedHeader& header,
                                 int64_t floats, const Shape& weight) {
  const bool fits = packed.device().is_cpu() && packed.scalar_type() == ScalarType::Float &&
                    has_shape(packed, {PackedHeader::FLOATS + floats}) && packed.is_contiguous();
  check(fits && std::memcmp(packed.const_data_ptr(), &header, sizeof(header)) == 0, op,
        ": packed: want what conv_pack makes of a weight ", weight,
        " for this dtype, image, geometry and instruction set, got ", Described{packed}, " of another");
  return static_cast<const float*>(packed.const_data_ptr()) + PackedHeader::FLOATS;
}

// Its channels side by side; else a copy in which they are.
inline Tensor activation(const char* op, const char* name, const Tensor& t, ScalarType type,
                         const Shape& shape, const Device& home = DeviceType::CPU) {
  check_tensor(op, name, t, type, shape, home);
  return channels_adjacent(t);
}

// Where a forward writes, and what it does to its results on the way.
template <typename Params>
struct Output {
  Params p{};
  Tensor y, added, mean, var;

  // In `into` where it is given, else in a tensor of its own.
  void place(const char* op, const Tensor& x, const OptionalTensor& into) {
    const auto& s = p.shape;
    if (into.has_value()) check_output(op, "y", *into, x.scalar_type(), {s.n, s.k, s.oh, s.ow}, x.device());
    y = into.has_value() ? *into : empty_channels_last({s.n, s.k, s.oh, s.ow}, x);
    p.y = writable_view_of(y);
  }
  void epilogue(const char* op, const OptionalTensor& affine, const OptionalTensor& residual, bool relu) {
    const auto& s = p.shape;
    p.affine = channel_floats(op, "affine", affine, {2, s.k}, y.device());
    p.relu = relu;
    if (!residual.has_value()) return;
    added = activation(op, "residual", *residual, y.scalar_type(), {s.n, s.k, s.oh, s.ow}, y.device());
    p.residual = view_of(added);
  }
  // After the epilogue, which they exclude.
  void statistics(const char* op, bool wanted) {
    check(!wanted || (p.affine == nullptr && p.residual.data == nullptr && !p.relu), op,
          ": want_stats: want false with affine, residual or relu, got true");
    const Shape shape{wanted ? p.shape.k : 0};
    mean = empty_floats(shape, y), var = empty_floats(shape, y);
    if (!wanted) return;
    p.mean = floats_of(mean);
    p.var = floats_of(var);
  }
};

// What a gradient starts from; y and finish come together.
struct OutputGradient {
  const Tensor& dy;
  const OptionalTensor &y, &finish;
};

template <typename Params>
struct Gradient {
  Params p{};
  Tensor dy, y, workspace;

  // `like` has the dtype and the device of all activations.
  void take(const char* op, const OutputGradient& from, const Tensor& like) {
    const auto& s = p.shape;
    const ScalarType type = like.scalar_type();
    const Device home = like.device();
    const Shape output{s.n, s.k, s.oh, s.ow};
    dy = activation(op, "dy", from.dy, type, output, home);
    p.dy = view_of(dy);
    check(from.finish.has_value() == from.y.has_value(), op, ": ", from.y.has_value() ? "finish" : "y",
          ": want finish and y together, got only ", from.y.has_value() ? "y" : "finish");
    p.finish = channel_floats(op, "finish", from.finish, {6, s.k}, home);
    if (!from.y.has_value()) return;
    y = activation(op, "y", *from.y, type, output, home);
    p.y = view_of(y);
  }
};

}  // namespace gconv
