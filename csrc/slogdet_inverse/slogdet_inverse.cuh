// Elimination by one block of threads: the steps of the CPU's kernel, with the same arithmetic on each
// element.
#pragma once

#include <cmath>

#include "../common/cuda.h"
#include "slogdet_inverse.h"

namespace genperf {

inline constexpr int kThreads = 256, kWarps = kThreads / 32;
inline constexpr int kChunk = 16;  // strips whose rows of a panel are in shared memory at a time

// A row of a strip.
struct alignas(16) StripRow {
  double v[kStrip];
};

// What the threads of a block share. `w` [strips, n] is in shared memory or in the workspace.
struct Matrix {
  StripRow *w, *rows;  // rows: [kChunk, depth]
  int *exchanged, *from;
  int n, strips;
  bool whole;  // also what lies above the diagonal, which the inverse needs

  __device__ __forceinline__ StripRow& at(int strip, int row) const { return w[int64_t{strip} * n + row]; }
};

// In the first thread.
struct Determinant {
  double mantissa = 1.0;
  int64_t exponent = 0;

  __device__ __forceinline__ void multiply(double pivot) {
    int e;
    mantissa = frexp(mantissa * pivot, &e);
    exponent += e;
  }
};

// Strips [from, to) but for [skip, resume).
struct StripRange {
  int from, to, skip, resume;

  __device__ __forceinline__ int count() const { return to - from - (resume - skip); }
  __device__ __forceinline__ int operator[](int i) const {
    return from + i < skip ? from + i : from + i + resume - skip;
  }
};

// The largest element that a warp, or a thread, has seen, and the first row that holds it.
struct Candidate {
  double size = -1.0;
  int row = INT32_MAX;

