// CUDA kernels. One launch forward, and a second, tiny one where a sample is cut into several slices
// and its sums are wanted; one launch backward. See common/teams.cuh for how the work is cut.
#include <type_traits>

#include "../common/philox.cuh"
#include "../common/samples.cuh"
#include "../common/teams.cuh"
#include "gaussian_sample.cuh"

namespace genperf {

namespace {

// Operands; kl and log_prob hold an element each, or one value a sample where `reduce`.
enum Inputs { kMean, kScale, kPriorMean, kPriorScale, kNoise, kInputs };
enum ForwardOperand { kZ = kInputs, kKl, kLogProb, kForwardCount };
enum BackwardOperand {
  kGradZ = kInputs,
  kGradKl,
  kGradLogProb,
  kGradMean,
  kGradScale,
  kGradPriorMean,
  kGradPriorScale,
  kBackwardCount
};

template <int kCount>
struct Parameters {
  Samples<kCount> x;
  Teams teams;
  Keys keys;
  GaussianParameters math;
  bool reduce;
  double* partials;  // forward: [2, samples, slices], where slices > 1
};

template <class Access, int kCount, class Position>
__device__ __forceinline__ void load_noise(const Parameters<kCount>& p, const Position& at, int64_t sample,
                                           int64_t index, float (&eps)[Access::kWidth]) {
  if (p.x[kNoise]) {
    Access::load(p.x, kNoise, at, eps);
  } else {
    philox_normals_at(p.keys[sample], p.keys.by_sample ? index : sample * p.x.elements + index, eps);
  }
}

__device__ __forceinline__ void store_sum(const Operand& o, int64_t sample, double sum) {
  static_cast<float*>(o.data)[sample * o.sample_stride] =
      static_cast<float>(sum > kFloatMax ? kFloatMax : sum);
}

template <class Access, Transform kTransform>
__global__ void __launch_bounds__(kBlockTeam, Access::kWidth == 1 ? 2 : 4)
    gaussian_sample_forward_kernel(const Parameters<kForwardCount> p) {
  const Part part(p.teams, Access::kWidth);
  const bool noisy = p.x[kNoise] || p.keys;
  float kl_sum = 0.0f, log_prob_sum = 0.0f;
  for (int64_t i = part.first; i < part.last; i += part.step) {
    const typename Access::template Position<kForwardCount> at(p.x, part.sample, i);
    GaussianForward<kTransform, Access::kWidth> x;
    Access::load(p.x, kMean, at, x.mean);
    Access::load(p.x, kScale, at, x.scale);
    if (p.x[kPriorMean]) {
      Access::load(p.x, kPriorMean, at, x.prior_mean);
      Access::load(p.x, kPriorScale, at, x.prior_scale);
    }
    if (noisy) load_noise<Access>(p, at, part.sample, i, x.eps);
    x.compute(p.math, noisy, bool(p.x[kKl]), bool(p.x[kPriorMean]));
    if (p.x[kZ]) Access::store(p.x, kZ, at, x.z);
    if (p.reduce) {
#pragma unroll
      for (int j = 0; j < Access::kWidth; ++j) {
        if (p.x[kKl]) kl_sum += x.kl[j];
        if (p.x[kLogProb]) log_prob_sum += x.log_prob[j];
      }
    } else {
      if (p.x[kKl]) Access::store_float(p.x, kKl, at, x.kl);
      if (p.x[kLogProb]) Access::store_float(p.x, kLogProb, at, x.log_prob);
    }
  }
  if (!p.reduce) return;
  double sums[2] = {kl_sum, log_prob_sum};
  team_sum(sums, p.teams.team);
  if (!part.leads) return;
  if (p.teams.slices > 1) {
    double* partial = p.partials + part.sample * p.teams.slices + part.slice;
    partial[0] = sums[0];
    partial[p.teams.samples * p.teams.slices] = sums[1];
  } else {
    if (p.x[kKl]) store_sum(p.x[kKl], part.sample, sums[0]);
    if (p.x[kLogProb]) store_sum(p.x[kLogProb], part.sample, sums[1]);
  }
}

constexpr int kSumWarps = 4;

// partials: [2, samples, slices]. A warp a sample.
__global__ void __launch_bounds__(32 * kSumWarps)
    gaussian_sample_sum_kernel(const double* partials, int64_t samples, int64_t slices, Operand kl,
                               Operand log_prob) {
  const int lane = threadIdx.x % 32;
  const int64_t sample = int64_t{blockIdx.x} * kSumWarps + threadIdx.x / 32;
  if (sample >= samples) return;
  double sums[2] = {0.0, 0.0};
  for (int64_t i = lane; i < slices; i += 32) {
    sums[0] += partials[sample * slices + i];
    sums[1] += partials[(samples + sample) * slices + i];
  }
  team_sum(sums, 32);
  if (lane != 0) return;
  if (kl) store_sum(kl, sample, sums[0]);
  if (log_prob) store_sum(log_prob, sample, sums[1]);
}

template <class Access, Transform kTransform>
__global__ void __launch_bounds__(kBlockTeam, Access::kWidth == 1 ? 2 : 3)
    gaussian_sample_backward_kernel(const Parameters<kBackwardCount> p) {
  const Part part(p.teams, Access::kWidth);
  for (int64_t i = part.first; i < part.last; i += part.step) {
    const typename Access::template Position<kBackwardCount> at(p.x, part.sample, i);
    GaussianBackward<kTransform, Access::kWidth> x;
    // The gradient of a sum is the gradient of each of its terms.
    auto load_gradient = [&](int k, float (&gradient)[Access::kWidth]) {
      if (!p.reduce) return Access::load_float(p.x, k, at, gradient);
      const float value = static_cast<const float*>(p.x[k].data)[part.sample * p.x[k].sample_stride];
#pragma unroll
      for (int j = 0; j < Access::kWidth; ++j) gradient[j] = value;
    };
    const bool prior = p.x[kGradKl] && p.x[kPriorMean];
    Access::load(p.x, kMean, at, x.mean);
    Access::load(p.x, kScale, at, x.scale);
    if (prior) {
      Access::load(p.x, kPriorMean, at, x.prior_mean);
      Access::load(p.x, kPriorScale, at, x.prior_scale);
    }
    if (p.x[kGradZ]) {
      Access::load(p.x, kGradZ, at, x.grad_z);
      load_noise<Access>(p, at, part.sample, i, x.eps);
    }
    if (p.x[kGradKl]) load_gradient(kGradKl, x.grad_kl);
    if (p.x[kGradLogProb]) load_gradient(kGradLogProb, x.grad_log_prob);
    x.compute(p.math, bool(p.x[kGradZ]), bool(p.x[kGradKl]), bool(p.x[kGradLogProb]), prior);
    Access::store(p.x, kGradMean, at, x.grad_mean);
    Access::store(p.x, kGradScale, at, x.grad_scale);
    if (prior) {
      Access::store(p.x, kGradPriorMean, at, x.grad_prior_mean);
      Access::store(p.x, kGradPriorScale, at, x.grad_prior_scale);
    }
  }
}

GaussianParameters parameters_of(const GaussianArgs& a) {
  float factor = a.transform == Transform::kLogVariance ? 0.5f : 1.0f;
  return {factor, a.low, a.high, a.offset, a.temperature, a.temperature == 1.0f ? 0.0f : log(a.temperature)};
}

// What both launchers share: fills the parameters, and calls f(policy) with Vectors where every operand
// allows it. `floats`: the two operands that are always float32.
template <int kCount, class F>
void with_access(const GaussianArgs& a, const View* const (&views)[kCount], int floats, Parameters<kCount>& p,
                 F f) {
  p.x = Samples<kCount>(a.mean, views, a.reduce || a.key.ndim == 2);
  p.keys = Keys(a.key);
  p.math = parameters_of(a);
  p.reduce = a.reduce;
  p.partials = static_cast<double*>(a.partials.data);
  bool vectors = true;
  for (int k = 0; k < kCount; ++k) {
    if (k == floats || k == floats + 1) {
      vectors &= a.reduce || p.x.vectorizable(k);
    } else {
      vectors &= p.x.vectorizable(k) && (!p.x[k] || p.x[k].dtype == a.mean.dtype);
    }
  }
  const int width = vectors ? 4 : 1;
  p.teams = Teams(p.x.samples, p.x.elements, width, kGaussianBlockElements);
  if (!vectors) return f(Strided());
  if (a.mean.dtype == DType::kFloat32) return f(Vectors<float>());
  f(Vectors<uint16_t>());
}

template <Transform kTransform>
using TransformConstant = std::integral_constant<Transform, kTransform>;

template <class F>
void with_transform(Transform transform, F f) {
  switch (transform) {
    case Transform::kStandardDeviation:
      return f(TransformConstant<Transform::kStandardDeviation>());
    case Transform::kSoftplus:
      return f(TransformConstant<Transform::kSoftplus>());
    case Transform::kSoftClamp:
      return f(TransformConstant<Transform::kSoftClamp>());
    default:
      return f(TransformConstant<Transform::kLogVariance>());
  }
}

}  // namespace

int gaussian_sample_forward_cuda(const GaussianArgs& a, void* stream) {
  if (a.mean.numel() == 0 && !(a.reduce && a.mean.shape[0] > 0)) return cudaSuccess;
  const View* const views[kForwardCount] = {&a.mean,  &a.scale, &a.prior_mean, &a.prior_scale,
                                            &a.noise, &a.z,     &a.kl,         &a.log_prob};
  Parameters<kForwardCount> p;
  with_access(a, views, kKl, p, [&](auto access) {
    with_transform(a.transform, [&](auto transform) {
      GENPERF_LAUNCH((gaussian_sample_forward_kernel<decltype(access), decltype(transform)::value>),
                     p.teams.grid(), p.teams.block, 0, stream, p);
    });
  });
  if (a.reduce && p.teams.slices > 1) {
    const auto blocks = static_cast<unsigned>((p.x.samples + kSumWarps - 1) / kSumWarps);
    GENPERF_LAUNCH(gaussian_sample_sum_kernel, blocks, 32 * kSumWarps, 0, stream, p.partials, p.x.samples,
                   p.teams.slices, p.x[kKl], p.x[kLogProb]);
  }
  return cudaGetLastError();
}

int gaussian_sample_backward_cuda(const GaussianArgs& a, void* stream) {
  if (a.mean.numel() == 0) return cudaSuccess;
  const View* const views[kBackwardCount] = {
      &a.mean,    &a.scale,         &a.prior_mean, &a.prior_scale, &a.noise,           &a.grad_z,
      &a.grad_kl, &a.grad_log_prob, &a.grad_mean,  &a.grad_scale,  &a.grad_prior_mean, &a.grad_prior_scale};
  Parameters<kBackwardCount> p;
  with_access(a, views, kGradKl, p, [&](auto access) {
    with_transform(a.transform, [&](auto transform) {
      GENPERF_LAUNCH((gaussian_sample_backward_kernel<decltype(access), decltype(transform)::value>),
                     p.teams.grid(), p.teams.block, 0, stream, p);
    });
  });
  return cudaGetLastError();
}

}  // namespace genperf
