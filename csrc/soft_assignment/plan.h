// What the kernels of each instruction set are given: one head's vectors and codebook.
#pragma once

#include "soft_assignment.h"

namespace genperf {

struct SoftAssignmentHead {
  View x;         // [*, D]
  View codebook;  // [K, D]
  const int64_t* targets;
  // Results, or cotangents.
  float *log_sum_exp, *entropy, *mean_prob, *nll;
  void *grad_x, *grad_codebook;  // contiguous
  int64_t n, codewords, dim;
  Score score;
  double temperature;
};

}  // namespace genperf
