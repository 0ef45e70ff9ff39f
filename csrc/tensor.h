// What every kernel shares: the storage types and the view of one activation. Torch-free.
#pragma once
#include <cstdint>

namespace gconv {

enum class DType : int32_t { f32, bf16, f16 };

// One activation [N, C, H, W] stored channels_last: channel stride 1, the others in elements.
// A slice of a wider buffer (some channels, some rows) is the same struct with other strides.
struct Nhwc {
  void* data;  // null: absent
  int64_t stride_n, stride_h, stride_w;
};

}  // namespace gconv
