// What is done with tiles of logits: the classes of one position, 16 at a time, or those of some positions,
// one class at a time.
#pragma once

#include "../common/exp_of_negative.h"
#include "../common/gumbel.h"

namespace genperf {
namespace GENPERF_ISA {
namespace {

constexpr int kHeld = 64;  // positions of a tile at most
constexpr int kPart = 32;  // steps whose sums are made before they are added to others

inline float largest_lane(Vf x) {
  alignas(64) float lane[kLanes];
  store(lane, x);
  float largest = lane[0];
  for (float l : lane) largest = l > largest ? l : largest;
  return largest;
}

inline double total(Vf x) {
  alignas(64) float lane[kLanes];
  store(lane, x);
  double sum = 0.0;
  for (float l : lane) sum += l;
  return sum;
}

// A tile of `steps` blocks of 16 classes (kRow), or of classes with `blocks` blocks of 16 positions each.
template <bool kRow>
struct Tile {
  static constexpr int kBlocks = kRow ? 1 : kHeld / kLanes;
  static constexpr int kPitch = kRow ? kLanes : kHeld;  // floats between steps

  const float* logits;
  const float* grad;  // or null
  float* y;
  float* rest;  // room for as many floats as y, in `weigh`
  int64_t steps;
  int blocks;

  int active() const { return kRow ? 1 : blocks; }
};

// a + b = sum + rest, exactly; a sum beyond the floats is the largest of them.
struct Pair {
  Vf sum, rest;
};

GENPERF_HD Pair add(Vf a, Vf b) {
  Vf sum = a + b;
  sum = select(sum > kFloatMax, splat<Vf>(kFloatMax), sum);
  const Vf of_b = sum - a, rest = (a - (sum - of_b)) + (b - of_b);
  return {sum, select(abs(rest) <= kFloatMax, rest, splat<Vf>(0.0f))};
}

// In each lane the largest pair so far.
struct Most {
  Vf sum = splat<Vf>(-kInfinity), rest = splat<Vf>(0.0f);

  // Where it is larger than those before.
  GENPERF_HD Vi take(Pair z) {
    const Vi better = select(z.sum == sum, z.rest > rest, z.sum > sum);
    sum = select(better, z.sum, sum);
    rest = select(better, z.rest, rest);
    return better;
  }

  // The largest of all lanes, in each.
  void spread() {
    alignas(64) float sums[kLanes], rests[kLanes];
    store(sums, sum), store(rests, rest);
    int best = 0;
    for (int i = 1; i < kLanes; ++i)
      if (sums[i] > sums[best] || (sums[i] == sums[best] && rests[i] > rests[best])) best = i;
    sum = splat<Vf>(sums[best]), rest = splat<Vf>(rests[best]);
  }
};

// Of each lane, a sum by parts.
struct Sum {
  Vf whole = splat<Vf>(0.0f), part = splat<Vf>(0.0f);

  GENPERF_HD void close_part() { whole = whole + part, part = splat<Vf>(0.0f); }
};

// Of each lane, of the logits: the largest, and whether none is NaN.
template <bool kRow>
struct Level {
  Vf top[Tile<kRow>::kBlocks];
  Vi sound[Tile<kRow>::kBlocks];
  bool finite = true;

  explicit Level(const Tile<kRow>& tile) {
    for (int i = 0; i < tile.active(); ++i) {
      Vf most = splat<Vf>(-kInfinity);
      Vi all = splat<Vi>(-1);
      for (int64_t s = 0; s < tile.steps; ++s) {
        const Vf x = load(tile.logits + s * tile.kPitch + i * kLanes);
        most = select(x > most, x, most);
        all = all & (x == x);
      }
      top[i] = most, sound[i] = all;
    }
    if (kRow) {
      sound[0] = splat<Vi>(any_of(sound[0] == 0) ? 0 : -1);
      top[0] = splat<Vf>(largest_lane(top[0]));
    }
    for (int i = 0; i < tile.active(); ++i) finite &= !any_of(abs(top[i]) == kInfinity);
  }

