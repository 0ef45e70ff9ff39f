// The matrix product of a warp tile: what a lane holds of it, how pixels meet weights, and how results become
// units for memory and back. By storage type: bf16, f16 and tf32 on the matrix unit, float on the CUDA cores.
//
// A warp tile is ROWS output rows x PIXELS lanes x OCTETS octets (of OUT channels). A lane's accumulators are
// [ROWS][OCTETS][HALVES * VALUES]: HALVES pixels, VALUES channels of each octet.
#pragma once
#include <type_traits>

#include "grouped_conv_tile.h"

namespace gconv::cuda {

constexpr int THREADS = 128, WARPS = THREADS / WARP;  // of a block
constexpr int ROWS = 4;
constexpr int OCTETS = 4;
// Blocks to a multiprocessor, that is what a thread has of registers: nothing spills. Products on the CUDA
// cores hold all rows of a tile at once.
template <typename T>
constexpr int BLOCKS = std::is_same_v<T, float> ? 2 : 3;

using Accumulators = float[ROWS][OCTETS][4];

struct alignas(8) WordPair {
  uint32_t word[2];
};

// Of the matrix unit: an octet is one fragment wide.
template <typename T>
struct MatrixProduct {
  static constexpr int PIXELS = 16, OUT = 8, HALVES = 2, VALUES = 2;
  static constexpr int HALF_STEPS = 2;                  // to a step
  static constexpr int LOW_LANE = 4;                    // from this bit on a lane's number tells pixels apart
  static constexpr int WEIGHTS = 256 / int(sizeof(T));  // of a fragment

  // Which pixel of the tile a lane names to load_matrices, and which half-step of two.
  GCONV_DEVICE static int load_pixel() { return lane() % 16; }
  GCONV_DEVICE static int load_half() { return lane() / 16; }
  // Which pixel it has results of, and the first of their channels in an octet.
  GCONV_DEVICE static int pixel(int half) { return lane() / 4 + 8 * half; }
  GCONV_DEVICE static int channel() { return lane() % 4 * 2; }

  // A weight of a fragment: the half-step of two, the channel in the input unit, that in the octet.
  struct Weight {
    int half, in, out;
  };
  GCONV_DEVICE static Weight weight(int at) {
    constexpr int PER_WORD = 4 / int(sizeof(T));
    const int word = at / PER_WORD, l = word / 2;
    return {word % 2, l % 4 * PER_WORD + at % PER_WORD, l / 4};
  }

  // Two half-steps, or where HALF the last one alone: `from` is this lane's pixel and half-step in the tile,
  // `weights` the fragments [share][KH].
  template <int SHARE, int KH, bool HALF>
  GCONV_DEVICE static void step(Accumulators& acc, int first, const unsigned char* from, int row_pitch,
                                const T* weights) {
    const WordPair* pairs = reinterpret_cast<const WordPair*>(weights) + lane();
    WordPair w[SHARE][KH];
    GCONV_UNROLL
    for (int o = 0; o < SHARE; ++o) GCONV_UNROLL
    for (int kh = 0; kh < KH; ++kh) w[o][kh] = pairs[(o * KH + kh) * WARP];
    GCONV_UNROLL
    for (int i = 0; i < ROWS + KH - 1; ++i) {
      uint32_t a[HALF ? 2 : 4];
      load_matrices(a, from + i * row_pitch);
      if constexpr (sizeof(T) == 4) {
        GCONV_UNROLL
        for (uint32_t& word : a) word = tf32_bits(float_of(word));
      }
      GCONV_UNROLL
      for (int kh = 0; kh < KH; ++kh) {
        const int r = i - kh;
        if (r < 0 || r >= ROWS) continue;
        GCONV_UNROLL
        for (int o = 0; o < SHARE; ++o) {
          if constexpr (HALF)
            mma_half<T>(acc[r][first + o], a, w[o][kh].word[0]);
          else
            mma<T>(acc[r][first + o], a, w[o][kh].word);
        }
      }
    }
  }
};

// Between a quad's fragments of four octets and a unit per lane, that of octet t: word j of lane t was word t
// of lane j. Its own inverse.
GCONV_DEVICE void transpose_quad(uint32_t (&w)[4]) {
  GCONV_UNROLL
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = lane() & bit;
    GCONV_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t other = shuffle_xor(upper ? w[i] : w[i | bit], bit);
      if (upper)
        w[i] = other;
      else
        w[i | bit] = other;
    }
  }
}

template <typename T>
struct Product : MatrixProduct<T> {
  static constexpr int UNITS = 1;  // of a pixel that a lane stores

  // The octet of the lane's unit, and where in the octet it begins.
  GCONV_DEVICE static int unit_octet(int) { return lane() % 4; }
  GCONV_DEVICE static int unit_channel() { return 0; }

