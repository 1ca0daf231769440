// A whole call of the public function that asks for no gradient and nothing unusual, as one native call:
// on small tensors the steps in Python take most of the time.
#pragma once

#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <vector>

#include "../common/direct.h"
#include "../slogdet_inverse/slogdet_inverse.h"
#include "invertible_conv1x1.h"
#include "plu.h"

namespace genperf {
namespace {

namespace py = pybind11;

constexpr int kFactors = 5;
constexpr int64_t kLargestPlu = 512;  // beyond, torch multiplies faster

View row_major(void* data, std::initializer_list<int64_t> shape, DType dtype = DType::kFloat32) {
  View v;
  v.data = data, v.dtype = dtype, v.ndim = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int d = v.ndim - 1; d >= 0; --d) {
    v.shape[d] = shape.begin()[d], v.stride[d] = stride;
    stride *= v.shape[d];
  }
  return v;
}

// The arguments as views, as far as they are plain; `ok` turns false where one is not.
class Arguments {
 public:
  explicit Arguments(const Torch& torch) : torch_(torch), recording_(torch.grad_enabled()) {}

  bool ok = true;

  View any(PyObject* tensor) {
    DlTensor x;
    DType dtype;
    if (!ok || !torch_.plain(tensor, x) || x.device_type != DlTensor::kCpu || x.ndim > kMaxDims ||
        !dtype_of(x, dtype) || (recording_ && Torch::requires_grad(tensor))) {
      ok = false;
      return View{};
    }
    return view_of(x, dtype);
  }

  // A float32 parameter: [C, C] or [C, C, 1, ...]; [C] with any dimensions of 1; or []. As it lies if that is
  // contiguous, else copied.
  View parameter(PyObject* tensor, std::initializer_list<int64_t> shape) {
    const View v = any(tensor);
    View out = row_major(v.data, shape);
    ok = ok && v.dtype == DType::kFloat32 && v.numel() == out.numel() && v.ndim >= out.ndim &&
         (out.ndim > 0 || v.ndim == 0);
    if (!ok) return View{};
    bool found = out.ndim != 1, contiguous = true;
    int64_t stride = 1;
    for (int d = v.ndim - 1; d >= 0; --d) {
      contiguous = contiguous && (v.shape[d] == 1 || v.stride[d] == stride);
      ok = ok && (out.ndim != 2 || d >= 2 || v.shape[d] == out.shape[d]);
      stride *= v.shape[d];
      found = found || v.shape[d] == out.shape[0];
    }
    ok = ok && found;
    if (ok && !contiguous) out.data = copy(v);
    return out;
  }

 private:
  // Row-major, of a tensor with at most two dimensions that are not 1.
  float* copy(const View& v) {
    const View w = collapse(v);
    const int64_t rows = w.ndim > 1 ? w.shape[0] : 1, columns = w.shape[w.ndim - 1];
    copies_.emplace_back(new float[rows * columns]);
    float* const to = copies_.back().get();
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        to[i * columns + j] =
            static_cast<const float*>(w.data)[i * w.stride[0] * (w.ndim > 1) + j * w.stride[w.ndim - 1]];
    return to;
  }

  const Torch& torch_;
  const bool recording_;
  std::vector<std::unique_ptr<float[]>> copies_;
};

// Room for a matrix and what is computed of it.
struct Solved {
  std::unique_ptr<float[]> matrix, inverse, transpose;
  float sign = 0.0f, logabsdet = 0.0f;
  int64_t status = 0;

  static std::unique_ptr<float[]> room(int64_t n) { return std::unique_ptr<float[]>(new float[n * n]); }

