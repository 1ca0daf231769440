// Products of small dense matrices in the first- and second-level cache: out[i, j] += sum_l a(i, l) b[l, j].
//
// A tile of kTile by 16 sums stays in registers while l runs. An element's sum is one chain of fused
// multiply-adds over at most kDepth terms, which is added to what `out` holds, so it depends neither on the
// sizes of the other two dimensions nor on the tiles around it.
#pragma once

#include "../common/lanes.h"

namespace genperf {
namespace GENPERF_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kTile = 12;
#elif defined(__AVX2__)
constexpr int kTile = 6;
#else
constexpr int kTile = 2;
#endif
constexpr int64_t kDepth = 256;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

GENPERF_HD Vf multiply_add(Vf a, Vf b, Vf c) {
#if defined(__AVX512F__)
  return for_parts<Vf>(
      [&](int i) { return (Nf)_mm512_fmadd_ps((__m512)a.part[i], (__m512)b.part[i], (__m512)c.part[i]); });
#elif defined(__AVX2__)
  return for_parts<Vf>(
      [&](int i) { return (Nf)_mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]); });
#else
  return a * b + c;
#endif
}

// The left factor: a(i, l) = data[i * row + l * column].
struct Factor {
  const float* data;
  int64_t row, column;
};

// kTile rows of 16 sums over n terms, to `out`, or added to it.
GENPERF_HD void multiply_tile(Factor a, const float* b, int64_t pitch, int64_t n, float* out,
                              int64_t out_pitch, bool add) {
  Vf sum[kTile];
#pragma GCC unroll 12
  for (int i = 0; i < kTile; ++i) sum[i] = splat<Vf>(0.0f);
  const float* from = a.data;
  for (int64_t l = 0; l < n; ++l, from += a.column, b += pitch) {
    const Vf row = load(b);
#pragma GCC unroll 12
    for (int i = 0; i < kTile; ++i) sum[i] = multiply_add(splat<Vf>(from[i * a.row]), row, sum[i]);
  }
#pragma GCC unroll 12
  for (int i = 0; i < kTile; ++i) {
    float* to = out + i * out_pitch;
    store(to, add ? load(to) + sum[i] : sum[i]);
  }
}

// out [rows, columns] (+)= a [rows, n] b [n, columns], row-major with the given pitches. `rows` is a multiple
// of kTile, `columns` of 16.
inline void multiply(Factor a, const float* b, int64_t pitch, int64_t rows, int64_t columns, int64_t n,
                     float* out, int64_t out_pitch, bool add) {
  for (int64_t l = 0; l < n; l += kDepth) {
    const int64_t depth = n - l < kDepth ? n - l : kDepth;
    for (int64_t j = 0; j < columns; j += kLanes)
      for (int64_t i = 0; i < rows; i += kTile)
        multiply_tile({a.data + i * a.row + l * a.column, a.row, a.column}, b + l * pitch + j, pitch, depth,
                      out + i * out_pitch + j, out_pitch, add || l > 0);
  }
}

}  // namespace
}  // namespace GENPERF_ISA
}  // namespace genperf
