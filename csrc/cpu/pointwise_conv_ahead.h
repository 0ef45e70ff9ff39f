// What pointwise_conv asks for ahead, compiled once per instruction set: pixels that arrive from memory while
// others are multiplied.
#pragma once
#include "pointwise_conv_plan.h"

namespace gconv {
namespace GCONV_ISA_NS {
namespace pointwise {

template <typename T>
GCONV_INLINE void fetch_line(const Nhwc& t, int64_t at) {
  __builtin_prefetch(static_cast<const T*>(t.data) + at, 0, 2);
}

// Values of a cache line.
template <typename T>
constexpr int64_t LINE = 64 / static_cast<int64_t>(sizeof(T));

// Asks, in so many calls, for what will be packed next: `count` pixels, at most MOST, from `first` on, and of
// them channels [channel, channel + channels).
template <typename T, int64_t MOST>
class SourceAhead {
 public:
  SourceAhead(const PointSource& s, int64_t first, int64_t count, int64_t channel, int64_t channels,
              int64_t calls)
      : source_(s),
        channel_(channel),
        pixel_lines_((channels + LINE<T> - 1) / LINE<T>),
        lines_(count * pixel_lines_),
        calls_(calls) {
    s.x_at.offsets(first, count, x_at_);
    if (s.prologue == Prologue::finish) s.y_at.offsets(first, count, y_at_);
  }
  void fetch() {
    for (const int64_t end = lines_ * ++call_ / calls_; done_ < end; ++done_) {
      const int64_t channel = channel_ + line_ * LINE<T>;
      fetch_line<T>(source_.x, x_at_[pixel_] + channel);
      if (source_.prologue == Prologue::finish) fetch_line<T>(source_.y, y_at_[pixel_] + channel);
      if (++line_ == pixel_lines_) line_ = 0, ++pixel_;
    }
  }

 private:
  const PointSource& source_;
  int64_t channel_, pixel_lines_, lines_, calls_;
  int64_t call_ = 0, done_ = 0, pixel_ = 0, line_ = 0;
  int64_t x_at_[MOST], y_at_[MOST];
};

// Parts of the products of so many channels and weights that are multiplied between two requests.
inline int64_t parts(int64_t channels, int64_t weights) {
  return (channels + PARTIAL - 1) / PARTIAL * weights;
}

// A product as the tile's function sums it up, part by part, with requests in between.
template <typename Ahead>
void multiply(TileFunction function, TileProduct t, int64_t vectors, Ahead& ahead) {
  for (int64_t left = t.channels; left > 0; left -= PARTIAL, t.add = true) {
    ahead.fetch();
    t.channels = std::min(left, PARTIAL);
    function(t);
    t.pixels += PARTIAL * t.count;
    t.weights += PARTIAL * vectors * LANES;
  }
}

}  // namespace pointwise
}  // namespace GCONV_ISA_NS
}  // namespace gconv
