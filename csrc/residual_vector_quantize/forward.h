// All stages for one block of vectors after another: their residuals stay in the cache.
#pragma once

#include <memory>
#include <vector>

#include "direct.h"

namespace genperf {
namespace GENPERF_ISA {
namespace residual {

using Codebooks = std::vector<std::unique_ptr<vq::SearchedCodebook>>;

// The vectors of a block: many enough that a codebook, read from the second-level cache by every block, is
// read there seldom, few enough that there is work for all threads. Does not depend on the number of these.
inline int64_t rows_of_block(int64_t n, int64_t dim) {
  constexpr int64_t kAtOnce = vq::RowSearch::kMost;
  const int64_t fair = std::max<int64_t>(1, n / 8 / kAtOnce);
  return kAtOnce * std::clamp<int64_t>((1 << 15) / dim / kAtOnce, 1, std::min<int64_t>(fair, 4));
}

// Makes codebooks ready for the residuals of some of the vectors x, where this pays.
inline void recentre(const ResidualQuantizeArgs& a, const Sizes& s, const View* codebooks, const Rows& x,
                     const Codebooks& searched) {
  int64_t stages = a.n_stages;
  while (stages > 0 && !(searched[stages - 1] && searched[stages - 1]->wants_vectors())) --stages;
  if (stages == 0) return;
  constexpr int64_t kMost = DirectSearch::kMost;
  const int64_t n = std::min(kMost, s.n);
  Scratch<float> sample(n * s.pitch);
  for (int64_t j = 0; j < n; ++j) read_rows(x, j * s.n / n, 1, s.dim, sample.get() + j * s.pitch, s.pitch);
  int64_t chosen[kMost];
  Scratch<float> word(s.dim);
  for (int64_t i = 0; i < stages; ++i) {
    if (searched[i]->wants_vectors()) searched[i]->recentre(sample.get(), s.pitch, n);
    DirectSearch(codebooks[i], s.dim, n).nearest(sample.get(), n, chosen);
    for (int64_t j = 0; j < n; ++j) {
      float* const row = sample.get() + j * s.pitch;
      const float* c = Rows(codebooks[i]).row(chosen[j], word.get());
      for (int64_t d = 0; d < s.dim; ++d) row[d] -= c[d];
      round_row(row, s.dim, a.x.dtype);
    }
  }
}

class Block {
 public:
  Block(const ResidualQuantizeArgs& a, const Sizes& s, int64_t rows)
      : a_(a), s_(s), residual_(rows * s.pitch), total_(rows * s.pitch), chosen_(rows), row_(rows) {}

  // The vectors [first, first + n) of a group; `squares` [stages] are theirs alone.
  void run(int64_t group, const Codebooks& searched, int64_t first, int64_t n, double* squares) {
    const View x = select_first(a_.x, group);
    const int64_t* limits = a_.limits ? static_cast<const int64_t*>(a_.limits.data) + first : nullptr;
    int64_t* indices = static_cast<int64_t*>(a_.indices.data) + (group * s_.n + first) * s_.stages;
    for (int64_t j = 0; j < n * s_.stages; ++j) indices[j] = -1;
    read_rows(Rows(x), first, n, s_.dim, residual_.get(), s_.pitch);
    for (int64_t r = 0; r < n; ++r) {
      const bool any = a_.n_stages > 0 && (!limits || limits[r] > 0);
      for (int64_t d = 0; d < s_.pitch; ++d)
        total_[r * s_.pitch + d] = any ? residual_[r * s_.pitch + d] * 0.0f : 0.0f;  // NaN if not finite
      row_[r] = r;
    }
    for (int64_t i = 0; i < a_.n_stages; ++i) {
      if (limits) n = without_finished(limits, i, n);
      if (n == 0) break;
      const View& codebook = a_.codebooks[group * s_.stages + i];
      if (searched[i])
        search(*searched[i], n);
      else
        DirectSearch(codebook, s_.dim, n).nearest(residual_.get(), n, chosen_.get());
      const Rows codewords(codebook);
      double sum = 0.0;
      for (int64_t r = 0; r < n; ++r) {
        indices[row_[r] * s_.stages + i] = chosen_[r];
        const float* codeword = codewords.row(chosen_[r], codeword_.get());
        sum += step(residual_.get() + r * s_.pitch, total_.get() + row_[r] * s_.pitch, codeword);
      }
      squares[i] = sum;
    }
  }

