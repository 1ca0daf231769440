// Negative log-likelihood of images under a discretized mixture of logistics, and its gradients.
//
//   nll = logsumexp_k logit_k - logsumexp_k (logit_k + sum_c log p_kc)
// With m = (x - mean) e^-s, v = half e^-s and s the log-scale, the mass of a level is
//   p = sigmoid(m + v) - sigmoid(m - v) = sinh v / (cosh m + cosh v)
//     = e^-max(|m| - v, 0) (1 - e^-2v) / ((1 + e^-||m| - v|) (1 + e^-(|m| + v)))
// that of the first sigmoid(m + v), of the last sigmoid(v - m). Not `exact`: where p <= 1e-5, it is the
// density times the width of a level, 2 v e^-|m| / (1 + e^-|m|)^2.
//
// Layout: params [B, P, *] with any strides, float32, float16 or bfloat16, its P channels as genperf's
// LogisticMixture has them: K logits (if `logits`), then for each image channel K means, K log-scales and,
// for three, K coefficients. x [B, C, *] with any strides, C = 1 or 3, in [-1, 1], or [0, 1] if `unit`. nll,
// grad_nll: float32, of shape [B, *] contiguous, [B] or [], by `reduction`. The gradients have the dtypes of
// params and x, and any strides; absent where not wanted.
//
// Numerics: float32. |m| and s count as at most 2^60, so that nothing overflows. Sums over pixels are
// made in double, in an order that follows from the sample's shape alone.
#pragma once

#include "../common/view.h"

namespace genperf {

struct MixtureLogisticNllArgs {
  View params, x;
  View nll;                            // forward; backward: absent, or wanted as well
  View grad_nll, grad_params, grad_x;  // backward
  int64_t mixtures;
  bool logits;
  float half, low, high;  // half the distance of levels; values at which the tails begin
  bool exact, unit;
  float min_log_scale;
  int reduction;  // 0: none, 1: by sample, 2: all
};

void mixture_logistic_nll_forward_cpu(const MixtureLogisticNllArgs& args);
void mixture_logistic_nll_backward_cpu(const MixtureLogisticNllArgs& args);

}  // namespace genperf
