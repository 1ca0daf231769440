// The one extension module: runs the binders that each op's bind.cpp registered.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/binding.h"
#include "common/isa.h"

#if defined(GENPERF_WITH_CUDA) || defined(GENPERF_SIMT)
#include "common/cuda.h"
#endif

namespace py = pybind11;

namespace genperf {

const char* cuda_error_string(int error) {
#if defined(GENPERF_WITH_CUDA) || defined(GENPERF_SIMT)
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#else
  (void)error;
  return "CUDA is not built in";
#endif
}

namespace {

constexpr struct {
  const char* name;
  Isa isa;
} kIsas[] = {{"baseline", Isa::baseline}, {"avx2", Isa::avx2}, {"avx512", Isa::avx512}};

py::tuple isas() {
  py::list usable;
  for (const auto& [name, isa] : kIsas)
    if (has_isa(isa)) usable.append(name);
  return py::tuple(usable);
}

const char* isa() {
  for (const auto& [name, isa] : kIsas)
    if (isa == current_isa()) return name;
  return "";
}

void choose_isa(const std::string& wanted) {
  for (const auto& [name, isa] : kIsas) {
    if (wanted == name && has_isa(isa)) return set_isa(isa);
  }
  throw std::invalid_argument("this machine cannot run instruction set '" + wanted + "'");
}

}  // namespace

PYBIND11_MODULE(GENPERF_MODULE_NAME, module) {
  module.def("isas", isas, "The CPU instruction sets that this machine runs, narrowest first.");
  module.def("isa", isa, "The one in use.");
  module.def("set_isa", choose_isa);
  module.attr("version") = GENPERF_VERSION;
  module.attr("compiler") = __VERSION__;
  module.attr("cuda_architectures") = GENPERF_CUDA_ARCHITECTURES;
  py::module_ cpu = module.def_submodule("cpu");
  py::module_ cuda;
  if constexpr (kWithCuda) cuda = module.def_submodule("cuda");
  for (Binder bind : binders()) bind(cpu, kWithCuda ? &cuda : nullptr);
}

}  // namespace genperf
