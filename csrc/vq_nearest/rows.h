// Rows of a tensor [*, D] of any strides and dtype, as plain float32.
#pragma once

#include <cstring>

#include "../common/chunk.h"

namespace genperf {
inline namespace GENPERF_ISA {

// Whether all of n numbers are.
inline bool is_finite(const float* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return most < 0x7f800000u;
}

class Rows {
 public:
  explicit Rows(const View& v)
      : data_(v.data), dtype_(v.dtype), dim_(v.shape[v.ndim - 1]), step_(v.stride[v.ndim - 1]), lead_(v) {
    lead_.ndim = v.ndim - 1;
    lead_ = collapse(lead_);
  }

  // Rows [first, first + n) to `to`, `pitch` floats apart.
  void read(int64_t first, int n, float* to, int64_t pitch) const {
    Position at(lead_, first);
    const int64_t stride = lead_.stride[lead_.ndim - 1];
    for (int r = 0; r < n;) {
      const int count = at.run < n - r ? static_cast<int>(at.run) : n - r;
      float* rows = to + r * pitch;
      if (step_ == 1 || count == 1) {
        for (int i = 0; i < count; ++i) widen_any(at.offset + i * stride, step_, dim_, rows + i * pitch);
      } else {
        float column[kMost];
        for (int64_t d = 0; d < dim_; ++d) {
          widen_any(at.offset + d * step_, stride, count, column);
          for (int i = 0; i < count; ++i) rows[i * pitch + d] = column[i];
        }
      }
      r += count;
      at.next_run(lead_);
    }
  }

  // One row, in place or in `buffer`.
  const float* row(int64_t i, float* buffer) const {
    if (dtype_ == DType::kFloat32 && step_ == 1)
      return static_cast<const float*>(data_) + Position(lead_, i).offset;
    read(i, 1, buffer, dim_);
    return buffer;
  }

  // Rows [first, first + n), `pitch` floats apart: in place, or in `buffer` of n dim floats.
  __attribute__((noinline)) const float* some(int64_t first, int n, float* buffer, int64_t& pitch) const {
    if (dtype_ == DType::kFloat32 && step_ == 1) {
      const Position at(lead_, first);
      pitch = lead_.stride[lead_.ndim - 1];
      if (n <= at.run) return static_cast<const float*>(data_) + at.offset;
    }
    pitch = dim_;
    read(first, n, buffer, pitch);
    return buffer;
  }

  static constexpr int kMost = 128;  // rows at a time

 private:
  void widen_any(int64_t offset, int64_t stride, int64_t n, float* to) const {
    if (dtype_ != DType::kFloat32) {
      widen(static_cast<const uint16_t*>(data_) + offset, stride, static_cast<int>(n), dtype_, to);
      return;
    }
    const float* from = static_cast<const float*>(data_) + offset;
    if (stride == 1) {
      std::memcpy(to, from, n * sizeof(float));
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = from[i * stride];
    }
  }

  void* data_;
  DType dtype_;
  int64_t dim_, step_;
  View lead_;
};

}  // namespace GENPERF_ISA
}  // namespace genperf
