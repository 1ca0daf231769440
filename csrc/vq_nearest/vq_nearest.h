// The k nearest codewords of each vector, exactly: the lowest indices that minimise the distance between the
// numbers as given, in real arithmetic.
//
//   kL2      |x - c|^2
//   kCosine  1 - x.c / (|x| |c|), the cosine with a zero vector being 0
//   kDot     -x.c
//
// Layout: x [heads, *, D] with any strides, codebook [heads, K, D] with any strides, of one dtype (float32,
// float16, bfloat16); indices [heads, *, k] int64 and distances [heads, *, k] float32 (or absent),
// contiguous. Vectors that are not finite get the indices 0, 1, ... and the distance NaN; codewords that are
// not finite come after all others, in order, with the distance NaN.
//
// Numerics: scores in 8-bit integers or float32 give the candidates, every codeword whose score is within a
// proven bound of the k-th best (docs/vector_quantization.md); these are ranked by their distances in double,
// and where the error bounds of two of these overlap, by an exact sum. Nothing depends on the number of
// threads, nor on which vectors stand together.
#pragma once

#include "../common/view.h"

namespace genperf {

enum class Metric : int { kL2, kCosine, kDot };

struct VqNearestArgs {
  View x, codebook, indices, distances;
  Metric metric;
};

void vq_nearest_cpu(const VqNearestArgs& args);

}  // namespace genperf
