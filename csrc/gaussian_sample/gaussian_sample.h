// The reparameterized Gaussian sample with its divergence and log-probability, forward and backward.
//
//   q = N(mu, sigma^2) from (mean, scale) by `transform`;  z = mu + sigma eps
//   kl = 1/2 ((mu - mu') / sigma')^2 + 1/2 h(2 (log sigma - log sigma')),  h(x) = e^x - 1 - x
//   log_prob = -1/2 eps^2 - log sigma - 1/2 log(2 pi)
//
// Layout: mean, scale, prior_*, noise, z and the gradients share one logical shape [B, *], each with
// strides of its own. `reduce`: kl and log_prob (and their gradients) are [B] float32, the sum over
// all but dimension 0; otherwise they have the shape of mean. eps is `noise`, or the Philox normals
// of `key`: int64 [2] numbers the elements through the whole tensor, int64 [B, 2] within each sample.
//
// Numerics: float32 arithmetic for every input type. h is never negative and exact to a few ulp near
// 0, so no cancellation can make kl negative. kl saturates at the largest finite float32. Sums run in
// a fixed order (chunks of a sample, partial sums in double): the same bits for any number of
// threads or blocks. Nothing but the inputs is needed by the backward pass.
#pragma once

#include <cstdint>

#include "../common/view.h"

namespace genperf {

enum class Transform : int { kLogVariance, kLogSigma, kStandardDeviation, kSoftplus, kSoftClamp };

struct GaussianArgs {
  View mean, scale, prior_mean, prior_scale;  // priors absent: the standard normal
  View noise, key;                            // one of them, or neither where no noise is needed
  View z, kl, log_prob;                       // forward: outputs, absent where not wanted
  View grad_z, grad_kl, grad_log_prob;        // backward: inputs, absent where zero
  View grad_mean, grad_scale, grad_prior_mean, grad_prior_scale;  // backward: outputs
  View partials;  // CUDA, reduce: float64 [2, B, partials_per_sample]
  Transform transform;
  float low, high;    // bounds on scale (kLogVariance, kLogSigma), +-infinity for none
  float offset;       // added to sigma (kSoftplus, kSoftClamp)
  float temperature;  // multiplies the posterior's sigma
  bool reduce;
};

// Elements of a sample that one CUDA block sums; partials_per_sample = ceil(elements / this).
inline constexpr int64_t kGaussianBlockElements = 4096;

void gaussian_sample_forward_cpu(const GaussianArgs& args);
void gaussian_sample_backward_cpu(const GaussianArgs& args);

// Return a cudaError_t, 0 for success.
int gaussian_sample_forward_cuda(const GaussianArgs& args, void* stream);
int gaussian_sample_backward_cuda(const GaussianArgs& args, void* stream);

}  // namespace genperf
