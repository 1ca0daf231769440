// Sums over the codewords of some positions, and draws from them.
#pragma once

#include <cmath>
#include <cstring>

#include "../soft_assignment/statistics.h"
#include "reader.h"

namespace genperf {
namespace GENPERF_ISA {
namespace {

// Positions that are drawn at a time: long runs in memory, whose sums stay in the first-level cache.
constexpr int kDrawn = 256;
constexpr int64_t kPart = 64;  // codewords whose sums are made before they are added to others

// A number for each position.
using Lane = float[kDrawn];

inline void fill(Lane& lane, float value) {
  for (float& x : lane) x = value;
}

// The noisy logit; the largest finite number where noise is infinite.
GENPERF_HD Vf noisy(Vf logit, Vf noise) {
  const Vf z = logit + noise;
  return select(z > kFloatMax, splat<Vf>(kFloatMax), z);
}

// Of each position, the largest noisy logit so far and whose it is.
struct Draw {
  Lane largest, doubt;  // doubt: 0, or NaN where a logit is
  int32_t index[kDrawn];

  void open() {
    fill(largest, -kInfinity), fill(doubt, 0.0f);
    for (int32_t& i : index) i = 0;
  }

  void take(int i, Vf z, int32_t word) {
    const Vf most = load(largest + i);
    const Vi better = z > most;
    store(largest + i, select(better, z, most));
    store(index + i, select(better, splat<Vi>(word), load(index + i)));
    look(i, z);
  }

  // The same of a logit and words of noise. Rounding is monotonic: where the sum with a bound of the variate
  // is not more, nor is that with the variate.
  void take_words(int i, Vf logit, const float* words, int32_t word) {
    const Vu bits = (Vu)load(words + i);
    if (any_of(logit + gumbel_bound<Vf>(bits) > load(largest + i)))
      take(i, noisy(logit, gumbel_from_bits<Vf>(bits)), word);
    look(i, select(logit > kFloatMax, splat<Vf>(kFloatMax), logit));
  }

 private:
  void look(int i, Vf x) { store(doubt + i, load(doubt + i) + not_infinite(x) * 0.0f); }
};

// Of each position, sums of exp(x - largest) over the codewords as they come, and of these times x - largest.
struct Online {
  Lane largest, sum, moment, sum_here, moment_here;

  void open() {
    // Finite, so that the difference of a logit of -inf is not NaN.
    fill(largest, -kFloatMax), fill(sum, 0.0f), fill(moment, 0.0f), fill(sum_here, 0.0f),
        fill(moment_here, 0.0f);
  }

  void take(int i, Vf x) {
    Vf most = load(largest + i);
    const Vi above = x > most;
    if (any_of(above)) {
      const Vf next = select(above, x, most);
      const Vf less = select(above, not_infinite(most - next), splat<Vf>(0.0f)),
               factor = exp_of_negative(less);
      rescale(i, less, factor, sum, moment), rescale(i, less, factor, sum_here, moment_here);
      store(largest + i, next);
      most = next;
    }
    const Vf difference = not_infinite(x - most), e = exp_of_negative(difference);
    store(sum_here + i, load(sum_here + i) + e);
    store(moment_here + i, multiply_add(e, difference, load(moment_here + i)));
  }

  void close_part(int n) {
    for (int i = 0; i < n; i += kLanes) {
      store(sum + i, load(sum + i) + load(sum_here + i)), store(sum_here + i, splat<Vf>(0.0f));
      store(moment + i, load(moment + i) + load(moment_here + i)), store(moment_here + i, splat<Vf>(0.0f));
    }
  }

  double entropy(int i) const {
    return std::log(static_cast<double>(sum[i])) - static_cast<double>(moment[i]) / sum[i];
  }

 private:
  static void rescale(int i, Vf less, Vf factor, Lane& sum, Lane& moment) {
    const Vf old = load(sum + i);
    store(moment + i, (load(moment + i) + less * old) * factor);
    store(sum + i, old * factor);
  }
};

}  // namespace
}  // namespace GENPERF_ISA
}  // namespace genperf
