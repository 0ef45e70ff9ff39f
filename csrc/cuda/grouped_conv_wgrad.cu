// The weight gradient of a grouped 3x3 convolution, in two kernels: partial sums by splits of the pixels,
// then their sum in a fixed order.
#include "grouped_conv_wgrad_plan.h"

namespace gconv::cuda {

namespace {

// What the matrix product is made of for a storage type. A holds x: a pair of half-steps, 16 rows, by PIXELS
// lanes; B holds dy: the same lanes by an octet. SLOTS pixels and HALVES half-steps of a pair are addressed
// by each lane of the warp.
template <typename T>
struct Fragments {
  static constexpr int PIXELS = 16, SLOTS = 1, HALVES = 1;
  struct X {
    uint32_t r[4];
  };
  template <int OCTETS>
  struct Dy {
    uint32_t r[2 * OCTETS];
  };

  GCONV_DEVICE static int pixel(int) { return lane() % 8 + lane() / 16 * 8; }
  GCONV_DEVICE static int half(int) { return lane() / 8 % 2; }
  GCONV_DEVICE static void load_x(X& x, const unsigned char* row, const int (&slot)[1],
                                  const int (&offset)[1]) {
    load_matrices_transposed(x.r, row + slot[0] + offset[0]);
  }
  template <int OCTETS>
  GCONV_DEVICE static void load_dy(Dy<OCTETS>& dy, const unsigned char* from, int pitch) {
    static_assert(OCTETS == 1 || OCTETS == 2);
    const unsigned char* row = from + lane() % 16 * pitch;
    if constexpr (OCTETS == 2) row += lane() / 16 * 16;
    load_matrices_transposed(dy.r, row);
  }
  template <int OCTETS>
  GCONV_DEVICE static void multiply(float (&sum)[OCTETS][4], const X& x, const Dy<OCTETS>& dy) {
    GCONV_UNROLL
    for (int o = 0; o < OCTETS; ++o) {
      const uint32_t b[2] = {dy.r[2 * o], dy.r[2 * o + 1]};
      mma<T>(sum[o], x.r, b);
    }
  }
};

GCONV_DEVICE float shared_float(const unsigned char* p) { return *reinterpret_cast<const float*>(p); }

template <>
struct Fragments<tf32> {
  static constexpr int PIXELS = 8, SLOTS = 2, HALVES = 2;
  struct X {
    uint32_t r[4];
  };
  template <int OCTETS>
  struct Dy {
    uint32_t r[OCTETS][2];
  };

  GCONV_DEVICE static int pixel(int slot) { return lane() % 4 + slot * 4; }
  GCONV_DEVICE static int half(int h) { return h; }
  GCONV_DEVICE static void load_x(X& x, const unsigned char* row, const int (&slot)[2],
                                  const int (&offset)[2]) {
    row += lane() / 4 * 4;
    GCONV_UNROLL
    for (int i = 0; i < 4; ++i) x.r[i] = tf32_bits(shared_float(row + slot[i / 2] + offset[i % 2]));
  }
  template <int OCTETS>
  GCONV_DEVICE static void load_dy(Dy<OCTETS>& dy, const unsigned char* from, int pitch) {
    from += lane() % 4 * pitch + lane() / 4 * 4;
    GCONV_UNROLL
    for (int o = 0; o < OCTETS; ++o) {
      dy.r[o][0] = tf32_bits(shared_float(from + o * 32));
      dy.r[o][1] = tf32_bits(shared_float(from + o * 32 + 4 * pitch));
    }
  }
  template <int OCTETS>
  GCONV_DEVICE static void multiply(float (&sum)[OCTETS][4], const X& x, const Dy<OCTETS>& dy) {
    GCONV_UNROLL
    for (int o = 0; o < OCTETS; ++o) mma<tf32>(sum[o], x.r, dy.r[o]);
  }
};

// The same ownership of sums without a matrix unit.
template <>
struct Fragments<float> {
  static constexpr int PIXELS = 2, SLOTS = 2, HALVES = 2;
  struct X {
    float v[2][2];  // pixel, half-step
  };
  template <int OCTETS>
  struct Dy {
    float v[2][OCTETS][2];  // pixel, octet, channel
  };

