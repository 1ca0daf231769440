// The mass of a level under one logistic, for float (CUDA) and for vectors of floats (CPU).
#pragma once

#include "../common/math.h"

namespace genperf {
inline namespace GENPERF_ISA {

inline constexpr float kFar = 1.152921504606846976e18f;  // 2^60
inline constexpr float kNarrow = 1e-3f;                  // widths below take series
inline constexpr float kLeast = 1e-5f;

// How a level's mass is defined; log_width = log(2 half).
struct LevelDefinition {
  float half, log_width, low, high, min_log_scale;
};

// e^x for x <= 0, never less than e^-87; NaN stays NaN.
template <class F>
GENPERF_HD F exp_down(F x) {
  return exp_bounded(select(x < -87.0f, splat<F>(-87.0f), x));
}

// log p = exponent + log(ratio), ratio in [2e-4, 1]; and the derivatives of log p by x - mean and by the
// log-scale.
template <class F>
struct LevelMass {
  F exponent, ratio, by_distance, by_log_scale;
};

template <bool kExact, bool kGradient, class F>
GENPERF_HD LevelMass<F> level_mass(F x, F mean, F log_scale, const LevelDefinition& d) {
  const F zero = splat<F>(0.0f), one = splat<F>(1.0f);
  F distance = x - mean;
  distance = select(distance > kFar, splat<F>(kFar), distance);
  distance = select(distance < -kFar, splat<F>(-kFar), distance);
  const auto held = log_scale < d.min_log_scale;
  F s = select(held, splat<F>(d.min_log_scale), log_scale);
  s = select(s > kFar, splat<F>(kFar), s);

  const F inverse = exp_down(-s), m = inverse * distance, v = inverse * d.half, far_distance = abs(m);
  const F near = far_distance - v, far = far_distance + v, width = v + v;
  const auto outside = near >= 0.0f;  // the mean is not in the level
  const F e_near = exp_down(-abs(near)), e_far = exp_down(-far), e_width = exp_down(-width);
  const F mass = -exp_m1(-width, e_width);
  const auto narrow = width < kNarrow;
  const F one_near = 1.0f + e_near, one_far = 1.0f + e_far, over = 1.0f / (one_near * one_far);

  LevelMass<F> r;
  r.exponent = select(outside, -near, zero) + select(narrow, d.log_width - s, zero);
  // Of a narrow level, mass / width.
  r.ratio = select(narrow, 1.0f - width * (0.5f - width * 0.166666667f), mass) * over;
  [[maybe_unused]] F slope_far, slope_near;  // sigmoid of -far and of near
  if constexpr (kGradient) {
    slope_far = e_far * one_near * over;
    slope_near = select(outside, one, e_near) * one_far * over;
    const F by_width = select(narrow, 1.0f - width * (0.5f - width * 0.0833333333f), width * e_width / mass);
    const F difference = slope_far - slope_near;
    r.by_distance = inverse * select(m < 0.0f, -difference, difference);
    r.by_log_scale = near * slope_near - far * slope_far - by_width;
  }
  if constexpr (!kExact) {
    const F p = select(outside, e_near, one) * select(narrow, width, one) * r.ratio;
    // NaN goes this way as well.
    const auto unlikely = p <= kLeast;
    const F e = exp_down(-far_distance), over_one = 1.0f / (1.0f + e);
    r.exponent = select(unlikely, d.log_width - s - far_distance, r.exponent);
    r.ratio = select(unlikely, over_one * over_one, r.ratio);
    if constexpr (kGradient) {
      const F bend = (1.0f - e) * over_one, by = inverse * bend;
      r.by_distance = select(unlikely, select(m < 0.0f, by, -by), r.by_distance);
      r.by_log_scale = select(unlikely, far_distance * bend - 1.0f, r.by_log_scale);
    }
  }

  // The tails: sigmoid(side + v).
  const auto first = x <= d.low, last = x >= d.high;
  const F side = select(first, m, -m), outer = side + v;
  const auto beyond = side >= 0.0f;
  const F e_tail = select(beyond, e_far, e_near), over_tail = select(beyond, one_near, one_far) * over;
  const F tail_exponent = select(outer < 0.0f, outer, zero);
  r.exponent = select(first, tail_exponent, select(last, tail_exponent, r.exponent));
  r.ratio = select(first, over_tail, select(last, over_tail, r.ratio));
  if constexpr (kGradient) {
    const F slope = select(outer >= 0.0f, e_tail, one) * over_tail, by = inverse * slope;
    r.by_distance = select(first, by, select(last, -by, r.by_distance));
    const F by_scale = -outer * slope;
    r.by_log_scale = select(first, by_scale, select(last, by_scale, r.by_log_scale));
    r.by_log_scale = select(held, zero, r.by_log_scale);
  }
  r.exponent = r.exponent + m * 0.0f;  // NaN, which the logarithm of the ratio does not tell
  return r;
}

}  // namespace GENPERF_ISA
}  // namespace genperf
