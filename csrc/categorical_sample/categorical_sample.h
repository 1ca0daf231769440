// Classes drawn from logits, log-probabilities of classes, and their gradient.
//
// Layout: logits [*, K] of float32, float16 or bfloat16, any strides, K < 2^31 - 16; of_logits the same.
// noise float32 or float64, index int64, log_prob and grad float32: [*], contiguous. Without noise the key,
// int64 [2] or [B, 2] with one for each index of the first dimension, makes the uniforms of its rows.
//
// Numerics: genperf/ops/_inverse_cdf.py in float32. Of logits, the weights exp((logit - max) / temperature)
// are summed in a tree of 16 children a node, of which the leaves are not stored: a draw computes one block
// of 16 again. Where a row has nothing to choose from, the class is 0, the log-probability and the gradient
// NaN.
#pragma once

#include "../common/view.h"

namespace genperf {

struct CategoricalArgs {
  View logits, noise, key, index, log_prob, grad, of_logits;
  float temperature;
  int64_t top_k;  // 0: all
  float top_p;
};

// Writes index and, unless it is absent, log_prob.
void categorical_sample_cpu(const CategoricalArgs& args);
// Reads index, writes log_prob: NaN for an index that is no class.
void categorical_log_prob_cpu(const CategoricalArgs& args);
// Reads index and grad, writes of_logits.
void categorical_log_prob_backward_cpu(const CategoricalArgs& args);

}  // namespace genperf
