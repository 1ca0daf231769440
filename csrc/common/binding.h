// What every bind.cpp needs: Python tensors as View, and a list of binders that module.cpp runs.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <vector>

#include "tensor.h"

namespace genperf {

// A binder adds one op's functions to the submodules `cpu` and `cuda` (null where CUDA is not built).
using Binder = void (*)(pybind11::module_& cpu, pybind11::module_* cuda);

inline std::vector<Binder>& binders() {
  static std::vector<Binder> list;
  return list;
}

struct RegisterBinder {
  explicit RegisterBinder(Binder binder) { binders().push_back(binder); }
};

// CUDA in this build, real or emulated.
#if defined(GENPERF_WITH_CUDA) || defined(GENPERF_SIMT)
inline constexpr bool kWithCuda = true;
#else
inline constexpr bool kWithCuda = false;
#endif

// The name of a cudaError_t.
const char* cuda_error_string(int error);

// A Python function that packs its arguments and runs a CPU kernel without the interpreter's lock.
template <class Args, class... P>
auto on_cpu(Args (*pack)(P...), void (*run)(const Args&)) {
  return [=](P... arguments) {
    const Args args = pack(arguments...);
    pybind11::gil_scoped_release release;
    run(args);
  };
}

// The same for a CUDA launcher; the stream comes last.
template <class Args, class... P>
auto on_cuda(Args (*pack)(P...), int (*launch)(const Args&, void*)) {
  return [=](P... arguments, intptr_t stream) {
    const Args args = pack(arguments...);
    int error = 0;
    {
      pybind11::gil_scoped_release release;
      error = launch(args, reinterpret_cast<void*>(stream));
    }
    if (error != 0) throw std::runtime_error(cuda_error_string(error));
  };
}

}  // namespace genperf

namespace pybind11::detail {

template <>
struct type_caster<genperf::View> {
  PYBIND11_TYPE_CASTER(genperf::View, const_name("Tensor | None"));

  bool load(handle tensor, bool) {
    value = genperf::view_of(tensor.ptr());
    return value.ndim <= genperf::kMaxDims;
  }
};

}  // namespace pybind11::detail