  GCONV_DEVICE static int pixel(int slot) { return slot; }
  GCONV_DEVICE static int half(int h) { return h; }
  GCONV_DEVICE static void load_x(X& x, const unsigned char* row, const int (&slot)[2],
                                  const int (&offset)[2]) {
    row += lane() / 4 * 4;
    GCONV_UNROLL
    for (int i = 0; i < 4; ++i) x.v[i / 2][i % 2] = shared_float(row + slot[i / 2] + offset[i % 2]);
  }
  template <int OCTETS>
  GCONV_DEVICE static void load_dy(Dy<OCTETS>& dy, const unsigned char* from, int pitch) {
    from += lane() % 4 * 8;
    GCONV_UNROLL
    for (int i = 0; i < 4 * OCTETS; ++i)
      dy.v[i / 2 / OCTETS][i / 2 % OCTETS][i % 2] =
          shared_float(from + i / 2 / OCTETS * pitch + i / 2 % OCTETS * 32 + i % 2 * 4);
  }
  template <int OCTETS>
  GCONV_DEVICE static void multiply(float (&sum)[OCTETS][4], const X& x, const Dy<OCTETS>& dy) {
    GCONV_UNROLL
    for (int pixel = 0; pixel < 2; ++pixel) GCONV_UNROLL
    for (int o = 0; o < OCTETS; ++o) GCONV_UNROLL
    for (int d = 0; d < 4; ++d) sum[o][d] += x.v[pixel][d / 2] * dy.v[pixel][o][d % 2];
  }
};

// ---- loading

// Where a thread's walk over a row's units begins. Kept in shared memory, for the sums need the registers.
GCONV_DEVICE uint32_t walk_start(const Deal& deal) {
  const uint32_t t = threadIdx.x, units = uint32_t(deal.units), slots = uint32_t(deal.slots);
  return t % units | t / units % slots << DEAL_UNIT_BITS | t / units / slots << DEAL_ROW_AT;
}
// f(row, slot, unit) of the thread's share of `rows`.
template <typename F>
GCONV_DEVICE void walk(uint32_t start, int rows, const Deal& deal, const F& f) {
  int u = int(start % (1u << DEAL_UNIT_BITS)), r = int(start >> DEAL_ROW_AT);
  int s = int(start >> DEAL_UNIT_BITS) % (1 << (DEAL_ROW_AT - DEAL_UNIT_BITS));
  while (r < rows) {
    f(r, s, u);
    u += deal.unit, s += deal.slot, r += deal.row;
    if (u >= deal.units) u -= deal.units, ++s;
    if (s >= deal.slots) s -= deal.slots, ++r;
  }
}

// What f makes of a unit, four channels at a time lest their vectors take too many registers: f(first of the
// four, their values as floats).
template <typename T, typename F>
GCONV_DEVICE Chunk by_fours(const F& f) {
  float v[UNIT<T>];
  GCONV_UNROLL
  for (int i = 0; i < UNIT<T>; i += 4) {
    const Chunk four = f(i);
    GCONV_UNROLL
    for (int j = 0; j < 4; ++j) v[i + j] = float_of(four.word[j]);
  }
  return unit_of<T>(v);
}
template <typename T>
GCONV_DEVICE Chunk floats_of(const Chunk& unit, int first) {
  Chunk four;
  GCONV_UNROLL
  for (int j = 0; j < 4; ++j) four.word[j] = bits_of(unit_value<T>(unit, first + j));
  return four;
}
// ROWS rows of a table in shared memory, `channels` floats each, at four channels.
template <int ROWS>
GCONV_DEVICE void shared_vectors(float (&v)[ROWS][4], const unsigned char* table, int channels, int channel) {
  GCONV_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    const Chunk c = load_chunk(table + (r * channels + channel) * 4);
    GCONV_UNROLL
    for (int j = 0; j < 4; ++j) v[r][j] = float_of(c.word[j]);
  }
}

// Some output rows of a strip.
struct Step {
  int64_t strip;
  int row, rows;   // first output row, how many
  int begin, end;  // entries of the list of x's rows that no earlier step has loaded
  int base;        // ring slot of entry 0, if it were there
  int stage;       // of dy