  GCONV_DEVICE static void to_units(const float (&v)[OCTETS][2], Chunk (&c)[1]) {
    GCONV_UNROLL
    for (int o = 0; o < OCTETS; ++o) c[0].word[o] = pair_bits<T>(v[o][0], v[o][1]);
    transpose_quad(c[0].word);
  }
  GCONV_DEVICE static void from_units(Chunk (&c)[1], float (&v)[OCTETS][2]) {
    transpose_quad(c[0].word);
    GCONV_UNROLL
    for (int i = 0; i < 2 * OCTETS; ++i) v[i / 2][i % 2] = unit_value<T>(c[0], i);
  }
};

template <>
struct Product<tf32> : MatrixProduct<tf32> {
  static constexpr int UNITS = 2;

  // Of two octets an even lane has the first, an odd one the second: each gives away its part of the other.
  GCONV_DEVICE static int unit_octet(int i) { return 2 * i + lane() % 2; }
  GCONV_DEVICE static int unit_channel() { return lane() % 4 / 2 * 4; }

  GCONV_DEVICE static void to_units(const float (&v)[OCTETS][2], Chunk (&c)[2]) {
    const bool odd = lane() % 2;
    GCONV_UNROLL
    for (int i = 0; i < 2; ++i) {
      GCONV_UNROLL
      for (int j = 0; j < 2; ++j) {
        const uint32_t first = bits_of(v[2 * i][j]), second = bits_of(v[2 * i + 1][j]);
        const uint32_t other = shuffle_xor(odd ? first : second, 1);
        c[i].word[j] = odd ? other : first;
        c[i].word[j + 2] = odd ? second : other;
      }
    }
  }
  GCONV_DEVICE static void from_units(Chunk (&c)[2], float (&v)[OCTETS][2]) {
    const bool odd = lane() % 2;
    GCONV_UNROLL
    for (int i = 0; i < 2; ++i) {
      GCONV_UNROLL
      for (int j = 0; j < 2; ++j) {
        const uint32_t other = shuffle_xor(odd ? c[i].word[j] : c[i].word[j + 2], 1);
        v[2 * i][j] = float_of(odd ? other : c[i].word[j]);
        v[2 * i + 1][j] = float_of(odd ? c[i].word[j + 2] : other);
      }
    }
  }
};

// Every lane has one pixel and all channels of the quads: no lane waits for another.
template <>
struct Product<float> {
  static constexpr int PIXELS = 32, OUT = 4, HALVES = 1, VALUES = 4, UNITS = 4;
  static constexpr int HALF_STEPS = 1, LOW_LANE = 1, WEIGHTS = 16;

  GCONV_DEVICE static int load_pixel() { return lane(); }
  GCONV_DEVICE static int load_half() { return 0; }
  GCONV_DEVICE static int pixel(int) { return lane(); }
  GCONV_DEVICE static int channel() { return 0; }
  struct Weight {
    int half, in, out;
  };
  GCONV_DEVICE static Weight weight(int at) { return {0, at / 4, at % 4}; }

  template <int SHARE, int KH, bool HALF>
  GCONV_DEVICE static void step(Accumulators& acc, int first, const unsigned char* from, int row_pitch,
                                const float* weights) {
    Chunk a[ROWS + KH - 1];
    GCONV_UNROLL
    for (int i = 0; i < ROWS + KH - 1; ++i) a[i] = load_chunk(from + i * row_pitch);
    GCONV_UNROLL
    for (int o = 0; o < SHARE; ++o) GCONV_UNROLL
    for (int kh = 0; kh < KH; ++kh) GCONV_UNROLL
    for (int in = 0; in < 4; ++in) {
      const Chunk w = load_chunk(weights + ((o * KH + kh) * 4 + in) * 4);
      GCONV_UNROLL
      for (int r = 0; r < ROWS; ++r) GCONV_UNROLL
      for (int out = 0; out < 4; ++out)
        acc[r][first + o][out] += float_of(a[r + kh].word[in]) * float_of(w.word[out]);
    }
  }

  GCONV_DEVICE static int unit_octet(int i) { return i; }
  GCONV_DEVICE static int unit_channel() { return 0; }
  GCONV_DEVICE static void to_units(const float (&v)[OCTETS][4], Chunk (&c)[4]) {
    GCONV_UNROLL
    for (int i = 0; i < 4 * OCTETS; ++i) c[i / 4].word[i % 4] = bits_of(v[i / 4][i % 4]);
  }
  GCONV_DEVICE static void from_units(Chunk (&c)[4], float (&v)[OCTETS][4]) {
    GCONV_UNROLL
    for (int i = 0; i < 4 * OCTETS; ++i) v[i / 4][i % 4] = float_of(c[i / 4].word[i % 4]);
  }
};

}  // namespace gconv::cuda
