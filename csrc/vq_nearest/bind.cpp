#include "../common/binding.h"
#include "vq_nearest.h"

namespace genperf {
namespace {

// With a dimension of one at the front; an absent tensor stays absent.
View with_one(View v) {
  if (!v) return v;
  for (int d = v.ndim++; d > 0; --d) v.shape[d] = v.shape[d - 1], v.stride[d] = v.stride[d - 1];
  v.shape[0] = 1, v.stride[0] = 0;
  return v;
}

// Without heads, indices are [*], of one codeword.
VqNearestArgs arguments(View x, View codebook, View indices, View distances, int metric) {
  if (codebook.ndim == 2) {
    x = with_one(x), codebook = with_one(codebook), indices = with_one(indices);
    indices.shape[indices.ndim] = indices.stride[indices.ndim] = 1;
    ++indices.ndim;
  }
  return {x, codebook, indices, distances, static_cast<Metric>(metric)};
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("vq_nearest", on_cpu(arguments, vq_nearest_cpu));
});

}  // namespace
}  // namespace genperf
