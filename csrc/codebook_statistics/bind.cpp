#include "../common/binding.h"
#include "codebook_statistics.h"

namespace genperf {
namespace {

CodebookStatisticsArgs arguments(View x, View indices, View counts, View sums) {
  return {x, indices, counts, sums};
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("codebook_statistics", on_cpu(arguments, codebook_statistics_cpu));
});

}  // namespace
}  // namespace genperf
