// Drawing the values of a pixel: genperf/sampling/_draw.py in float32, with the functions of math.h.
//
// The same bits on every instruction set and on the GPU: a draw is made by a *team*, one thread of a CPU
// (`Serial`, here) or one warp (`Warp`, head.cuh), whose members take blocks of 16 classes in turn and
// sum each in the same order. The members then all walk down the tree of sums, and have the result.
//
// A team has
//   F, I                  what a member holds of a block's floats: 16 or one, and the integers for it
//   block(), step()       the member's first block, and blocks that the team takes at a time
//   lane(), lanes()       the member's number, and members
//   load, store           part of block b of an array
//   index                 the indices of its part of block b
//   sum, maximum, total   over a block; over all that the members hold (floats); (integers)
//   put                   a value that a member has for a block
//   read                  a parameter, which another thread may have written
//   sync                  what members wrote is seen by all
#pragma once

#include "../common/inverse_cdf.h"
#include "../common/logistic.h"
#include "program.h"

namespace genperf::pixel {
inline namespace GENPERF_ISA {

using genperf::kLeaf;

inline constexpr int kPadding = 32;   // a warp takes two blocks at a time
inline constexpr int kMaxDrawn = 3;   // values of a draw
inline constexpr int kMaxLevels = 4;  // 16^4 = 65,536 classes
inline constexpr float kMinLogScale = -7.0f;

// How all pixels of a batch are drawn. `top_k` of 0 keeps all classes.
struct Sampling {
  float temperature = 1.0f;
  int64_t top_k = 0;
};

struct Drawn {
  float value[kMaxDrawn];
};

GENPERF_HD constexpr int64_t padded_classes(int64_t n) { return (n + kPadding - 1) / kPadding * kPadding; }

// Floats of scratch memory that a draw needs: weights and sums.
GENPERF_HD constexpr int64_t head_scratch(const Head& head) {
  if (head.kind != HeadKind::kCategorical && head.kind != HeadKind::kLogisticMixture) return 0;
  int64_t total = 0, n = padded_classes(head.classes);
  for (int level = 0; level < kMaxLevels; ++level) {
    total += n;
    n = padded_classes(n / kLeaf);
  }
  return total;
}

// Where level `level` of the tree begins in the scratch memory.
GENPERF_HD int level_begin(int classes, int level) {
  int begin = 0, n = static_cast<int>(padded_classes(classes));
  for (; level > 0; --level) {
    begin += n;
    n = static_cast<int>(padded_classes(n / kLeaf));
  }
  return begin;
}

// The class at which the running sum of weights exp((logit - max) / temperature) reaches `u` times their
// sum; -1 if a logit is NaN or inf, or all are -inf. `scratch` has head_scratch() floats.
template <class Team>
GENPERF_TEAM int choose(const Team& team, const float* logits, int64_t stride, int classes, float u,
                        float temperature, int64_t top_k, float* scratch) {
  using F = typename Team::F;
  const int size = static_cast<int>(padded_classes(classes)), blocks = size / kLeaf;
  for (int i = team.lane(); i < classes; i += team.lanes()) scratch[i] = team.read(logits + i * stride);
  for (int i = classes + team.lane(); i < size; i += team.lanes()) scratch[i] = -kInfinity;
  team.sync();
  F held = splat<F>(-kInfinity);
  for (int b = team.block(); b < blocks; b += team.step()) {
    F x = team.load(scratch, b);
    held = select(x > held, x, held);
  }
  const float largest = team.maximum(held);
  Limit limit;
  if (0 < top_k && top_k < classes) {
    limit = limit_of(team, scratch, blocks, classes, static_cast<int>(top_k), largest);
  }

  for (int b = team.block(); b < blocks; b += team.step()) {
    F x = team.load(scratch, b);
    team.store(scratch, b, limit.weight(exp((x - largest) / temperature), x, team.index(b)));
  }
  int top = 0;
  float* level = scratch;  // number `top`
  for (int n = classes, width = size; n > kLeaf; ++top) {
    // Sums of neighbours, zero up to a whole number of blocks.
    n = (n + kLeaf - 1) / kLeaf;
    const int sums = width / kLeaf, next = static_cast<int>(padded_classes(sums));
    float* const above = level + width;
    team.sync();
    for (int b = team.block(); b < sums; b += team.step()) team.put(above, b, team.sum(team.load(level, b)));
    for (int i = sums + team.lane(); i < next; i += team.lanes()) above[i] = 0.0f;
    level = above;
    width = next;
  }
  team.sync();
  const float total = team.sum(team.load(level, 0));
  if (!(total >= 1.0f)) return -1;  // the largest logit's weight is 1; the sum of NaN is NaN

  const double target = static_cast<double>(u) * static_cast<double>(total);
  double before = 0.0;
  int chosen = 0;
  for (; top >= 0; --top) {
    const float* children = scratch + level_begin(classes, top) + chosen * kLeaf;
    const int child = child_of(children, target, before);
    chosen = chosen * kLeaf + child;
  }
  team.sync();  // before the scratch memory is used again
  return chosen;
}

// PixelCNN++: see Head for the order of the parameters. `known` and `mask` may be null.
template <class Team>
GENPERF_TEAM Drawn draw_mixture(const Team& team, const Head& head, const float* params, const float* noise,
                                float temperature, const float* known, const uint8_t* mask, float* scratch) {
  const int mixtures = static_cast<int>(head.classes);
  const int mixture = choose(team, params, 1, mixtures, noise[0], temperature, 0, scratch);
  Drawn drawn{};
  for (int c = 0; c < kMaxDrawn; ++c) {
    if (c >= head.values) break;
    auto read = [&](int channel, int part) {
      return team.read(params + mixtures + channel * head.stride_draw + part * mixtures + mixture);
    };
    float x = kNaN;
    if (mixture >= 0) {
      float mean = read(c, 0), derivative;
      // Coefficient 0 for green; 1 and 2 for blue.
      for (int other = 0; other < c; ++other)
        mean = mean + tanh(read(c - 1 + other, 2), derivative) * drawn.value[other];
      x = logistic_value(mean, read(c, 1), noise[1 + c], kMinLogScale, temperature);
    }
    drawn.value[c] = mask && mask[c] ? known[c] : x;
  }
  return drawn;
}

// Draw `index` of one pixel of one image, of any head but a callback: the same in all members of the team.
//   params       the network's output
//   noise        the pixel's `head.noises` numbers
//   known, mask  the pixel's `head.values` values, and where to take them; null: nowhere
//   scratch      head_scratch(head) floats of the team's own, not initialised
// The result has head.values / head.draws values.
template <class Team>
GENPERF_TEAM Drawn draw(const Team& team, const Head& head, int index, const float* params,
                        const float* noise, const Sampling& sampling, const float* known, const uint8_t* mask,
                        float* scratch) {
  const float temperature = sampling.temperature;
  if (head.kind == HeadKind::kLogisticMixture) {
    return draw_mixture(team, head, params, noise, temperature, known, mask, scratch);
  }
  Drawn drawn{};
  float& x = drawn.value[0];
  params += index * head.stride_draw;
  if (mask && mask[index]) {
    x = known[index];
  } else if (head.kind == HeadKind::kCategorical) {
    const int chosen = choose(team, params, head.stride_class, static_cast<int>(head.classes), noise[index],
                              temperature, sampling.top_k, scratch);
    x = chosen < 0 ? 0.0f : static_cast<float>(chosen);
  } else if (head.kind == HeadKind::kBernoulli) {
    x = noise[index] <= sigmoid(team.read(params) / temperature) ? 1.0f : 0.0f;
  } else if (head.kind == HeadKind::kGaussian) {
    x = team.read(params) + exp(team.read(params + head.stride_class)) * temperature * noise[index];
  }
  return drawn;
}

#ifdef GENPERF_VECTORS

// One thread of a CPU, with all 16 classes of a block at once.
struct Serial {
  using F = Vf;
  using I = Vi;

  GENPERF_HD int block() const { return 0; }
  GENPERF_HD int step() const { return 1; }
  GENPERF_HD int lane() const { return 0; }
  GENPERF_HD int lanes() const { return 1; }
  GENPERF_HD void sync() const {}
  GENPERF_HD float read(const float* p) const { return *p; }
  GENPERF_HD F load(const float* p, int b) const { return genperf::load(p + b * kLeaf); }
  GENPERF_HD void store(float* p, int b, F x) const { genperf::store(p + b * kLeaf, x); }
  GENPERF_HD void put(float* p, int b, float x) const { p[b] = x; }
  GENPERF_HD I index(int b) const {
    static constexpr int32_t kFirst[kLeaf] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return genperf::load(kFirst) + b * kLeaf;
  }
  template <class T, class Combine>
  GENPERF_HD T fold(Block<T> x, Combine combine) const {
    T lane[kLeaf];
    genperf::store(lane, x);
    for (int half = kLeaf / 2; half > 0; half /= 2)
      for (int j = 0; j < half; ++j) lane[j] = combine(lane[j], lane[j + half]);
    return lane[0];
  }
  GENPERF_HD float sum(F x) const {
    return fold(x, [](float a, float b) { return a + b; });
  }
  GENPERF_HD float maximum(F x) const {
    return fold(x, [](float a, float b) { return a > b ? a : b; });
  }
  GENPERF_HD int total(I n) const {
    return fold(n, [](int a, int b) { return a + b; });
  }
};

#endif

}  // namespace GENPERF_ISA
}  // namespace genperf::pixel
