#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "../common/binding.h"
#include "truncated_normal.h"

namespace genperf {
namespace {

TruncatedNormalArgs arguments(View out, View noise, View key, int kind, std::array<float, 9> constants) {
  TruncatedNormalArgs a{out, noise, key, kind, {}};
  std::copy(constants.begin(), constants.end(), a.constants);
  return a;
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("truncated_normal", on_cpu(arguments, truncated_normal_cpu));
});

}  // namespace
}  // namespace genperf
