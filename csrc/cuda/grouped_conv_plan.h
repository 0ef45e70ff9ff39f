// Which tiles a convolution is cut into. By shape, type and device alone: every run of an op is cut alike.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "../grouped_conv.h"
#include "grouped_conv_params.h"
#include "grouped_conv_results.h"
#include "merge.h"

namespace gconv::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One axis of a convolution: output i of parity tap_parity[k] has tap k at input step * i + offset[k], and
// lies at parities * i + that parity.
struct ConvAxis {
  int step, offset[3], tap_parity[3], parities;
  int in, out, count;  // inputs, outputs, and outputs of the larger parity
};

inline ConvAxis forward_axis(int64_t in, int64_t out, int64_t stride, int64_t pad, int64_t dil) {
  const Offsets o = forward_offsets(pad, dil);
  return {int(stride), {o.tap[0], o.tap[1], o.tap[2]}, {0, 0, 0}, 1, int(in), int(out), int(out)};
}

// Of the input gradient: x's pixel i gets dy's pixel j by tap k where i + pad - k*dil = stride*j.
inline ConvAxis backward_axis(int64_t in, int64_t out, int64_t stride, int64_t pad, int64_t dil) {
  ConvAxis axis{1, {}, {}, int(stride), int(out), int(in), int(ceil_div(in, stride))};
  for (int k = 0; k < 3; ++k) {
    const int64_t reach = pad - k * dil;
    axis.tap_parity[k] = stride == 2 && reach % 2 != 0 ? 1 : 0;
    axis.offset[k] = int((reach + axis.tap_parity[k]) / stride);
  }
  return axis;
}

// Whether the three taps of an axis are neighbours of one parity, so that an input meets all three.
inline bool taps_in_a_row(const ConvAxis& a) {
  return a.step == 1 && a.parities == 1 && std::abs(a.offset[1] - a.offset[0]) == 1 &&
         a.offset[2] - a.offset[1] == a.offset[1] - a.offset[0];
}

struct ConvPlan {
  ConvParams p{};
  int rows_of_weights = 1;  // KH
  int64_t blocks = 0, shared_bytes = 0;
  int64_t packed_weights = 0;  // of the storage type

  int64_t packed_floats(int64_t element) const { return ceil_div(packed_weights * element, 16) * 4; }
};

// ---- channels

// What a strip costs per unit in cycles of a multiprocessor, by rows of a tile: what it loads (pixels and
// weights) and what it multiplies, of which the larger counts and a part of the other.
template <typename T>
double strip_cost(int share, bool rows_reused) {
  const double taps = rows_reused ? 3 : 1;
  const double loads = (ROWS + taps - 1) * 4 + share * taps * 2;
  const double products = ROWS * taps * share * (sizeof(T) == 4 ? 3.2 : 1.6);
  return std::max(loads, products) + 0.25 * std::min(loads, products);
}

template <typename T>
ConvCut cut_with(int64_t in, int64_t out, int64_t groups, int64_t merge, int share) {
  constexpr int OUT = Product<T>::OUT, U = UNIT<T>;
  ConvCut cut{int(in), int(out), int(in / groups), int(out / groups), 0, 0, 0, share, 0};
  cut.span = int(merge * cut.group_out);
  cut.strips_per_span = int(ceil_div(cut.span, share * OUT));
  cut.strips = int(ceil_div(groups, merge)) * cut.strips_per_span;
  for (int i = 0; i < cut.strips; ++i) {
    const Strip s = strip_of<OUT, U>(cut, i);
    if (s.end <= s.first) continue;
    const int last = ((s.end - 1) / cut.group_out + 1) * cut.group_in - 1;
    cut.units = std::max(cut.units, last / U - s.unit + 1);
  }
  return cut;
}

template <typename T>
ConvCut channel_cut(int64_t in, int64_t out, int64_t groups, bool rows_reused, bool wide) {
  constexpr int OUT = Product<T>::OUT;
  ConvCut best{};
  double least = 0;
  for (int share : {1, 2, 4}) {
    if (share == 2 && sizeof(T) == 4) continue;  // not compiled
    if (wide && share != OCTETS) continue;
    for (int64_t merge = 1; merge <= 64; merge *= 2) {
      const int64_t merged = merge >= groups || merge == 64 ? groups : merge;
      if (merged < groups && merged * (out / groups) % OUT != 0) continue;
      const ConvCut cut = cut_with<T>(in, out, groups, merged, share);
      const double cost = double(cut.strips) * cut.units * strip_cost<T>(share, rows_reused);
      if (best.strips == 0 || cost < least) best = cut, least = cost;
      if (merged == groups) break;
    }
  }
  return best;
}

