// The nearest codewords of rows that another op has at hand, inside a native call of its own.
//
//   SearchedCodebook book(codebook, Metric::kL2, n_rows);  // once
//   RowSearch search(book);                                      // one for each thread
//   search.nearest(rows, pitch, n, indices);                     // up to RowSearch::kMost rows at a time
//
// The definition, and what holds of rows and codewords that are not finite, are those of vq_nearest.h. A
// thread that calls any of these holds an instance of Subnormals (plan.h) meanwhile.
#pragma once

#include <memory>

#include "batch.h"
#include "recentre.h"

namespace genperf {
namespace GENPERF_ISA {
namespace vq {

// A codebook [K, D] of any strides and dtype, which must outlive this. `n_rows` is how many rows will be
// sought, roughly: for a few, the codebook is not packed.
class SearchedCodebook {
 public:
  SearchedCodebook(const View& codebook, Metric metric, int64_t n_rows)
      : args_(arguments(codebook, metric)),
        book_(args_),
        packs_(n_rows > Few::kMost),
        panels_(packs_ ? (args_.codewords + kWidth - 1) / kWidth * book_.panel_floats() : 0) {
    if (!packs_) {
      book_.find_usable();
      return;
    }
    book_.prepare();
    pack();
  }
  SearchedCodebook(const SearchedCodebook&) = delete;

  // Whether the search is much faster after recentre().
  bool wants_vectors() const { return packs_ && book_.wants_vectors(); }

  // `rows`: some of those that will be sought. Not while others search.
  void recentre(const float* rows, int64_t pitch, int64_t n) {
    const Rows x(rows_view(rows, n, args_.dim, pitch));
    vq::recentre(args_, x, n, std::min<int64_t>(Codebook::kSamples, n), book_);
    pack();
  }

  int64_t codewords() const { return args_.codewords; }
  int64_t dim() const { return args_.dim; }
  Metric metric() const { return args_.metric; }

 private:
  friend class RowSearch;

  static VqSearch arguments(const View& codebook, Metric metric) {
    VqSearch a{};
    a.codebook = codebook, a.metric = metric;
    a.codewords = codebook.shape[0], a.dim = codebook.shape[1], a.k = 1;
    return a;
  }

  void pack() {
    Scratch<float> words(kWidth * book_.pitch(), 0.0f);
    for (int64_t i = 0; i < args_.codewords; i += kWidth)
      book_.pack(i, panels_.get() + i / kWidth * book_.panel_floats(), words.get());
  }

  VqSearch args_;
  Codebook book_;
  bool packs_;
  Scratch<float> panels_;
};

class RowSearch {
 public:
  static constexpr int kMost = kRows;

  // Reads `book` alone, which several may share.
  explicit RowSearch(SearchedCodebook& book)
      : book_(book),
        args_(book.args_),
        ranking_(args_, book.book_),
        maxima_(book.packs_ ? Batch::maxima_floats() : 0) {
    if (book.packs_)
      batch_ = std::make_unique<Batch>(args_, book.book_);
    else
      few_ = std::make_unique<Few>(args_, book.book_);
  }
  RowSearch(const RowSearch&) = delete;

  // Of rows[i * pitch + d], i < n <= kMost, d < D: the nearest codeword, and its distance where wanted.
  void nearest(const float* rows, int64_t pitch, int n, int64_t* indices, float* distances = nullptr) {
    const int step = batch_ ? batch_->rows() : Few::kMost;
    for (int first = 0; first < n; first += step) {
      args_.n = std::min(step, n - first),
      args_.x = rows_view(rows + first * pitch, args_.n, args_.dim, pitch);
      args_.indices = indices + first, args_.distances = distances ? distances + first : nullptr;
      const Rows x(args_.x);
      if (few_) {
        few_->search(x, ranking_);
        continue;
      }
      batch_->open(x, 0);
      batch_->scan(book_.panels_.get(), 0, args_.codewords, maxima_.get());
      batch_->close(ranking_);
    }
  }

 private:
  const SearchedCodebook& book_;
  VqSearch args_;
  Ranking ranking_;
  Scratch<float> maxima_;
  std::unique_ptr<Batch> batch_;
  std::unique_ptr<Few> few_;
};

}  // namespace vq
}  // namespace GENPERF_ISA
}  // namespace genperf
