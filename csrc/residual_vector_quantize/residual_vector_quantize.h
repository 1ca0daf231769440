// Residual vector quantization: stage i takes the nearest codeword c_i of r_i, and leaves r_{i+1} = r_i -
// c_i.
//
// Layout: x, quantized, grad and grad_x [groups, *, D] with any strides, of one dtype (float32, float16,
// bfloat16); `codebooks` those of all stages [K, D] of the first group, then of the second, and so on, with
// any strides, of the same dtype; indices [groups, *, stages] int64, contiguous, -1 where a stage is left
// out; limits [*] int64, contiguous, the number of stages of each vector, or absent; squares and coefficients
// [groups, stages] float32, contiguous.
//
// Numerics: float32; r_{i+1} is rounded to the dtype of x. Indices are those of vq_nearest.h. What is summed
// over vectors is summed in double, or in a fixed order (statistics), and depends neither on the number of
// threads nor on the instruction set.
#pragma once

#include "../vq_nearest/vq_nearest.h"

namespace genperf {

struct ResidualArgs {
  View x;
  const View* codebooks;
  int64_t n_codebooks;
};

// quantized: c_0 + c_1 + ..., NaN where x is not finite. squares: the sums over all vectors of |r_i - c_i|^2,
// not rounded to the dtype of x.
struct ResidualQuantizeArgs : ResidualArgs {
  View limits, quantized, indices, squares;
  int64_t n_stages;
  Metric metric;
};
void residual_vector_quantize_cpu(const ResidualQuantizeArgs& args);

// The gradient by x: of the losses' squares, whose coefficients are given, and of `quantized`, which
// `rotation` or else the straight-through estimator takes to the r_i, or, `of_sum`, to x. A fraction of it
// goes through r_{i+1} = r_i - c_i to c_i.
struct ResidualBackwardArgs : ResidualArgs {
  View grad, coefficients, indices, grad_x;
  bool rotation, of_sum;
  float fraction;
};
void residual_vector_quantize_backward_cpu(const ResidualBackwardArgs& args);

// How often each codeword was chosen, counts [all K], and the sums [all K, D] of the r_i that chose it, or of
// the `differences` r_i - c_i; float32, contiguous.
struct ResidualStatisticsArgs : ResidualArgs {
  View indices, counts, sums;
  bool differences;
};
void residual_codebook_statistics_cpu(const ResidualStatisticsArgs& args);

}  // namespace genperf
