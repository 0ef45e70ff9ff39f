#include "cpu/caching_allocator.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace gconv {

namespace {

size_t in_pages(size_t bytes) {
  static const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

constexpr size_t LEAST_RESERVE = size_t{1} << 30;

class Cache {
 public:
  void* allocate(size_t bytes) {
    bytes = in_pages(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    void* block = from_free(bytes);
    if (block == nullptr) block = from_edge(bytes);
    try {
      used_.emplace(block, bytes);
    } catch (...) {
      give_back(static_cast<char*>(block), bytes);
      throw;
    }
    allocated_ += bytes;
    return block;
  }

  void free(void* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = used_.find(block);
    const size_t bytes = found->second;
    used_.erase(found);
    allocated_ -= bytes;
    char* start = static_cast<char*>(block);
    if (cached_ + bytes > limit_ || !keep(start, bytes)) give_back(start, bytes);
  }

  // The ranges at the highest addresses go first: from_free fills the lowest.
  void shrink(size_t limit) {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (cached_ > limit) {
      const auto last = std::prev(free_.end());
      const size_t bytes = std::min(last->second, in_pages(cached_ - limit));
      give_back(last->first + (last->second - bytes), bytes);
      cached_ -= bytes;
      if (bytes == last->second)
        free_.erase(last);
      else
        last->second -= bytes;
    }
  }

  void set_limit(size_t limit) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      limit_ = limit;
    }
    shrink(limit);
  }

  CacheUse use() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {static_cast<int64_t>(allocated_), static_cast<int64_t>(cached_)};
  }

  std::mutex& mutex() { return mutex_; }

 private:
  // The start of the smallest range that is large enough, of equals the one at the lowest address; or null.
  void* from_free(size_t bytes) {
    auto best = free_.end();
    for (auto range = free_.begin(); range != free_.end(); ++range)
      if (range->second >= bytes && (best == free_.end() || range->second < best->second)) best = range;
    if (best == free_.end()) return nullptr;
    const auto [start, size] = *best;
    if (size == bytes) {
      free_.erase(best);
    } else {
      auto rest = free_.extract(best);
      rest.key() = start + bytes;
      rest.mapped() = size - bytes;
      free_.insert(std::move(rest));
    }
    cached_ -= bytes;
    return start;
  }

  // A block that ends what is in use of the reserved addresses. A free range that ended it before, too small
  // alone, is its beginning: ranges grow, and what is lost between blocks does not.
  void* from_edge(size_t bytes) {
    auto range = free_.lower_bound(edge_);
    range = range == free_.begin() ? free_.end() : std::prev(range);
    if (range != free_.end() && range->first + range->second != edge_) range = free_.end();
    char* start = range == free_.end() ? edge_ : range->first;
    if (static_cast<size_t>(reserved_end_ - start) < bytes) {
      reserve(bytes);
      range = free_.end(), start = edge_;
    }
    const size_t more = static_cast<size_t>(start + bytes - edge_);
    if (mprotect(edge_, more, PROT_READ | PROT_WRITE) != 0) refuse(bytes);
    if (range != free_.end()) {
      cached_ -= range->second;
      free_.erase(range);
    }
    edge_ = start + bytes;
    return start;
  }

  // Addresses for at least so many bytes, without memory; those before that no block has are given up.
  void reserve(size_t bytes) {
    const auto map = [](size_t size) {
      return mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    };
    size_t size = std::max({bytes, LEAST_RESERVE, allocated_ + cached_});
    void* start = map(size);
    if (start == MAP_FAILED) start = map(size = bytes);
    if (start == MAP_FAILED) refuse(bytes);
#if defined(MADV_HUGEPAGE)
    madvise(start, size, MADV_HUGEPAGE);  // fewer faults, and prefetching goes on past 4 KiB
#endif
    if (reserved_end_ > edge_) munmap(edge_, static_cast<size_t>(reserved_end_ - edge_));
    edge_ = static_cast<char*>(start), reserved_end_ = edge_ + size;
  }

  // Memory to the system; at the edge the addresses stay.
  void give_back(char* start, size_t bytes) {
    const bool last =
        start + bytes == edge_ &&
        mmap(start, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED;
    if (!last) {
      munmap(start, bytes);
      return;
    }
#if defined(MADV_HUGEPAGE)
    madvise(start, bytes, MADV_HUGEPAGE);
#endif
    edge_ = start;
  }

  [[noreturn]] static void refuse(size_t bytes) {
    throw std::runtime_error("can't allocate " + std::to_string(bytes) + " bytes");
  }

  // As one range with the free ranges before and behind it; false if there is no memory to note it.
  bool keep(char* start, size_t bytes) {
    auto next = free_.lower_bound(start);
    auto range = next;
    if (next != free_.begin() && std::prev(next)->first + std::prev(next)->second == start) {
      range = std::prev(next);
      range->second += bytes;
    } else {
      try {
        range = free_.emplace_hint(next, start, bytes);
      } catch (const std::bad_alloc&) {
        return false;
      }
    }
    if (next != free_.end() && start + bytes == next->first) {
      range->second += next->second;
      free_.erase(next);
    }
    cached_ += bytes;
    return true;
  }

  std::mutex mutex_;
  std::map<char*, size_t> free_;
  std::unordered_map<void*, size_t> used_;
  size_t allocated_ = 0, cached_ = 0, limit_ = 0;
  char* edge_ = nullptr;  // of the reserved addresses those before it have memory
  char* reserved_end_ = nullptr;
};

// Never destroyed: tensors may outlive every static object. A fork waits until no other thread is inside, for
// the child has the lock as it was.
Cache& cache() {
  static Cache* const made = [] {
    pthread_atfork([] { cache().mutex().lock(); }, [] { cache().mutex().unlock(); },
                   [] { cache().mutex().unlock(); });
    return new Cache;
  }();
  return *made;
}

// The first number in the file; nothing where it has none ("max") or does not exist.
size_t number_in(const char* path, size_t otherwise) {
  std::ifstream file(path);
  size_t number;
  return file >> number ? number : otherwise;
}

size_t machine_memory() {
  const size_t pages = static_cast<size_t>(std::max(0L, sysconf(_SC_PHYS_PAGES)));
  size_t bytes = in_pages(1) * pages;
  for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"})
    bytes = std::min(bytes, number_in(path, bytes));
  return bytes;
}

size_t limit_at_start() {
  const char* text = std::getenv("GCONV_CACHE_MB");
  if (text == nullptr || *text == '\0') return machine_memory() / 8;
  char* end = nullptr;
  errno = 0;
  const unsigned long long mebibytes = std::strtoull(text, &end, 10);
  if (*text < '0' || *text > '9' || *end != '\0' || errno != 0 || mebibytes > (1ull << 40))
    throw std::runtime_error(std::string("GCONV_CACHE_MB: want a whole number of mebibytes, got ") + text);
  return static_cast<size_t>(mebibytes) << 20;
}

std::atomic<int64_t> limit{-1};

}  // namespace

void* cached_allocate(size_t bytes) { return cache().allocate(bytes); }

void cached_free(void* block) { cache().free(block); }

int64_t cache_limit() {
  int64_t value = limit.load(std::memory_order_relaxed);
  if (value < 0) {
    value = static_cast<int64_t>(limit_at_start());
    cache_limit_set(value);
  }
  return value;
}

void cache_limit_set(int64_t bytes) {
  cache().set_limit(static_cast<size_t>(bytes));
  limit.store(bytes, std::memory_order_relaxed);
}

void empty_cache() { cache().shrink(0); }

CacheUse cache_use() { return cache().use(); }

}  // namespace gconv