  GCONV_DEVICE Step next(const WgradParams& p) const {
    const int last = p.rows.kept(end, p.x.h);
    Step n{strip, row + rows, 0, last, 0, base, stage ^ 1};
    if (n.row == p.dy.h) {
      n.strip = strip + 1, n.row = 0, n.begin = p.rows.kept(0, p.x.h);
      n.base = (base + last + p.ring - n.begin % p.ring) % p.ring;
    }
    n.set_rows(p);
    return n;
  }
  GCONV_DEVICE void set_rows(const WgradParams& p) {
    rows = row + p.step_rows < p.dy.h ? p.step_rows : p.dy.h - row;
    end = p.rows.kept(p.rows.end(row + rows), p.x.h);
  }
  GCONV_DEVICE int slot(const WgradParams& p, int entry) const { return (base + entry) % p.ring; }
};

template <typename T>
struct Loader {
  const WgradParams& p;
  unsigned char* shared;
  int x_channel, dy_channel;  // the block's first

  GCONV_DEVICE Loader(const WgradParams& params, unsigned char* memory, const BlockTiles::Channels& channels)
      : p(params),
        shared(memory),
        x_channel(channels.x.first * OCTET),
        dy_channel(channels.dy.first * OCTET) {}

  GCONV_DEVICE Place* places() const { return reinterpret_cast<Place*>(shared + p.places_at); }
  GCONV_DEVICE uint32_t* walks() const {
    return reinterpret_cast<uint32_t*>(shared + p.walks_at) + 2 * threadIdx.x;
  }
  GCONV_DEVICE unsigned char* finish_table() const {
    return shared + p.tables_at + (p.x.prologue == Prologue::act ? 2 * 4 * OCTET * p.x_octets : 0);
  }

  GCONV_DEVICE void copy_table(unsigned char* to, const float* table, int rows, int octets, int first,
                               int c) const {
    const int channels = octets * OCTET;
    for (int i = int(threadIdx.x); i < rows * channels; i += p.threads) {
      const int channel = first + i % channels;
      reinterpret_cast<float*>(to)[i] = channel < c ? table[int64_t(i / channels) * c + channel] : 0.0f;
    }
  }

  // What is the same for all steps.
  GCONV_DEVICE void fill_tables() const {
    walks()[0] = walk_start(p.x_deal), walks()[1] = walk_start(p.dy_deal);
    int* lanes_at = reinterpret_cast<int*>(shared + p.lanes_at);
    for (int i = int(threadIdx.x); i < p.dy_deal.slots; i += p.threads) {
      const int known = i < p.lanes ? i : p.lanes - 1;  // an idle lane's dy is 0
      lanes_at[i] = known / p.columns.count * p.x_image_pitch + known % p.columns.count * p.x_pitch;
    }
    if (p.x.prologue == Prologue::act)
      copy_table(shared + p.tables_at, p.x.table, 2, p.x_octets, x_channel, p.x.c);
    if (p.dy.prologue == Prologue::finish)
      copy_table(finish_table(), p.dy.table, 6, p.dy_octets, dy_channel, p.dy.c);
  }

  // What is the same for all steps of a strip.
  GCONV_DEVICE void fill_places(int strip) const {
    const int64_t image = int64_t(strip / p.column_tiles) * p.images;
    const int column = strip % p.column_tiles * p.columns.count;
    for (int i = int(threadIdx.x); i < p.x_deal.slots + p.dy_deal.slots; i += p.threads) {
      Place place{-1, 0};
      if (i < p.x_deal.slots) {
        const int m = i / p.columns.size, at = i % p.columns.size, w = tile_input(p.columns, column, at);
        place.other = m * p.x_image_pitch + at * p.x_pitch;
        if (image + m < p.x.images && w >= 0 && w < p.x.w)
          place.from = (image + m) * p.x.x.stride_n + w * p.x.x.stride_w;
      } else {
        const int slot = i - p.x_deal.slots, m = slot / p.columns.count, w = column + slot % p.columns.count;
        if (slot < p.lanes && image + m < p.dy.images && w < p.dy.w) {
          place.from = (image + m) * p.dy.x.stride_n + w * p.dy.x.stride_w;
          place.other = (image + m) * p.dy.y.stride_n + w * p.dy.y.stride_w;
        }
      }
      places()[i] = place;
    }
  }

