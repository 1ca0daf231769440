// The search for the candidates of a block of vectors.
//
// One loop does nearly all the arithmetic: the scores of kTile vectors with a panel of kWidth codewords, as
// sums of products in registers. Of these only the maxima of groups of codewords, those that share a lane of
// a native vector, are stored. Every kHeld panels the best of a vector's maxima raises its threshold, and the
// few groups that reach this are kept as candidates: no branch depends on a score but for these.
#pragma once

#include "rank.h"

namespace genperf {
namespace GENPERF_ISA {
namespace vq {

struct BatchProbe;  // of the tests

inline constexpr int kRows = 16 * 6;             // vectors of a block at most; a multiple of every kTile
inline constexpr int64_t kHeld = 32;             // panels whose maxima are held
inline constexpr int64_t kTileFloats = 1 << 15;  // of the vectors of a block
inline constexpr float kLeast = -std::numeric_limits<float>::max();

// The vectors of one block while the codebook passes by.
class Batch {
 public:
  Batch(const VqSearch& a, const Codebook& book)
      : a_(a),
        book_(book),
        rows_(static_cast<int>(std::clamp<int64_t>(kTileFloats / a.dim / kTile * kTile, 4 * kTile, kRows))),
        pitch_(book.pitch()),
        product_error_(book.product_error()),
        of_half_(a.metric == Metric::kL2 ? 0.5 * book.half_error() : 0.0),
        most_hits_(static_cast<int>(32 + 2 * a.k)),
        raw_(rows_ * pitch_),
        packed_(rows_ * a.dim, 0.0f),
        sums_(a.dim > Codebook::kDepth ? rows_ * kWidth : 0),
        best_(a.k > 1 ? rows_ * a.k : 0),
        hits_(rows_ * most_hits_) {}

  int rows() const { return rows_; }

  // Reads the vectors from `first`, and forgets what was found for others.
  void open(const Rows& x, int64_t first) {
    first_ = first;
    n_ = static_cast<int>(std::min<int64_t>(rows_, a_.n - first));
    x.read(first, n_, raw_.get(), pitch_);
    for (int r = 0; r < n_; ++r) {
      count_[r] = 0;
      threshold_[r] = kLeast;
      kind_[r] = prepare(r);
    }
    for (int r = n_; r < kRows; ++r) reach_[r] = 0.0f;
    best_.fill(-kInfinity);
  }

  // Scores of all vectors with the panels of codewords [begin, end), which stand at `panels`. `maxima` are
  // maxima_floats() of the calling thread's.
  void scan(const float* panels, int64_t begin, int64_t end, float* maxima) {
    if (book_.by_word)
      scan<true>(panels, begin, end, maxima);
    else
      scan<false>(panels, begin, end, maxima);
  }

  static constexpr int64_t maxima_floats() { return kRows * kMaximaPitch; }

  void close(Ranking& ranking) {
    for (int r = 0; r < n_; ++r) {
      ranking.rank(first_ + r, raw_.get() + r * pitch_, kind_[r], [&] {
        for (int i = 0; i < count_[r]; ++i) {
          const Hit hit = hits_[r * most_hits_ + i];
          if (hit.score >= threshold_[r]) add_group(ranking, hit.group);
        }
      });
    }
  }

 private:
  friend struct BatchProbe;
  static constexpr int64_t kMaximaPitch = kHeld * kNative + 16;  // not a power of two, for the cache's sake
  struct Hit {
    float score;  // the largest of the group
    int32_t group;
  };

  void add_group(Ranking& ranking, int32_t group) const {
    for (int j = 0; j < kWidth; j += kNative) {
      const int64_t place = static_cast<int64_t>(group / kNative) * kWidth + group % kNative + j;
      if (place >= a_.codewords) continue;
      const int64_t i = book_.word_at(place);
      if (book_.usable[i]) ranking.add(i);
    }
  }

