// The search for the candidates of a block of vectors.
//
// One loop does nearly all the arithmetic: the scores of kTile vectors with a panel of kWidth codewords, as
// sums of products in registers. They are compared with each vector's threshold as they come, the best score
// so far less twice the error bound, and never stored; the few above it are kept as candidates. As the
// threshold rises some ln K times for each vector, this costs little more than the comparison.
#pragma once

#include <algorithm>

#include "../common/lanes.h"
#include "codebook.h"
#include "rank.h"

namespace genperf {
namespace GENPERF_ISA {
namespace vq {

struct BatchProbe;  // of the tests

inline constexpr int64_t kDepth = 256;     // products in one chain, and of a panel in the first-level cache
inline constexpr int kRows = 16 * 6;       // vectors of a block at most; a multiple of every kTile
inline constexpr int kMostWanted = 64;     // k
inline constexpr int64_t kFewVectors = 6;  // for which packing does not pay
inline constexpr double kRoundoff = 0x1p-24;

GENPERF_HD Vf multiply_add(Vf a, Vf b, Vf c) {
#if defined(__AVX512F__)
  return for_parts<Vf>(
      [&](int i) { return (Nf)_mm512_fmadd_ps((__m512)a.part[i], (__m512)b.part[i], (__m512)c.part[i]); });
#elif defined(__AVX2__)
  return for_parts<Vf>(
      [&](int i) { return (Nf)_mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]); });
#else
  return a * b + c;
#endif
}

// A bit for each lane that is set in a comparison's result.
GENPERF_HD unsigned lanes_of(Vi::Native mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask);
#elif defined(__x86_64__)
  return _mm_movemask_ps((__m128)mask);
#else
  return (mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8);
#endif
}

// The vectors of one block while the codebook passes by.
class Batch {
 public:
  Batch(const VqSearch& a, const Codebook& book, int rows)
      : a_(a),
        book_(book),
        rows_(rows),
        pitch_((a.dim + kLanes - 1) / kLanes * kLanes),
        raw_(rows * pitch_),
        packed_(rows * a.dim),
        sums_(rows * kWidth),
        best_(a.k > 1 ? rows * a.k : 0) {}

  // Reads the vectors from `first`, and forgets what was found for others.
  void open(const Rows& x, int64_t first) {
    first_ = first;
    n_ = static_cast<int>(std::min<int64_t>(rows_, a_.n - first));
    x.read(first, n_, raw_.get(), pitch_);
    for (int r = 0; r < rows_; ++r) {
      count_[r] = 0;
      kind_[r] = r < n_ ? prepare(r) : Kind::kNotFinite;
      threshold_[r] = kind_[r] == Kind::kSearched ? -kInfinity : kInfinity;
    }
    best_.fill(-kInfinity);
  }

  // Scores of all vectors with the panels of codewords [begin, end).
  void scan(const float* panels, int64_t begin, int64_t end) {
    const int64_t panel_floats = (a_.dim + 1) * kWidth;
    for (int64_t c = begin; c < end; c += kWidth, panels += panel_floats) {
      for (int64_t d = 0; d < a_.dim; d += kDepth) {
        const int64_t depth = std::min(kDepth, a_.dim - d);
        for (int g = 0; g < n_; g += kTile) multiply(panels, d, depth, g, c);
      }
    }
  }

  int rows() const { return rows_; }

  void close(Ranking& ranking) {
    for (int r = 0; r < n_; ++r) {
      const float* x = raw_.get() + r * pitch_;
      switch (kind_[r]) {
        case Kind::kSearched:
          drop(r);
          for (int i = 0; i < count_[r]; ++i) found_[i] = candidates_[r][i].index;
          ranking.among(first_ + r, x, found_, count_[r]);
          break;
        case Kind::kAll:
          ranking.among_all(first_ + r, x);
          break;
        case Kind::kZero:
          ranking.of_zero(first_ + r);
          break;
        case Kind::kNotFinite:
          ranking.not_finite(first_ + r);
      }
    }
  }

