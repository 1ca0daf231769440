// The one extension module: runs the binders that each op's bind.cpp registered.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/binding.h"
#include "common/direct.h"
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

// Before any call that goes past torch's dispatcher; see Torch.
void meet_torch(const py::module_& torch, const py::list& listeners, const py::list& tensors,
                const py::list& others) {
  Torch& t = Torch::instance();
  t = Torch{};
  for (py::handle x : listeners) t.listeners.push_back(x.inc_ref().ptr());
  for (py::handle x : tensors) t.tensors.push_back((PyTypeObject*)x.inc_ref().ptr());
  for (py::handle x : others) t.others.push_back((PyTypeObject*)x.inc_ref().ptr());
  t.device = (PyTypeObject*)py::object(torch.attr("device")).release().ptr();
  t.is_neg = py::object(torch.attr("Tensor").attr("is_neg")).release().ptr();
  t.new_empty = py::object(torch.attr("Tensor").attr("new_empty")).release().ptr();
  t.empty_like = py::object(torch.attr("empty_like")).release().ptr();
  t.is_grad_enabled = py::object(torch.attr("is_grad_enabled")).release().ptr();
  t.float32 = py::object(torch.attr("float32")).release().ptr();
}

// The device type of a call with these arguments, if it may go past torch's dispatcher; else None.
py::object direct_device(PyObject* const* args, Py_ssize_t n) {
  const Torch& torch = Torch::instance();
  if (!torch.quiet()) return py::none();
  py::handle first;
  for (Py_ssize_t i = 0; i < n; ++i) {
    const bool tensor = torch.is_tensor(args[i]);
    if (tensor ? torch.is_negated(args[i]) : !torch.is_other(args[i])) return py::none();
    if (!first && (tensor || torch.is_device(args[i]))) first = args[i];
  }
  return first ? torch.device_type(first) : py::str("cpu");
}

}  // namespace

PYBIND11_MODULE(GENPERF_MODULE_NAME, module) {
  module.def("isas", isas, "The CPU instruction sets that this machine runs, narrowest first.");
  module.def("isa", isa, "The one in use.");
  module.def("set_isa", choose_isa);
  module.attr("version") = GENPERF_VERSION;
  module.attr("compiler") = __VERSION__;
  module.attr("cuda_architectures") = GENPERF_CUDA_ARCHITECTURES;
  module.def("meet_torch", meet_torch);
  def_raw<direct_device>(module, "direct_device");
  py::module_ cpu = module.def_submodule("cpu");
  py::module_ cuda;
  if constexpr (kWithCuda) cuda = module.def_submodule("cuda");
  for (Binder bind : binders()) bind(cpu, kWithCuda ? &cuda : nullptr);
}

}  // namespace genperf
