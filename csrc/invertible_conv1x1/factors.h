// Products of triangular and permutation matrices in float64, by rows.
#pragma once

#include <cmath>

#include "../common/scratch.h"
#include "mixing.h"
#include "plu.h"

namespace genperf {
namespace GENPERF_ISA {
namespace {

constexpr int kRows = 4;  // of a result that share each row that is read

// Row-major [n, n].
struct Square {
  const int64_t n;
  Scratch<double> data;

  explicit Square(int64_t n) : n(n), data(n * n, 0.0) {}
  double* operator[](int64_t i) const { return data.get() + i * n; }
};

// to[i][j] += sum_l a(i, l) b[l][j], for l in [first, last) and j in [begin, end) by the group of rows from i
// on and by l; `a` is 0 where a row of the group does not need l.
template <class Factor, class Bounds>
void multiply_rows(const Square& to, Factor a, const Square& b, Bounds bounds) {
  const int64_t n = to.n;
#pragma omp parallel for schedule(static, 4) if (n >= 128)
  for (int64_t i = 0; i < n; i += kRows) {
    const int64_t rows = n - i < kRows ? n - i : kRows;
    int64_t first, last;
    bounds.terms(i, n, first, last);
    for (int64_t l = first; l < last; ++l) {
      const double* const from = b[l];
      int64_t begin, end;
      bounds.columns(l, n, begin, end);
      if (rows == kRows) {
        const double x0 = a(i, l), x1 = a(i + 1, l), x2 = a(i + 2, l), x3 = a(i + 3, l);
        double *const to0 = to[i], *const to1 = to[i + 1], *const to2 = to[i + 2], *const to3 = to[i + 3];
#pragma GCC ivdep
        for (int64_t j = begin; j < end; ++j) {
          to0[j] += x0 * from[j], to1[j] += x1 * from[j];
          to2[j] += x2 * from[j], to3[j] += x3 * from[j];
        }
      } else {
        for (int64_t r = i; r < n; ++r) {
          const double x = a(r, l);
          for (int64_t j = begin; j < end; ++j) to[r][j] += x * from[j];
        }
      }
    }
  }
}

// Terms up to those of the last row of the group; columns from the diagonal on.
struct LowerByUpper {
  static void terms(int64_t i, int64_t n, int64_t& first, int64_t& last) {
    first = 0, last = i + kRows < n ? i + kRows : n;
  }
  static void columns(int64_t l, int64_t n, int64_t& begin, int64_t& end) { begin = l, end = n; }
};
// Terms from the first row of the group on; all columns from there on are right of its diagonal or not read.
struct TransposedLower {
  static void terms(int64_t i, int64_t n, int64_t& first, int64_t& last) { first = i, last = n; }
  static void columns(int64_t, int64_t n, int64_t& begin, int64_t& end) { begin = 0, end = n; }
};
// All terms; columns up to the diagonal.
struct ByTransposedUpper {
  static void terms(int64_t, int64_t n, int64_t& first, int64_t& last) { first = 0, last = n; }
  static void columns(int64_t l, int64_t, int64_t& begin, int64_t& end) { begin = 0, end = l + 1; }
};

struct Factors {
  const int64_t n;
  const float* p;
  Square lower, upper;
  Scratch<double> diagonal;

  explicit Factors(const PluArgs& a) : n(a.p.shape[0]), p(floats_of(a.p)), lower(n), upper(n), diagonal(n) {
    const float *l = floats_of(a.lower), *u = floats_of(a.upper);
    for (int64_t i = 0; i < n; ++i) {
      diagonal[i] = floats_of(a.sign)[i] * std::exp(static_cast<double>(floats_of(a.log_s)[i]));
      for (int64_t j = 0; j < n; ++j) {
        lower[i][j] = j < i ? l[i * n + j] : j == i;
        upper[i][j] = j > i ? u[i * n + j] : j == i ? diagonal[i] : 0.0;
      }
    }
  }
};

}  // namespace

void plu_matrix(const PluArgs& a) {
  const Factors f(a);
  const int64_t n = f.n;
  Square inner(n);
  multiply_rows(inner, [&](int64_t i, int64_t l) { return f.lower[i][l]; }, f.upper, LowerByUpper());
  float* const to = static_cast<float*>(a.matrix.data);
  Scratch<double> row(n);
  for (int64_t i = 0; i < n; ++i) {
    row.fill(0.0);
    for (int64_t k = 0; k < n; ++k)
      if (const double x = f.p[i * n + k]; x != 0.0)
        for (int64_t j = 0; j < n; ++j) row[j] += x * inner[k][j];
    for (int64_t j = 0; j < n; ++j) to[i * n + j] = static_cast<float>(row[j]);
  }
}

void plu_matrix_backward(const PluArgs& a) {
  const Factors f(a);
  const int64_t n = f.n;
  const float* const grad = floats_of(a.matrix);
  Square inner(n), of_lower(n), of_upper(n), transposed(n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < n; ++k) {
      transposed[k][i] = f.upper[i][k];
      if (const double x = f.p[i * n + k]; x != 0.0)
        for (int64_t j = 0; j < n; ++j) inner[k][j] += x * grad[i * n + j];
    }
  multiply_rows(of_upper, [&](int64_t k, int64_t i) { return f.lower[i][k]; }, inner, TransposedLower());
  multiply_rows(of_lower, [&](int64_t i, int64_t j) { return inner[i][j]; }, transposed, ByTransposedUpper());
  const auto to = [](const View& v) { return static_cast<float*>(v.data); };
  for (int64_t i = 0; i < n; ++i) {
    to(a.grad_log_s)[i] = static_cast<float>(of_upper[i][i] * f.diagonal[i]);
    for (int64_t j = 0; j < n; ++j) {
      to(a.grad_lower)[i * n + j] = j < i ? static_cast<float>(of_lower[i][j]) : 0.0f;
      to(a.grad_upper)[i * n + j] = j > i ? static_cast<float>(of_upper[i][j]) : 0.0f;
    }
  }
}

}  // namespace GENPERF_ISA
}  // namespace genperf
