#include "torch_tensors.h"

#include "cpu/caching_allocator.h"

namespace gconv {

namespace {

// Bytes per element of what the kernels read and write, and of indices; 0 of any other type, which is
// torch's to allocate.
size_t element_size(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16:
    case ScalarType::Half:
    case ScalarType::Short:
      return 2;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Long:
      return 8;
    default:
      return 0;
  }
}

}  // namespace

Tensor empty(const Shape& shape, ScalarType type, const Device& device, MemoryFormat format) {
  const size_t rank = static_cast<size_t>(shape.rank);
  size_t bytes = element_size(type);
  bool countable = true;  // else torch says what is wrong with it
  for (int64_t i = 0; i < shape.rank; ++i)
    countable = countable && !__builtin_mul_overflow(bytes, static_cast<size_t>(shape.size[i]), &bytes);
  if (!device.is_cpu() || !countable || bytes < CACHED_FROM || cache_limit() == 0)
    return torch::stable::empty({shape.size, rank}, type, std::nullopt, device, std::nullopt, format);
  const auto& s = shape.size;
  Shape strides{s[1] * s[2] * s[3], 1, s[1] * s[3], s[1]};
  if (format == MemoryFormat::Contiguous) {
    strides = shape;
    int64_t stride = 1;
    for (int64_t i = shape.rank - 1; i >= 0; stride *= shape.size[i--]) strides.size[i] = stride;
  }
  return torch::stable::from_blob(cached_allocate(bytes), {shape.size, rank}, {strides.size, rank}, device,
                                  type, cached_free);
}

}  // namespace gconv
