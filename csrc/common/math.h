// Single-precision elementary functions, written once for every backend.
//
// Each function is a template over F: `float` (scalar host code and CUDA) or a block of 16 floats (the
// CPU kernels). Only IEEE +, -, *, /, sqrt, comparisons and integer operations are used, and the
// build forbids contraction into fused multiply-adds (-ffp-contract=off, -fmad=false), so the same
// input gives the same bits on every instruction set and on the GPU.
//
// The polynomials are those of S. L. Moshier's Cephes library (single precision), except q in
// exp_m1_mx, a Chebyshev fit of (e^x - 1 - x) / x^2 on [-1/2, 1/2].
#pragma once

#include "lanes.h"

namespace genperf {
inline namespace GENPERF_ISA {

inline constexpr float kLn2High = 0.693359375f;
inline constexpr float kLn2Low = -2.12194440e-4f;
inline constexpr float kLog2E = 1.44269504088896341f;
inline constexpr float kLog2Pi = 1.8378770664093453f;
inline constexpr int32_t kSignBit = INT32_MIN;
inline constexpr float kFloatMax = 3.402823466e+38f;

template <class F>
GENPERF_HD F square(F x) {
  return x * x;
}

// log(x) for a positive normal x. Input: x in [2^-126, inf). Output: within 1 ulp.
template <class F>
GENPERF_HD F log_normal(F x) {
  using I = IntOf<F>;
  // x = 2^e * m with m in [sqrt(1/2), sqrt(2)).
  const I sqrt_half = splat<I>(0x3f3504f3);
  I e = (to_bits(x) - sqrt_half) >> 23;
  F m = from_bits<F>(to_bits(x) - (e << 23));
  F fe = floats_of(e);
  F t = m - 1.0f;
  F z = t * t;
  F z2 = z * z;
  F low = (3.3333331174e-1f + -2.4999993993e-1f * t) + (2.0000714765e-1f + -1.6668057665e-1f * t) * z;
  F high = (1.4249322787e-1f + -1.2420140846e-1f * t) + (1.1676998740e-1f + -1.1514610310e-1f * t) * z;
  F y = low + (high + 7.0376836292e-2f * z2) * z2;
  y = y * t * z;
  y = y + fe * kLn2Low;
  y = y - 0.5f * z;
  return (t + y) + fe * kLn2High;
}

// log(x) for any x: -inf at 0, NaN below it, subnormals included.
template <class F>
GENPERF_HD F log(F x) {
  F tiny = select(x < 1.17549435e-38f, splat<F>(8388608.0f), splat<F>(1.0f));
  F y = log_normal(x * tiny) - select(x < 1.17549435e-38f, splat<F>(15.942385152878742f), splat<F>(0.0f));
  y = select(x == 0.0f, splat<F>(-kInfinity), y);
  y = select(x == kInfinity, x, y);
  return select(x >= 0.0f, y, splat<F>(kNaN));
}

// e^x = y 2^n. Input: |x| <= 104 or NaN. Output: y in [0.7, 1.5], and n as the low bits of `shifted`.
template <class F>
GENPERF_HD F exp_fraction(F x, F& shifted) {
  shifted = x * kLog2E + 12582912.0f;  // adding 3 * 2^22 rounds to an integer
  F n = shifted - 12582912.0f;
  F r = x - n * kLn2High;
  r = r - n * kLn2Low;
  F r2 = r * r;
  F y = (5.0000001201e-1f + 1.6666665459e-1f * r) + (4.1665795894e-2f + 8.3334519073e-3f * r) * r2;
  y = y + (1.3981999507e-3f + 1.9875691500e-4f * r) * (r2 * r2);
  return y * r2 + r + 1.0f;
}

// e^x for -87 <= x <= 88 or NaN: the same bits as exp.
template <class F>
GENPERF_HD F exp_bounded(F x) {
  F shifted;
  F y = exp_fraction(x, shifted);
  return y * from_bits<F>((to_bits(shifted) << 23) + 0x3f800000);
}

// e^x for any x, overflowing to inf and underflowing gradually to 0. NaN stays NaN.
template <class F>
GENPERF_HD F exp(F x) {
  F c = select(x > 89.0f, splat<F>(89.0f), x);
  c = select(c < -104.0f, splat<F>(-104.0f), c);
  F shifted;
  F y = exp_fraction(c, shifted);
  // 2^n in two factors, since n reaches 128 and -150.
  auto n = to_bits(shifted) - 0x4b400000;
  auto half = n >> 1;
  return y * from_bits<F>((half + 127) << 23) * from_bits<F>((n - half + 127) << 23);
}

// e^x - 1 - x, never negative, to a few ulp for every x, given e^x: the divergence of two Gaussians
// whose log-variances differ by x.
template <class F>
GENPERF_HD F exp_m1_mx(F x, F exp_x) {
  F x2 = x * x;
  F q = (0.5f + 1.666666716e-1f * x) + (4.166579247e-2f + 8.333181962e-3f * x) * x2;
  q = q + (1.398219727e-3f + 1.996218634e-4f * x) * (x2 * x2);
  return select(abs(x) <= 0.5f, q * x2, (exp_x - 1.0f) - x);
}

// e^x - 1 without cancellation, given e^x.
template <class F>
GENPERF_HD F exp_m1(F x, F exp_x) {
  return select(abs(x) <= 0.5f, exp_m1_mx(x, exp_x) + x, exp_x - 1.0f);
}

// log(1 + e^x) without overflow: x at inf, 0 at -inf.
template <class F>
GENPERF_HD F softplus(F x) {
  F y = exp(-abs(x));
  F u = 1.0f + y;
  F log1p = log_normal(u) + (y - (u - 1.0f)) / u;
  return select(x > 0.0f, x, splat<F>(0.0f)) + log1p;
}

// 1 / (1 + e^-x).
template <class F>
GENPERF_HD F sigmoid(F x) {
  F e = exp(-abs(x));
  return select(x >= 0.0f, splat<F>(1.0f), e) / (1.0f + e);
}

// tanh(x) and its derivative, from e^-2|x| - 1: neither 1 - tanh^2 nor a difference near 0 cancels.
template <class F>
GENPERF_HD F tanh(F x, F& derivative) {
  F a = -2.0f * abs(x);
  F u = exp(a);
  F e = exp_m1(a, u);
  F d = 2.0f + e;
  F t = -e / d;
  derivative = 4.0f * u / (d * d);
  return select(x < 0.0f, -t, t);
}

// cos and sin of 2 pi (k + 1/2) / 2^24, where k is the upper 24 bits of `word`. The quadrant is exact.
template <class F>
GENPERF_HD void cos_sin_of_turn(UintOf<F> word, F& cosine, F& sine) {
  using I = IntOf<F>;
  // The nearest axis in the upper two bits; from there, an angle in [-2^21, 2^21) of 2^22 a quadrant.
  I axis = (I)(word + 0x20000000u);
  I rest = (I)(word << 2) >> 10;
  F x = (floats_of(rest) + 0.5f) * 3.7450705e-7f;  // (pi / 2) 2^-22
  F z = x * x;
  F s = splat<F>(-1.9515295891e-4f);
  s = s * z + 8.3321608736e-3f;
  s = s * z + -1.6666654611e-1f;
  s = s * z * x + x;
  F c = splat<F>(2.443315711809948e-5f);
  c = c * z + -1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  c = c * z * z - 0.5f * z + 1.0f;
  auto odd = (I)((UintOf<F>)axis << 1) < 0;
  const I sign = splat<I>(kSignBit);
  I cosine_sign = (I)((UintOf<F>)axis + 0x40000000u) & sign;
  cosine = from_bits<F>(to_bits(select(odd, s, c)) ^ cosine_sign);
  sine = from_bits<F>(to_bits(select(odd, c, s)) ^ (axis & sign));
}

}  // namespace GENPERF_ISA
}  // namespace genperf
