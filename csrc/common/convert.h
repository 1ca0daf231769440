// float16 and bfloat16 to float32 and back: round to nearest even, NaN stays NaN. By bits, or by the
// GPU's own instructions.
#pragma once

#include "lanes.h"
#include "view.h"

namespace genperf {
inline namespace GENPERF_ISA {

GENPERF_HD uint32_t float_bits(float x) { return static_cast<uint32_t>(to_bits(x)); }
GENPERF_HD float bits_float(uint32_t i) { return from_bits<float>(static_cast<int32_t>(i)); }

GENPERF_HD float float_from_bfloat16(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

GENPERF_HD uint16_t bfloat16_from_float(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
#else
  uint32_t i = float_bits(x);
  uint32_t rounded = (i + 0x7fffu + ((i >> 16) & 1u)) >> 16;
  uint32_t nan = (i >> 16) | 0x40u;
  return static_cast<uint16_t>((i & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
#endif
}

GENPERF_HD float float_from_float16(uint16_t h) {
#ifdef __CUDA_ARCH__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
#else
  uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  uint32_t magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  // Exponent bias 15 -> 127 by a multiplication, exact for subnormals too.
  float value = bits_float(magnitude) * bits_float((254u - 15u) << 23);
  uint32_t special = magnitude | 0x7f800000u;  // inf, NaN
  uint32_t bits = magnitude >= 0x0f800000u ? special : float_bits(value);
  return bits_float(sign | bits);
#endif
}

GENPERF_HD uint16_t float16_from_float(float x) {
#ifdef __CUDA_ARCH__
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
#else
  uint32_t i = float_bits(x);
  uint32_t sign = (i >> 16) & 0x8000u;
  i &= 0x7fffffffu;
  uint32_t normal = (i - 0x38000000u + 0xfffu + ((i >> 13) & 1u)) >> 13;
  // Below 2^-14 the addition of 1/2 leaves the subnormal's bits, rounded, at the bottom.
  uint32_t subnormal = float_bits(bits_float(i) + 0.5f) - 0x3f000000u;
  uint32_t h = i < 0x38800000u ? subnormal : normal;
  h = i >= 0x477ff000u ? 0x7c00u : h;
  h = i > 0x7f800000u ? 0x7e00u : h;
  return static_cast<uint16_t>(sign | h);
#endif
}

}  // namespace GENPERF_ISA
}  // namespace genperf
