// A codebook, and blocks of vectors, as the products of scores and gradients take them.
#pragma once

#include <cmath>

#include "../common/scratch.h"
#include "../vq_nearest/rows.h"
#include "plan.h"
#include "product.h"

namespace genperf {
namespace GENPERF_ISA {
namespace {

constexpr int64_t kWords = 48;  // codewords come in a multiple of this, which is one of 16 and of kTile

inline double sum_squares(const float* x, int64_t n) {
  double sum[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int j = 0; j < 4; ++j) sum[j] += static_cast<double>(x[i + j]) * x[i + j];
  for (; i < n; ++i) sum[0] += static_cast<double>(x[i]) * x[i];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// What a vector is divided by for the cosine, inverted; 0 for zero.
inline float inverse_length(double square) {
  return square == 0.0 ? 0.0f : static_cast<float>(1.0 / std::sqrt(square));
}

// The codewords less their mean, or over their lengths. Row-major, for the gradient of the
// vectors, and by panels of 16, for the scores; padded with codewords of probability 0.
struct Words {
  const int64_t dim, pitch, count, padded;  // pitch: floats between rows
  const Score score;
  const float scale;  // score = scale (product + |..| terms): see Statistics::scores
  Scratch<float> rows, panels;
  Scratch<float> bias;     // of each score: -|c|^2 / temperature, |c|^2, or 0; -inf, inf where padded
  Scratch<float> inverse;  // lengths, of the cosine
  Scratch<float> mean;
  bool centred = false;

  explicit Words(const SoftAssignmentHead& a)
      : dim(a.dim),
        pitch(round_up(a.dim, kLanes)),
        count(a.codewords),
        padded(round_up(a.codewords, kWords)),
        score(a.score),
        scale(static_cast<float>((a.score == Score::kL2 ? 2.0 : 1.0) / a.temperature)),
        rows(padded * pitch, 0.0f),
        panels(padded * dim),
        bias(padded),
        inverse(padded, 1.0f),
        mean(pitch, 0.0f) {
    const Rows from(a.codebook);
    for (int64_t k = 0; k < count; k += Rows::kMost) {
      const int n = static_cast<int>(count - k < Rows::kMost ? count - k : Rows::kMost);
      from.read(k, n, rows.get() + k * pitch, pitch);
    }
    if (score != Score::kCosine) centre();
    for (int64_t k = 0; k < padded; ++k) {
      float* row = rows.get() + k * pitch;
      const double square = sum_squares(row, dim);
      if (score == Score::kCosine && k < count) {
        inverse[k] = inverse_length(square);
        for (int64_t d = 0; d < dim; ++d) row[d] *= inverse[k];
      }
      bias[k] = score == Score::kL2          ? static_cast<float>(-square / a.temperature)
                : score == Score::kEuclidean ? static_cast<float>(square)
                                             : 0.0f;
      if (k >= count) bias[k] = score == Score::kEuclidean ? kInfinity : -kInfinity;
    }
    for (int64_t k = 0; k < padded; ++k)
      for (int64_t d = 0; d < dim; ++d)
        panels[k / kLanes * kLanes * dim + d * kLanes + k % kLanes] = rows[k * pitch + d];
  }

  bool by_distance() const { return score == Score::kL2 || score == Score::kEuclidean; }

 private:
  // Only where the mean is longer than what would be left: a subtraction rounds.
  void centre() {
    Scratch<double> sum(dim, 0.0);
    double squares = 0.0, of_mean = 0.0;
    for (int64_t k = 0; k < count; ++k) {
      const float* row = rows.get() + k * pitch;
      squares += sum_squares(row, dim);
      for (int64_t d = 0; d < dim; ++d) sum[d] += row[d];
    }
    for (int64_t d = 0; d < dim; ++d) {
      mean[d] = static_cast<float>(sum[d] / count);
      of_mean += static_cast<double>(mean[d]) * mean[d];
    }
    centred = 2.0 * of_mean * count > squares;
    for (int64_t k = 0; centred && k < count; ++k)
      for (int64_t d = 0; d < dim; ++d) rows[k * pitch + d] -= mean[d];
  }
};

// Some vectors in the form of the codewords; rows of zeros fill the last tile.
struct Vectors {
  const Words& words;
  const Rows from;
  Scratch<float> rows;      // [most, pitch]
  Scratch<double> squares;  // of their lengths, after centring and before division by them
  Scratch<float> inverse;

  Vectors(const SoftAssignmentHead& a, const Words& words, int64_t most)
      : words(words), from(a.x), rows(most * words.pitch, 0.0f), squares(most), inverse(most) {}

  void read(int64_t first, int n) {
    for (int i = 0; i < n; i += Rows::kMost)
      from.read(first + i, n - i < Rows::kMost ? n - i : Rows::kMost, rows.get() + i * words.pitch,
                words.pitch);
    for (int i = 0; i < n; ++i) {
      float* row = rows.get() + i * words.pitch;
      for (int64_t d = 0; words.centred && words.by_distance() && d < words.dim; ++d) row[d] -= words.mean[d];
      squares[i] = sum_squares(row, words.dim);
      inverse[i] = 1.0f;
      if (words.score != Score::kCosine) continue;
      inverse[i] = inverse_length(squares[i]);
      for (int64_t d = 0; d < words.dim; ++d) row[d] *= inverse[i];
    }
  }
};

}  // namespace
}  // namespace GENPERF_ISA
}  // namespace genperf
