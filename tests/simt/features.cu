// One small kernel for each thing that the execution model offers or reports; tests/test_simt.py knows
// what each must give.
#include "common/cuda.h"

namespace {

__global__ void shuffles(int* out, int width) {
  const int lane = threadIdx.x;
  int* row = out + 4 * lane;
  row[0] = __shfl_sync(~0u, lane, 5, width);
  row[1] = __shfl_up_sync(~0u, lane, 3, width);
  row[2] = __shfl_down_sync(~0u, lane, 3, width);
  row[3] = __shfl_xor_sync(~0u, lane, 6, width);
}

__global__ void wide_shuffle(double* out) { out[threadIdx.x] = __shfl_xor_sync(~0u, 0.1 * threadIdx.x, 1); }

// The lanes of two halves of a warp vote apart.
__global__ void votes(unsigned* out) {
  const unsigned lane = threadIdx.x, half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  out[3 * lane] = __ballot_sync(half, lane % 3 == 0);
  out[3 * lane + 1] = __any_sync(half, lane == 20);
  out[3 * lane + 2] = __all_sync(half, lane < 16);
}

__global__ void block_votes(int* out) {
  out[3 * threadIdx.x] = __syncthreads_count(threadIdx.x % 3 == 0);
  out[3 * threadIdx.x + 1] = __syncthreads_or(threadIdx.x == 95);
  out[3 * threadIdx.x + 2] = __syncthreads_and(threadIdx.x < 95);
}

__global__ void indices(unsigned* out) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * (blockDim.x * blockDim.y * blockDim.z) + thread] = 1000 * block + thread;
}

__global__ void atomics(int* i, unsigned long long* u, float* f, double* d) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&i[0], 1);
  atomicMin(&i[1], -thread);
  atomicMax(&i[2], thread);
  atomicExch(&i[3], 7);
  atomicCAS(&i[4], 0, 9);
  atomicInc(reinterpret_cast<unsigned*>(&i[5]), 9);
  atomicAdd(&u[0], 1ull << 33);
  atomicAdd(f, 0.5f);
  atomicAdd(d, 0.25);
}

// A value that the last of the blocks to arrive writes, having seen what the others wrote.
__global__ void last_block(int* tickets, int* values, int* out) {
  GENPERF_SHARED(int, is_last, 1);
  if (threadIdx.x == 0) {
    values[blockIdx.x] = blockIdx.x + 1;
    __threadfence();
    is_last[0] = atomicAdd(tickets, 1) == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (!is_last[0] || threadIdx.x != 0) return;
  for (unsigned i = 0; i < gridDim.x; ++i) *out += values[i];
}

// Each block takes the value of the block after it, twice, across grid barriers.
__global__ void pass_on(int* values, int* out) {
  const int next = (blockIdx.x + 1) % gridDim.x;
  if (threadIdx.x == 0) values[blockIdx.x] = blockIdx.x;
  genperf::grid_sync();
  const int received = values[next];
  genperf::grid_sync();
  if (threadIdx.x == 0) values[blockIdx.x] = received;
  genperf::grid_sync();
  if (threadIdx.x == 0) out[blockIdx.x] = values[next];
}

// The same around each cluster of two blocks.
__global__ void pass_on_in_pairs(int* values, int* out) {
  if (threadIdx.x == 0) values[blockIdx.x] = blockIdx.x;
  genperf::cluster_sync();
  const int received = values[blockIdx.x ^ 1];
  genperf::cluster_sync();
  if (threadIdx.x == 0) out[blockIdx.x] = received;
}

__global__ void unequal_cluster_sync() {
  if (blockIdx.x != 2) genperf::cluster_sync();
}

__global__ void wait_for_block_1(volatile int* flag) {
  if (blockIdx.x == 1) *flag = 1;
  while (!*flag) __nanosleep(100);
}

__global__ void read_shared(float* fixed, float* dynamic) {
  GENPERF_SHARED(float, a, 32);
  GENPERF_DYNAMIC_SHARED(float, b);
  fixed[threadIdx.x] = a[threadIdx.x];
  dynamic[threadIdx.x] = b[threadIdx.x];
}

__global__ void write_shared(int at) {
  GENPERF_DYNAMIC_SHARED(float, buffer);
  if (threadIdx.x == 0) buffer[at] = 1.0f;
}

__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void mismatched_exchange() {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __shfl_sync(~0u, 1, 0);
  }
}