  // A unit as it is; zeros where there is none.
  GCONV_DEVICE void copy(unsigned char* to, const Nhwc& view, bool aligned, int64_t at, int channels) const {
    const T* const data = static_cast<const T*>(view.data);
    if (aligned)
      copy_async(to, channels > 0 ? data + at : data, channels > 0);
    else
      store_chunk(to, load_unit<T>(channels > 0 ? data + at : data, channels, false));
  }

  // f(where in the tile, image row, place, channel in the block) of the units of x that a step adds.
  template <typename F>
  GCONV_DEVICE void over_x(const Step& step, const F& f) const {
    const int first = step.slot(p, step.begin);
    walk(walks()[0], step.end - step.begin, p.x_deal, [&](int row, int slot, int unit) {
      const int h = p.rows.image_row(step.begin + row);
      if (h < 0 || h >= p.x.h) return;
      const Place place = places()[slot];
      const int at = first + row;
      unsigned char* to =
          shared + (at < p.ring ? at : at - p.ring) * p.x_row_pitch + int(place.other) + unit * 16;
      f(to, h, place, unit * UNIT<T>);
    });
  }
  // The same of dy.
  template <typename F>
  GCONV_DEVICE void over_dy(const Step& step, const F& f) const {
    const int stage = p.dy_at + step.stage * p.step_rows * p.dy_row_pitch;
    walk(walks()[1], step.rows, p.dy_deal, [&](int row, int slot, int unit) {
      unsigned char* to = shared + stage + row * p.dy_row_pitch + slot * p.dy_pitch + unit * 16;
      f(to, step.row + row, places()[p.x_deal.slots + slot], unit * UNIT<T>);
    });
  }

  GCONV_DEVICE void start(const Step& step) const {
    over_x(step, [&](unsigned char* to, int h, const Place& place, int channel) {
      const int64_t at = place.from + h * p.x.x.stride_h + x_channel + channel;
      copy(to, p.x.x, p.x.aligned, at, place.from < 0 ? 0 : p.x.c - x_channel - channel);
    });
    over_dy(step, [&](unsigned char* to, int h, const Place& place, int channel) {
      const int channels = place.from < 0 ? 0 : p.dy.c - dy_channel - channel;
      copy(to, p.dy.x, p.dy.aligned, place.from + h * p.dy.x.stride_h + dy_channel + channel, channels);
      if (p.dy.prologue == Prologue::finish)
        copy(to + (p.y_at - p.dy_at), p.dy.y, p.dy.aligned,
             place.other + h * p.dy.y.stride_h + dy_channel + channel, channels);
    });
    copy_commit();
  }

  // Waits for what start() began and does what is to be done to it, in place: each thread to its own copies.
  GCONV_DEVICE void arrive(const Step& step) const {
    copy_wait<0>();
    if (p.x.prologue == Prologue::act)
      over_x(step, [&](unsigned char* at, int, const Place& place, int channel) {
        if (place.from < 0) return;  // outside the image stays 0
        const Chunk x = load_chunk(at);
        store_chunk(at, by_fours<T>([&](int i) {
                      float v[2][4];
                      shared_vectors(v, shared + p.tables_at, p.x_octets * OCTET, channel + i);
                      return activated<float>(floats_of<T>(x, i), v);
                    }));
      });
    if (p.dy.prologue == Prologue::finish)
      over_dy(step, [&](unsigned char* at, int, const Place& place, int channel) {
        if (place.from < 0) return;
        const Chunk dy = load_chunk(at), y = load_chunk(at + (p.y_at - p.dy_at));
        store_chunk(at, by_fours<T>([&](int i) {
                      float v[6][4];
                      shared_vectors(v, finish_table(), p.dy_octets * OCTET, channel + i);
                      return finished<float>(floats_of<T>(dy, i), floats_of<T>(y, i), v);
                    }));
      });
  }
};

// ---- products

// One warp tile's sums: rows of taps by pairs of half-steps by octets.
template <typename T, int OCTETS, int PAIRS>
struct Sums {
  using F = Fragments<T>;
  float value[3][PAIRS][OCTETS][4] = {};
  int offset[PAIRS][F::HALVES];  // bytes from a lane's pixel in a row of x

