#include <pybind11/stl.h>

#include "../common/binding.h"
#include "residual_vector_quantize.h"

namespace genperf {
namespace {

using Views = const std::vector<View>&;

template <class Args>
Args of(const View& x, Views codebooks) {
  Args a{};
  a.x = x, a.codebooks = codebooks.data(), a.n_codebooks = static_cast<int64_t>(codebooks.size());
  return a;
}

ResidualQuantizeArgs quantize_args(View x, Views codebooks, View limits, View quantized, View indices,
                                   View squares, int64_t n_stages, int metric) {
  auto a = of<ResidualQuantizeArgs>(x, codebooks);
  a.limits = limits, a.quantized = quantized, a.indices = indices, a.squares = squares;
  a.n_stages = n_stages, a.metric = static_cast<Metric>(metric);
  return a;
}

ResidualBackwardArgs backward_args(View grad, View coefficients, View x, Views codebooks, View indices,
                                   View grad_x, bool rotation, bool of_sum, double fraction) {
  auto a = of<ResidualBackwardArgs>(x, codebooks);
  a.grad = grad, a.coefficients = coefficients, a.indices = indices, a.grad_x = grad_x;
  a.rotation = rotation, a.of_sum = of_sum, a.fraction = static_cast<float>(fraction);
  return a;
}

ResidualStatisticsArgs statistics_args(View x, Views codebooks, View indices, View counts, View sums,
                                       bool differences) {
  auto a = of<ResidualStatisticsArgs>(x, codebooks);
  a.indices = indices, a.counts = counts, a.sums = sums, a.differences = differences;
  return a;
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("residual_vector_quantize", on_cpu(quantize_args, residual_vector_quantize_cpu));
  cpu.def("residual_vector_quantize_backward", on_cpu(backward_args, residual_vector_quantize_backward_cpu));
  cpu.def("residual_codebook_statistics", on_cpu(statistics_args, residual_codebook_statistics_cpu));
});

}  // namespace
}  // namespace genperf
