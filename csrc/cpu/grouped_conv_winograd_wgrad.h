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
    const int64_t channel_end = std::min(p.shape.k, (first_vector + vectors) * LANES);
    group_end = (channel_end - 1) / p.output_per_group + 1;
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
                 s.ow, first_vector * LANES, std::min(s.k - first_vector * LANES, vectors * LANES));
  }
};

// The places of a block's transformed values.
struct BlockValues {
  int64_t tiles, position, values;  // of a vector
  float* inputs[2];                 // of even groups and of odd ones; the same where no vector spans two
  float* gradients;                 // of the vectors that begin in a group
};

// Calls f(image, row of tiles, floats to its first tile) for each row of a block.
template <typename F>
void each_tile_row(const WinogradBlocks& task, int64_t block, const F& f) {
  int64_t at = 0;
  for (int64_t n = task.image(block); n < task.image_end(block); ++n)
    for (int64_t row = task.row(block); row < task.row_end(block); ++row, at += task.across * LANES)
      f(n, row, at);
}

// Adds a block's dw of the vectors [begin, end) that begin in a group, whose x, and the next group's if one
// spans both, is transformed; du is the first one's [position][channel][LANES].
template <typename T>
void add_block(const WgradPass& p, const WinogradBlocks& task, int64_t block, int64_t group,
               const GroupVectors& of_group, int64_t begin, int64_t end, const BlockValues& at, float* du,
               bool fresh, RowPrefetch& next) {
  const GroupedConvShape& s = p.shape;
  const int64_t channels = p.source_per_group;
  each_tile_row(task, block, [&](int64_t n, int64_t row, int64_t tile) {
    for (int64_t v = begin; v < end; ++v) {
      const int lanes = static_cast<int>(std::min<int64_t>(LANES, s.k - v * LANES));
      const TileSource dy{&p.dy, n, s.oh, s.ow, 2 * row, 0, v * LANES, lanes};
      transform_gradients<T>(dy, task.across, at.gradients + (v - begin) * at.values + tile, at.position);
    }
  });
  const float* inputs = at.inputs[group % 2];
  const Mask first = lanes_mask(of_group.last_lanes);
  for (int64_t i = 0; i < POSITIONS; ++i)
    for (int64_t v = begin; v < end; ++v) {
      const int64_t second = of_group.spans(v) ? at.inputs[1 - group % 2] - inputs : 0;
      const float* gradients = at.gradients + (v - begin) * at.values + i * at.position;
      for (int64_t c = 0; c < channels; c += LANES)
        accumulate(inputs + c / LANES * at.values + i * at.position, second, first, gradients, at.tiles,
                   std::min<int64_t>(LANES, channels - c), fresh,
                   du + (((v - begin) * POSITIONS + i) * channels + c) * LANES);
      next.step();
    }
}

// Leaves the task's dw in `total`, [vector][channel][3][3][LANES]. The block that the task `after` begins
// with, if any, is fetched with the last one.
template <typename T>
void wgrad_by_tiles(const WgradPass& p, const WinogradBlocks& task, const WinogradBlocks* after, float* total,
                    Scratch& scratch) {
  const GroupedConvShape& s = p.shape;
  const int64_t channels = p.source_per_group;
  if (task.blocks == 0) {  // no images
    std::fill(total, total + task.vectors * p.vector_floats(), 0.0f);
    return;
  }
  const int64_t vector_floats = POSITIONS * channels * LANES;
  const int64_t values = block_floats(task.most_tiles());
  const int64_t group_vectors = (p.output_per_group + LANES - 1) / LANES;
  const int64_t input_floats = (channels + LANES - 1) / LANES * values;  // of a group
  const int64_t gradient_floats = std::min(group_vectors, task.vectors) * values;
  Carve carve(scratch);
  const int64_t apart = p.output_per_group % LANES == 0 ? 0 : input_floats;
  carve.reserve({input_floats + apart, gradient_floats, task.vectors * vector_floats});
  float *inputs = carve.take(input_floats + apart), *gradients = carve.take(gradient_floats);
  float* du = carve.take(task.vectors * vector_floats);
  for (int64_t block = 0; block < task.blocks; ++block) {
    RowPrefetch next;
    if (block + 1 < task.blocks)
      task.prefetch<T>(p, block + 1, &next);
    else if (after != nullptr && after->blocks > 0)
      after->prefetch<T>(p, 0, &next);
    next.spread(task.vectors * POSITIONS);
    const bool fresh = block % BLOCKS_PER_SUM == 0;
    const int64_t tiles =
        (task.image_end(block) - task.image(block)) * (task.row_end(block) - task.row(block)) * task.across;
    const BlockValues at{
        tiles, position_floats(tiles), block_floats(tiles), {inputs, inputs + apart}, gradients};
    int64_t transformed = task.first_group;
    const auto transform = [&](int64_t group) {
      if (group < transformed) return;
      each_tile_row(task, block, [&](int64_t n, int64_t row, int64_t tile) {
        const TileSource x{&p.x, n, s.h, s.w, 2 * row - s.pad_h, -s.pad_w, group * channels, LANES};
        transform_inputs<T>(x, channels, task.across, at.inputs[group % 2] + tile, at.tiles);
      });
      ++transformed;
    };
    for (int64_t group = task.first_group; group < task.group_end; ++group) {
      const GroupVectors of_group(group, p.output_per_group, s.groups);
      const int64_t begin = std::max(task.first_vector, of_group.begin);
      const int64_t end = std::min(task.first_vector + task.vectors, of_group.end);
      if (begin >= end) continue;
      transform(group);
      if (of_group.spans(end - 1)) transform(group + 1);
      add_block<T>(p, task, block, group, of_group, begin, end, at,
                   du + (begin - task.first_vector) * vector_floats, fresh, next);
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
