// batch_norm: the choice of kernels, and the parts that touch one value per channel only. These compute in
// double.
#include "batch_norm.h"

#include <cmath>
#include <limits>

#include "cpu/batch_norm_table.h"

namespace gconv {

namespace {

const BatchNormTable& table(Isa isa) { return GCONV_TABLE(batch_norm, isa); }

// Partial results lie slab by slab, so they are merged for some channels at a time, not channel by channel.
constexpr int64_t MERGED_CHANNELS = 128;

// Calls f(first channel, number of channels) for the share of the channels.
template <typename F>
void for_merged(int64_t channels, int64_t ith, int64_t nth, F&& f) {
  const int64_t end = channels * (ith + 1) / nth;
  for (int64_t c = channels * ith / nth; c < end; c += MERGED_CHANNELS)
    f(c, std::min(MERGED_CHANNELS, end - c));
}

// Column c of `finish`: what the backward of a normalisation by the statistics of 1/per_row values makes of
// its sums. The mask is for whoever has one to put in its place.
void finish_channel(double dgamma, double dbeta, double mean, double rstd, double gamma, double per_row,
                    float* finish, int64_t channels) {
  const double scale = gamma * rstd;
  const double column[6] = {scale, -scale * rstd * dgamma * per_row, -scale * dbeta * per_row, mean, 0, 1};
  for (int row = 0; row < 6; ++row) finish[row * channels] = static_cast<float>(column[row]);
}

// A sum and what it lacks; beside an infinity the latter is NaN and means nothing.
double compensated(float high, float low) {
  return std::isfinite(high) ? static_cast<double>(high) + low : high;
}

// Sum `which` of the slabs' partial results, each slab's `floats` long, for channels [first, first + width).
void sum_slabs(const float* workspace, int64_t slabs, int64_t floats, int64_t channels, int which,
               int64_t first, int64_t width, double* sums) {
  std::fill(sums, sums + width, 0.0);
  for (int64_t s = 0; s < slabs; ++s) {
    const float* partial = workspace + s * floats + 2 * which * channels + first;
    for (int64_t c = 0; c < width; ++c) sums[c] += compensated(partial[c], partial[channels + c]);
  }
}

}  // namespace

int64_t batch_norm_stats_workspace(const BatchNormStatsParams& p) {
  return (BatchNormSlabs(p.shape).slabs * 2 + 1) * p.shape.c;
}

void batch_norm_stats_cpu(const BatchNormStatsParams& p, int64_t ith, int64_t nth) {
  table(p.isa).stats(p, ith, nth);
}

void batch_norm_stats_merge_cpu(const BatchNormStatsParams& p, int64_t ith, int64_t nth) {
  const BatchNormSlabs plan(p.shape);
  const int64_t channels = p.shape.c;
  const float* pivot = p.workspace + plan.slabs * 2 * channels;
  const bool empty = plan.rows == 0;
  for_merged(channels, ith, nth, [&](int64_t first, int64_t width) {
    double count = 0, mean[MERGED_CHANNELS] = {}, m2[MERGED_CHANNELS] = {};
    for (int64_t s = 0; s < plan.slabs; ++s) {
      const float* partial = p.workspace + s * 2 * channels + first;
      const double n = static_cast<double>(plan.rows_of(s)), total = count + n, weight = n / total;
      for (int64_t c = 0; c < width; ++c) {
        const double delta = partial[c] - mean[c];
        mean[c] += delta * weight;
        m2[c] += partial[channels + c] + delta * delta * (count * weight);
      }
      count = total;
    }
    for (int64_t c = 0; c < width; ++c) {
      const float at = empty ? 0.f : pivot[first + c];
      p.mean[first + c] = empty ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(at + mean[c]);
      p.var[first + c] = empty ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(m2[c] / count);
    }
  });
}

void batch_norm_fold_cpu(const BatchNormFoldParams& p, int64_t ith, int64_t nth) {
  for (int64_t c = p.c * ith / nth; c < p.c * (ith + 1) / nth; ++c) {
    const double rstd = 1.0 / std::sqrt(static_cast<double>(p.var[c]) + p.eps);
    const double a = (p.gamma ? p.gamma[c] : 1.0) * rstd;
    p.rstd[c] = static_cast<float>(rstd);
    p.affine[c] = static_cast<float>(a);
    p.affine[p.c + c] = static_cast<float>((p.beta ? p.beta[c] : 0.0) - p.mean[c] * a);
  }
}

void batch_norm_update_running_cpu(const BatchNormUpdateRunningParams& p, int64_t ith, int64_t nth) {
  const double keep = 1.0 - p.momentum, unbiased = static_cast<double>(p.count) / (p.count - 1);
  for (int64_t c = p.c * ith / nth; c < p.c * (ith + 1) / nth; ++c) {
    const double mean = static_cast<double>(p.mean[c]) + (p.shift ? p.shift[c] : 0.f);
    p.running_mean[c] = static_cast<float>(keep * p.running_mean[c] + p.momentum * mean);
    p.running_var[c] = static_cast<float>(keep * p.running_var[c] + p.momentum * unbiased * p.var[c]);
  }
}

void batch_norm_apply_cpu(const BatchNormApplyParams& p, int64_t ith, int64_t nth) {
  table(p.isa).apply(p, ith, nth);
}

int64_t batch_norm_bwd_reduce_workspace(const BatchNormBwdReduceParams& p) {
  return BatchNormSlabs(p.shape).slabs * partial_sums(p) * p.shape.c;
}

void batch_norm_bwd_reduce_cpu(const BatchNormBwdReduceParams& p, int64_t ith, int64_t nth) {
  table(p.isa).bwd_reduce(p, ith, nth);
}

void batch_norm_bwd_reduce_merge_cpu(const BatchNormBwdReduceParams& p, int64_t ith, int64_t nth) {
  const BatchNormSlabs plan(p.shape);
  const int64_t channels = p.shape.c, floats = partial_sums(p) * channels;
  const double per_row = plan.rows == 0 ? 0.0 : 1.0 / static_cast<double>(plan.rows);
  const bool mask_from_x = p.affine != nullptr && p.z.data == nullptr;
  for_merged(channels, ith, nth, [&](int64_t first, int64_t width) {
    const auto sum = [&](int which, double* sums) {
      sum_slabs(p.workspace, plan.slabs, floats, channels, which, first, width, sums);
    };
    double sum_g[MERGED_CHANNELS], sum_gx[MERGED_CHANNELS];
    sum(0, sum_g);
    for (int64_t i = 0; i < width; ++i) p.dbeta[first + i] = static_cast<float>(sum_g[i]);
    const auto finish = [&](const BatchNormBwdBranch& branch, int which) {
      sum(which, sum_gx);
      for (int64_t i = 0; i < width; ++i) {
        const int64_t c = first + i;
        const double rstd = branch.rstd[c], dgamma = sum_gx[i] * rstd;
        branch.dgamma[c] = static_cast<float>(dgamma);
        finish_channel(dgamma, sum_g[i], branch.mean[c], rstd, branch.gamma ? branch.gamma[c] : 1.0, per_row,
                       branch.finish + c, channels);
      }
    };
    finish(p.main, 1);
    if (p.other.x.data) finish(p.other, 2);
    if (mask_from_x)
      for (int64_t i = 0; i < width; ++i) {
        const int64_t c = first + i;
        p.main.finish[4 * channels + c] = p.affine[c];
        p.main.finish[5 * channels + c] = p.affine[channels + c];
      }
  });
}

void batch_norm_bwd_finish_cpu(const BatchNormBwdFinishParams& p, int64_t ith, int64_t nth) {
  const double per_row = 1.0 / static_cast<double>(p.count);
  for (int64_t c = p.c * ith / nth; c < p.c * (ith + 1) / nth; ++c) {
    p.dbeta[c] = p.sums[c];
    p.dgamma[c] = p.sums[p.c + c];
    finish_channel(p.dgamma[c], p.dbeta[c], p.mean[c], p.rstd[c], p.gamma ? p.gamma[c] : 1.0, per_row,
                   p.finish + c, p.c);
  }
}

void batch_norm_bwd_apply_cpu(const BatchNormBwdApplyParams& p, int64_t ith, int64_t nth) {
  table(p.isa).bwd_apply(p, ith, nth);
}

void batch_norm_pool_cpu(const BatchNormPoolParams& p, int64_t ith, int64_t nth) {
  table(p.isa).pool(p, ith, nth);
}

int64_t batch_norm_pool_bwd_workspace(const BatchNormPoolBwdParams& p) {
  return BatchNormSlabs(p.pooled()).slabs * 4 * p.shape.c;
}

void batch_norm_pool_bwd_cpu(const BatchNormPoolBwdParams& p, int64_t ith, int64_t nth) {
  table(p.isa).pool_bwd(p, ith, nth);
}

void batch_norm_pool_bwd_merge_cpu(const BatchNormPoolBwdParams& p, int64_t ith, int64_t nth) {
  const int64_t slabs = BatchNormSlabs(p.pooled()).slabs, channels = p.shape.c;
  const float* rstd = p.act + 3 * channels;
  for_merged(channels, ith, nth, [&](int64_t first, int64_t width) {
    double sums[MERGED_CHANNELS];
    for (int which = 0; which < 2; ++which) {
      sum_slabs(p.workspace, slabs, 4 * channels, channels, which, first, width, sums);
      for (int64_t i = 0; i < width; ++i)
        p.sums[which * channels + first + i] =
            static_cast<float>(which == 0 ? sums[i] : sums[i] * rstd[first + i]);
    }
  });
}

}  // namespace gconv
