// Philox4x32-10 (J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), and the
// uniforms and normals made of it. One specification for every backend:
//
//   key      the 64-bit seed, low word first
//   counter  (element / 4 as 64 bits, low word first; offset as 64 bits, low word first)
//   lane     element % 4
//   uniform  (bits >> 8) 2^-24 + 2^-25, in [2^-25, 1]
//   normal   Box-Muller over the lane pairs (0, 1) and (2, 3): radius from the even lane's uniform,
//            angle 2 pi ((odd bits >> 8) + 1/2) 2^-24; cosine to the even lane, sine to the odd one
//   gumbel   -log(e) of the exponential e = -log(1 - v), v = (bits + 1/2) 2^-32
#pragma once

#include "math.h"

namespace genperf {
inline namespace GENPERF_ISA {

struct PhiloxKey {
  uint64_t seed;
  uint64_t offset;
};

inline constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
inline constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
inline constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
inline constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;

// Inputs: four counter words, two key words. Output: four random words, in place of the counter.
GENPERF_HD void philox4x32_10(uint32_t (&c)[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = static_cast<uint64_t>(c[0]) * kPhiloxMultiplier0;
    uint64_t p1 = static_cast<uint64_t>(c[2]) * kPhiloxMultiplier1;
    c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[3] = static_cast<uint32_t>(p0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
}

template <class F>
GENPERF_HD F uniform_from_bits(UintOf<F> bits) {
  return floats_of((IntOf<F>)(bits >> 8)) * 5.9604644775390625e-8f + 2.98023223876953125e-8f;
}

// A standard Gumbel variate, in [-3.2, 22.9]. All 32 bits count where e is small, since the largest of many
// variates is the one with the smallest e.
template <class F>
GENPERF_HD F gumbel_from_bits(UintOf<F> bits) {
  using I = IntOf<F>;
  const I i = (I)bits;
  const auto below_half = i >= 0;
  F w = floats_of(i ^ (i >> 31)) * 2.3283064365386963e-10f + 1.16415321826934814453125e-10f;
  F rest = 1.0f - w;  // below one half v = w, else 1 - v = w
  F logarithm = log_normal(select(below_half, rest, w));
  F lost = (-w - (rest - 1.0f)) / rest;  // of w, in the rounding of `rest`
  return -log_normal(-select(below_half, logarithm + lost, logarithm));
}

// Input: the words of an even and of the next odd lane. Output: two independent standard normals.
template <class F>
GENPERF_HD void normals_from_bits(UintOf<F> even, UintOf<F> odd, F& n0, F& n1) {
  F radius = sqrt_rn(-2.0f * log_normal(uniform_from_bits<F>(even)));
  F cosine, sine;
  cos_sin_of_turn<F>(odd, cosine, sine);
  n0 = radius * cosine;
  n1 = radius * sine;
}

// Input: key and element / 4. Output: the four words of elements 4 i .. 4 i + 3.
GENPERF_HD void philox_words(PhiloxKey key, uint64_t index, uint32_t (&words)[4]) {
  words[0] = static_cast<uint32_t>(index);
  words[1] = static_cast<uint32_t>(index >> 32);
  words[2] = static_cast<uint32_t>(key.offset);
  words[3] = static_cast<uint32_t>(key.offset >> 32);
  philox4x32_10(words, static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));
}

// Input: key and element / 4. Output: the four standard normals of elements 4 i .. 4 i + 3.
GENPERF_HD void philox_normals(PhiloxKey key, uint64_t index, float (&normals)[4]) {
  uint32_t words[4];
  philox_words(key, index, words);
  normals_from_bits<float>(words[0], words[1], normals[0], normals[1]);
  normals_from_bits<float>(words[2], words[3], normals[2], normals[3]);
}

}  // namespace GENPERF_ISA
}  // namespace genperf
