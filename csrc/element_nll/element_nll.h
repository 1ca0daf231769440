// Negative log-likelihoods whose terms are an element's own: of a Bernoulli variable given its logit, and of
// a Gaussian given its mean and its log-variance or log-scale; with gradients.
//
//   bernoulli  |l| y + log(1 + e^-|l|) with y = 1 - x for l > 0, else x
//   gaussian   (d^2 + log 2 pi) / 2 + log sigma with d = (x - mean) / sigma, log sigma = factor s,
//              s = second within [low, high]
//
// Layout: first (logits or means), second (scales, for gaussian), x and their gradients [B, *] with any
// strides, float32, float16 or bfloat16 each; nll and grad_nll float32, contiguous, [B, *], [B] or [] for
// reduction 0, 1 and 2. Absent: what is not wanted. Without grad_nll, the upstream gradient is 1.
//
// Numerics: float32. 1 / sigma and |d| count as at most 2^60, so that all is finite for finite arguments.
// Sums go by chunks that follow from the shape of a sample (or for reduction 2 of all), in double precision.
#pragma once

#include "../common/view.h"

namespace genperf {

enum class ElementHead : int { kBernoulli, kGaussian };

struct ElementNllArgs {
  View first, second, x;
  View nll, grad_nll, grad_first, grad_second, grad_x;
  ElementHead head;
  float factor, low, high;
  int reduction;
};

void element_nll_cpu(const ElementNllArgs& args);

}  // namespace genperf
