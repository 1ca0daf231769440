// Philox numbers into arrays, a vector of counters at a time.
#pragma once

#include "chunk.h"
#include "philox.h"

namespace genperf {
inline namespace GENPERF_ISA {

// Key of a sample: `key` is int64 [2] (one for all) or [B, 2].
inline PhiloxKey philox_key(const View& key, int64_t sample) {
  const int64_t* words = static_cast<const int64_t*>(key.data) + (key.ndim == 2 ? sample * key.stride[0] : 0);
  return {static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[key.stride[key.ndim - 1]])};
}

enum class Distribution : int { kNormal, kUniform };

// A key with its ten round keys.
struct PhiloxSchedule {
  Vw offset_low, offset_high;
  Vw round[10][2];

  explicit PhiloxSchedule(PhiloxKey key)
      : offset_low(splat<Vw>(key.offset)), offset_high(splat<Vw>(key.offset >> 32)) {
    uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
    for (auto& r : round) {
      r[0] = splat<Vw>(uint64_t{k0}), r[1] = splat<Vw>(uint64_t{k1});
      k0 += kPhiloxWeyl0, k1 += kPhiloxWeyl1;
    }
  }
};

// 4 kLanes numbers, elements 4 group .. 4 (group + kLanes) - 1.
template <Distribution kDistribution>
GENPERF_HD void philox_block(const PhiloxSchedule& schedule, uint64_t group, float* out) {
  // Lane 4 h + k of the words below belongs to group (kLanes / 4) k + h, so that the transposition at
  // the end stays within 128 bits. The rounds run on 64-bit lanes whose high halves do not matter:
  // c[0] has k = 0, 1, and c[1] has k = 2, 3.
  constexpr int kHalves = kLanes / 4;
  Vw lane;
  for (int i = 0; i < kLanes / 2; ++i) lane[i] = kHalves * (i % 2) + i / 2;
  Vw c[2][4];
  for (int half = 0; half < 2; ++half) {
    c[half][0] = lane + (group + 2 * kHalves * half);
    c[half][1] = c[half][0] >> 32;
    c[half][2] = schedule.offset_low;
    c[half][3] = schedule.offset_high;
  }
#pragma GCC unroll 10
  for (const auto& k : schedule.round) {
    for (auto& w : c) {
      Vw p0 = multiply_low_words(w[0], splat<Vw>(uint64_t{kPhiloxMultiplier0}));
      Vw p1 = multiply_low_words(w[2], splat<Vw>(uint64_t{kPhiloxMultiplier1}));
      w[0] = (p1 >> 32) ^ w[1] ^ k[0];
      w[1] = p1;
      w[2] = (p0 >> 32) ^ w[3] ^ k[1];
      w[3] = p0;
    }
  }
  const Vu w0 = low_words(c[0][0], c[1][0]), w1 = low_words(c[0][1], c[1][1]);
  const Vu w2 = low_words(c[0][2], c[1][2]), w3 = low_words(c[0][3], c[1][3]);
  Vf x0, x1, x2, x3;
  if constexpr (kDistribution == Distribution::kNormal) {
    normals_from_bits<Vf>(w0, w1, x0, x1);
    normals_from_bits<Vf>(w2, w3, x2, x3);
  } else {
    x0 = uniform_from_bits<Vf>(w0), x1 = uniform_from_bits<Vf>(w1);
    x2 = uniform_from_bits<Vf>(w2), x3 = uniform_from_bits<Vf>(w3);
  }
  Vf a = unpack_low(x0, x1), b = unpack_high(x0, x1), c2 = unpack_low(x2, x3), d = unpack_high(x2, x3);
  store(out + 0 * kLanes, unpack_low_pairs(a, c2));
  store(out + 1 * kLanes, unpack_high_pairs(a, c2));
  store(out + 2 * kLanes, unpack_low_pairs(b, d));
  store(out + 3 * kLanes, unpack_high_pairs(b, d));
}

// What philox_chunk needs: a chunk, and up to 3 elements before and 63 after it.
using PhiloxBuffer = float[kChunk + 68];

// Numbers of elements [start, start + n), readable up to padded(n).
template <Distribution kDistribution>
inline const float* philox_chunk(PhiloxKey key, uint64_t start, int n, PhiloxBuffer& buffer) {
  const PhiloxSchedule schedule(key);
  uint64_t group = start / 4;
  int skipped = static_cast<int>(start % 4);
  for (int i = 0; i < skipped + padded(n); i += 4 * kLanes)
    philox_block<kDistribution>(schedule, group + i / 4, buffer + i);
  return buffer + skipped;
}

}  // namespace GENPERF_ISA
}  // namespace genperf
