// Compares the scores of the vq_nearest kernel with sums in extended precision, and fails where one is off by
// more than the bound that the kernel takes. Prints the largest error in units of the bound, and how many
// candidates a vector has.
#define GENPERF_ISA avx2
// clang-format off: cpu.cpp opens the namespace avx2 again, which has to be inline by then
#include "vq_nearest/kernel.inl"
#include "vq_nearest/cpu.cpp"
// clang-format on

#include <cstdio>
#include <random>

namespace genperf {

namespace baseline {
void vq_search(const VqSearch&) {}
}  // namespace baseline
namespace avx512 {
void vq_search(const VqSearch&) {}
}  // namespace avx512
Isa current_isa() { return Isa::avx2; }

namespace avx2 {
namespace vq {

// A codebook ready for the vectors.
struct Prepared : Codebook {
  explicit Prepared(const VqSearch& a) : Codebook(a) {
    prepare();
    if (wants_vectors()) vq::recentre(a, Rows(a.x), a.n, 5, *this);
  }
};

// The scores of all vectors with all codewords, as Batch computes them.
struct BatchProbe {
  template <class Scores>
  struct Of;
};

template <class Scores>
struct BatchProbe::Of {
  Prepared book;
  typename Scores::Packed words;
  Scratch<float> panels, buffer;
  bool packed;
  Batch<Scores> batch;
  Scratch<float> panel, maxima;

  explicit Of(const VqSearch& a)
      : book(a),
        words(book),
        panels(words.panels() * words.panel_floats()),
        buffer(kWidth * book.pitch(), 0.0f),
        packed((pack(), true)),
        batch(a, words),
        panel(words.panel_floats()),
        maxima(Batch<Scores>::maxima_floats()) {
    batch.open(Rows(a.x), 0, static_cast<int>(a.n));
  }

  void pack() {
    for (int64_t i = 0; i < words.panels(); ++i)
      words.pack(i * kWidth, panels.get() + i * words.panel_floats(), buffer.get());
  }

  bool searched(int r) const { return batch.kind_[r] == Kind::kSearched; }

  // How far the computed score of vector r is from the middle of what its bound allows, and this bound.
  double middle(int r, int64_t codeword) const { return book.by_word ? own_bound(r, codeword) : 0.0; }
  double bound(int r, int64_t codeword) const {
    return batch.slack_[r] / 2.002 + (book.by_word ? own_bound(r, codeword) : 0.0);
  }

  // To score[r]. In the panel every other codeword of the group is taken out.
  void scores(int64_t codeword, float* score) {
    int64_t place = codeword;
    if (book.by_word)
      place = std::find(&book.order[0], &book.order[book.codewords], codeword) - &book.order[0];
    const int64_t begin = place / kWidth * kWidth, lane = place - begin;
    words.pack(begin, panel.get(), buffer.get());
    for (int i = 0; i < kWidth; ++i)
      if (i != lane) panel[i] = -kInfinity;
    for (int r = 0; r < batch.n_; ++r) batch.threshold_[r] = kLeast, batch.count_[r] = 0;
    batch.scan(panel.get(), begin, begin + 1, maxima.get());
    const bool by_tile = book.dim <= 16;  // and then a tile's maxima are soon written over
    for (int r = 0; r < batch.n_; ++r) {
      if (by_tile && batch.count_[r] != 1) continue;
      score[r] =
          by_tile ? batch.hits_[r * batch.most_hits_].score : maxima[r * kMaximaPitch + lane % kNative];
    }
  }

  // Of all vectors; the whole codebook where it is ranked.
  int64_t candidates(const VqSearch& a) {
    batch.open(Rows(a.x), 0, static_cast<int>(a.n));
    batch.scan(panels.get(), 0, words.panels() * kWidth, maxima.get());
    int64_t total = 0;
    for (int r = 0; r < batch.n_; ++r) {
      if (!searched(r)) total += book.codewords;
      for (int i = 0; searched(r) && i < batch.count_[r]; ++i)
        total += batch.hits_[r * batch.most_hits_ + i].score >= batch.threshold_[r] ? kWidth / kNative : 0;
    }
    return total;
  }

  double least_score(int r, long double value) const {
    return batch.least_score(r, static_cast<double>(value));
  }

