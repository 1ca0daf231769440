// The search for the candidates of a block of vectors.
//
// One loop does nearly all the arithmetic: the scores of kTile vectors with a panel of kWidth codewords, as
// sums of products in registers (floats.h, bytes.h). Of these only the maxima of groups of codewords, those
// that share a lane of a native vector, are stored. Every kHeld panels the best of a vector's maxima raises
// its threshold, and the few groups that reach this are kept as candidates: no branch depends on a score but
// for these.
#pragma once

#include "bytes.h"
#include "floats.h"
#include "rank.h"
#include "worth.h"

namespace genperf {
namespace GENPERF_ISA {
namespace vq {

struct BatchProbe;  // of the tests

inline constexpr int kRows = 16 * 6;           // vectors of a block at most; a multiple of every kTile
inline constexpr int64_t kMarks = kRows / 32;  // words of a bit for each vector of a block
inline constexpr float kLeast = -std::numeric_limits<float>::max();

// To `list`, the vectors of the block from `first` that `left` names; how many.
inline int64_t list_left(const uint32_t* left, int64_t first, int64_t* list) {
  int64_t n = 0;
  for (int64_t w = 0; w < kMarks; ++w)
    for (uint32_t bits = left[w]; bits != 0; bits &= bits - 1)
      list[n++] = first + 32 * w + __builtin_ctz(bits);
  return n;
}

// The vectors of one block while the codebook passes by.
template <class Scores>
class Batch {
 public:
  using Packed = typename Scores::Packed;

  Batch(const VqSearch& a, const Packed& words)
      : a_(a),
        words_(words),
        book_(words.book),
        rows_(static_cast<int>(rows_of(a.dim))),
        pitch_(book_.pitch()),
        of_half_(a.metric == Metric::kL2 ? 0.5 * book_.half_error() : 0.0),
        most_hits_(static_cast<int>(Scores::kMostHits + 2 * a.k)),
        scores_(words, rows_),
        raw_(rows_ * pitch_),
        best_(a.k > 1 ? rows_ * a.k : 0),
        hits_(rows_ * most_hits_) {
    if (Scores::kRough && a.metric != Metric::kL2) centre_norm_ = std::sqrt(with_centre(book_.centre.get()));
  }

  static int64_t rows_of(int64_t dim) {
    return std::clamp<int64_t>(Scores::rows(dim) / kTile * kTile, 4 * kTile, kRows);
  }

