// Sums of vectors by their codeword, in a fixed order for any number of threads and without sorting.
//
// The vectors are cut into a few parts, whose number follows from N and K. Within a part every vector is
// added to its codeword's sum in turn, and the sums of the parts are added in turn. Threads take a part, or
// some columns of a part, which changes no sum.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../common/scratch.h"
#include "../common/subview.h"
#include "../vq_nearest/rows.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

// to += x, both of n floats.
GENPERF_HD void accumulate(const float* __restrict x, int64_t n, float* __restrict to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(to + i) + load(x + i));
  for (; i < n; ++i) to[i] += x[i];
}

// The vectors as they are, for what is summed by `segmented_sums`: called once for some columns of a head,
// then for each vector of it.
struct AsTheyAre {
  struct Columns {
    const float* operator()(int64_t, int64_t, const float* x, float*) const { return x; }
  };
  Columns operator()(int64_t, int64_t, int64_t) const { return {}; }
};

class Segments {
 public:
  Segments(int64_t heads, int64_t n, int64_t codewords, int64_t dim)
      : heads_(heads),
        n_(n),
        codewords_(codewords),
        dim_(dim),
        parts_(clamped(n / (kVectorsPerCodeword * codewords), kParts)),
        of_part_((n + parts_ - 1) / parts_),
        threads_(clamped(heads * n * dim / kOfThread, team_size())),
        slices_(clamped(2 * threads_ / (parts_ * heads), (dim + kLeastWidth - 1) / kLeastWidth)),
        width_(((dim + slices_ - 1) / slices_ + kLeastWidth - 1) / kLeastWidth * kLeastWidth),
        others_(heads * (parts_ - 1) * codewords * dim) {}

  // Of x [heads, *, D], or what `rows` makes of it, with codes [heads, N] of which -1 is none: sums
  // [heads, K, D] and, unless null, counts [heads, K]. `rows(head, first, n)` is a function of those columns
  // from (vector, code, x, buffer) to n floats, which may stand in the buffer.
  template <class Rows>
  void sum(const View& x, const int32_t* codes, const Rows& rows, float* sums, float* counts) {
    const int64_t units = heads_ * parts_ * slices_;
    Scratch<int32_t> numbers(counts ? heads_ * parts_ * codewords_ : 0);
#pragma omp parallel num_threads(static_cast<int>(threads_)) if (threads_ > 1)
    {
#pragma omp for schedule(dynamic)
      for (int64_t u = 0; u < units; ++u) {
        const int64_t slice = u % slices_, part = u / slices_ % parts_, head = u / slices_ / parts_;
        const bool counting = counts && slice == 0;
        add(select_first(x, head), codes + head * n_, part, slice * width_, rows, head,
            of_part(sums, head, part),
            counting ? numbers.get() + (head * parts_ + part) * codewords_ : nullptr);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < heads_ * codewords_; ++i) {
        const int64_t head = i / codewords_, k = i % codewords_;
        for (int64_t p = 1; p < parts_; ++p)
          accumulate(of_part(sums, head, p) + k * dim_, dim_, sums + i * dim_);
        if (!counts) continue;
        int64_t count = 0;
        for (int64_t p = 0; p < parts_; ++p) count += numbers[(head * parts_ + p) * codewords_ + k];
        counts[i] = static_cast<float>(count);
      }
    }
  }

 private:
  static constexpr int64_t kParts = 8, kVectorsPerCodeword = 8, kLeastWidth = 16;
  static constexpr int64_t kOfThread = 1 << 18;  // numbers, below which a thread costs more than it saves

  static int64_t clamped(int64_t value, int64_t most) { return value < 1 ? 1 : value < most ? value : most; }

  static int team_size() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
  }

  float* of_part(float* sums, int64_t head, int64_t part) const {
    const int64_t size = codewords_ * dim_;
    return part == 0 ? sums + head * size : others_.get() + (head * (parts_ - 1) + part - 1) * size;
  }

  // The columns from `first` of one part of one head.
  template <class Transform>
  void add(const View& x, const int32_t* codes, int64_t part, int64_t first, const Transform& transform,
           int64_t head, float* sums, int32_t* counts) const {
    const int64_t width = width_ < dim_ - first ? width_ : dim_ - first;
    const int64_t begin = part * of_part_, end = begin + of_part_ < n_ ? begin + of_part_ : n_;
    if (width <= 0) return;
    for (int64_t k = 0; k < codewords_; ++k) std::memset(sums + k * dim_ + first, 0, width * sizeof(float));
    if (counts) std::memset(counts, 0, codewords_ * sizeof(int32_t));
    const Rows rows(sliced(x, x.ndim - 1, first, width));
    const auto row = transform(head, first, width);
    Scratch<float> tile(Rows::kMost * width), buffer(width);
    for (int64_t i = begin; i < end; i += Rows::kMost) {
      const int many = static_cast<int>(end - i < Rows::kMost ? end - i : Rows::kMost);
      int64_t pitch;
      const float* from = rows.some(i, many, tile.get(), pitch);
      for (int r = 0; r < many; ++r) {
        const int64_t code = codes[i + r];
        if (code < 0) continue;
        accumulate(row(i + r, code, from + r * pitch, buffer.get()), width, sums + code * dim_ + first);
        if (counts) ++counts[code];
      }
    }
  }

  const int64_t heads_, n_, codewords_, dim_;
  const int64_t parts_, of_part_;  // number, and vectors of each
  const int64_t threads_;
  const int64_t slices_, width_;  // number, and columns of each
  Scratch<float> others_;         // sums of all parts but the first
};

}  // namespace

}  // namespace GENPERF_ISA
}  // namespace genperf