  // The vector of the products, and the error bound of its scores, which is
  //   reach |C| + (half_error |C|^2 / 2, for distances) + tiny
  // and where not `by_word`, with the longest C.
  Kind prepare(int r) {
    const float* x = raw_.get() + r * pitch_;
    const bool l2 = a_.metric == Metric::kL2;
    float* to = packed_.get() + r / kTile * kTile * a_.dim + r % kTile;
    float square = pack(x, l2, l2 ? book_.scale : 1.0f, to);
    if (!(square < 1e30f) || (!l2 && square < 1e-30f)) {
      if (!is_finite(x, a_.dim)) return Kind::kNotFinite;
      if (l2) return Kind::kAll;
      float most = 0.0f;
      for (int64_t d = 0; d < a_.dim; ++d) most = std::max(most, std::fabs(x[d]));
      if (most == 0.0f) return Kind::kZero;
      int exponent;
      std::frexp(most, &exponent);
      square = pack(x, false, power_of_two(-exponent), to);
    }
    const double dim = static_cast<double>(a_.dim), longest = book_.longest;
    const double norm = std::sqrt(square * (1.0 + dim * kRoundoff) + dim * 0x1p-126);
    const double reach = product_error_ * norm;
    double tiny = (dim + 2.0) * 0x1p-125 * (2.0 + norm + longest);
    if (a_.metric == Metric::kCosine) tiny += (dim + 8.0) * 0x1p-52 * norm;
    reach_[r] = static_cast<float>(1.0001 * reach);
    slack_[r] =
        static_cast<float>(2.002 * (tiny + (book_.by_word ? 0.0 : (reach + of_half_ * longest) * longest)));
    return Kind::kSearched;
  }

  // x scale - centre, kTile floats apart; its sum of squares.
  float pack(const float* x, bool centred, float scale, float* to) {
    Vf sum = splat<Vf>(0.0f);
    alignas(64) float piece[kLanes];
    const float* centre = book_.centre.get();
    int64_t d = 0;
    for (; d + kLanes <= a_.dim; d += kLanes) {
      Vf v = load(x + d) * scale;
      if (centred) v = v - load(centre + d);
      sum = multiply_add(v, v, sum);
      store(piece, v);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) to[(d + i) * kTile] = piece[i];
    }
    float total = 0.0f;
    for (; d < a_.dim; ++d) {
      const float v = x[d] * scale - (centred ? centre[d] : 0.0f);
      total += v * v;
      to[d * kTile] = v;
    }
    return total + sum_of(sum);
  }

  template <bool kByWord>
  void scan(const float* panels, int64_t begin, int64_t end, float* maxima) {
    for (int64_t c = begin; c < end; c += kHeld * kWidth) {
      const int64_t count = (std::min(c + kHeld * kWidth, end) - c + kWidth - 1) / kWidth;
      if (a_.dim <= 16) {  // these panels stay in the first-level cache, and so do one tile's maxima
        for (int g = 0; g < n_; g += kTile) {
          for (int64_t i = 0; i < count; ++i)
            multiply<kByWord>(panels + i * book_.panel_floats(), 0, a_.dim, g, maxima + i * kNative);
          for (int r = g; r < std::min(g + kTile, n_); ++r)
            collect<kByWord>(r, c / kWidth, count, maxima + (r - g) * kMaximaPitch);
        }
      } else {
        for (int64_t i = 0; i < count; ++i) {
          const float* panel = panels + i * book_.panel_floats();
          for (int64_t d = 0; d < a_.dim; d += Codebook::kDepth)
            for (int g = 0; g < n_; g += kTile)
              multiply<kByWord>(panel, d, std::min(Codebook::kDepth, a_.dim - d), g,
                                maxima + g * kMaximaPitch + i * kNative);
        }
        for (int r = 0; r < n_; ++r) collect<kByWord>(r, c / kWidth, count, maxima + r * kMaximaPitch);
      }
      panels += count * book_.panel_floats();
    }
  }

