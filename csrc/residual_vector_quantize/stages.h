// What forward, backward and statistics share: the vectors of a group, its codebooks, and rows of floats that
// are padded with zeros to whole blocks of lanes.
#pragma once

#include <algorithm>

#include "../common/scratch.h"
#include "../common/subview.h"
#include "../vq_nearest/plan.h"
#include "../vq_nearest/rows_out.h"
#include "residual_vector_quantize.h"

namespace genperf {
namespace GENPERF_ISA {
namespace residual {

inline int64_t padded_dim(int64_t dim) { return (dim + kLanes - 1) / kLanes * kLanes; }

// What the loops go over.
struct Sizes {
  int64_t groups, stages, n, dim, pitch;

  explicit Sizes(const ResidualArgs& a)
      : groups(a.x.shape[0]),
        stages(a.n_codebooks / groups),
        n(1),
        dim(a.x.shape[a.x.ndim - 1]),
        pitch(padded_dim(dim)) {
    for (int d = 1; d + 1 < a.x.ndim; ++d) n *= a.x.shape[d];
  }
};

// Any number of rows, and their padding.
__attribute__((noinline)) inline void read_rows(const Rows& from, int64_t first, int64_t n, int64_t dim,
                                                float* to, int64_t pitch) {
  for (int64_t i = 0; i < n; i += Rows::kMost)
    from.read(first + i, static_cast<int>(std::min<int64_t>(Rows::kMost, n - i)), to + i * pitch, pitch);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t d = dim; d < pitch; ++d) to[i * pitch + d] = 0.0f;
}

// A row to the dtype and back.
inline void round_row(float* row, int64_t n, DType dtype) {
  if (dtype == DType::kFloat32) return;
  uint16_t half[kChunk];
  for (int64_t d = 0; d < n; d += kChunk) {
    const int count = static_cast<int>(std::min<int64_t>(kChunk, n - d));
    narrow(row + d, count, dtype, half, 1);
    widen(half, 1, count, dtype, row + d);
  }
}

// f(d, block) for the blocks of lanes of a row of `dim` floats, which need not be padded.
template <class Function>
GENPERF_HD void each_block(const float* row, int64_t dim, Function f) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) f(d, load(row + d));
  if (d == dim) return;
  alignas(64) float rest[kLanes] = {};
  for (int64_t i = d; i < dim; ++i) rest[i - d] = row[i];
  f(d, load(rest));
}

inline float sum_of(Vf v) {
  float x[kLanes];
  store(x, v);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x[i] += x[i + n];
  return x[0];
}

}  // namespace residual
}  // namespace GENPERF_ISA
}  // namespace genperf
