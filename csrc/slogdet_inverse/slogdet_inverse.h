// Determinants and inverses of many square matrices at once.
//
// Layout: matrices of sizes[i] x sizes[i], row by row, one after another in `packed`; `inverse` and
// `inverse_transpose` in the same way; sign, logabsdet and status [n]. Floats are float32 or float64 alike,
// status int64. All contiguous. `inverse` may be absent, or both: then the half of the elimination that is
// above the diagonal is left out, and the rest has the same bits.
//
// status: 0, or 1 + the step whose pivot is 0 (a singular matrix: sign 0, logabsdet -inf, NaN inverse), or -1
// where an element is not finite, or grew beyond float64 on the way (all NaN).
//
// Numerics: Gauss-Jordan elimination in place with partial pivoting (the first of the largest), in float64
// whatever the dtype, rounded at the end. Columns are taken in strips, strips in panels; what a panel does to
// the others is a product. Each element is the same chain of fused multiply-adds for any width of vectors or
// number of threads, each of which takes whole matrices; without such an instruction they round twice.
#pragma once

#include <vector>

#include "../common/view.h"

namespace genperf {

struct SlogdetInverseArgs {
  View packed, sign, logabsdet, inverse, inverse_transpose, status;
  View workspace;  // CUDA: float64, for the sizes above kSharedSize their squares, rounded up to whole strips
  std::vector<int64_t> sizes;
};

inline constexpr int kStrip = 8;
// On CUDA: matrices up to kSharedSize always fit in shared memory, and up to kLargestSize in registers.
inline constexpr int kSharedSize = 64, kLargestSize = 1024;
// Strips that are eliminated before the columns outside hear of it.
GENPERF_INLINE constexpr int panel_strips(int64_t size) { return size > 64 ? 4 : 1; }

void slogdet_inverse_cpu(const SlogdetInverseArgs& args);

// Returns a cudaError_t. One launch for up to 64 runs of matrices of one size.
int slogdet_inverse_cuda(const SlogdetInverseArgs& args, void* stream);

}  // namespace genperf
