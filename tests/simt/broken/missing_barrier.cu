// The sum of a block's elements, one partial sum a warp. Broken: the first warp reads the partial sums
// before the others have surely written them.
#include "common/cuda.h"

constexpr int kThreads = 128;

__global__ void block_sum(const float* x, float* out) {
  GENPERF_SHARED(float, partial, kThreads / 32);
  float sum = x[blockIdx.x * kThreads + threadIdx.x];
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
#ifndef BROKEN
  __syncthreads();
#endif
  if (threadIdx.x == 0) {
    sum = 0.0f;
    for (int w = 0; w < kThreads / 32; ++w) sum += partial[w];
    out[blockIdx.x] = sum;
  }
}

// x: [n, 128]. out: [n].
extern "C" const char* run(const float* x, float* out, int n) {
  return simt::catch_faults([=] { GENPERF_LAUNCH(block_sum, n, kThreads, 0, nullptr, x, out); });
}
