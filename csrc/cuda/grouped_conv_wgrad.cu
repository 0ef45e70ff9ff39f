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
    const unsigned char* row = from + lane() % 16 * pitch;
    if constexpr (OCTETS > 1) {
      uint32_t two[4];
      load_matrices_transposed(two, row + lane() / 16 * 16);
      GCONV_UNROLL
      for (int i = 0; i < 4; ++i) dy.r[i] = two[i];
    }
    if constexpr (OCTETS % 2 == 1) {
      uint32_t one[2];
      load_matrices_transposed(one, row + (OCTETS - 1) * 16);
      dy.r[2 * OCTETS - 2] = one[0], dy.r[2 * OCTETS - 1] = one[1];
    }
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
  static constexpr int PIXELS = 1, SLOTS = 1, HALVES = 2;
  struct X {
    float v[2];  // of a half-step each
  };
  template <int OCTETS>
  struct Dy {
    float v[OCTETS][2];  // two channels
  };

  GCONV_DEVICE static int pixel(int) { return 0; }
  GCONV_DEVICE static int half(int h) { return h; }
  GCONV_DEVICE static void load_x(X& x, const unsigned char* row, const int (&slot)[1],
                                  const int (&offset)[2]) {
    row += lane() / 4 * 4 + slot[0];
    GCONV_UNROLL
    for (int h = 0; h < 2; ++h) x.v[h] = shared_float(row + offset[h]);
  }
  template <int OCTETS>
  GCONV_DEVICE static void load_dy(Dy<OCTETS>& dy, const unsigned char* from, int) {
    from += lane() % 4 * 8;
    GCONV_UNROLL
    for (int i = 0; i < 2 * OCTETS; ++i) dy.v[i / 2][i % 2] = shared_float(from + i / 2 * 32 + i % 2 * 4);
  }
  template <int OCTETS>
  GCONV_DEVICE static void multiply(float (&sum)[OCTETS][4], const X& x, const Dy<OCTETS>& dy) {
    GCONV_UNROLL
    for (int o = 0; o < OCTETS; ++o) GCONV_UNROLL
    for (int d = 0; d < 4; ++d) sum[o][d] += x.v[d / 2] * dy.v[o][d % 2];
  }
};

// ---- loading

// Where a thread's walk over a row's units begins.
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

// What f makes of a unit, two channels at a time lest their vectors take too many registers: f(first of the
// two) gives floats, of which the first two count.
template <typename T, typename F>
GCONV_DEVICE Chunk by_twos(const F& f) {
  float v[UNIT<T>];
  GCONV_UNROLL
  for (int i = 0; i < UNIT<T>; i += 2) {
    const Chunk two = f(i);
    v[i] = float_of(two.word[0]), v[i + 1] = float_of(two.word[1]);
  }
  return unit_of<T>(v);
}
template <typename T>
GCONV_DEVICE Chunk two_floats(const Chunk& unit, int first) {
  return {{bits_of(unit_value<T>(unit, first)), bits_of(unit_value<T>(unit, first + 1)), 0, 0}};
}
// ROWS rows of a table in shared memory, `channels` floats each, at two channels.
template <int ROWS>
GCONV_DEVICE void shared_vectors(float (&v)[ROWS][4], const unsigned char* table, int channels, int channel) {
  GCONV_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    const float* row = reinterpret_cast<const float*>(table) + r * channels + channel;
    v[r][0] = row[0], v[r][1] = row[1], v[r][2] = v[r][3] = 0.0f;
  }
}

// Some output rows of a strip. Worked out anew wherever it is needed, for the sums need the registers.
struct Step {
  int strip;
  int row, rows;   // first output row, how many
  int begin, end;  // entries of the list of x's rows that no earlier step of the split has loaded
  int base;        // ring slot of entry 0, if it were there
  int stage;       // of dy

  // Step `index` of a split that begins at step `first` of all.
  GCONV_DEVICE Step(const WgradParams& p, int first, int index) {
    strip = (first + index) / p.steps, row = (first + index - strip * p.steps) * p.step_rows;
    rows = row + p.step_rows < p.dy.h ? p.step_rows : p.dy.h - row;
    begin = p.rows.kept(index == 0 || row == 0 ? row * p.rows.step : p.rows.end(row), p.x.h);
    end = p.rows.kept(p.rows.end(row + rows), p.x.h);
    base = (strip - first / p.steps) * p.strip_entries % p.ring;
    stage = index % 2;
  }
  GCONV_DEVICE int slot(const WgradParams& p, int entry) const { return (base + entry) % p.ring; }
};

