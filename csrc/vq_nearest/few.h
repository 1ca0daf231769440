// The search for a few vectors, which does not pay for a packed codebook: each codeword is read once, where
// it stands, and compared with all of the vectors.
//
// Distances are sums of squares of differences in float32, whose error is relative to themselves, so that
// nothing is centred or scaled. Where float32 does not reach, a codeword is a candidate in any case.
#pragma once

#include "rank.h"

namespace genperf {
namespace GENPERF_ISA {
namespace vq {

struct FewProbe;  // of the tests

class Few {
 public:
  static constexpr int kMost = 12;  // vectors

  Few(const VqSearch& a, const Codebook& book)
      : a_(a),
        book_(book),
        pitch_(book.pitch()),
        error_(static_cast<float>(1.01 * kRoundoff * (static_cast<double>(a.dim / kLanes) + 12.0))),
        tiny_(static_cast<float>(a.dim + 16) * 0x1p-125f),
        x_(kMost * pitch_, 0.0f),
        buffer_(a.dim),
        best_(kMost * a.k),
        hits_(kMost * most_hits()) {}

  // x has a.n <= kMost rows.
  void search(const Rows& x, Ranking& ranking) {
    const int n = static_cast<int>(a_.n);
    x.read(0, n, x_.get(), pitch_);
    best_.fill(kInfinity);
    for (int r = 0; r < n; ++r) prepare(r);
    for (int64_t i = 0; i < a_.codewords; ++i) {
      const float* c = book_.rows.row(i, buffer_.get());
      float tail[kLanes] = {};
      std::memcpy(tail, c + a_.dim / kLanes * kLanes, a_.dim % kLanes * sizeof(float));
      int r = 0;
      for (; r + 4 <= n; r += 4) compare<4>(r, i, c, tail);
      for (; r < n; ++r) compare<1>(r, i, c, tail);
    }
    for (int r = 0; r < n; ++r) {
      ranking.start(r, x_.get() + r * pitch_);
      switch (kind_[r]) {
        case Kind::kSearched:
          for (int64_t i = 0; i < count_[r]; ++i) {
            const Hit hit = hits_[r * most_hits() + i];
            if (!(hit.lower > threshold(r))) ranking.add(hit.index);
          }
          ranking.finish();
          break;
        case Kind::kAll:
          ranking.add_all();
          ranking.finish();
          break;
        case Kind::kZero:
          ranking.finish_zero();
          break;
        case Kind::kNotFinite:
          ranking.finish_not_finite();
      }
    }
  }

 private:
  friend struct FewProbe;
  enum class Kind : uint8_t { kSearched, kAll, kZero, kNotFinite };
  struct Hit {
    float lower;
    int32_t index;
  };
  struct Bounds {
    float lower, upper;
  };

  int64_t most_hits() const { return 64 + 2 * a_.k; }

  void prepare(int r) {
    const float* x = x_.get() + r * pitch_;
    double square = 0.0;
    for (int64_t d = 0; d < a_.dim; ++d) square += static_cast<double>(x[d]) * x[d];
    norm_[r] = 1.001f * static_cast<float>(std::sqrt(square));
    count_[r] = 0;
    kind_[r] = !is_finite(x, a_.dim)                       ? Kind::kNotFinite
               : square == 0.0 && a_.metric != Metric::kL2 ? Kind::kZero
                                                           : Kind::kSearched;
  }

  // Codeword i, whose last elements are `tail`, with the vectors [r, r + kTogether).
  template <int kTogether>
  void compare(int r, int64_t i, const float* c, const float* tail) {
    Vf sum[kTogether], square = splat<Vf>(0.0f);
    const bool l2 = a_.metric == Metric::kL2;
#pragma GCC unroll 4
    for (int j = 0; j < kTogether; ++j) sum[j] = splat<Vf>(0.0f);
    const float* x = x_.get() + r * pitch_;
    const int64_t whole = a_.dim / kLanes * kLanes;
    for (int64_t d = 0; d < a_.dim; d += kLanes) {
      const Vf word = load(d < whole ? c + d : tail);
      if (!l2) square = multiply_add(word, word, square);
#pragma GCC unroll 4
      for (int j = 0; j < kTogether; ++j) {
        const Vf v = load(x + j * pitch_ + d), difference = v - word;
        sum[j] = l2 ? multiply_add(difference, difference, sum[j]) : multiply_add(v, word, sum[j]);
      }
    }
    const float of_word = l2 ? 0.0f : sum_of(square);
    for (int j = 0; j < kTogether; ++j) {
      const Bounds b = bounds(r + j, sum_of(sum[j]), of_word);
      if (!(b.lower > threshold(r + j)) && kind_[r + j] == Kind::kSearched) keep(r + j, i, c, b);
    }
  }

  // Of what orders the codewords, from a sum in float32 and the square of the codeword's norm.
  Bounds bounds(int r, float sum, float square) const {
    constexpr Bounds kUnknown = {-kInfinity, kInfinity};
    if (a_.metric == Metric::kL2) {
      if (!(sum < 3e38f)) return {2e38f, kInfinity};
      return {sum - (error_ * sum + tiny_), sum + (error_ * sum + tiny_)};
    }
    float value = -sum, bound = 0.0f;
    if (a_.metric == Metric::kDot) {
      bound = 1.01f * error_ * norm_[r] * std::sqrt(square + tiny_) + tiny_;
    } else {
      if (!(square > 1e-30f && square < 1e30f)) return kUnknown;
      value /= std::sqrt(square);
      bound = 2.02f * error_ * norm_[r] + 1e15f * tiny_;
    }
    return std::fabs(value) < 1e38f ? Bounds{value - bound, value + bound} : kUnknown;
  }

  // No codeword among the k nearest has a lower bound above it.
  float threshold(int r) const { return best_[r * a_.k]; }

  void keep(int r, int64_t i, const float* c, Bounds b) {
    if (!is_finite(c, a_.dim)) return;
    Hit* const all = hits_.get() + r * most_hits();
    float* best = best_.get() + r * a_.k;  // descending
    if (b.upper < best[0]) {
      int64_t at = 0;
      for (; at + 1 < a_.k && best[at + 1] > b.upper; ++at) best[at] = best[at + 1];
      best[at] = b.upper;
    }
    if (count_[r] == most_hits()) {
      int64_t left = 0;
      for (int64_t j = 0; j < count_[r]; ++j)
        if (!(all[j].lower > best[0])) all[left++] = all[j];
      count_[r] = left;
    }
    if (count_[r] == most_hits())
      kind_[r] = Kind::kAll;
    else
      all[count_[r]++] = {b.lower, static_cast<int32_t>(i)};
  }

  const VqSearch& a_;
  const Codebook& book_;
  const int64_t pitch_;
  const float error_, tiny_;  // of a sum: relative, absolute
  Scratch<float> x_, buffer_;
  Scratch<float> best_;  // upper bounds of what the k nearest codewords' order goes by
  Scratch<Hit> hits_;
  int64_t count_[kMost];
  float norm_[kMost];
  Kind kind_[kMost];
};

}  // namespace vq
}  // namespace GENPERF_ISA
}  // namespace genperf
