#include "../common/binding.h"
#include "masked_conv2d.h"

namespace genperf {
namespace {

MaskedConv2dArgs with_geometry(int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
                               int64_t dilation_h, int64_t dilation_w) {
  MaskedConv2dArgs a{};
  a.stride[0] = stride_h, a.stride[1] = stride_w;
  a.padding[0] = padding_h, a.padding[1] = padding_w;
  a.dilation[0] = dilation_h, a.dilation[1] = dilation_w;
  return a;
}

MaskedConv2dArgs forward_args(View x, View weight, View mask, View bias, View y, int64_t stride_h,
                              int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h,
                              int64_t dilation_w) {
  MaskedConv2dArgs a = with_geometry(stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w);
  a.x = x, a.weight = weight, a.mask = mask, a.bias = bias, a.y = y;
  return a;
}

MaskedConv2dArgs grad_input_args(View grad_y, View weight, View mask, View grad_x, int64_t stride_h,
                                 int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h,
                                 int64_t dilation_w) {
  MaskedConv2dArgs a = with_geometry(stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w);
  a.grad_y = grad_y, a.weight = weight, a.mask = mask, a.grad_x = grad_x;
  return a;
}

MaskedConv2dArgs grad_weight_args(View grad_y, View x, View mask, View grad_weight, View grad_bias,
                                  int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
                                  int64_t dilation_h, int64_t dilation_w) {
  MaskedConv2dArgs a = with_geometry(stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w);
  a.grad_y = grad_y, a.x = x, a.mask = mask, a.grad_weight = grad_weight, a.grad_bias = grad_bias;
  return a;
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_*) {
  cpu.def("masked_conv2d_forward", on_cpu(forward_args, masked_conv2d_forward_cpu));
  cpu.def("masked_conv2d_grad_input", on_cpu(grad_input_args, masked_conv2d_grad_input_cpu));
  cpu.def("masked_conv2d_grad_weight", on_cpu(grad_weight_args, masked_conv2d_grad_weight_cpu));
});

}  // namespace
}  // namespace genperf
