// The team of head.h on a GPU: one warp, two blocks of 16 classes at a time.
#pragma once

#include "../common/cuda.h"
#include "head.h"

namespace genperf::pixel {
inline namespace GENPERF_ISA {

// All 32 lanes of the warp take part in each call, and `scratch` is shared by them: shared or global memory.
struct Warp {
  using F = float;
  using I = int32_t;
  static constexpr unsigned kAll = 0xffffffffu;

  __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }
  __device__ __forceinline__ int lanes() const { return 32; }
  __device__ __forceinline__ int block() const { return lane() / kLeaf; }
  __device__ __forceinline__ int step() const { return 2; }
  __device__ __forceinline__ void sync() const { __syncwarp(kAll); }
  // Volatile: another block of the launch may have written it, which the first-level cache does not see.
  __device__ __forceinline__ float read(const float* p) const {
    return *static_cast<const volatile float*>(p);
  }
  __device__ __forceinline__ F load(const float* p, int b) const { return p[index(b)]; }
  __device__ __forceinline__ void store(float* p, int b, F x) const { p[index(b)] = x; }
  __device__ __forceinline__ void put(float* p, int b, float x) const {
    if (lane() % kLeaf == 0) p[b] = x;
  }
  __device__ __forceinline__ I index(int b) const { return b * kLeaf + lane() % kLeaf; }
  __device__ __forceinline__ float sum(F x) const {
    for (int half = kLeaf / 2; half > 0; half /= 2) x = x + __shfl_xor_sync(kAll, x, half);
    return x;
  }
  __device__ __forceinline__ float maximum(F x) const {
    for (int half = 16; half > 0; half /= 2) {
      const float other = __shfl_xor_sync(kAll, x, half);
      x = x > other ? x : other;
    }
    return x;
  }
  __device__ __forceinline__ int total(I n) const {
    for (int half = 16; half > 0; half /= 2) n += __shfl_xor_sync(kAll, n, half);
    return n;
  }
};

}  // namespace GENPERF_ISA
}  // namespace genperf::pixel
