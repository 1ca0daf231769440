// exp for softmax-like sums, whose arguments are differences from the largest.
#pragma once

#include "math.h"

namespace genperf {
inline namespace GENPERF_ISA {

// e^x for x <= 0, less than 2^-125 being 0; NaN stays NaN.
template <class F>
GENPERF_HD F exp_of_negative(F x) {
  const auto small = x < -86.0f;
  return select(small, splat<F>(0.0f), exp_bounded(select(small, splat<F>(-86.0f), x)));
}

// x, and -200 where it is less, of which exp is 0 either way; so that its product with 0 is 0.
template <class F>
GENPERF_HD F not_infinite(F x) {
  return select(x < -200.0f, splat<F>(-200.0f), x);
}

}  // namespace GENPERF_ISA
}  // namespace genperf
