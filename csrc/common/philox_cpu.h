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

enum class Distribution : int { kNormal, kUniform, kGumbel };

// A key with its ten round keys, each in all lanes of a native vector.
struct PhiloxSchedule {
  uint64_t offset_low, offset_high;
  Nw round[10][2];

  explicit PhiloxSchedule(PhiloxKey key) : offset_low(key.offset), offset_high(key.offset >> 32) {
    uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
    for (auto& r : round) {
      r[0] = Nw{} + k0, r[1] = Nw{} + k1;
      k0 += kPhiloxWeyl0, k1 += kPhiloxWeyl1;
    }
  }
};

// Elements of 16 groups, one group a lane.
inline constexpr int kPhiloxBlock = 4 * kLanes;

// The words of groups group .. group + 15: word j of all of them at words + 16 j. In each native vector,
// lane 4 h + k belongs to group q k + h of the vector's own (q = a quarter of its lanes), so that
// `interleave` stays within 128 bits.
GENPERF_HD void philox_block(const PhiloxSchedule& schedule, uint64_t group, uint32_t* words) {
  // The rounds run on 64-bit lanes whose high halves do not matter: c[0] has k = 0, 1, c[1] has k = 2, 3.
  constexpr int kNativeLanes = kLanes / kParts, kQuads = kNativeLanes / 4;
  const Nw multiplier0 = Nw{} + kPhiloxMultiplier0, multiplier1 = Nw{} + kPhiloxMultiplier1;
  // All parts advance together: the chains of two of them fill the time that one spends waiting.
  Nw c[2 * kParts][4];
  for (int i = 0; i < 2 * kParts; ++i) {
    const int part = i / 2, half = i % 2;
    Nw lane;
    for (int j = 0; j < kNativeLanes / 2; ++j)
      lane[j] = kQuads * (j % 2 + 2 * half) + j / 2 + kNativeLanes * part;
    c[i][0] = lane + group;
    c[i][1] = c[i][0] >> 32;
    c[i][2] = Nw{} + schedule.offset_low;
    c[i][3] = Nw{} + schedule.offset_high;
  }
#pragma GCC unroll 10
  for (const auto& k : schedule.round) {
#pragma GCC unroll 8
    for (auto& w : c) {
      Nw p0 = multiply_low_words(w[0], multiplier0), p1 = multiply_low_words(w[2], multiplier1);
      w[0] = (p1 >> 32) ^ w[1] ^ k[0];
      w[1] = p1;
      w[2] = (p0 >> 32) ^ w[3] ^ k[1];
      w[3] = p0;
    }
  }
#pragma GCC unroll 4
  for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Nu word = low_words(c[2 * part][j], c[2 * part + 1][j]);
      std::memcpy(words + j * kLanes + part * kNativeLanes, &word, sizeof word);
    }
  }
}

// Four words' numbers of the lanes above as 64 consecutive elements.
GENPERF_HD void interleave(Vf x0, Vf x1, Vf x2, Vf x3, float* out) {
  for (int i = 0; i < kParts; ++i) {
    Nf low01 = unpack_low(x0.part[i], x1.part[i]), high01 = unpack_high(x0.part[i], x1.part[i]);
    Nf low23 = unpack_low(x2.part[i], x3.part[i]), high23 = unpack_high(x2.part[i], x3.part[i]);
    const Nf rows[4] = {unpack_low_pairs(low01, low23), unpack_high_pairs(low01, low23),
                        unpack_low_pairs(high01, high23), unpack_high_pairs(high01, high23)};
    std::memcpy(out + i * (kPhiloxBlock / kParts), rows, sizeof rows);
  }
}

// What philox_chunk needs: a chunk, and up to 3 elements before and 63 after it.
using PhiloxBuffer = float[kChunk + 68];

// Numbers of elements [start, start + n), readable up to padded(n). First all words, then the numbers
// from them in place: two short loops keep more of their steps in flight than one long one.
template <Distribution kDistribution>
inline const float* philox_chunk(PhiloxKey key, uint64_t start, int n, PhiloxBuffer& buffer) {
  const PhiloxSchedule schedule(key);
  const int skipped = static_cast<int>(start % 4), end = skipped + padded(n);
  for (int i = 0; i < end; i += kPhiloxBlock)
    philox_block(schedule, start / 4 + i / 4, reinterpret_cast<uint32_t*>(buffer + i));
  for (int i = 0; i < end; i += kPhiloxBlock) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(buffer + i);
    Vu w0 = load(words), w1 = load(words + kLanes), w2 = load(words + 2 * kLanes),
       w3 = load(words + 3 * kLanes);
    Vf x0, x1, x2, x3;
    if constexpr (kDistribution == Distribution::kNormal) {
      normals_from_bits<Vf>(w0, w1, x0, x1);
      normals_from_bits<Vf>(w2, w3, x2, x3);
    } else if constexpr (kDistribution == Distribution::kGumbel) {
      x0 = gumbel_from_bits<Vf>(w0), x1 = gumbel_from_bits<Vf>(w1);
      x2 = gumbel_from_bits<Vf>(w2), x3 = gumbel_from_bits<Vf>(w3);
    } else {
      x0 = uniform_from_bits<Vf>(w0), x1 = uniform_from_bits<Vf>(w1);
      x2 = uniform_from_bits<Vf>(w2), x3 = uniform_from_bits<Vf>(w3);
    }
    interleave(x0, x1, x2, x3, buffer + i);
  }
  return buffer + skipped;
}

}  // namespace GENPERF_ISA
}  // namespace genperf
