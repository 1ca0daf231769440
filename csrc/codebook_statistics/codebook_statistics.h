// How many vectors each codeword was given, and their sums: what an exponential moving average of a codebook
// and k-means need.
//
//   counts[h, k] = #{n : indices[h, n] = k},  sums[h, k] = sum of x[h, n] over these n
//
// Layout: x [heads, *, D] of any strides (float32, float16, bfloat16), indices [heads, *] int64 of any
// strides, -1 for a vector that is not counted; counts [heads, K] and sums [heads, K, D] float32, contiguous.
// An index that is none throws std::invalid_argument.
//
// Numerics: sums in float32, in the order of the vectors, of up to eight parts of the vectors whose number
// follows from N and K alone; then of the parts. Nothing depends on the number of threads.
#pragma once

#include "../common/view.h"

namespace genperf {

struct CodebookStatisticsArgs {
  View x, indices, counts, sums;
};

void codebook_statistics_cpu(const CodebookStatisticsArgs& args);

// Throws std::invalid_argument.
[[noreturn]] void throw_bad_index(int64_t index, int64_t codewords);

}  // namespace genperf
