#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(GCONV_AMX)
#include <sys/syscall.h>
#endif
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace gconv {

namespace {

std::atomic<int32_t> chosen{-1};

// What a variable of the environment says of an algorithm, until somebody sets it.
class Switch {
 public:
  explicit constexpr Switch(const char* variable) : variable_(variable) {}
  Use current() {
    int32_t value = use_.load(std::memory_order_relaxed);
    if (value < 0) {
      const char* text = std::getenv(variable_);
      const std::string given = text == nullptr || *text == '\0' ? "1" : text;
      if (given != "0" && given != "1")
        throw std::runtime_error(std::string(variable_) + ": want 0 or 1, got " + given);
      value = static_cast<int32_t>(given == "0" ? Use::never : Use::where_it_pays);
      use_.store(value, std::memory_order_relaxed);
    }
    return static_cast<Use>(value);
  }
  void set(Use use) { use_.store(static_cast<int32_t>(use), std::memory_order_relaxed); }

 private:
  const char* variable_;
  std::atomic<int32_t> use_{-1};
};

Switch winograd("GCONV_WINOGRAD"), strassen("GCONV_STRASSEN");

Isa best_supported() {
  Isa best = Isa::portable;
  for (Isa isa : ISAS)
    if (isa_supported(isa)) best = isa;
  return best;
}

Isa choose() {
  const char* name = std::getenv("GCONV_ISA");
  if (name == nullptr || *name == '\0') return best_supported();
  Isa isa;
  if (!isa_from_name(name, &isa))
    throw std::runtime_error(std::string("GCONV_ISA: want ") + ISA_NAMES + ", got " + name);
  if (!isa_supported(isa))
    throw std::runtime_error(std::string("GCONV_ISA: this CPU cannot run ") + name + "; its best is " +
                             isa_name(best_supported()));
  return isa;
}

template <typename Choices, typename Choice>
bool from_name(const Choices& choices, const char* (*name_of)(Choice), const char* name, Choice* choice) {
  for (Choice candidate : choices)
    if (std::strcmp(name, name_of(candidate)) == 0) {
      *choice = candidate;
      return true;
    }
  return false;
}

#if defined(__x86_64__)
// By CPUID itself: not every compiler's __builtin_cpu_supports knows these names.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
bool has_avx512_bf16() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & (1u << 5)) != 0;
}
#if defined(GCONV_AMX)
bool has_amx_bf16() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned TILE = 1u << 24, BF16 = 1u << 22;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & TILE) != 0 && (edx & BF16) != 0;
}
// Whether the operating system saves the tile registers and their configuration.
bool saves_tiles() {
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0 || (ecx & bit_OSXSAVE) == 0) return false;
  asm volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (eax >> 17 & 3u) == 3u;
}
// Linux saves 8 KB for the threads of a process that has asked for them, and stops one that has not.
bool may_use_tiles() {
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
  return granted;
}
#endif
bool is_amd() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(0, &eax, &ebx, &ecx, &edx) != 0 && ebx == signature_AMD_ebx &&
         ecx == signature_AMD_ecx && edx == signature_AMD_edx;
}
// With its extension, as CPUID's leaf 1 adds them up.
unsigned cpu_family() {
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return 0;
  const unsigned family = (eax >> 8) & 15u;
  return family == 15 ? family + ((eax >> 20) & 255u) : family;
}
#endif

}  // namespace

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // The builtins also ask the operating system (XGETBV) whether it saves the wide registers.
#if defined(GCONV_AMX)
  if (isa == Isa::amx_bf16)
    return isa_supported(Isa::avx512_bf16) && has_amx_bf16() && saves_tiles() && may_use_tiles();
#endif
  if (isa == Isa::avx512_bf16) return isa_supported(Isa::avx512) && has_avx512_bf16();
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#endif
  return isa == Isa::portable;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx_bf16:
      return "amx_bf16";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

bool isa_from_name(const char* name, Isa* isa) { return from_name(ISAS, isa_name, name, isa); }

Isa isa_current() {
  int32_t value = chosen.load(std::memory_order_relaxed);
  if (value < 0) {
    value = static_cast<int32_t>(choose());
    chosen.store(value, std::memory_order_relaxed);
  }
  return static_cast<Isa>(value);
}

void isa_set(Isa isa) {
  if (!isa_supported(isa))
    throw std::runtime_error(std::string("set_cpu_isa: this CPU cannot run ") + isa_name(isa));
  chosen.store(static_cast<int32_t>(isa), std::memory_order_relaxed);
}

int64_t l1_ways() {
#if defined(_SC_LEVEL1_DCACHE_ASSOC)
  static const int64_t ways = sysconf(_SC_LEVEL1_DCACHE_ASSOC);
  if (ways > 0) return ways;
#endif
  return 8;
}

unsigned amd_family() {
#if defined(__x86_64__)
  static const unsigned family = is_amd() ? cpu_family() : 0;
  return family;
#else
  return 0;
#endif
}

const char* use_name(Use use) { return use == Use::never ? "never" : use == Use::always ? "always" : "auto"; }

bool use_from_name(const char* name, Use* use) {
  constexpr Use CHOICES[] = {Use::never, Use::where_it_pays, Use::always};
  return from_name(CHOICES, use_name, name, use);
}

Use winograd_current() { return winograd.current(); }
void winograd_set(Use use) { winograd.set(use); }
Use strassen_current() { return strassen.current(); }
void strassen_set(Use use) { strassen.set(use); }

}  // namespace gconv
