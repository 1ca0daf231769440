// Sums of vectors by their codeword, in a fixed order for any number of threads and without sorting.
//
// The vectors are cut into a few parts, whose number follows from N and K. Within a part every vector is
// added to its codeword's sum in turn. Threads take a part, or some columns of a part, which changes no sum.
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

inline int team_size() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// The numbers of the codewords as int32, -1 for none. The first number that is neither, else -1.
inline int64_t read_codes(const View& indices, int64_t codewords, int32_t* to) {
  const View all = collapse(indices);
  const int64_t n = all.numel(), step = all.stride[all.ndim - 1];
  const int64_t* data = static_cast<const int64_t*>(all.data);
  if (n == 0) return -1;
  Position at(all, 0);
  for (int64_t i = 0; i < n; at.next_run(all)) {
    const int64_t* from = data + at.offset;
    bool bad = false;
    for (int64_t j = 0; j < at.run; ++j) {
      const int64_t code = from[j * step];
      bad |= code < -1 || code >= codewords;
      to[i + j] = static_cast<int32_t>(code);
    }
    for (int64_t j = 0; bad && j < at.run; ++j)
      if (from[j * step] < -1 || from[j * step] >= codewords) return from[j * step];
    i += at.run;
  }
  return -1;
}

// to += x, both of n floats.
GENPERF_HD void accumulate(const float* __restrict x, int64_t n, float* __restrict to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(to + i) + load(x + i));
  for (; i < n; ++i) to[i] += x[i];
}

struct Segments {
  const int64_t n, codewords, dim;
  const int64_t parts, of_part;  // number, and vectors of each
  const int64_t slices, width;   // number, and columns of each

  static constexpr int64_t kParts = 8, kVectorsPerCodeword = 8, kLeastWidth = 16;

  Segments(int64_t n, int64_t codewords, int64_t dim, int64_t heads)
      : n(n),
        codewords(codewords),
        dim(dim),
        parts(clamped(n / (kVectorsPerCodeword * codewords), kParts)),
        of_part((n + parts - 1) / parts),
        slices(clamped(2 * team_size() / (parts * heads), (dim + kLeastWidth - 1) / kLeastWidth)),
        width(((dim + slices - 1) / slices + kLeastWidth - 1) / kLeastWidth * kLeastWidth) {}

  // Of columns [first, first + width) of the vectors of one part, to sums [K, D] and, where there are any,
  // counts [K].
  void add(const View& x, const int32_t* codes, int64_t part, int64_t slice, float* sums,
           int32_t* counts) const {
    const int64_t first = slice * width, columns_here = width < dim - first ? width : dim - first;
    const int64_t begin = part * of_part, end = begin + of_part < n ? begin + of_part : n;
    if (columns_here <= 0) return;
    for (int64_t k = 0; k < codewords; ++k)
      std::memset(sums + k * dim + first, 0, columns_here * sizeof(float));
    if (counts && slice == 0) std::memset(counts, 0, codewords * sizeof(int32_t));
    const Rows rows(sliced(x, x.ndim - 1, first, columns_here));
    Scratch<float> buffer(Rows::kMost * columns_here);
    for (int64_t i = begin; i < end; i += Rows::kMost) {
      const int many = static_cast<int>(end - i < Rows::kMost ? end - i : Rows::kMost);
      int64_t pitch;
      const float* from = rows.some(i, many, buffer.get(), pitch);
      for (int r = 0; r < many; ++r) {
        const int64_t code = codes[i + r];
        if (code < 0) continue;
        accumulate(from + r * pitch, columns_here, sums + code * dim + first);
        if (counts && slice == 0) ++counts[code];
      }
    }
  }

 private:
  static int64_t clamped(int64_t value, int64_t most) { return value < 1 ? 1 : value < most ? value : most; }
};

}  // namespace

}  // namespace GENPERF_ISA
}  // namespace genperf
