// CPU kernels, built once per instruction set (GENPERF_ISA).
#include <cmath>
#include <utility>

#include "../common/scratch.h"
#include "../common/simd.h"
#include "slogdet_inverse.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace genperf {
namespace GENPERF_ISA {

namespace {

constexpr int kDoubles = kNativeBytes / 8;
typedef double Nd __attribute__((vector_size(kNativeBytes), aligned(8)));

GENPERF_HD Nd load(const double* p) { return *reinterpret_cast<const Nd*>(p); }
GENPERF_HD void store(double* p, Nd x) { *reinterpret_cast<Nd*>(p) = x; }

#if defined(__AVX512F__)
GENPERF_HD Nd multiply_add(Nd a, Nd b, Nd c) {
  return (Nd)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__FMA__)
GENPERF_HD Nd multiply_add(Nd a, Nd b, Nd c) {
  return (Nd)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#else
GENPERF_HD Nd multiply_add(Nd a, Nd b, Nd c) { return a * b + c; }
#endif

constexpr int kPanel = 32;      // columns that are eliminated before the others hear of it
constexpr int kUnblocked = 64;  // sizes up to which all columns are one panel
constexpr int kTileRows = 4, kTileVectors = 3, kStrip = kTileVectors * kDoubles;

// Gauss-Jordan elimination in place: after step k the first k columns hold those of what the matrix must be
// multiplied by to have unit columns there; after the last one, that is the inverse with its columns
// permuted.
class Inverter {
 public:
  explicit Inverter(int64_t n)
      : n_(n),
        pitch_((n + kStrip - 1) / kStrip * kStrip),
        w_(n * pitch_, 0.0),
        panel_(n > kUnblocked ? kPanel : n),
        rows_(n > kUnblocked ? panel_ * pitch_ : 0),
        column_(n) {}

  template <class T>
  void run(const T* a, T* inverse, T* transpose, T& sign, T& logabsdet, int64_t& status) {
    bool finite = true;
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t j = 0; j < n_; ++j) {
        w_[i * pitch_ + j] = a[i * n_ + j];
        finite &= std::isfinite(a[i * n_ + j]);
      }
    status = finite ? 0 : -1;
    for (int64_t k = 0; k < n_ && status == 0; k += panel_) {
      const int64_t end = k + panel_ < n_ ? k + panel_ : n_;
      status = eliminate(k, end);
      if (status == 0 && panel_ < n_) update(k, end);
    }
    if (status != 0) {
      const T nan = static_cast<T>(std::nan(""));
      sign = status > 0 ? T(0) : nan;
      logabsdet = status > 0 ? -std::numeric_limits<T>::infinity() : nan;
      for (int64_t i = 0; i < n_ * n_; ++i) inverse[i] = transpose[i] = nan;
      return;
    }
    sign = negative_ ? T(-1) : T(1);
    logabsdet = static_cast<T>(std::log(mantissa_) + exponent_ * 0.69314718055994530942);
    // Rows were exchanged on the way; of the inverse these are columns.
    Scratch<int64_t> from(n_);
    for (int64_t j = 0; j < n_; ++j) from[j] = j;
    for (int64_t k = n_ - 1; k >= 0; --k) std::swap(from[k], from[column_[k]]);
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t j = 0; j < n_; ++j) inverse[i * n_ + j] = static_cast<T>(w_[i * pitch_ + from[j]]);
    constexpr int64_t kTile = 16;
    for (int64_t i0 = 0; i0 < n_; i0 += kTile)
      for (int64_t j0 = 0; j0 < n_; j0 += kTile)
        for (int64_t i = i0; i < n_ && i < i0 + kTile; ++i)
          for (int64_t j = j0; j < n_ && j < j0 + kTile; ++j) transpose[i * n_ + j] = inverse[j * n_ + i];
  }

 private:
  // Steps [begin, end), within their columns. Returns the status.
  int64_t eliminate(int64_t begin, int64_t end) {
    const int64_t first = begin / kDoubles * kDoubles, last = (end + kDoubles - 1) / kDoubles * kDoubles;
    for (int64_t k = begin; k < end; ++k) {
      int64_t best = k;
      for (int64_t i = k + 1; i < n_; ++i)
        if (std::fabs(w_[i * pitch_ + k]) > std::fabs(w_[best * pitch_ + k])) best = i;
      double* const row = w_.get() + k * pitch_;
      const double pivot = w_[best * pitch_ + k];
      if (pivot == 0.0) return k + 1;
      column_[k] = best;
      if (best != k) {
        double* const other = w_.get() + best * pitch_;
        for (int64_t j = 0; j < pitch_; j += kDoubles) {
          const Nd x = load(row + j);
          store(row + j, load(other + j));
          store(other + j, x);
        }
      }
      multiply_determinant(pivot, best != k);
      row[k] = 1.0;
      const Nd reciprocal = Nd{} + 1.0 / pivot;
      for (int64_t j = first; j < last; j += kDoubles) store(row + j, load(row + j) * reciprocal);
      for (int64_t i = 0; i < n_; ++i) {
        if (i == k) continue;
        double* const to = w_.get() + i * pitch_;
        const Nd factor = Nd{} - to[k];
        to[k] = 0.0;
        for (int64_t j = first; j < last; j += kDoubles)
          store(to + j, multiply_add(factor, load(row + j), load(to + j)));
      }
    }
    return 0;
  }

