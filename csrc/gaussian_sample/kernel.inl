// CPU kernels, built once per instruction set (GENPERF_ISA).
//
// A chunk (see common/sample_chunks.h) passes through the first-level cache once: noise into an array, one
// loop of vector math, sums.
#include "../common/philox_cpu.h"
#include "../common/sample_chunks.h"
#include "math.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

enum class Divergence { kNone, kStandard, kPrior };

GaussianParameters parameters_of(const GaussianArgs& a) {
  float factor = a.transform == Transform::kLogVariance ? 0.5f : 1.0f;
  return {factor, a.low, a.high, a.offset, a.temperature, a.temperature == 1.0f ? 0.0f : log(a.temperature)};
}

// The noise of a chunk: the caller's, or generated; null where none is needed.
const float* noise_chunk(const GaussianArgs& a, const View& noise, const SampleChunks& plan,
                         const SampleChunks::Range& r, PhiloxBuffer& buffer) {
  if (noise) return read_chunk(noise, r.start, r.n, reinterpret_cast<Buffer&>(buffer));
  if (!a.key) return nullptr;
  if (a.key.ndim == 1) return philox_chunk<Distribution::kNormal>(philox_key(a.key, 0), r.start, r.n, buffer);
  int64_t first = r.start - r.sample * plan.per_sample;
  if (r.count == 1)
    return philox_chunk<Distribution::kNormal>(philox_key(a.key, r.sample), first, r.n, buffer);
  PhiloxBuffer one;
  for (int64_t s = 0; s < r.count; ++s) {
    int n = static_cast<int>(plan.per_sample);
    const float* x = philox_chunk<Distribution::kNormal>(philox_key(a.key, r.sample + s), 0, n, one);
    for (int i = 0; i < n; ++i) buffer[s * n + i] = x[i];
  }
  return buffer;
}

struct ForwardChunk {
  const float *mean, *scale, *prior_mean, *prior_scale, *noise;
  float *z, *kl, *log_prob;
};

template <Transform kTransform, bool kBounded, Divergence kDivergence>
void forward_loop(const ForwardChunk& chunk, int n, const GaussianParameters& parameters) {
  const ForwardChunk c = chunk;  // in registers: the stores below might alias the arguments
  const GaussianParameters p = parameters;
  for (int i = 0; i < n; i += kLanes) {
    auto q = gaussian_from<kTransform, kBounded>(load(c.mean + i), load(c.scale + i), p);
    heat(q, p);
    if (c.noise) {
      Vf eps = load(c.noise + i);
      if (c.z) store(c.z + i, q.mu + q.sigma * eps);
      if (c.log_prob) store(c.log_prob + i, log_density(q, eps));
    }
    if constexpr (kDivergence == Divergence::kStandard) store(c.kl + i, divergence(q));
    if constexpr (kDivergence == Divergence::kPrior) {
      auto prior = gaussian_from<kTransform, kBounded>(load(c.prior_mean + i), load(c.prior_scale + i), p);
      store(c.kl + i, divergence(q, prior));
    }
  }
}

using ForwardLoop = void (*)(const ForwardChunk&, int, const GaussianParameters&);

template <Transform kTransform, bool kBounded = false>
ForwardLoop forward_loop_for(const GaussianArgs& a) {
  if (!a.kl) return forward_loop<kTransform, kBounded, Divergence::kNone>;
  return a.prior_mean ? forward_loop<kTransform, kBounded, Divergence::kPrior>
                      : forward_loop<kTransform, kBounded, Divergence::kStandard>;
}

ForwardLoop forward_loop_for(const GaussianArgs& a, const GaussianParameters& p) {
  switch (a.transform) {
    case Transform::kStandardDeviation:
      return forward_loop_for<Transform::kStandardDeviation>(a);
    case Transform::kSoftplus:
      return forward_loop_for<Transform::kSoftplus>(a);
    case Transform::kSoftClamp:
      return forward_loop_for<Transform::kSoftClamp>(a);
    default:
      return p.bounded() ? forward_loop_for<Transform::kLogVariance, true>(a)
                         : forward_loop_for<Transform::kLogVariance>(a);
  }
}

}  // namespace

