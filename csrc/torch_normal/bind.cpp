#include <cstring>

#include "../common/binding.h"
#include "torch_normal.h"

namespace genperf {
namespace {

TorchNormalArgs torch_normal_args(View out, View state) { return {out, state}; }

// Gives a torch.Generator the state `after`, if it still has the state `before`; both uint8 tensors. No
// Python code runs in between, so that no other thread of the interpreter does.
bool exchange_state(pybind11::object generator, pybind11::object before, pybind11::object after) {
  const auto bytes = [](const pybind11::object& state) {
    return reinterpret_cast<const void*>(state.attr("data_ptr")().cast<uintptr_t>());
  };
  const size_t size = before.attr("numel")().cast<size_t>();
  const pybind11::object now = generator.attr("get_state")();
  if (std::memcmp(bytes(now), bytes(before), size) != 0) return false;
  generator.attr("set_state")(after);
  return true;
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("torch_normal", on_cpu(torch_normal_args, torch_normal_cpu));
  cpu.def("exchange_state", exchange_state);
});

}  // namespace
}  // namespace genperf