  // The terms [d, d + depth) of the scores of kTile vectors from `g` with one panel, and at the end their
  // maxima, kMaximaPitch apart.
  template <bool kByWord>
  void multiply(const float* panel, int64_t d, int64_t depth, int g, float* maxima) {
    Vf acc[kTile][kWide];
    if (d == 0) {
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) {
        const Vf start = load(panel + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kTile; ++r) {
          acc[r][v] = start;
          if constexpr (kByWord)
            acc[r][v] = multiply_add(splat<Vf>(reach_[g + r]), load(panel + kWidth + v * kLanes), start);
        }
      }
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kWide; ++v) acc[r][v] = splat<Vf>(0.0f);
    }
    const float* p = panel + (kHeader + d) * kWidth;
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
    if (d + depth < a_.dim) {
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kWide; ++v) store(sums + r * kWidth + v * kLanes, acc[r][v]);
      return;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) {
      Nf most = acc[r][0].part[0];
#pragma GCC unroll 8
      for (int i = 1; i < kWide * kParts; ++i) most = max_of(most, acc[r][i / kParts].part[i % kParts]);
      store_native(maxima + r * kMaximaPitch, most);
    }
  }

  // Raises the threshold of vector r by the maxima of `count` panels from number `panel`, and keeps the
  // groups that reach it.
  template <bool kByWord>
  void collect(int r, int64_t panel, int64_t count, float* maxima) {
    if (kind_[r] != Kind::kSearched) return;
    constexpr int64_t kStep = 64 / kNative;  // vectors of 64 lanes
    for (; count % kStep != 0; ++count) store_native(maxima + count * kNative, Nf{} - kInfinity);
    const auto lower = [&](int64_t i) {
      const Nf score = load_native(maxima + i * kNative);
      if constexpr (!kByWord) return score;
      const int64_t last = book_.panel_longest.size() - 1;
      const double length = book_.panel_longest[std::min(panel + i, last)];
      return score - static_cast<float>(2.002 * (reach_[r] + of_half_ * length) * length);
    };
    if (a_.k == 1) {
      Nf best[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) best[j] = lower(j);
      for (int64_t i = 4; i < count; i += 4)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) best[j] = max_of(best[j], lower(i + j));
      const Nf all = max_of(max_of(best[0], best[1]), max_of(best[2], best[3]));
      threshold_[r] = std::max(threshold_[r], largest_lane(all) - slack_[r]);
    } else {
      for (int64_t i = 0; i < count; ++i) raise(r, lower(i));
    }
    // Mostly one group is found, whose place no branch should depend on.
    uint64_t reached[kHeld / kStep] = {}, any = 0;
    int64_t words = 0, place = 0;
    for (int64_t w = 0; w < count / kStep; ++w) {
      const float* part = maxima + w * 64;
#pragma GCC unroll 16
      for (int j = 0; j < kStep; ++j) {
        const Vi::Native reaches = load_native(part + j * kNative) >= threshold_[r];
        reached[w] |= static_cast<uint64_t>(lanes_of(reaches)) << j * kNative;
      }
      any |= reached[w];
      words += reached[w] != 0;
      place += reached[w] != 0 ? w * 64 : 0;
    }
    if (any == 0) return;
    const int32_t group = static_cast<int32_t>(panel * kNative);
    if (words == 1 && (any & (any - 1)) == 0) {
      const int32_t i = static_cast<int32_t>(place) + __builtin_ctzll(any);
      keep(r, {maxima[i], group + i});
      return;
    }
    for (int64_t w = 0; w < count / kStep; ++w)
      for (uint64_t left = reached[w]; left != 0; left &= left - 1) {
        const int32_t i = static_cast<int32_t>(w * 64) + __builtin_ctzll(left);
        keep(r, {maxima[i], group + i});
      }
  }

  // The threshold of the k-th best, by lower bounds of scores of different codewords.
  void raise(int r, Nf scores) {
    float* best = best_.get() + r * a_.k;  // ascending
    float lanes[kNative];
    store_native(lanes, scores);
    for (unsigned left = lanes_of(scores > best[0]); left != 0; left &= left - 1) {
      const float score = lanes[__builtin_ctz(left)];
      if (!(score > best[0])) continue;
      int64_t i = 0;
      for (; i + 1 < a_.k && best[i + 1] < score; ++i) best[i] = best[i + 1];
      best[i] = score;
    }
    threshold_[r] = std::max(threshold_[r], best[0] - slack_[r]);
  }

  // Where too many are left, the whole codebook is ranked.
  void keep(int r, Hit hit) {
    Hit* const all = hits_.get() + r * most_hits_;
    if (count_[r] == most_hits_) {
      int left = 0;
      for (int i = 0; i < count_[r]; ++i)
        if (all[i].score >= threshold_[r]) all[left++] = all[i];
      count_[r] = left;
    }
    if (count_[r] == most_hits_)
      kind_[r] = Kind::kAll;
    else
      all[count_[r]++] = hit;
  }

  const VqSearch& a_;
  const Codebook& book_;
  const int rows_;
  const int64_t pitch_;
  const double product_error_, of_half_;
  const int most_hits_;
  int64_t first_ = 0;
  int n_ = 0;
  Scratch<float> raw_, packed_, sums_;
  Scratch<float> best_;  // the k best scores of each vector, or lower bounds of them
  Scratch<Hit> hits_;
  float threshold_[kRows];  // which the score of a candidate reaches
  float slack_[kRows];      // what the threshold is below the best score
  float reach_[kRows];
  Kind kind_[kRows];
  int count_[kRows];
};

}  // namespace vq
}  // namespace GENPERF_ISA
}  // namespace genperf
