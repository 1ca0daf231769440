#include "../common/binding.h"
#include "gumbel_softmax.h"

namespace genperf {
namespace {

GumbelSoftmaxArgs forward(View logits, View noise, View key, View y, int dim, double tau, bool hard) {
  return {logits, noise, key, y, View{}, View{}, dim, tau, hard};
}

GumbelSoftmaxArgs backward(View grad, View y, View logits, View noise, View key, View grad_logits, int dim,
                           double tau) {
  return {logits, noise, key, y, grad, grad_logits, dim, tau, false};
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("gumbel_softmax_forward", on_cpu(forward, gumbel_softmax_forward_cpu));
  cpu.def("gumbel_softmax_backward", on_cpu(backward, gumbel_softmax_backward_cpu));
});

}  // namespace
}  // namespace genperf
