// Candidates, and their order by distances in double and, where these leave a doubt, by exact sums.
#pragma once

#include <algorithm>
#include <cmath>

#include "codebook.h"

namespace genperf {
namespace GENPERF_ISA {
namespace vq {

using Vd = Block<double>;  // eight

inline Vd load_doubles(const float* p) {
  return for_parts<Vd>([&](int i) {
    typedef float Half __attribute__((vector_size(kNativeBytes / 2)));
    Half x;
    std::memcpy(&x, p + i * (8 / kParts), sizeof x);
    return __builtin_convertvector(x, Vd::Native);
  });
}

inline Vd magnitude(Vd v) {
  return for_parts<Vd>([&](int i) { return v.part[i] < 0.0 ? -v.part[i] : v.part[i]; });
}

inline double sum_of(Vd v) {
  double x[8];
  std::memcpy(x, &v, sizeof x);
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// The order of codewords by their distance from one vector after another.
class Ranking {
 public:
  Ranking(const VqSearch& a, const Codebook& book)
      : a_(a), book_(book), x_(a.dim), mine_(a.dim), theirs_(a.dim), order_(a.codewords), all_(a.codewords) {}

  // Writes the results for vector `row` from these candidates, of which there are enough.
  void among(int64_t row, const float* x, const int32_t* candidates, int64_t n) {
    std::memcpy(x_.get(), x, a_.dim * sizeof(float));
    const int64_t k = a_.k < n ? a_.k : n;
    if (n == 1 && !a_.distances) {
      order_[0].index = candidates[0];
    } else {
      const auto nearer = [&](const Measured& i, const Measured& j) { return is_nearer(i, j); };
      for (int64_t i = 0; i < n; ++i) order_[i] = measured(candidates[i]);
      std::partial_sort(order_.get(), order_.get() + k, order_.get() + n, nearer);
    }
    for (int64_t i = 0; i < a_.k; ++i) {
      if (i < k)
        write(row, i, order_[i].index, order_[i].value);
      else
        write(row, i, book_.first[i], kNaN);
    }
  }

  void among_all(int64_t row, const float* x) {
    if (n_all_ < 0) {
      n_all_ = 0;
      for (int64_t i = 0; i < a_.codewords; ++i)
        if (book_.usable[i]) all_[n_all_++] = static_cast<int32_t>(i);
    }
    among(row, x, all_.get(), n_all_);
  }

  // Without the products: all codewords are measured in double.
  void among_all_of(const Rows& x) {
    Scratch<float> row(a_.dim);
    for (int64_t i = 0; i < a_.n; ++i) {
      x.read(i, 1, row.get(), a_.dim);
      if (is_finite(row.get(), a_.dim))
        among_all(i, row.get());
      else
        not_finite(i);
    }
  }

  // All codewords are equally near to 0 by their inner products and cosines.
  void of_zero(int64_t row) {
    for (int64_t i = 0; i < a_.k; ++i) write(row, i, book_.first[i], i < book_.n_usable ? 0.0 : kNaN);
  }

  void not_finite(int64_t row) {
    for (int64_t i = 0; i < a_.k; ++i) write(row, i, i, kNaN);
  }

 private:
  // What orders the codewords, within `error` of the truth.
  struct Measured {
    int32_t index;
    double value, error;
  };

  Measured measured(int32_t index) {
    const float* c = book_.rows.row(index, mine_.get());
    const float* x = x_.get();
    const int64_t whole = a_.dim / 8 * 8, rest = a_.dim - whole;
    float x_rest[8] = {}, c_rest[8] = {};
    for (int64_t d = 0; d < rest; ++d) x_rest[d] = x[whole + d], c_rest[d] = c[whole + d];
    Vd total = splat<Vd>(0.0), size = total, square = total;
    const auto add = [&](const float* xs, const float* cs) {
      const Vd xd = load_doubles(xs), cd = load_doubles(cs);
      if (a_.metric == Metric::kL2) {
        const Vd difference = xd - cd;
        total = total + difference * difference;
        return;
      }
      const Vd term = xd * cd;
      total = total - term;
      size = size + magnitude(term);
      square = square + cd * cd;
    };
    for (int64_t d = 0; d < whole; d += 8) add(x + d, c + d);
    if (rest > 0) add(x_rest, c_rest);
    const double u = static_cast<double>(a_.dim + 16) * 0x1p-52, value = sum_of(total);
    if (a_.metric == Metric::kL2) return {index, value, u * value};
    if (a_.metric == Metric::kDot) return {index, value, u * sum_of(size)};
    const double length = std::sqrt(sum_of(square));
    return length == 0.0 ? Measured{index, 0.0, 0.0}
                         : Measured{index, value / length, u * sum_of(size) / length};
  }

  bool is_nearer(const Measured& i, const Measured& j) {
    if (i.value + i.error < j.value - j.error) return true;
    if (j.value + j.error < i.value - i.error) return false;
    if (i.index == j.index) return false;
    const float* mine = book_.rows.row(i.index, mine_.get());
    const float* theirs = book_.rows.row(j.index, theirs_.get());
    const int order = compare_exactly(a_.metric, x_.get(), mine, theirs, a_.dim);
    return order < 0 || (order == 0 && i.index < j.index);
  }

  void write(int64_t row, int64_t i, int64_t index, double value) {
    a_.indices[row * a_.k + i] = index;
    if (!a_.distances) return;
    if (a_.metric == Metric::kCosine) {
      double square = 0.0;
      for (int64_t d = 0; d < a_.dim; ++d) square += static_cast<double>(x_[d]) * x_[d];
      value = 1.0 + (value == 0.0 ? 0.0 : value / std::sqrt(square));
      value = value < 0.0 ? 0.0 : value;
    }
    a_.distances[row * a_.k + i] = static_cast<float>(value + 0.0);  // 0 rather than -0
  }

  const VqSearch& a_;
  const Codebook& book_;
  Scratch<float> x_, mine_, theirs_;
  Scratch<Measured> order_;
  Scratch<int32_t> all_;
  int64_t n_all_ = -1;
};

}  // namespace vq
}  // namespace GENPERF_ISA
}  // namespace genperf
