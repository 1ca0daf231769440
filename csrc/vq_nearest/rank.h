// Candidates, and their order by distances in double and, where these leave a doubt, by exact sums.
#pragma once

#include "codebook.h"

namespace genperf {
namespace GENPERF_ISA {
namespace vq {

// How the codewords of a vector are ordered: by its candidates, or all are, or all are as near, or none is.
enum class Kind : uint8_t { kSearched, kAll, kZero, kNotFinite };

// The k nearest codewords of one vector after another.
class Ranking {
 public:
  Ranking(const VqSearch& a, Codebook& book)
      : a_(a), book_(book), x_(a.dim), mine_(a.dim), theirs_(a.dim), best_(a.k) {}

  // `candidates` adds each candidate of vector x, which is row `row`, once.
  template <class Function>
  GENPERF_HD void rank(int64_t row, const float* x, Kind kind, Function candidates) {
    row_ = row, n_ = 0;
    std::memcpy(x_.get(), x, a_.dim * sizeof(float));
    switch (kind) {
      case Kind::kSearched:
        candidates();
        return finish();
      case Kind::kAll:
        add_all();
        return finish();
      case Kind::kZero:
        return finish_zero();
      case Kind::kNotFinite:
        finish_not_finite();
    }
  }

  // Of the vector at hand, at least the value of the best codeword so far; of the metrics other than kL2,
  // this is -x.c or -x.c / |c|.
  double reached() const { return best_[0].value + best_[0].error; }

  GENPERF_HD void add(int64_t index) {
    if (n_ == 1 && a_.k == 1 && is_farther(index)) return;
    const Measured candidate = measured(static_cast<int32_t>(index));
    if (n_ == 0) {
      best_[0] = candidate;
      n_ = 1;
    } else if (a_.k == 1) {
      // Which of two is nearer is not to be guessed, so that there is no branch for it.
      Measured& best = best_[0];
      const bool nearer = candidate.value + candidate.error < best.value - best.error;
      const bool farther = candidate.value - candidate.error > best.value + best.error;
      const int32_t indices[] = {best.index, candidate.index};
      const double values[] = {best.value, candidate.value}, errors[] = {best.error, candidate.error};
      if (nearer | farther)
        best = {indices[nearer], values[nearer], errors[nearer]};
      else if (is_nearer_exactly(candidate, best))
        best = candidate;
    } else {
      int64_t i = n_ < a_.k ? n_++ : a_.k;
      if (i == a_.k && !is_nearer(candidate, best_[--i])) return;
      for (; i > 0 && is_nearer(candidate, best_[i - 1]); --i) best_[i] = best_[i - 1];
      best_[i] = candidate;
    }
  }

 private:
  // Whether float32 is enough to tell that a codeword is farther than the best, of the distance: its relative
  // error is below (dim / 16 + 18) 2^-24, as in few.h.
  GENPERF_HD bool is_farther(int64_t index) const {
    if (a_.metric != Metric::kL2 || a_.dim < kLanes) return false;
    const float *c = book_.rows.row(index, mine_.get()), *x = x_.get();
    Vf sum[2] = {splat<Vf>(0.0f), splat<Vf>(0.0f)};
    const auto add = [&](int64_t d, Vf& to) __attribute__((always_inline)) {
      const Vf difference = load(x + d) - load(c + d);
      to = multiply_add(difference, difference, to);
    };
    int64_t d = 0;
    for (; d + 2 * kLanes <= a_.dim; d += 2 * kLanes) add(d, sum[0]), add(d + kLanes, sum[1]);
    if (d + kLanes <= a_.dim) add(d, sum[0]), d += kLanes;
    float total = sum_of(sum[0] + sum[1]);
    for (; d < a_.dim; ++d) total += (x[d] - c[d]) * (x[d] - c[d]);
    const double dim = static_cast<double>(a_.dim);
    return total < 3e38f &&
           total * (1.0 - 1.01 * (dim / kLanes + 32.0) * kRoundoff) - (dim + 16.0) * 0x1p-125 >
               best_[0].value + best_[0].error;
  }

  void add_all() {
    book_.find_usable();
    for (int64_t i = 0; i < a_.codewords; ++i)
      if (book_.usable[i]) add(i);
  }

