// AMX's tile registers: eight of 16 rows of 64 bytes, LANES slots (conv_slots.h) each.
//
// A product of tiles adds to 16x16 sums in float32, for 16 rows of LANES slots and as many columns, the sums
// over all slots: row i of the one holds the slots of a pixel (or of a channel of dy), row k of the other
// slot k of a vector of channels. Rows and vectors packed for the other instruction sets lie just so.
//
// Every register has its full size throughout. Rows past the last of a ragged tile are computed from whatever
// lies there, stored where there is room for them and never looked at; what is summed over is padded with
// zeros, on both sides, for 0 times a NaN is none.
#pragma once
#include "conv_slots.h"

namespace gconv {
namespace GCONV_ISA_NS {

constexpr int TILE_ROWS = 16;

// Rows that tiles of `rows` rows read and write, and slots that they sum over.
constexpr int64_t whole_tiles(int64_t rows) {
  return TILES ? (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS : rows;
}

#if defined(GCONV_ISA_AMX_BF16)

// A thread's tile registers while they are in use: others, oneDNN for one, configure them in their own way.
class TileRegisters {
 public:
  TileRegisters() { asm volatile("ldtilecfg %0" : : "m"(SHAPES)); }
  ~TileRegisters() { asm volatile("tilerelease" : : : "memory"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  static constexpr struct alignas(64) {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } SHAPES = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
};

// Where one or two tiles lie: floats from a row to the next, and from the first tile to the second.
struct TilePair {
  const float* data;
  int64_t row, second;
};

// Where sums lie: floats from a row to the next, to the second tile of rows, and to the second vector.
struct TileSumsAt {
  float* data;
  int64_t row, second_rows, second_vector;
};

// The compiler does not know what the instructions read and write: hence "memory".
template <int REGISTER>
GCONV_INLINE void tile_load(const float* from, int64_t row) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
               :
               : "r"(from), "r"(row * static_cast<int64_t>(sizeof(float))), "i"(REGISTER)
               : "memory");
}
template <int REGISTER>
GCONV_INLINE void tile_store(float* to, int64_t row) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
               :
               : "r"(to), "r"(row * static_cast<int64_t>(sizeof(float))), "i"(REGISTER)
               : "memory");
}
template <int REGISTER>
GCONV_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(REGISTER));
}
// Pairs summed over in float32, the first and the second of them apart; values below 2^-126 count as 0.
template <int SUM, int ROWS, int VECTOR>
GCONV_INLINE void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(ROWS), "i"(VECTOR));
}

// The sums of ROWS tiles of rows with VECTORS vectors, one or two each: registers 0 to 3; 4 and 5 hold rows,
// 6 and 7 vectors.
template <int ROWS, int VECTORS>
struct TileSums {
  static GCONV_INLINE void clear() {
    tile_zero<0>();
    if constexpr (VECTORS == 2) tile_zero<1>();
    if constexpr (ROWS == 2) tile_zero<2>();
    if constexpr (ROWS == 2 && VECTORS == 2) tile_zero<3>();
  }
  static GCONV_INLINE void load(const TileSumsAt& at) {
    each(at,
         [&](auto sum, const float* from) GCONV_LAMBDA { tile_load<decltype(sum)::value>(from, at.row); });
  }
  static GCONV_INLINE void store(const TileSumsAt& at) {
    each(at, [&](auto sum, float* to) GCONV_LAMBDA { tile_store<decltype(sum)::value>(to, at.row); });
  }
  static GCONV_INLINE void multiply_add(const TilePair& rows, const TilePair& vectors) {
    tile_load<4>(rows.data, rows.row);
    tile_load<6>(vectors.data, vectors.row);
    tile_multiply_add<0, 4, 6>();
    if constexpr (VECTORS == 2) {
      tile_load<7>(vectors.data + vectors.second, vectors.row);
      tile_multiply_add<1, 4, 7>();
    }
    if constexpr (ROWS == 2) {
      tile_load<5>(rows.data + rows.second, rows.row);
      tile_multiply_add<2, 5, 6>();
    }
    if constexpr (ROWS == 2 && VECTORS == 2) tile_multiply_add<3, 5, 7>();
  }

 private:
  // Calls f with each register of sums and its place.
  template <typename F>
  static GCONV_INLINE void each(const TileSumsAt& at, const F& f) {
    f(std::integral_constant<int, 0>(), at.data);
    if constexpr (VECTORS == 2) f(std::integral_constant<int, 1>(), at.data + at.second_vector);
    if constexpr (ROWS == 2) f(std::integral_constant<int, 2>(), at.data + at.second_rows);
    if constexpr (ROWS == 2 && VECTORS == 2)
      f(std::integral_constant<int, 3>(), at.data + at.second_rows + at.second_vector);
  }
};

// Calls f with the number of tiles of rows and of vectors as constants.
template <typename F>
GCONV_INLINE void with_tiles(int64_t rows, int64_t vectors, F&& f) {
  constexpr std::integral_constant<int, 1> one{};
  constexpr std::integral_constant<int, 2> two{};
  if (rows > TILE_ROWS)
    vectors == 2 ? f(two, two) : f(two, one);
  else
    vectors == 2 ? f(one, two) : f(one, one);
}

#else

struct TileRegisters {
  TileRegisters() {}
  ~TileRegisters() {}
};

#endif

}  // namespace GCONV_ISA_NS
}  // namespace gconv
