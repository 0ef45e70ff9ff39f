// The weight gradient of grouped_conv by Winograd's algorithm, compiled once per instruction set: a task of
// grouped_conv_wgrad.h's grid, whose partial results it leaves.
//
// Tile: registers hold one position of LANES channels of x and one vector of dy, over all tiles of a block.
// Bytes moved: x and dy once per chunk from memory, two rows of every four of x once more from L2. A block's
//   transformed values and a chunk's sums stay in L2.
// Accumulation: float32 in three levels (block, BLOCKS_PER_SUM of them, split), each in a fixed order.
#pragma once
#include "grouped_conv_wgrad.h"

namespace gconv {
namespace GCONV_ISA_NS {

// The blocks of a task: rows of tiles of an image or, where they are small, of several images. Where a group
// is wide it is one position's values that stay in L1; the longer a block the less often sums are loaded and
// stored.
struct WinogradBlocks {
  int64_t images, images_end;  // of the split
  int64_t first_vector, vectors, first_group, group_end;
  int64_t across, down;    // tiles of an image
  int64_t step, together;  // rows of tiles and images of a block
  int64_t per_image, blocks;

  WinogradBlocks(const WgradPass& p, int64_t split, int64_t chunk) {
    constexpr int64_t LEAST = 14, MOST = 56, POSITION_FLOATS = 4096;  // of x
    const Share share(p.shape.n, split, p.splits);
    images = share.begin, images_end = share.end;
    first_vector = chunk * p.chunk;
    vectors = std::min(p.vectors(), first_vector + p.chunk) - first_vector;
    first_group = first_vector * LANES / p.output_per_group;
    group_end = (first_vector + vectors - 1) * LANES / p.output_per_group + 1;
    across = (p.shape.ow + 1) / 2, down = (p.shape.oh + 1) / 2;
    const int64_t tiles = std::clamp<int64_t>(POSITION_FLOATS / p.source_per_group, LEAST, MOST);
    step = even_piece(down, std::max<int64_t>(1, tiles / across));
    per_image = (down + step - 1) / step;
    const int64_t count = images_end - images;
    together = even_piece(count, per_image > 1 ? 1 : std::max<int64_t>(1, tiles / (across * down)));
    blocks = count == 0 ? 0 : (count + together - 1) / together * per_image;
  }
  int64_t most_tiles() const { return together * step * across; }
  int64_t image(int64_t block) const { return images + block / per_image * together; }
  int64_t image_end(int64_t block) const { return std::min(images_end, image(block) + together); }
  int64_t row(int64_t block) const { return block % per_image * step; }
  int64_t row_end(int64_t block) const { return std::min(down, row(block) + step); }

