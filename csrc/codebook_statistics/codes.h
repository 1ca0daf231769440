// Indices of codewords, read from a tensor and checked.
#pragma once

#include "../common/chunk.h"
#include "codebook_statistics.h"

namespace genperf {

namespace GENPERF_ISA {

namespace {

// Indices of any strides, in order; -1 is none, and what is neither throws.
template <class To>
void read_codes(const View& indices, int64_t codewords, To* to) {
  const View all = collapse(indices);
  const int64_t n = indices.numel(), step = all.stride[all.ndim - 1];
  if (n == 0) return;
  Position at(all, 0);
  for (int64_t i = 0; i < n; at.next_run(all)) {
    const int64_t* from = static_cast<const int64_t*>(all.data) + at.offset;
    bool bad = false;
    for (int64_t j = 0; j < at.run; ++j) {
      const int64_t code = from[j * step];
      bad |= code < -1 || code >= codewords;
      to[i + j] = static_cast<To>(code);
    }
    for (int64_t j = 0; bad; ++j)
      if (from[j * step] < -1 || from[j * step] >= codewords) throw_bad_index(from[j * step], codewords);
    i += at.run;
  }
}

}  // namespace

}  // namespace GENPERF_ISA
}  // namespace genperf
