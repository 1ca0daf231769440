#include "../common/binding.h"
#include "philox_random.h"

namespace genperf {
namespace {

PhiloxArgs philox_args(View out, View key, int kind) { return {out, key, static_cast<RandomKind>(kind)}; }

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_* cuda) {
  cpu.def("philox_random", on_cpu(philox_args, philox_random_cpu));
  if constexpr (kWithCuda) cuda->def("philox_random", on_cuda(philox_args, philox_random_cuda));
});

}  // namespace
}  // namespace genperf
