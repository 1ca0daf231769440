#include <pybind11/stl.h>

#include <utility>

#include "../common/binding.h"
#include "slogdet_inverse.h"

namespace genperf {
namespace {

SlogdetInverseArgs arguments(View packed, std::vector<int64_t> sizes, View sign, View logabsdet, View inverse,
                             View inverse_transpose, View status, View workspace) {
  return {packed, sign, logabsdet, inverse, inverse_transpose, status, workspace, std::move(sizes)};
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_* cuda) {
  cpu.def("slogdet_inverse", on_cpu(arguments, slogdet_inverse_cpu));
  if constexpr (kWithCuda) {
    cuda->def("slogdet_inverse", on_cuda(arguments, slogdet_inverse_cuda));
    cuda->attr("slogdet_inverse_shared_size") = kSharedSize;
    cuda->attr("slogdet_inverse_largest_size") = kLargestSize;
  }
});

}  // namespace
}  // namespace genperf