 private:
  friend struct BatchProbe;
  static constexpr int kMost = 2 * kMostWanted;  // candidates
  enum class Kind : uint8_t { kSearched, kAll, kZero, kNotFinite };
  struct Candidate {
    float score;
    int32_t index;
  };

  // The vector of the products, and twice the error bound of its scores.
  Kind prepare(int r) {
    const float* x = raw_.get() + r * pitch_;
    const bool l2 = a_.metric == Metric::kL2;
    float* to = packed_.get() + r / kTile * kTile * a_.dim + r % kTile;
    float square = pack(x, l2 ? book_.mean.get() : nullptr, l2 ? book_.scale : 1.0f, to);
    if (!(square < 1e30f) || (!l2 && square < 1e-30f)) {
      if (!is_finite(x, a_.dim)) return Kind::kNotFinite;
      if (l2) return Kind::kAll;
      float most = 0.0f;
      for (int64_t d = 0; d < a_.dim; ++d) most = std::max(most, std::fabs(x[d]));
      if (most == 0.0f) return Kind::kZero;
      int exponent;
      std::frexp(most, &exponent);
      square = pack(x, nullptr, power_of_two(-exponent), to);
    }
    const double dim = static_cast<double>(a_.dim), longest = book_.longest;
    const double norm = std::sqrt(square * (1.0 + dim * kRoundoff) + dim * 0x1p-126);
    const double chain = std::min<double>(dim, kDepth) + dim / kDepth + 8.0;
    double error = 1.01 * kRoundoff * chain * (norm * longest + (l2 ? 0.5 * longest * longest : 0.0));
    if (a_.metric == Metric::kCosine) error += (dim + 8.0) * 0x1p-52 * norm * book_.scale;
    error += (dim + 2.0) * 0x1p-125 * (2.0 + norm + longest);
    slack_[r] = static_cast<float>(2.002 * error);
    return Kind::kSearched;
  }

  // (x - mean) scale, kTile floats apart; its sum of squares.
  float pack(const float* x, const float* mean, float scale, float* to) {
    Vf sum = splat<Vf>(0.0f);
    alignas(64) float piece[kLanes];
    for (int64_t d = 0; d < a_.dim; d += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, a_.dim - d));
      for (int i = 0; i < kLanes; ++i)
        piece[i] = i < n ? (mean ? x[d + i] - mean[d + i] : x[d + i]) * scale : 0.0f;
      const Vf v = load(piece);
      sum = sum + v * v;
      for (int i = 0; i < n; ++i) to[(d + i) * kTile] = piece[i];
    }
    store(piece, sum);
    float total = 0.0f;
    for (float lane : piece) total += lane;
    return total;
  }

  // The terms [d, d + depth) of the scores of kTile vectors from `g` with one panel.
  void multiply(const float* panel, int64_t d, int64_t depth, int g, int64_t codeword) {
    Vf acc[kTile][kWide];
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) acc[r][v] = d == 0 ? load(panel + v * kLanes) : splat<Vf>(0.0f);
    const float* p = panel + (1 + d) * kWidth;
    const float* x = packed_.get() + g * a_.dim + d * kTile;
    for (int64_t i = 0; i < depth; ++i, p += kWidth, x += kTile) {
      Vf word[kWide];
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) word[v] = load(p + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r) {
        const Vf scalar = splat<Vf>(x[r]);
#pragma GCC unroll 2
        for (int v = 0; v < kWide; ++v) acc[r][v] = multiply_add(scalar, word[v], acc[r][v]);
      }
    }
    float* sums = sums_.get() + g * kWidth;
    if (d > 0) {
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kWide; ++v) acc[r][v] = acc[r][v] + load(sums + r * kWidth + v * kLanes);
    }
    const bool last = d + depth == a_.dim;
    Vi::Native above{};
