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
  static constexpr int kMost = 16;  // vectors

  Few(const VqSearch& a, const Codebook& book)
      : a_(a),
        book_(book),
        pitch_(book.pitch()),
        error_(static_cast<float>(1.01 * kRoundoff * (static_cast<double>(a.dim / kLanes) + 12.0))),
        tiny_(static_cast<float>(a.dim + 16) * 0x1p-125f),
        x_(kMost * pitch_, 0.0f),
        raw_(4 * pitch_),
        padded_(4 * pitch_, 0.0f),
        best_(kMost * a.k),
        hits_(kMost * most_hits()) {}

  // x has a.n <= kMost rows.
  void search(const Rows& x, Ranking& ranking) {
    const int n = static_cast<int>(a_.n);
    x.read(0, n, x_.get(), pitch_);
    best_.fill(kInfinity);
    for (int r = 0; r < n; ++r) prepare(r);
    for (int r = n; r < kMost; ++r) skip(r, Kind::kNotFinite);
    if (a_.metric == Metric::kL2)
      scan<true>(n);
    else
      scan<false>(n);
    for (int r = 0; r < n; ++r)
      ranking.rank(r, x_.get() + r * pitch_, kind_[r], [&] {
        for (int64_t i = 0; i < count_[r]; ++i) {
          const Hit hit = hits_[r * most_hits() + i];
          if (!(hit.lower > threshold(r))) ranking.add(hit.index);
        }
      });
  }

 private:
  friend struct FewProbe;
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
    kind_[r] = Kind::kSearched;
    limit_[r] = kInfinity;
    if (!is_finite(x, a_.dim))
      skip(r, Kind::kNotFinite);
    else if (square == 0.0 && a_.metric != Metric::kL2)
      skip(r, Kind::kZero);
  }

  // Vector r needs no candidates, or no more of them.
  void skip(int r, Kind kind) {
    kind_[r] = kind;
    limit_[r] = -kInfinity;
  }

  // Four codewords at a time with all n vectors, four of these at a time and what is left of them.
  template <bool kL2>
  void scan(int n) {
    for (int64_t i = 0; i < a_.codewords; i += 4) {
      const int count = static_cast<int>(std::min<int64_t>(4, a_.codewords - i));
      const float* word[4];
      read(i, count, word);
      Four square{};
      if (!kL2) square = squares(word);
      int r = 0;
      for (; r + 3 <= n; r += 4)
        for (int j = 0; j < count; ++j) compare<kL2, 4, 1>(r, i + j, word + j, Four{} + square[j]);
      if (r + 2 == n)
        for (int j = 0; j < count; j += 2)
          compare<kL2, 2, 2>(r, i + j, word + j, Four{square[j], square[j + 1], square[j], square[j + 1]});
      if (r + 1 == n) compare<kL2, 1, 4>(r, i, word, square);
    }
  }

  // Codewords from i to word[0 .. count), padded with zeros; the others are the first of them.
  void read(int64_t i, int count, const float** word) {
    int64_t step;
    const float* from = book_.rows.some(i, count, raw_.get(), step);
    for (int j = 0; j < 4; ++j) {
      const int64_t at = j < count ? j : 0;
      word[j] = from + at * step;
      if (pitch_ == a_.dim) continue;
      std::memcpy(padded_.get() + j * pitch_, word[j], a_.dim * sizeof(float));
      word[j] = padded_.get() + j * pitch_;
    }
  }

  Four squares(const float* const* word) const {
    Vf sum[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] = splat<Vf>(0.0f);
    for (int64_t d = 0; d < pitch_; d += kLanes)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vf c = load(word[j] + d);
        sum[j] = multiply_add(c, c, sum[j]);
      }
    return sums_of(sum);
  }

  // The vectors from r with the codewords from i; four pairs, of whose codewords `square` are the squares of
  // the norms.
  template <bool kL2, int kVectors, int kWords>
  void compare(int r, int64_t i, const float* const* word, Four square) {
    static_assert(kVectors * kWords == 4);
    Vf sum[4];
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) sum[p] = splat<Vf>(0.0f);
    const float* x = x_.get() + r * pitch_;
    for (int64_t d = 0; d < pitch_; d += kLanes) {
      Vf c[kWords];
#pragma GCC unroll 4
      for (int w = 0; w < kWords; ++w) c[w] = load(word[w] + d);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const Vf v = load(x + j * pitch_ + d);
#pragma GCC unroll 4
        for (int w = 0; w < kWords; ++w) {
          const Vf difference = v - c[w];
          Vf& s = sum[j * kWords + w];
          s = kL2 ? multiply_add(difference, difference, s) : multiply_add(v, c[w], s);
        }
      }
    }
    const Four sums = sums_of(sum);
    if (kL2) {
      Four limit;
      std::memcpy(&limit, limit_ + r, sizeof limit);
      if (kWords == 2) limit = Four{limit[0], limit[0], limit[1], limit[1]};
      if (kWords == 4) limit = Four{} + limit[0];
      if (all_greater(sums - (sums * error_ + tiny_), limit)) return;
    }
    for (int p = 0; p < 4; ++p)
      if (i + p % kWords < a_.codewords)
        consider(r + p / kWords, i + p % kWords, word[p % kWords],
                 bounds(r + p / kWords, sums[p], square[p]));
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

  void consider(int r, int64_t i, const float* c, Bounds b) {
    if (kind_[r] != Kind::kSearched || b.lower > threshold(r) || !is_finite(c, a_.dim)) return;
    Hit* const all = hits_.get() + r * most_hits();
    float* best = best_.get() + r * a_.k;  // descending
    if (b.upper < best[0]) {
      int64_t at = 0;
      for (; at + 1 < a_.k && best[at + 1] > b.upper; ++at) best[at] = best[at + 1];
      best[at] = b.upper;
      limit_[r] = best[0];
    }
    if (count_[r] == most_hits()) {
      int64_t left = 0;
      for (int64_t j = 0; j < count_[r]; ++j)
        if (!(all[j].lower > best[0])) all[left++] = all[j];
      count_[r] = left;
    }
    if (count_[r] == most_hits())
      skip(r, Kind::kAll);
    else
      all[count_[r]++] = {b.lower, static_cast<int32_t>(i)};
  }

  const VqSearch& a_;
  const Codebook& book_;
  const int64_t pitch_;
  const float error_, tiny_;  // of a sum: relative, absolute
  Scratch<float> x_;
  Scratch<float> raw_, padded_;  // of four codewords that are not in place, or not padded there
  Scratch<float> best_;          // upper bounds of what the k nearest codewords' order goes by
  Scratch<Hit> hits_;
  int64_t count_[kMost];
  float norm_[kMost];
  float limit_[kMost + 3];  // the threshold of a vector that is searched
  Kind kind_[kMost];
};

}  // namespace vq
}  // namespace GENPERF_ISA
}  // namespace genperf
