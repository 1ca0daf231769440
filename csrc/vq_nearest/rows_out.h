// Rows of a tensor [*, D] of any strides and dtype that are written as plain float32.
#pragma once

#include "rows.h"

namespace genperf {
inline namespace GENPERF_ISA {

class RowsOut {
 public:
  explicit RowsOut(const View& v)
      : data_(v.data), dtype_(v.dtype), dim_(v.shape[v.ndim - 1]), step_(v.stride[v.ndim - 1]), lead_(v) {
    lead_.ndim = v.ndim - 1;
    lead_ = collapse(lead_);
  }

  // Where rows [first, first + n) may be written, `pitch` floats apart: in place, or `buffer` of n dim
  // floats.
  float* open(int64_t first, int n, float* buffer, int64_t& pitch) const {
    if (dtype_ == DType::kFloat32 && step_ == 1) {
      const Position at(lead_, first);
      pitch = lead_.stride[lead_.ndim - 1];
      if (n <= at.run) return static_cast<float*>(data_) + at.offset;
    }
    pitch = dim_;
    return buffer;
  }

  // Writes back what `open` gave out as `buffer`.
  void close(int64_t first, int n, const float* rows, const float* buffer) const {
    if (rows == buffer) write(first, n, rows, dim_);
  }

  // Rows [first, first + n) from `from`, `pitch` floats apart.
  void write(int64_t first, int64_t n, const float* from, int64_t pitch) const {
    Position at(lead_, first);
    const int64_t stride = lead_.stride[lead_.ndim - 1];
    for (int64_t r = 0; r < n;) {
      int64_t count = at.run < n - r ? at.run : n - r;
      if (count > Rows::kMost) count = Rows::kMost;
      const float* rows = from + r * pitch;
      if (step_ == 1 || count == 1) {
        for (int64_t i = 0; i < count; ++i) put(rows + i * pitch, dim_, at.offset + i * stride, step_);
      } else {
        float column[Rows::kMost];
        for (int64_t d = 0; d < dim_; ++d) {
          for (int64_t i = 0; i < count; ++i) column[i] = rows[i * pitch + d];
          put(column, count, at.offset + d * step_, stride);
        }
      }
      r += count;
      if (r < n) at = Position(lead_, first + r);
    }
  }

 private:
  void put(const float* from, int64_t n, int64_t offset, int64_t stride) const {
    if (dtype_ != DType::kFloat32) {
      narrow(from, static_cast<int>(n), dtype_, static_cast<uint16_t*>(data_) + offset, stride);
      return;
    }
    float* to = static_cast<float*>(data_) + offset;
    if (stride == 1) {
      std::memcpy(to, from, n * sizeof(float));
    } else {
      for (int64_t i = 0; i < n; ++i) to[i * stride] = from[i];
    }
  }

  void* data_;
  DType dtype_;
  int64_t dim_, step_;
  View lead_;
};

}  // namespace GENPERF_ISA
}  // namespace genperf
