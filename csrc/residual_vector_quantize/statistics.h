// Counts and sums of the residuals by codeword, without a sort: the sums of sixteen dimensions of a codebook
// fit in the cache, and one thread adds to them vector by vector, in order.
#pragma once

#include <stdexcept>

#include "stages.h"

namespace genperf {
namespace GENPERF_ISA {
namespace residual {

// Elements [first, first + n) of the last dimension.
inline View last_of(const View& v, int64_t first, int64_t n) { return sliced(v, v.ndim - 1, first, n); }

class Sums {
 public:
  static constexpr int64_t kRows = 1 << 14;  // vectors whose residuals are held

  Sums(const ResidualStatisticsArgs& a, const Sizes& s, int64_t most_codewords)
      : a_(a),
        s_(s),
        residual_(std::min(kRows, s.n) * kLanes),
        words_(most_codewords * kLanes),
        sums_(most_codewords * kLanes) {}

  // The dimensions from d of a group; `offset` is the first of its codewords in the results.
  void run(int64_t group, int64_t d, int64_t offset) {
    const int64_t width = std::min<int64_t>(kLanes, s_.dim - d);
    const Rows x(last_of(select_first(a_.x, group), d, width));
    int64_t first = 0;
    do {
      const int64_t n = std::min(kRows, s_.n - first);
      read_rows(x, first, n, width, residual_.get(), kLanes);
      int64_t row = offset;
      for (int64_t i = 0; i < s_.stages; ++i) {
        const View& codebook = a_.codebooks[group * s_.stages + i];
        const int64_t codewords = codebook.shape[0];
        read_rows(Rows(last_of(codebook, d, width)), 0, codewords, width, words_.get(), kLanes);
        for (int64_t j = 0; j < codewords * kLanes; ++j) sums_[j] = 0.0f;
        stage(static_cast<const int64_t*>(a_.indices.data) + (group * s_.n + first) * s_.stages + i, n,
              codewords);
        float* out = static_cast<float*>(a_.sums.data) + row * s_.dim + d;
        for (int64_t k = 0; k < codewords; ++k)
          for (int64_t j = 0; j < width; ++j)
            out[k * s_.dim + j] = sums_[k * kLanes + j] + (first > 0 ? out[k * s_.dim + j] : 0.0f);
        row += codewords;
      }
      first += kRows;
    } while (first < s_.n);
  }

 private:
  void stage(const int64_t* indices, int64_t n, int64_t codewords) {
    for (int64_t r = 0; r < n; ++r) {
      const int64_t k = indices[r * s_.stages];
      if (static_cast<uint64_t>(k) >= static_cast<uint64_t>(codewords)) continue;
      float *residual = residual_.get() + r * kLanes, *sum = sums_.get() + k * kLanes;
      const Vf before = load(residual), after = before - load(words_.get() + k * kLanes);
      store(sum, load(sum) + (a_.differences ? after : before));
      store(residual, after);
      round_row(residual, kLanes, a_.x.dtype);
    }
  }

  const ResidualStatisticsArgs& a_;
  const Sizes& s_;
  Scratch<float> residual_, words_, sums_;
};

// False where an index is none of a codeword.
inline bool count(const ResidualStatisticsArgs& a, const Sizes& s, int64_t group, int64_t offset) {
  const int64_t* indices = static_cast<const int64_t*>(a.indices.data) + group * s.n * s.stages;
  bool valid = true;
  float* counts = static_cast<float*>(a.counts.data) + offset;
  for (int64_t i = 0; i < s.stages; ++i) {
    const int64_t codewords = a.codebooks[group * s.stages + i].shape[0];
    Scratch<int64_t> found(codewords, 0);
    for (int64_t r = 0; r < s.n; ++r) {
      const int64_t k = indices[r * s.stages + i];
      if (k >= 0 && k < codewords)
        ++found[k];
      else
        valid &= k < 0;
    }
    for (int64_t k = 0; k < codewords; ++k) counts[k] = static_cast<float>(found[k]);
    counts += codewords;
  }
  return valid;
}

inline void statistics(const ResidualStatisticsArgs& a) {
  const Sizes s(a);
  const int64_t slices = s.pitch / kLanes;
  int64_t most = 0;
  Scratch<int64_t> offset(s.groups);
  Scratch<uint8_t> valid(s.groups);
  for (int64_t i = 0, row = 0; i < a.n_codebooks; ++i) {
    if (i % s.stages == 0) offset[i / s.stages] = row;
    row += a.codebooks[i].shape[0];
    most = std::max(most, a.codebooks[i].shape[0]);
  }
  [[maybe_unused]] const bool large = static_cast<double>(s.groups * s.n) * s.dim * s.stages > 1e5;
#pragma omp parallel if (large)
  {
    Subnormals mine;
    Sums sums(a, s, most);
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < s.groups * (slices + 1); ++t) {
      const int64_t group = t / (slices + 1), slice = t % (slices + 1);
      if (slice < slices)
        sums.run(group, slice * kLanes, offset[group]);
      else
        valid[group] = count(a, s, group, offset[group]);
    }
  }
  for (int64_t g = 0; g < s.groups; ++g)
    if (!valid[g])
      throw std::invalid_argument("residual_codebook_statistics: indices has some beyond their codebook");
}

}  // namespace residual
}  // namespace GENPERF_ISA
}  // namespace genperf
