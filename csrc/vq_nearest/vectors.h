// Vector arithmetic of the search.
#pragma once

#include <cmath>

#include "../common/lanes.h"

namespace genperf {
namespace GENPERF_ISA {
namespace vq {

inline constexpr int kNative = kNativeBytes / 4;  // floats of a native vector

GENPERF_HD Nf load_native(const float* p) {
  Nf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

GENPERF_HD void store_native(float* p, Nf x) { std::memcpy(p, &x, sizeof x); }

// Four floats at p, at p + 4 stride, ..., of each fourth row of a matrix.
GENPERF_HD Nf load_fours(const float* p, int64_t stride) {
#if defined(__AVX512F__)
  const __m256 low =
      _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * stride), 1);
  p += 8 * stride;
  const __m256 high =
      _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * stride), 1);
  return (Nf)_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
#elif defined(__AVX2__)
  return (Nf)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * stride), 1);
#else
  (void)stride;
  return load_native(p);
#endif
}

GENPERF_HD Nf max_of(Nf a, Nf b) { return a > b ? a : b; }

GENPERF_HD Nf multiply_add(Nf a, Nf b, Nf c) {
#if defined(__AVX512F__)
  return (Nf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Nf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

GENPERF_HD Nf magnitude(Nf x) { return (Nf)((Vi::Native)x & 0x7fffffff); }

// Each lane's neighbour: 1, 0, 3, 2, ...
GENPERF_HD Nf swap_neighbours(Nf x) {
  using Nl = Block<uint64_t>::Native;
  return (Nf)((Nl)x << 32 | (Nl)x >> 32);
}

using Vs = Block<uint16_t>;  // 32, which wrap

// Unsigned bytes times signed ones, the products of neighbours added, which do not leave 16 bits.
GENPERF_HD Vs::Native multiply_bytes(Vi::Native a, Vi::Native b) {
#if defined(__AVX512F__)
  return (Vs::Native)_mm512_maddubs_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Vs::Native)_mm256_maddubs_epi16((__m256i)a, (__m256i)b);
#else
  using Signed = Block<int16_t>::Native;
  const Vs::Native low = (Vs::Native)a & 0xff, high = (Vs::Native)a >> 8;
  return low * (Vs::Native)((Signed)b << 8 >> 8) + high * (Vs::Native)((Signed)b >> 8);
#endif
}

// Neighbours, as signed numbers, added.
GENPERF_HD Vi::Native add_neighbours(Vs::Native v) {
#if defined(__AVX512F__)
  return (Vi::Native)_mm512_madd_epi16((__m512i)v, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  return (Vi::Native)_mm256_madd_epi16((__m256i)v, _mm256_set1_epi16(1));
#else
  return ((Vi::Native)v << 16 >> 16) + ((Vi::Native)v >> 16);
#endif
}

GENPERF_HD Vf multiply_add(Vf a, Vf b, Vf c) {
  return for_parts<Vf>([&](int i) { return multiply_add(a.part[i], b.part[i], c.part[i]); });
}

// A bit for each lane that is set in a comparison's result.
GENPERF_HD unsigned lanes_of(Vi::Native mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask);
#elif defined(__x86_64__)
  return _mm_movemask_ps((__m128)mask);
#else
  return (mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8);
#endif
}

GENPERF_HD float largest_lane(Nf v) {
  float lanes[kNative];
  std::memcpy(lanes, &v, sizeof v);
  for (int n = kNative / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] = lanes[i] > lanes[i + n] ? lanes[i] : lanes[i + n];
  return lanes[0];
}

// Of the 16 lanes, in a tree.
GENPERF_HD float sum_of(Vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v.part[0]);
#elif defined(__AVX2__)
  const __m256 eight = (__m256)(v.part[0] + v.part[1]);
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
#else
  float lanes[kLanes];
  store(lanes, v);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  return lanes[0];
#endif
}

typedef float Four __attribute__((vector_size(16)));

// Of each of four.
GENPERF_HD Four sums_of(const Vf (&v)[4]) {
#if defined(__AVX2__)
  __m256 eight[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    eight[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i].part[0]),
                             _mm512_extractf32x8_ps((__m512)v[i].part[0], 1));
#else
    eight[i] = (__m256)(v[i].part[0] + v[i].part[1]);
#endif
  }
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(eight[0], eight[1]), _mm256_hadd_ps(eight[2], eight[3]));
  return (Four)_mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
#else
  return Four{sum_of(v[0]), sum_of(v[1]), sum_of(v[2]), sum_of(v[3])};
#endif
}

// Whether a > b in all four lanes.
GENPERF_HD bool all_greater(Four a, Four b) {
#if defined(__x86_64__)
  return _mm_movemask_ps(_mm_cmpgt_ps((__m128)a, (__m128)b)) == 15;
#else
  const auto greater = a > b;
  return (greater[0] & greater[1] & greater[2] & greater[3]) != 0;
#endif
}

using Vd = Block<double>;  // eight

GENPERF_HD Vd load_doubles(const float* p) {
  return for_parts<Vd>([&](int i) {
    typedef float Half __attribute__((vector_size(kNativeBytes / 2)));
    Half x;
    std::memcpy(&x, p + i * (8 / kParts), sizeof x);
    return __builtin_convertvector(x, Vd::Native);
  });
}

GENPERF_HD Vd magnitude(Vd v) {
  return for_parts<Vd>([&](int i) { return v.part[i] < 0.0 ? -v.part[i] : v.part[i]; });
}

// The same tree for every instruction set.
GENPERF_HD double sum_of(Vd v) {
#if defined(__AVX512F__)
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256((__m512d)v.part[0]),
                                     _mm512_extractf64x4_pd((__m512d)v.part[0], 1));
#elif defined(__AVX2__)
  const __m256d four = (__m256d)(v.part[0] + v.part[1]);
#endif
#if defined(__AVX2__)
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
#else
  double x[8];
  std::memcpy(x, &v, sizeof x);
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
#endif
}

// 2^exponent, as far as a normal float32 goes.
inline float power_of_two(int exponent) {
  return std::ldexp(1.0f, exponent < -126 ? -126 : exponent > 126 ? 126 : exponent);
}

}  // namespace vq
}  // namespace GENPERF_ISA
}  // namespace genperf
