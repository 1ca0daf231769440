// What the kernels are told: a convolution whose live pairs (channel, tap) are listed.
//
//   dst[b, row, h, w] = bias[row] + sum_k weight[row, channel_k, tap_k] mask[row, channel_k, tap_k]
//                                         src[b, channel_k, h stride_h + dy_k, w stride_w + dx_k]
//
// The forward pass as it stands (rows: output channels; channels: input channels); the gradient of x with
// the roles exchanged and the taps turned round; the gradient of the weight sums over b, h and w instead.
#pragma once

#include <cstdint>

namespace genperf {

struct LiveConv {
  const float *src, *weight, *mask, *bias;  // bias may be null
  float* dst;
  const float* grad_dst;           // gradient of the weight: instead of weight and dst
  float *grad_weight, *grad_bias;  // its results; grad_bias may be null
  int64_t batch, rows, channels, src_h, src_w, dst_h, dst_w, stride_h, stride_w;
  int64_t taps, row_stride, channel_stride;  // of weight; the stride of a tap is 1
  int64_t mask_row_stride, mask_channel_stride;

  // Position i of the rows in the order of work is row[i], whose live pairs lie in [begin[i], end[i]).
  const int32_t *row, *begin, *end;
  int64_t pairs;
  const int32_t *channel, *tap;            // of each pair
  const int64_t *dy, *dx;                  // of each pair
  int64_t min_dy, max_dy, min_dx, max_dx;  // over all pairs
};

}  // namespace genperf
