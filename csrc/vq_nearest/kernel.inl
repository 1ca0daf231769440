// CPU kernels, built once per instruction set (GENPERF_ISA).
#include <memory>
#include <vector>

#include "batch.h"
#include "recentre.h"
#include "worth.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

using namespace vq;

constexpr int64_t kChunkFloats = 1 << 21;  // of the packed codewords that are held at a time
constexpr int64_t kWaiting = 48;           // blocks of vectors that wait for the next chunk of the codebook
constexpr int64_t kListed = 1 << 16;       // vectors that are searched by list at a time

// Searches n vectors, all of x or those of `list`. With `worth`, where there are too many candidates the
// vector is named by `left` instead, kMarks words for each block, and so are all where this does not pay.
template <class Scores>
void sweep(const VqSearch& a, const Rows& x, Codebook& book, typename Scores::Packed& words,
           const int64_t* list, int64_t n, Worth* worth, uint32_t* left) {
  const int64_t panels = words.panels(), panel_floats = words.panel_floats();
  const int64_t rows = Batch<Scores>::rows_of(a.dim), blocks = (n + rows - 1) / rows;
  int64_t chunk = std::clamp<int64_t>(kChunkFloats / panel_floats, 1, panels);
  if (chunk < panels && chunk > kHeld) chunk = chunk / kHeld * kHeld;
  const bool whole = chunk == panels;
  const int64_t held = whole ? blocks : std::min(blocks, kWaiting);
  std::vector<std::unique_ptr<Batch<Scores>>> waiting(whole ? 0 : held);
  Scratch<float> packed(chunk * panel_floats);
  [[maybe_unused]] const bool large = static_cast<double>(n) * a.codewords * a.dim > 1e6;
#pragma omp parallel if (large)
  {
    Subnormals mine;
    Ranking ranking(a, book);
    Scratch<float> maxima(Batch<Scores>::maxima_floats()), buffer(kWidth * book.pitch(), 0.0f);
    Scratch<float> other(whole ? 0 : panel_floats);
    std::unique_ptr<Batch<Scores>> own;
    if (whole || worth) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < panels; ++i)
        words.pack(i * kWidth, whole ? packed.get() + i * panel_floats : other.get(), buffer.get());
#pragma omp single
      if (worth && !words.precise()) worth->give_up();
    }
    for (int64_t from = 0; from < blocks; from += held) {
      for (int64_t p = 0; p < panels; p += chunk) {
        const int64_t end = std::min(p + chunk, panels);
        if (!whole) {
#pragma omp for schedule(static)
          for (int64_t i = p; i < end; ++i)
            words.pack(i * kWidth, packed.get() + (i - p) * panel_floats, buffer.get());
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = from; i < std::min(from + held, blocks); ++i) {
          std::unique_ptr<Batch<Scores>>& block = whole ? own : waiting[i - from];
          if (!block) block = std::make_unique<Batch<Scores>>(a, words);
          if (p == 0) block->open(x, i * rows, static_cast<int>(std::min(rows, n - i * rows)), list, worth);
          block->scan(packed.get(), p * kWidth, end * kWidth, maxima.get());
          if (end == panels) block->close(ranking, worth, left ? left + i * kMarks : nullptr);
        }
      }
    }
  }
}

}  // namespace

void vq_search(const VqSearch& a) {
  const Rows x(a.x);
  Subnormals subnormals;
  Codebook book(a);
  if (a.n <= Few::kMost) {
    Ranking ranking(a, book);
    Few(a, book).search(x, ranking);
    return;
  }
  book.prepare();
  // Each of these vectors costs about as much as another in the search.
  if (book.wants_vectors()) recentre(a, x, a.n, std::min<int64_t>(Codebook::kSamples, 1 + a.n / 16), book);
  FloatWords floats(book);
  if (!Worth::likely(a.n, a.codewords, a.dim))
    return sweep<FloatScores>(a, x, book, floats, nullptr, a.n, nullptr, nullptr);
  const int64_t rows = Batch<ByteScores>::rows_of(a.dim);
  Scratch<uint32_t> left((a.n + rows - 1) / rows * kMarks, 0);
  {
    Worth worth(a.codewords, a.dim, a.metric);
    ByteWords bytes(book);
    sweep<ByteScores>(a, x, book, bytes, nullptr, a.n, &worth, left.get());
  }
  Scratch<int64_t> list(std::min(a.n, kListed) + kRows);
  int64_t listed = 0;
  for (int64_t i = 0; i < a.n; i += rows) {
    listed += list_left(left.get() + i / rows * kMarks, i, list.get() + listed);
    if (listed < kListed && i + rows < a.n) continue;
    if (listed > 0) sweep<FloatScores>(a, x, book, floats, list.get(), listed, nullptr, nullptr);
    listed = 0;
  }
}

}  // namespace GENPERF_ISA
}  // namespace genperf
