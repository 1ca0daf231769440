// CPU kernels, built once per instruction set (GENPERF_ISA).
#include <algorithm>
#include <cmath>
#include <limits>

#include "../common/scratch.h"
#include "vectors.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kPanelRows = kStrip * 8;  // at most

// Elimination in place: after step k the first k columns hold those of what the matrix must be multiplied by
// to have unit columns there; after the last one, that is the inverse with its columns permuted.
class Inverter {
 public:
  explicit Inverter(int64_t largest)
      : w_((largest + kStrip - 1) / kStrip * kStrip * largest),
        exchanged_(largest),
        from_(largest),
        place_(largest) {}

  template <class T>
  void run(int64_t n, const T* a, T* inverse, T* transpose, T& sign, T& logabsdet, int64_t& status) {
    n_ = n;
    strips_ = (n + kStrip - 1) / kStrip;
    whole_ = transpose != nullptr;
    mantissa_ = 1.0;
    exponent_ = 0;
    status = read(a) ? 0 : -1;
    const int64_t width = panel_strips(n);
    for (int64_t s = 0; s < strips_ && status == 0; s += width)
      status = eliminate_panel(s, std::min(s + width, strips_));
    if (status != 0) {
      constexpr T nan = std::numeric_limits<T>::quiet_NaN();
      sign = status > 0 ? T(0) : nan;
      logabsdet = status > 0 ? -std::numeric_limits<T>::infinity() : nan;
      for (T* out : {inverse, transpose})
        if (out) std::fill_n(out, n * n, nan);
      return;
    }
    sign = static_cast<T>(mantissa_ < 0.0 ? -1.0 : 1.0);
    logabsdet = static_cast<T>(std::log(std::fabs(mantissa_)) +
                               static_cast<double>(exponent_) * 0.69314718055994530942);
    if (transpose) write(transpose);
    if (inverse) transpose_all(transpose, inverse, n);
  }

 private:
  double* strip(int64_t s) const { return w_.get() + s * n_ * kStrip; }

  // False where an element is not finite.
  template <class T>
  bool read(const T* a) const {
    Nd bad[kVectors] = {};
    for (int64_t s = 0; s < strips_; ++s) {
      double* to = strip(s);
      const T* from = a + s * kStrip;
      const int64_t count = std::min<int64_t>(kStrip, n_ - s * kStrip);
      for (int64_t i = 0; i < n_; ++i, from += n_, to += kStrip) {
        if (count == kStrip) {
          widen(from, to);
        } else {
          for (int v = 0; v < kStrip; ++v) to[v] = v < count ? static_cast<double>(from[v]) : 0.0;
        }
        for (int v = 0; v < kVectors; ++v) bad[v] += load(to + v * kDoubles) * 0.0;
      }
    }
    double sum = 0.0;
    for (int v = 0; v < kStrip; ++v) sum += bad[v / kDoubles][v % kDoubles];
    return sum == 0.0;
  }

