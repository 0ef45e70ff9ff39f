// What is illegal on a CPU with AMX (a tile that is not configured, shapes that do not match, a palette
// unknown), and what no kernel can mean (to start in the middle of a tile), ends the process with a line that
// says what. Arithmetic and encodings: Intel 64 and IA-32 Architectures Software Developer's Manual, volume
// 2, the instructions' own pages.
#include "amx_emulator.h"

#include <stdexcept>

#include "cpu/isa.h"

#if defined(__x86_64__) && defined(__linux__)

#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_emulator {

namespace {

constexpr int TILES = 8, MOST_ROWS = 16, MOST_BYTES = 64;

struct Tile {
  int rows, row_bytes;
  alignas(64) uint8_t data[MOST_ROWS][MOST_BYTES];
};

// One thread's registers.
struct Registers {
  bool configured;
  Tile tiles[TILES];
};
thread_local Registers registers;

std::atomic<int64_t> product_count{0}, corrupt_at{-1};
struct sigaction before;

// A signal handler may not call much: a line of its own, and the end.
[[noreturn]] void illegal(const char* what) {
  constexpr char PREFIX[] = "AMX emulator: ";
  const ssize_t written = write(STDERR_FILENO, PREFIX, sizeof PREFIX - 1) +
                          write(STDERR_FILENO, what, std::strlen(what)) + write(STDERR_FILENO, "\n", 1);
  (void)written;
  std::abort();
}

// A three-byte VEX instruction without an immediate, and what it names.
struct Instruction {
  int prefix, opcode, reg, rm, vvvv, length;  // prefix: 0 none, 1 66, 2 F3, 3 F2
  bool memory;
  uint8_t* address;  // of a memory operand, without the index where it is a stride
  int64_t index;     // scaled
  bool sib;
};

// The general registers in the order of their numbers.
constexpr int NUMBERED[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// False where it is not one of AMX's.
bool decode(const uint8_t* code, const greg_t* general, Instruction* in) {
  constexpr int VEX3 = 0xc4, MAP_0F38 = 2;
  if (code[0] != VEX3 || (code[1] & 31) != MAP_0F38) return false;
  const bool wide = (code[2] & 0x80) != 0, long_vector = (code[2] & 4) != 0;
  in->prefix = code[2] & 3;
  in->vvvv = 15 - (code[2] >> 3 & 15);
  in->opcode = code[3];
  if (wide || long_vector || (in->opcode != 0x49 && in->opcode != 0x4b && in->opcode != 0x5c)) return false;
  const int r = (code[1] & 0x80) != 0 ? 0 : 8, x = (code[1] & 0x40) != 0 ? 0 : 8,
            b = (code[1] & 0x20) != 0 ? 0 : 8;
  const int mod = code[4] >> 6;
  in->reg = (code[4] >> 3 & 7) + r;
  in->rm = (code[4] & 7) + b;
  in->memory = mod != 3;
  in->length = 5;
  in->address = nullptr, in->index = 0, in->sib = false;
  if (!in->memory) return true;
  int64_t address = 0;
  bool base = true;
  int base_register = in->rm;
  if ((code[4] & 7) == 4) {
    const int sib = code[in->length++], index = (sib >> 3 & 7) + x;
    in->sib = true;
    base_register = (sib & 7) + b;
    base = (sib & 7) != 5 || mod != 0;
    if (index != 4) in->index = static_cast<int64_t>(general[NUMBERED[index]]) << (sib >> 6);
  } else if ((code[4] & 7) == 5 && mod == 0) {  // relative to the next instruction
    base = false;
    address = reinterpret_cast<int64_t>(code) + in->length + 4;
  }
  if (base) address += general[NUMBERED[base_register]];
  if (mod == 1) {
    address += static_cast<int8_t>(code[in->length]);
    in->length += 1;
  } else if (mod == 2 || !base) {
    int32_t displacement;
    std::memcpy(&displacement, code + in->length, 4);
    address += displacement;
    in->length += 4;
  }
  in->address = reinterpret_cast<uint8_t*>(address);
  return true;
}

void load_configuration(const uint8_t* from) {
  constexpr int PALETTE = 0, START_ROW = 1, ROW_BYTES = 16, ROWS = 48;
  std::memset(&registers, 0, sizeof registers);
  if (from[PALETTE] == 0) return;
  if (from[PALETTE] != 1) illegal("LDTILECFG: a palette other than 1");
  if (from[START_ROW] != 0) illegal("LDTILECFG: a start row other than 0");
  for (int i = START_ROW + 1; i < ROW_BYTES; ++i)
    if (from[i] != 0) illegal("LDTILECFG: a reserved byte that is not 0");
  for (int t = 0; t < 16; ++t) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, from + ROW_BYTES + 2 * t, 2);
    const int rows = from[ROWS + t];
    if (t >= TILES && (rows != 0 || row_bytes != 0)) illegal("LDTILECFG: a tile beyond the eighth");
    if (rows > MOST_ROWS || row_bytes > MOST_BYTES) illegal("LDTILECFG: a tile too large");
    if (row_bytes % 4 != 0) illegal("LDTILECFG: a row of no whole floats");
    if ((rows == 0) != (row_bytes == 0)) illegal("LDTILECFG: a tile of rows or columns alone");
    if (t < TILES) registers.tiles[t].rows = rows, registers.tiles[t].row_bytes = row_bytes;
  }
  registers.configured = true;
}

