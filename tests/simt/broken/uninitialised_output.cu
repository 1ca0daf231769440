// Doubles n elements, four a thread. Broken: the last n % 4 are never written.
#include "common/cuda.h"

__global__ void twice(const float* x, float* out, int n) {
  const int first = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
  if (first + 4 <= n) {
    for (int i = first; i < first + 4; ++i) out[i] = 2.0f * x[i];
#ifndef BROKEN
  } else {
    for (int i = first; i < n; ++i) out[i] = 2.0f * x[i];
#endif
  }
}

// x, out: [n].
extern "C" const char* run(const float* x, float* out, int n) {
  return simt::catch_faults([=] { GENPERF_LAUNCH(twice, (n + 127) / 128, 32, 0, nullptr, x, out, n); });
}
