// The contract of batch_norm: statistics, the affine that they fold into, and both passes of the backward.
//
//   stats       mean, var over n*h*w of each channel, var biased
//   fold        rstd = 1/sqrt(var + eps); a = gamma*rstd; b = beta - mean*a
//   apply       y = relu?(a*x + b [+ residual, or + c*residual + d])
//   bwd_reduce  g = dz*mask; dbeta = sum g; dgamma = sum g*(x - mean)*rstd; and the table `finish` of
//   bwd_apply   dx = A*g + B*(x - mean) + C
//   bwd_finish  the same table from sums that somebody else took
//   pool        y = mean of relu(a*x + b) over squares of 2x2; an odd last row or column is in none
//   pool_bwd    g = dy/4 of the square, masked; dx = a*g; sum g, sum g*(x - mean)*rstd; and y again
//   update_running  running <- (1 - momentum)*running + momentum*new, var unbiased
//
// mask is not(z <= 0) where the saved output z is given, else not(a*x + b <= 0) where the affine is, else 1;
// so a NaN passes. finish [6, C] holds A, B, C, mean and the a, b of the mask (0, 1 unless it comes from x):
// a convolution that reads it finishes dz as it loads it (grouped_conv.h). Rows (pixels) are cut into slabs
// by shape alone and their partial results merged in a fixed order in double: every result is bit-identical
// from run to run and for any number of threads.
#pragma once
#include "cpu/isa.h"
#include "tensor.h"

namespace gconv {

struct BatchNormShape {
  int64_t n, h, w, c;  // all activations of one op have this shape; n, h and w may be 0
};

struct BatchNormStatsParams {
  BatchNormShape shape;
  DType dtype;       // of x
  Isa isa;           // which set of kernels runs
  Nhwc x;            // incoming
  float* mean;       // outgoing [C]; NaN where there are no rows
  float* var;        // outgoing [C], biased; NaN where there are no rows
  float* workspace;  // batch_norm_stats_workspace() floats
};

struct BatchNormFoldParams {
  int64_t c;
  const float* mean;   // incoming [C]
  const float* var;    // incoming [C]
  const float* gamma;  // incoming [C]; null: 1
  const float* beta;   // incoming [C]; null: 0
  double eps;          // added to var
  float* rstd;         // outgoing [C]
  float* affine;       // outgoing [2, C]: a, b
};

struct BatchNormUpdateRunningParams {
  int64_t c;
  const float* mean;    // incoming [C], of the batch
  const float* var;     // incoming [C], of the batch, biased
  const float* shift;   // incoming [C], added to mean: the bias of the convolution before; null: 0
  int64_t count;        // values per channel in the batch, at least 2
  double momentum;      // weight of the batch
  float* running_mean;  // incoming and outgoing [C]
  float* running_var;   // incoming and outgoing [C]
};

struct BatchNormApplyParams {
  BatchNormShape shape;
  DType dtype;  // of x, residual and y
  Isa isa;
  Nhwc x;                        // incoming
  const float* affine;           // incoming [2, C]: a, b
  Nhwc residual;                 // incoming, added after the affine; data null: none
  const float* residual_affine;  // incoming [2, C]: c, d of an affine of the residual; null: none
  bool relu;                     // ReLU last
  Nhwc y;                        // outgoing
};

// A normalisation of x whose result took part in z.
struct BatchNormBwdBranch {
  Nhwc x;              // incoming: the input of the forward
  const float* mean;   // incoming [C]
  const float* rstd;   // incoming [C]
  const float* gamma;  // incoming [C]; null: 1
  float* dgamma;       // outgoing [C]
  float* finish;       // outgoing [6, C]: A, B, C, mean, a, b
};

struct BatchNormBwdReduceParams {
  BatchNormShape shape;
  DType dtype;  // of dz, x, z and g
  Isa isa;
  Nhwc dz;                   // incoming
  BatchNormBwdBranch main;   // the normalisation itself
  BatchNormBwdBranch other;  // another one added to it before the ReLU, as its residual; x.data null: none
  const float* affine;       // incoming [2, C]: a, b of the mask, of main.x; null, or unused beside z: none
  Nhwc z;                    // incoming: the output of the forward, for the mask; data null: none
  float* dbeta;              // outgoing [C]: of both
  Nhwc g;                    // outgoing: masked dz; data null: not wanted
  float* workspace;          // batch_norm_bwd_reduce_workspace() floats
};

struct BatchNormBwdFinishParams {
  int64_t c;
  const float* sums;   // incoming [2, C]: sum g, sum g*(x - mean)*rstd
  const float* mean;   // incoming [C]
  const float* rstd;   // incoming [C]
  const float* gamma;  // incoming [C]; null: 1
  int64_t count;       // values per channel, at least 1
  float* dgamma;       // outgoing [C]
  float* dbeta;        // outgoing [C]
  float* finish;       // outgoing [6, C]: A, B, C, mean, 0, 1
};

struct BatchNormBwdApplyParams {
  BatchNormShape shape;
  DType dtype;  // of dz, x, z, dx and g
  Isa isa;
  Nhwc dz;              // incoming
  Nhwc x;               // incoming
  const float* finish;  // incoming [6, C]: A, B, C, mean, a, b; a, b unused beside z
  Nhwc z;               // incoming, as in BatchNormBwdReduceParams
  Nhwc dx;              // outgoing
  Nhwc g;               // outgoing: masked dz, the gradient of the residual; data null: not wanted
};

struct BatchNormPoolParams {
  BatchNormShape shape;  // of x
  DType dtype;           // of x and y
  Isa isa;
  Nhwc x;               // incoming
  const float* affine;  // incoming [2, C]: a, b
  Nhwc y;               // outgoing, of the pooled shape

