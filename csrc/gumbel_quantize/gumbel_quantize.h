// A codeword for each position of an image of logits, drawn by the largest of logit + Gumbel noise, or their
// mix by y = softmax((logit + noise) / temperature); and KL(softmax(logits) || uniform).
//
// Forward:  indices = argmax_k (logits_k + noise_k), the lowest where several are; or, if `mix` is given,
//           mix = sum_k y_k codebook_k too. kl = log K + sum_k q_k log q_k with q = softmax(logits).
// Backward: grad_logits of mix (whether it or a codeword alone was given out: the straight-through estimator)
//           and kl; grad_codebook = sum of y times grad_mix, if given, for the mix.
//
// Layout: logits, noise and grad_logits [B, K, P] with any strides, of one dtype (float32, float16,
// bfloat16); codebook [K, D] and grad_mix [B, D, P] of that dtype with any strides; mix and grad_codebook
// float32, contiguous; indices int64 and kl, grad_kl float32 [B, P], contiguous. Absent: what is not wanted
// or not given. Without noise, the key int64 [2] or [B, 2] makes it.
//
// Numerics: float32. The largest is taken away before the division by the temperature, so nothing overflows;
// a position with a NaN has the index -1. Sums over positions go by chunks that follow from the shapes alone,
// and the chunks' sums are added in order.
#pragma once

#include "../common/view.h"

namespace genperf {

struct GumbelQuantizeArgs {
  View logits, codebook, noise, key;
  View indices, kl, mix;  // forward
  View grad_mix, grad_kl, grad_logits, grad_codebook;
  double temperature;
};

void gumbel_quantize_forward_cpu(const GumbelQuantizeArgs& args);
void gumbel_quantize_backward_cpu(const GumbelQuantizeArgs& args);

}  // namespace genperf
