// The mass of a level under one logistic, for float and for vectors of floats, in steps: a caller takes each
// for all image channels before the next, since one channel's are a single long chain of operations.
#pragma once

#include "../common/mask.h"
#include "../common/math.h"

namespace genperf {
inline namespace GENPERF_ISA {

inline constexpr float kFar = 1.152921504606846976e18f;  // 2^60
inline constexpr float kNarrow = 1.0f;                   // widths below take a polynomial
inline constexpr float kLeast = 1e-5f;

// How a level's mass is defined; log_width = log(2 half).
struct LevelDefinition {
  float half, log_width, low, high, min_log_scale;
};

// x, and `least` where it is less, `most` where it is more; NaN stays NaN. One instruction of x86, which the
// compiler does not find.
GENPERF_HD float at_least(float x, float least) { return x < least ? least : x; }
GENPERF_HD float at_most(float x, float most) { return x > most ? most : x; }
#ifdef GENPERF_VECTORS
#if defined(__AVX512F__)
GENPERF_HD Nf at_least_native(Nf x, Nf least) { return (Nf)_mm512_max_ps((__m512)least, (__m512)x); }
GENPERF_HD Nf at_most_native(Nf x, Nf most) { return (Nf)_mm512_min_ps((__m512)most, (__m512)x); }
#elif defined(__AVX2__)
GENPERF_HD Nf at_least_native(Nf x, Nf least) { return (Nf)_mm256_max_ps((__m256)least, (__m256)x); }
GENPERF_HD Nf at_most_native(Nf x, Nf most) { return (Nf)_mm256_min_ps((__m256)most, (__m256)x); }
#elif defined(__x86_64__)
GENPERF_HD Nf at_least_native(Nf x, Nf least) { return (Nf)_mm_max_ps((__m128)least, (__m128)x); }
GENPERF_HD Nf at_most_native(Nf x, Nf most) { return (Nf)_mm_min_ps((__m128)most, (__m128)x); }
#else
GENPERF_HD Nf at_least_native(Nf x, Nf least) { return x < least ? least : x; }
GENPERF_HD Nf at_most_native(Nf x, Nf most) { return x > most ? most : x; }
#endif
GENPERF_HD Vf at_least(Vf x, float least) {
  return for_parts<Vf>([&](int i) { return at_least_native(x.part[i], Nf{} + least); });
}
GENPERF_HD Vf at_most(Vf x, float most) {
  return for_parts<Vf>([&](int i) { return at_most_native(x.part[i], Nf{} + most); });
}
#endif

// e^x for x <= 30, never less than e^-87; NaN stays NaN.
template <class F>
GENPERF_HD F exp_down(F x) {
  return exp_bounded(at_least(x, -87.0f));
}

// (1 - e^-w) / w for 0 <= w < kNarrow: a Chebyshev fit, and 1 at 0.
template <class F>
GENPERF_HD F narrow_mass(F w) {
  const F w2 = w * w;
  const F high =
      (0.166663662f - 4.16474678e-2f * w) + ((8.2762083e-3f - 1.30112644e-3f * w) + 1.29130916e-4f * w2) * w2;
  return (1.0f - 0.499999851f * w) + high * w2;
}

// 2^x for x <= 127, never less than 2^-125, to 2 ulp; NaN stays NaN. For weights next to 1: the rounding of a
// logarithm times log2(e) counts as much as that of the logarithm.
template <class F>
GENPERF_HD F exp2_down(F x) {
  x = at_least(x, -125.0f);
  const F shifted = x + 12582912.0f;  // adding 3 * 2^22 rounds to an integer
  const F f = x - (shifted - 12582912.0f), f2 = f * f;
  const F high = (5.55073358e-2f * f + 2.40222424e-1f) + (1.32647273e-3f * f + 9.67151299e-3f) * f2;
  const F y = (0.693147004f * f + 1.0f) + high * f2;
  return y * from_bits<F>((to_bits(shifted) << 23) + 0x3f800000);
}

// 1 / x of each of `n` numbers in [2^-20, 2^20], by one division.
template <int n, class F>
GENPERF_HD void reciprocals(const F* x, F* over) {
  static_assert(n == 1 || n == 3);
  if constexpr (n == 1) {
    over[0] = 1.0f / x[0];
  } else {
    const F first = x[0] * x[1], all = 1.0f / (first * x[2]), both = all * x[2];
    over[0] = both * x[1], over[1] = both * x[0], over[2] = all * first;
  }
}

// tanh(x) to within a rounding of 1, which is what a share of a value in [-1, 1] is worth; its derivative.
// u = e^-2|x|, over = 1 / (1 + u).
template <class F>
GENPERF_HD F share_exponential(F x) {
  return exp2_down(abs(x) * (-2.0f * kLog2E));
}
template <class F>
GENPERF_HD F share_of(F x, F u, F over, F& derivative) {
  const F t = (1.0f - u) * over;
  derivative = 4.0f * u * (over * over);
  return select(x < 0.0f, -t, t);
}

// The mass of a level: log p = exponent + log(ratio), ratio in [2e-2, 1]; and the derivatives of log p by
// x - mean and by the log-scale. The steps in order: scale, distance, parts, the division, finish.
template <bool kExact, bool kGradient, class F>
struct Level {
  F exponent, ratio, by_distance, by_log_scale;
  F denominator;

  GENPERF_HD void scale(F given, const LevelDefinition& d) {
    s = at_most(at_least(given, d.min_log_scale), kFar);
    inverse = exp_down(-s);
  }

  GENPERF_HD void distance(F x, F mean, const LevelDefinition& d) {
    signed_m = inverse * (x - mean);
    m = at_most(abs(signed_m), kFar);
    const F v = inverse * d.half;
    near = m - v, far = m + v, width = v + v;
    e_near = exp2_down(abs(near) * -kLog2E);
    narrow = width < kNarrow;
    mass = narrow_mass(width);
    e_width = 1.0f - width * mass;
    if (any(width >= kNarrow)) {
      const F e = exp2_down(width * -kLog2E);
      e_width = select(narrow, e_width, e), mass = select(narrow, mass, 1.0f - e);
    }
  }

  GENPERF_HD void parts() {
    const F zero = splat<F>(0.0f), one = splat<F>(1.0f);
    outside = near >= 0.0f;  // the mean is not in the level
    // e^-far is e_near e_width outside and e_width / e_near inside: with n = 1 and e_near, e^-far = b / n and
    // c = n (1 + e^-far). Inside a wide level it counts for nothing.
    const F e_rest = select(width > 40.0f, zero, e_width);
    n = select(outside, one, e_near), b = select(outside, e_near * e_width, e_rest), c = n + b;
    one_near = 1.0f + e_near;
    product = one_near * c;
    exponent = select(outside, -near, zero);
    denominator = product * mass;
    if constexpr (!kExact) {
      const F p = select(outside, e_near, one) * select(narrow, width, one) * mass * n;
      unlikely = p <= product * kLeast;
      // e^-m; inside a level as unlikely as that m is at most 2e-5.
      e_middle = select(outside, e_near * sqrt_rn(e_width), 1.0f - m);
      denominator = select(unlikely, square(1.0f + e_middle), denominator);
    }
  }

  // From `all` = 1 / denominator. `tails`: whether x may be of the first or the last level.
  GENPERF_HD void finish(F x, F given, F all, bool tails, const LevelDefinition& d) {
    const F zero = splat<F>(0.0f), one = splat<F>(1.0f);
    const auto below = signed_m < 0.0f;
    const F over = all * mass;  // 1 / product
    exponent = exponent + select(narrow, d.log_width - s, zero);
    ratio = mass * (n * over);
    [[maybe_unused]] F slope_far;  // sigmoid of -far
    if constexpr (kGradient) {
      slope_far = b * one_near * over;
      const F slope_near = n * c * over, by = inverse * (slope_far - slope_near);
      by_distance = select(below, -by, by);
      const F by_width = e_width * select(narrow, one, width) * (all * product);
      by_log_scale = near * slope_near - far * slope_far - by_width;
    }
    if constexpr (!kExact) {
      exponent = select(unlikely, d.log_width - s - m, exponent);
      ratio = select(unlikely, all, ratio);
      if constexpr (kGradient) {
        const F bend = (1.0f - e_middle) * (1.0f + e_middle) * all, by = inverse * bend;
        by_distance = select(unlikely, select(below, by, -by), by_distance);
        by_log_scale = select(unlikely, m * bend - 1.0f, by_log_scale);
      }
    }
    if (tails) {  // sigmoid(side m + v)
      const auto first = x <= d.low, last = x >= d.high;
      const F side = select(first, select(below, -m, m), select(below, m, -m)), outer = side + 0.5f * width;
      const auto beyond = side >= 0.0f;
      // 1 / (1 + e^-|outer|), |outer| being far or near.
      const F over_tail = 1.0f / select(beyond, c / n, one_near);
      const F tail_exponent = select(outer < 0.0f, outer, zero);
      exponent = select(first, tail_exponent, select(last, tail_exponent, exponent));
      ratio = select(first, over_tail, select(last, over_tail, ratio));
      if constexpr (kGradient) {
        const F slope = select(beyond, b / n, select(outer >= 0.0f, e_near, one)) * over_tail;
        const F by = inverse * slope, by_scale = -outer * slope;
        by_distance = select(first, by, select(last, -by, by_distance));
        by_log_scale = select(first, by_scale, select(last, by_scale, by_log_scale));
      }
    }
    if constexpr (kGradient) by_log_scale = select(given < d.min_log_scale, zero, by_log_scale);
    exponent = exponent + m * 0.0f;  // NaN, which the ratio does not tell
  }

 private:
  F s, inverse, signed_m, m, near, far, width, e_near, e_width;
  F mass, n, b, c, one_near, product, e_middle;
  decltype(F{} < F{}) narrow, outside, unlikely;
};

}  // namespace GENPERF_ISA
}  // namespace genperf
