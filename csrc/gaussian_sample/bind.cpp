#include "../common/binding.h"
#include "gaussian_sample.h"

namespace genperf {
namespace {

GaussianArgs forward_args(View mean, View scale, View prior_mean, View prior_scale, View noise, View key,
                          View z, View kl, View log_prob, int transform, float low, float high, float offset,
                          float temperature, bool reduce, View partials) {
  GaussianArgs a{};
  a.mean = mean, a.scale = scale, a.prior_mean = prior_mean, a.prior_scale = prior_scale;
  a.noise = noise, a.key = key;
  a.z = z, a.kl = kl, a.log_prob = log_prob;
  a.partials = partials;
  a.transform = static_cast<Transform>(transform);
  a.low = low, a.high = high, a.offset = offset, a.temperature = temperature;
  a.reduce = reduce;
  return a;
}

GaussianArgs backward_args(View grad_z, View grad_kl, View grad_log_prob, View mean, View scale,
                           View prior_mean, View prior_scale, View noise, View key, View grad_mean,
                           View grad_scale, View grad_prior_mean, View grad_prior_scale, int transform,
                           float low, float high, float offset, float temperature, bool reduce) {
  View none;
  GaussianArgs a = forward_args(mean, scale, prior_mean, prior_scale, noise, key, none, none, none, transform,
                                low, high, offset, temperature, reduce, none);
  a.grad_z = grad_z, a.grad_kl = grad_kl, a.grad_log_prob = grad_log_prob;
  a.grad_mean = grad_mean, a.grad_scale = grad_scale;
  a.grad_prior_mean = grad_prior_mean, a.grad_prior_scale = grad_prior_scale;
  return a;
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_* cuda) {
  cpu.def("gaussian_sample_forward", on_cpu(forward_args, gaussian_sample_forward_cpu));
  cpu.def("gaussian_sample_backward", on_cpu(backward_args, gaussian_sample_backward_cpu));
  if constexpr (kWithCuda) {
    cuda->def("gaussian_sample_forward", on_cuda(forward_args, gaussian_sample_forward_cuda));
    cuda->def("gaussian_sample_backward", on_cuda(backward_args, gaussian_sample_backward_cuda));
    cuda->attr("gaussian_sample_block_elements") = kGaussianBlockElements;
  }
});

}  // namespace
}  // namespace genperf
