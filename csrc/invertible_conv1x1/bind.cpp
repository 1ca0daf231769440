#include "../common/binding.h"
#include "direct.h"
#include "invertible_conv1x1.h"
#include "plu.h"

namespace genperf {
namespace {

InvertibleConv1x1Args forward(View x, View matrix, View logabsdet, View shift, View scale, View lengths,
                              bool log, bool inverse, View y, View logdet) {
  InvertibleConv1x1Args a{};
  a.source = x, a.matrix = matrix, a.logabsdet = logabsdet;
  a.shift = shift, a.scale = scale, a.lengths = lengths, a.log = log, a.inverse = inverse;
  a.result = y, a.logdet = logdet;
  return a;
}

InvertibleConv1x1Args backward(View grad_y, View grad_logdet, View source, View matrix, View undo, View shift,
                               View scale, View lengths, bool log, bool inverse, View result, View grad_x,
                               View grad_matrix, View grad_logabsdet, View grad_shift, View grad_scale) {
  InvertibleConv1x1Args a{};
  a.source = source, a.matrix = matrix, a.undo = undo;
  a.shift = shift, a.scale = scale, a.lengths = lengths, a.log = log, a.inverse = inverse;
  a.grad_y = grad_y, a.grad_logdet = grad_logdet;
  a.result = result, a.grad_x = grad_x, a.grad_matrix = grad_matrix, a.grad_logabsdet = grad_logabsdet;
  a.grad_shift = grad_shift, a.grad_scale = grad_scale;
  return a;
}

PluArgs plu(View p, View lower, View upper, View sign, View log_s, View matrix) {
  return {p, lower, upper, sign, log_s, matrix, View{}, View{}, View{}};
}

PluArgs plu_backward(View matrix, View p, View lower, View upper, View sign, View log_s, View grad_lower,
                     View grad_upper, View grad_log_s) {
  return {p, lower, upper, sign, log_s, matrix, grad_lower, grad_upper, grad_log_s};
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("invertible_conv1x1_forward", on_cpu(forward, invertible_conv1x1_forward_cpu));
  def_raw<forward_direct>(cpu, "invertible_conv1x1_direct");
  cpu.def("invertible_conv1x1_backward", on_cpu(backward, invertible_conv1x1_backward_cpu));
  cpu.def("plu_matrix", on_cpu(plu, plu_matrix_cpu));
  cpu.def("plu_matrix_backward", on_cpu(plu_backward, plu_matrix_backward_cpu));
});

}  // namespace
}  // namespace genperf
