#include "../common/binding.h"
#include "../common/direct.h"
#include "gaussian_sample.h"

namespace genperf {
namespace {

GaussianArgs forward_args(View mean, View scale, View prior_mean, View prior_scale, View noise, View key,
                          View z, View kl, View log_prob, int transform, float low, float high, float offset,
                          float temperature, bool reduce, View partials) {
  GaussianArgs a{};
  a.mean = mean, a.scale = scale, a.prior_mean = prior_mean, a.prior_scale = prior_scale;
  a.noise = noise, a.key = key;
  a.z = z, a.kl = kl, a.log_prob = log_prob;
  a.partials = partials;
  a.transform = static_cast<Transform>(transform);
  a.low = low, a.high = high, a.offset = offset, a.temperature = temperature;
  a.reduce = reduce;
  return a;
}

GaussianArgs backward_args(View grad_z, View grad_kl, View grad_log_prob, View mean, View scale,
                           View prior_mean, View prior_scale, View noise, View key, View grad_mean,
                           View grad_scale, View grad_prior_mean, View grad_prior_scale, int transform,
                           float low, float high, float offset, float temperature, bool reduce) {
  View none;
  GaussianArgs a = forward_args(mean, scale, prior_mean, prior_scale, noise, key, none, none, none, transform,
                                low, high, offset, temperature, reduce, none);
  a.grad_z = grad_z, a.grad_kl = grad_kl, a.grad_log_prob = grad_log_prob;
  a.grad_mean = grad_mean, a.grad_scale = grad_scale;
  a.grad_prior_mean = grad_prior_mean, a.grad_prior_scale = grad_prior_scale;
  return a;
}

// (type, mean, scale, key, passing, (transform, low, high, offset, temperature, reduce), z, kl, log_prob) ->
// `type` of the three results, None where not wanted; or NotImplemented where anything but a plain call
// without a gradient is asked for, or the arguments do not fit. `type` is a tuple. Where `key` is None it is
// drawn into passing.key.
pybind11::object forward_direct(PyObject* const* args, Py_ssize_t n) {
  namespace py = pybind11;
  const Torch& torch = Torch::instance();
  const py::object other = py::reinterpret_borrow<py::object>(Py_NotImplemented);
  if (n != 9) throw std::invalid_argument("gaussian_sample_direct: expected nine arguments");
  PyObject *const mean = args[1], *const scale = args[2], *const settings = args[5];
  DlTensor m, s;
  DType dtype;
  if (!torch.plain(mean, m) || !torch.plain(scale, s) || !dtype_of(m, dtype) || !same_kind(m, s) ||
      !same_shape(m, s))
    return other;
  const bool reduce = PyTuple_GET_ITEM(settings, 5) == Py_True;
  if (m.device_type != DlTensor::kCpu || m.ndim > kMaxDims || (reduce && m.ndim == 0) ||
      (dtype != DType::kFloat32 && dtype != DType::kFloat16 && dtype != DType::kBFloat16))
    return other;
  if (!torch.quiet() || (torch.grad_enabled() && (torch.requires_grad(mean) || torch.requires_grad(scale))))
    return other;
  const bool want_z = PyObject_IsTrue(args[6]), want_kl = PyObject_IsTrue(args[7]),
             want_log_prob = PyObject_IsTrue(args[8]);

  py::object key;
  View key_view;
  if ((want_z || want_log_prob) && !key_of(torch, args[3], args[4], key, key_view)) return other;
  const auto sums = [&](bool wanted) -> py::object {
    if (!wanted) return py::none();
    if (reduce) return torch.new_floats(mean, dtype == DType::kFloat32, m.shape[0]);
    return torch.new_like(mean, dtype == DType::kFloat32);
  };
  const py::object z = want_z ? torch.new_like(mean) : py::none(), kl = sums(want_kl),
                   log_prob = sums(want_log_prob);

  GaussianArgs a{};
  a.mean = view_of(m, dtype), a.scale = view_of(s, dtype);
  a.key = key_view;
  a.z = view_of(z.ptr()), a.kl = view_of(kl.ptr()), a.log_prob = view_of(log_prob.ptr());
  a.transform = static_cast<Transform>(PyLong_AsLong(PyTuple_GET_ITEM(settings, 0)));
  const auto number = [=](int i) {
    return static_cast<float>(PyFloat_AsDouble(PyTuple_GET_ITEM(settings, i)));
  };
  a.low = number(1), a.high = number(2), a.offset = number(3), a.temperature = number(4);
  a.reduce = reduce;
  if (a.mean.numel() < kFewElements) {
    gaussian_sample_forward_cpu(a);
  } else {
    py::gil_scoped_release release;
    gaussian_sample_forward_cpu(a);
  }
  const py::object results = detail::owned(PyTuple_Pack(3, z.ptr(), kl.ptr(), log_prob.ptr()));
  const py::object arguments = detail::owned(PyTuple_Pack(1, results.ptr()));
  return detail::owned(PyTuple_Type.tp_new((PyTypeObject*)args[0], arguments.ptr(), nullptr));
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_* cuda) {
  cpu.def("gaussian_sample_forward", on_cpu(forward_args, gaussian_sample_forward_cpu));
  cpu.def("gaussian_sample_backward", on_cpu(backward_args, gaussian_sample_backward_cpu));
  def_raw<forward_direct>(cpu, "gaussian_sample_direct");
  if constexpr (kWithCuda) {
    cuda->def("gaussian_sample_forward", on_cuda(forward_args, gaussian_sample_forward_cuda));
    cuda->def("gaussian_sample_backward", on_cuda(backward_args, gaussian_sample_backward_cuda));
    cuda->attr("gaussian_sample_block_elements") = kGaussianBlockElements;
  }
});

}  // namespace
}  // namespace genperf
