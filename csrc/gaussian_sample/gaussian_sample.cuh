// The math of one thread: kWidth neighbouring elements, between registers.
#pragma once

#include "math.h"

namespace genperf {

// Inputs: mean, scale; eps where `noisy`; the prior's mean and scale where `prior`.
// Outputs: z and log_prob where `noisy`; kl.
template <Transform kTransform, int kWidth>
struct GaussianForward {
  float mean[kWidth], scale[kWidth], prior_mean[kWidth], prior_scale[kWidth], eps[kWidth];
  float z[kWidth], kl[kWidth], log_prob[kWidth];

  __device__ __forceinline__ void compute(const GaussianParameters& p, bool noisy, bool kl_wanted,
                                          bool prior) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      Gaussian<float> q = gaussian_from<kTransform>(mean[j], scale[j], p);
      heat(q, p);
      if (noisy) {
        z[j] = q.mu + q.sigma * eps[j];
        log_prob[j] = log_density(q, eps[j]);
      }
      if (!kl_wanted) continue;
      kl[j] =
          prior ? divergence(q, gaussian_from<kTransform>(prior_mean[j], prior_scale[j], p)) : divergence(q);
    }
  }
};

// Inputs: as above, and the gradients by z, kl and log_prob where there are any.
// Outputs: the gradients by mean and scale; by the prior's where `prior`.
template <Transform kTransform, int kWidth>
struct GaussianBackward {
  float mean[kWidth], scale[kWidth], prior_mean[kWidth], prior_scale[kWidth], eps[kWidth];
  float grad_z[kWidth], grad_kl[kWidth], grad_log_prob[kWidth];
  float grad_mean[kWidth], grad_scale[kWidth], grad_prior_mean[kWidth], grad_prior_scale[kWidth];

  __device__ __forceinline__ void compute(const GaussianParameters& p, bool by_z, bool by_kl,
                                          bool by_log_prob, bool prior) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      Gaussian<float> q = gaussian_from<kTransform>(mean[j], scale[j], p);
      heat(q, p);
      float by_mu = 0.0f, by_scale = 0.0f;
      if (by_z) {
        by_mu = grad_z[j];
        by_scale = grad_z[j] * eps[j] * q.d_sigma;
      }
      if (by_log_prob) by_scale = by_scale - grad_log_prob[j] * q.d_log_sigma;
      if (by_kl) {
        GaussianGradient<float> d;
        if (prior) {
          Gaussian<float> r = gaussian_from<kTransform>(prior_mean[j], prior_scale[j], p);
          d = divergence_gradient(q, r);
          grad_prior_mean[j] = grad_kl[j] * d.prior_mu * r.d_mu;
          grad_prior_scale[j] = grad_kl[j] * d.prior_log_sigma * r.d_log_sigma;
        } else {
          d = divergence_gradient(q);
        }
        by_mu = by_mu + grad_kl[j] * d.mu;
        by_scale = by_scale + grad_kl[j] * d.log_sigma * q.d_log_sigma;
      }
      grad_mean[j] = by_mu * q.d_mu;
      grad_scale[j] = by_scale;
    }
  }
};

}  // namespace genperf
