// Rows of a tensor [*, K] as plain floats.
#pragma once

#include "../common/chunk.h"
#include "../common/inverse_cdf.h"
#include "../common/subview.h"

namespace genperf {
inline namespace GENPERF_ISA {

inline int64_t blocks_of(int64_t n) { return (n + kLanes - 1) / kLanes; }

// A row in blocks of 16, -inf past its end.
struct Row {
  const float* data;
  int64_t n;
  alignas(64) float tail[kLanes];  // the last block, if it is not whole

  void set(const float* from, int64_t classes) {
    data = from;
    n = classes;
    const int64_t whole = n / kLanes * kLanes;
    for (int64_t i = 0; i < kLanes; ++i) tail[i] = whole + i < n ? from[whole + i] : -kInfinity;
  }
  GENPERF_HD Vf block(int64_t b) const { return load(b < n / kLanes ? data + b * kLanes : tail); }
};

class Rows {
 public:
  // Rows that are read or written together where neighbouring classes do not lie next to each other, so that
  // a line of the cache is used up.
  static constexpr int kTogether = 16;

  explicit Rows(const View& v) : step_(v.stride[v.ndim - 1]), n_(v.shape[v.ndim - 1]) {
    View rows = v;  // without the classes
    --rows.ndim;
    where_ = collapse(rows);
    count_ = where_.numel();
  }

  int64_t count() const { return count_; }
  int64_t classes() const { return n_; }
  int together() const { return step_ == 1 || count_ == 1 ? 1 : kTogether; }
  bool in_place() const { return where_.dtype == DType::kFloat32 && (step_ == 1 || n_ == 1); }
  // Floats from one row of a buffer to the next: no power of two.
  int64_t pitch() const { return blocks_of(n_) * kLanes + kLanes; }

  void locate(int64_t start, int count, int64_t* offset) const {
    Position at(where_, start);
    for (int i = 0; i < count; ++i) {
      offset[i] = at.offset;
      at.offset += where_.stride[where_.ndim - 1];
      ++at.index[where_.ndim - 1];
      if (--at.run == 0 && i + 1 < count) at.next_run(where_);
    }
  }

  float* at(int64_t offset) const { return static_cast<float*>(where_.data) + offset; }

  void read(const int64_t* offset, int count, float* buffer) const {
    if (step_ == 1 && where_.dtype != DType::kFloat32) {
      for (int i = 0; i < count; ++i)
        for (int64_t k = 0; k < n_; k += kChunk)
          widen(halves() + offset[i] + k, 1, static_cast<int>(n_ - k < kChunk ? n_ - k : kChunk),
                where_.dtype, buffer + i * pitch() + k);
      return;
    }
    if (where_.dtype == DType::kFloat32 && count == kTogether && offset[count - 1] - offset[0] == count - 1) {
      read_columns(offset, buffer);
      return;
    }
    if (where_.dtype == DType::kFloat32) {
      for_each(offset, count, [&](int64_t from, int64_t to) { buffer[to] = *at(from); });
    } else if (where_.dtype == DType::kFloat16) {
      for_each(offset, count,
               [&](int64_t from, int64_t to) { buffer[to] = float_from_float16(halves()[from]); });
    } else {
      for_each(offset, count,
               [&](int64_t from, int64_t to) { buffer[to] = float_from_bfloat16(halves()[from]); });
    }
  }

  void write(const int64_t* offset, int count, const float* buffer) const {
    if (step_ == 1 && where_.dtype != DType::kFloat32) {
      for (int i = 0; i < count; ++i)
        for (int64_t k = 0; k < n_; k += kChunk)
          narrow(buffer + i * pitch() + k, static_cast<int>(n_ - k < kChunk ? n_ - k : kChunk), where_.dtype,
                 halves() + offset[i] + k, 1);
      return;
    }
    for_each(offset, count, [&](int64_t to, int64_t from) {
      if (where_.dtype == DType::kFloat32) {
        *at(to) = buffer[from];
      } else {
        halves()[to] = where_.dtype == DType::kFloat16 ? float16_from_float(buffer[from])
                                                       : bfloat16_from_float(buffer[from]);
      }
    });
  }

 private:
  // Calls f(place in the tensor, place in the buffer), rows together, class by class.
  template <class Function>
  GENPERF_HD void for_each(const int64_t* offset, int count, Function f) const {
    const int64_t pitch = this->pitch();
    for (int64_t k = 0; k < n_; ++k) {
      prefetch(offset[0] + (k + kAhead < n_ ? k + kAhead : k) * step_);
      for (int i = 0; i < count; ++i) f(offset[i] + k * step_, i * pitch + k);
    }
  }

  // Rows that lie side by side: four classes of four rows at a time.
  void read_columns(const int64_t* offset, float* buffer) const {
    const int64_t pitch = this->pitch(), whole = n_ / 4 * 4;
    for (int64_t k = 0; k < whole; k += 4) {
      for (int64_t j = k; j < k + 4; ++j) prefetch(offset[0] + (j + kAhead < n_ ? j + kAhead : j) * step_);
      for (int i = 0; i < kTogether; i += 4) {
        Quad q[4];
        for (int j = 0; j < 4; ++j) std::memcpy(&q[j], at(offset[i] + (k + j) * step_), sizeof(Quad));
        for (int j = 0; j < 4; ++j) {
          const Quad row = {q[0][j], q[1][j], q[2][j], q[3][j]};
          std::memcpy(buffer + (i + j) * pitch + k, &row, sizeof row);
        }
      }
    }
    for (int64_t k = whole; k < n_; ++k)
      for (int i = 0; i < kTogether; ++i) buffer[i * pitch + k] = *at(offset[i] + k * step_);
  }

  // Of a stride as long as a page, a processor foresees nothing.
  static constexpr int64_t kAhead = 32;

  void prefetch(int64_t offset) const {
    __builtin_prefetch(static_cast<const char*>(where_.data) + offset * bytes_of(where_.dtype));
  }

  uint16_t* halves() const { return static_cast<uint16_t*>(where_.data); }

  View where_;
  int64_t step_, n_, count_;
};

}  // namespace GENPERF_ISA
}  // namespace genperf
