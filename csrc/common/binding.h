// What every bind.cpp needs: Python tensors as View, and a list of binders that module.cpp runs.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <vector>

#include "view.h"

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

// Any object with torch's data_ptr(), dtype, shape and stride(); None is an absent view.
template <>
struct type_caster<genperf::View> {
  PYBIND11_TYPE_CASTER(genperf::View, const_name("Tensor | None"));

  bool load(handle tensor, bool) {
    value = genperf::View{};
    if (tensor.is_none()) return true;
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    static PyObject* const dtype = PyUnicode_InternFromString("dtype");
    static PyObject* const shape = PyUnicode_InternFromString("shape");
    static PyObject* const stride = PyUnicode_InternFromString("stride");

    object pointer = steal(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr));
    object type = steal(PyObject_GetAttr(tensor.ptr(), dtype));
    object sizes = steal(PyObject_GetAttr(tensor.ptr(), shape));
    object strides = steal(PyObject_CallMethodNoArgs(tensor.ptr(), stride));
    value.data = PyLong_AsVoidPtr(pointer.ptr());
    value.dtype = dtype_of(type);
    value.ndim = static_cast<int>(PyTuple_GET_SIZE(sizes.ptr()));
    if (value.ndim > genperf::kMaxDims) return false;
    for (int d = 0; d < value.ndim; ++d) {
      value.shape[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), d));
      value.stride[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), d));
    }
    return true;
  }

 private:
  static object steal(PyObject* result) {
    if (!result) throw error_already_set();
    return reinterpret_steal<object>(result);
  }

  // torch's dtypes are singletons: each is read by name once and known by address afterwards.
  static genperf::DType dtype_of(const object& type) {
    struct Known {
      PyObject* type;
      genperf::DType dtype;
    };
    static std::vector<Known> known;
    for (const Known& k : known)
      if (k.type == type.ptr()) return k.dtype;
    std::string name = str(type);
    genperf::DType dtype;
    if (name == "torch.float32")
      dtype = genperf::DType::kFloat32;
    else if (name == "torch.float16")
      dtype = genperf::DType::kFloat16;
    else if (name == "torch.bfloat16")
      dtype = genperf::DType::kBFloat16;
    else if (name == "torch.float64")
      dtype = genperf::DType::kFloat64;
    else if (name == "torch.int64")
      dtype = genperf::DType::kInt64;
    else
      throw type_error("genperf._native: unsupported dtype " + name);
    known.push_back({type.inc_ref().ptr(), dtype});
    return dtype;
  }
};

}  // namespace pybind11::detail
