// The scores of a block of vectors, and sums over each vector's codewords.
#pragma once

#include "../common/exp_of_negative.h"
#include "words.h"

namespace genperf {
namespace GENPERF_ISA {
namespace {

constexpr float kLeast = 1e-4f;        // distance of which the Euclidean score is taken
constexpr int64_t kSegment = 64 * 16;  // terms whose sum is made before it is added to others

inline double total(Vf x) {
  alignas(64) float lane[kLanes];
  store(lane, x);
  double sum = 0.0;
  for (float l : lane) sum += l;
  return sum;
}

// Of one vector, with exp taken of the differences from the largest score.
struct RowSums {
  float largest;
  double sum;       // of exp
  double moment;    // of the differences, weighted with exp
  double weighted;  // of given weights, with exp

  double entropy() const { return std::log(sum) - moment / sum; }
};

// All scores of a row from the products, in place; the largest of them.
inline float scores_of_row(const Words& words, double square, double temperature, float* s) {
  Vf most = splat<Vf>(-kInfinity);
  const float* bias = words.bias.get();
  if (words.score == Score::kEuclidean) {
    const float x2 = static_cast<float>(square), factor = static_cast<float>(-1.0 / temperature);
    for (int64_t k = 0; k < words.padded; k += kLanes) {
      Vf d2 = (load(bias + k) + x2) - 2.0f * load(s + k);
      d2 = select(d2 < kLeast * kLeast, splat<Vf>(kLeast * kLeast), d2);
      const Vf v = sqrt_rn(d2) * factor;
      store(s + k, v);
      most = select(v > most, v, most);
    }
  } else {
    const Vf scale = splat<Vf>(words.scale);
    for (int64_t k = 0; k < words.padded; k += kLanes) {
      const Vf v = multiply_add(load(s + k), scale, load(bias + k));
      store(s + k, v);
      most = select(v > most, v, most);
    }
  }
  alignas(64) float lane[kLanes];
  store(lane, most);
  float largest = lane[0];
  for (float l : lane) largest = l > largest ? l : largest;
  return largest;
}

// exp of the scores less the largest to `e`, and their sums; `weights` may be null.
inline RowSums sums_of_row(int64_t n, const float* s, float largest, const float* weights, float* e) {
  const Vf zero = splat<Vf>(0.0f);
  Vf sum = zero, moment = zero, weighted = zero;
  for (int64_t from = 0; from < n; from += kSegment) {
    const int64_t end = from + kSegment < n ? from + kSegment : n;
    Vf sum_here = zero, moment_here = zero, weighted_here = zero;
    for (int64_t k = from; k < end; k += kLanes) {
      const Vf x = load(s + k) - largest, y = exp_of_negative(x);
      store(e + k, y);
      sum_here = sum_here + y;
      moment_here = multiply_add(y, not_infinite(x), moment_here);
      if (weights) weighted_here = multiply_add(y, load(weights + k), weighted_here);
    }
    sum = sum + sum_here, moment = moment + moment_here, weighted = weighted + weighted_here;
  }
  return {largest, total(sum), total(moment), total(weighted)};
}

// A block of vectors and their products with all codewords.
struct Scores {
  const SoftAssignmentHead& a;
  const Words& words;
  const int64_t most, pitch;  // vectors at most; floats between the scores of two of them
  Vectors x;
  Scratch<float> s;  // [most, pitch]
  Scratch<float> e;  // of one vector
  int64_t first = 0;
  int n = 0;

  Scores(const SoftAssignmentHead& a, const Words& words)
      : a(a),
        words(words),
        most(vectors_of_block(words)),
        pitch(words.padded + kLanes),  // not a power of two, which would crowd few sets of the cache
        x(a, words, most),
        s(most * pitch),
        e(words.padded) {}

  static int64_t vectors_of_block(const Words& words) {
    constexpr int64_t kFloats = 1 << 17, kMost = 96;
    const int64_t fit = kFloats / (words.padded + 2 * words.pitch) / kTile * kTile;
    return fit < 2 * kTile ? 2 * kTile : fit > kMost / kTile * kTile ? kMost / kTile * kTile : fit;
  }

  void open(int64_t begin, int64_t end) {
    first = begin;
    n = static_cast<int>(end - begin);
    x.read(first, n);
    const int64_t rows = round_up(n, kTile);
    for (int64_t k = 0; k < words.padded; k += kLanes)
      multiply({x.rows.get(), words.pitch, 1}, words.panels.get() + k * words.dim, kLanes, rows, kLanes,
               words.dim, s.get() + k, pitch, false);
  }

  // Completes the scores of vector i of the block, and leaves their exp in `e`.
  RowSums sums(int i, const float* weights) {
    float* row = s.get() + i * pitch;
    const float largest = scores_of_row(words, x.squares[i], a.temperature, row);
    return sums_of_row(words.padded, row, largest, weights, e.get());
  }

  // What every score of the vector lacks.
  double shift(int i) const {
    if (a.score == Score::kL2) return -x.squares[i] / a.temperature;
    if (a.score != Score::kDot || !words.centred) return 0.0;
    double product = 0.0;
    const float* row = x.rows.get() + i * words.pitch;
    for (int64_t d = 0; d < words.dim; ++d) product += static_cast<double>(row[d]) * words.mean[d];
    return product / a.temperature;
  }
};

}  // namespace
}  // namespace GENPERF_ISA
}  // namespace genperf
