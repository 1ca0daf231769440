// Vectors of doubles of the instruction set, and the product that elimination comes down to.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/simd.h"
#include "slogdet_inverse.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace genperf {
namespace GENPERF_ISA {

namespace {

constexpr int kDoubles = kNativeBytes / 8, kVectors = kStrip / kDoubles;
constexpr int kTileRows = kDoubles == 8 ? 12 : kDoubles == 4 ? 6 : 3;
typedef double Nd __attribute__((vector_size(kNativeBytes), aligned(8)));
typedef int64_t Ni __attribute__((vector_size(kNativeBytes), aligned(8)));

GENPERF_HD Nd load(const double* p) { return *reinterpret_cast<const Nd*>(p); }
GENPERF_HD void store(double* p, Nd x) { *reinterpret_cast<Nd*>(p) = x; }

#if defined(__AVX512F__)
GENPERF_HD Nd splat(double x) { return (Nd)_mm512_set1_pd(x); }
GENPERF_HD Nd multiply_add(Nd a, Nd b, Nd c) {
  return (Nd)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__FMA__)
GENPERF_HD Nd splat(double x) { return (Nd)_mm256_set1_pd(x); }
GENPERF_HD Nd multiply_add(Nd a, Nd b, Nd c) {
  return (Nd)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#else
GENPERF_HD Nd splat(double x) { return Nd{x, x}; }
GENPERF_HD Nd multiply_add(Nd a, Nd b, Nd c) { return a * b + c; }
#endif

GENPERF_HD Nd abs(Nd x) { return (Nd)((Ni)x & INT64_MAX); }
GENPERF_HD Nd larger(Nd a, Nd b) { return a > b ? a : b; }

// kStrip elements.
template <class T>
GENPERF_HD void widen(const T* from, double* to) {
  typedef T Row __attribute__((vector_size(4 * sizeof(T)), aligned(alignof(T))));
  typedef double Wide __attribute__((vector_size(32), aligned(8)));
  for (int v = 0; v < kStrip; v += 4)
    *reinterpret_cast<Wide*>(to + v) = __builtin_convertvector(*reinterpret_cast<const Row*>(from + v), Wide);
}

// c [kRows, kStrip] += a [kRows, depth] b [depth, kStrip]. Of `a`, whole strips of kStrip columns lie
// `a_strip` apart; rows lie next to each other.
template <int kRows>
void multiply_tile(double* c, const double* a, int64_t a_strip, const double* b, int64_t depth) {
  Nd sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(c + r * kStrip + v * kDoubles);
  for (int64_t begin = 0; begin < depth; begin += kStrip, a += a_strip) {
    const int64_t count = depth - begin < kStrip ? depth - begin : kStrip;
    for (int64_t k = 0; k < count; ++k, b += kStrip) {
      Nd row[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * kDoubles);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Nd x = splat(a[r * kStrip + k]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(x, row[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(c + r * kStrip + v * kDoubles, sum[r][v]);
}

// The same for any number of rows.
inline void multiply(double* c, const double* a, int64_t a_strip, const double* b, int64_t rows,
                     int64_t depth) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows)
    multiply_tile<kTileRows>(c + i * kStrip, a + i * kStrip, a_strip, b, depth);
  for (; i + 2 <= rows; i += 2) multiply_tile<2>(c + i * kStrip, a + i * kStrip, a_strip, b, depth);
  for (; i < rows; ++i) multiply_tile<1>(c + i * kStrip, a + i * kStrip, a_strip, b, depth);
}

// A tile of 4 x 4: rows of `from` become columns. `to(i)` is where row i goes.
template <class From, class To>
void transpose_tile(const From* from, int64_t pitch, To to) {
  using T = std::remove_reference_t<decltype(*to(0))>;
  typedef From Row __attribute__((vector_size(4 * sizeof(From)), aligned(alignof(From))));
  typedef T Column __attribute__((vector_size(4 * sizeof(T)), aligned(alignof(T))));
  Row r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) r[i] = *reinterpret_cast<const Row*>(from + i * pitch);
  const Row even[2] = {__builtin_shufflevector(r[0], r[1], 0, 4, 2, 6),
                       __builtin_shufflevector(r[2], r[3], 0, 4, 2, 6)};
  const Row odd[2] = {__builtin_shufflevector(r[0], r[1], 1, 5, 3, 7),
                      __builtin_shufflevector(r[2], r[3], 1, 5, 3, 7)};
  r[0] = __builtin_shufflevector(even[0], even[1], 0, 1, 4, 5);
  r[1] = __builtin_shufflevector(odd[0], odd[1], 0, 1, 4, 5);
  r[2] = __builtin_shufflevector(even[0], even[1], 2, 3, 6, 7);
  r[3] = __builtin_shufflevector(odd[0], odd[1], 2, 3, 6, 7);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) *reinterpret_cast<Column*>(to(i)) = __builtin_convertvector(r[i], Column);
}

// to [n, n] = from^T, in tiles of a cache line's height.
template <class T>
void transpose_all(const T* from, T* to, int64_t n) {
  constexpr int64_t kHeight = 16;
  for (int64_t begin = 0; begin < n; begin += kHeight) {
    const int64_t end = n - begin < kHeight ? n : begin + kHeight, whole = begin + (end - begin) / 4 * 4;
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
      for (int64_t i = begin; i < whole; i += 4)
        transpose_tile(from + i * n + j, n, [&](int v) { return to + (j + v) * n + i; });
      for (int64_t i = whole; i < end; ++i)
        for (int v = 0; v < 4; ++v) to[(j + v) * n + i] = from[i * n + j + v];
    }
    for (; j < n; ++j)
      for (int64_t i = begin; i < end; ++i) to[j * n + i] = from[i * n + j];
  }
}

}  // namespace

}  // namespace GENPERF_ISA
}  // namespace genperf
