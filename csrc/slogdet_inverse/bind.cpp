#include "../common/binding.h"
#include "slogdet_inverse.h"

namespace genperf {
namespace {

SlogdetInverseArgs arguments(View packed, View sizes, View sign, View logabsdet, View inverse,
                             View inverse_transpose, View status) {
  return {packed, sizes, sign, logabsdet, inverse, inverse_transpose, status};
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("slogdet_inverse", on_cpu(arguments, slogdet_inverse_cpu));
});

}  // namespace
}  // namespace genperf