template <typename T>
int units_of_blocks(const ConvCut& cut, int bands_per_block) {
  constexpr int OUT = Product<T>::OUT, U = UNIT<T>;
  const int strips = OCTETS / cut.share * bands_per_block;
  int units = 0;
  for (int first = 0; first < cut.strips; first += strips) {
    const int begin = strip_of<OUT, U>(cut, first).unit;
    for (int i = first; i < std::min(first + strips, cut.strips); ++i) {
      const Strip s = strip_of<OUT, U>(cut, i);
      if (s.end > s.first) units = std::max(units, s.unit + cut.units - begin);
    }
  }
  return units;
}

// ---- tiles

template <typename T, bool BACKWARD>
struct Planner {
  using P = Product<T>;
  const TileSource& source;
  const ConvAxis &h, &w;
  const Device& device;
  int64_t images;
  bool sums;  // statistics or sums are wanted
  int taps;   // of all passes
  ConvPlan plan{};
  double least = 0;

  // Considers tiles of `bands` x `columns` x `side` images with so many bands of channels to a block.
  void consider(const ConvCut& cut, int bands_per_block, int block_units, int chunk, int bands, int columns,
                int side) {
    const TileAxis rows = tile_axis(h.step, h.offset, bands * ROWS),
                   line = tile_axis(w.step, w.offset, columns);
    const Tile tile = Tile::of(rows, line, side, chunk);
    const int lanes = side * bands * columns, lane_tiles = int(ceil_div(lanes, P::PIXELS));
    const int work = lane_tiles * bands_per_block;
    if (chunk < block_units && work > WARPS) return;
    const int64_t strips_at = tile.bytes();
    const int64_t table_at =
        strips_at + (BLOCK_TILE_CHUNKS + int64_t(bands_per_block) * (OCTETS / cut.share)) * 16;
    const int64_t lanes_at = table_at + int64_t(std::min(cut.units, chunk)) * taps * 4;
    const int64_t slots_at = lanes_at + int64_t(lane_tiles) * P::PIXELS * 4;
    const int64_t parked_at = slots_at + (sums ? int64_t(work) * (2 * OCTETS * P::OUT + 1) * 4 : 0);
    const int64_t bytes = parked_at + (chunk < block_units ? int64_t(THREADS) * ROWS * OCTETS * 16 : 0);
    if (bytes > device.shared_per_block || lanes > 1024) return;

    const int64_t row_tiles = ceil_div(h.count, rows.count), column_tiles = ceil_div(w.count, columns);
    const int64_t tiles = ceil_div(images, side) * row_tiles * column_tiles;
    const int64_t channel_blocks = ceil_div(ceil_div(cut.strips, OCTETS / cut.share), bands_per_block);
    const int64_t blocks = tiles * channel_blocks;
    if (blocks > INT32_MAX) return;

    // In cycles: 24 bytes each from L2, and the products.
    const double read = double(side) * std::min(rows.size, h.in) * std::min(line.size, w.in) * block_units *
                        16 * (source.prologue == Prologue::finish ? 2 : 1) / 24;
    const double compute = double(work) * (OCTETS / cut.share) * cut.units * taps / 2 *
                           strip_cost<T>(cut.share, plan.rows_of_weights == 3) * (P::PIXELS / 16);
    const double resident =
        double(std::min<int64_t>(BLOCKS<T>, device.shared_per_multiprocessor / (bytes + 1024)));
    const double waves = double(blocks) / (std::max(resident, 1.0) * device.multiprocessors);
    // One block alone neither loads while it multiplies nor multiplies while it loads.
    const double alone = 1.0 + 0.5 / (std::max(resident, 1.0) * std::max(resident, 1.0));
    const double cost = (std::max(read, compute) + 0.3 * std::min(read, compute) + 500) * double(blocks) *
                        alone * (double(int64_t(waves) + (waves > double(int64_t(waves)))) / waves);
    if (plan.blocks != 0 && cost >= least) return;
    least = cost;
    ConvParams& p = plan.p;
    p.tile = tile, p.cut = cut;
    p.bands = bands, p.lanes = lanes;
    p.row_tiles = int(row_tiles), p.columns = int(column_tiles), p.tiles = tiles;
    p.channel_blocks = int(channel_blocks), p.bands_per_block = bands_per_block;
    p.block_units = block_units, p.chunk = chunk;
    p.strips_at = int(strips_at), p.table_at = int(table_at), p.lanes_at = int(lanes_at);
    p.slots_at = int(slots_at), p.parked_at = int(parked_at);
    plan.blocks = blocks, plan.shared_bytes = bytes;
  }

