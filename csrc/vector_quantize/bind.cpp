#include "../common/binding.h"
#include "vector_quantize.h"

namespace genperf {
namespace {

QuantizeArgs forward(View x, View codebook, View indices, View mask, View quantized, View chosen,
                     View squares, View counts, int metric, int reduction) {
  return {x,
          codebook,
          indices,
          mask,
          quantized,
          chosen,
          squares,
          counts,
          static_cast<Metric>(metric),
          static_cast<Reduction>(reduction)};
}

QuantizeBackwardArgs backward(View grad, View of_commitment, View of_codebook, View x, View codebook,
                              View chosen, View grad_x, View grad_codebook, int reduction, bool rotation) {
  return {grad,    of_commitment, of_codebook,
          x,       codebook,      chosen,
          grad_x,  grad_codebook, static_cast<Reduction>(reduction),
          rotation};
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("vector_quantize_forward", on_cpu(forward, vector_quantize_forward_cpu));
  cpu.def("vector_quantize_backward", on_cpu(backward, vector_quantize_backward_cpu));
});

}  // namespace
}  // namespace genperf
