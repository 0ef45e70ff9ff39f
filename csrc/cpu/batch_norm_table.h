// What the two halves of batch_norm share: the kernels compiled per instruction set and the code that merges
// their partial results.
#pragma once
#include <algorithm>

#include "batch_norm.h"
#include "cpu/table.h"

namespace gconv {

// How rows are cut, by shape alone. A slab is one thread's work and leaves one partial result per channel; it
// is walked in blocks that stay in cache, by panels of channels.
struct BatchNormSlabs {
  static constexpr int64_t PANEL = 512;            // channels whose accumulators fit in L1 beside the data
  static constexpr int64_t BLOCK_ELEMENTS = 8192;  // of a panel: 32 KiB of float32
  static constexpr int64_t MAX_SLABS = 128;        // more would cost more in merging than threads could gain
  static constexpr int64_t MIN_ELEMENTS = 32768;   // of a panel in a slab, for the same reason
  int64_t rows, block_rows, slab_rows, slabs, panels;

  explicit BatchNormSlabs(const BatchNormShape& s) : rows(s.n * s.h * s.w) {
    const int64_t width = std::clamp<int64_t>(s.c, 16, PANEL);  // fewer channels fill no vector
    block_rows = std::clamp<int64_t>(BLOCK_ELEMENTS / width / 4 * 4, 16, 256);
    const int64_t share = std::max((rows + MAX_SLABS - 1) / MAX_SLABS, MIN_ELEMENTS / width);
    slab_rows = std::max<int64_t>(1, (share + block_rows - 1) / block_rows) * block_rows;
    slabs = (rows + slab_rows - 1) / slab_rows;
    panels = (s.c + PANEL - 1) / PANEL;
  }
  int64_t rows_of(int64_t slab) const { return std::min(slab_rows, rows - slab * slab_rows); }
};

// The passes as one instruction set provides them. The partial results of stats lie in workspace as
// [slabs][2][C], mean and M2 of x - pivot, followed by the pivot [C]; those of bwd_reduce as [slabs][4][C],
// sum g and sum g*(x - mean), each a float32 and what it lacks; with another branch [slabs][6][C], its sum
// last. Those of pool_bwd lie as of one branch; its rows are the pooled ones.
inline int64_t partial_sums(const BatchNormBwdReduceParams& p) { return p.other.x.data ? 6 : 4; }

struct BatchNormTable {
  Stage<BatchNormStatsParams> stats;
  Stage<BatchNormApplyParams> apply;
  Stage<BatchNormBwdReduceParams> bwd_reduce;
  Stage<BatchNormBwdApplyParams> bwd_apply;
  Stage<BatchNormPoolParams> pool;
  Stage<BatchNormPoolBwdParams> pool_bwd;
};

GCONV_DECLARE_TABLES(BatchNormTable, batch_norm);

}  // namespace gconv
