#include <pybind11/stl.h>

#include <utility>

#include "../common/binding.h"
#include "slogdet_inverse.h"

namespace genperf {
namespace {

SlogdetInverseArgs arguments(View packed, std::vector<int64_t> sizes, View sign, View logabsdet, View inverse,
                             View inverse_transpose, View status) {
  return {packed, sign, logabsdet, inverse, inverse_transpose, status, std::move(sizes)};
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("slogdet_inverse", on_cpu(arguments, slogdet_inverse_cpu));
});

}  // namespace
}  // namespace genperf
