// 1 where a logit is above temperature log(u / (1 - u)) for a uniform u, else 0; NaN where the logit is NaN.
//
// logits: [*] float32, float16 or bfloat16, any strides. out: of that shape and dtype, contiguous. noise:
// uniforms of that shape, float32, any strides; or key: int64 [2], or [B, 2] with one for each sample.
#pragma once

#include "../common/view.h"

namespace genperf {

struct BernoulliSampleArgs {
  View out, logits, noise, key;
  float temperature;
};

void bernoulli_sample_cpu(const BernoulliSampleArgs& args);

}  // namespace genperf
