// Transposition of four native vectors by their quads, parts of four floats.
#pragma once

#include "lanes.h"

namespace genperf {
inline namespace GENPERF_ISA {

inline constexpr int kNative = kNativeBytes / 4;

// Four vectors, element j of vector i in each quad, to element i of vector j.
GENPERF_HD void transpose_4(Nf* x) {
  const Nf a = unpack_low(x[0], x[1]), b = unpack_low(x[2], x[3]);
  const Nf c = unpack_high(x[0], x[1]), d = unpack_high(x[2], x[3]);
  x[0] = unpack_low_pairs(a, b), x[1] = unpack_high_pairs(a, b);
  x[2] = unpack_low_pairs(c, d), x[3] = unpack_high_pairs(c, d);
}

GENPERF_HD void store_quad(float* to, Nf x, int quad) {
  std::memcpy(to, reinterpret_cast<const char*>(&x) + 16 * quad, 16);
}
GENPERF_HD void load_quad(Nf& x, const float* from, int quad) {
  std::memcpy(reinterpret_cast<char*>(&x) + 16 * quad, from, 16);
}

}  // namespace GENPERF_ISA
}  // namespace genperf