  // Columns of the strips [first, last), and what that does to all others. Returns the status.
  int64_t eliminate_panel(int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      if (const int64_t status = eliminate_strip(s)) return status;
      for (int64_t t = first; t < last; ++t)
        if (t != s) update(t, s, s + 1);
    }
    for (int64_t t = whole_ ? 0 : last; t < strips_; ++t)
      if (t < first || t >= last) update(t, first, last);
    return 0;
  }

  int64_t eliminate_strip(int64_t s) {
    double* const w = strip(s);
    const int64_t begin = s * kStrip, end = std::min(begin + kStrip, n_);
    double largest = 0.0;
    for (int64_t i = begin; i < n_; ++i) largest = std::max(largest, std::fabs(w[i * kStrip]));
    for (int64_t k = begin; k < end; ++k) {
      const int64_t column = k - begin;
      if (largest == 0.0) return k + 1;
      int64_t best = k;
      while (best < n_ && std::fabs(w[best * kStrip + column]) != largest) ++best;
      if (best == n_ || largest == kInfinity) return -1;
      exchanged_[k] = best;
      exchange(w, k);
      multiply_determinant(best == k ? w[k * kStrip + column] : -w[k * kStrip + column]);
      largest = step(w, k, column);
    }
    return 0;
  }

  void exchange(double* w, int64_t k) const {
    if (exchanged_[k] == k) return;
    double *const a = w + k * kStrip, *const b = w + exchanged_[k] * kStrip;
    for (int v = 0; v < kStrip; v += kDoubles) {
      const Nd x = load(a + v);
      store(a + v, load(b + v));
      store(b + v, x);
    }
  }

  // Makes a column of a strip a unit column. Returns the largest of the next, below row k.
  double step(double* w, int64_t k, int64_t column) const {
    alignas(64) double row[kStrip];
    alignas(64) int64_t keep[kStrip];
    const double reciprocal = 1.0 / w[k * kStrip + column];
    for (int v = 0; v < kStrip; ++v) {
      row[v] = w[k * kStrip + v] * reciprocal;
      keep[v] = -1;
    }
    row[column] = reciprocal;
    keep[column] = 0;
    Nd r[kVectors], minus[kVectors], largest[kVectors];
    Ni mask[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      r[v] = load(row + v * kDoubles);
      minus[v] = -r[v];
      mask[v] = *reinterpret_cast<const Ni*>(keep + v * kDoubles);
      largest[v] = Nd{};
    }
    const auto eliminate = [&](double* to) {
      const Nd factor = splat(to[column]);
      for (int v = 0; v < kVectors; ++v) {
        const Nd x = multiply_add(factor, minus[v], (Nd)((Ni)load(to + v * kDoubles) & mask[v]));
        store(to + v * kDoubles, x);
        largest[v] = larger(abs(x), largest[v]);
      }
    };
    for (int64_t i = whole_ ? 0 : k; i < k; ++i) eliminate(w + i * kStrip);
    for (int v = 0; v < kVectors; ++v) store(w + k * kStrip + v * kDoubles, r[v]), largest[v] = Nd{};
    for (int64_t i = k + 1; i < n_; ++i) eliminate(w + i * kStrip);
    for (int v = 0; v < kVectors; ++v) store(row + v * kDoubles, largest[v]);
    return column + 1 < kStrip ? row[column + 1] : 0.0;
  }

  // What the elimination of the strips [first, last) does to strip t: a product with what it left there.
  void update(int64_t t, int64_t first, int64_t last) const {
    alignas(64) double rows[kPanelRows * kStrip];
    double* const w = strip(t);
    const int64_t begin = first * kStrip, end = std::min(last * kStrip, n_), top = whole_ ? 0 : begin;
    for (int64_t k = begin; k < end; ++k) exchange(w, k);
    for (int64_t i = 0; i < (end - begin) * kStrip; i += kDoubles) {
      store(rows + i, load(w + begin * kStrip + i));
      store(w + begin * kStrip + i, Nd{});
    }
    multiply(w + top * kStrip, strip(first) + top * kStrip, n_ * kStrip, rows, n_ - top, end - begin);
  }

  void multiply_determinant(double pivot) {
    int exponent;
    mantissa_ = std::frexp(mantissa_ * pivot, &exponent);
    exponent_ += exponent;
  }

  // Rows were exchanged on the way; of the inverse these are columns, and of its transpose rows.
  template <class T>
  void write(T* transpose) {
    for (int64_t j = 0; j < n_; ++j) from_[j] = j;
    for (int64_t k = n_ - 1; k >= 0; --k) std::swap(from_[k], from_[exchanged_[k]]);
    for (int64_t j = 0; j < n_; ++j) place_[from_[j]] = j;
    for (int64_t j = 0; j < n_; j += 4) {
      const double* const from = strip(j / kStrip) + j % kStrip;
      T* to[4] = {};
      for (int64_t v = 0; v < 4 && j + v < n_; ++v) to[v] = transpose + place_[j + v] * n_;
      int64_t i = 0;
      for (; i + 4 <= n_ && to[3]; i += 4)
        transpose_tile(from + i * kStrip, kStrip, [&](int v) { return to[v] + i; });
      for (; i < n_; ++i)
        for (int64_t v = 0; v < 4 && to[v]; ++v) to[v][i] = static_cast<T>(from[i * kStrip + v]);
    }
  }

  int64_t n_ = 0, strips_ = 0;
  bool whole_ = true;  // also what lies above the diagonal, which the inverse needs
  Scratch<double> w_;  // by strips of columns, [strips, n, kStrip]
  Scratch<int64_t> exchanged_, from_, place_;
  double mantissa_ = 1.0;
  int64_t exponent_ = 0;
};

template <class T>
void run_all(const SlogdetInverseArgs& a) {
  const int64_t count = a.sizes.size();
  const int64_t* const sizes = a.sizes.data();
  Scratch<int64_t> begin(count), order(count);
  int64_t total = 0, work = 0, largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    begin[i] = total;
    order[i] = i;
    total += sizes[i] * sizes[i];
    work += sizes[i] * sizes[i] * sizes[i];
    largest = std::max(largest, sizes[i]);
  }
  // The costly ones first, so that no thread begins one when the others are done.
  std::stable_sort(order.get(), order.get() + count,
                   [=](int64_t x, int64_t y) { return sizes[x] > sizes[y]; });
  const auto at = [](const View& v, int64_t i) { return v ? static_cast<T*>(v.data) + i : nullptr; };
  [[maybe_unused]] const bool large = count > 1 && work > 1 << 16;
#pragma omp parallel if (large)
  {
    Inverter inverter(largest);
#pragma omp for schedule(dynamic)
    for (int64_t k = 0; k < count; ++k) {
      const int64_t i = order[k];
      inverter.run(sizes[i], at(a.packed, begin[i]), at(a.inverse, begin[i]),
                   at(a.inverse_transpose, begin[i]), *at(a.sign, i), *at(a.logabsdet, i),
                   static_cast<int64_t*>(a.status.data)[i]);
    }
  }
}

}  // namespace

void slogdet_inverse(const SlogdetInverseArgs& a) {
  a.packed.dtype == DType::kFloat64 ? run_all<double>(a) : run_all<float>(a);
}

}  // namespace GENPERF_ISA
}  // namespace genperf
