// scale N(mean, std^2) between two bounds, from one uniform each by the inverse of the distribution function.
//
// out: [*] float32, float16 or bfloat16, contiguous. noise: uniforms of that shape, float32, any strides; or
// key: int64 [2], or [B, 2] with one for each sample (dimension 0). The numbers of the law are made on the
// host (genperf/ops/_truncated_normal_reference.py, which has the formulas):
//
//   kind 0      the body: q of both bounds (their probabilities less 1/2), the probability between them,
//   those
//               of the tails below and above, mean, step
//   kind 1, 2   upper and lower far tail: share of the tail between the bounds, share beyond, 1 / a^2 for the
//               nearer bound a in standard deviations, step (signed), that bound
//   last two    bounds of the result, numbers of its dtype
//
// Numerics: float32, each operation rounded by itself: the same bits on every backend.
#pragma once

#include "../common/view.h"

namespace genperf {

struct TruncatedNormalArgs {
  View out, noise, key;
  int kind;
  float constants[9];
};

void truncated_normal_cpu(const TruncatedNormalArgs& args);

}  // namespace genperf
