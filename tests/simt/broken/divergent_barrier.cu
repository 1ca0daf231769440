// Each element plus its left neighbour in the block. Broken: threads past the end leave before the barrier.
#include "common/cuda.h"

constexpr int kThreads = 64;

__global__ void add_left(const float* x, float* out, int n) {
  GENPERF_DYNAMIC_SHARED(float, buffer);
  const int i = blockIdx.x * kThreads + threadIdx.x;
#ifdef BROKEN
  if (i >= n) return;
#endif
  if (i < n) buffer[threadIdx.x] = x[i];
  __syncthreads();
  if (i < n) out[i] = x[i] + (threadIdx.x > 0 ? buffer[threadIdx.x - 1] : 0.0f);
}

// x, out: [n].
extern "C" const char* run(const float* x, float* out, int n) {
  return simt::catch_faults([=] {
    GENPERF_LAUNCH(add_left, (n + kThreads - 1) / kThreads, kThreads, kThreads * sizeof(float), nullptr, x,
                   out, n);
  });
}
