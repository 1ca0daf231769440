// What the kernel of each instruction set is given: one head's vectors and codebook.
#pragma once

#include "vq_nearest.h"

namespace genperf {

struct VqSearch {
  View x;         // [*, D]
  View codebook;  // [K, D]
  int64_t* indices;
  float* distances;  // may be null
  int64_t n, codewords, dim, k;
  Metric metric;
};

// Whether the codewords a and b are at different distances from x, exactly: negative where a is nearer, 0
// where they are equally near, positive where b is.
int compare_exactly(Metric metric, const float* x, const float* a, const float* b, int64_t dim);

// Subnormal numbers are numbers, whatever the thread's settings; these are restored at the end.
class Subnormals {
 public:
  Subnormals();
  ~Subnormals();
  Subnormals(const Subnormals&) = delete;

 private:
  unsigned saved_ = 0;
};

}  // namespace genperf
