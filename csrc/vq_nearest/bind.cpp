#include "../common/binding.h"
#include "vq_nearest.h"

namespace genperf {
namespace {

VqNearestArgs arguments(View x, View codebook, View indices, View distances, int metric) {
  return {x, codebook, indices, distances, static_cast<Metric>(metric)};
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("vq_nearest", on_cpu(arguments, vq_nearest_cpu));
});

}  // namespace
}  // namespace genperf