__global__ void outside_mask() { __syncwarp(0xfffe); }

__global__ void early_exit(float* out) {
  if (threadIdx.x >= 20) return;
  out[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 8);
}

__global__ void trapped() {
  if (threadIdx.x == 3) __trap();
}

__global__ void unequal_grid_sync() {
  if (blockIdx.x != 2) genperf::grid_sync();
}

}  // namespace

#define FEATURE(name, parameters, launch)        \
  extern "C" const char* run_##name parameters { \
    return simt::catch_faults([=] { launch; });  \
  }

FEATURE(shuffles, (int* out, int width), GENPERF_LAUNCH(shuffles, 1, 32, 0, nullptr, out, width))
FEATURE(wide_shuffle, (double* out), GENPERF_LAUNCH(wide_shuffle, 1, 32, 0, nullptr, out))
FEATURE(votes, (unsigned* out), GENPERF_LAUNCH(votes, 1, 32, 0, nullptr, out))
FEATURE(block_votes, (int* out), GENPERF_LAUNCH(block_votes, 1, 96, 0, nullptr, out))
FEATURE(indices, (unsigned* out), GENPERF_LAUNCH(indices, dim3(2, 3, 2), dim3(5, 2, 3), 0, nullptr, out))
FEATURE(atomics, (int* i, unsigned long long* u, float* f, double* d),
        GENPERF_LAUNCH(atomics, 3, 50, 0, nullptr, i, u, f, d))
FEATURE(last_block, (int* tickets, int* values, int* out),
        GENPERF_LAUNCH(last_block, 9, 40, 0, nullptr, tickets, values, out))
FEATURE(pass_on, (int* values, int* out), GENPERF_LAUNCH_COOPERATIVE(pass_on, 7, 33, 0, nullptr, values, out))
FEATURE(pass_on_in_pairs, (int* values, int* out),
        GENPERF_LAUNCH_CLUSTER(pass_on_in_pairs, 6, 33, 2, 0, nullptr, values, out))
FEATURE(plain_pass_on_in_pairs, (int* values, int* out),
        GENPERF_LAUNCH(pass_on_in_pairs, 6, 33, 0, nullptr, values, out))
FEATURE(unequal_cluster_sync, (), GENPERF_LAUNCH_CLUSTER(unequal_cluster_sync, 4, 8, 2, 0, nullptr))
FEATURE(clusters, (unsigned grid, unsigned cluster),
        GENPERF_LAUNCH_CLUSTER(unequal_cluster_sync, grid, 8, cluster, 0, nullptr))
FEATURE(plain_pass_on, (int* values, int* out), GENPERF_LAUNCH(pass_on, 7, 33, 0, nullptr, values, out))
FEATURE(wait_for_block_1, (int* flag), GENPERF_LAUNCH_COOPERATIVE(wait_for_block_1, 2, 1, 0, nullptr, flag))
FEATURE(wait_forever, (int* flag), GENPERF_LAUNCH_COOPERATIVE(wait_for_block_1, 1, 1, 0, nullptr, flag))
FEATURE(read_shared, (float* fixed, float* dynamic),
        GENPERF_LAUNCH(read_shared, 1, 32, 128, nullptr, fixed, dynamic))
FEATURE(write_shared, (int at), GENPERF_LAUNCH(write_shared, 1, 32, 128, nullptr, at))
FEATURE(two_barriers, (), GENPERF_LAUNCH(two_barriers, 1, 64, 0, nullptr))
FEATURE(mismatched_exchange, (), GENPERF_LAUNCH(mismatched_exchange, 1, 32, 0, nullptr))
FEATURE(outside_mask, (), GENPERF_LAUNCH(outside_mask, 1, 32, 0, nullptr))
FEATURE(early_exit, (float* out), GENPERF_LAUNCH(early_exit, 1, 32, 0, nullptr, out))
FEATURE(trapped, (), GENPERF_LAUNCH(trapped, 1, 32, 0, nullptr))
FEATURE(unequal_grid_sync, (), GENPERF_LAUNCH_COOPERATIVE(unequal_grid_sync, 4, 8, 0, nullptr))
FEATURE(launch, (unsigned grid, unsigned block, int shared_bytes),
        GENPERF_LAUNCH(write_shared, grid, block, shared_bytes, nullptr, 0))
