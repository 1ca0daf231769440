// The element-wise math of gaussian_sample, for float (CUDA) and for vectors of floats (CPU).
#pragma once

#include "../common/math.h"
#include "gaussian_sample.h"

namespace genperf {
inline namespace GENPERF_ISA {

struct GaussianParameters {
  float factor;  // log sigma = factor * scale (kLogVariance 1/2, kLogSigma 1)
  float low, high, offset, temperature, log_temperature;

  // Whether log sigma stays where exp_bounded can be used.
  bool bounded() const { return low * factor >= -87.0f && high * factor <= 88.0f; }
};

// One diagonal Gaussian in the form that sampling and the divergence need, with the derivatives of
// mu by `mean` and of sigma and log sigma by `scale`.
template <class F>
struct Gaussian {
  F mu, sigma, log_sigma;
  F d_mu, d_sigma, d_log_sigma;
};

// Input: the raw mean and scale. kLogSigma is kLogVariance with another factor. kBounded: the bounds on
// scale keep log sigma within [-87, 88].
template <Transform kTransform, bool kBounded = false, class F>
GENPERF_HD Gaussian<F> gaussian_from(F mean, F scale, const GaussianParameters& p) {
  Gaussian<F> g;
  const F one = splat<F>(1.0f), zero = splat<F>(0.0f);
  g.mu = mean;
  g.d_mu = one;
  if constexpr (kTransform == Transform::kLogVariance || kTransform == Transform::kLogSigma) {
    F v = select(scale < p.low, splat<F>(p.low), scale);
    v = select(scale > p.high, splat<F>(p.high), v);
    g.log_sigma = v * p.factor;
    g.sigma = kBounded ? exp_bounded(g.log_sigma) : exp(g.log_sigma);
    g.d_log_sigma = select(v == scale, splat<F>(p.factor), zero);
    g.d_sigma = g.sigma * g.d_log_sigma;
  } else if constexpr (kTransform == Transform::kStandardDeviation) {
    g.sigma = scale;
    g.log_sigma = log(scale);
    g.d_sigma = one;
    g.d_log_sigma = 1.0f / scale;
  } else if constexpr (kTransform == Transform::kSoftplus) {
    g.sigma = softplus(scale) + p.offset;
    g.log_sigma = log(g.sigma);
    g.d_sigma = sigmoid(scale);
    g.d_log_sigma = select(g.sigma == 0.0f, one, g.d_sigma / g.sigma);  // the limit, where both underflow
  } else {                                                              // kSoftClamp
    F d_t;
    F e = exp(5.0f * tanh(scale * 0.2f, d_t));
    g.mu = 5.0f * tanh(mean * 0.2f, g.d_mu);
    g.sigma = e + p.offset;
    g.log_sigma = log(g.sigma);
    g.d_sigma = e * d_t;
    g.d_log_sigma = g.d_sigma / g.sigma;
  }
  return g;
}

// sigma times the temperature.
template <class F>
GENPERF_HD void heat(Gaussian<F>& g, const GaussianParameters& p) {
  g.sigma = g.sigma * p.temperature;
  g.d_sigma = g.d_sigma * p.temperature;
  g.log_sigma = g.log_sigma + p.log_temperature;
}

template <class F>
GENPERF_HD F saturate(F kl) {
  return select(kl > kFloatMax, splat<F>(kFloatMax), kl);
}

// KL(q || N(0, 1)).
template <class F>
GENPERF_HD F divergence(const Gaussian<F>& q) {
  return saturate(0.5f * q.mu * q.mu + 0.5f * exp_m1_mx(2.0f * q.log_sigma, q.sigma * q.sigma));
}

// (mu - mu') / sigma' from log sigma', so that two equal means never meet an infinite 1 / sigma'.
template <class F>
GENPERF_HD F standardized_shift(const Gaussian<F>& q, const Gaussian<F>& prior) {
  F difference = q.mu - prior.mu;
  F shift = difference * exp(-prior.log_sigma);
  return select(difference == 0.0f, difference, shift);
}

// KL(q || prior).
template <class F>
GENPERF_HD F divergence(const Gaussian<F>& q, const Gaussian<F>& prior) {
  F shift = standardized_shift(q, prior);
  F d = 2.0f * (q.log_sigma - prior.log_sigma);
  return saturate(0.5f * shift * shift + 0.5f * exp_m1_mx(d, exp(d)));
}

// log q(mu + sigma eps).
template <class F>
GENPERF_HD F log_density(const Gaussian<F>& q, F eps) {
  return -0.5f * (eps * eps) - q.log_sigma - 0.5f * kLog2Pi;
}

// Gradients by mu and log sigma of q and of the prior.
template <class F>
struct GaussianGradient {
  F mu, log_sigma, prior_mu, prior_log_sigma;
};

template <class F>
GENPERF_HD GaussianGradient<F> divergence_gradient(const Gaussian<F>& q) {
  const F zero = splat<F>(0.0f);
  return {q.mu, exp_m1(2.0f * q.log_sigma, q.sigma * q.sigma), zero, zero};
}

template <class F>
GENPERF_HD GaussianGradient<F> divergence_gradient(const Gaussian<F>& q, const Gaussian<F>& prior) {
  F shift = standardized_shift(q, prior);
  F by_mu = select(shift == 0.0f, shift, shift * exp(-prior.log_sigma));
  F d = 2.0f * (q.log_sigma - prior.log_sigma);
  F by_log_sigma = exp_m1(d, exp(d));
  return {by_mu, by_log_sigma, -by_mu, -(shift * shift) - by_log_sigma};
}

}  // namespace GENPERF_ISA
}  // namespace genperf
