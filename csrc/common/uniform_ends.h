// Uniform numbers by their distance to the nearer of 0 and 1, which keeps its digits at either end, where a
// quantile function is steep.
#pragma once

#include "philox_cpu.h"

namespace genperf {
inline namespace GENPERF_ISA {

// Uniform u: `distance` = min(u, 1 - u), in all lanes of `below` where it is u.
struct UniformEnds {
  Vf distance;
  Vi below;
};

// u = (word + 1/2) 2^-32.
GENPERF_HD UniformEnds ends_from_bits(Vi word) {
  return {floats_of(word ^ (word >> 31)) * 2.3283064365386963e-10f + 1.16415321826934814453125e-10f,
          word >= 0};
}

GENPERF_HD UniformEnds ends_from_uniform(Vf u) {
  const Vi below = u <= 0.5f;
  return {select(below, u, 1.0f - u), below};
}

// log(1 + x) for x > -1, without the rounding of 1 + x.
template <class F>
GENPERF_HD F log_1p(F x) {
  const F y = 1.0f + x;
  return log_normal(y) + (x - (y - 1.0f)) / y;
}

// Chunks of uniforms: the caller's noise [*], collapsed, or those of a key.
class UniformChunks {
 public:
  UniformChunks(const View& noise, const View& key) : noise_(noise ? collapse(noise) : noise), key_(key) {}

  // Reads elements first .. first + n - 1 of a sample of `per_sample`.
  void read(int64_t sample, int64_t per_sample, int64_t first, int n) {
    if (noise_) {
      values_ = read_chunk(noise_, sample * per_sample + first, n, reinterpret_cast<Buffer&>(buffer_));
      return;
    }
    const PhiloxSchedule schedule(philox_key(key_, sample));
    const int skipped = static_cast<int>(first % 4), end = skipped + padded(n);
    for (int i = 0; i < end; i += kPhiloxBlock) {
      alignas(64) uint32_t words[kPhiloxBlock];
      philox_block(schedule, first / 4 + i / 4, words);
      const auto lanes = [&](int j) { return (Vf)load(words + j * kLanes); };
      interleave(lanes(0), lanes(1), lanes(2), lanes(3), buffer_ + i);
    }
    values_ = buffer_ + skipped;
  }

  bool noise() const { return static_cast<bool>(noise_); }
  Vf uniforms(int i) const { return load(values_ + i); }
  UniformEnds ends(int i) const { return ends_from_bits((Vi)load(values_ + i)); }

 private:
  const View noise_, key_;
  const float* values_ = nullptr;
  alignas(64) PhiloxBuffer buffer_;
};

}  // namespace GENPERF_ISA
}  // namespace genperf
