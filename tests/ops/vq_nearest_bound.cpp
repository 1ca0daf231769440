// Compares the scores of the vq_nearest kernel with sums in extended precision, and fails where one is off by
// more than the bound that the kernel takes. Prints the largest error in units of the bound.
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

// The scores of all vectors with all codewords, as Batch computes them.
struct BatchProbe {
  Codebook book;
  Batch batch;
  const Rows x;
  Scratch<float> panel;

  BatchProbe(const VqSearch& a, int rows)
      : book(a), batch(a, (book.prepare(), book), rows), x(a.x), panel((a.dim + 1) * kWidth) {
    batch.open(x, 0);
  }

  bool searched(int r) const { return batch.kind_[r] == Batch::Kind::kSearched; }
  double bound(int r) const { return 0.5 * batch.slack_[r]; }

  const float* scores(int64_t codeword) {
    book.pack(codeword / kWidth * kWidth, panel.get());
    for (int r = 0; r < batch.rows_; ++r) batch.threshold_[r] = -kInfinity, batch.count_[r] = 0;
    batch.scan(panel.get(), codeword / kWidth * kWidth, codeword / kWidth * kWidth + 1);
    return batch.sums_.get() + codeword % kWidth;
  }
};

namespace {

View view(float* data, int64_t rows, int64_t columns) {
  View v;
  v.data = data, v.ndim = 2;
  v.shape[0] = rows, v.shape[1] = columns, v.stride[0] = columns, v.stride[1] = 1;
  return v;
}

// S of the definition, from the numbers as given, with the kernel's mean and scale.
long double exact_score(const BatchProbe& p, Metric metric, const float* x, const float* c, int64_t dim) {
  long double length = 1.0L, score = 0.0L, square = 0.0L;
  if (metric == Metric::kCosine) {
    for (int64_t d = 0; d < dim; ++d) square += static_cast<long double>(c[d]) * c[d];
    length = sqrtl(square);
  }
  square = 0.0L;
  const long double scale = p.book.scale;
  for (int64_t d = 0; d < dim; ++d) {
    const long double m = p.book.mean[d], word = scale * (c[d] / length - m);
    score += word * (metric == Metric::kL2 ? scale * (x[d] - m) : x[d]);
    square += word * word;
  }
  return metric == Metric::kL2 ? score - square / 2 : score;
}

// Kinds of data; in the last all products are of one size.
constexpr const char* kKinds[] = {"normal", "offset", "small codebook", "far codeword", "all alike"};

float value(int kind, bool word, int64_t d, std::mt19937& random) {
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
  }
  return v;
}

}  // namespace
}  // namespace vq
}  // namespace avx2
}  // namespace genperf

int main() {
  using namespace genperf;
  using namespace genperf::avx2::vq;
  int failures = 0;
  for (int kind = 0; kind < 5; ++kind)
    for (const Metric metric : {Metric::kL2, Metric::kCosine, Metric::kDot}) {
      double worst = 0.0;
      long pairs = 0;
      for (const int64_t dim : {1, 2, 3, 8, 31, 64, 255, 256, 257, 600, 1024, 4096}) {
        constexpr int64_t kVectors = 24, kCodewords = 64;
        std::mt19937 random(static_cast<unsigned>(dim * 10 + kind));
        Scratch<float> x(kVectors * dim), c(kCodewords * dim);
        for (int64_t i = 0; i < kVectors * dim; ++i) x[i] = value(kind, false, i % dim, random);
        for (int64_t i = 0; i < kCodewords * dim; ++i) c[i] = value(kind, true, i % dim, random);
        VqSearch a{};
        a.x = view(x.get(), kVectors, dim), a.codebook = view(c.get(), kCodewords, dim);
        a.n = kVectors, a.codewords = kCodewords, a.dim = dim, a.k = 1, a.metric = metric;
        BatchProbe probe(a, kVectors);
        for (int64_t k = 0; k < kCodewords; ++k) {
          const float* scores = probe.scores(k);
          for (int r = 0; r < kVectors; ++r) {
            if (!probe.searched(r)) continue;
            const long double exact = exact_score(probe, metric, &x[r * dim], &c[k * dim], dim);
            const double off = static_cast<double>(fabsl(scores[r * kWidth] - exact)) / probe.bound(r);
            worst = off > worst ? off : worst;
            ++pairs;
          }
        }
      }
      std::printf("%s, metric %d: %ld pairs, largest error %.3g of the bound\n", kKinds[kind],
                  static_cast<int>(metric), pairs, worst);
      failures += worst > 1.0 || pairs == 0;
    }
  return failures;
}
