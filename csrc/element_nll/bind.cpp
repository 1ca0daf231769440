#include "../common/binding.h"
#include "element_nll.h"

namespace genperf {
namespace {

ElementNllArgs arguments(int head, View nll, View grad_first, View grad_second, View grad_x, View grad_nll,
                         View first, View second, View x, float factor, float low, float high,
                         int reduction) {
  ElementNllArgs a{};
  a.first = first, a.second = second, a.x = x;
  a.nll = nll, a.grad_nll = grad_nll;
  a.grad_first = grad_first, a.grad_second = grad_second, a.grad_x = grad_x;
  a.head = static_cast<ElementHead>(head);
  a.factor = factor, a.low = low, a.high = high, a.reduction = reduction;
  return a;
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("element_nll", on_cpu(arguments, element_nll_cpu));
});

}  // namespace
}  // namespace genperf
