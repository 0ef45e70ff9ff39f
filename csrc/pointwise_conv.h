// The contract of pointwise_conv: 1x1 convolution without padding or groups, forward and both gradients.
//
//   forward  y = w . act(x) at every pixel taken; y = relu?(c*y + d [+ residual]), or batch statistics of
//            y as stored
//   bwd      dx = w' . finish(dy) [+ residual]; with act: dx masked by the ReLU, and its two sums; with add:
//            a times it on top of what dx holds
//            dw = sum over pixels of finish(dy) (x) act(x)
//
// Of a stride's pixels the first is taken; dx is 0 (or the residual, or left alone by add) at the others.
// Activations may be slices of wider buffers. Work is cut by shape alone and partial results are merged in a
// fixed order, so every result is bit-identical from run to run and for any number of threads.
// Wide layers go by Strassen's algorithm where it pays: integers stay exact, rounding errors are small
// against the norm of an image's pixels, and an infinity may come out as NaN in its image. An image has the
// same bits alone and in a batch.
#pragma once
#include "cpu/isa.h"
#include "tensor.h"

namespace gconv {

struct PointwiseConvShape {
  int64_t n, h, w, c;          // input
  int64_t oh, ow, k;           // output; oh = (h - 1) / stride_h + 1
  int64_t stride_h, stride_w;  // 1 or 2
};

struct PointwiseConvFwdParams {
  PointwiseConvShape shape;
  DType dtype;          // of x, weight, residual and y
  Isa isa;              // which set of kernels runs
  Use strassen;         // whether Strassen's algorithm runs
  Nhwc x;               // incoming
  const void* weight;   // incoming [K, C]
  bool float_weight;    // weight is float32, and rounded to dtype as it is read
  const float* packed;  // incoming: what pointwise_conv_pack_weights_cpu made of weight, which is not read
                        //   then, nor does fwd_pack do anything; null: not given
  const float* act;     // incoming [2, C]: a, b of the prologue relu(a*x + b); null: identity
  const float* affine;  // incoming [2, K]: c, d of the epilogue; null: identity
  Nhwc residual;        // incoming, added after the affine; data null: none
  bool relu;            // ReLU last
  Nhwc y;               // outgoing
  float* mean;          // outgoing [K], with var: batch mean of y as stored; null: not wanted
  float* var;           // outgoing [K]: biased variance
  float* workspace;     // pointwise_conv_fwd_workspace() floats, 64-byte aligned
};

struct PointwiseConvBwdParams {
  PointwiseConvShape shape;
  DType dtype;  // of dy, y, x, weight, residual, dx and dweight
  Isa isa;
  Use strassen;
  Nhwc dy;              // incoming [N, K, OH, OW]
  Nhwc y;               // incoming, read with finish only
  const float* finish;  // incoming [6, K]: A, B, C, mean, a, b; null: dy as it is.
                        //   dy <- A*(dy*[not a*y + b <= 0]) + B*(y - mean) + C
  Nhwc x;               // incoming [N, C, H, W], read for dweight and with act
  const float* act;     // incoming [4, C]: a, b, mean, rstd; null: no prologue, no mask, no sums
  const void* weight;   // incoming [K, C], read for dx
  bool float_weight;    // weight, rounded to dtype as it is read, and dweight are float32
  Nhwc residual;        // incoming, added to dx, without act only; data null: none
  Nhwc dx;              // outgoing [N, C, H, W]; data null: not wanted
  bool add;             // with act: dx += a*g for the masked gradient g, the sums being those of g in float32
  float* sums;          // outgoing [2, C] with act and dx: sum dx, sum dx*(x - mean)*rstd
  void* dweight;        // outgoing [K, C]; null: not wanted
  float* workspace;     // pointwise_conv_bwd_workspace() floats, 64-byte aligned
};

// Each op is a chain of stages. A stage does the share `ith` of `nth` of its work; all shares of one
// stage must be done before the next begins.
int64_t pointwise_conv_fwd_workspace(const PointwiseConvFwdParams& p);
void pointwise_conv_fwd_pack_cpu(const PointwiseConvFwdParams& p, int64_t ith, int64_t nth);
void pointwise_conv_fwd_cpu(const PointwiseConvFwdParams& p, int64_t ith, int64_t nth);
void pointwise_conv_fwd_merge_cpu(const PointwiseConvFwdParams& p, int64_t ith, int64_t nth);  // if mean

// Weights packed ahead, for any number of forwards: pointwise_conv_packed_floats() floats into p.workspace,
// from shape, dtype, isa, strassen and weight alone. Those of two calls are alike where shape.c, shape.k and
// pointwise_conv_packing() are.
int64_t pointwise_conv_packing(const PointwiseConvFwdParams& p);
int64_t pointwise_conv_packed_floats(const PointwiseConvFwdParams& p);
void pointwise_conv_pack_weights_cpu(const PointwiseConvFwdParams& p, int64_t ith, int64_t nth);

int64_t pointwise_conv_bwd_workspace(const PointwiseConvBwdParams& p);
void pointwise_conv_bwd_pack_cpu(const PointwiseConvBwdParams& p, int64_t ith, int64_t nth);  // if dx
void pointwise_conv_bwd_cpu(const PointwiseConvBwdParams& p, int64_t ith, int64_t nth);
void pointwise_conv_bwd_merge_cpu(const PointwiseConvBwdParams& p, int64_t ith, int64_t nth);

}  // namespace gconv