  __device__ __forceinline__ void meet(double other, int other_row) {
    if (other > size || (other == size && other_row < row)) size = other, row = other_row;
  }
};

// Makes the columns of strip s unit columns; each thread holds `kRows` rows in registers. Returns the status.
template <int kRows>
__device__ __forceinline__ int eliminate_strip(const Matrix& m, int s, Determinant& determinant) {
  // Of two steps, so that one barrier a step will do.
  GENPERF_SHARED(StripRow, pivots, 2 * kWarps);
  GENPERF_SHARED(StripRow, replaced, 2);
  GENPERF_SHARED(double, sizes, 2 * kWarps);
  GENPERF_SHARED(int, places, 2 * kWarps);
  const int thread = threadIdx.x, warp = thread / 32, begin = s * kStrip;
  const int busy_warps = (m.n + 31) / 32 < kWarps ? (m.n + 31) / 32 : kWarps;
  StripRow x[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int i = thread + r * kThreads;
    if (i < m.n) x[r] = m.at(s, i);
  }
#pragma unroll
  for (int column = 0; column < kStrip; ++column) {
    const int k = begin + column, side = column % 2;
    if (k >= m.n) break;
    if (warp < busy_warps) {
      Candidate best;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int i = thread + r * kThreads;
        if (i >= k && i < m.n) best.meet(fabs(x[r].v[column]), i);
        if (i == k) replaced[side] = x[r];
      }
      for (int distance = 16; distance > 0; distance /= 2) {
        const double size = __shfl_xor_sync(~0u, best.size, distance);
        const int row = __shfl_xor_sync(~0u, best.row, distance);
        best.meet(size, row);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (best.row == thread + r * kThreads) pivots[side * kWarps + warp] = x[r];
      if (thread % 32 == 0) sizes[side * kWarps + warp] = best.size, places[side * kWarps + warp] = best.row;
    }
    __syncthreads();
    Candidate best;
    int best_warp = 0;
    for (int i = 0; i < busy_warps; ++i) {
      best.meet(sizes[side * kWarps + i], places[side * kWarps + i]);
      if (best.row == places[side * kWarps + i]) best_warp = i;
    }
    if (!(best.size > 0.0)) return k + 1;
    if (best.size == INFINITY) return -1;
    StripRow minus = pivots[side * kWarps + best_warp];
    const double pivot = minus.v[column], reciprocal = 1.0 / pivot;
#pragma unroll
    for (int j = 0; j < kStrip; ++j) minus.v[j] = j == column ? -reciprocal : -(minus.v[j] * reciprocal);
    if (thread == 0) {
      m.exchanged[k] = best.row;
      determinant.multiply(best.row == k ? pivot : -pivot);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = thread + r * kThreads;
      if (i >= m.n || (i < k && !m.whole)) continue;
      if (i == best.row) x[r] = replaced[side];
      const double factor = x[r].v[column];
#pragma unroll
      for (int j = 0; j < kStrip; ++j)
        x[r].v[j] = i == k ? -minus.v[j] : fma(factor, minus.v[j], j == column ? 0.0 : x[r].v[j]);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int i = thread + r * kThreads;
    if (i < m.n) m.at(s, i) = x[r];
  }
  __syncthreads();
  return 0;
}

// Exchanges rows [begin, end) of up to kChunk strips as the steps did, moves them to m.rows, and leaves
// zeros. A thread takes a column.
__device__ __forceinline__ void take_rows(const Matrix& m, const StripRange& range, int first, int count,
                                          int begin, int end) {
  for (int i = threadIdx.x; i < count * kStrip; i += kThreads) {
    StripRow* const column = &m.at(range[first + i / kStrip], 0);
    const int v = i % kStrip;
    for (int k = begin; k < end; ++k) {
      const double x = column[k].v[v];
      column[k].v[v] = column[m.exchanged[k]].v[v];
      column[m.exchanged[k]].v[v] = x;
    }
    for (int k = begin; k < end; ++k) {
      m.rows[i / kStrip * (end - begin) + k - begin].v[v] = column[k].v[v];
      column[k].v[v] = 0.0;
    }
  }
}

// What the elimination of the strips [first, last) does to those of the range: a product with what it left
// there. A thread takes `kRows` rows of a strip, 32 apart.
template <int kRows>
__device__ __forceinline__ void update(const Matrix& m, const StripRange& range, int first, int last) {
  const int begin = first * kStrip, end = last * kStrip < m.n ? last * kStrip : m.n, depth = end - begin;
  const int top = m.whole ? 0 : begin, groups = (m.n - top + 32 * kRows - 1) / (32 * kRows);
  for (int chunk = 0; chunk < range.count(); chunk += kChunk) {
    const int count = range.count() - chunk < kChunk ? range.count() - chunk : kChunk;
    take_rows(m, range, chunk, count, begin, end);
    __syncthreads();
    for (int item = threadIdx.x / 32; item < count * groups; item += kWarps) {
      const int t = range[chunk + item / groups];
      const int i0 = top + item % groups * 32 * kRows + threadIdx.x % 32;
      const StripRow* row = m.rows + item / groups * depth;
      StripRow sum[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (i0 + r * 32 < m.n) sum[r] = m.at(t, i0 + r * 32);
      for (int k0 = 0; k0 < depth; k0 += kStrip) {
#pragma unroll
        for (int k = 0; k < kStrip; ++k) {
          if (k0 + k >= depth) break;
          const StripRow b = row[k0 + k];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            if (i0 + r * 32 >= m.n) continue;
            const double factor = m.at(first + k0 / kStrip, i0 + r * 32).v[k];
#pragma unroll
            for (int j = 0; j < kStrip; ++j) sum[r].v[j] = fma(factor, b.v[j], sum[r].v[j]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (i0 + r * 32 < m.n) m.at(t, i0 + r * 32) = sum[r];
    }
    __syncthreads();
  }
}

// Returns the status. kRows: of a thread in a strip, ceil(n / kThreads) at least; kTile: in a product.
template <int kRows, int kTile>
__device__ __forceinline__ int eliminate(const Matrix& m, Determinant& determinant) {
  const int width = panel_strips(m.n);
  for (int first = 0; first < m.strips; first += width) {
    const int last = first + width < m.strips ? first + width : m.strips;
    for (int s = first; s < last; ++s) {
      if (const int status = eliminate_strip<kRows>(m, s, determinant)) return status;
      update<kTile>(m, {first, last, s, s + 1}, s, s + 1);
    }
    update<kTile>(m, {m.whole ? 0 : first, m.strips, first, last}, first, last);
  }
  return 0;
}

}  // namespace genperf
