// AMX's instructions on a CPU that lacks them, for the tests of the kernels that use them: an illegal
// instruction is decoded and done by a signal handler, and the program goes on behind it.
#pragma once
#include <cstdint>

namespace amx_emulator {

// From here on this process can run AMX's instructions, on all its threads. Throws where the emulator itself
// cannot run: its sums need AVX-512, and the signal frame Linux on x86-64.
void install();

// How often tile products (TDPBF16PS) have been done, by all threads together.
int64_t products();

// After this many more of them one sum is wrong, once: what a test must find. Below 0: none.
void corrupt_after(int64_t products);

// Whether this thread has configured its tiles and not released them.
bool configured();

// sums += rows . columns by the instructions themselves: LDTILECFG of these 64 bytes, tiles 0, 1 and 2 of
// rows of 64 bytes side by side, then TILERELEASE. On a CPU with AMX it is the hardware's answer.
void tile_product(const void* configuration, float* sums, const void* rows, const void* columns);

}  // namespace amx_emulator
