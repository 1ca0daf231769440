// Reverses each 32 elements through shared memory. Broken: relies on the lanes of a warp running in step.
#include "common/cuda.h"

__global__ void reverse(const float* x, float* out) {
  GENPERF_SHARED(float, buffer, 32);
  buffer[threadIdx.x] = x[blockIdx.x * 32 + threadIdx.x];
#ifndef BROKEN
  __syncwarp();
#endif
  out[blockIdx.x * 32 + threadIdx.x] = buffer[31 - threadIdx.x];
}

// x, out: [n, 32].
extern "C" const char* run(const float* x, float* out, int n) {
  return simt::catch_faults([=] { GENPERF_LAUNCH(reverse, n, 32, 0, nullptr, x, out); });
}
