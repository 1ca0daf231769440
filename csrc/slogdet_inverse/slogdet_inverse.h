// Determinants and inverses of many square matrices at once.
//
// Layout: matrices of sizes[i] x sizes[i], row by row, one after another in `packed`; `inverse` and
// `inverse_transpose` in the same way; sign, logabsdet and status [n]. Floats are float32 or float64 alike,
// sizes and status int64. All contiguous.
//
// status: 0, or 1 + the step whose pivot is 0 (a singular matrix: sign 0, logabsdet -inf, NaN inverse), or -1
// where an element is not finite (all NaN).
//
// Numerics: float64 whatever the dtype, rounded at the end; partial pivoting. The same bits for any number of
// threads, each of which takes whole matrices.
#pragma once

#include "../common/view.h"

namespace genperf {

struct SlogdetInverseArgs {
  View packed, sizes, sign, logabsdet, inverse, inverse_transpose, status;
};

void slogdet_inverse_cpu(const SlogdetInverseArgs& args);

}  // namespace genperf
