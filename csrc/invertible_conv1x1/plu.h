// The matrix P (L + 1) (U + diag(sign exp(log_s))) of a PLU parametrisation, and gradients of its factors.
//
// All contiguous, float32: matrices [C, C], vectors [C]. Of L and U what stands strictly below and above the
// diagonal counts, and P has mostly zeros. In float64, rounded at the end.
#pragma once

#include "../common/view.h"

namespace genperf {

struct PluArgs {
  View p, lower, upper, sign, log_s;
  View matrix;  // result, or backward its gradient
  View grad_lower, grad_upper, grad_log_s;
};

void plu_matrix_cpu(const PluArgs& args);
void plu_matrix_backward_cpu(const PluArgs& args);

}  // namespace genperf