void gaussian_sample_forward(const GaussianArgs& a) {
  const SampleChunks plan(a.mean, a.reduce || a.key.ndim == 2);
  const GaussianParameters p = parameters_of(a);
  const ForwardLoop loop = forward_loop_for(a, p);
  const View mean = collapse(a.mean), scale = collapse(a.scale), noise = a.noise ? collapse(a.noise) : View{};
  const View prior_mean = a.prior_mean ? collapse(a.prior_mean) : View{};
  const View prior_scale = a.prior_scale ? collapse(a.prior_scale) : View{};
  const View z = a.z ? collapse(a.z) : View{};
  const View kl = a.kl && !a.reduce ? collapse(a.kl) : View{};
  const View log_prob = a.log_prob && !a.reduce ? collapse(a.log_prob) : View{};
  SampleSums kl_sums(a.kl, plan, a.reduce && a.kl, kFloatMax);
  SampleSums log_prob_sums(a.log_prob, plan, a.reduce && a.log_prob, kFloatMax);

#pragma omp parallel for schedule(static) if (plan.parallel())
  for (int64_t i = 0; i < plan.chunks; ++i) {
    alignas(64) Buffer b_mean, b_scale, b_prior_mean, b_prior_scale, b_z, b_kl, b_log_prob;
    alignas(64) PhiloxBuffer b_noise;
    const SampleChunks::Range r = plan.range(i);
    ForwardChunk c;
    c.mean = read_chunk(mean, r.start, r.n, b_mean);
    c.scale = read_chunk(scale, r.start, r.n, b_scale);
    c.prior_mean = read_chunk(prior_mean, r.start, r.n, b_prior_mean);
    c.prior_scale = read_chunk(prior_scale, r.start, r.n, b_prior_scale);
    c.noise = noise_chunk(a, noise, plan, r, b_noise);
    c.z = open_chunk(z, r.start, r.n, b_z);
    c.kl = a.reduce ? b_kl : open_chunk(kl, r.start, r.n, b_kl);
    c.log_prob = a.reduce && a.log_prob ? b_log_prob : open_chunk(log_prob, r.start, r.n, b_log_prob);
    loop(c, r.n, p);
    if (z) close_chunk(z, r.start, r.n, c.z, b_z);
    if (kl) close_chunk(kl, r.start, r.n, c.kl, b_kl);
    if (log_prob) close_chunk(log_prob, r.start, r.n, c.log_prob, b_log_prob);
    kl_sums.add(r, b_kl);
    log_prob_sums.add(r, b_log_prob);
  }
  kl_sums.write();
  log_prob_sums.write();
}

namespace {

struct BackwardChunk {
  const float *mean, *scale, *prior_mean, *prior_scale, *noise;
  const float *grad_z, *grad_kl, *grad_log_prob;
  float *grad_mean, *grad_scale, *grad_prior_mean, *grad_prior_scale;
};

template <Transform kTransform, bool kBounded, Divergence kDivergence>
void backward_loop(const BackwardChunk& chunk, int n, const GaussianParameters& parameters) {
  const BackwardChunk c = chunk;  // in registers: the stores below might alias the arguments
  const GaussianParameters p = parameters;
  for (int i = 0; i < n; i += kLanes) {
    auto q = gaussian_from<kTransform, kBounded>(load(c.mean + i), load(c.scale + i), p);
    heat(q, p);
    Vf by_mu = splat<Vf>(0.0f), by_scale = by_mu;
    if (c.grad_z) {
      Vf gz = load(c.grad_z + i);
      by_mu = gz;
      by_scale = gz * load(c.noise + i) * q.d_sigma;
    }
    if (c.grad_log_prob) by_scale = by_scale - load(c.grad_log_prob + i) * q.d_log_sigma;
    if constexpr (kDivergence == Divergence::kStandard) {
      Vf gkl = load(c.grad_kl + i);
      auto d = divergence_gradient(q);
      by_mu = by_mu + gkl * d.mu;
      by_scale = by_scale + gkl * d.log_sigma * q.d_log_sigma;
    }
    if constexpr (kDivergence == Divergence::kPrior) {
      Vf gkl = load(c.grad_kl + i);
      auto prior = gaussian_from<kTransform, kBounded>(load(c.prior_mean + i), load(c.prior_scale + i), p);
      auto d = divergence_gradient(q, prior);
      by_mu = by_mu + gkl * d.mu;
      by_scale = by_scale + gkl * d.log_sigma * q.d_log_sigma;
      store(c.grad_prior_mean + i, gkl * d.prior_mu * prior.d_mu);
      store(c.grad_prior_scale + i, gkl * d.prior_log_sigma * prior.d_log_sigma);
    }
    store(c.grad_mean + i, by_mu * q.d_mu);
    store(c.grad_scale + i, by_scale);
  }
}

using BackwardLoop = void (*)(const BackwardChunk&, int, const GaussianParameters&);

template <Transform kTransform, bool kBounded = false>
BackwardLoop backward_loop_for(const GaussianArgs& a) {
  if (!a.grad_kl) return backward_loop<kTransform, kBounded, Divergence::kNone>;
  return a.prior_mean ? backward_loop<kTransform, kBounded, Divergence::kPrior>
                      : backward_loop<kTransform, kBounded, Divergence::kStandard>;
}

BackwardLoop backward_loop_for(const GaussianArgs& a, const GaussianParameters& p) {
  switch (a.transform) {
    case Transform::kStandardDeviation:
      return backward_loop_for<Transform::kStandardDeviation>(a);
    case Transform::kSoftplus:
      return backward_loop_for<Transform::kSoftplus>(a);
    case Transform::kSoftClamp:
      return backward_loop_for<Transform::kSoftClamp>(a);
    default:
      return p.bounded() ? backward_loop_for<Transform::kLogVariance, true>(a)
                         : backward_loop_for<Transform::kLogVariance>(a);
  }
}

// The gradient of a sum, repeated for each element of its sample.
const float* read_gradient(const GaussianArgs& a, const View& gradient, const View& collapsed,
                           const SampleChunks::Range& r, Buffer& buffer) {
  if (!gradient) return nullptr;
  if (!a.reduce) return read_chunk(collapsed, r.start, r.n, buffer);
  int n = static_cast<int>(r.n / r.count);
  for (int64_t s = 0; s < r.count; ++s) {
    float value = static_cast<const float*>(gradient.data)[(r.sample + s) * gradient.stride[0]];
    for (int i = 0; i < n; ++i) buffer[s * n + i] = value;
  }
  for (int i = r.n; i < padded(r.n); ++i) buffer[i] = 0.0f;
  return buffer;
}

}  // namespace

