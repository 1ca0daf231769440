// The matrix that positions are multiplied with, and products with it.
#pragma once

#include <cmath>

#include "../common/scratch.h"
#include "../soft_assignment/product.h"
#include "invertible_conv1x1.h"

namespace genperf {
namespace GENPERF_ISA {
namespace {

inline const float* floats_of(const View& v) { return v ? static_cast<const float*>(v.data) : nullptr; }

// f(integral_constant) with the constant `rows`, 1 to kMost.
template <int kMost, class Function>
GENPERF_HD void with_rows(int64_t rows, Function f) {
  if constexpr (kMost > 1) {
    if (rows < kMost) return with_rows<kMost - 1>(rows, f);
  }
  f(std::integral_constant<int, kMost>());
}

// A square matrix by tiles of rows, [tile][column][row], the last tile with the rows that are left.
class Packed {
 public:
  // element(i, l): row i, column l.
  template <class Element>
  Packed(int64_t size, Element element) : size_(size), data_(size * size) {
    float* to = data_.get();
    for (int64_t i = 0; i < size; i += kTile) {
      const int64_t rows = size - i < kTile ? size - i : kTile;
      for (int64_t l = 0; l < size; ++l)
        for (int64_t r = 0; r < rows; ++r) *to++ = static_cast<float>(element(i + r, l));
    }
  }

  // out [size, 16] = matrix * panel [size, 16] for `count` panels, plus a number for each row where `add` is
  // given. `pitch`: floats between two rows of out; `step`: between those of two panels.
  void multiply(const float* panel, int64_t count, const float* add, float* out, int64_t pitch,
                int64_t step) const {
    for (int64_t l = 0; l < size_; l += kDepth) {
      const int64_t depth = size_ - l < kDepth ? size_ - l : kDepth;
      const float* const last = l + depth == size_ ? add : nullptr;
      for (int64_t i = 0; i < size_; i += kTile)
        with_rows<kTile>(size_ - i, [&](auto rows) {
          for (int64_t k = 0; k < count; ++k)
            tile<decltype(rows)::value>(i, l, depth, panel + k * size_ * kLanes, last, out + k * step, pitch);
        });
    }
  }

 private:
  template <int kRows>
  GENPERF_HD void tile(int64_t i, int64_t l, int64_t depth, const float* panel, const float* add, float* out,
                       int64_t pitch) const {
    const float *a = data_.get() + i * size_ + l * kRows, *b = panel + l * kLanes;
    Vf sum[kRows];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) sum[r] = splat<Vf>(0.0f);
    for (int64_t k = 0; k < depth; ++k, a += kRows, b += kLanes) {
      const Vf x = load(b);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) sum[r] = multiply_add(splat<Vf>(a[r]), x, sum[r]);
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      float* const to = out + (i + r) * pitch;
      if (l > 0) sum[r] = load(to) + sum[r];
      if (add) sum[r] = sum[r] + add[i + r];
      store(to, sum[r]);
    }
  }

  const int64_t size_;
  Scratch<float> data_;
};

// The parameters, as the passes need them.
struct Mixing {
  const int64_t channels;
  const bool inverse, log;
  const float *matrix, *scale, *shift;
  Scratch<double> s;     // the scale; 1 where there is none
  Scratch<float> minus;  // less the shift

  explicit Mixing(const InvertibleConv1x1Args& a)
      : channels(a.source.shape[1]),
        inverse(a.inverse),
        log(a.log),
        matrix(floats_of(a.matrix)),
        scale(floats_of(a.scale)),
        shift(floats_of(a.shift)),
        s(channels, 1.0),
        minus(channels, 0.0f) {
    for (int64_t c = 0; scale && c < channels; ++c)
      s[c] = log ? std::exp(static_cast<double>(scale[c])) : scale[c];
    for (int64_t c = 0; shift && c < channels; ++c) minus[c] = -shift[c];
  }

  // Of the map that undoes an `inverse` one, or of this one.
  double element(const float* m, bool of_inverse, int64_t o, int64_t c) const {
    const double x = m[o * channels + c];
    return of_inverse ? x / s[o] : x * s[c];
  }
  double folded(int64_t o, int64_t c) const { return element(matrix, inverse, o, c); }

  // What is added before a product, and what after it.
  const float* before(bool of_inverse) const { return of_inverse ? nullptr : shift; }
  const float* after(bool of_inverse) const { return of_inverse && shift ? minus.get() : nullptr; }

  double log_scales() const {
    double sum = 0.0;
    for (int64_t c = 0; scale && c < channels; ++c) sum += log ? scale[c] : std::log(std::fabs(s[c]));
    return sum;
  }
};

}  // namespace
}  // namespace GENPERF_ISA
}  // namespace genperf
