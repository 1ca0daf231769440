// The nearest codewords of a few vectors, by differences in float32: nothing is made ready for it, so that a
// frame of a stream costs one pass over the codebooks.
#pragma once

#include "../vq_nearest/search.h"
#include "stages.h"

namespace genperf {
namespace GENPERF_ISA {
namespace residual {

// Of native lanes.
GENPERF_HD float sum_native(Nf v) {
  float x[kNativeBytes / 4];
  std::memcpy(x, &v, sizeof v);
#pragma GCC unroll 4
  for (int n = kNativeBytes / 8; n > 0; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) x[i] += x[i + n];
  return x[0];
}

class DirectSearch {
 public:
  static constexpr int64_t kMost =
      16;  // vectors of a call for which this is faster than to pack the codebooks

  DirectSearch(const View& codebook, int64_t dim, int64_t rows)
      : codebook_(codebook),
        words_(codebook),
        dim_(dim),
        pitch_(padded_dim(dim)),
        word_(pitch_, 0.0f),
        best_(rows),
        second_(rows) {}

  // Of rows [n, pitch], padded, the nearest codewords by Euclidean distance.
  //
  // A squared distance is a sum of squares, each off by a factor (1 + e)^4, |e| <= 2^-24, at most, in chains
  // of D / 16 additions and five more: so it is off by a factor of 1 + g, |g| <= 1.01 (D / 16 + 10) 2^-24,
  // but for underflow, below D 2^-148. Where the second best is above the best by more than that of both, the
  // best is the nearest. Comparisons with NaN are false, so that unusable codewords are passed over.
  void nearest(const float* rows, int64_t n, int64_t* chosen) {
    for (int64_t r = 0; r < n; ++r) best_[r] = second_[r] = kInfinity, chosen[r] = 0;
    const int64_t codewords = codebook_.shape[0];
    for (int64_t k = 0; k < codewords; ++k) {
      const float* word = padded(words_.row(k, word_.get()));
      int64_t r = 0;
      for (; r + 4 <= n; r += 4) measure<4>(rows, r, word, k, chosen);
      for (; r < n; ++r) measure<1>(rows, r, word, k, chosen);
    }
    const double g = 1.01 * (static_cast<double>(dim_) / 16 + 10) * 0x1p-24, least = dim_ * 0x1p-146;
    for (int64_t r = 0; r < n; ++r) {
      if (best_[r] < kInfinity && second_[r] > best_[r] * (1.0 + 2.1 * g) + least) continue;
      if (!exact_) {
        searched_ = std::make_unique<vq::SearchedCodebook>(codebook_, Metric::kL2, 1);
        exact_ = std::make_unique<vq::RowSearch>(*searched_);
      }
      exact_->nearest(rows + r * pitch_, pitch_, 1, chosen + r);
    }
  }

 private:
  const float* padded(const float* word) {
    if (pitch_ == dim_) return word;
    if (word != word_.get()) std::memcpy(word_.get(), word, dim_ * sizeof(float));
    return word_.get();
  }

  template <int kRows>
  void measure(const float* rows, int64_t first, const float* word, int64_t k, int64_t* chosen) {
    Vf sum[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum[r] = splat<Vf>(0.0f);
    const float* row = rows + first * pitch_;
    for (int64_t d = 0; d < pitch_; d += kLanes) {
      const Vf c = load(word + d);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vf difference = load(row + r * pitch_ + d) - c;
        sum[r] = vq::multiply_add(difference, difference, sum[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      Nf lanes = sum[r].part[0];
#pragma GCC unroll 4
      for (int i = 1; i < kParts; ++i) lanes = lanes + sum[r].part[i];
      const float square = sum_native(lanes);
      float& best = best_[first + r];
      float& second = second_[first + r];
      if (square < best) {
        second = best, best = square, chosen[first + r] = k;
      } else if (square < second) {
        second = square;
      }
    }
  }

  const View& codebook_;
  const Rows words_;
  const int64_t dim_, pitch_;
  Scratch<float> word_, best_, second_;
  std::unique_ptr<vq::SearchedCodebook> searched_;
  std::unique_ptr<vq::RowSearch> exact_;
};

}  // namespace residual
}  // namespace GENPERF_ISA
}  // namespace genperf
