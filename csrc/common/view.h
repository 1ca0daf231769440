// A borrowed tensor: what crosses from Python to a kernel. No framework header is needed for it.
#pragma once

#include <cstdint>

// Always inlined: this header is shared by the builds for every instruction set.
#define GENPERF_INLINE inline __attribute__((always_inline))

namespace genperf {

enum class DType : int { kFloat32, kFloat16, kBFloat16, kFloat64, kInt64 };

inline constexpr int kMaxDims = 8;

// Shape and strides are in elements. A null `data` with ndim < 0 stands for an absent tensor.
struct View {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int ndim = -1;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  GENPERF_INLINE explicit operator bool() const { return ndim >= 0; }

  GENPERF_INLINE int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }
};

// The same elements in the same logical (row-major) order, with neighbouring dimensions merged
// wherever one stride can walk both. A contiguous tensor becomes one dimension.
// `keep_first`: dimension 0 is not merged.
GENPERF_INLINE View collapse(const View& v, bool keep_first = false) {
  View out = v;
  out.ndim = 0;
  for (int d = 0; d < v.ndim; ++d) {
    if (v.shape[d] == 1 && !(keep_first && d == 0)) continue;
    int last = out.ndim - 1;
    bool mergeable = last >= (keep_first ? 1 : 0) && out.stride[last] == v.shape[d] * v.stride[d];
    if (mergeable) {
      out.shape[last] *= v.shape[d];
      out.stride[last] = v.stride[d];
    } else {
      out.shape[out.ndim] = v.shape[d];
      out.stride[out.ndim] = v.stride[d];
      ++out.ndim;
    }
  }
  if (out.ndim == 0) {
    out.shape[0] = 1;
    out.stride[0] = 1;
    out.ndim = 1;
  }
  return out;
}

}  // namespace genperf