  // What the steps [begin, end) do to the other columns: a product with the columns that they left.
  void update(int64_t begin, int64_t end) {
    const int64_t depth = end - begin;
    for (int64_t j = 0; j < pitch_; j += kStrip)
      for (int64_t k = 0; k < depth; ++k) {
        double* const from = w_.get() + (begin + k) * pitch_ + j;
        for (int v = 0; v < kStrip; ++v) {
          const bool own = j + v >= begin && j + v < end;
          rows_[(j / kStrip * depth + k) * kStrip + v] = own ? 0.0 : from[v];
          if (!own) from[v] = 0.0;
        }
      }
    for (int64_t i = 0; i < n_; i += kTileRows) {
      const int64_t count = n_ - i < kTileRows ? n_ - i : kTileRows;
      for (int64_t j = 0; j < pitch_; j += kStrip) {
        const double* const rows = rows_.get() + j * depth;
        if (count == kTileRows) {
          tile<kTileRows>(i, j, begin, depth, rows);
        } else {
          for (int64_t r = i; r < n_; ++r) tile<1>(r, j, begin, depth, rows);
        }
      }
    }
  }

  template <int kRows>
  void tile(int64_t i, int64_t j, int64_t begin, int64_t depth, const double* rows) {
    double* const to = w_.get() + i * pitch_ + j;
    const double* const factor = w_.get() + i * pitch_ + begin;
    Nd sum[kRows][kTileVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) sum[r][v] = load(to + r * pitch_ + v * kDoubles);
    for (int64_t k = 0; k < depth; ++k, rows += kStrip) {
      Nd row[kTileVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) row[v] = load(rows + v * kDoubles);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Nd x = Nd{} + factor[r * pitch_ + k];
#pragma GCC unroll 8
        for (int v = 0; v < kTileVectors; ++v) sum[r][v] = multiply_add(x, row[v], sum[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) store(to + r * pitch_ + v * kDoubles, sum[r][v]);
  }

  void multiply_determinant(double pivot, bool exchanged) {
    negative_ ^= (pivot < 0.0) != exchanged;
    int exponent;
    mantissa_ = std::frexp(mantissa_ * std::fabs(pivot), &exponent);
    exponent_ += exponent;
  }

  const int64_t n_, pitch_;
  Scratch<double> w_;
  const int64_t panel_;
  Scratch<double> rows_;  // of a panel, by strips of columns
  Scratch<int64_t> column_;
  bool negative_ = false;
  double mantissa_ = 1.0;
  int64_t exponent_ = 0;
};

template <class T>
void run_all(const SlogdetInverseArgs& a) {
  const int64_t count = a.sizes.numel();
  const int64_t* sizes = static_cast<const int64_t*>(a.sizes.data);
  Scratch<int64_t> begin(count);
  int64_t total = 0, work = 0;
  for (int64_t i = 0; i < count; ++i) {
    begin[i] = total;
    total += sizes[i] * sizes[i];
    work += sizes[i] * sizes[i] * sizes[i];
  }
  const auto at = [](const View& v, int64_t i) { return static_cast<T*>(v.data) + i; };
  [[maybe_unused]] const bool large = work > 1 << 16;
#pragma omp parallel for schedule(dynamic) if (large)
  for (int64_t i = 0; i < count; ++i)
    Inverter(sizes[i]).run(at(a.packed, begin[i]), at(a.inverse, begin[i]), at(a.inverse_transpose, begin[i]),
                           *at(a.sign, i), *at(a.logabsdet, i), static_cast<int64_t*>(a.status.data)[i]);
}

}  // namespace

void slogdet_inverse(const SlogdetInverseArgs& a) {
  a.packed.dtype == DType::kFloat64 ? run_all<double>(a) : run_all<float>(a);
}

}  // namespace GENPERF_ISA
}  // namespace genperf
