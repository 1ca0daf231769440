// The element-wise math of affine_coupling, on vectors of floats.
#pragma once

#include "../common/math.h"
#include "affine_coupling.h"

namespace genperf {
inline namespace GENPERF_ISA {

struct CouplingParameters {
  float shift_factor, prefactor, offset, eps, clamp, slope;
  bool from_output;

  explicit CouplingParameters(const CouplingArgs& a)
      : shift_factor(a.sign * a.prefactor),
        prefactor(a.prefactor),
        offset(a.offset),
        eps(a.eps),
        clamp(a.clamp),
        slope(a.slope),
        from_output(a.from_output) {}
};

// s(u), its logarithm, and the derivative of that by u; a compiler leaves out what is not used.
template <class F>
struct CouplingFactor {
  F scale, log_scale, derivative;
};

template <CouplingScale kScale, class F>
GENPERF_HD CouplingFactor<F> coupling_factor(F u, const CouplingParameters& p) {
  const F one = splat<F>(1.0f), zero = splat<F>(0.0f);
  if constexpr (kScale == CouplingScale::kAdditive) {
    return {one, zero, zero};
  } else if constexpr (kScale == CouplingScale::kSigmoid) {
    u = u + p.offset;
    const F e = exp(-abs(u)), d = 1.0f + e;
    const auto positive = u >= 0.0f;
    const F sigmoid = select(positive, one, e) / d, complement = select(positive, e, one) / d;
    if (p.eps == 0.0f) {
      const F log1p = log_normal(d) + (e - (d - 1.0f)) / d;
      return {sigmoid, select(u < 0.0f, u, zero) - log1p, complement};
    }
    const F scale = sigmoid + p.eps;
    return {scale, log(scale), sigmoid * complement / scale};
  } else if constexpr (kScale == CouplingScale::kExp) {
    return {exp(u), u, one};
  } else if constexpr (kScale == CouplingScale::kTanh) {
    F derivative;
    const F log_scale = p.clamp * tanh(p.slope * u, derivative);
    return {exp(log_scale), log_scale, p.clamp * p.slope * derivative};
  } else {
    const F sum = softplus(u) + p.eps;
    const F scale = select(sum > p.clamp, splat<F>(p.clamp), sum);
    const F slope = select(sum <= p.clamp, sigmoid(u), zero) / scale;
    if (p.eps != 0.0f) return {scale, log(scale), slope};
    const auto small = u < -17.0f;  // log softplus(u) = u - e^u / 2 + ...
    return {scale, select(small, u, log(scale)), select(small, one, slope)};
  }
}

template <bool kReciprocal, class F>
GENPERF_HD F times(F x, F scale) {
  return kReciprocal ? x / scale : x * scale;
}

}  // namespace GENPERF_ISA
}  // namespace genperf
