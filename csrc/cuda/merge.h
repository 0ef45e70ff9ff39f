// Partial results of a kernel's tiles as one, in an order that depends on their number alone.
#pragma once
#include "verbs.h"

namespace gconv::cuda {

constexpr int MERGE_CHANNELS = 32, MERGE_LINES = 8;  // of a block: 128 bytes of a row, rows at a time
constexpr int MERGE_GROUPS = 64;                     // more tiles than that are merged in groups first

// Rows [tiles] of partial results and what becomes of them. Statistics: means [tiles][c], M2 [tiles][c],
// counts [tiles]. Sums: [tiles][c].
struct MergeParams {
  const void* partial;
  int64_t tiles, c;
  int64_t span, groups;  // tiles to a group
  void* out;             // of more groups than one the same in double, else the result
  float* var;            // of statistics, whose mean `out` is
};

// What a thread merges: the tiles from `first` on, MERGE_LINES apart, of channel c.
struct MergeShare {
  int64_t group, c, first, last;
};
GCONV_DEVICE MergeShare merge_share(const MergeParams& p) {
  const int64_t blocks = (p.c + MERGE_CHANNELS - 1) / MERGE_CHANNELS;
  const int64_t group = int64_t(blockIdx.x) / blocks, end = (group + 1) * p.span;
  return {group, int64_t(blockIdx.x) % blocks * MERGE_CHANNELS + threadIdx.x % MERGE_CHANNELS,
          group * p.span + threadIdx.x / MERGE_CHANNELS, end < p.tiles ? end : p.tiles};
}

// Sums of v over the block's MERGE_LINES threads of a channel, the same in each, in their order.
GCONV_DEVICE double sum_lines(double v, double* shared) {
  const int channel = int(threadIdx.x) % MERGE_CHANNELS;
  shared[threadIdx.x] = v;
  block_sync();
  double sum = 0.0;
  for (int i = 0; i < MERGE_LINES; ++i) sum += shared[i * MERGE_CHANNELS + channel];
  block_sync();
  return sum;
}

// computes: (count, mean, M2) of `span` tiles as one (Chan, Golub & LeVeque 1983), or at the end mean and
//           biased variance; of nothing 0 and NaN
// grid:     groups of tiles x blocks of 32 channels
// tile:     `span` tiles x 32 channels, 8 of them at a time
// bytes:    partial once (its second half also in the first pass: the means, from L1)
// accum.:   double, in the order of the tiles
template <typename T, bool LAST>
GCONV_KERNEL(MERGE_CHANNELS* MERGE_LINES, 1)
void merge_statistics_kernel(const MergeParams p) {
  double* const shared = reinterpret_cast<double*>(shared_memory());
  const MergeShare of = merge_share(p);
  const T* const means = static_cast<const T*>(p.partial);
  const T* const squares = means + p.tiles * p.c;
  const T* const counts = squares + p.tiles * p.c;
  const bool known = of.c < p.c;

  double count = 0.0, mean = 0.0, m2 = 0.0;
  for (int64_t t = of.first; t < of.last; t += MERGE_LINES) {
    const double n = double(counts[t]);
    count += n;
    mean += known ? n * double(means[t * p.c + of.c]) : 0.0;
  }
  count = sum_lines(count, shared);
  mean = sum_lines(mean, shared) / (count > 1.0 ? count : 1.0);
  for (int64_t t = of.first; t < of.last; t += MERGE_LINES) {
    const double d = known ? double(means[t * p.c + of.c]) - mean : 0.0;
    m2 += known ? double(squares[t * p.c + of.c]) + double(counts[t]) * (d * d) : 0.0;
  }
  m2 = sum_lines(m2, shared);
  if (!known || threadIdx.x >= MERGE_CHANNELS) return;
  if constexpr (LAST) {
    static_cast<float*>(p.out)[of.c] = float(mean);
    p.var[of.c] = float(m2 / count);
  } else {
    double* const out = static_cast<double*>(p.out);
    out[of.group * p.c + of.c] = mean;
    out[(p.groups + of.group) * p.c + of.c] = m2;
    out[2 * p.groups * p.c + of.group] = count;  // the same from every block of the group
  }
}

// computes: the sums of `span` tiles
// grid:     groups of tiles x blocks of 32 channels
// tile:     `span` tiles x 32 channels, 8 of them at a time
// bytes:    partial once
// accum.:   double, in the order of the tiles
template <typename T, typename Out>
GCONV_KERNEL(MERGE_CHANNELS* MERGE_LINES, 1)
void merge_sums_kernel(const MergeParams p) {
  double* const shared = reinterpret_cast<double*>(shared_memory());
  const MergeShare of = merge_share(p);
  double sum = 0.0;
  for (int64_t t = of.first; t < of.last; t += MERGE_LINES)
    sum += of.c < p.c ? double(static_cast<const T*>(p.partial)[t * p.c + of.c]) : 0.0;
  sum = sum_lines(sum, shared);
  if (of.c < p.c && threadIdx.x < MERGE_CHANNELS) static_cast<Out*>(p.out)[of.group * p.c + of.c] = Out(sum);
}

// ---- on the host

inline int64_t merge_span(int64_t tiles) {
  return tiles <= MERGE_GROUPS ? (tiles > 0 ? tiles : 1) : (tiles + MERGE_GROUPS - 1) / MERGE_GROUPS;
}
inline int64_t merge_groups(int64_t tiles) {
  return tiles <= MERGE_GROUPS ? 1 : (tiles + merge_span(tiles) - 1) / merge_span(tiles);
}

// Floats of partial results and of the scratch of merging them, which follows them at an even float.
inline int64_t even(int64_t floats) { return (floats + 1) / 2 * 2; }
inline int64_t statistics_floats(int64_t tiles, int64_t c) { return tiles * (2 * c + 1); }
inline int64_t statistics_workspace(int64_t tiles, int64_t c) {
  return even(statistics_floats(tiles, c)) + 2 * statistics_floats(merge_groups(tiles), c);
}
inline int64_t sums_workspace(int64_t tiles, int64_t c) {
  return even(tiles * c) + 2 * merge_groups(tiles) * c;
}

constexpr int64_t MERGE_SHARED = MERGE_CHANNELS * MERGE_LINES * sizeof(double);

// Runs `one` where one level will do, else `first` and `last`. `floats`: of the partial results.
inline void merge_levels(const char* op, void (*one)(MergeParams), void (*first)(MergeParams),
                         void (*last)(MergeParams), float* partial, int64_t floats, int64_t tiles, int64_t c,
                         float* out, float* var, Stream stream) {
  const int64_t groups = merge_groups(tiles), blocks = (c + MERGE_CHANNELS - 1) / MERGE_CHANNELS;
  const int threads = MERGE_CHANNELS * MERGE_LINES;
  if (groups == 1) {
    launch(op, one, blocks, threads, MERGE_SHARED, stream,
           MergeParams{partial, tiles, c, merge_span(tiles), 1, out, var});
    return;
  }
  float* const scratch = partial + even(floats);
  launch(op, first, groups * blocks, threads, MERGE_SHARED, stream,
         MergeParams{partial, tiles, c, merge_span(tiles), groups, scratch, nullptr});
  launch(op, last, blocks, threads, MERGE_SHARED, stream,
         MergeParams{scratch, groups, c, groups, 1, out, var});
}

inline void merge_statistics(const char* op, float* partial, int64_t tiles, int64_t c, float* mean,
                             float* var, Stream stream) {
  merge_levels(op, merge_statistics_kernel<float, true>, merge_statistics_kernel<float, false>,
               merge_statistics_kernel<double, true>, partial, statistics_floats(tiles, c), tiles, c, mean,
               var, stream);
}

inline void merge_sums(const char* op, float* partial, int64_t tiles, int64_t c, float* sums, Stream stream) {
  merge_levels(op, merge_sums_kernel<float, float>, merge_sums_kernel<float, double>,
               merge_sums_kernel<double, float>, partial, tiles * c, tiles, c, sums, nullptr, stream);
}

}  // namespace gconv::cuda
