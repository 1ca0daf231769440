// What the templates of math.h and philox.h need of their element type F: plain float, as defined here,
// or the block of 16 floats of simd.h, on which the same names and operators work.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef __CUDACC__
#define GENPERF_HD __host__ __device__ __forceinline__
#else
#define GENPERF_HD inline __attribute__((always_inline))
#endif

// The CPU kernels are built once per instruction set, each in an inline namespace of its own, so that
// the linker never takes one build's function for another's.
#ifndef GENPERF_ISA
#define GENPERF_ISA scalar
#else
#define GENPERF_VECTORS 1
#endif

namespace genperf {
inline namespace GENPERF_ISA {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

namespace detail {
template <class F, class = void>
struct Lanes;
template <>
struct Lanes<float> {
  using Int = int32_t;
  using Uint = uint32_t;
};
}  // namespace detail

template <class F>
using IntOf = typename detail::Lanes<F>::Int;
template <class F>
using UintOf = typename detail::Lanes<F>::Uint;

// splat<T>(x): x in every lane.
template <class T, class S>
GENPERF_HD T splat(S x) {
  if constexpr (std::is_arithmetic_v<T>) {
    return static_cast<T>(x);
  } else {
    return x - T{};  // x, bit for bit (unlike x + 0)
  }
}

// select(mask, a, b): a where the mask holds, else b.
template <class T>
GENPERF_HD T select(bool mask, T a, T b) {
  return mask ? a : b;
}

GENPERF_HD int32_t to_bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_int(x);
#else
  int32_t i;
  std::memcpy(&i, &x, sizeof i);
  return i;
#endif
}

// from_bits<F>(i): the float whose bits are i.
template <class F, class I>
GENPERF_HD F from_bits(I i) {
  if constexpr (std::is_arithmetic_v<F>) {
#ifdef __CUDA_ARCH__
    return __int_as_float(i);
#else
    F x;
    std::memcpy(&x, &i, sizeof x);
    return x;
#endif
  } else {
    return static_cast<F>(i);
  }
}

GENPERF_HD float floats_of(int32_t i) { return static_cast<float>(i); }
GENPERF_HD float abs(float x) { return std::fabs(x); }
GENPERF_HD float sqrt_rn(float x) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(x);
#else
  return std::sqrt(x);
#endif
}

}  // namespace GENPERF_ISA
}  // namespace genperf

#ifdef GENPERF_VECTORS
#include "simd.h"
#endif
