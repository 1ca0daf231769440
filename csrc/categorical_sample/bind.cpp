#include "../common/binding.h"
#include "categorical_sample.h"

namespace genperf {
namespace {

CategoricalArgs draw(View logits, View noise, View key, View index, View log_prob, float temperature,
                     int64_t top_k, float top_p) {
  return {logits, noise, key, index, log_prob, {}, {}, temperature, top_k, top_p};
}

CategoricalArgs nats(View logits, View index, View log_prob, float temperature, int64_t top_k, float top_p) {
  return {logits, {}, {}, index, log_prob, {}, {}, temperature, top_k, top_p};
}

CategoricalArgs gradient(View grad, View logits, View index, View of_logits, float temperature, int64_t top_k,
                         float top_p) {
  return {logits, {}, {}, index, {}, grad, of_logits, temperature, top_k, top_p};
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("categorical_sample", on_cpu(draw, categorical_sample_cpu));
  cpu.def("categorical_log_prob", on_cpu(nats, categorical_log_prob_cpu));
  cpu.def("categorical_log_prob_backward", on_cpu(gradient, categorical_log_prob_backward_cpu));
});

}  // namespace
}  // namespace genperf
