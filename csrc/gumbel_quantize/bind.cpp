#include "../common/binding.h"
#include "gumbel_quantize.h"

namespace genperf {
namespace {

GumbelQuantizeArgs forward(View logits, View codebook, View noise, View key, View indices, View kl, View mix,
                           double temperature) {
  return {logits, codebook, noise, key, indices, kl, mix, View{}, View{}, View{}, View{}, temperature};
}

GumbelQuantizeArgs backward(View logits, View codebook, View noise, View key, View grad_mix, View grad_kl,
                            View grad_logits, View grad_codebook, double temperature) {
  return {logits, codebook, noise,   key,         View{},        View{},
          View{}, grad_mix, grad_kl, grad_logits, grad_codebook, temperature};
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("gumbel_quantize_forward", on_cpu(forward, gumbel_quantize_forward_cpu));
  cpu.def("gumbel_quantize_backward", on_cpu(backward, gumbel_quantize_backward_cpu));
});

}  // namespace
}  // namespace genperf
