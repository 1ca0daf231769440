#include "../common/binding.h"
#include "soft_assignment.h"

namespace genperf {
namespace {

SoftAssignmentArgs forward(View x, View codebook, View targets, View log_sum_exp, View entropy,
                           View mean_prob, View nll, int score, double temperature) {
  return {x,          codebook, targets, log_sum_exp, entropy,
          mean_prob,  nll,      View{},  View{},      static_cast<Score>(score),
          temperature};
}

SoftAssignmentArgs backward(View log_sum_exp, View entropy, View mean_prob, View nll, View x, View codebook,
                            View targets, View grad_x, View grad_codebook, int score, double temperature) {
  return {x,          codebook, targets, log_sum_exp,   entropy,
          mean_prob,  nll,      grad_x,  grad_codebook, static_cast<Score>(score),
          temperature};
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("soft_assignment_forward", on_cpu(forward, soft_assignment_forward_cpu));
  cpu.def("soft_assignment_backward", on_cpu(backward, soft_assignment_backward_cpu));
});

}  // namespace
}  // namespace genperf
