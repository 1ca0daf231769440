#include "../common/binding.h"
#include "bernoulli_sample.h"

namespace genperf {
namespace {

BernoulliSampleArgs arguments(View out, View logits, View noise, View key, float temperature) {
  return {out, logits, noise, key, temperature};
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("bernoulli_sample", on_cpu(arguments, bernoulli_sample_cpu));
});

}  // namespace
}  // namespace genperf
