// Calls that go past torch's dispatcher: on few elements, that and the questions whether it may be left
// out take longer than a kernel. Asked from here they take a fifth of what they take from Python.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>

#include "tensor.h"

namespace genperf {

// What of torch is needed for that; set by `meet_torch`.
struct Torch {
  std::vector<PyObject*> listeners;    // functions; a true result: something is listening to the dispatcher
  std::vector<PyTypeObject*> tensors;  // Tensor and Parameter
  std::vector<PyTypeObject*> others;   // types that the dispatcher passes on as they are
  PyTypeObject* device = nullptr;      // torch.device, one of these
  PyObject *is_neg = nullptr, *new_empty = nullptr, *empty_like = nullptr, *is_grad_enabled = nullptr;
  PyObject* float32 = nullptr;

  static Torch& instance() {
    static Torch torch;
    return torch;
  }

  // A tensor of torch's own classes, with no sign to be changed; `out` borrows it.
  bool plain(PyObject* x, DlTensor& out) const { return is_tensor(x) && !is_negated(x) && borrow(x, out); }

  // Nothing is listening to the dispatcher.
  bool quiet() const {
    for (PyObject* listener : listeners)
      if (is_true(PyObject_CallNoArgs(listener))) return false;
    return true;
  }

  bool is_tensor(PyObject* x) const { return contains(tensors, Py_TYPE(x)); }
  bool is_other(PyObject* x) const { return contains(others, Py_TYPE(x)); }
  bool is_device(PyObject* x) const { return Py_TYPE(x) == device; }

  // "cpu", "cuda", ...: of a tensor or of a torch.device.
  pybind11::object device_type(pybind11::handle x) const {
    static PyObject* const cpu = PyUnicode_InternFromString("cpu");
    DlTensor dl;
    if (is_device(x.ptr())) return x.attr("type");
    if (borrow(x.ptr(), dl) && dl.device_type == DlTensor::kCpu)
      return pybind11::reinterpret_borrow<pybind11::object>(cpu);
    return x.attr("device").attr("type");
  }

  // The tensor's values have a sign that is yet to be changed.
  bool is_negated(PyObject* tensor) const { return is_true(PyObject_CallOneArg(is_neg, tensor)); }
  bool grad_enabled() const { return is_true(PyObject_CallNoArgs(is_grad_enabled)); }

  static bool requires_grad(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("requires_grad");
    return is_true(PyObject_GetAttr(tensor, name));
  }

  // Contiguous, of a tensor's dtype and device; of at least one dimension.
  pybind11::object new_sized(PyObject* tensor, int ndim, const int64_t* shape) const {
    pybind11::object sizes[kMaxDims];  // each an argument of its own: torch is slower to read a tuple
    PyObject* args[1 + kMaxDims] = {tensor};
    for (int d = 0; d < ndim; ++d) {
      sizes[d] = pybind11::int_(shape[d]);
      args[1 + d] = sizes[d].ptr();
    }
    return detail::owned(PyObject_Vectorcall(new_empty, args, 1 + ndim, nullptr));
  }

  // Of the shape and strides of a tensor, and of its dtype or in float32.
  pybind11::object new_like(PyObject* tensor, bool own_dtype = true) const {
    PyObject* args[] = {tensor, float32};
    return detail::owned(PyObject_Vectorcall(empty_like, args, 1, own_dtype ? nullptr : dtype_keyword()));
  }

  // float32 [n] on the device of a tensor, whose dtype is float32 or not.
  pybind11::object new_floats(PyObject* tensor, bool is_float32, int64_t n) const {
    const pybind11::int_ size(n);
    PyObject* args[] = {tensor, size.ptr(), float32};
    return detail::owned(PyObject_Vectorcall(new_empty, args, 2, is_float32 ? nullptr : dtype_keyword()));
  }

 private:
  static PyObject* dtype_keyword() {
    static PyObject* const names = Py_BuildValue("(s)", "dtype");
    return names;
  }

  static bool is_true(PyObject* result) { return PyObject_IsTrue(detail::owned(result).ptr()) == 1; }

  static bool contains(const std::vector<PyTypeObject*>& types, PyTypeObject* type) {
    for (PyTypeObject* t : types)
      if (t == type) return true;
    return false;
  }
};

inline bool same_kind(const DlTensor& a, const DlTensor& b) {
  return a.type_code == b.type_code && a.bits == b.bits && a.device_type == b.device_type &&
         a.device_id == b.device_id;
}

inline bool same_shape(const DlTensor& a, const DlTensor& b) {
  return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

// Elements below which a kernel runs with the interpreter's lock: other threads may wait.
inline constexpr int64_t kFewElements = 4096;

// The key of a call: the one given, int64 [2] on the CPU, or, for None, passing.key (see philox_random.py)
// filled from torch's default generator. False where it is anything else.
inline bool key_of(const Torch& torch, PyObject* given, PyObject* passing, pybind11::object& key,
                   View& view) {
  static PyObject* const name = PyUnicode_InternFromString("key");
  static PyObject* const random = PyUnicode_InternFromString("random_");
  if (given == Py_None) {
    key = detail::owned(
        PyObject_CallMethodNoArgs(detail::owned(PyObject_GetAttr(passing, name)).ptr(), random));
  } else {
    key = pybind11::reinterpret_borrow<pybind11::object>(given);
  }
  DlTensor k;
  DType dtype;
  if (!torch.is_tensor(key.ptr()) || !borrow(key.ptr(), k) || !dtype_of(k, dtype) || dtype != DType::kInt64 ||
      k.ndim != 1 || k.shape[0] != 2 || k.device_type != DlTensor::kCpu)
    return false;
  view = view_of(k, dtype);
  return true;
}

using RawFunction = PyObject* (*)(PyObject* self, PyObject* const* args, Py_ssize_t n);

// A function without pybind11's conversion of arguments, which would take longer than the function.
// Exceptions of C++ become Python's.
template <pybind11::object (*function)(PyObject* const*, Py_ssize_t)>
void def_raw(pybind11::module_& module, const char* name) {
  static PyMethodDef methods[2] = {};
  const RawFunction raw = [](PyObject*, PyObject* const* args, Py_ssize_t n) -> PyObject* {
    try {
      return function(args, n).release().ptr();
    } catch (pybind11::error_already_set& error) {
      error.restore();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  };
  methods[0] = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(raw)), METH_FASTCALL,
                nullptr};
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace genperf
