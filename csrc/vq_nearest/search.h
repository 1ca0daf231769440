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
      : args_(arguments(codebook, metric)), book_(args_), worth_(args_.codewords, args_.dim, metric) {
    if (n_rows <= Few::kMost) {
      book_.find_usable();
      return;
    }
    book_.prepare();
    if (!Worth::likely(n_rows, args_.codewords, args_.dim)) worth_.give_up();
    pack();
  }
  SearchedCodebook(const SearchedCodebook&) = delete;

  // Whether the search is much faster after recentre().
  bool wants_vectors() const { return floats_ && book_.wants_vectors(); }

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

  template <class Words>
  struct Packed {
    explicit Packed(const Codebook& book) : words(book), panels(words.panels() * words.panel_floats()) {
      Scratch<float> buffer(kWidth * book.pitch(), 0.0f);
      for (int64_t i = 0; i < words.panels(); ++i)
        words.pack(i * kWidth, panels.get() + i * words.panel_floats(), buffer.get());
    }

    Words words;
    Scratch<float> panels;
  };

  static VqSearch arguments(const View& codebook, Metric metric) {
    VqSearch a{};
    a.codebook = codebook, a.metric = metric;
    a.codewords = codebook.shape[0], a.dim = codebook.shape[1], a.k = 1;
    return a;
  }

  void pack() {
    floats_ = std::make_unique<Packed<FloatWords>>(book_);
    if (!worth_.holds()) return;
    bytes_ = std::make_unique<Packed<ByteWords>>(book_);
    if (!bytes_->words.precise()) worth_.give_up();
  }

  VqSearch args_;
  Codebook book_;
  Worth worth_;
  std::unique_ptr<Packed<FloatWords>> floats_;
  std::unique_ptr<Packed<ByteWords>> bytes_;
};

class RowSearch {
 public:
  static constexpr int kMost = kRows;

  // `book` may be shared.
  explicit RowSearch(SearchedCodebook& book)
      : book_(book),
        args_(book.args_),
        ranking_(args_, book.book_),
        maxima_(book.floats_ ? Batch<FloatScores>::maxima_floats() : 0) {}
  RowSearch(const RowSearch&) = delete;

  // Of rows[i * pitch + d], i < n <= kMost, d < D: the nearest codeword, and its distance where wanted.
  void nearest(const float* rows, int64_t pitch, int n, int64_t* indices, float* distances = nullptr) {
    const Rows x(rows_view(rows, n, args_.dim, pitch));
    args_.indices = indices, args_.distances = distances;
    if (!book_.floats_) return search_few(rows, pitch, n);
    if (!book_.worth_.holds()) return search_floats(x, nullptr, n);
    int64_t list[kMost], listed = 0;
    for (int first = 0; first < n;) {
      uint32_t left[kMarks] = {};
      const int count = search(bytes_, *book_.bytes_, x, nullptr, first, n, &book_.worth_, left);
      listed += list_left(left, first, list + listed);
      first += count;
    }
    search_floats(x, list, static_cast<int>(listed));
  }

 private:
  void search_few(const float* rows, int64_t pitch, int n) {
    if (!few_) few_ = std::make_unique<Few>(args_, book_.book_);
    int64_t* const indices = args_.indices;
    float* const distances = args_.distances;
    for (int first = 0; first < n; first += Few::kMost) {
      args_.n = std::min(Few::kMost, n - first);
      args_.indices = indices + first, args_.distances = distances ? distances + first : nullptr;
      few_->search(Rows(rows_view(rows + first * pitch, args_.n, args_.dim, pitch)), ranking_);
    }
  }

  void search_floats(const Rows& x, const int64_t* list, int n) {
    for (int first = 0; first < n;) first += search(floats_, *book_.floats_, x, list, first, n);
  }

  // A block of the n rows, or of those of `list`, from `first`; its size.
  template <class Scores>
  int search(std::unique_ptr<Batch<Scores>>& batch,
             const SearchedCodebook::Packed<typename Scores::Packed>& packed, const Rows& x,
             const int64_t* list, int first, int n, Worth* worth = nullptr, uint32_t* left = nullptr) {
    if (!batch) batch = std::make_unique<Batch<Scores>>(args_, packed.words);
    const int count = static_cast<int>(std::min(Batch<Scores>::rows_of(args_.dim), int64_t{n} - first));
    batch->open(x, first, count, list, worth);
    batch->scan(packed.panels.get(), 0, args_.codewords, maxima_.get());
    batch->close(ranking_, worth, left);
    return count;
  }

  SearchedCodebook& book_;
  VqSearch args_;
  Ranking ranking_;
  Scratch<float> maxima_;
  std::unique_ptr<Batch<FloatScores>> floats_;
  std::unique_ptr<Batch<ByteScores>> bytes_;
  std::unique_ptr<Few> few_;
};

}  // namespace vq
}  // namespace GENPERF_ISA
}  // namespace genperf
