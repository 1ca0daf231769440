// A one-hot vector drawn by the largest of logit + Gumbel noise, or softmax((logit + noise) / tau), and their
// gradient.
//
// Forward:  hard: y = 1 for the largest logit + noise, the lowest class where several are, and 0 elsewhere.
//           Else y = softmax((logits + noise) / tau).
// Backward: grad_logits = y (grad - sum_k y_k grad_k) / tau, of the soft y in either case: given as `y`, or
// made
//           again from logits and noise where that is absent.
//
// Layout: logits, noise and grad [*, K, *] with the classes in dimension `dim`, any strides, of one dtype
// (float32, float16, bfloat16); y and grad_logits of that dtype, contiguous in forward and backward; a y that
// is read has any strides. Without noise, the key int64 [2] or [B, 2], B the size of dimension 0, makes it.
//
// Numerics: float32. Sums of logit and noise are compared as their exact values, and so is what is divided by
// tau. Logits of inf, or all of -inf, are as the limit in which they go there together: the draw is among
// them. A position with a NaN has y = NaN.
#pragma once

#include "../common/view.h"

namespace genperf {

struct GumbelSoftmaxArgs {
  View logits, noise, key, y;
  View grad, grad_logits;  // backward
  int dim;
  double tau;
  bool hard;
};

void gumbel_softmax_forward_cpu(const GumbelSoftmaxArgs& args);
void gumbel_softmax_backward_cpu(const GumbelSoftmaxArgs& args);

}  // namespace genperf