  // Of a pair's half-steps; one that there is not reads what another does.
  GCONV_DEVICE void aim(const WgradParams& p, const BlockTiles::Channels& channels, int block, int chunk) {
    const WeightTiles::Range octets = p.tiles.input_octets(block);
    GCONV_UNROLL
    for (int j = 0; j < PAIRS; ++j) GCONV_UNROLL
    for (int h = 0; h < F::HALVES; ++h) {
      const int half_step = (chunk * PAIRS + j) * 2 + F::half(h), kw = half_step % 3;
      const int octet = half_step / 3 < octets.count ? octets.first + half_step / 3 - channels.x.first : 0;
      offset[j][h] = p.columns.tap[kw] * p.x_pitch + octet * (OCTET * int(sizeof(T)));
    }
  }

  GCONV_DEVICE void load_x(typename F::X (&x)[PAIRS], const unsigned char* row,
                           const int (&slot)[F::SLOTS]) const {
    GCONV_UNROLL
    for (int j = 0; j < PAIRS; ++j) F::load_x(x[j], row, slot, offset[j]);
  }
  GCONV_DEVICE void add(int kh, const typename F::X (&x)[PAIRS], const typename F::template Dy<OCTETS>& dy) {
    GCONV_UNROLL
    for (int j = 0; j < PAIRS; ++j) F::multiply(value[kh][j], x[j], dy);
  }

