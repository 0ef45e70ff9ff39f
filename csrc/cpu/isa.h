// Which instruction set the CPU kernels use: every set is in the binary, one is chosen at run time.
#pragma once
#include <cstdint>

// Whether this compiler knows AMX (by GCC's header or clang's), and this system what a process must ask
// before it may use it.
#if defined(__x86_64__) && defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>)
#define GCONV_AMX
#endif
#endif

namespace gconv {

// avx512_bf16 is avx512 but where bfloat16 is multiplied: pairs of it at a time. amx_bf16 is avx512_bf16 but
// where wide groups are multiplied: tiles of it at a time.
enum class Isa : int32_t { portable, avx2, avx512, avx512_bf16, amx_bf16 };

// All of them, with their names listed for messages.
constexpr Isa ISAS[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx_bf16};
constexpr char ISA_NAMES[] = "portable, avx2, avx512, avx512_bf16 or amx_bf16";

bool isa_supported(Isa isa);  // by this CPU, its operating system and this binary
const char* isa_name(Isa isa);
bool isa_from_name(const char* name, Isa* isa);

// The set in use. The first call chooses the best supported one, or the one GCONV_ISA names; an
// unknown or unsupported name throws std::runtime_error.
Isa isa_current();
void isa_set(Isa isa);  // for tests; throws if unsupported

// The family of an AMD CPU, 0 of any other, by CPUID: what pays differs from one to the next, and the same
// CPU always runs the same algorithm.
unsigned amd_family();
constexpr unsigned ZEN4_FAMILY = 0x19;  // with 512-bit vectors; Zen 5 is the next

// Lines of a set of the L1 data cache: 8 where the system does not say.
int64_t l1_ways();

// Whether an algorithm with fewer multiplications than the definition runs where it can.
enum class Use : int32_t { never, where_it_pays, always };

const char* use_name(Use use);  // "never", "auto", "always"
bool use_from_name(const char* name, Use* use);

// Of Winograd's for 3x3 and of Strassen's for 1x1 convolutions. The first call asks GCONV_WINOGRAD and
// GCONV_STRASSEN: 0 is never, 1 or nothing where it pays; else it throws std::runtime_error.
Use winograd_current();
void winograd_set(Use use);
Use strassen_current();
void strassen_set(Use use);

}  // namespace gconv
