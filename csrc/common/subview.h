// Parts of a tensor as tensors.
#pragma once

#include "view.h"

namespace genperf {

GENPERF_INLINE int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat16 || dtype == DType::kBFloat16 ? 2 : 8;
}

// Elements [first, first + n) of one dimension.
GENPERF_INLINE View sliced(const View& v, int dim, int64_t first, int64_t n) {
  View out = v;
  out.data = static_cast<char*>(v.data) + first * v.stride[dim] * bytes_of(v.dtype);
  out.shape[dim] = n;
  return out;
}

// Dimension 0 taken at one index.
GENPERF_INLINE View select_first(const View& v, int64_t index) {
  View out = sliced(v, 0, index, 1);
  --out.ndim;
  for (int d = 0; d < out.ndim; ++d) out.shape[d] = v.shape[d + 1], out.stride[d] = v.stride[d + 1];
  return out;
}

}  // namespace genperf