  // Adds one step for one group of lanes. Each row of x meets three rows of dy, kept in registers.
  GCONV_DEVICE void add_rows(const WgradParams& p, const Step& step, const unsigned char* shared,
                             const int (&slot)[F::SLOTS], const unsigned char* dy_row) {
    typename F::template Dy<OCTETS> dy[3] = {};
    int ring = step.slot(p, step.row);
    for (int i = 0; i < step.rows + 2; ++i) {
      dy[2] = dy[1], dy[1] = dy[0];
      if (i < step.rows) F::load_dy(dy[0], dy_row + i * p.dy_row_pitch, p.dy_pitch);
      const int h = p.rows.image_row(step.row + i);
      if (h >= 0 && h < p.x.h) {
        typename F::X x[PAIRS];
        load_x(x, shared + ring * p.x_row_pitch, slot);
        if (i < step.rows) add(0, x, dy[0]);
        if (i >= 1 && i <= step.rows) add(1, x, dy[1]);
        if (i >= 2) add(2, x, dy[2]);
      }
      if (++ring == p.ring) ring = 0;
    }
  }
  // The same with rows of x of their own for each row of dy.
  GCONV_DEVICE void add_taps(const WgradParams& p, const Step& step, const unsigned char* shared,
                             const int (&slot)[F::SLOTS], const unsigned char* dy_row) {
    const int first = step.slot(p, step.row * p.rows.step);
    for (int i = 0; i < step.rows; ++i) {
      typename F::template Dy<OCTETS> dy;
      F::load_dy(dy, dy_row + i * p.dy_row_pitch, p.dy_pitch);
      GCONV_UNROLL
      for (int kh = 0; kh < 3; ++kh) {
        const int entry = i * p.rows.step + kh * p.rows.tap;
        const int h = p.rows.image_row(step.row * p.rows.step + entry);
        if (h < 0 || h >= p.x.h) continue;
        const int ring = first + entry < p.ring ? first + entry : first + entry - p.ring;
        typename F::X x[PAIRS];
        load_x(x, shared + ring * p.x_row_pitch, slot);
        add(kh, x, dy);
      }
    }
  }
};

// computes: partial[slice][fragment] = sums over the slice's pixels of act(x) (x) finish(dy), as the lanes of
// a
//           warp hold them, products of unlike groups among them
// grid:     (splits of the steps) x (blocks of warp tiles); neighbours read the same pixels
// tile:     `step_rows` output rows of up to 64 lanes, up to 64 channels of x and of dy as a rule, and the
// next
//           step's on their way; a warp owns OCTETS x PAIRS x 3 products of 16 x 8 weights
// bytes:    x (once and two columns per tile) and dy (and y) once from L2; sums of each slice once
// accum.:   float32
template <typename T, int OCTETS, int PAIRS, bool ROWS_SHARED>
GCONV_KERNEL(WGRAD_WARPS* WARP, 2)
void grouped_conv_bwd_weight_kernel(const WgradParams p) {
  using F = Fragments<T>;
  unsigned char* const shared = shared_memory();
  const int split = int(blockIdx.x) / p.channel_blocks;
  const auto channels = p.block.channels(p.tiles, int(blockIdx.x) % p.channel_blocks);
  const int tile = warp() % p.warp_tiles, part = warp() / p.warp_tiles;
  const int block = channels.first_block + tile / p.block.chunks;
  const int chunk = channels.first_chunk + tile % p.block.chunks;
  // Of the warp's first fragment; less than 0 for a warp without a tile.
  const int slice = split * p.parts + part, tiles = p.tiles.blocks * p.tiles.chunks;
  const int first = block < p.tiles.blocks && chunk < p.tiles.chunks
                        ? (slice * tiles + block * p.tiles.chunks + chunk) * p.tiles.fragments_of_tile()
                        : -1;
  const int dy_at = (p.tiles.first_octet(block) - channels.dy.first) * (OCTET * int(sizeof(T)));
  const Loader<T> loader(p, shared, channels);

  Sums<T, OCTETS, PAIRS> sums;
  sums.aim(p, channels, first < 0 ? channels.first_block : block, chunk);
  const int* lanes_at = reinterpret_cast<const int*>(shared + p.lanes_at);

  // One step is multiplied while the next one is under way.
  const int more = split < p.longer_splits, steps = p.split_steps + more;
  const int begin = split * p.split_steps + (more ? split : p.longer_splits);
  Step step{}, now{};
  step.strip = begin / p.steps, step.row = begin % p.steps * p.step_rows;
  step.begin = p.rows.kept(step.row * p.rows.step, p.x.h);
  step.set_rows(p);
  now.strip = -1;
  loader.fill_tables();
  for (int i = 0; i <= steps; ++i) {
    if (i > 0) loader.arrive(now);
    block_sync();
    if (i < steps) {
      if (step.strip != now.strip) {
        loader.fill_places(step.strip);
        block_sync();
      }
      loader.start(step);
    }
    const Step arrived = now;
    now = step, step = step.next(p);
    if (i == 0 || first < 0) continue;
    const unsigned char* const stage = shared + p.dy_at + arrived.stage * p.step_rows * p.dy_row_pitch;
    for (int g = part; g < p.lane_groups; g += p.parts) {
      int slot[F::SLOTS];
      GCONV_UNROLL
      for (int j = 0; j < F::SLOTS; ++j) slot[j] = lanes_at[g * F::PIXELS + F::pixel(j)];
      const unsigned char* const dy = stage + g * F::PIXELS * p.dy_pitch + dy_at;
      if constexpr (ROWS_SHARED)
        sums.add_rows(p, arrived, shared, slot, dy);
      else
        sums.add_taps(p, arrived, shared, slot, dy);
    }
  }

  if (first < 0) return;
  float* to = p.partial + int64_t(first) * FRAGMENT + lane() * 4;
  GCONV_UNROLL
  for (int i = 0; i < 3 * PAIRS * OCTETS; ++i, to += FRAGMENT) {
    const float (&v)[4] = sums.value[i / OCTETS / PAIRS][i / OCTETS % PAIRS][i % OCTETS];
    store_chunk(to, Chunk{{bits_of(v[0]), bits_of(v[1]), bits_of(v[2]), bits_of(v[3])}});
  }
}

// computes: dweight = the slices' sums, of like groups
// grid:     a block for a fragment
// tile:     a fragment of eight slices at a time, one for a warp
// bytes:    the sums once, dweight once
// accum.:   float32: each warp's slices in their order, then the warps in theirs
template <typename T>
GCONV_KERNEL(WGRAD_WARPS* WARP, 4)
void grouped_conv_bwd_weight_sum_kernel(const WgradParams p) {
  unsigned char* const shared = shared_memory();
  const int fragments = p.tiles.blocks * p.tiles.chunks * p.tiles.fragments_of_tile(),
            index = int(blockIdx.x);
  const int64_t slices = int64_t(p.splits) * p.parts;
  float sum[4] = {};
  const auto add = [&](const void* from) {
    const Chunk c = load_chunk(from);
    GCONV_UNROLL
    for (int i = 0; i < 4; ++i) sum[i] += float_of(c.word[i]);
  };
  for (int64_t s = warp(); s < slices; s += WGRAD_WARPS)
    add(p.partial + (s * fragments + index) * FRAGMENT + lane() * 4);
  store_chunk(shared + threadIdx.x * 16,
              Chunk{{bits_of(sum[0]), bits_of(sum[1]), bits_of(sum[2]), bits_of(sum[3])}});
  block_sync();
  if (warp() != 0) return;
  for (int w = 1; w < WGRAD_WARPS; ++w) add(shared + (w * WARP + lane()) * 16);

  const int tile = index / p.tiles.fragments_of_tile(), within = index % p.tiles.fragments_of_tile();
  const int block = tile / p.tiles.chunks, chunk = tile % p.tiles.chunks;
  const int octet = p.tiles.first_octet(block) + within % p.tiles.octets;
  const int pair = chunk * p.tiles.pairs + within / p.tiles.octets % p.tiles.pairs;
  const int kh = within / p.tiles.octets / p.tiles.pairs;
  const WeightTiles::Range input = p.tiles.input_octets(block);
  GCONV_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int half_step = pair * 2 + i / 2, c = (input.first + half_step / 3) * OCTET + lane() / 4;
    const int k = octet * OCTET + lane() % 4 * 2 + i % 2, group = k / p.tiles.group_k;
    if (half_step / 3 >= input.count || k >= p.tiles.k || c / p.tiles.group_c != group) continue;
    const int64_t at = int64_t(k) * p.tiles.group_c * 9 + c % p.tiles.group_c * p.layout.stride_c +
                       (kh * 3 + half_step % 3) * p.layout.stride_tap;
    static_cast<T*>(p.dweight)[at] = from_float<T>(sum[i]);
  }
}

