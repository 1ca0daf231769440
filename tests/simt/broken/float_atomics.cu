// The sum of all elements, 32 a block. Broken: blocks add to the sum in the order in which they come.
#include "common/cuda.h"

__global__ void add_blocks(const float* x, float* partial, float* out) {
  float sum = x[blockIdx.x * 32 + threadIdx.x];
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (threadIdx.x != 0) return;
#ifdef BROKEN
  atomicAdd(out, sum);
#else
  partial[blockIdx.x] = sum;
#endif
}

__global__ void add_partial(const float* partial, float* out, int n) {
  for (int i = 0; i < n; ++i) *out += partial[i];
}

// x: [n, 32]. out: [1 + n], the sum, 0 at first, and space for the blocks' sums.
extern "C" const char* run(const float* x, float* out, int n) {
  return simt::catch_faults([=] {
    GENPERF_LAUNCH(add_blocks, n, 32, 0, nullptr, x, out + 1, out);
#ifndef BROKEN
    GENPERF_LAUNCH(add_partial, 1, 1, 0, nullptr, out + 1, out, n);
#endif
  });
}
