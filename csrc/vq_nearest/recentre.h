// A frame of the codebook for the vectors at hand, where many codewords are far from all of these, as unused
// ones of a moving average are. Their median, the centre otherwise, is then far from the vectors too; and as
// the errors of the scores go with the distances of vector and codeword from the centre, many codewords would
// be candidates.
#pragma once

#include "few.h"

namespace genperf {
namespace GENPERF_ISA {
namespace vq {

// n rows of floats, `pitch` apart.
inline View rows_view(const float* rows, int64_t n, int64_t dim, int64_t pitch) {
  View view;
  view.data = const_cast<float*>(rows), view.ndim = 2;
  view.shape[0] = n, view.shape[1] = dim;
  view.stride[0] = pitch, view.stride[1] = 1;
  return view;
}

// The median of the codewords nearest to `most` of n vectors x becomes the centre; at most nine. `a` and
// `book` are of one codebook, which is prepared.
inline void recentre(const VqSearch& a, const Rows& x, int64_t n, int64_t most, Codebook& book) {
  const int64_t pitch = book.pitch();
  Scratch<float> sample(most * pitch, 0.0f);
  int64_t found = 0;
  for (int64_t j = 0; j < most; ++j) {
    x.read(j * n / most, 1, sample.get() + found * pitch, pitch);
    found += is_finite(sample.get() + found * pitch, book.dim);
  }
  if (found == 0) return;
  int64_t nearest[Codebook::kSamples];
  VqSearch few = a;
  few.x = rows_view(sample.get(), found, book.dim, pitch), few.n = found, few.k = 1;
  few.indices = nearest, few.distances = nullptr;
  Ranking ranking(few, book);
  Few(few, book).search(Rows(few.x), ranking);
  book.recentre(sample.get(), nearest, static_cast<int>(found));
}

}  // namespace vq
}  // namespace GENPERF_ISA
}  // namespace genperf