  void consider_tiles(const ConvCut& cut, int bands_per_block, int block_units, int chunk) {
    const int most_bands = int(std::min<int64_t>(MOST_BANDS, ceil_div(h.count, ROWS)));
    for (int parts = 1, last = 0; parts <= w.count; ++parts) {
      const int columns = int(ceil_div(w.count, parts));
      if (columns == last) continue;
      last = columns;
      if (columns <= MOST_COLUMNS)
        for (int bands = 1; bands <= most_bands; ++bands) {
          const bool whole = columns == w.count && bands * ROWS >= h.count;
          const int most = whole ? int(std::min<int64_t>(MOST_IMAGES, images)) : 1;
          for (int side = 1; side <= most; ++side)
            consider(cut, bands_per_block, block_units, chunk, bands, columns, side);
        }
      if (columns <= 8) break;
    }
  }

  // The passes, with their offsets in the tile, once that is known.
  void make_passes() {
    ConvParams& p = plan.p;
    const bool reuse = plan.rows_of_weights == 3;
    int64_t packed = 0;
    int table = 0;
    for (int ph = 0; ph < h.parities; ++ph)
      for (int pw = 0; pw < w.parities; ++pw) {
        ConvPass& pass = p.pass[p.passes++];
        pass = {ph, pw, 0, 0, packed, table, {}, {}};
        for (int kh = 0; kh < (reuse ? 1 : 3); ++kh)
          for (int kw = 0; kw < 3; ++kw) {
            if ((!reuse && h.tap_parity[kh] != ph) || w.tap_parity[kw] != pw) continue;
            for (int row = 0; row < 3; ++row) {
              // With three rows of weights the first is that of the tile's first row.
              const int tap_row = !reuse ? kh : p.tile.h.tap[0] == 0 ? row : 2 - row;
              pass.weight[pass.taps][row] = (signed char)(tap_row * 3 + kw);
            }
            const int at =
                (reuse ? 0 : p.tile.h.tap[kh]) * p.tile.row_pitch + p.tile.w.tap[kw] * p.tile.pitch;
            pass.offset[pass.taps++] = at;
          }
        const int units = p.cut.units;
        pass.steps = int(ceil_div(int64_t(units) * pass.taps, P::HALF_STEPS));
        packed += int64_t(p.cut.strips) * pass.steps * p.cut.share * plan.rows_of_weights * P::WEIGHTS;
        table += std::min(units, p.chunk) * pass.taps;
      }
    plan.packed_weights = packed;
  }

  // Every combination that fits shared memory with all its units; else the channels in chunks.
  void run(int64_t in, int64_t out, int64_t groups) {
    plan.rows_of_weights = taps_in_a_row(h) ? 3 : 1;
    const bool reuse = plan.rows_of_weights == 3;
    taps = reuse ? 3 : 9;
    const ConvCut cut = channel_cut<T>(in, out, groups, reuse, false);
    const int bands = int(ceil_div(cut.strips, OCTETS / cut.share));
    for (int n : {1, 2, 4, 8}) {
      if (n > bands) break;
      const int units = units_of_blocks<T>(cut, n);
      consider_tiles(cut, n, units, units);
    }
    if (plan.blocks == 0) {
      const ConvCut wide = channel_cut<T>(in, out, groups, reuse, true);
      for (int chunk = wide.units / 2 * 2; chunk >= 2 && plan.blocks == 0;
           chunk = std::min(chunk - 2, chunk * 3 / 4 / 2 * 2))
        consider_tiles(wide, 1, wide.units, chunk);
    }
    if (plan.blocks == 0) throw std::runtime_error("grouped_conv: no tile fits shared memory");
    make_passes();
  }
};

}  // namespace gconv::cuda
