// How a kernel source reaches CUDA: launches, shared memory, barriers of grids and clusters. The same macros
// map to the execution model of tests/simt under -DGENPERF_SIMT, so that every kernel also runs on a host.
//
//   GENPERF_LAUNCH(kernel, grid, block, shared_bytes, stream, args...)
//   GENPERF_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, args...)
//   GENPERF_LAUNCH_CLUSTER(kernel, grid, block, cluster, shared_bytes, stream, args...)
//   GENPERF_SHARED(type, name, count);         type name[count] in static shared memory
//   GENPERF_DYNAMIC_SHARED(type, name);        type* name, the shared_bytes of the launch
//
// `kernel` may be a template instance in parentheses. A launch that fails leaves its error to
// cudaGetLastError(), which the launchers return.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef GENPERF_SIMT

#include "simt.h"

#define GENPERF_LAUNCH(kernel, ...) ::simt::launch(false, kernel, __VA_ARGS__)
#define GENPERF_LAUNCH_COOPERATIVE(kernel, ...) ::simt::launch(true, kernel, __VA_ARGS__)
#define GENPERF_LAUNCH_CLUSTER(kernel, ...) ::simt::launch_cluster(kernel, __VA_ARGS__)

#define GENPERF_SHARED(type, name, count) \
  static char name##_variable;            \
  auto& name =                            \
      *reinterpret_cast<type(*)[count]>(::simt::static_shared(&name##_variable, sizeof(type) * (count)))
#define GENPERF_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::simt::dynamic_shared())

namespace genperf {

inline void grid_sync(simt::Site site = simt::Site::here()) { simt::grid_barrier(site); }
inline void cluster_sync(simt::Site site = simt::Site::here()) { simt::cluster_barrier(site); }

template <class Kernel>
int max_clusters(Kernel, unsigned, unsigned size, size_t) {
  return size <= simt::kClusterLimit ? 8 : 0;
}

}  // namespace genperf

#else

#include <cuda_runtime.h>

#ifdef __CUDACC__

#include <cooperative_groups.h>

#include <utility>

#define GENPERF_LAUNCH(kernel, ...) ::genperf::launch(false, kernel, __VA_ARGS__)
#define GENPERF_LAUNCH_COOPERATIVE(kernel, ...) ::genperf::launch(true, kernel, __VA_ARGS__)
#define GENPERF_LAUNCH_CLUSTER(kernel, ...) ::genperf::launch_cluster(kernel, __VA_ARGS__)

#define GENPERF_SHARED(type, name, count) __shared__ type name[count]
#define GENPERF_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char genperf_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(genperf_dynamic_shared)

namespace genperf {

template <class... Parameters, class... Arguments>
void launch(bool cooperative, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            void* stream, Arguments&&... arguments) {
  if (shared_bytes > 48 << 10) {
    cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(shared_bytes));
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// Clusters of up to 8 blocks run on every device of compute capability 9.0; up to 16 where it allows.
template <class... Parameters>
cudaLaunchConfig_t cluster_config(void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster,
                                  size_t shared_bytes, cudaLaunchAttribute& attribute) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (cluster > 8) cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return config;
}

template <class... Parameters, class... Arguments>
void launch_cluster(void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster,
                    size_t shared_bytes, void* stream, Arguments&&... arguments) {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config = cluster_config(kernel, grid, block, cluster, shared_bytes, attribute);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// How many such clusters the device runs at once; 0 where it runs none.
template <class... Parameters>
int max_clusters(void (*kernel)(Parameters...), unsigned block, unsigned cluster, size_t shared_bytes) {
  cudaLaunchAttribute attribute{};
  const cudaLaunchConfig_t config = cluster_config(kernel, cluster, block, cluster, shared_bytes, attribute);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
    cudaGetLastError();  // the refusal is the answer
    return 0;
  }
  return clusters;
}

__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }

// A barrier of all threads of the cluster, which come in whole warps.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#elif defined(__CUDA_ARCH__)
  __trap();
#endif
}

}  // namespace genperf

#endif  // __CUDACC__
#endif  // GENPERF_SIMT