 private:
  double own_bound(int r, int64_t codeword) const {
    const double length = std::sqrt(2.0 * book.half[codeword]);
    return (batch.reach_[r] + batch.of_half_ * length) * length;
  }
};

// What orders the codewords, within the bounds that Few computes.
struct FewProbe {
  Codebook book;
  Few few;

  explicit FewProbe(const VqSearch& a) : book(a), few(a, book) {
    Rows(a.x).read(0, static_cast<int>(a.n), few.x_.get(), few.pitch_);
    for (int r = 0; r < a.n; ++r) few.prepare(r);
  }

  bool searched(int r) const { return few.kind_[r] == Kind::kSearched; }

  // As four pairs, two, or one of a vector with a codeword, in turn.
  Few::Bounds bounds(const VqSearch& a, int r, int64_t codeword) {
    return a.metric == Metric::kL2 ? bounds<true>(r, codeword) : bounds<false>(r, codeword);
  }

 private:
  template <bool kL2>
  Few::Bounds bounds(int r, int64_t codeword) {
    for (int j = 0; j < Few::kMost; ++j) few.count_[j] = 0, few.limit_[j] = kInfinity;
    few.best_.fill(kInfinity);
    const float* word[4];
    few.read(codeword, 1, word);
    const Four square = few.squares(word);
    if (codeword % 3 == 0)
      few.compare<kL2, 4, 1>(std::min(r, Few::kMost - 4), codeword, word, square);
    else if (codeword % 3 == 1)
      few.compare<kL2, 2, 2>(std::min(r, Few::kMost - 2), codeword, word, square);
    else
      few.compare<kL2, 1, 4>(r, codeword, word, square);
    return {few.hits_[r * few.most_hits()].lower, few.threshold(r)};
  }
};

namespace {

View view(float* data, int64_t rows, int64_t columns) {
  View v;
  v.data = data, v.ndim = 2;
  v.shape[0] = rows, v.shape[1] = columns, v.stride[0] = columns, v.stride[1] = 1;
  return v;
}

// S of the definition, from the numbers as given, with the kernel's centre and scale.
long double exact_score(const Codebook& book, Metric metric, const float* x, const float* c, int64_t dim) {
  long double length = 1.0L, score = 0.0L, square = 0.0L;
  if (metric == Metric::kCosine) {
    for (int64_t d = 0; d < dim; ++d) square += static_cast<long double>(c[d]) * c[d];
    length = sqrtl(square);
  }
  square = 0.0L;
  const long double scale = book.scale;
  for (int64_t d = 0; d < dim; ++d) {
    const long double m = book.centre[d], word = scale * c[d] / length - m;
    score += word * (metric == Metric::kL2 ? scale * x[d] - m : x[d]);
    square += word * word;
  }
  return metric == Metric::kL2 ? score - square / 2 : score;
}

// What the codewords are ordered by.
long double exact_value(Metric metric, const float* x, const float* c, int64_t dim) {
  long double distance = 0.0L, dot = 0.0L, square = 0.0L;
  for (int64_t d = 0; d < dim; ++d) {
    const long double difference = static_cast<long double>(x[d]) - c[d];
    distance += difference * difference;
    dot += static_cast<long double>(x[d]) * c[d];
    square += static_cast<long double>(c[d]) * c[d];
  }
  return metric == Metric::kL2 ? distance : metric == Metric::kDot ? -dot : -dot / sqrtl(square);
}

// Kinds of data; in the last all products are of one size.
constexpr const char* kKinds[] = {"normal",    "offset",       "small codebook", "far codeword",
                                  "all alike", "five decades", "mostly far"};

// Element d of row i.
float value(int kind, bool word, int64_t i, int64_t d, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const float v = normal(random);
  switch (kind) {
    case 1:
      return v + 100.0f;
    case 2:
      return word ? 1e-4f * v : v;
    case 3:
      return word && random() % 50 == 0 ? 1e4f * v : v;
    case 4:
      return (word && random() % 2 ? -1.0f : 1.0f) * (1.0f + static_cast<float>(d % 7 + 1) * 0x1p-23f);
    case 5:
      return word ? v * std::pow(10.0f, static_cast<float>(i * 29 % 64) / 12.8f) : v;
    case 6:
      return word && i % 4 != 1 ? v * std::pow(10.0f, 4.0f + static_cast<float>(i * 29 % 64) / 21.3f) : v;
  }
  return v;
}

// The largest error of the scores in units of its bound, and how many candidates there are.
struct Tally {
  double worst = 0.0;
  long pairs = 0, vectors = 0, candidates = 0;
  bool reached_too_high = false;