Tile& tile(int index) {
  if (!registers.configured) illegal("tiles are not configured");
  if (index >= TILES) illegal("a tile beyond the eighth");
  if (registers.tiles[index].rows == 0) illegal("this tile is not configured");
  return registers.tiles[index];
}

void load_rows(const Instruction& in) {
  Tile& t = tile(in.reg);
  std::memset(t.data, 0, sizeof t.data);
  for (int64_t r = 0; r < t.rows; ++r)
    std::memcpy(t.data[r], in.address + r * in.index, static_cast<size_t>(t.row_bytes));
}

void store_rows(const Instruction& in) {
  const Tile& t = tile(in.reg);
  for (int64_t r = 0; r < t.rows; ++r)
    std::memcpy(in.address + r * in.index, t.data[r], static_cast<size_t>(t.row_bytes));
}

// Products of pairs, the first and the second of each summed apart by fused multiplications, then together;
// rounded to nearest even, denormals being 0, whatever MXCSR says.
__attribute__((target("avx512f"))) void multiply_add(Tile& sum, const Tile& rows, const Tile& columns) {
  constexpr unsigned NEAREST_FLUSHED_MASKED = 0x9fc0;
  const unsigned mxcsr = _mm_getcsr();
  _mm_setcsr(NEAREST_FLUSHED_MASKED);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int m = 0; m < sum.rows; ++m) {
    __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
    for (int k = 0; k < rows.row_bytes / 4; ++k) {
      int32_t pair;
      std::memcpy(&pair, rows.data[m] + 4 * k, 4);
      const __m512i a = _mm512_set1_epi32(pair), b = _mm512_load_si512(columns.data[k]);
      first = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                              _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), first);
      second = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, upper)),
                               _mm512_castsi512_ps(_mm512_and_si512(b, upper)), second);
    }
    const __m512 total = _mm512_add_ps(_mm512_load_ps(sum.data[m]), _mm512_add_ps(first, second));
    alignas(64) uint8_t row[MOST_BYTES];
    _mm512_store_ps(row, total);
    std::memset(sum.data[m], 0, MOST_BYTES);
    std::memcpy(sum.data[m], row, static_cast<size_t>(sum.row_bytes));
  }
  _mm_setcsr(mxcsr);
}

