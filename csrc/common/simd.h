// The vector types of one CPU instruction set, and the few operations on them that have no operator.
// Included by lanes.h in builds that name a GENPERF_ISA; the width follows the compiler's flags.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace genperf {
inline namespace GENPERF_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

using Vf = float __attribute__((vector_size(4 * kLanes)));
using Vi = int32_t __attribute__((vector_size(4 * kLanes)));
using Vu = uint32_t __attribute__((vector_size(4 * kLanes)));
using Vw = uint64_t __attribute__((vector_size(4 * kLanes)));

namespace detail {
template <>
struct Lanes<Vf> {
  using Int = Vi;
  using Uint = Vu;
};
}  // namespace detail

GENPERF_HD Vf load(const float* p) {
  Vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

GENPERF_HD void store(float* p, Vf x) { std::memcpy(p, &x, sizeof x); }

GENPERF_HD Vi to_bits(Vf x) { return (Vi)x; }

GENPERF_HD Vf abs(Vf x) { return (Vf)((Vi)x & 0x7fffffff); }

// Below, for each width:
//   multiply_low_words  64-bit products of the low halves of 64-bit lanes
//   low_words           in each 128 bits, the low halves of a's two lanes and of b's two lanes
//   unpack_*            in each 128 bits, interleaving of the low or high halves, by one or two floats
#if defined(__AVX512F__)

GENPERF_HD Vf sqrt_rn(Vf x) { return (Vf)_mm512_sqrt_ps((__m512)x); }

GENPERF_HD Vw multiply_low_words(Vw a, Vw b) { return (Vw)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
GENPERF_HD Vu low_words(Vw a, Vw b) { return (Vu)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88); }

GENPERF_HD Vf unpack_low(Vf a, Vf b) { return (Vf)_mm512_unpacklo_ps((__m512)a, (__m512)b); }
GENPERF_HD Vf unpack_high(Vf a, Vf b) { return (Vf)_mm512_unpackhi_ps((__m512)a, (__m512)b); }
GENPERF_HD Vf unpack_low_pairs(Vf a, Vf b) { return (Vf)_mm512_unpacklo_pd((__m512d)a, (__m512d)b); }
GENPERF_HD Vf unpack_high_pairs(Vf a, Vf b) { return (Vf)_mm512_unpackhi_pd((__m512d)a, (__m512d)b); }

#elif defined(__AVX2__)

GENPERF_HD Vf sqrt_rn(Vf x) { return (Vf)_mm256_sqrt_ps((__m256)x); }

GENPERF_HD Vw multiply_low_words(Vw a, Vw b) { return (Vw)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
GENPERF_HD Vu low_words(Vw a, Vw b) { return (Vu)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88); }

GENPERF_HD Vf unpack_low(Vf a, Vf b) { return (Vf)_mm256_unpacklo_ps((__m256)a, (__m256)b); }
GENPERF_HD Vf unpack_high(Vf a, Vf b) { return (Vf)_mm256_unpackhi_ps((__m256)a, (__m256)b); }
GENPERF_HD Vf unpack_low_pairs(Vf a, Vf b) { return (Vf)_mm256_unpacklo_pd((__m256d)a, (__m256d)b); }
GENPERF_HD Vf unpack_high_pairs(Vf a, Vf b) { return (Vf)_mm256_unpackhi_pd((__m256d)a, (__m256d)b); }

#else  // four lanes, left to the compiler

GENPERF_HD Vf sqrt_rn(Vf x) { return Vf{std::sqrt(x[0]), std::sqrt(x[1]), std::sqrt(x[2]), std::sqrt(x[3])}; }

GENPERF_HD Vw multiply_low_words(Vw a, Vw b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
GENPERF_HD Vu low_words(Vw a, Vw b) {
  return Vu{(uint32_t)a[0], (uint32_t)a[1], (uint32_t)b[0], (uint32_t)b[1]};
}

GENPERF_HD Vf unpack_low(Vf a, Vf b) { return Vf{a[0], b[0], a[1], b[1]}; }
GENPERF_HD Vf unpack_high(Vf a, Vf b) { return Vf{a[2], b[2], a[3], b[3]}; }
GENPERF_HD Vf unpack_low_pairs(Vf a, Vf b) { return Vf{a[0], a[1], b[0], b[1]}; }
GENPERF_HD Vf unpack_high_pairs(Vf a, Vf b) { return Vf{a[2], a[3], b[2], b[3]}; }

#endif

}  // namespace GENPERF_ISA
}  // namespace genperf
