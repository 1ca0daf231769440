// A logistic number of a uniform one, as public code draws the values of PixelCNN++.
#pragma once

#include "math.h"

namespace genperf {
inline namespace GENPERF_ISA {

template <class F>
GENPERF_HD F clamp(F x, float low, float high) {
  return select(x < low, splat<F>(low), select(x > high, splat<F>(high), x));
}

// Within [1e-5, 1 - 1e-5].
template <class F>
GENPERF_HD F inner_uniform(F u) {
  return clamp(u, 1e-5f, static_cast<float>(1 - 1e-5));
}

// Within [-1, 1]; `heat` multiplies the scale.
template <class F>
GENPERF_HD F logistic_value(F mean, F log_scale, F uniform, float min_log_scale, float heat) {
  const F u = inner_uniform(uniform);
  const F s = select(log_scale < min_log_scale, splat<F>(min_log_scale), log_scale);
  return clamp(mean + exp(s) * heat * (log_normal(u) - log_normal(1.0f - u)), -1.0f, 1.0f);
}

}  // namespace GENPERF_ISA
}  // namespace genperf
