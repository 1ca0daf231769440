// CPU kernels, built once per instruction set (GENPERF_ISA).
#include <memory>
#include <vector>

#include "batch.h"
#include "recentre.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

constexpr int64_t kChunkFloats = 1 << 21;  // of the packed codewords that are held at a time
constexpr int64_t kWaiting = 48;           // blocks of vectors that wait for the next chunk of the codebook

}  // namespace

void vq_search(const VqSearch& a) {
  using namespace vq;
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
  const int64_t panels = (a.codewords + kWidth - 1) / kWidth, panel_floats = book.panel_floats();
  const int64_t rows = Batch(a, book).rows(), blocks = (a.n + rows - 1) / rows;
  int64_t chunk = std::clamp<int64_t>(kChunkFloats / panel_floats, 1, panels);
  if (chunk < panels && chunk > kHeld) chunk = chunk / kHeld * kHeld;
  const int64_t held = chunk < panels ? std::min(blocks, kWaiting) : blocks;
  std::vector<std::unique_ptr<Batch>> waiting(chunk < panels ? held : 0);
  Scratch<float> packed(chunk * panel_floats);
  [[maybe_unused]] const bool large = static_cast<double>(a.n) * a.codewords * a.dim > 1e6;
#pragma omp parallel if (large)
  {
    Subnormals mine;
    Ranking ranking(a, book);
    Scratch<float> maxima(Batch::maxima_floats()), words(kWidth * book.pitch(), 0.0f);
    std::unique_ptr<Batch> own;
    for (int64_t from = 0; from < blocks; from += held) {
      for (int64_t p = 0; p < panels; p += chunk) {
        const int64_t end = std::min(p + chunk, panels);
        if (from == 0 || chunk < panels) {
#pragma omp for schedule(static)
          for (int64_t i = p; i < end; ++i)
            book.pack(i * kWidth, packed.get() + (i - p) * panel_floats, words.get());
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = from; i < std::min(from + held, blocks); ++i) {
          std::unique_ptr<Batch>& block = waiting.empty() ? own : waiting[i - from];
          if (!block) block = std::make_unique<Batch>(a, book);
          if (p == 0) block->open(x, i * rows);
          block->scan(packed.get(), p * kWidth, end * kWidth, maxima.get());
          if (end == panels) block->close(ranking);
        }
      }
    }
  }
}

}  // namespace GENPERF_ISA
}  // namespace genperf
