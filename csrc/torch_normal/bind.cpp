#include "../common/binding.h"
#include "torch_normal.h"

namespace genperf {
namespace {

TorchNormalArgs torch_normal_args(View out, View state) { return {out, state}; }

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("torch_normal", on_cpu(torch_normal_args, torch_normal_cpu));
});

}  // namespace
}  // namespace genperf
