// CPU kernels, built once per instruction set (GENPERF_ISA).
#include <memory>
#include <vector>

#include "batch.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

constexpr int64_t kTileFloats = 1 << 15;   // of the vectors of a block
constexpr int64_t kChunkFloats = 1 << 21;  // of the packed codewords that are held at a time
constexpr int64_t kHeldBlocks = 48;        // blocks of vectors that wait for the next chunk of the codebook
}  // namespace

void vq_search(const VqSearch& a) {
  using namespace vq;
  const Rows x(a.x);
  Subnormals subnormals;
  Codebook book(a);
  if (a.n <= kFewVectors || book.n_usable == 0) {
    Ranking(a, book).among_all_of(x);
    return;
  }
  if (a.k == 1) book.leave_out_duplicates();
  book.prepare();
  const int64_t panels = (a.codewords + kWidth - 1) / kWidth, panel_floats = (a.dim + 1) * kWidth;
  const int64_t chunk = std::clamp<int64_t>(kChunkFloats / panel_floats, 1, panels);
  const int rows =
      static_cast<int>(std::clamp<int64_t>(kTileFloats / a.dim / kTile * kTile, 4 * kTile, kRows));
  const int64_t blocks = (a.n + rows - 1) / rows,
                held = chunk < panels ? std::min(blocks, kHeldBlocks) : blocks;
  std::vector<std::unique_ptr<Batch>> waiting(chunk < panels ? held : 0);
  Scratch<float> packed(chunk * panel_floats);
  [[maybe_unused]] const bool large = static_cast<double>(a.n) * a.codewords * a.dim > 1e6;
#pragma omp parallel if (large)
  {
    Subnormals mine;
    Ranking ranking(a, book);
    std::unique_ptr<Batch> own;
    for (int64_t from = 0; from < blocks; from += held) {
      for (int64_t p = 0; p < panels; p += chunk) {
        const int64_t end = std::min(p + chunk, panels);
        if (from == 0 || chunk < panels) {
#pragma omp for schedule(static)
          for (int64_t i = p; i < end; ++i) book.pack(i * kWidth, packed.get() + (i - p) * panel_floats);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = from; i < std::min(from + held, blocks); ++i) {
          std::unique_ptr<Batch>& block = waiting.empty() ? own : waiting[i - from];
          if (!block) block = std::make_unique<Batch>(a, book, rows);
          if (p == 0) block->open(x, i * rows);
          block->scan(packed.get(), p * kWidth, end * kWidth);
          if (end == panels) block->close(ranking);
        }
      }
    }
  }
}

}  // namespace GENPERF_ISA
}  // namespace genperf
