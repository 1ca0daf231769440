// Vector quantization around a search for the nearest codewords: the codewords, the mean squares of what is
// lost, counts, and the gradients.
//
// Layout: x [heads, *, D] and codebook [heads, K, D] with any strides, of one dtype (float32, float16,
// bfloat16); quantized, grad and grad_x like x. indices and mask (0 or 1) [heads, *] int64 with any strides,
// chosen the same contiguous, -1 for a vector that is left out. counts int64 [heads, K] and grad_codebook
// [heads, K, D] contiguous. squares float32, contiguous, and its gradients: [], [heads, B] or [heads, *],
// by `reduction`. Where indices is absent, the nearest are sought.
//
// Numerics: float32, in which the terms of a vector are summed; sums over vectors in double. All in an order
// that follows from the shapes.
#pragma once

#include "../vq_nearest/vq_nearest.h"

namespace genperf {

enum class Reduction : int { kMean, kSample, kNone };

struct QuantizeArgs {
  View x, codebook, indices, mask;          // the last two may be absent
  View quantized, chosen, squares, counts;  // the last may be absent
  Metric metric;
  Reduction reduction;
};

struct QuantizeBackwardArgs {
  View grad, of_commitment, of_codebook;  // of quantized and of squares; may be absent
  View x, codebook, chosen;
  View grad_x, grad_codebook;  // may be absent
  Reduction reduction;
  bool rotation;
};

void vector_quantize_forward_cpu(const QuantizeArgs& args);
void vector_quantize_backward_cpu(const QuantizeBackwardArgs& args);

}  // namespace genperf
