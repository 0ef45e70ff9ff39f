// An op's stages as each instruction set provides them: one table per set, chosen at run time.
#pragma once
#include <cstdint>

#include "cpu/isa.h"
#include "tensor.h"

namespace gconv {

template <typename Params>
using Workspace = int64_t (*)(const Params&);
template <typename Params>
using Stage = void (*)(const Params&, int64_t ith, int64_t nth);

// The names of an op's tables are the op's with the set's behind it.
#if defined(__x86_64__)
#define GCONV_DECLARE_TABLES(Table, op) extern const Table op##_portable, op##_avx2, op##_avx512
#define GCONV_PAIRS_TABLE(op, isa, dtype, summed) \
  (by_pairs(isa, dtype, summed) ? GCONV_BF16_TABLE(op, isa) : GCONV_TABLE(op, isa))
#if defined(GCONV_AMX)
#define GCONV_DECLARE_PAIRS_TABLES(Table, op) extern const Table op##_avx512_bf16, op##_amx_bf16
#define GCONV_BF16_TABLE(op, isa) ((isa) == Isa::amx_bf16 ? op##_amx_bf16 : op##_avx512_bf16)
#else
#define GCONV_DECLARE_PAIRS_TABLES(Table, op) extern const Table op##_avx512_bf16
#define GCONV_BF16_TABLE(op, isa) op##_avx512_bf16
#endif
#define GCONV_TABLE(op, isa) \
  ((isa) >= Isa::avx512 ? op##_avx512 : (isa) == Isa::avx2 ? op##_avx2 : op##_portable)
#else
#define GCONV_DECLARE_TABLES(Table, op) extern const Table op##_portable
#define GCONV_DECLARE_PAIRS_TABLES(Table, op) GCONV_DECLARE_TABLES(Table, op)
#define GCONV_TABLE(op, isa) ((void)(isa), op##_portable)
#define GCONV_PAIRS_TABLE(op, isa, dtype, summed) ((void)(dtype), (void)(summed), GCONV_TABLE(op, isa))
#endif
// Whether a table of the sets for bfloat16 serves: pairs of it need an even number of what is summed over.
inline bool by_pairs(Isa isa, DType dtype, int64_t summed) {
  return isa >= Isa::avx512_bf16 && dtype == DType::bf16 && summed % 2 == 0;
}
// The table that one translation unit defines.
#define GCONV_TABLE_NAME(op, ns) GCONV_TABLE_PASTE(op, ns)
#define GCONV_TABLE_PASTE(op, ns) op##_##ns

}  // namespace gconv
