// A class drawn by the inverse of the cumulative distribution: genperf/ops/_inverse_cdf.py in float32.
//
// What a team is, of one thread or of a warp, stands in pixel_sampler/head.h.
#pragma once

#include "math.h"

#ifdef __CUDACC__
#define GENPERF_TEAM __device__
#else
#define GENPERF_TEAM
#endif

namespace genperf {
inline namespace GENPERF_ISA {

inline constexpr int kLeaf = 16;  // children of a node of the tree

// Logits that take part: above `least`, or equal to it and before `end`.
struct Limit {
  float least = -kInfinity;
  int32_t end = INT32_MAX;

  // NaN is never excluded, so that the sum tells of it.
  template <class F, class I>
  GENPERF_HD F weight(F weight, F logit, I index) const {
    F tied = select(index >= end, splat<F>(0.0f), weight);
    return select(logit < least, splat<F>(0.0f), select(logit == least, tied, weight));
  }
};

// Floats as integers in the same order, and back.
GENPERF_HD int32_t order_of(int32_t bits) { return bits ^ ((bits >> 31) & INT32_MAX); }

// The k largest of the logits, of which `team.load(logits, b)` is a block, ties to the lowest index:
// bisection over all floats, then over the indices of those equal to the least.
template <class Team, class Logits>
GENPERF_TEAM Limit limit_of(const Team& team, const Logits& logits, int blocks, int classes, int k,
                            float largest) {
  using F = typename Team::F;
  using I = typename Team::I;
  auto count = [&](auto holds) {
    I n = splat<I>(0);
    for (int b = team.block(); b < blocks; b += team.step()) {
      n = n + select(holds(team.load(logits, b), team.index(b)), splat<I>(1), splat<I>(0));
    }
    return team.total(n);
  };
  int32_t low = order_of(to_bits(-kInfinity)), high = order_of(to_bits(largest));
  int kept = classes;  // at least k logits are as large as `low`
  while (low < high && kept != k) {
    const int32_t middle =
        low + static_cast<int32_t>((static_cast<uint32_t>(high) - static_cast<uint32_t>(low) + 1) / 2);
    const float t = from_bits<float>(order_of(middle));
    const int n = count([&](F x, I) { return x >= t; });
    if (n >= k) {
      low = middle;
      kept = n;
    } else {
      high = middle - 1;
    }
  }
  Limit limit{from_bits<float>(order_of(low)), INT32_MAX};
  if (kept == k) return limit;
  const int room = k - count([&](F x, I) { return x > limit.least; });
  int first = 1, last = classes;
  while (first < last) {
    const int middle = (first + last) / 2;
    const int n = count([&](F x, I index) {
      return select(index < splat<I>(middle), select(x == limit.least, splat<I>(1), splat<I>(0)),
                    splat<I>(0)) > 0;
    });
    if (n >= room) {
      last = middle;
    } else {
      first = middle + 1;
    }
  }
  limit.end = first;
  return limit;
}

// Of a node's children, the first positive one at which the running sum reaches `target`, or the last
// positive one. Input: the sum of what stands before the first child. Output: that before the child.
GENPERF_HD int child_of(const float* children, double target, double& before) {
  double running = before;
  int child = 0;
  for (int j = 0; j < kLeaf; ++j) {
    const double next = running + static_cast<double>(children[j]);
    if (children[j] > 0.0f) {
      child = j;
      before = running;
      if (next >= target) break;
    }
    running = next;
  }
  return child;
}

#ifdef GENPERF_VECTORS

// Sums over the 16 floats of four blocks, in the tree's order.
typedef float Quad __attribute__((vector_size(16)));

GENPERF_HD Quad folded(Vf x) {
  if constexpr (kParts == 2) {
    const Nf sum = x.part[0] + x.part[1];
    Quad q[2];
    std::memcpy(q, &sum, sizeof q);
    return q[0] + q[1];
  } else {
    Quad q[4];
    std::memcpy(q, &x, sizeof q);
    return (q[0] + q[2]) + (q[1] + q[3]);
  }
}

GENPERF_HD Quad block_sums(Quad a, Quad b, Quad c, Quad d) {
  const Quad ab = Quad{a[0], a[1], b[0], b[1]} + Quad{a[2], a[3], b[2], b[3]};
  const Quad cd = Quad{c[0], c[1], d[0], d[1]} + Quad{c[2], c[3], d[2], d[3]};
  return Quad{ab[0], ab[2], cd[0], cd[2]} + Quad{ab[1], ab[3], cd[1], cd[3]};
}

#endif

}  // namespace GENPERF_ISA
}  // namespace genperf
