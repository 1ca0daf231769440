// The mass of a level under one logistic, for float (CUDA) and for vectors of floats (CPU).
#pragma once

#include "../common/math.h"

namespace genperf {
inline namespace GENPERF_ISA {

inline constexpr float kFar = 1.152921504606846976e18f;  // 2^60
inline constexpr float kNarrow = 0.35f;                  // widths below take series
inline constexpr float kLeast = 1e-5f;

// How a level's mass is defined; log_width = log(2 half).
struct LevelDefinition {
  float half, log_width, low, high, min_log_scale;
};

// x, and `least` where it is less; NaN stays NaN. One instruction of x86, which the compiler does not find.
GENPERF_HD float at_least(float x, float least) { return x < least ? least : x; }
#ifdef GENPERF_VECTORS
GENPERF_HD Vf at_least(Vf x, float least) {
  return for_parts<Vf>([&](int i) {
#if defined(__AVX512F__)
    return (Nf)_mm512_max_ps(_mm512_set1_ps(least), (__m512)x.part[i]);
#elif defined(__AVX2__)
    return (Nf)_mm256_max_ps(_mm256_set1_ps(least), (__m256)x.part[i]);
#elif defined(__x86_64__)
    return (Nf)_mm_max_ps(_mm_set1_ps(least), (__m128)x.part[i]);
#else
    return x.part[i] < least ? Nf{} + least : x.part[i];
#endif
  });
}
#endif

// e^x for x <= 30, never less than e^-87; NaN stays NaN.
template <class F>
GENPERF_HD F exp_down(F x) {
  return exp_bounded(at_least(x, -87.0f));
}

// (1 - e^-w) / w for 0 <= w < kNarrow.
template <class F>
GENPERF_HD F narrow_mass(F w) {
  const F w2 = w * w;
  const F high = (4.1666667e-2f - 8.3333333e-3f * w) + (1.3888889e-3f - 1.9841270e-4f * w) * w2;
  return (1.0f - 0.5f * w) + (0.16666667f - w * high) * w2;
}

// tanh(x) to within a rounding of 1, which is what a share of a value in [-1, 1] is worth; its derivative.
template <class F>
GENPERF_HD F share_of(F x, F& derivative) {
  const F u = exp_down(-2.0f * abs(x)), over = 1.0f / (1.0f + u), t = (1.0f - u) * over;
  derivative = 4.0f * u * (over * over);
  return select(x < 0.0f, -t, t);
}

// log p = exponent + log(ratio), ratio in [2e-2, 1]; and the derivatives of log p by x - mean and by the
// log-scale.
template <class F>
struct LevelMass {
  F exponent, ratio, by_distance, by_log_scale;
};

// `kTails`: whether x may be of the first or the last level.
template <bool kExact, bool kGradient, bool kTails, class F>
GENPERF_HD LevelMass<F> level_mass(F x, F mean, F log_scale, const LevelDefinition& d) {
  const F zero = splat<F>(0.0f), one = splat<F>(1.0f);
  const auto held = log_scale < d.min_log_scale;
  F s = at_least(log_scale, d.min_log_scale);
  s = select(s > kFar, splat<F>(kFar), s);
  const F inverse = exp_down(-s), signed_m = inverse * (x - mean), v = inverse * d.half;
  const auto below = signed_m < 0.0f;
  F m = abs(signed_m);
  m = select(m > kFar, splat<F>(kFar), m);
  const F near = m - v, far = m + v, width = v + v;
  const auto outside = near >= 0.0f;  // the mean is not in the level
  const F e_near = exp_down(-abs(near)), e_width = exp_down(-width);
  const auto narrow = width < kNarrow;
  const F mass = select(narrow, narrow_mass(width), 1.0f - e_width);

  // e^-far is e_near e_width outside and e_width / e_near inside: with n = 1 and e_near, e^-far = b / n and
  // c = n (1 + e^-far). Inside a wide level it counts for nothing.
  const F e_rest = select(width > 40.0f, zero, e_width);
  const F n = select(outside, one, e_near), b = select(outside, e_near * e_width, e_rest), c = n + b;
  const F one_near = 1.0f + e_near;
  // One division for both, with a gradient or without: the same bits.
  const F product = one_near * c, all = 1.0f / (product * mass), over = all * mass;  // 1 / product

  LevelMass<F> r;
  r.exponent = select(outside, -near, zero) + select(narrow, d.log_width - s, zero);
  r.ratio = mass * (n * over);
  [[maybe_unused]] F slope_far, slope_near;  // sigmoid of -far and of near
  if constexpr (kGradient) {
    slope_far = b * one_near * over;
    slope_near = n * c * over;
    const F by = inverse * (slope_far - slope_near);
    r.by_distance = select(below, -by, by);
    const F by_width = e_width * select(narrow, one, width) * (all * product);
    r.by_log_scale = near * slope_near - far * slope_far - by_width;
  }
  if constexpr (!kExact) {
    const F p = select(outside, e_near, one) * select(narrow, width, one) * r.ratio;
    const auto unlikely = p <= kLeast;
    const F e = exp_down(-m), over_one = 1.0f / (1.0f + e);
    r.exponent = select(unlikely, d.log_width - s - m, r.exponent);
    r.ratio = select(unlikely, over_one * over_one, r.ratio);
    if constexpr (kGradient) {
      const F bend = (1.0f - e) * over_one, by = inverse * bend;
      r.by_distance = select(unlikely, select(below, by, -by), r.by_distance);
      r.by_log_scale = select(unlikely, m * bend - 1.0f, r.by_log_scale);
    }
  }

  if constexpr (kTails) {  // sigmoid(side m + v)
    const auto first = x <= d.low, last = x >= d.high;
    const F side = select(first, select(below, -m, m), select(below, m, -m)), outer = side + v;
    const auto beyond = side >= 0.0f;
    // 1 / (1 + e^-|outer|), |outer| being far or near.
    const F over_tail = select(beyond, n * one_near, c) * over;
    const F tail_exponent = select(outer < 0.0f, outer, zero);
    r.exponent = select(first, tail_exponent, select(last, tail_exponent, r.exponent));
    r.ratio = select(first, over_tail, select(last, over_tail, r.ratio));
    if constexpr (kGradient) {
      const F slope = select(beyond, b * one_near * over, select(outer >= 0.0f, e_near, one) * over_tail);
      const F by = inverse * slope, by_scale = -outer * slope;
      r.by_distance = select(first, by, select(last, -by, r.by_distance));
      r.by_log_scale = select(first, by_scale, select(last, by_scale, r.by_log_scale));
    }
  }
  if constexpr (kGradient) r.by_log_scale = select(held, zero, r.by_log_scale);
  r.exponent = r.exponent + m * 0.0f;  // NaN, which the logarithm of the ratio does not tell
  return r;
}

}  // namespace GENPERF_ISA
}  // namespace genperf
