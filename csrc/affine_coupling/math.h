// The element-wise math of affine_coupling, on vectors of floats.
#pragma once

#include "../common/chunk.h"
#include "../common/math.h"
#include "affine_coupling.h"

namespace genperf {
inline namespace GENPERF_ISA {

struct CouplingParameters {
  float shift_factor, prefactor, offset, eps, clamp, slope;
  bool from_output;
  // log s = term log_unit + log_sign log(1 + factor), see CouplingFactor.
  double log_unit = 1.0, log_sign = 0.0;

  explicit CouplingParameters(const CouplingArgs& a)
      : shift_factor(a.sign * a.prefactor),
        prefactor(a.prefactor),
        offset(a.offset),
        eps(a.eps),
        clamp(a.clamp),
        slope(a.slope),
        from_output(a.from_output) {
    if (a.scale == CouplingScale::kSigmoid && a.eps == 0.0f) log_sign = -1.0;
    if ((a.scale == CouplingScale::kSigmoid || a.scale == CouplingScale::kSoftplus) && by_exponent())
      log_unit = 0.69314718055994531, log_sign = 1.0;
  }

  // s is never subnormal.
  GENPERF_HD bool by_exponent() const { return eps > 1e-30f; }
};

// e^x for x <= 0 or NaN: the same bits as exp, in fewer operations.
template <class F>
GENPERF_HD F exp_negative(F x) {
  F shifted;
  F y = exp_fraction(select(x < -104.0f, splat<F>(-104.0f), x), shifted);
  // 2^(n + 100), a normal number, and 2^-100.
  return y * from_bits<F>((to_bits(shifted) << 23) + 0x71800000) * 7.888609052210118e-31f;
}

// s(u), its logarithm in two parts, and the derivative of that by u. A sum of logarithms is one of terms and
// one logarithm of a product, which is a fraction of the work. A compiler leaves out what is not used.
template <class F>
struct CouplingFactor {
  F scale, term, factor, derivative;
};

// Parts of the logarithm: exponent and mantissa.
template <class F>
GENPERF_HD CouplingFactor<F> by_exponent(F scale, F derivative) {
  const auto exponent = (to_bits(scale) >> 23) - 127;
  const F mantissa = from_bits<F>(to_bits(scale) - (exponent << 23));
  const auto finite = scale <= kFloatMax;
  return {scale, select(finite, floats_of(exponent), scale), select(finite, mantissa - 1.0f, splat<F>(0.0f)),
          derivative};
}

template <CouplingScale kScale, class F>
GENPERF_HD CouplingFactor<F> coupling_factor(F u, const CouplingParameters& p) {
  const F one = splat<F>(1.0f), zero = splat<F>(0.0f);
  if constexpr (kScale == CouplingScale::kAdditive) {
    return {one, zero, zero, zero};
  } else if constexpr (kScale == CouplingScale::kSigmoid) {
    u = u + p.offset;
    const F e = exp_negative(-abs(u)), large = 1.0f / (1.0f + e), small = e * large;
    const auto positive = u >= 0.0f;
    const F sigmoid = select(positive, large, small), complement = select(positive, small, large);
    if (p.eps == 0.0f) return {sigmoid, select(u < 0.0f, u, zero), e, complement};
    const F scale = sigmoid + p.eps, slope = sigmoid * complement / scale;
    if (p.by_exponent()) return by_exponent(scale, slope);
    return {scale, log(scale), zero, slope};
  } else if constexpr (kScale == CouplingScale::kExp) {
    return {exp(u), u, zero, one};
  } else if constexpr (kScale == CouplingScale::kTanh) {
    F derivative;
    const F log_scale = p.clamp * tanh(p.slope * u, derivative);
    return {exp(log_scale), log_scale, zero, p.clamp * p.slope * derivative};
  } else {
    const F sum = softplus(u) + p.eps;
    const F scale = select(sum > p.clamp, splat<F>(p.clamp), sum);
    const F slope = select(sum <= p.clamp, sigmoid(u), zero) / scale;
    if (p.by_exponent()) return by_exponent(scale, slope);
    const auto small = u < -17.0f;  // log softplus(u) = u - e^u / 2 + ...
    if (p.eps == 0.0f) return {scale, select(small, u, log(scale)), zero, select(small, one, slope)};
    return {scale, log(scale), zero, slope};
  }
}

template <bool kReciprocal, class F>
GENPERF_HD F times(F x, F scale) {
  return kReciprocal ? x / scale : x * scale;
}

// The sum of log s over n elements, at most kChunk, from its parts. The product of so many factors of at most
// 2 is a double's.
inline double log_scale_sum(const float* terms, const float* factors, int n, const CouplingParameters& p) {
  double sum = sum_chunk(terms, n) * p.log_unit;
  if (p.log_sign == 0.0) return sum;
  constexpr int kDoubles = kNativeBytes / sizeof(double);
  typedef double Doubles __attribute__((vector_size(kNativeBytes)));
  typedef float Floats __attribute__((vector_size(kNativeBytes / 2)));
  Doubles products[kPad / kDoubles];
  for (Doubles& x : products) x = Doubles{} + 1.0;
  int i = 0;
  for (; i + kPad <= n; i += kPad) {
    for (int j = 0; j < kPad / kDoubles; ++j) {
      Floats x;
      std::memcpy(&x, factors + i + j * kDoubles, sizeof x);
      products[j] *= 1.0 + __builtin_convertvector(x, Doubles);
    }
  }
  double lanes[kPad], product = 1.0;
  std::memcpy(lanes, products, sizeof lanes);
  for (double lane : lanes) product *= lane;
  for (; i < n; ++i) product *= 1.0 + static_cast<double>(factors[i]);
  return sum + p.log_sign * std::log(product);
}

}  // namespace GENPERF_ISA
}  // namespace genperf
