// How the weight gradient of a grouped convolution is cut: weights into warp tiles, pixels into steps, and
// both over the grid. By shape and device alone.
//
// Channels come in octets. An output octet's groups read some input octets; times the three columns of taps
// they are its half-steps, at 3 * octet + kw, two of which make the 16 rows of a matrix product. A warp tile
// is `octets` output octets that read the same input (an octet block) and `pairs` pairs of half-steps (a
// chunk) at all three rows of taps.
//
// The lanes of a tile are output columns counted over several images side by side. A strip is all output rows
// of one tile of lanes, a step some of its rows; a split of the grid takes steps that follow each other, over
// the strips' ends, so that all splits are alike. Rows of x stay in a ring in shared memory from step to
// step.
#pragma once
#include <stdexcept>

#include "../grouped_conv.h"
#include "grouped_conv_tile.h"

namespace gconv::cuda {

constexpr int OCTET = 8;            // channels
constexpr int WGRAD_WARPS = 8;      // in a block, at most
constexpr int FRAGMENT = WARP * 4;  // floats of an accumulator in all lanes

struct WeightTiles {
  int c, k, group_c, group_k;
  int octets, pairs;  // of a warp tile
  int span_octets;    // output octets of a span, the fewest groups that end where an octet does
  int span_blocks;    // octet blocks of a span
  int blocks;         // octet blocks in all
  int chunks;         // of an octet block

  struct Range {
    int first, count;
  };

  GCONV_HOST_DEVICE int first_octet(int block) const {
    return block / span_blocks * span_octets + block % span_blocks * octets;
  }
  // The input octets of an octet block. One that begins beyond the last channel has those of the last.
  GCONV_HOST_DEVICE Range input_octets(int block) const {
    const int begin = first_octet(block) * OCTET, span_end = (block / span_blocks + 1) * span_octets * OCTET;
    const int whole = begin + octets * OCTET < span_end ? begin + octets * OCTET : span_end;
    const int end = whole < k ? whole : k, first = begin < k ? begin : k - 1;
    const int low = first / group_k * group_c / OCTET;
    const int high = (((end > first ? end : first + 1) - 1) / group_k + 1) * group_c - 1;
    return {low, high / OCTET + 1 - low};
  }
  int fragments() const { return blocks * chunks * fragments_of_tile(); }
  GCONV_HOST_DEVICE int fragments_of_tile() const { return 3 * pairs * octets; }
};

// What a block of the grid works on: warp tiles of `blocks` octet blocks and `chunks` chunks of each.
struct BlockTiles {
  int blocks, chunks;

  struct Channels {
    int first_block, first_chunk;
    WeightTiles::Range x, dy;  // octets that it loads
  };

  GCONV_HOST_DEVICE int chunk_parts(const WeightTiles& t) const { return (t.chunks + chunks - 1) / chunks; }
  int count(const WeightTiles& t) const { return (t.blocks + blocks - 1) / blocks * chunk_parts(t); }
  GCONV_HOST_DEVICE Channels channels(const WeightTiles& t, int index) const {
    const int first_block = index / chunk_parts(t) * blocks, first_chunk = index % chunk_parts(t) * chunks;
    const int last = (first_block + blocks < t.blocks ? first_block + blocks : t.blocks) - 1;
    const int end_chunk = first_chunk + chunks < t.chunks ? first_chunk + chunks : t.chunks;
    const auto low = t.input_octets(first_block), high = t.input_octets(last);
    const int reach = (end_chunk * t.pairs * 2 - 1) / 3 + 1;
    const int begin = low.first + first_chunk * t.pairs * 2 / 3;
    const int end = high.first + (reach < high.count ? reach : high.count);
    const int dy = t.first_octet(first_block);
    return {first_block,
            first_chunk,
            {begin, end > begin ? end - begin : 1},
            {dy, t.first_octet(last) + t.octets - dy}};
  }
};

// The rows of x in the order in which the output rows meet them: output row r meets its tap kh at entry
// r * step + kh * tap. Either the rows as they lie, or, with taps far apart, three of their own for each r.
struct RowList {
  int step, tap;
  bool own;
  int stride, dilation, pad;

