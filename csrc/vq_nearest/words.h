// Codewords packed by panels of kWidth, in the numbers that they are multiplied in (floats.h, bytes.h).
#pragma once

#include "codebook.h"

namespace genperf {
namespace GENPERF_ISA {
namespace vq {

class Words {
 public:
  const Codebook& book;

  explicit Words(const Codebook& from) : book(from), longest_(panels()) {}

  int64_t panels() const { return (book.codewords + kWidth - 1) / kWidth; }

  // At least the norms of the codewords of a panel that was packed.
  double longest(int64_t panel) const { return longest_[std::min(panel, longest_.size() - 1)]; }

  // At least the norm of a vector whose sum of squares in float32 is `square`.
  double upper_norm(float square) const {
    const double n = static_cast<double>(book.dim);
    return std::sqrt(square * (1.0 + n * kRoundoff) + n * 0x1p-126);
  }

 protected:
  static constexpr int64_t kHeader = 2;  // rows of kWidth floats that every panel begins with

  // The header of the panel from place `begin`, and its codewords to `words` [kWidth, pitch()], zeros in
  // place of those that are not to be found. The header are the first terms of the sums and upper bounds of
  // the norms. The first term is -|C|^2 / 2 for the distance, raised by its share of the error bound where
  // `by_word`; 0 for products; and -inf for what is not to be found.
  void begin_panel(int64_t begin, float* to, float* words) {
    float most = 0.0f;
    const float bound = book.by_word ? static_cast<float>(book.half_error()) : 0.0f;
    for (int lane = 0; lane < kWidth; ++lane) {
      const int64_t i = begin + lane < book.codewords ? book.word_at(begin + lane) : -1;
      const bool present = i >= 0 && book.usable[i];
      float* const word = words + lane * book.pitch();
      if (present)
        book.read_word(i, word);
      else
        std::memset(word, 0, book.dim * sizeof(float));
      const bool squared = book.metric == Metric::kL2;
      to[lane] = !present ? -kInfinity : squared ? book.half[i] * bound - book.half[i] : 0.0f;
      to[kWidth + lane] = present ? book.upper_length(book.half[i]) : 0.0f;
      most = std::max(most, to[kWidth + lane]);
    }
    longest_[begin / kWidth] = most;
  }

 private:
  Scratch<float> longest_;
};

}  // namespace vq
}  // namespace GENPERF_ISA
}  // namespace genperf
