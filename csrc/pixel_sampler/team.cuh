// The barrier of a team of blocks: a thread-block cluster, or part of a cooperative grid.
#pragma once

#include "../common/cuda.h"

namespace genperf::pixel {

__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
#ifdef GENPERF_SIMT
  __nanosleep(0);
  return *p;
#elif defined(__CUDA_ARCH__)
  unsigned x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
#else
  return *p;
#endif
}

// All threads of the team's blocks; what they wrote before is seen by all after.
//
// In a grid, member 0 adds what is missing to the upper half of the range and each other member 1, so
// that the uppermost bit flips when all have come: the counter is ready for the next barrier, and for
// the next launch.
template <bool kCluster>
__device__ __forceinline__ void team_barrier(unsigned* arrived, int rank, int size) {
  if constexpr (kCluster) {
    cluster_sync();
  } else {
    __syncthreads();
    if (threadIdx.x == 0 && size > 1) {
      __threadfence();
      const unsigned add = rank == 0 ? 0x80000000u - static_cast<unsigned>(size - 1) : 1u;
      const unsigned before = atomicAdd(arrived, add);
      while (((load_acquire(arrived) ^ before) & 0x80000000u) == 0) {
      }
      __threadfence();
    }
    __syncthreads();
  }
}

}  // namespace genperf::pixel