constexpr const char* OP = "grouped_conv_bwd_weight";

template <typename T, int OCTETS, int PAIRS>
void launch_sums(const WgradParams& p, Stream stream) {
  const auto kernel = p.rows_shared ? grouped_conv_bwd_weight_kernel<T, OCTETS, PAIRS, true>
                                    : grouped_conv_bwd_weight_kernel<T, OCTETS, PAIRS, false>;
  launch(OP, kernel, int64_t(p.splits) * p.channel_blocks, p.threads, p.shared_bytes, stream, p);
}

// T is what is multiplied, Stored what dweight holds.
template <typename T, typename Stored>
void launch_all(const WgradParams& p, Stream stream) {
  switch (p.tiles.pairs) {
    case 2:
      launch_sums<T, 1, 2>(p, stream);
      break;
    case 3:
      launch_sums<T, 2, 3>(p, stream);
      break;
    default:
      launch_sums<T, 1, 5>(p, stream);
  }
  launch(OP, grouped_conv_bwd_weight_sum_kernel<Stored>, p.tiles.fragments(), WGRAD_WARPS * WARP,
         WGRAD_WARPS * WARP * 16, stream, p);
}

WgradParams plan(const GroupedConvBwdWeightParams& p) {
  const int pixels = p.dtype != DType::f32 ? Fragments<bf16>::PIXELS
                     : p.tf32              ? Fragments<tf32>::PIXELS
                                           : Fragments<float>::PIXELS;
  return wgrad_plan(p, current_device(OP), pixels);
}

bool nothing(const GroupedConvBwdWeightParams& p) { return p.shape.c == 0 || p.shape.k == 0; }

}  // namespace

}  // namespace gconv::cuda

namespace gconv {

int64_t grouped_conv_bwd_weight_workspace_cuda(const GroupedConvBwdWeightParams& p) {
  if (cuda::nothing(p)) return 0;
  const cuda::WgradParams q = cuda::plan(p);
  return int64_t(q.splits) * q.parts * q.tiles.fragments() * cuda::FRAGMENT;
}

void grouped_conv_bwd_weight_cuda(const GroupedConvBwdWeightParams& p, void* stream) {
  if (cuda::nothing(p)) return;
  const cuda::WgradParams q = cuda::plan(p);
  const auto on = static_cast<cuda::Stream>(stream);
  switch (p.dtype) {
    case DType::f32:
      p.tf32 ? cuda::launch_all<cuda::tf32, float>(q, on) : cuda::launch_all<float, float>(q, on);
      break;
    case DType::bf16:
      cuda::launch_all<cuda::bf16, cuda::bf16>(q, on);
      break;
    case DType::f16:
      cuda::launch_all<cuda::f16, cuda::f16>(q, on);
  }
}

}  // namespace gconv
