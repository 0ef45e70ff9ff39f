// An op's stages as each instruction set provides them: one table per set, chosen at run time.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace gconv {

template <typename Params>
using Workspace = int64_t (*)(const Params&);
template <typename Params>
using Stage = void (*)(const Params&, int64_t ith, int64_t nth);

// The names of an op's tables are the op's with the set's behind it.
#if defined(__x86_64__)
#define GCONV_DECLARE_TABLES(Table, op) extern const Table op##_portable, op##_avx2, op##_avx512
#define GCONV_TABLE(op, isa) \
  ((isa) == Isa::avx512 ? op##_avx512 : (isa) == Isa::avx2 ? op##_avx2 : op##_portable)
#else
#define GCONV_DECLARE_TABLES(Table, op) extern const Table op##_portable
#define GCONV_TABLE(op, isa) ((void)(isa), op##_portable)
#endif
// The table that one translation unit defines.
#define GCONV_TABLE_NAME(op, ns) GCONV_TABLE_PASTE(op, ns)
#define GCONV_TABLE_PASTE(op, ns) op##_##ns

}  // namespace gconv
