// Python tensors as View, without a torch header: through the C table that torch offers since 2.10 for
// DLPack, or by the attributes of the tensor, which takes ten times as long.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "view.h"

namespace genperf {

// As DLPack 1.2 lays them out; of the table, the fields up to the one in use.
struct DlTensor {
  static constexpr int32_t kCpu = 1;

  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DlExchange {
  uint32_t major, minor;
  void* previous;
  void* others[3];
  int (*borrow)(void* tensor, DlTensor* out);
};

// The table of a tensor's class, or null.
inline const DlExchange* exchange_of(PyTypeObject* type) {
  struct Known {
    PyTypeObject* type;
    const DlExchange* exchange;
  };
  static std::vector<Known> known;
  for (const Known& k : known)
    if (k.type == type) return k.exchange;
  const DlExchange* exchange = nullptr;
  if (PyObject* capsule = PyObject_GetAttrString((PyObject*)type, "__dlpack_c_exchange_api__")) {
    exchange = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    if (exchange && (exchange->major != 1 || !exchange->borrow)) exchange = nullptr;
    Py_DECREF(capsule);
  }
  PyErr_Clear();
  Py_INCREF(type);
  known.push_back({type, exchange});
  return exchange;
}

// False where the table is missing, or the tensor cannot be described by it.
inline bool borrow(PyObject* tensor, DlTensor& out) {
  const DlExchange* exchange = exchange_of(Py_TYPE(tensor));
  if (!exchange) return false;
  if (exchange->borrow(tensor, &out) == 0) return true;
  PyErr_Clear();
  return false;
}

inline bool dtype_of(const DlTensor& x, DType& dtype) {
  enum : int { kInt = 0, kFloat = 2, kBFloat = 4 };
  struct {
    int code, bits;
    DType dtype;
  } static constexpr kTypes[] = {{kFloat, 32, DType::kFloat32},
                                 {kFloat, 16, DType::kFloat16},
                                 {kBFloat, 16, DType::kBFloat16},
                                 {kFloat, 64, DType::kFloat64},
                                 {kInt, 64, DType::kInt64}};
  for (const auto& t : kTypes) {
    if (t.code != x.type_code || t.bits != x.bits || x.lanes != 1) continue;
    dtype = t.dtype;
    return true;
  }
  return false;
}

namespace detail {

inline pybind11::object owned(PyObject* result) {
  if (!result) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(result);
}

// torch's dtypes are singletons: each is read by name once and known by address afterwards.
inline DType dtype_of(const pybind11::object& type) {
  static std::vector<std::pair<PyObject*, DType>> known;
  for (const auto& [object, dtype] : known)
    if (object == type.ptr()) return dtype;
  const std::string name = pybind11::str(type);
  for (const auto& [known_name, dtype] :
       {std::pair{"torch.float32", DType::kFloat32}, std::pair{"torch.float16", DType::kFloat16},
        std::pair{"torch.bfloat16", DType::kBFloat16}, std::pair{"torch.float64", DType::kFloat64},
        std::pair{"torch.int64", DType::kInt64}}) {
    if (name != known_name) continue;
    known.emplace_back(type.inc_ref().ptr(), dtype);
    return dtype;
  }
  throw pybind11::type_error("genperf._native: unsupported dtype " + name);
}

// By data_ptr(), dtype, shape and stride().
inline View view_by_attributes(PyObject* tensor) {
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  static PyObject* const dtype = PyUnicode_InternFromString("dtype");
  static PyObject* const shape = PyUnicode_InternFromString("shape");
  static PyObject* const stride = PyUnicode_InternFromString("stride");
  const pybind11::object pointer = owned(PyObject_CallMethodNoArgs(tensor, data_ptr));
  const pybind11::object sizes = owned(PyObject_GetAttr(tensor, shape));
  const pybind11::object strides = owned(PyObject_CallMethodNoArgs(tensor, stride));
  View view;
  view.data = PyLong_AsVoidPtr(pointer.ptr());
  view.dtype = dtype_of(owned(PyObject_GetAttr(tensor, dtype)));
  view.ndim = static_cast<int>(PyTuple_GET_SIZE(sizes.ptr()));
  for (int d = 0; d < view.ndim && d < kMaxDims; ++d) {
    view.shape[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), d));
    view.stride[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), d));
  }
  return view;
}

}  // namespace detail

// Of a tensor that has been borrowed. More than kMaxDims dimensions leave `ndim` above it and the rest
// undefined.
inline View view_of(const DlTensor& x, DType dtype) {
  View view;
  view.data = static_cast<char*>(x.data) + x.byte_offset;
  view.dtype = dtype;
  view.ndim = x.ndim;
  for (int d = 0; d < x.ndim && d < kMaxDims; ++d) view.shape[d] = x.shape[d], view.stride[d] = x.strides[d];
  return view;
}

// None is an absent view.
inline View view_of(PyObject* tensor) {
  if (tensor == Py_None) return View{};
  DlTensor x;
  DType dtype;
  return borrow(tensor, x) && dtype_of(x, dtype) ? view_of(x, dtype) : detail::view_by_attributes(tensor);
}

}  // namespace genperf
