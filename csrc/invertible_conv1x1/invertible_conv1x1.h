// Activation normalization and an invertible 1x1 convolution: at each position
//
//   y = W diag(s) (x + b)            or, inverse,   y = diag(1/s) W' x - b,
//
// with s = scale, or exp(scale) for `log`, and b = shift; `matrix` is W, or W', the inverse of W. And for
// each sample logdet = +-n (logabsdet + sum log|s|), where n is the number of its positions.
//
// Backward: from x and the gradients by y and logdet those by x, matrix, logabsdet, shift and scale. Reverse:
// the same from y in place of x, and x besides; `undo` is the inverse of `matrix`.
//
// Layout: x, y and their gradients [B, C, *], of one dtype (float32, float16, bfloat16), each with any
// strides; the others float32 and contiguous: matrices [C, C], scale and shift [C], logdet [B], logabsdet [];
// lengths int64 [B], for tensors [B, C, N]: positions from there on are not read, are written as 0, and do
// not count. scale, shift and lengths may be absent, and gradients that are not wanted or not given.
//
// Numerics: parameters are folded in float64 and rounded once; x + b is rounded before the product, so that
// an offset cancels. An element of a product over channels is a chain of fused multiply-adds in float32 over
// at most 256 of them, added up in order: the same bits wherever its position stands. Sums over positions go
// by chunks of them, whose size follows from the shapes alone, and the chunks' sums are added in order in
// float64.
#pragma once

#include "../common/view.h"

namespace genperf {

struct InvertibleConv1x1Args {
  View source;  // x; reverse: y
  View matrix, undo, logabsdet, shift, scale, lengths;
  View grad_y, grad_logdet;
  View result, logdet;  // y; reverse: x
  View grad_x, grad_matrix, grad_logabsdet, grad_shift, grad_scale;
  bool log, inverse;
};

void invertible_conv1x1_forward_cpu(const InvertibleConv1x1Args& args);
void invertible_conv1x1_backward_cpu(const InvertibleConv1x1Args& args);

}  // namespace genperf
