// Questions about the masks of simd.h.
#pragma once

#include "lanes.h"

namespace genperf {
inline namespace GENPERF_ISA {

// Whether a mask holds in any lane.
GENPERF_HD bool any(bool mask) { return mask; }
#ifdef GENPERF_VECTORS
GENPERF_HD bool any(Vi mask) {
  Vi::Native all = mask.part[0];
  for (int i = 1; i < kParts; ++i) all |= mask.part[i];
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)all, (__m512i)all) != 0;
#elif defined(__AVX2__)
  return _mm256_testz_si256((__m256i)all, (__m256i)all) == 0;
#elif defined(__x86_64__)
  return _mm_movemask_epi8((__m128i)all) != 0;
#else
  return (all[0] | all[1] | all[2] | all[3]) != 0;
#endif
}
#endif

}  // namespace GENPERF_ISA
}  // namespace genperf
