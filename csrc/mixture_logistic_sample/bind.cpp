#include "../common/binding.h"
#include "mixture_logistic_sample.h"

namespace genperf {
namespace {

MixtureLogisticSampleArgs arguments(View out, View params, View of_mixture, View of_values, View key,
                                    int64_t mixtures, bool logits, bool unit, float min_log_scale,
                                    float temperature, float heat) {
  return {params, of_mixture, of_values, key, out, mixtures, logits, unit, min_log_scale, temperature, heat};
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("mixture_logistic_sample", on_cpu(arguments, mixture_logistic_sample_cpu));
});

}  // namespace
}  // namespace genperf