void multiply(const Instruction& in) {
  if (in.reg == in.rm || in.reg == in.vvvv || in.rm == in.vvvv) illegal("TDPBF16PS: one tile twice");
  Tile &sum = tile(in.reg), &rows = tile(in.rm), &columns = tile(in.vvvv);
  if (sum.rows != rows.rows || sum.row_bytes != columns.row_bytes || rows.row_bytes != 4 * columns.rows)
    illegal("TDPBF16PS: shapes that do not match");
  multiply_add(sum, rows, columns);
  if (corrupt_at.load() == product_count.fetch_add(1)) {
    float wrong;
    std::memcpy(&wrong, sum.data[0], 4);
    wrong += 1;
    std::memcpy(sum.data[0], &wrong, 4);
  }
}

// False where it is not an instruction of AMX's.
bool run(const Instruction& in) {
  constexpr int NONE = 0, P66 = 1, F3 = 2, F2 = 3;
  if (in.opcode == 0x5c) {
    if (in.memory || in.prefix != F3) return false;
    multiply(in);
    return true;
  }
  if (in.vvvv != 0) return false;
  if (in.opcode == 0x4b) {
    if (!in.memory || !in.sib || in.prefix == NONE) return false;
    in.prefix == F3 ? store_rows(in) : load_rows(in);
    return true;
  }
  if (in.memory && in.reg == 0 && in.prefix == NONE) {
    load_configuration(in.address + in.index);
  } else if (in.memory && in.reg == 0 && in.prefix == P66) {
    return false;  // STTILECFG, which no kernel uses
  } else if (!in.memory && in.prefix == NONE && in.reg == 0 && in.rm == 0) {
    std::memset(&registers, 0, sizeof registers);
  } else if (!in.memory && in.prefix == F2 && in.rm == 0) {
    std::memset(tile(in.reg).data, 0, sizeof(Tile::data));
  } else {
    return false;
  }
  return true;
}

void on_illegal_instruction(int, siginfo_t*, void* context) {
  greg_t* general = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  Instruction in;
  bool any = false;
  // A signal is dear: instructions that follow each other go together.
  while (decode(reinterpret_cast<const uint8_t*>(general[REG_RIP]), general, &in) && run(in)) {
    general[REG_RIP] += in.length;
    any = true;
  }
  if (!any) sigaction(SIGILL, &before, nullptr);  // whose turn it is when the instruction is met again
}

}  // namespace

void install() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512f")) throw std::runtime_error("the AMX emulator needs AVX-512");
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  if (sigaction(SIGILL, &action, &before) != 0) throw std::runtime_error("the AMX emulator: sigaction");
}

int64_t products() { return product_count.load(); }
void corrupt_after(int64_t products) {
  corrupt_at.store(products < 0 ? -1 : product_count.load() + products);
}
bool configured() { return registers.configured; }

#if defined(GCONV_AMX)
__attribute__((target("amx-tile,amx-bf16"))) void tile_product(const void* configuration, float* sums,
                                                               const void* rows, const void* columns) {
  asm volatile(
      "ldtilecfg (%0)\n"
      "tileloadd (%1,%4,1), %%tmm0\n"
      "tileloadd (%2,%4,1), %%tmm1\n"
      "tileloadd (%3,%4,1), %%tmm2\n"
      "tdpbf16ps %%tmm2, %%tmm1, %%tmm0\n"
      "tilestored %%tmm0, (%1,%4,1)\n"
      "tilerelease"
      :
      : "r"(configuration), "r"(sums), "r"(rows), "r"(columns), "r"(int64_t{MOST_BYTES})
      : "memory");
}
#else
void tile_product(const void*, float*, const void*, const void*) {
  throw std::runtime_error("this compiler does not know AMX");
}
#endif

}  // namespace amx_emulator

#else

namespace amx_emulator {
void install() { throw std::runtime_error("the AMX emulator needs Linux on x86-64"); }
int64_t products() { return 0; }
void corrupt_after(int64_t) {}
bool configured() { return false; }
void tile_product(const void*, float*, const void*, const void*) { install(); }
}  // namespace amx_emulator

#endif
