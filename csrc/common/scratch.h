// An array for the kernels that are built once per instruction set. std::vector would do, but for the linker:
// of its functions for plain types, which all these builds share, it would take any one's.
#pragma once

#include <cstdint>
#include <new>

#include "lanes.h"

namespace genperf {
inline namespace GENPERF_ISA {

// `n` elements of a trivial type, not initialised unless a value is given; aligned for any vector.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(new (std::align_val_t(64)) T[n + 1]), size_(n) {}
  Scratch(int64_t n, T value) : Scratch(n) { fill(value); }
  ~Scratch() { operator delete[](data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;

  void fill(T value) {
    for (int64_t i = 0; i < size_; ++i) data_[i] = value;
  }
  T* get() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
  int64_t size_;
};

}  // namespace GENPERF_ISA
}  // namespace genperf