  BatchNormShape pooled() const { return {shape.n, shape.h / 2, shape.w / 2, shape.c}; }
};

struct BatchNormPoolBwdParams {
  BatchNormShape shape;  // of x and dx; h and w at least 2
  DType dtype;           // of dy, x, dx and y
  Isa isa;
  Nhwc dy;           // incoming, of the pooled shape
  Nhwc x;            // incoming
  const float* act;  // incoming [4, C]: a, b, mean, rstd
  Nhwc dx;           // outgoing: 0 in what is in no square
  float* sums;       // outgoing [2, C]: sum g, sum g*(x - mean)*rstd, g in float32
  Nhwc y;            // outgoing, of the pooled shape: the forward's; data null: not wanted
  float* workspace;  // batch_norm_pool_bwd_workspace() floats

  BatchNormShape pooled() const { return {shape.n, shape.h / 2, shape.w / 2, shape.c}; }
};

// A stage does the share `ith` of `nth` of its work; all shares of a stage must be done before the next
// begins.
int64_t batch_norm_stats_workspace(const BatchNormStatsParams& p);
void batch_norm_stats_cpu(const BatchNormStatsParams& p, int64_t ith, int64_t nth);
void batch_norm_stats_merge_cpu(const BatchNormStatsParams& p, int64_t ith, int64_t nth);

void batch_norm_fold_cpu(const BatchNormFoldParams& p, int64_t ith, int64_t nth);
void batch_norm_update_running_cpu(const BatchNormUpdateRunningParams& p, int64_t ith, int64_t nth);

void batch_norm_apply_cpu(const BatchNormApplyParams& p, int64_t ith, int64_t nth);

int64_t batch_norm_bwd_reduce_workspace(const BatchNormBwdReduceParams& p);
void batch_norm_bwd_reduce_cpu(const BatchNormBwdReduceParams& p, int64_t ith, int64_t nth);
void batch_norm_bwd_reduce_merge_cpu(const BatchNormBwdReduceParams& p, int64_t ith, int64_t nth);

void batch_norm_bwd_finish_cpu(const BatchNormBwdFinishParams& p, int64_t ith, int64_t nth);

void batch_norm_bwd_apply_cpu(const BatchNormBwdApplyParams& p, int64_t ith, int64_t nth);

void batch_norm_pool_cpu(const BatchNormPoolParams& p, int64_t ith, int64_t nth);

int64_t batch_norm_pool_bwd_workspace(const BatchNormPoolBwdParams& p);
void batch_norm_pool_bwd_cpu(const BatchNormPoolBwdParams& p, int64_t ith, int64_t nth);
void batch_norm_pool_bwd_merge_cpu(const BatchNormPoolBwdParams& p, int64_t ith, int64_t nth);

}  // namespace gconv