#pragma GCC unroll 16
    for (int r = 0; last && r < kTile; ++r) {
      Vf most = acc[r][0];
      if constexpr (kWide == 2) most = select(most > acc[r][1], most, acc[r][1]);
      Nf m = most.part[0];
#pragma GCC unroll 4
      for (int i = 1; i < kParts; ++i) m = m > most.part[i] ? m : most.part[i];
      above |= m > threshold_[g + r];
    }
    if (last && lanes_of(above) == 0) return;
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) store(sums + r * kWidth + v * kLanes, acc[r][v]);
    if (last) take(sums, g, codeword);
  }

  // The scores above their thresholds, to the candidates.
  __attribute__((noinline)) void take(const float* sums, int g, int64_t codeword) {
    unsigned rows = 0;
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) rows |= (above(sums + r * kWidth, threshold_[g + r]) != 0) << r;
    for (; rows != 0; rows &= rows - 1) {
      const int r = g + __builtin_ctz(rows);
      const float* scores = sums + (r - g) * kWidth;
      // Where one is wanted, the best of them first: mostly, the others are then no candidates.
      if (a_.k == 1) threshold_[r] = std::max(threshold_[r], largest(scores) - slack_[r]);
      for (unsigned lanes = above(scores, threshold_[r]); lanes != 0; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        add(r, scores[lane], static_cast<int32_t>(codeword + lane));
      }
    }
  }

  // A bit for each of kWidth scores above the threshold.
  GENPERF_HD static unsigned above(const float* scores, float threshold) {
    constexpr int kNative = kNativeBytes / 4;
    unsigned lanes = 0;
#pragma GCC unroll 8
    for (int first = 0; first < kWidth; first += kNative) {
      Nf part;
      std::memcpy(&part, scores + first, sizeof part);
      lanes |= lanes_of(part > threshold) << first;
    }
    return lanes;
  }

  // Of kWidth scores.
  static float largest(const float* sums) {
    Vf most = load(sums);
    if constexpr (kWide == 2) {
      const Vf other = load(sums + kLanes);
      most = select(most > other, most, other);
    }
    Nf m = most.part[0];
#pragma GCC unroll 4
    for (int i = 1; i < kParts; ++i) m = m > most.part[i] ? m : most.part[i];
    float lanes[kNativeBytes / 4];
    std::memcpy(lanes, &m, sizeof m);
    for (int n = kNativeBytes / 8; n > 0; n /= 2)
      for (int i = 0; i < n; ++i) lanes[i] = lanes[i] > lanes[i + n] ? lanes[i] : lanes[i + n];
    return lanes[0];
  }

  void add(int r, float score, int32_t index) {
    if (a_.k > 1) {
      if (!(score > threshold_[r])) return;
      float* best = best_.get() + r * a_.k;  // ascending
      int64_t i = 0;
      for (; i + 1 < a_.k && best[i + 1] < score; ++i) best[i] = best[i + 1];
      if (best[i] < score) best[i] = score;
      threshold_[r] = std::max(threshold_[r], best[0] - slack_[r]);
    }
    if (count_[r] == kMost) drop(r);
    if (count_[r] == kMost) {
      kind_[r] = Kind::kAll;
      threshold_[r] = kInfinity;
    } else {
      candidates_[r][count_[r]++] = {score, index};
    }
  }

  // Candidates that later ones have excluded.
  void drop(int r) {
    const auto excluded = [&](const Candidate& c) { return !(c.score > threshold_[r]); };
    Candidate* const all = candidates_[r];
    count_[r] = static_cast<int>(std::remove_if(all, all + count_[r], excluded) - all);
  }

  const VqSearch& a_;
  const Codebook& book_;
  const int rows_;
  const int64_t pitch_;
  int64_t first_ = 0;
  int n_ = 0;
  Scratch<float> raw_, packed_, sums_;
  Scratch<float> best_;     // the k best scores of each vector
  float threshold_[kRows];  // above which a score is a candidate's
  float slack_[kRows];      // twice the error bound
  Kind kind_[kRows];
  int count_[kRows];
  Candidate candidates_[kRows][kMost];
  int32_t found_[kMost];
};

}  // namespace vq
}  // namespace GENPERF_ISA
}  // namespace genperf
