// Convolution with a masked weight, y = conv2d(x, weight * mask) + bias, and its gradients. Taps that the
// mask zeroes are not computed.
//
//   y[b, o, h, w] = bias[o] + sum_{i, r, s} weight[o, i, r, s] mask[o, i, r, s]
//                             x[b, i, h stride_h + r dilation_h - padding_h, w stride_w + ...]
//
// Layout: contiguous float32. x [B, I, H, W], weight [O, I, kH, kW], mask [O or 1, I or 1, kH, kW], bias [O]
// or absent, y [B, O, H', W']. What a pair (channel, tap) is multiplied with is skipped where the mask is
// zero for every output of the same panel (kernel.inl), so that channel masks save work as well as spatial
// ones.
//
// Numerics: each output is one chain of (fused) multiply-adds over at most 256 products, and the sum of such
// chains in order: the same bits for any number of threads and for any batch that a sample stands in. The
// gradient of weight and bias is summed likewise, by slices of the batch that depend on the shapes alone.
#pragma once

#include "../common/view.h"

namespace genperf {

struct MaskedConv2dArgs {
  View x, weight, mask, bias, y;
  View grad_y, grad_x, grad_weight, grad_bias;  // grad_weight is zero where mask is; grad_bias may be absent
  int64_t stride[2], padding[2], dilation[2];   // the gradient of x: stride 1 only
};

void masked_conv2d_forward_cpu(const MaskedConv2dArgs& args);
void masked_conv2d_grad_input_cpu(const MaskedConv2dArgs& args);
void masked_conv2d_grad_weight_cpu(const MaskedConv2dArgs& args);

}  // namespace genperf