void gaussian_sample_backward(const GaussianArgs& a) {
  const SampleChunks plan(a.mean, a.reduce || a.key.ndim == 2);
  const GaussianParameters p = parameters_of(a);
  const BackwardLoop loop = backward_loop_for(a, p);
  const bool prior = a.grad_kl && a.prior_mean;
  const View mean = collapse(a.mean), scale = collapse(a.scale);
  const View grad_mean = collapse(a.grad_mean), grad_scale = collapse(a.grad_scale);
  const View noise = a.grad_z && a.noise ? collapse(a.noise) : View{};
  const View grad_z = a.grad_z ? collapse(a.grad_z) : View{};
  const View grad_kl = a.grad_kl ? collapse(a.grad_kl) : View{};
  const View grad_log_prob = a.grad_log_prob ? collapse(a.grad_log_prob) : View{};
  const View prior_mean = prior ? collapse(a.prior_mean) : View{};
  const View prior_scale = prior ? collapse(a.prior_scale) : View{};
  const View grad_prior_mean = prior ? collapse(a.grad_prior_mean) : View{};
  const View grad_prior_scale = prior ? collapse(a.grad_prior_scale) : View{};

#pragma omp parallel for schedule(static) if (plan.parallel())
  for (int64_t i = 0; i < plan.chunks; ++i) {
    alignas(64) Buffer b_mean, b_scale, b_prior_mean, b_prior_scale, b_grad_z, b_grad_kl, b_grad_log_prob;
    alignas(64) Buffer b_grad_mean, b_grad_scale, b_grad_prior_mean, b_grad_prior_scale;
    alignas(64) PhiloxBuffer b_noise;
    const SampleChunks::Range r = plan.range(i);
    BackwardChunk c;
    c.mean = read_chunk(mean, r.start, r.n, b_mean);
    c.scale = read_chunk(scale, r.start, r.n, b_scale);
    c.prior_mean = read_chunk(prior_mean, r.start, r.n, b_prior_mean);
    c.prior_scale = read_chunk(prior_scale, r.start, r.n, b_prior_scale);
    c.noise = grad_z ? noise_chunk(a, noise, plan, r, b_noise) : nullptr;
    c.grad_z = read_chunk(grad_z, r.start, r.n, b_grad_z);
    c.grad_kl = read_gradient(a, a.grad_kl, grad_kl, r, b_grad_kl);
    c.grad_log_prob = read_gradient(a, a.grad_log_prob, grad_log_prob, r, b_grad_log_prob);
    c.grad_mean = open_chunk(grad_mean, r.start, r.n, b_grad_mean);
    c.grad_scale = open_chunk(grad_scale, r.start, r.n, b_grad_scale);
    c.grad_prior_mean = open_chunk(grad_prior_mean, r.start, r.n, b_grad_prior_mean);
    c.grad_prior_scale = open_chunk(grad_prior_scale, r.start, r.n, b_grad_prior_scale);
    loop(c, r.n, p);
    close_chunk(grad_mean, r.start, r.n, c.grad_mean, b_grad_mean);
    close_chunk(grad_scale, r.start, r.n, c.grad_scale, b_grad_scale);
    if (prior) {
      close_chunk(grad_prior_mean, r.start, r.n, c.grad_prior_mean, b_grad_prior_mean);
      close_chunk(grad_prior_scale, r.start, r.n, c.grad_prior_scale, b_grad_prior_scale);
    }
  }
}

}  // namespace GENPERF_ISA
}  // namespace genperf
