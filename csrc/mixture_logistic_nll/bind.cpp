#include "../common/binding.h"
#include "mixture_logistic_nll.h"

namespace genperf {
namespace {

MixtureLogisticNllArgs arguments(View params, View x, int64_t mixtures, bool logits, int64_t levels,
                                 float low, float high, bool exact, bool unit, float min_log_scale,
                                 int reduction) {
  MixtureLogisticNllArgs a{};
  a.params = params, a.x = x;
  a.mixtures = mixtures, a.logits = logits;
  a.half = static_cast<float>(1.0 / static_cast<double>(levels - 1));
  a.low = low, a.high = high, a.exact = exact, a.unit = unit;
  a.min_log_scale = min_log_scale, a.reduction = reduction;
  return a;
}

MixtureLogisticNllArgs forward(View nll, View params, View x, int64_t mixtures, bool logits, int64_t levels,
                               float low, float high, bool exact, bool unit, float min_log_scale,
                               int reduction) {
  MixtureLogisticNllArgs a =
      arguments(params, x, mixtures, logits, levels, low, high, exact, unit, min_log_scale, reduction);
  a.nll = nll;
  return a;
}

MixtureLogisticNllArgs backward(View nll, View grad_params, View grad_x, View grad_nll, View params, View x,
                                int64_t mixtures, bool logits, int64_t levels, float low, float high,
                                bool exact, bool unit, float min_log_scale, int reduction) {
  MixtureLogisticNllArgs a =
      arguments(params, x, mixtures, logits, levels, low, high, exact, unit, min_log_scale, reduction);
  a.nll = nll, a.grad_nll = grad_nll, a.grad_params = grad_params, a.grad_x = grad_x;
  return a;
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("mixture_logistic_nll_forward", on_cpu(forward, mixture_logistic_nll_forward_cpu));
  cpu.def("mixture_logistic_nll_backward", on_cpu(backward, mixture_logistic_nll_backward_cpu));
});

}  // namespace
}  // namespace genperf