  GCONV_HOST_DEVICE int image_row(int entry) const {
    return own ? entry / 3 * stride + entry % 3 * dilation - pad : entry - pad;
  }
  // Past the entries of all output rows before `row`.
  GCONV_HOST_DEVICE int end(int row) const { return (row - 1) * step + 2 * tap + 1; }
  // The nearest entry between those above and those below the image, which are not kept.
  GCONV_HOST_DEVICE int kept(int entry, int height) const {
    return own ? entry : entry < pad ? pad : entry > height + pad ? height + pad : entry;
  }
};

// In one word: a unit, a slot of a row and a row.
constexpr int DEAL_UNIT_BITS = 10, DEAL_ROW_AT = 24;

// Units of 16 bytes dealt to the threads of a block: how far apart two of a thread are.
struct Deal {
  int units, slots;  // of a row
  int unit, slot, row;

  static Deal of(int units, int slots, int threads) {
    return {units, slots, threads % units, threads / units % slots, threads / units / slots};
  }
  bool packs() const { return units <= 1 << DEAL_UNIT_BITS && slots <= 1 << (DEAL_ROW_AT - DEAL_UNIT_BITS); }
};

struct WgradParams {
  TileSource x, dy;
  float* partial;
  void* dweight;
  WeightLayout layout;
  WeightTiles tiles;
  BlockTiles block;
  int channel_blocks;     // of the grid
  int warp_tiles, parts;  // of a block: its tiles, and the warps that share each one's pixels
  int threads;
  int x_octets, dy_octets;  // most that a block loads
  // lanes
  TileAxis columns;
  int images, lanes, lane_groups, column_tiles;
  // steps
  RowList rows;
  int step_rows, steps;     // rows of a step, steps of a strip
  int splits, split_steps;  // steps of a split, of the first `longer_splits` one more
  int longer_splits;
  int strip_entries;  // of the list of x's rows that are kept
  // shared memory, in bytes
  int ring;  // rows of x
  int x_pitch, x_image_pitch, x_row_pitch, dy_pitch, dy_row_pitch;
  int dy_at, y_at, places_at, own_at, lanes_at, tables_at;
  int64_t shared_bytes;
  Deal x_deal, dy_deal;
  bool rows_shared;  // an x row meets three rows of dy one after the other
};

// Where a slot of a row comes from: elements from the start of a tensor's row, less than 0 for zeros.
struct Place {
  int64_t from;
  int64_t other;  // of x: bytes from the start of the row in the tile; of dy: `from` in y
};

// What a thread keeps in shared memory, for the sums need the registers.
struct Own {
  uint32_t x_walk, dy_walk;
  int fragment;               // its warp's first in `partial`; -1 without a warp tile
  int dy_at;                  // its warp tile's dy in a pixel, in bytes
  int first_group;            // of lanes
  int begin, steps;           // of its split
  int x_channel, dy_channel;  // its block's first
  int threads;                // of its block
};

namespace wgrad {

inline int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

// A kind of warp tile and its time for a group of lanes and a row, in cycles of a multiprocessor: the longer
// of its matrix products and its reads of shared memory.
struct Kind {
  int octets, pairs, cycles;
};
constexpr Kind KINDS[] = {{1, 2, 18}, {2, 3, 29}, {3, 2, 29}};

inline WeightTiles weight_tiles(const GroupedConvShape& s, const Kind& kind) {
  const int group_c = int(s.c / s.groups), group_k = int(s.k / s.groups);
  int merge = 1;
  while (merge * group_c % OCTET != 0 || merge * group_k % OCTET != 0) merge *= 2;
  if (merge > s.groups) merge = int(s.groups);
  WeightTiles t{int(s.c), int(s.k), group_c, group_k, kind.octets, kind.pairs, 0, 0, 0, 0};
  t.span_octets = ceil_div(int64_t(merge) * group_k, OCTET);
  t.span_blocks = ceil_div(t.span_octets, t.octets);
  t.blocks = ceil_div(s.groups, merge) * t.span_blocks;
  int most = 1;
  for (int b = 0; b < t.span_blocks; ++b)
    most = t.input_octets(b).count > most ? t.input_octets(b).count : most;
  t.chunks = ceil_div(ceil_div(3 * most, 2), t.pairs);
  return t;
}

inline int64_t cycles(const WeightTiles& t, const Kind& kind) {
  return int64_t(t.blocks) * t.chunks * kind.cycles;
}

struct Loads {
  int x, dy;
};
// The most octets that any block of the grid loads; what the spans' blocks load repeats itself.
inline Loads most_loads(const WeightTiles& t, const BlockTiles& b) {
  Loads most{0, 0};
  for (int i = 0; i < b.count(t) && i < t.span_blocks * b.chunk_parts(t); ++i) {
    const auto c = b.channels(t, i);
    if (c.x.count > most.x) most.x = c.x.count;
    if (c.dy.count > most.dy) most.dy = c.dy.count;
  }
  return most;
}

// The block whose time, the longer of its warps' and of its loads from L2 (11 cycles for an octet of a group
// of lanes), times the number of blocks is the least; of equals the one that loads least, then the largest.
inline BlockTiles block_tiles(const WeightTiles& t, const Kind& kind) {
  BlockTiles best{1, 1};
  int64_t best_time = -1, best_loads = 0;
  for (int blocks = 1; blocks <= WGRAD_WARPS && blocks <= t.blocks; ++blocks)
    for (int chunks = 1; blocks * chunks <= WGRAD_WARPS && chunks <= t.chunks; ++chunks) {
      const BlockTiles b{blocks, chunks};
      const Loads most = most_loads(t, b);
      const int64_t load = 11 * (most.x + most.dy), work = blocks * chunks * kind.cycles;
      const int64_t time = (load > work ? load : work) * b.count(t), loads = load * b.count(t);
      if (best_time < 0 || time < best_time || (time == best_time && loads <= best_loads))
        best = b, best_time = time, best_loads = loads;
    }
  return best;
}

// Output columns of a tile over `images` images, at most `lanes`.
struct Lanes {
  int columns, images;
};
inline Lanes lane_tile(const GroupedConvShape& s, int lanes) {
  if (s.ow > lanes) return {ceil_div(s.ow, ceil_div(s.ow, lanes)), 1};
  int images = 1;
  for (int i = 1; i * s.ow <= lanes && i <= s.n; ++i) {
    const auto idle = [&](int m) { return double(ceil_div(m * s.ow, 16) * 16) / double(m * s.ow); };
    if (idle(i) <= idle(images)) images = i;
  }
  return {int(s.ow), images};
}

// Lays out the tile in shared memory: what is the same for every number of rows, then a step of `step_rows`.
inline void lay_out(WgradParams& p, const GroupedConvShape& s, const Lanes& tile, bool own_rows,
                    int step_rows, int pixels, int element) {
  const auto reads = forward_offsets(s.pad_w, s.dil_w);
  p.columns = tile_axis(int(s.stride_w), reads.tap, tile.columns);
  p.images = tile.images, p.lanes = tile.images * tile.columns, p.lane_groups = ceil_div(p.lanes, pixels);
  p.column_tiles = ceil_div(s.ow, tile.columns);
  p.rows = {own_rows ? 3 : int(s.stride_h),
            own_rows ? 1 : int(s.dil_h),
            own_rows,
            int(s.stride_h),
            int(s.dil_h),
            int(s.pad_h)};
  p.rows_shared = !own_rows && s.stride_h == 1 && s.dil_h == 1;
  p.step_rows = step_rows, p.steps = ceil_div(s.oh, step_rows);
  p.ring = 1, p.strip_entries = p.rows.kept(p.rows.end(int(s.oh)), int(s.h)) - p.rows.kept(0, int(s.h));
  for (int first = 0; first < s.oh; first += step_rows) {  // a step's rows and the next one's
    const int next = first + step_rows;
    const auto kept = [&](int entry) { return p.rows.kept(entry, int(s.h)); };
    const auto end = [&](int row) { return kept(p.rows.end(row < s.oh ? row : int(s.oh))); };
    const int begin = kept(first * p.rows.step);
    const int both =
        next < s.oh ? end(next + step_rows) - begin : end(next) - begin + end(step_rows) - kept(0);
    if (both > p.ring) p.ring = both;
  }

  const int octet_bytes = OCTET * element, banks = 128;
  p.x_pitch = (p.x_octets | 1) * octet_bytes, p.dy_pitch = (p.dy_octets | 1) * octet_bytes;
  // The next image's columns go on in the banks where this one's end.
  const int wanted = tile.columns * p.x_pitch % banks, image = p.columns.size * p.x_pitch;
  p.x_image_pitch = tile.images == 1 ? image : image + (wanted - image % banks + banks) % banks;
  p.x_row_pitch = tile.images * p.x_image_pitch;
  p.dy_row_pitch = p.lane_groups * pixels * p.dy_pitch;

  const int dy_slots = p.lane_groups * pixels, x_slots = tile.images * p.columns.size;
  const int64_t ring_bytes = int64_t(p.ring) * p.x_row_pitch, stage = int64_t(step_rows) * p.dy_row_pitch;
  const bool finish = p.dy.prologue == Prologue::finish;
  const int64_t places = ring_bytes + (finish ? 4 : 2) * stage;
  const int64_t own = places + int64_t(sizeof(Place)) * (x_slots + dy_slots);
  const int64_t lanes = own + int64_t(sizeof(Own)) * p.threads;
  const int64_t tables = (lanes + 4 * dy_slots + 15) / 16 * 16;
  p.shared_bytes =
      tables +
      4 * OCTET * ((p.x.prologue == Prologue::act ? 2 * p.x_octets : 0) + (finish ? 6 * p.dy_octets : 0));
  p.dy_at = int(ring_bytes), p.y_at = int(ring_bytes + 2 * stage), p.places_at = int(places);
  p.own_at = int(own), p.lanes_at = int(lanes), p.tables_at = int(tables);
  const int octet_units = octet_bytes / 16;
  p.x_deal = Deal::of(p.x_octets * octet_units, x_slots, p.threads);
  p.dy_deal = Deal::of(p.dy_octets * octet_units, dy_slots, p.threads);
}

// Time of a strip by output pixel, in cycles of a multiprocessor: the longer of products, reads of shared
// memory and loads from L2, and the barriers between the steps.
inline double pixel_time(const WgradParams& p, const GroupedConvShape& s) {
  const WeightTiles& t = p.tiles;
  // Of two rows of dy that share what they meet four are read, of others three each.
  const int last = int(s.oh) - (p.steps - 1) * p.step_rows;
  const auto read = [&](int rows) { return p.rows_shared ? rows / 2 * 4 + rows % 2 * 3 : rows * 3; };
  const double rows_read = double(p.steps - 1) * read(p.step_rows) + read(last);
  const double rows_loaded = p.rows.own ? 3.0 * double(s.oh) : double(p.rows.end(int(s.oh)));
  const double products = double(s.oh) * 3 * t.octets * t.pairs * 1.6;
  const double reads = rows_read * t.pairs * 4 + double(s.oh) * t.octets * 2;
  const double work = p.lane_groups * p.warp_tiles * (products > reads ? products : reads);
  const double load =
      11.0 / 16 *
      (rows_loaded * p.images * p.columns.size * p.x_octets + double(s.oh) * p.lanes * p.dy_octets);
  return ((work > load ? work : load) + 200.0 * p.steps) / (double(s.oh) * p.lanes);
}

// The quickest tile that fits in `most` bytes, if there is one.
inline bool fit(WgradParams& p, const GroupedConvShape& s, int64_t most, int pixels, int element) {
  const WgradParams base = p;
  double best = -1;
  for (int lanes = 64; lanes >= 16; lanes /= 2)
    for (const bool own_rows : {false, true})
      for (int rows = 1; rows == 1 || (rows <= s.oh && rows <= 8); ++rows) {
        WgradParams q = base;
        lay_out(q, s, lane_tile(s, lanes), own_rows, rows, pixels, element);
        if (q.shared_bytes > most || !q.x_deal.packs() || !q.dy_deal.packs()) break;
        const double time = pixel_time(q, s);
        if (best < 0 || time < best) p = q, best = time;
      }
  return best >= 0;
}

}  // namespace wgrad

// `pixels` of a group of lanes; `element` bytes.
inline WgradParams wgrad_plan(const GroupedConvBwdWeightParams& q, const Device& device, int pixels) {
  using namespace wgrad;
  GroupedConvShape s = q.shape;
  if (s.n == 0 || s.oh == 0 || s.ow == 0) s.n = 0, s.oh = s.ow = 1;  // no pixels: weights of 0
  const int element = q.dtype == DType::f32 ? 4 : 2;
  WgradParams p{};
  p.x = tile_source(q.x, q.act, s.n, s.h, s.w, s.c, element);
  p.dy = tile_source(q.dy, q.y, q.finish, s.n, s.oh, s.ow, s.k, element);
  p.partial = q.workspace, p.dweight = q.dweight, p.layout = q.layout;

  Kind kind = KINDS[0];
  for (const Kind& other : KINDS)
    if (cycles(weight_tiles(s, other), other) < cycles(weight_tiles(s, kind), kind)) kind = other;
  p.tiles = weight_tiles(s, kind), p.block = block_tiles(p.tiles, kind);

  const int64_t half = device.shared_per_multiprocessor / 2 - 1024, whole = device.shared_per_block;
  const auto with_block = [&](int64_t most) {
    const Loads loads = most_loads(p.tiles, p.block);
    p.x_octets = loads.x, p.dy_octets = loads.dy;
    p.warp_tiles = p.block.blocks * p.block.chunks, p.parts = WGRAD_WARPS / p.warp_tiles;
    p.threads = p.warp_tiles * p.parts * WARP;
    return fit(p, s, most, pixels, element);
  };
  while (!with_block(half < whole ? half : whole) && !with_block(whole)) {
    int& most = p.block.chunks > p.block.blocks ? p.block.chunks : p.block.blocks;
    if (most == 1) throw std::runtime_error("grouped_conv_bwd_weight: CUDA: too little shared memory");
    most = (most + 1) / 2;
  }

  p.channel_blocks = p.block.count(p.tiles);
  const int64_t steps = int64_t(ceil_div(s.n, p.images)) * p.column_tiles * p.steps;
  // As many splits as fill the device; half as many where what they leave to be summed would be more than an
  // eighth of what they read.
  const int64_t read = s.n * (s.h * s.w * s.c + s.oh * s.ow * s.k * (q.finish ? 2 : 1)) * element;
  const int64_t left = int64_t(p.parts) * p.tiles.fragments() * FRAGMENT * 4;
  const int64_t resident = p.shared_bytes <= half ? 2 : 1;
  const int64_t once = device.multiprocessors / p.channel_blocks;
  int64_t splits = resident * device.multiprocessors / p.channel_blocks;
  if (splits > read / (8 * left)) splits = once > read / (8 * left) ? once : read / (8 * left);
  if (splits > steps) splits = steps;
  p.splits = splits < 1 ? 1 : int(splits);
  p.split_steps = int(steps / p.splits), p.longer_splits = int(steps % p.splits);
  return p;
}

}  // namespace gconv::cuda
