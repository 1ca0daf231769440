// How the elements of samples are shared out among threads, and summed.
//
// How a sample is cut depends on its size and the elements of an access alone, never on the batch or
// the device: a sum has the same bits in every batch and on every device.
#pragma once

#include "cuda.h"

namespace genperf {

inline constexpr int kBlockTeam = 256;

// Who works on what: a team of threads (a power of two of lanes, up to a warp; or a whole block) takes
// one slice of one sample.
struct Teams {
  int64_t samples = 0, elements = 0, slices = 1, slice = 0;  // slices a sample, elements a slice
  int team = 1, block = 1;                                   // threads

  Teams() = default;
  // `most`: elements of a slice at most.
  Teams(int64_t samples, int64_t elements, int width, int64_t most) : samples(samples), elements(elements) {
    slices = elements > most ? (elements + most - 1) / most : 1;
    const int64_t even = (elements + slices - 1) / slices;
    slice = (even + 127) / 128 * 128;  // whole accesses, whole cache lines
    if (elements <= 4 * 32 * width) {  // at most four accesses a lane: no more than a warp
      for (team = 1; team < 32 && team * width < elements;) team *= 2;
      block = 128;
    } else {
      team = block = kBlockTeam;
    }
  }

  dim3 grid() const {
    const int64_t per_block = block / team;
    return dim3(static_cast<unsigned>((samples * slices + per_block - 1) / per_block));
  }
};

// The calling thread's part: elements first + k * step of `sample`, k = 0, 1, ... below `last`.
struct Part {
  int64_t sample, slice, first, last;
  int step;
  bool leads;  // writes what the team has summed

  __device__ __forceinline__ Part(const Teams& t, int width) {
    int64_t item = blockIdx.x;
    int lane = threadIdx.x;
    if (t.team < t.block) {
      item = item * (t.block / t.team) + lane / t.team;
      lane %= t.team;
    }
    sample = item;
    slice = 0;
    if (t.slices > 1) {
      sample = item / t.slices;
      slice = item - sample * t.slices;
    }
    int64_t start = slice * t.slice;
    last = sample >= t.samples ? 0 : start + t.slice < t.elements ? start + t.slice : t.elements;
    first = start + lane * width;
    step = t.team * width;
    leads = lane == 0 && sample < t.samples;
  }
};

// Sums over the threads of each team, in an order that `team` alone decides. Every thread of the
// block takes part, once a kernel; the sums are right in each team's first thread.
template <int kSums>
__device__ __forceinline__ void team_sum(double (&x)[kSums], int team) {
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    for (int distance = (team < 32 ? team : 32) / 2; distance > 0; distance /= 2) {
      x[k] += __shfl_xor_sync(~0u, x[k], distance);
    }
  }
  if (team <= 32) return;
  constexpr int kWarps = kBlockTeam / 32, kCells = kSums * kWarps;
  GENPERF_SHARED(double, warp_sum, kCells);
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) warp_sum[k * kWarps + threadIdx.x / 32] = x[k];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      x[k] = 0.0;
      for (int w = 0; w < kWarps; ++w) x[k] += warp_sum[k * kWarps + w];
    }
  }
}

}  // namespace genperf
