// CUDA's device language for a host compiler: the same kernel sources run as fibers, one a thread.
// The spellings below are CUDA's own; what they do is in simt.cpp, and what is modelled in README.md.
#pragma once

#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaError_t = int;
using cudaStream_t = void*;
inline constexpr cudaError_t cudaSuccess = 0;
// A fault throws simt::Error instead.
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

inline constexpr int warpSize = 32;
inline dim3 gridDim, blockDim;
inline uint3 blockIdx, threadIdx;

namespace simt {

// A fault of the kernel under test: a barrier that not all threads reach, an overrun, a bad launch.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A place in the source, for reports; as a default argument, the caller's.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// What the lanes of a warp brought to a collective operation; `present` has a bit a lane that came.
struct Lanes {
  uint32_t present;
  uint64_t value[warpSize];
};

// Called by the threads of a kernel. Each returns when all that it names have come.
Lanes exchange(const char* operation, uint32_t mask, uint64_t value, Site site);
unsigned block_barrier(const char* operation, bool predicate, Site site);  // threads with a true predicate
void grid_barrier(Site site);
void cluster_barrier(Site site);

void* static_shared(const void* variable, size_t bytes);  // one array a block for each variable
void* dynamic_shared();

void interleave();  // another thread may run here, if the schedule says so
void yield();       // every other thread runs before this one goes on
[[noreturn]] void trap(const char* message, Site site);

inline constexpr unsigned kClusterLimit = 16;

// Runs `body` once for each thread of the grid, whose blocks form clusters of `cluster` (0: no clusters).
// Throws Error.
void run(dim3 grid, dim3 block, size_t shared_bytes, bool cooperative, unsigned cluster,
         const std::function<void()>& body);

template <class... Parameters, class... Arguments>
void launch(bool cooperative, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t, Arguments&&... arguments) {
  std::tuple<std::decay_t<Parameters>...> parameters(std::forward<Arguments>(arguments)...);
  run(grid, block, shared_bytes, cooperative, 0, [&] { std::apply(kernel, parameters); });
}

template <class... Parameters, class... Arguments>
void launch_cluster(void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster,
                    size_t shared_bytes, cudaStream_t, Arguments&&... arguments) {
  std::tuple<std::decay_t<Parameters>...> parameters(std::forward<Arguments>(arguments)...);
  run(grid, block, shared_bytes, false, cluster, [&] { std::apply(kernel, parameters); });
}

// For callers that cannot take exceptions: what is wrong, or null.
template <class Launch>
const char* catch_faults(Launch launch) {
  static std::string message;
  try {
    launch();
    return nullptr;
  } catch (const Error& error) {
    message = error.what();
    return message.c_str();
  }
}

template <class T>
struct Same {
  using type = T;  // keeps an argument out of template deduction
};

template <class T>
uint64_t pack(T x) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

template <class T>
T unpack(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline unsigned linear_thread() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

inline int lane_id() { return linear_thread() % warpSize; }
inline int segment_first(int width) { return lane_id() & ~(width - 1); }
inline int segment_last(int width) { return lane_id() | (width - 1); }

// The value that lane `source` brought: the caller's own where the source is out of reach, poison
// where that lane did not come.
template <class T>
T shuffle(const char* operation, uint32_t mask, T value, int source, bool reachable, Site site) {
  Lanes lanes = exchange(operation, mask, pack(value), site);
  if (!reachable) return value;
  return unpack<T>(lanes.present >> source & 1 ? lanes.value[source] : ~uint64_t{0});
}

template <class T, class Update>
T atomic(T* address, Update update) {
  interleave();
  T old = *address;
  *address = update(old);
  return old;
}

}  // namespace simt

inline void __syncthreads(simt::Site site = simt::Site::here()) {
  simt::block_barrier("__syncthreads", false, site);
}
inline int __syncthreads_count(int predicate, simt::Site site = simt::Site::here()) {
  return simt::block_barrier("__syncthreads_count", predicate, site);
}
inline int __syncthreads_or(int predicate, simt::Site site = simt::Site::here()) {
  return simt::block_barrier("__syncthreads_or", predicate, site) > 0;
}
inline int __syncthreads_and(int predicate, simt::Site site = simt::Site::here()) {
  return simt::block_barrier("__syncthreads_and", !predicate, site) == 0;
}

inline void __syncwarp(uint32_t mask = ~0u, simt::Site site = simt::Site::here()) {
  simt::exchange("__syncwarp", mask, 0, site);
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int lane, int width = warpSize, simt::Site site = simt::Site::here()) {
  int source = simt::segment_first(width) + (lane & (width - 1));
  return simt::shuffle("__shfl_sync", mask, value, source, true, site);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int delta, int width = warpSize,
                 simt::Site site = simt::Site::here()) {
  int source = simt::lane_id() - delta;
  return simt::shuffle("__shfl_up_sync", mask, value, source, source >= simt::segment_first(width), site);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int delta, int width = warpSize,
                   simt::Site site = simt::Site::here()) {
  int source = simt::lane_id() + delta;
  return simt::shuffle("__shfl_down_sync", mask, value, source, source <= simt::segment_last(width), site);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = warpSize,
                  simt::Site site = simt::Site::here()) {
  int source = simt::lane_id() ^ lanes;
  return simt::shuffle("__shfl_xor_sync", mask, value, source, source <= simt::segment_last(width), site);
}
inline unsigned __ballot_sync(uint32_t mask, int predicate, simt::Site site = simt::Site::here()) {
  simt::Lanes lanes = simt::exchange("__ballot_sync", mask, predicate != 0, site);
  unsigned ballot = 0;
  for (int lane = 0; lane < warpSize; ++lane) {
    if (lanes.present >> lane & 1) ballot |= static_cast<unsigned>(lanes.value[lane]) << lane;
  }
  return ballot;
}
inline int __any_sync(uint32_t mask, int predicate, simt::Site site = simt::Site::here()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, simt::Site site = simt::Site::here()) {
  return __ballot_sync(mask, !predicate, site) == 0;
}

inline void __threadfence() { simt::interleave(); }
inline void __threadfence_block() { simt::interleave(); }
inline void __nanosleep(unsigned) { simt::yield(); }
inline void __trap(simt::Site site = simt::Site::here()) { simt::trap("__trap", site); }

template <class T>
T atomicAdd(T* p, typename simt::Same<T>::type x) {
  return simt::atomic(p, [=](T old) { return static_cast<T>(old + x); });
}
template <class T>
T atomicMin(T* p, typename simt::Same<T>::type x) {
  return simt::atomic(p, [=](T old) { return x < old ? x : old; });
}
template <class T>
T atomicMax(T* p, typename simt::Same<T>::type x) {
  return simt::atomic(p, [=](T old) { return x > old ? x : old; });
}
template <class T>
T atomicAnd(T* p, typename simt::Same<T>::type x) {
  return simt::atomic(p, [=](T old) { return old & x; });
}
template <class T>
T atomicOr(T* p, typename simt::Same<T>::type x) {
  return simt::atomic(p, [=](T old) { return old | x; });
}
template <class T>
T atomicExch(T* p, typename simt::Same<T>::type x) {
  return simt::atomic(p, [=](T) { return x; });
}
template <class T>
T atomicCAS(T* p, typename simt::Same<T>::type expected, typename simt::Same<T>::type x) {
  return simt::atomic(p, [=](T old) { return old == expected ? x : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return simt::atomic(p, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T x) {
  *p = x;
}
inline int __float_as_int(float x) { return simt::unpack<int>(simt::pack(x)); }
inline unsigned __float_as_uint(float x) { return simt::unpack<unsigned>(simt::pack(x)); }
inline float __int_as_float(int x) { return simt::unpack<float>(simt::pack(x)); }
inline float __uint_as_float(unsigned x) { return simt::unpack<float>(simt::pack(x)); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<uint64_t>(x) * y >> 32; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