  // What a block reads that the one before has not.
  template <typename T>
  void prefetch(const WgradPass& p, int64_t block, RowPrefetch* next) const {
    const GroupedConvShape& s = p.shape;
    const int64_t first = 2 * row(block) - s.pad_h + (row(block) > 0 ? 2 : 0);
    next->add<T>(p.x, image(block), image_end(block), std::max<int64_t>(0, first),
                 std::min(s.h, 2 * row_end(block) + 2 - s.pad_h), s.w, first_group * p.source_per_group,
                 (group_end - first_group) * p.source_per_group);
    next->add<T>(p.dy, image(block), image_end(block), 2 * row(block), std::min(s.oh, 2 * row_end(block)),
                 s.ow, first_vector * LANES, vectors * LANES);
  }
};

// Adds a block's dw of the vectors [begin, end) of one group; du is the first one's
// [position][channel][LANES].
template <typename T>
void add_block(const WgradPass& p, const WinogradBlocks& task, int64_t block, int64_t begin, int64_t end,
               float* inputs, float* du, bool fresh, RowPrefetch& next) {
  const GroupedConvShape& s = p.shape;
  const int64_t channels = p.source_per_group, group = begin * LANES / p.output_per_group;
  const int64_t rows = task.row_end(block) - task.row(block), image = task.image(block);
  const int64_t tiles = (task.image_end(block) - image) * rows * task.across;
  const int64_t position = position_floats(tiles), values = block_floats(tiles);
  float* gradients = inputs + channels / LANES * values;
  for (int64_t n = image, at = 0; n < task.image_end(block); ++n)
    for (int64_t row = task.row(block); row < task.row_end(block); ++row, at += task.across * LANES) {
      const TileSource x{&p.x, n, s.h, s.w, 2 * row - s.pad_h, -s.pad_w, group * channels};
      transform_inputs<T>(x, channels, task.across, inputs + at, tiles);
      for (int64_t v = begin; v < end; ++v) {
        const TileSource dy{&p.dy, n, s.oh, s.ow, 2 * row, 0, v * LANES};
        transform_gradients<T>(dy, task.across, gradients + (v - begin) * values + at, position);
      }
    }
  for (int64_t i = 0; i < POSITIONS; ++i)
    for (int64_t v = 0; v < end - begin; ++v) {
      for (int64_t c = 0; c < channels; c += LANES)
        accumulate(inputs + c / LANES * values + i * position, gradients + v * values + i * position, tiles,
                   fresh, du + ((v * POSITIONS + i) * channels + c) * LANES);
      next.step();
    }
}

// Leaves the task's dw in `total`, [vector][channel][3][3][LANES]. The block that the task `after` begins
// with, if any, is fetched with the last one.
template <typename T>
void wgrad_by_tiles(const WgradPass& p, const WinogradBlocks& task, const WinogradBlocks* after, float* total,
                    Scratch& scratch) {
  const int64_t channels = p.source_per_group, group_vectors = p.output_per_group / LANES;
  if (task.blocks == 0) {  // no images
    std::fill(total, total + task.vectors * p.vector_floats(), 0.0f);
    return;
  }
  const int64_t vector_floats = POSITIONS * channels * LANES;
  const int64_t values = block_floats(task.most_tiles());
  const int64_t value_floats = (channels / LANES + std::min(group_vectors, task.vectors)) * values;
  Carve carve(scratch);
  carve.reserve({value_floats, task.vectors * vector_floats});
  float *inputs = carve.take(value_floats), *du = carve.take(task.vectors * vector_floats);
  for (int64_t block = 0; block < task.blocks; ++block) {
    RowPrefetch next;
    if (block + 1 < task.blocks)
      task.prefetch<T>(p, block + 1, &next);
    else if (after != nullptr && after->blocks > 0)
      after->prefetch<T>(p, 0, &next);
    next.spread(task.vectors * POSITIONS);
    const bool fresh = block % BLOCKS_PER_SUM == 0;
    for (int64_t group = task.first_group; group < task.group_end; ++group) {
      const int64_t begin = std::max(task.first_vector, group * group_vectors);
      const int64_t end = std::min(task.first_vector + task.vectors, (group + 1) * group_vectors);
      add_block<T>(p, task, block, begin, end, inputs, du + (begin - task.first_vector) * vector_floats,
                   fresh, next);
    }
    // One sum over very many blocks would lose digits: every so often it is added to the total.
    if ((block + 1) % BLOCKS_PER_SUM != 0 && block + 1 < task.blocks) continue;
    for (int64_t v = 0; v < task.vectors; ++v)
      transform_dweights(du + v * vector_floats, channels, block < BLOCKS_PER_SUM,
                         total + v * p.vector_floats());
  }
}

constexpr auto tile_wgrad_task = [](const WgradPass& p, auto* type, int64_t split, int64_t chunk, bool last,
                                    Scratch& scratch, Scratch&) {
  const WinogradBlocks task(p, split, chunk);
  const bool same_split = chunk + 1 < p.chunks();
  const WinogradBlocks after(p, same_split ? split : split + 1, same_split ? chunk + 1 : 0);
  float* total = p.partials + (split * p.vectors() + task.first_vector) * p.vector_floats();
  wgrad_by_tiles<std::remove_pointer_t<decltype(type)>>(p, task, last ? nullptr : &after, total, scratch);
};

}  // namespace GCONV_ISA_NS
}  // namespace gconv