  // Where there were too few candidates, unusable codewords follow.
  void finish() {
    for (int64_t i = 0; i < n_; ++i) write(i, best_[i].index, best_[i].value);
    if (n_ == a_.k) return;
    book_.find_usable();
    for (int64_t i = n_; i < a_.k; ++i) write(i, book_.first[i], kNaN);
  }

  // All codewords are equally near to 0 by their inner products and cosines.
  void finish_zero() {
    book_.find_usable();
    for (int64_t i = 0; i < a_.k; ++i) write(i, book_.first[i], i < book_.n_usable ? 0.0 : kNaN);
  }

  void finish_not_finite() {
    for (int64_t i = 0; i < a_.k; ++i) write(i, i, kNaN);
  }

  // What orders the codewords, within `error` of the truth.
  struct Measured {
    int32_t index;
    double value, error;
  };

  GENPERF_HD Measured measured(int32_t index) {
    const float* c = book_.rows.row(index, mine_.get());
    const double u = static_cast<double>(a_.dim + 16) * 0x1p-52;
    if (a_.metric == Metric::kL2) {
      Vd total = splat<Vd>(0.0);
      each_eight(c, [&](Vd x, Vd word) __attribute__((always_inline)) {
        const Vd difference = x - word;
        total = total + difference * difference;
      });
      const double value = sum_of(total);
      return {index, value, u * value};
    }
    Vd total = splat<Vd>(0.0), size = total, square = total;
    each_eight(c, [&](Vd x, Vd word) __attribute__((always_inline)) {
      const Vd term = x * word;
      total = total - term;
      size = size + magnitude(term);
      square = square + word * word;
    });
    const double value = sum_of(total);
    if (a_.metric == Metric::kDot) return {index, value, u * sum_of(size)};
    const double length = std::sqrt(sum_of(square));
    return length == 0.0 ? Measured{index, 0.0, 0.0}
                         : Measured{index, value / length, u * sum_of(size) / length};
  }

  // f of eight elements of x and of c at a time, with zeros at the end.
  template <class Function>
  GENPERF_HD void each_eight(const float* c, Function f) const {
    const float* x = x_.get();
    int64_t d = 0;
    for (; d + 8 <= a_.dim; d += 8) f(load_doubles(x + d), load_doubles(c + d));
    if (d == a_.dim) return;
    float x_rest[8] = {}, c_rest[8] = {};
    for (int64_t i = d; i < a_.dim; ++i) x_rest[i - d] = x[i], c_rest[i - d] = c[i];
    f(load_doubles(x_rest), load_doubles(c_rest));
  }

  bool is_nearer(const Measured& i, const Measured& j) {
    if (i.value + i.error < j.value - j.error) return true;
    if (j.value + j.error < i.value - i.error) return false;
    return is_nearer_exactly(i, j);
  }

  __attribute__((noinline)) bool is_nearer_exactly(const Measured& i, const Measured& j) {
    const float* mine = book_.rows.row(i.index, mine_.get());
    const float* theirs = book_.rows.row(j.index, theirs_.get());
    const int order = compare_exactly(a_.metric, x_.get(), mine, theirs, a_.dim);
    return order < 0 || (order == 0 && i.index < j.index);
  }

  void write(int64_t i, int64_t index, double value) {
    a_.indices[row_ * a_.k + i] = index;
    if (!a_.distances) return;
    if (a_.metric == Metric::kCosine) {
      double square = 0.0;
      for (int64_t d = 0; d < a_.dim; ++d) square += static_cast<double>(x_[d]) * x_[d];
      value = 1.0 + (value == 0.0 ? 0.0 : value / std::sqrt(square));
      value = value < 0.0 ? 0.0 : value;
    }
    a_.distances[row_ * a_.k + i] = static_cast<float>(value + 0.0);  // 0 rather than -0
  }

  const VqSearch& a_;
  Codebook& book_;
  Scratch<float> x_, mine_, theirs_;
  Scratch<Measured> best_;
  int64_t row_ = 0, n_ = 0;
};

}  // namespace vq
}  // namespace GENPERF_ISA
}  // namespace genperf
