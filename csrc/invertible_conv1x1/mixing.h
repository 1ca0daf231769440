// The matrix that positions are multiplied with, and products with it.
#pragma once

#include <cmath>

#include "../common/scratch.h"
#include "../soft_assignment/product.h"
#include "invertible_conv1x1.h"

namespace genperf {
namespace GENPERF_ISA {
namespace {

// Rows of a tile of sums. With AVX2, eight vectors of sums: as many as it takes to hide the latency of a
// fused multiply-add. Six rows would leave more room for delays, but twelve vectors stored in a row hold up
// the next tile, which costs more than a twentieth of the time at 48 channels.
#if defined(__AVX512F__)
constexpr int kBand = 12;
#elif defined(__AVX2__)
constexpr int kBand = 4;
#else
constexpr int kBand = 2;
#endif

inline const float* floats_of(const View& v) { return v ? static_cast<const float*>(v.data) : nullptr; }

// f(integral_constant) with the constant `rows`, 1 to kMost.
template <int kMost, class Function>
GENPERF_HD void with_rows(int64_t rows, Function f) {
  if constexpr (kMost > 1) {
    if (rows < kMost) return with_rows<kMost - 1>(rows, f);
  }
  f(std::integral_constant<int, kMost>());
}

// Panels in a tensor: rows of 16 neighbours, `pitch` floats apart; the next panel lies beside.
struct Source {
  const float* data;
  int64_t pitch;
  const float* next;  // where as many panels begin that are read after these; may be null

  // Row l of panel k of those, to the second-level cache: rows in many pages are more than a processor
  // looks ahead by itself.
  GENPERF_HD void prefetch(int64_t k, int64_t l) const {
    if (next) __builtin_prefetch(next + l * pitch + k * kLanes, 0, 2);
  }
};

// Where products go: rows of 16, `pitch` floats apart, those of the next panel `step` further. `add` is added
// to each row at the end, and may be null.
struct Target {
  float* data;
  int64_t pitch, step;
  const float* add;
};

// A square matrix by tiles of rows, [tile][column][row], the last tile with the rows that are left.
class Packed {
 public:
  // element(i, l): row i, column l.
  template <class Element>
  Packed(int64_t size, Element element) : size_(size), data_(size * size) {
    float* to = data_.get();
    for (int64_t i = 0; i < size; i += kBand) {
      const int64_t rows = size - i < kBand ? size - i : kBand;
      for (int64_t l = 0; l < size; ++l)
        for (int64_t r = 0; r < rows; ++r) *to++ = static_cast<float>(element(i + r, l));
    }
  }

  // to = matrix * panels [count, size, 16].
  void multiply(const float* panels, int64_t count, const Target& to) const {
    run(AsPanel{}, const_cast<float*>(panels), count, to);
  }

  // The same for panels in a tensor, plus a number for each row where `before` is given: the first tile of
  // rows reads them while it multiplies, and leaves them in `panels`.
  void multiply(Source from, const float* before, float* panels, int64_t count, const Target& to) const {
    if (before)
      run(Shifted{from, before}, panels, count, to);
    else
      run(Plain{from}, panels, count, to);
  }

 private:
  // How a tile comes by the next row of its panel. at(k, l): from row l of panel k on.
  struct AsPanel {
    GENPERF_HD void prefetch(int64_t, int64_t) const {}
    GENPERF_HD AsPanel at(int64_t, int64_t) const { return {}; }
    GENPERF_HD Vf next(const float* row) { return load(row); }
  };
  struct Plain {
    Source from;
    GENPERF_HD void prefetch(int64_t k, int64_t l) const { from.prefetch(k, l); }
    GENPERF_HD Plain at(int64_t k, int64_t l) const {
      return {{from.data + l * from.pitch + k * kLanes, from.pitch, nullptr}};
    }
    GENPERF_HD Vf next(float* row) {
      const Vf x = load(from.data);
      from.data += from.pitch;
      store(row, x);
      return x;
    }
  };
  struct Shifted {
    Source from;
    const float* before;
    GENPERF_HD void prefetch(int64_t k, int64_t l) const { from.prefetch(k, l); }
    GENPERF_HD Shifted at(int64_t k, int64_t l) const {
      return {{from.data + l * from.pitch + k * kLanes, from.pitch, nullptr}, before + l};
    }
    GENPERF_HD Vf next(float* row) {
      const Vf x = load(from.data) + *before++;
      from.data += from.pitch;
      store(row, x);
      return x;
    }
  };

  template <class Read>
  void run(Read read, float* panels, int64_t count, const Target& to) const {
    const int64_t whole = size_ / kBand * kBand;
    for (int64_t l = 0; l < size_; l += kDepth) {
      const int64_t end = size_ - l < kDepth ? size_ : l + kDepth;
      if (l == 0 && !(end == size_ && to.add))
        bands<kBand, false>(read, 0, whole, l, end, panels, count, to);
      else
        bands<kBand, true>(read, 0, whole, l, end, panels, count, to);
      if constexpr (kBand > 1) {
        if (whole < size_)
          with_rows<kBand - 1>(size_ - whole, [&](auto rows) {
            bands<decltype(rows)::value, true>(read, whole, size_, l, end, panels, count, to);
          });
      }
    }
  }

  // Rows [begin, end) by columns [l, last). Not inlined, so that the loops have the registers to themselves.
  template <int kRows, bool kAdds, class Read>
  __attribute__((noinline)) void bands(Read read, int64_t begin, int64_t end, int64_t l, int64_t last,
                                       float* panels, int64_t count, Target to) const {
    const int64_t size = size_, depth = last - l;
    const bool more = l > 0;
    const float *a = data_.get() + begin * size + l * kRows, *add = last == size ? to.add : nullptr;
    panels += l * kLanes;
    for (int64_t i = begin; i < end; i += kRows, a += kRows * size) {
      float* const out = to.data + i * to.pitch;
      const float* const add_here = add ? add + i : nullptr;
      if (i == 0)
        for (int64_t k = 0; k < count; ++k)
          tile<kRows, kAdds>(read.at(k, l), a, depth, panels + k * size * kLanes, more, add_here,
                             out + k * to.step, to.pitch);
      else
        for (int64_t k = 0; k < count; ++k) {
          if (!more)
            for (int r = 0; r < kRows; ++r) read.prefetch(k, i + r);
          tile<kRows, kAdds>(AsPanel{}, a, depth, panels + k * size * kLanes, more, add_here,
                             out + k * to.step, to.pitch);
        }
    }
  }

  template <int kRows, bool kAdds, class Read>
  static GENPERF_HD void tile(Read read, const float* a, int64_t depth, float* panel, bool more,
                              const float* add, float* out, int64_t pitch) {
    Vf sum[kRows];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) sum[r] = splat<Vf>(0.0f);
    for (int64_t l = 0; l < depth; ++l, a += kRows, panel += kLanes) {
      const Vf x = read.next(panel);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) sum[r] = multiply_add(splat<Vf>(a[r]), x, sum[r]);
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      float* const to = out + r * pitch;
      if (kAdds && more) sum[r] = load(to) + sum[r];
      if (kAdds && add) sum[r] = sum[r] + add[r];
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
