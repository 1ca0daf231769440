#include <algorithm>

#include "../common/binding.h"
#include "../common/direct.h"
#include "mixture_logistic_sample.h"

namespace genperf {
namespace {

MixtureLogisticSampleArgs arguments(View out, View params, View of_mixture, View of_values, View key,
                                    int64_t mixtures, bool logits, bool unit, float min_log_scale,
                                    float temperature, float heat) {
  return {params, of_mixture, of_values, key, out, mixtures, logits, unit, min_log_scale, temperature, heat};
}

// (params, channel_dim, key, passing, (channels, mixtures, unit, min_log_scale, temperature, heat)) -> the
// sample [B, C, *]; or NotImplemented where anything but a plain call is asked for, or the arguments do not
// fit. `mixtures` of 0 is what the channels give. Where `key` is None it is drawn into passing.key.
pybind11::object direct(PyObject* const* args, Py_ssize_t n) {
  namespace py = pybind11;
  const Torch& torch = Torch::instance();
  const py::object other = py::reinterpret_borrow<py::object>(Py_NotImplemented);
  if (n != 5) throw std::invalid_argument("mixture_logistic_sample_direct: expected five arguments");
  PyObject *const params = args[0], *const settings = args[4];
  const auto integer = [=](int i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(settings, i)); };
  const auto number = [=](int i) {
    return static_cast<float>(PyFloat_AsDouble(PyTuple_GET_ITEM(settings, i)));
  };
  DlTensor p;
  MixtureLogisticSampleArgs a{};
  DType dtype;
  if (!torch.plain(params, p) || !dtype_of(p, dtype) || p.device_type != DlTensor::kCpu || p.ndim < 2 ||
      p.ndim > kMaxDims ||
      (dtype != DType::kFloat32 && dtype != DType::kFloat16 && dtype != DType::kBFloat16) || !torch.quiet())
    return other;
  a.params = view_of(p, dtype);
  if (PyLong_AsLong(args[1]) != 1) {
    std::rotate(a.params.shape + 1, a.params.shape + p.ndim - 1, a.params.shape + p.ndim);
    std::rotate(a.params.stride + 1, a.params.stride + p.ndim - 1, a.params.stride + p.ndim);
  }
  const int64_t channels = integer(0), each = channels == 1 ? 3 : 10, wanted = integer(1);
  a.mixtures = a.params.shape[1] / each;
  if (a.mixtures < 1 || a.params.shape[1] != a.mixtures * each || (wanted != 0 && wanted != a.mixtures))
    return other;
  py::object key;
  if (!key_of(torch, args[2], args[3], key, a.key)) return other;
  a.logits = true;
  a.unit = PyTuple_GET_ITEM(settings, 2) == Py_True;
  a.min_log_scale = number(3), a.temperature = number(4), a.heat = number(5);
  int64_t shape[kMaxDims];
  std::copy(a.params.shape, a.params.shape + p.ndim, shape);
  shape[1] = channels;
  py::object out = torch.new_sized(params, p.ndim, shape);
  a.out = view_of(out.ptr());
  if (a.params.numel() < kFewElements) {
    mixture_logistic_sample_cpu(a);
  } else {
    py::gil_scoped_release release;
    mixture_logistic_sample_cpu(a);
  }
  return out;
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("mixture_logistic_sample", on_cpu(arguments, mixture_logistic_sample_cpu));
  def_raw<direct>(cpu, "mixture_logistic_sample_direct");
});

}  // namespace
}  // namespace genperf
