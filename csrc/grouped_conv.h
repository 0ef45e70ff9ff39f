// The contract of grouped_conv: 3x3 convolution, any channels per group, forward and both gradients.
//
//   forward     y = conv(act(x), w); y = relu?(c*y + d [+ residual]), or batch statistics of y as stored
//   bwd_input   dx = conv_transpose(finish(dy), w); with act: dx masked by the ReLU, and its two sums
//   bwd_weight  dw = sum over pixels of act(x) (x) finish(dy)
//
// Padding comes after act: a tap outside the image is 0, never relu(shift).
// Wide groups at stride 1 go by Winograd's algorithm where it pays: integers stay exact, rounding errors
// within 1.3 of the direct algorithm's, and what is not finite stays at its pixels and channels, but an
// infinity (or a value within a factor of 4 of one) may become NaN. Work is cut by shape alone and partial
// results are merged in a fixed order, so every result is bit-identical from run to run and for any number of
// threads.
#pragma once
#include "cpu/isa.h"
#include "tensor.h"

namespace gconv {

struct GroupedConvShape {
  int64_t n, h, w, c;          // input, C channels in all groups together
  int64_t oh, ow, k;           // output, K channels in all groups together
  int64_t groups;              // divides c and k
  int64_t stride_h, stride_w;  // 1 or 2
  int64_t pad_h, pad_w;        // 0..2*dil, on both sides
  int64_t dil_h, dil_w;        // >= 1
};

// Weights [K, C/groups, 3, 3] as torch keeps them, contiguous or channels_last: strides in elements of the
// two inner indices, channel and tap (kh*3 + kw). An output channel's weights are always side by side.
struct WeightLayout {
  int64_t stride_c, stride_tap;
};

struct GroupedConvFwdParams {
  GroupedConvShape shape;
  DType dtype;          // of x, weight, residual and y
  Isa isa;              // which set of kernels runs
  Use winograd;         // whether Winograd's algorithm runs
  bool tf32;            // on CUDA: products of float32 may be rounded to TF32
  Nhwc x;               // incoming
  const void* weight;   // incoming [K, C/groups, 3, 3]
  WeightLayout layout;  // of weight
  bool float_weight;    // on the CPU: weight is float32, and rounded to dtype as it is read
  const float* packed;  // incoming, on the CPU: what grouped_conv_pack_weights_cpu made of weight, which is
                        //   not read then, nor does fwd_pack do anything; null: not given
  const float* act;     // incoming [2, C]: a, b of the prologue relu(a*x + b); null: identity
  const float* affine;  // incoming [2, K]: c, d of the epilogue; null: identity
  Nhwc residual;        // incoming, added after the affine; data null: none
  bool relu;            // ReLU last
  Nhwc y;               // outgoing
  float* mean;          // outgoing [K], with var: batch mean of y as stored; null: not wanted
  float* var;           // outgoing [K]: biased variance
  float* workspace;     // grouped_conv_fwd_workspace() floats, 64-byte aligned
};

struct GroupedConvBwdInputParams {
  GroupedConvShape shape;
  DType dtype;  // of dy, y, weight, x and dx
  Isa isa;
  Use winograd;
  bool tf32;
  Nhwc dy;              // incoming [N, K, OH, OW]
  Nhwc y;               // incoming, read with finish only
  const float* finish;  // incoming [6, K]: A, B, C, mean, a, b; null: dy as it is.
                        //   dy <- A*(dy*[not a*y + b <= 0]) + B*(y - mean) + C
  const void* weight;   // incoming [K, C/groups, 3, 3]
  WeightLayout layout;  // of weight
  bool float_weight;    // on the CPU: weight is float32, and rounded to dtype as it is read
  Nhwc x;               // incoming raw input, read with act only
  const float* act;     // incoming [4, C]: a, b, mean, rstd; null: no mask, no sums
  Nhwc dx;              // outgoing [N, C, H, W]
  float* sums;          // outgoing [2, C] with act: sum g, sum g*(x - mean)*rstd
  float* workspace;     // grouped_conv_bwd_input_workspace() floats, 64-byte aligned
};

struct GroupedConvBwdWeightParams {
  GroupedConvShape shape;
  DType dtype;  // of dy, y, x and dweight
  Isa isa;
  Use winograd;
  bool tf32;
  Nhwc dy;              // incoming [N, K, OH, OW]
  Nhwc y;               // incoming, read with finish only
  const float* finish;  // incoming [6, K] as in GroupedConvBwdInputParams
  Nhwc x;               // incoming [N, C, H, W]
  const float* act;     // incoming [2, C]: prologue relu(a*x + b) on x; null: identity
  void* dweight;        // outgoing [K, C/groups, 3, 3]
  WeightLayout layout;  // of dweight
  bool float_weight;    // on the CPU: dweight is float32
  float* workspace;     // grouped_conv_bwd_weight_workspace() floats, 64-byte aligned
};

// Both gradients of one convolution: `input` and `weight` agree in all that they share.
struct GroupedConvBwdParams {
  GroupedConvBwdInputParams input;
  GroupedConvBwdWeightParams weight;
};

// Each op is a chain of stages. A stage does the share `ith` of `nth` of its work; all shares of one
// stage must be done before the next begins.
int64_t grouped_conv_fwd_workspace(const GroupedConvFwdParams& p);
void grouped_conv_fwd_pack_cpu(const GroupedConvFwdParams& p, int64_t ith, int64_t nth);
void grouped_conv_fwd_cpu(const GroupedConvFwdParams& p, int64_t ith, int64_t nth);
void grouped_conv_fwd_merge_cpu(const GroupedConvFwdParams& p, int64_t ith, int64_t nth);  // if mean

// Weights packed ahead, for any number of forwards: grouped_conv_packed_floats() floats into p.workspace,
// from shape, dtype, isa, winograd, weight and layout alone. Those of two calls are alike where c, k and
// groups of the shape and grouped_conv_packing() are.
int64_t grouped_conv_packing(const GroupedConvFwdParams& p);
int64_t grouped_conv_packed_floats(const GroupedConvFwdParams& p);
void grouped_conv_pack_weights_cpu(const GroupedConvFwdParams& p, int64_t ith, int64_t nth);

int64_t grouped_conv_bwd_input_workspace(const GroupedConvBwdInputParams& p);
void grouped_conv_bwd_input_pack_cpu(const GroupedConvBwdInputParams& p, int64_t ith, int64_t nth);
void grouped_conv_bwd_input_cpu(const GroupedConvBwdInputParams& p, int64_t ith, int64_t nth);
void grouped_conv_bwd_input_merge_cpu(const GroupedConvBwdInputParams& p, int64_t ith,
                                      int64_t nth);  // if sums

int64_t grouped_conv_bwd_weight_workspace(const GroupedConvBwdWeightParams& p);
void grouped_conv_bwd_weight_cpu(const GroupedConvBwdWeightParams& p, int64_t ith, int64_t nth);
void grouped_conv_bwd_weight_merge_cpu(const GroupedConvBwdWeightParams& p, int64_t ith, int64_t nth);

// In place of grouped_conv_bwd_input_cpu and grouped_conv_bwd_weight_cpu.
void grouped_conv_bwd_cpu(const GroupedConvBwdParams& p, int64_t ith, int64_t nth);

// The same ops on the current CUDA device, all stages in one call: started on `stream`, a cudaStream_t, and
// not waited for. isa and winograd are not looked at. The workspace, in floats, is 512-byte aligned. Throws
// what a launch reports.
int64_t grouped_conv_fwd_workspace_cuda(const GroupedConvFwdParams& p);
void grouped_conv_fwd_cuda(const GroupedConvFwdParams& p, void* stream);
int64_t grouped_conv_bwd_input_workspace_cuda(const GroupedConvBwdInputParams& p);
void grouped_conv_bwd_input_cuda(const GroupedConvBwdInputParams& p, void* stream);
int64_t grouped_conv_bwd_weight_workspace_cuda(const GroupedConvBwdWeightParams& p);
void grouped_conv_bwd_weight_cuda(const GroupedConvBwdWeightParams& p, void* stream);

}  // namespace gconv
