// How a convolution's channels, taps and pixels are cut: what the host decides and the kernels read.
//
// Output channels come in octets (quads for exact float32), `share` of them to a strip: a strip's octets read
// the same input units, `units` of them from its first on, and so share every load. Groups are merged into
// spans for that; what of a strip's units is of another group has a weight of 0. OCTETS octets, one strip or
// several, are what a warp takes at a time: a band of channels.
//
// A half-step is one unit at one tap, 16 bytes of K: tap by tap within a unit, unit by unit. With KH = 3 the
// taps are those of one row, and each pixel that is loaded meets the three rows of weights.
#pragma once
#include "grouped_conv_tile.h"

namespace gconv::cuda {

struct ConvCut {
  int in, out, group_in, group_out;   // channels, and channels of a group
  int span, strips_per_span, strips;  // span: output channels of merged groups
  int share, units;
};

struct Strip {
  int first, end;  // output channels
  int unit;        // its first input unit
};

// With octets of OUT channels and input units of UNIT.
template <int OUT, int UNIT>
GCONV_HOST_DEVICE Strip strip_of(const ConvCut& cut, int index) {
  const int span = index / cut.strips_per_span, within = index % cut.strips_per_span;
  const int first = span * cut.span + within * cut.share * OUT;
  int end = first + cut.share * OUT;
  if (end > (span + 1) * cut.span) end = (span + 1) * cut.span;
  if (end > cut.out) end = cut.out;
  return {first, end, first / cut.group_out * cut.group_in / UNIT};
}

// Outputs of one parity of rows and of columns, and the taps that reach them.
struct ConvPass {
  int parity_h, parity_w;
  int taps, steps;           // steps: of a strip
  int64_t packed;            // where its weights begin, in weights
  int table;                 // where its offsets begin
  int offset[9];             // of a tap in the tile, in bytes
  signed char weight[9][3];  // tap kh*3 + kw of the weight, for each row of weights that it meets
};

struct ConvParams {
  TileSource source;
  Tile tile;
  ConvCut cut;
  int passes;
  ConvPass pass[4];

  // An output (i, j) of a pass lies at row step_h * i + parity_h, column step_w * j + parity_w.
  int64_t images;
  int height, width, step_h, step_w;
  int bands, lanes;        // of a tile: ROWS rows each; pixels of all bands and images
  int row_tiles, columns;  // tiles of an image
  int64_t tiles;           // in all
  int channel_blocks;      // blocks that share a tile of pixels
  int bands_per_block;     // of channels
  int block_units, chunk;  // units that a block reads, and how many of them at a time
  // In shared memory: where the block is and its strips, the offsets of half-steps, where its lanes are, what
  // warps leave for the block, and where units come in more than one chunk (then a warp has but one tile) the
  // accumulators in between.
  int strips_at, table_at, lanes_at, slots_at, parked_at;

  const void* packed;
  Nhwc out;
  bool out_aligned;
  // Forward: affine [2, out], residual, relu. Backward: act [4, out] with its x in `residual`.
  const float* vectors;
  Nhwc residual;
  bool relu;
  float* partial;  // statistics or sums of the tiles; null: not wanted
};

struct PackParams {
  const void* weight;  // [K, C/groups, 3, 3]
  int64_t stride_outer, stride_inner, stride_tap;
  bool transposed;  // the convolution's input channels are K
  void* packed;
  int64_t total;
  ConvCut cut;
  int rows;  // KH
  int passes;
  ConvPass pass[4];
};

}  // namespace gconv::cuda