  void write(int64_t group, int64_t first, int64_t n) const {
    RowsOut(select_first(a_.quantized, group)).write(first, n, total_.get(), s_.pitch);
  }

 private:
  // Leaves the residuals of the vectors that go through stage i, in order; their number.
  int64_t without_finished(const int64_t* limits, int64_t i, int64_t n) {
    int64_t kept = 0;
    for (int64_t r = 0; r < n; ++r) {
      if (limits[row_[r]] <= i) continue;
      if (kept != r)
        std::memcpy(residual_.get() + kept * s_.pitch, residual_.get() + r * s_.pitch,
                    s_.pitch * sizeof(float));
      row_[kept++] = row_[r];
    }
    return kept;
  }

  void search(vq::SearchedCodebook& codebook, int64_t n) {
    constexpr int64_t kAtOnce = vq::RowSearch::kMost;
    vq::RowSearch rows(codebook);
    for (int64_t r = 0; r < n; r += kAtOnce)
      rows.nearest(residual_.get() + r * s_.pitch, s_.pitch, static_cast<int>(std::min(kAtOnce, n - r)),
                   chosen_.get() + r);
  }

  // Takes the codeword from the residual, adds it to the total; the sum of squares of the difference.
  float step(float* residual, float* total, const float* codeword) const {
    Vf square = splat<Vf>(0.0f);
    each_block(codeword, s_.dim, [&](int64_t d, Vf c) {
      const Vf difference = load(residual + d) - c;
      square = square + difference * difference;
      store(residual + d, difference);
      store(total + d, load(total + d) + c);
    });
    round_row(residual, s_.dim, a_.x.dtype);
    return sum_of(square);
  }

  const ResidualQuantizeArgs& a_;
  const Sizes& s_;
  Scratch<float> residual_;  // of the vectors that go on, one after another
  Scratch<float> total_;
  Scratch<int64_t> chosen_, row_;  // row_: which vector of the block each residual is of
  Scratch<float> codeword_{s_.dim};
};

inline void quantize(const ResidualQuantizeArgs& a) {
  const Sizes s(a);
  const int64_t rows = rows_of_block(s.n, s.dim), blocks = (s.n + rows - 1) / rows;
  const double work = static_cast<double>(s.n) * s.dim * a.codebooks[0].shape[0] * a.n_stages;
  [[maybe_unused]] const bool large = work > 1e6;
  const bool direct = a.metric == Metric::kL2 && s.n <= DirectSearch::kMost;
  Scratch<double> squares(blocks * s.stages);
  Codebooks searched(a.n_stages);
  for (int64_t group = 0; group < s.groups; ++group) {
    squares.fill(0.0);
    const View* codebooks = a.codebooks + group * s.stages;
#pragma omp parallel if (large)
    {
      Subnormals mine;
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < (direct ? 0 : a.n_stages); ++i)
        searched[i] = std::make_unique<vq::SearchedCodebook>(codebooks[i], a.metric, s.n);
#pragma omp single
      recentre(a, s, codebooks, Rows(select_first(a.x, group)), searched);
      Block block(a, s, rows);
#pragma omp for schedule(dynamic)
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t n = std::min(rows, s.n - b * rows);
        block.run(group, searched, b * rows, n, squares.get() + b * s.stages);
        block.write(group, b * rows, n);
      }
    }
    float* out = static_cast<float*>(a.squares.data) + group * s.stages;
    for (int64_t i = 0; i < s.stages; ++i) {
      double sum = 0.0;
      for (int64_t b = 0; b < blocks; ++b) sum += squares[b * s.stages + i];
      out[i] = static_cast<float>(sum);
    }
  }
}

}  // namespace residual
}  // namespace GENPERF_ISA
}  // namespace genperf