  // 0 in place of the logits that go to infinity together, and -inf in place of the others.
  void replace_infinite(Tile<kRow>& tile, float* to) {
    const Vf zero = splat<Vf>(0.0f), none = splat<Vf>(-kInfinity);
    for (int i = 0; i < tile.active(); ++i) {
      const Vi infinite = abs(top[i]) == kInfinity;
      for (int64_t s = 0; s < tile.steps; ++s) {
        const int64_t at = s * tile.kPitch + i * kLanes;
        const Vf x = load(tile.logits + at);
        store(to + at, select(infinite, select(x == top[i], zero, none), x));
      }
      top[i] = select(infinite, zero, top[i]);
    }
    tile.logits = to;
  }
};

// What the next row takes from memory, if it lies behind this one, is fetched into the second-level cache
// while this one is computed.
template <bool kRow>
GENPERF_HD void fetch_next_row(const Tile<kRow>& tile, int64_t s, int count) {
  if (!kRow) return;
  for (int64_t at = (tile.steps + s) * kLanes; at < (tile.steps + s + count) * kLanes; at += kLanes) {
    __builtin_prefetch(tile.logits + at, 0, 2);
    if (tile.grad) __builtin_prefetch(tile.grad + at, 0, 2);
  }
}

// Each step's noise at f(step, noise).
template <bool kRow, class Noise, class Function>
GENPERF_HD void for_steps(const Tile<kRow>& tile, Noise& noise, Function f) {
  for (int64_t s = 0; s < tile.steps;) {
    int count;
    const float* g = noise.read(s, count);
    fetch_next_row(tile, s, count);
    for (int j = 0; j < count; ++j) f(s + j, g + j * kLanes);
    s += count;
  }
}

inline Vi lane_numbers() {
  alignas(64) int32_t lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return load(lane);
}

// The class of the largest noisy logit, of the row or of each position; -1 where given noise has a NaN.
// Unless it is given, the noise comes as words.
template <bool kRow, bool kGiven, class Noise>
void draw(const Tile<kRow>& tile, Noise& noise, int32_t* index) {
  Most most[tile.kBlocks];
  Vi best[tile.kBlocks], sound[tile.kBlocks];
  Vf bar[tile.kBlocks];
  for (int i = 0; i < tile.active(); ++i)
    best[i] = splat<Vi>(0), sound[i] = splat<Vi>(-1), bar[i] = splat<Vf>(-kInfinity);
  const Vi lanes = kRow ? lane_numbers() : splat<Vi>(0);
  for_steps(tile, noise, [&](int64_t s, const float* g) {
    for (int i = 0; i < tile.active(); ++i) {
      const Vf logit = load(tile.logits + s * tile.kPitch + i * kLanes);
      // Rounding is monotonic: where the sum with the bound is less, so is that with the variate.
      if constexpr (!kGiven) {
        if (!any_of(logit + gumbel_bound<Vf>((Vu)load(g + i * kLanes)) >= bar[i])) continue;
      }
      Vf noise_here = load(g + i * kLanes);
      if constexpr (!kGiven) noise_here = gumbel_from_bits<Vf>((Vu)noise_here);
      const Pair z = add(logit, noise_here);
      const Vi better = most[i].take(z);
      if constexpr (kGiven) sound[i] = sound[i] & (z.sum == z.sum);
      best[i] = select(better, lanes + static_cast<int32_t>(kRow ? s * kLanes : s), best[i]);
      bar[i] = kRow && !kGiven ? splat<Vf>(largest_lane(most[i].sum)) : most[i].sum;
    }
  });
  if constexpr (kRow) {
    alignas(64) float sums[kLanes], rests[kLanes];
    alignas(64) int32_t classes[kLanes];
    store(sums, most[0].sum), store(rests, most[0].rest), store(classes, best[0]);
    int winner = 0;
    for (int i = 1; i < kLanes; ++i) {
      const bool equal = sums[i] == sums[winner] && rests[i] == rests[winner];
      const bool above = sums[i] > sums[winner] || (sums[i] == sums[winner] && rests[i] > rests[winner]);
      if (above || (equal && classes[i] < classes[winner])) winner = i;
    }
    *index = any_of(sound[0] == 0) ? -1 : classes[winner];
  } else {
    for (int i = 0; i < tile.active(); ++i)
      store(index + i * kLanes, select(sound[i], best[i], splat<Vi>(-1)));
  }
}

// Sums of a tile's lanes, those of a row in each.
template <bool kRow>
struct Sums {
  double weight[Tile<kRow>::kBlocks * kLanes], product[Tile<kRow>::kBlocks * kLanes];

  Sums(const Tile<kRow>& tile, const Sum* weights, const Sum* products) {
    for (int i = 0; i < tile.active(); ++i) {
      put(weights[i].whole, weight + i * kLanes);
      if (tile.grad) put(products[i].whole, product + i * kLanes);
    }
  }

