// Memory for large tensors on the CPU that keeps its pages. Torch-free.
//
// glibc gives what is freed above some megabytes back to the system, and the next tensor faults its pages in
// again, each zeroed by the kernel: for an output that is written once and read once this costs more than
// writing it. A convolution network frees and allocates the same sizes in every step, so here a freed block
// stays, next to its free neighbours as one range, for whoever fits in.
#pragma once
#include <cstddef>
#include <cstdint>

namespace gconv {

// Smaller blocks are left to malloc, which keeps them by itself: this is where glibc's mappings begin.
constexpr size_t CACHED_FROM = size_t{1} << 17;

// A block of at least that many bytes at the start of a page; throws std::runtime_error, as torch's does.
void* cached_allocate(size_t bytes);
void cached_free(void* block);  // what cached_allocate gave

// At most so many bytes stay when they are free: by default an eighth of the memory of the machine, or of the
// control group where that is less; or the mebibytes in GCONV_CACHE_MB, of which anything but a whole number
// throws std::runtime_error. 0: nothing is to be allocated here at all.
int64_t cache_limit();
void cache_limit_set(int64_t bytes);  // gives back what is above

void empty_cache();  // gives back all that is free

struct CacheUse {
  int64_t allocated, cached;  // bytes in blocks, bytes free
};
CacheUse cache_use();

}  // namespace gconv
