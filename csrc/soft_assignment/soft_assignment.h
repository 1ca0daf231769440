// What losses need of softmax(s) over a codebook, where the score s of vector x and codeword c is
//
//   kL2         -|x - c|^2 / temperature
//   kCosine     x.c / (|x| |c|) / temperature, 0 with a zero vector
//   kDot        x.c / temperature
//   kEuclidean  -max(|x - c|, 1e-4) / temperature, without gradient where the distance is less
//
// Forward: of each vector log sum exp(s), the entropy of p = softmax(s) in nats, and the negative
// log-likelihood of its target (0 for the target -1); and the mean of p over the vectors. Backward: the
// gradients by x and codebook.
//
// Layout: x [heads, *, D] and codebook [heads, K, D] with any strides, of one dtype (float32, float16,
// bfloat16); targets int64 [heads, *], mean_prob float32 [heads, K], all others float32 [heads, *]; all
// contiguous, and absent where not wanted or not given, except log_sum_exp and entropy. Gradients by x and
// codebook are contiguous and of their dtype.
//
// Numerics: float32, with sums over more than some hundred terms in parts. Codewords, and for
// distances vectors too, are taken less the mean of the codebook where that is long: an offset cancels. Sums
// over vectors go by chunks of them, whose number follows from the shapes alone, and the chunks' sums are
// added in order.
#pragma once

#include "../common/view.h"

namespace genperf {

enum class Score : int { kL2, kCosine, kDot, kEuclidean };

struct SoftAssignmentArgs {
  View x, codebook, targets;
  View log_sum_exp, entropy, mean_prob, nll;  // results, or backward the cotangents; then all may be absent
  View grad_x, grad_codebook;
  Score score;
  double temperature;
};

void soft_assignment_forward_cpu(const SoftAssignmentArgs& args);
void soft_assignment_backward_cpu(const SoftAssignmentArgs& args);

}  // namespace genperf
