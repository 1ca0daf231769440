#include "../common/binding.h"
#include "affine_coupling.h"

namespace genperf {
namespace {

CouplingArgs forward_args(View x, View h, View h_scale, View mask, View y, View logdet, int scale, bool pre,
                          float sign, bool reciprocal, float prefactor, float offset, float eps, float clamp,
                          float slope, bool interleaved, bool shift_first, int64_t start, int64_t n) {
  CouplingArgs a{};
  a.x = x, a.h = h, a.h_scale = h_scale, a.mask = mask;
  a.y = y, a.logdet = logdet;
  a.scale = static_cast<CouplingScale>(scale);
  a.pre = pre, a.sign = sign, a.reciprocal = reciprocal;
  a.prefactor = prefactor, a.offset = offset, a.eps = eps, a.clamp = clamp, a.slope = slope;
  a.interleaved = interleaved, a.shift_first = shift_first;
  a.start = start, a.n = n;
  return a;
}

CouplingArgs backward_args(View grad_y, View grad_logdet, View x, View h, View h_scale, View mask,
                           View grad_x, View grad_h, View grad_h_scale, View rebuilt, int scale, bool pre,
                           float sign, bool reciprocal, float prefactor, float offset, float eps, float clamp,
                           float slope, bool interleaved, bool shift_first, int64_t start, int64_t n,
                           bool from_output) {
  View none;
  CouplingArgs a = forward_args(x, h, h_scale, mask, none, none, scale, pre, sign, reciprocal, prefactor,
                                offset, eps, clamp, slope, interleaved, shift_first, start, n);
  a.grad_y = grad_y, a.grad_logdet = grad_logdet;
  a.grad_x = grad_x, a.grad_h = grad_h, a.grad_h_scale = grad_h_scale, a.rebuilt = rebuilt;
  a.from_output = from_output;
  return a;
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("affine_coupling_forward", on_cpu(forward_args, affine_coupling_forward_cpu));
  cpu.def("affine_coupling_backward", on_cpu(backward_args, affine_coupling_backward_cpu));
});

}  // namespace
}  // namespace genperf
