// What a Gumbel variate's words tell without the variate, and words into arrays.
#pragma once

#include "philox_cpu.h"

namespace genperf {
inline namespace GENPERF_ISA {

// At least gumbel_from_bits(bits), for an eighth of the work: -log(v), of which e >= v makes the variate no
// more, by a chord of the logarithm. Where the variate is above 3 it is too much by at most 0.09.
template <class F>
GENPERF_HD F gumbel_bound(UintOf<F> bits) {
  using I = IntOf<F>;
  // The bits of a float, as a number, are 2^23 times at most 127 + its binary logarithm. 1e-4: all rounding.
  const F v = floats_of((I)(bits >> 1));
  return (109.5172548f + 1e-4f) - floats_of(to_bits(v)) * 8.262958294867817e-8f;
}

// e^-g of the variate g, within 3 ulp: the exponential variate, in [2^-33, 22.9].
template <class F>
GENPERF_HD F exponential_from_bits(UintOf<F> bits) {
  using I = IntOf<F>;
  const I i = (I)bits;
  const auto below_half = i >= 0;
  const F w = floats_of(i ^ (i >> 31)) * 2.3283064365386963e-10f + 1.16415321826934814453125e-10f;
  const F rest = 1.0f - w;
  const F logarithm = log_normal(select(below_half, rest, w));
  // What the rounding of `rest` has lost need not be divided by it: it counts where that is close to 1.
  return -select(below_half, logarithm + (-w - (rest - 1.0f)), logarithm);
}

// Whether a mask holds in any lane.
GENPERF_HD bool any_of(Vi mask) {
  Vi::Native all = mask.part[0];
  for (int i = 1; i < kParts; ++i) all |= mask.part[i];
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)all, (__m512i)all) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)all) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_ps((__m128)all) != 0;
#else
  int32_t bits = 0;
  for (int i = 0; i < kLanes / kParts; ++i) bits |= all[i];
  return bits != 0;
#endif
}

// What a chunk of noise is given out as: words, whose bits are those of floats; exponential variates; or
// Gumbel variates.
enum class GumbelForm : int { kWords, kExponentials, kGumbels };

// Of elements [start, start + n), readable up to padded(n).
inline const float* gumbel_chunk(GumbelForm form, PhiloxKey key, uint64_t start, int n,
                                 PhiloxBuffer& buffer) {
  if (form == GumbelForm::kGumbels) return philox_chunk<Distribution::kGumbel>(key, start, n, buffer);
  const PhiloxSchedule schedule(key);
  const int skipped = static_cast<int>(start % 4), end = skipped + padded(n);
  for (int i = 0; i < end; i += kPhiloxBlock) {
    alignas(64) uint32_t words[kPhiloxBlock];
    philox_block(schedule, start / 4 + i / 4, words);
    interleave((Vf)load(words), (Vf)load(words + kLanes), (Vf)load(words + 2 * kLanes),
               (Vf)load(words + 3 * kLanes), buffer + i);
  }
  // A loop of its own keeps more of its steps in flight.
  if (form == GumbelForm::kExponentials)
    for (int i = 0; i < end; i += kLanes) store(buffer + i, exponential_from_bits<Vf>((Vu)load(buffer + i)));
  return buffer + skipped;
}

}  // namespace GENPERF_ISA
}  // namespace genperf
