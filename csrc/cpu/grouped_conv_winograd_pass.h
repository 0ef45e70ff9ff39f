// The forward and the input gradient of grouped_conv by Winograd's algorithm, compiled once per instruction
// set. The grid, the packed weights and the epilogues are those of grouped_conv_pass.h.
//
// Tile: 2x2 pixels of one vector of channels. A band of rows is transformed group by group straight from the
//   tensor, the prologue applied on load: its transformed values stay in L1 or L2 while they meet the
//   weights of the group's vectors. Meanwhile the next band is fetched into L2.
// Bytes moved: source once per chunk from memory, two rows of every four once more from L2.
#pragma once
#include "grouped_conv_pass.h"

namespace gconv {
namespace GCONV_ISA_NS {

// A task's bands, and what they read of the source.
struct WinogradBands {
  int64_t image, first_vector, vectors;
  int64_t first_group, group_end;
  Share rows;  // of the output

  WinogradBands(const Pass& p, int64_t index) : rows(0, 0, 1) {
    const PassTask task = p.task(index);
    image = task.image, first_vector = task.chunk * p.chunk;
    vectors = std::min(p.vectors(), first_vector + p.chunk) - first_vector;
    first_group = first_vector * LANES / p.output_per_group;
    const int64_t channel_end = std::min(p.output_channels(), (first_vector + vectors) * LANES);
    group_end = (channel_end - 1) / p.output_per_group + 1;
    rows = p.stripe_rows(task.stripe);
  }
  // Source row of the first tile's first value.
  static int64_t origin(const Pass& p, int64_t row) { return row - (p.transposed ? 2 - p.pad_h : p.pad_h); }

  // What the band from output row `first` on reads, the first band all of it.
  template <typename T>
  void prefetch(const Pass& p, int64_t first, RowPrefetch* next) const {
    const int64_t begin = origin(p, first) + (first > rows.begin ? 2 : 0);
    const int64_t end = origin(p, std::min(rows.end, first + p.band)) + 2;
    next->add<T>(p.source, image, image + 1, std::max<int64_t>(0, begin), std::min(p.source_h, end),
                 p.source_w, first_group * p.source_per_group,
                 (group_end - first_group) * p.source_per_group);
  }
};

template <typename T>
void winograd_task(const Pass& p, int64_t index, int64_t end, Scratch& scratch) {
  const WinogradBands task(p, index);
  const int64_t across = p.tile_columns();
  // Of results, [vector][upper rows, then lower][pixel][LANES]: tiles have a constant distance across rows.
  const int64_t row_floats = 2 * across * LANES, lower = p.band / 2 * row_floats, vector_floats = 2 * lower;
  const int64_t blocks = (p.source_per_group + LANES - 1) / LANES;
  const int64_t input_floats = blocks * block_floats(across * p.band / 2);  // of a group
  Carve carve(scratch);
  // Even groups and odd ones in turn where vectors span two.
  const int64_t apart = p.output_per_group % LANES == 0 ? 0 : input_floats;
  carve.reserve({task.vectors * vector_floats, input_floats + apart});
  float* results = carve.take(task.vectors * vector_floats);
  float* even_inputs = carve.take(input_floats + apart);

  TaskSums sums(task.vectors);
  for (int64_t first = task.rows.begin; first < task.rows.end; first += p.band) {
    const int64_t rows = std::min(p.band, task.rows.end - first), down = (rows + 1) / 2;
    const int64_t tiles = across * down;
    RowPrefetch next;
    if (first + p.band < task.rows.end)
      task.prefetch<T>(p, first + p.band, &next);
    else if (index + 1 < end)
      WinogradBands(p, index + 1).prefetch<T>(p, p.stripe_rows(p.task(index + 1).stripe).begin, &next);
    const int64_t pairs = (std::min(task.vectors, p.output_per_group / LANES) + 1) / 2;
    next.spread(4 * pairs * (task.group_end - task.first_group));
    int64_t transformed = task.first_group;
    const auto inputs_of = [&](int64_t group) {
      float* inputs = even_inputs + group % 2 * apart;
      if (group < transformed) return inputs;
      for (int64_t row = 0; row < down; ++row) {
        const TileSource source{&p.source,
                                task.image,
                                p.source_h,
                                p.source_w,
                                WinogradBands::origin(p, first + 2 * row),
                                p.first_column,
                                group * p.source_per_group,
                                LANES};
        transform_inputs<T>(source, p.source_per_group, across, inputs + row * across * LANES, tiles);
      }
      ++transformed;
      return inputs;
    };
    for (int64_t group = task.first_group; group < task.group_end; ++group) {
      const GroupVectors of_group(group, p.output_per_group, p.groups);
      const int64_t vector_end = std::min(task.first_vector + task.vectors, of_group.end);
      for (int64_t v = std::max(task.first_vector, of_group.begin), together; v < vector_end; v += together) {
        const bool spans = of_group.spans(v);
        together = v + 1 < vector_end && !spans && !of_group.spans(v + 1) ? 2 : 1;
        const float* inputs = inputs_of(group);
        float* out = results + (v - task.first_vector) * vector_floats;
        const TileProducts products{inputs,
                                    spans ? inputs_of(group + 1) - inputs : 0,
                                    lanes_mask(of_group.last_lanes),
                                    block_floats(tiles),
                                    position_floats(tiles),
                                    p.weights_of(v),
                                    p.weight_floats(),
                                    p.source_per_group,
                                    {out, out + lower},
                                    vector_floats};
        multiply_tiles(products, together, tiles, next);
      }
    }
    for (int64_t row = 0; row < rows; ++row)
      finish_row<T>(p,
                    {results + row % 2 * lower + row / 2 * row_floats, vector_floats, task.image, first + row,
                     task.first_vector, task.vectors, 0, p.output_w},
                    sums);
  }
  const PassTask at = p.task(index);
  store_partials(p, sums, at.image, at.stripe, task.first_vector);
}

constexpr auto tile_task = [](const Pass& p, auto* type, int64_t index, int64_t end, Scratch& scratch) {
  winograd_task<std::remove_pointer_t<decltype(type)>>(p, index, end, scratch);
};

}  // namespace GCONV_ISA_NS
}  // namespace gconv