  template <class Scores>
  void add(const VqSearch& a, const float* x, const float* c) {
    BatchProbe::Of<Scores> probe(a);
    if (!probe.words.precise()) return;
    vectors += a.n, candidates += probe.candidates(a);
    Scratch<float> scores(a.n);
    for (int64_t k = 0; k < a.codewords; ++k) {
      if (!probe.book.usable[k]) continue;
      probe.scores(k, scores.get());
      for (int r = 0; r < a.n; ++r) {
        if (!probe.searched(r)) continue;
        const float *row = x + r * a.dim, *word = c + k * a.dim;
        const long double exact = exact_score(probe.book, a.metric, row, word, a.dim);
        const double off = static_cast<double>(fabsl(scores[r] - probe.middle(r, k) - exact));
        worst = std::max(worst, off / probe.bound(r, k));
        if (Scores::kRough)
          reached_too_high |= probe.least_score(r, exact_value(a.metric, row, word, a.dim)) > exact;
        ++pairs;
      }
    }
  }
};

}  // namespace
}  // namespace vq
}  // namespace avx2
}  // namespace genperf

int main() {
  using namespace genperf;
  using namespace genperf::avx2::vq;
  int failures = 0;
  for (int kind = 0; kind < 7; ++kind)
    for (const Metric metric : {Metric::kL2, Metric::kCosine, Metric::kDot}) {
      Tally floats, bytes;
      double worst_of_few = 0.0;
      for (const int64_t dim : {1, 2, 3, 8, 31, 64, 255, 256, 257, 600, 1024, 4096}) {
        constexpr int64_t kVectors = 24, kCodewords = 64;
        std::mt19937 random(static_cast<unsigned>(dim * 10 + kind));
        Scratch<float> x(kVectors * dim), c(kCodewords * dim);
        for (int64_t i = 0; i < kVectors * dim; ++i) x[i] = value(kind, false, i / dim, i % dim, random);
        for (int64_t i = 0; i < kCodewords * dim; ++i) c[i] = value(kind, true, i / dim, i % dim, random);
        VqSearch a{};
        a.x = view(x.get(), kVectors, dim), a.codebook = view(c.get(), kCodewords, dim);
        a.n = kVectors, a.codewords = kCodewords, a.dim = dim, a.k = 1, a.metric = metric;
        floats.add<FloatScores>(a, x.get(), c.get());
        bytes.add<ByteScores>(a, x.get(), c.get());
        const Prepared book(a);
        a.n = Few::kMost;
        FewProbe few(a);
        for (int64_t k = 0; k < kCodewords; ++k) {
          if (!book.usable[k]) continue;
          for (int r = 0; r < Few::kMost; ++r) {
            if (!few.searched(r)) continue;
            const long double exact = exact_value(metric, &x[r * dim], &c[k * dim], dim);
            const auto [lower, upper] = few.bounds(a, r, k);
            const long double middle = (static_cast<long double>(lower) + upper) / 2;
            const double off = static_cast<double>(fabsl(exact - middle) / (upper - middle));
            worst_of_few = std::max(worst_of_few, off);
          }
        }
      }
      std::printf(
          "%s, metric %d: %ld and %ld pairs, largest error %.3g of the bound, of bytes %.3g, of few %.3g, "
          "%.3g "
          "candidates, of bytes %.3g%s\n",
          kKinds[kind], static_cast<int>(metric), floats.pairs, bytes.pairs, floats.worst, bytes.worst,
          worst_of_few, static_cast<double>(floats.candidates) / floats.vectors,
          static_cast<double>(bytes.candidates) / std::max(1L, bytes.vectors),
          bytes.reached_too_high ? ", a score reached too high" : "");
      for (const Tally& tally : {floats, bytes}) failures += !(tally.worst <= 1.0) || tally.reached_too_high;
      failures += !(worst_of_few <= 1.0) || floats.pairs == 0;
    }
  return failures;
}