template <typename T>
struct Loader {
  const WgradParams& p;
  unsigned char* shared;

  GCONV_DEVICE Place* places() const { return reinterpret_cast<Place*>(shared + p.places_at); }
  GCONV_DEVICE Own& own() const { return reinterpret_cast<Own*>(shared + p.own_at)[threadIdx.x]; }
  GCONV_DEVICE int x_channel() const { return own().x_channel; }
  GCONV_DEVICE int dy_channel() const { return own().dy_channel; }
  GCONV_DEVICE Step step(int index) const { return Step(p, own().begin, index); }
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
    int* lanes_at = reinterpret_cast<int*>(shared + p.lanes_at);
    for (int i = int(threadIdx.x); i < p.dy_deal.slots; i += p.threads) {
      const int known = i < p.lanes ? i : p.lanes - 1;  // an idle lane's dy is 0
      lanes_at[i] = known / p.columns.count * p.x_image_pitch + known % p.columns.count * p.x_pitch;
    }
    if (p.x.prologue == Prologue::act)
      copy_table(shared + p.tables_at, p.x.table, 2, p.x_octets, x_channel(), p.x.c);
    if (p.dy.prologue == Prologue::finish)
      copy_table(finish_table(), p.dy.table, 6, p.dy_octets, dy_channel(), p.dy.c);
  }

  // What is the same for all steps of a strip.
  GCONV_DEVICE void fill_places(int strip) const {
    const int64_t image = int64_t(strip / p.column_tiles) * p.images;
    const int column = strip % p.column_tiles * p.columns.count;
    for (int i = int(threadIdx.x); i < p.x_deal.slots + p.dy_deal.slots; i += own().threads) {
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
    walk(own().x_walk, step.end - step.begin, p.x_deal, [&](int row, int slot, int unit) {
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
    walk(own().dy_walk, step.rows, p.dy_deal, [&](int row, int slot, int unit) {
      unsigned char* to = shared + stage + row * p.dy_row_pitch + slot * p.dy_pitch + unit * 16;
      f(to, step.row + row, places()[p.x_deal.slots + slot], unit * UNIT<T>);
    });
  }

  GCONV_DEVICE void start(const Step& step) const {
    over_x(step, [&](unsigned char* to, int h, const Place& place, int channel) {
      const int64_t at = place.from + h * p.x.x.stride_h + x_channel() + channel;
      copy(to, p.x.x, p.x.aligned, at, place.from < 0 ? 0 : p.x.c - x_channel() - channel);
    });
    over_dy(step, [&](unsigned char* to, int h, const Place& place, int channel) {
      const int channels = place.from < 0 ? 0 : p.dy.c - dy_channel() - channel;
      copy(to, p.dy.x, p.dy.aligned, place.from + h * p.dy.x.stride_h + dy_channel() + channel, channels);
      if (p.dy.prologue == Prologue::finish)
        copy(to + (p.y_at - p.dy_at), p.dy.y, p.dy.aligned,
             place.other + h * p.dy.y.stride_h + dy_channel() + channel, channels);
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
        store_chunk(at, by_twos<T>([&](int i) {
                      float v[2][4];
                      shared_vectors(v, shared + p.tables_at, p.x_octets * OCTET, channel + i);
                      return activated<float>(two_floats<T>(x, i), v);
                    }));
      });
    if (p.dy.prologue == Prologue::finish)
      over_dy(step, [&](unsigned char* at, int, const Place& place, int channel) {
        if (place.from < 0) return;
        const Chunk dy = load_chunk(at), y = load_chunk(at + (p.y_at - p.dy_at));
        store_chunk(at, by_twos<T>([&](int i) {
                      float v[6][4];
                      shared_vectors(v, finish_table(), p.dy_octets * OCTET, channel + i);
                      return finished<float>(two_floats<T>(dy, i), two_floats<T>(y, i), v);
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

  // f(pair, fragment of a row of x), the next pair's fragment on its way.
  template <typename Add>
  GCONV_DEVICE void over_pairs(const unsigned char* row, const int (&slot)[F::SLOTS], const Add& f) const {
    typename F::X x[2];
    F::load_x(x[0], row, slot, offset[0]);
    GCONV_UNROLL
    for (int j = 0; j < PAIRS; ++j) {
      if (j + 1 < PAIRS) F::load_x(x[(j + 1) % 2], row, slot, offset[j + 1]);
      f(j, x[j % 2]);
    }
  }

  // Adds one step for one group of lanes, two rows of dy at a time: the four rows of x that they meet are
  // read once.
  GCONV_DEVICE void add_rows(const WgradParams& p, const Step& step, const unsigned char* shared,
                             const int (&slot)[F::SLOTS], const unsigned char* dy_row) {
    int ring = step.slot(p, step.row);
    for (int r = 0; r < step.rows; r += 2, dy_row += 2 * p.dy_row_pitch) {
      const bool two = r + 1 < step.rows;
      typename F::template Dy<OCTETS> dy[2];
      F::load_dy(dy[0], dy_row, p.dy_pitch);
      if (two) F::load_dy(dy[1], dy_row + p.dy_row_pitch, p.dy_pitch);
      int at = ring;
      GCONV_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int h = step.row + r + i - p.rows.pad;
        if (h >= 0 && h < p.x.h && (i < 3 || two)) {
          over_pairs(shared + at * p.x_row_pitch, slot, [&](int j, const typename F::X& x) {
            if (i < 3) F::multiply(value[i][j], x, dy[0]);
            if (i > 0 && two) F::multiply(value[i - 1][j], x, dy[1]);
          });
        }
        at = at + 1 == p.ring ? 0 : at + 1;
        if (i == 1) ring = at;
      }
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
        over_pairs(shared + ring * p.x_row_pitch, slot,
                   [&](int j, const typename F::X& x) { F::multiply(value[kh][j], x, dy); });
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
  const Loader<T> loader{p, shared};
  Sums<T, OCTETS, PAIRS> sums;
  {
    const int tile = warp() % p.warp_tiles, part = warp() / p.warp_tiles;
    const int block = channels.first_block + tile / p.block.chunks;
    const int chunk = channels.first_chunk + tile % p.block.chunks;
    const bool owns = block < p.tiles.blocks && chunk < p.tiles.chunks;
    const int more = split < p.longer_splits, steps = p.split_steps + more;
    const int begin = split * p.split_steps + (more ? split : p.longer_splits);
    const int tiles = (split * p.parts + part) * p.tiles.blocks * p.tiles.chunks;
    loader.own() = {walk_start(p.x_deal),
                    walk_start(p.dy_deal),
                    owns ? (tiles + block * p.tiles.chunks + chunk) * p.tiles.fragments_of_tile() : -1,
                    (p.tiles.first_octet(block) - channels.dy.first) * (OCTET * int(sizeof(T))),
                    owns ? part : p.lane_groups,
                    begin,
                    steps,
                    channels.x.first * OCTET,
                    channels.dy.first * OCTET,
                    p.threads};
    sums.aim(p, channels, owns ? block : channels.first_block, chunk);
  }
  const int* lanes_at = reinterpret_cast<const int*>(shared + p.lanes_at);

  // One step is multiplied while the next one is under way.
  loader.fill_tables();
  for (int i = 0; i <= loader.own().steps; ++i) {
    if (i > 0) loader.arrive(loader.step(i - 1));
    block_sync();
    if (i < loader.own().steps) {
      const Step next = loader.step(i);
      if (i == 0 || next.row == 0) {
        loader.fill_places(next.strip);
        block_sync();
      }
      loader.start(next);
    }
    if (i == 0) continue;
    const Step arrived = loader.step(i - 1);
    const unsigned char* const stage = shared + p.dy_at + arrived.stage * p.step_rows * p.dy_row_pitch;
    for (int g = loader.own().first_group; g < p.lane_groups; g += p.parts) {
      int slot[F::SLOTS];
      GCONV_UNROLL
      for (int j = 0; j < F::SLOTS; ++j) slot[j] = lanes_at[g * F::PIXELS + F::pixel(j)];
      const unsigned char* const dy = stage + g * F::PIXELS * p.dy_pitch + loader.own().dy_at;
      if constexpr (ROWS_SHARED)
        sums.add_rows(p, arrived, shared, slot, dy);
      else
        sums.add_taps(p, arrived, shared, slot, dy);
    }
  }

  if (loader.own().fragment < 0) return;
  float* to = p.partial + int64_t(loader.own().fragment) * FRAGMENT + lane() * 4;
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
  switch (p.tiles.octets) {
    case 1:
      launch_sums<T, 1, 2>(p, stream);
      break;
    case 2:
      launch_sums<T, 2, 3>(p, stream);
      break;
    default:
      launch_sums<T, 3, 2>(p, stream);
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