  // Reads the vectors [first, first + n), or those that are named in `list` at these places, and forgets what
  // was found for others. Where `worth` does not hold, they are left.
  void open(const Rows& x, int64_t first, int n, const int64_t* list = nullptr,
            const Worth* worth = nullptr) {
    size_ = n, first_ = first, list_ = list ? list + first : nullptr;
    n_ = worth && !worth->holds() ? 0 : n;
    if (n_ == 0) return;
    for (int r = 0; r < n;) {
      int end = list ? r + 1 : n;
      while (end < n && row(end) == row(end - 1) + 1) ++end;
      x.read(row(r), end - r, raw_.get() + r * pitch_, pitch_);
      r = end;
    }
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

  // Ranks the candidates of each vector. Where there were too many, the whole codebook is ranked, or, with
  // `worth`, the vector is named by `left`, a bit for each.
  void close(Ranking& ranking, Worth* worth = nullptr, uint32_t* left = nullptr) {
    for (int r = n_; r < size_; ++r) left[r / 32] |= 1u << r % 32;
    int64_t ranked = 0, passed = 0;
    for (int r = 0; r < n_; ++r) {
      if (worth && kind_[r] == Kind::kAll)
        left[r / 32] |= 1u << r % 32, ++passed;
      else
        ranking.rank(row(r), raw_.get() + r * pitch_, kind_[r], [&] { ranked += rank(r, ranking); });
    }
    if (worth && n_ > 0) worth->count(n_, ranked, passed);
  }

 private:
  friend struct BatchProbe;
  int64_t row(int r) const { return list_ ? list_[r] : first_ + r; }

  struct Hit {
    float score;  // the largest of the group
    int32_t group;
  };

  // The number of codewords.
  int64_t rank(int r, Ranking& ranking) {
    Hit* const hits = hits_.get() + r * most_hits_;
    const int count = count_[r];
    if (Scores::kRough && a_.k == 1)
      for (int i = 1; i < count; ++i)
        if (hits[i].score > hits[0].score) std::swap(hits[0], hits[i]);
    int64_t ranked = 0;
    for (int i = 0; i < count; ++i) {
      if (!(hits[i].score >= threshold_[r])) continue;
      add_group(ranking, hits[i].group);
      ranked += kWidth / kNative;
      if (Scores::kRough && a_.k == 1) raise_to(r, ranking.reached());
    }
    return ranked;
  }

  void add_group(Ranking& ranking, int32_t group) const {
    for (int j = 0; j < kWidth; j += kNative) {
      const int64_t place = static_cast<int64_t>(group / kNative) * kWidth + group % kNative + j;
      if (place >= a_.codewords) continue;
      const int64_t i = book_.word_at(place);
      if (book_.usable[i]) ranking.add(i);
    }
  }

  // At most the score of a codeword whose value (rank.h) is at most `value`.
  double least_score(int r, double value) const {
    const double score = middle_[r] - factor_[r] * value;
    return score - 1e-7 * std::fabs(score);
  }

  // Raises the threshold of vector r, as there is such a codeword: its score is known without the error of
  // the others'.
  void raise_to(int r, double value) {
    const double score = least_score(r, value), threshold = score - 1e-7 * std::fabs(score) - 0.5 * slack_[r];
    threshold_[r] = std::max(threshold_[r], static_cast<float>(threshold));
  }

  // The vector of the products, and the error bound of its scores, which is
  //   reach |C| + (half_error |C|^2 / 2, for distances) + tiny
  // and where not `by_word`, with the longest C.
  Kind prepare(int r) {
    const float* x = raw_.get() + r * pitch_;
    const bool l2 = a_.metric == Metric::kL2;
    float scale = l2 ? book_.scale : 1.0f;
    float square = scores_.place(r, x, l2, scale);
    if (!(square < 1e30f) || (!l2 && square < 1e-30f)) {
      if (!is_finite(x, a_.dim)) return Kind::kNotFinite;
      if (l2) return Kind::kAll;
      float most = 0.0f;
      for (int64_t d = 0; d < a_.dim; ++d) most = std::max(most, std::fabs(x[d]));
      if (most == 0.0f) return Kind::kZero;
      int exponent;
      std::frexp(most, &exponent);
      scale = power_of_two(-exponent);
      square = scores_.place(r, x, false, scale);
    }
    const double dim = static_cast<double>(a_.dim), longest = book_.longest;
    const double norm = words_.upper_norm(square), reach = scores_.reach(r, norm);
    double tiny = (dim + 2.0) * 0x1p-125 * (2.0 + norm + longest);
    if (a_.metric == Metric::kCosine) tiny += (dim + 8.0) * 0x1p-52 * norm;
    reach_[r] = static_cast<float>(1.0001 * reach);
    slack_[r] =
        static_cast<float>(2.002 * (tiny + (book_.by_word ? 0.0 : (reach + of_half_ * longest) * longest)));
    if (Scores::kRough) {
      // A codeword's score is middle - factor times its value.
      if (l2) {
        middle_[r] = 0.5 * (square * (1.0 - 1.01 * (dim + 8.0) * kRoundoff) - dim * 0x1p-126);
        factor_[r] = 0.5 * scale * scale;
      } else {
        middle_[r] = -scale * with_centre(x) - (dim + 8.0) * 0x1p-52 * norm * centre_norm_;
        factor_[r] = a_.metric == Metric::kDot ? static_cast<double>(scale) * book_.scale : scale;
      }
    }
    return Kind::kSearched;
  }

  // Of x and the centre, the inner product.
  double with_centre(const float* x) const {
    const float* centre = book_.centre.get();
    Vd sum = splat<Vd>(0.0);
    int64_t d = 0;
    for (; d + 8 <= a_.dim; d += 8) sum = sum + load_doubles(x + d) * load_doubles(centre + d);
    double total = sum_of(sum);
    for (; d < a_.dim; ++d) total += static_cast<double>(x[d]) * centre[d];
    return total;
  }

  template <bool kByWord>
  void scan(const float* panels, int64_t begin, int64_t end, float* maxima) {
    const int64_t step = words_.panel_floats();
    for (int64_t c = begin; c < end; c += kHeld * kWidth) {
      const int64_t count = (std::min(c + kHeld * kWidth, end) - c + kWidth - 1) / kWidth;
      if (a_.dim <= 16) {  // these panels stay in the first-level cache, and so do one tile's maxima
        for (int g = 0; g < n_; g += kTile) {
          for (int64_t i = 0; i < count; ++i)
            scores_.template score<kByWord>(panels + i * step, g, g + kTile, reach_, maxima + i * kNative);
          for (int r = g; r < std::min(g + kTile, n_); ++r)
            collect<kByWord>(r, c / kWidth, count, maxima + (r - g) * kMaximaPitch);
        }
      } else {
        for (int64_t i = 0; i < count; ++i)
          scores_.template score<kByWord>(panels + i * step, 0, n_, reach_, maxima + i * kNative);
        for (int r = 0; r < n_; ++r) collect<kByWord>(r, c / kWidth, count, maxima + r * kMaximaPitch);
      }
      panels += count * step;
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
      const double length = words_.longest(panel + i);
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
  const Packed& words_;
  const Codebook& book_;
  const int rows_;
  const int64_t pitch_;
  const double of_half_;
  const int most_hits_;
  Scores scores_;
  double centre_norm_ = 0.0;
  int64_t first_ = 0;
  const int64_t* list_ = nullptr;
  int size_ = 0, n_ = 0;  // of the block; of those, searched
  Scratch<float> raw_;
  Scratch<float> best_;  // the k best scores of each vector, or lower bounds of them
  Scratch<Hit> hits_;
  float threshold_[kRows];  // which the score of a candidate reaches
  float slack_[kRows];      // what the threshold is below the best score
  float reach_[kRows];
  double middle_[kRows], factor_[kRows];
  Kind kind_[kRows];
  int count_[kRows];
};

}  // namespace vq
}  // namespace GENPERF_ISA
}  // namespace genperf