  void solve(View weight, bool with_inverse) {
    const int64_t n = weight.shape[0];
    SlogdetInverseArgs a{};
    a.packed = row_major(weight.data, {n * n});
    a.sign = row_major(&sign, {1}), a.logabsdet = row_major(&logabsdet, {1});
    a.status = row_major(&status, {1}, DType::kInt64);
    a.sizes = {n};
    if (with_inverse) {
      inverse = room(n), transpose = room(n);
      a.inverse = row_major(inverse.get(), {n * n}),
      a.inverse_transpose = row_major(transpose.get(), {n * n});
    }
    slogdet_inverse_cpu(a);
  }
};

// (type, x, weight, shift, scale, log_scale, slogdet, inverse) -> `type` of the output and the
// log-determinants; or NotImplemented. `type` is a tuple of two; `weight` a matrix, or the tuple of its
// factors; `slogdet` None, or has `logabsdet` and `inverse` of that matrix.
inline py::object forward_direct(PyObject* const* args, Py_ssize_t n) {
  if (n != 8) throw std::invalid_argument("invertible_conv1x1_direct: expected eight arguments");
  const Torch& torch = Torch::instance();
  const py::object other = py::reinterpret_borrow<py::object>(Py_NotImplemented);
  PyObject *const x = args[1], *const weight = args[2], *const slogdet = args[6];
  const bool dense = !PyTuple_Check(weight), given = slogdet != Py_None, inverse = PyObject_IsTrue(args[7]);
  const bool scaled = args[4] != Py_None, log = args[5] != Py_None;
  if ((!dense && (given || PyTuple_GET_SIZE(weight) != kFactors)) || (scaled && log) || !torch.quiet())
    return other;

  Arguments arguments(torch);
  InvertibleConv1x1Args a{};
  a.source = arguments.any(x);
  if (!arguments.ok || a.source.ndim < 2 || a.source.numel() == 0 || a.source.dtype == DType::kFloat64 ||
      a.source.dtype == DType::kInt64)
    return other;
  const int64_t channels = a.source.shape[1];
  if (args[3] != Py_None) a.shift = arguments.parameter(args[3], {channels});
  if (scaled || log) a.scale = arguments.parameter(args[scaled ? 4 : 5], {channels});
  a.log = log, a.inverse = inverse;

  PluArgs plu{};
  py::object logabsdet, undo;
  if (dense) {
    a.matrix = arguments.parameter(weight, {channels, channels});
  } else {
    const auto factor = [&](int i) { return PyTuple_GET_ITEM(weight, i); };
    View* const matrices[] = {&plu.p, &plu.lower, &plu.upper};
    for (int i = 0; i < 3; ++i) *matrices[i] = arguments.parameter(factor(i), {channels, channels});
    plu.sign = arguments.parameter(factor(3), {channels}),
    plu.log_s = arguments.parameter(factor(4), {channels});
    if (!arguments.ok || channels > kLargestPlu) return other;
    logabsdet = detail::owned(PyObject_CallMethod(factor(4), "sum", nullptr));
  }
  if (given) {
    logabsdet = py::getattr(slogdet, "logabsdet", py::none());
    if (inverse) {
      undo = py::getattr(slogdet, "inverse", py::none());
      a.matrix = arguments.parameter(undo.ptr(), {channels, channels});
    }
  }
  if (logabsdet) a.logabsdet = arguments.parameter(logabsdet.ptr(), {});
  if (!arguments.ok) return other;

  const py::object y = torch.new_like(x);
  const py::object logdet = torch.new_floats(x, a.source.dtype == DType::kFloat32, a.source.shape[0]);
  a.result = view_of(y.ptr()), a.logdet = view_of(logdet.ptr());
  Solved solved;
  {
    py::gil_scoped_release release;
    if (!dense) {
      solved.matrix = Solved::room(channels);
      a.matrix = plu.matrix = row_major(solved.matrix.get(), {channels, channels});
      plu_matrix_cpu(plu);
    }
    if (dense ? !given : inverse) {
      solved.solve(a.matrix, inverse);
      if (dense) a.logabsdet = row_major(&solved.logabsdet, {});
      if (inverse) a.matrix = row_major(solved.inverse.get(), {channels, channels});
    }
    invertible_conv1x1_forward_cpu(a);
  }
  const py::object results = detail::owned(PyTuple_Pack(2, y.ptr(), logdet.ptr()));
  const py::object of_type = detail::owned(PyTuple_Pack(1, results.ptr()));
  return detail::owned(PyTuple_Type.tp_new((PyTypeObject*)args[0], of_type.ptr(), nullptr));
}

}  // namespace
}  // namespace genperf