 private:
  static void put(Vf sum, double* to) {
    alignas(64) float lane[kLanes];
    store(lane, sum);
    const double all = kRow ? total(sum) : 0.0;
    for (int i = 0; i < kLanes; ++i) to[i] = kRow ? all : lane[i];
  }
};

// Adds a block's weights, and their products with the gradient.
template <bool kRow>
GENPERF_HD void add_weights(const Tile<kRow>& tile, int64_t at, Vf weight, Sum& weights, Sum& products) {
  store(tile.y + at, weight);
  weights.part = weights.part + weight;
  if (tile.grad) products.part = products.part + weight * load(tile.grad + at);
}

template <bool kRow>
GENPERF_HD void close_parts(const Tile<kRow>& tile, int64_t s, Sum* weights, Sum* products) {
  if (s % kPart != kPart - 1 && s != tile.steps - 1) return;
  for (int i = 0; i < tile.active(); ++i) weights[i].close_part(), products[i].close_part();
}

// exp(logit + noise) to y, but for a factor, from exponential variates: e^g is the reciprocal of one.
template <bool kRow, class Noise>
Sums<kRow> weigh_once(const Tile<kRow>& tile, const Level<kRow>& level, Noise& noise) {
  Sum weights[tile.kBlocks], products[tile.kBlocks];
  for_steps(tile, noise, [&](int64_t s, const float* g) {
    for (int i = 0; i < tile.active(); ++i) {
      const int64_t at = s * tile.kPitch + i * kLanes;
      const Vf e = exp_of_negative(load(tile.logits + at) - level.top[i]);
      add_weights(tile, at, e / load(g + i * kLanes), weights[i], products[i]);
    }
    close_parts(tile, s, weights, products);
  });
  return Sums<kRow>(tile, weights, products);
}

// exp((logit + noise) / tau) to y, but for a factor.
template <bool kRow, class Noise>
Sums<kRow> weigh(const Tile<kRow>& tile, float scale, Noise& noise) {
  Most most[tile.kBlocks];
  for_steps(tile, noise, [&](int64_t s, const float* g) {
    for (int i = 0; i < tile.active(); ++i) {
      const int64_t at = s * tile.kPitch + i * kLanes;
      const Pair z = add(load(tile.logits + at), load(g + i * kLanes));
      store(tile.y + at, z.sum), store(tile.rest + at, z.rest);
      most[i].take(z);
    }
  });
  if (kRow) most[0].spread();
  Sum weights[tile.kBlocks], products[tile.kBlocks];
  for (int64_t s = 0; s < tile.steps; ++s) {
    for (int i = 0; i < tile.active(); ++i) {
      const int64_t at = s * tile.kPitch + i * kLanes;
      const Vf difference = (load(tile.y + at) - most[i].sum) + (load(tile.rest + at) - most[i].rest);
      add_weights(tile, at, exp_of_negative(difference * scale), weights[i], products[i]);
    }
    close_parts(tile, s, weights, products);
  }
  return Sums<kRow>(tile, weights, products);
}

// The products alone, where y is known.
template <bool kRow>
Sums<kRow> weigh_known(const Tile<kRow>& tile) {
  Sum weights[tile.kBlocks], products[tile.kBlocks];
  for (int64_t s = 0; s < tile.steps; ++s) {
    for (int i = 0; i < tile.active(); ++i) {
      const int64_t at = s * tile.kPitch + i * kLanes;
      products[i].part = products[i].part + load(tile.y + at) * load(tile.grad + at);
    }
    close_parts(tile, s, weights, products);
  }
  Sums<kRow> sums(tile, weights, products);
  for (double& w : sums.weight) w = 1.0;
  return sums;
}

// y, or with `grad` the gradient by the logits, from the weights in y; NaN where a logit is.
template <bool kRow>
void finish(const Tile<kRow>& tile, const Vi* sound, const Sums<kRow>& sums, float scale) {
  for (int i = 0; i < tile.active(); ++i) {
    alignas(64) float factor[kLanes], mean[kLanes] = {};
    for (int j = 0; j < kLanes; ++j) {
      const double inverse = 1.0 / sums.weight[i * kLanes + j];
      factor[j] = static_cast<float>(inverse);
      if (tile.grad) mean[j] = static_cast<float>(sums.product[i * kLanes + j] * inverse);
    }
    const Vf f = select(sound[i], load(factor), splat<Vf>(kNaN)), m = load(mean);
    for (int64_t s = 0; s < tile.steps; ++s) {
      float* y = tile.y + s * tile.kPitch + i * kLanes;
      const Vf soft = load(y) * f;
      store(y, tile.grad ? soft * (load(tile.grad + s * tile.kPitch + i * kLanes) - m) * scale : soft);
    }
  }
}

}  // namespace
}  // namespace GENPERF_ISA
}  // namespace genperf
