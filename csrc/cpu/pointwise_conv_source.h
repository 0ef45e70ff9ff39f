// Where the pixels lie that pointwise_conv reads, and requests for those it reads next, compiled once per
// instruction set.
#pragma once
#include "pointwise_conv.h"
#include "tile_registers.h"

namespace gconv {
namespace GCONV_ISA_NS {
namespace pointwise {

constexpr int64_t BLOCK_TILES = LANES == 16 ? 8 : 16;  // of a block, which L1 holds for a tile of dw

// Tiles of a run of pixels that are whole but for the last.
constexpr int64_t point_tiles(int64_t pixels) { return (pixels + POINT_PIXELS - 1) / POINT_PIXELS; }

// The pixels of a tensor, or every step-th of them, numbered in order: where each lies, in elements.
class PixelGrid {
 public:
  PixelGrid() = default;
  PixelGrid(const Nhwc& t, int64_t images, int64_t rows, int64_t columns, int64_t step_h, int64_t step_w)
      : columns_(columns),
        rows_(rows),
        image_(t.stride_n),
        row_(t.stride_h * step_h),
        column_(t.stride_w * step_w) {
    if (rows_ == 1 || row_ == columns_ * column_) {  // rows, and then images, that run on are one long row
      columns_ *= rows_, rows_ = 1;
      if (images == 1 || image_ == columns_ * column_) columns_ *= images;
    }
  }
  // Of pixels [first, first + count).
  void offsets(int64_t first, int64_t count, int64_t* at) const {
    const int64_t line = first / columns_;
    int64_t w = first % columns_, h = line % rows_, image = line / rows_;
    int64_t here = image * image_ + h * row_ + w * column_;
    for (int64_t i = 0; i < count; ++i, here += column_, ++w) {
      if (w == columns_) {
        w = 0;
        if (++h == rows_) h = 0, ++image;
        here = image * image_ + h * row_;
      }
      at[i] = here;
    }
  }

 private:
  int64_t columns_ = 1, rows_ = 1, image_ = 0, row_ = 0, column_ = 0;
};

// What is read, pixel by pixel.
struct PointSource : RowSource {
  PixelGrid x_at, y_at;
  int64_t blocks() const { return (channels + LANES - 1) / LANES; }
};

// Requests for pixels that will be packed next, spread over the later of `calls` calls from between
// multiplications: a core waits for few lines at a time, and all at once would hold up what it multiplies;
// what came early would have left L2 again, what came last would not be there yet.
class Ahead {
 public:
  static constexpr int64_t MOST = BLOCK_TILES * POINT_PIXELS;  // pixels

  explicit Ahead(int64_t calls) : calls_(calls), wait_(calls) {}

  // `count` pixels of a source of at most two, from `first` on: channels [channel, channel + channels) of
  // values of so many bytes. Places are kept in bytes: between multiplications each instruction counts.
  void add(const PointSource& source, int64_t first, int64_t count, int64_t channel, int64_t channels,
           int64_t bytes) {
    Stream& s = streams_[added_++];
    s.x = static_cast<const char*>(source.x.data) + channel * bytes;
    s.y = source.prologue == Prologue::finish ? static_cast<const char*>(source.y.data) + channel * bytes
                                              : nullptr;
    s.pixel_end = channels * bytes;
    s.left = count * ((s.pixel_end + LINE - 1) / LINE);
    s.step = (s.left + calls_ - 1) / calls_;
    if (s.step > 0) wait_ = std::min(wait_, calls_ - calls_ / 8 - (s.left + s.step - 1) / s.step);
    source.x_at.offsets(first, count, s.x_at);
    for (int64_t i = 0; i < count; ++i) s.x_at[i] *= bytes;
    if (s.y == nullptr) return;
    source.y_at.offsets(first, count, s.y_at);
    for (int64_t i = 0; i < count; ++i) s.y_at[i] *= bytes;
  }

  GCONV_INLINE void fetch() {
    if (--wait_ >= 0) return;
    for (Stream& s : streams_) {
      for (int64_t i = std::min(s.step, s.left); i > 0; --i, --s.left) {
        __builtin_prefetch(s.x + s.x_at[s.pixel] + s.byte, 0, 2);
        if (s.y != nullptr) __builtin_prefetch(s.y + s.y_at[s.pixel] + s.byte, 0, 2);
        s.byte += LINE;
        if (s.byte >= s.pixel_end) s.byte = 0, ++s.pixel;
      }
    }
  }

 private:
  static constexpr int64_t LINE = 64;

  struct Stream {
    const char* x = nullptr;
    const char* y = nullptr;
    int64_t left = 0, step = 0;  // lines, and those of a call, as many in each: the branch is foreseen then
    int64_t pixel = 0, byte = 0, pixel_end = 0;
    int64_t x_at[MOST], y_at[MOST];
  };
  int64_t calls_, wait_, added_ = 0;
  Stream streams_[2];
};

}  // namespace pointwise
}  // namespace GCONV_ISA_NS
}  // namespace gconv
