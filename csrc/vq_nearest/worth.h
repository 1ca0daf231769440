// Whether scores of bytes save time, which depends on how many candidates they leave. Where codewords are
// close to each other for their distance from the centre, float32 is faster. Either gives the same results.
#pragma once

#include "plan.h"

namespace genperf {
namespace GENPERF_ISA {
namespace vq {

// What was saved so far, which several threads count in.
class Worth {
 public:
  Worth(int64_t codewords, int64_t dim, Metric metric)
      : float_(static_cast<double>(codewords) * (dim / 15.5 + 0.4)),
        bytes_(static_cast<double>(codewords) * (dim / 44.0 + 0.5)),
        ranked_(24.0 + (metric == Metric::kL2 ? 0.7 : 1.6) * dim),
        saved_(static_cast<int64_t>(48.0 * (float_ - bytes_))) {}

  // Whether it may be, by the numbers alone.
  static bool likely(int64_t n, int64_t codewords, int64_t dim) {
    return n >= 512 && codewords >= 64 && dim >= 24 && dim <= 1 << 16;
  }

  bool holds() const { return __atomic_load_n(&saved_, __ATOMIC_RELAXED) >= 0; }
  void give_up() { __atomic_store_n(&saved_, -1, __ATOMIC_RELAXED); }

  // `n` vectors, `ranked` candidates, and `left` vectors that take another search.
  void count(int64_t n, int64_t ranked, int64_t left) {
    const double saved = static_cast<double>(n) * (float_ - bytes_) - static_cast<double>(ranked) * ranked_ -
                         static_cast<double>(left) * float_;
    __atomic_fetch_add(&saved_, static_cast<int64_t>(saved), __ATOMIC_RELAXED);
  }

 private:
  const double float_, bytes_, ranked_;  // cycles of a vector and of a candidate, roughly
  int64_t saved_;
};

}  // namespace vq
}  // namespace GENPERF_ISA
}  // namespace genperf
