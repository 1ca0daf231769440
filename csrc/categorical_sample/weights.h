// The weights of a row and the tree of their sums.
#pragma once

#include "../common/inverse_cdf.h"
#include "../common/scratch.h"
#include "rows.h"

namespace genperf {
inline namespace GENPERF_ISA {

GENPERF_HD Vi lane_numbers(int64_t block) {
  alignas(64) static constexpr int32_t kFirst[kLanes] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                         8, 9, 10, 11, 12, 13, 14, 15};
  return load(kFirst) + static_cast<int32_t>(block * kLanes);
}

GENPERF_HD float maximum_of(Vf x) {
  alignas(64) float lane[kLanes];
  store(lane, x);
  float most = lane[0];
  for (int i = 1; i < kLanes; ++i) most = lane[i] > most ? lane[i] : most;
  return most;
}

// What limit_of() needs of a team, and a row as what it reads.
struct OfRow {
  using F = Vf;
  using I = Vi;

  GENPERF_HD int block() const { return 0; }
  GENPERF_HD int step() const { return 1; }
  GENPERF_HD Vf load(const Row& row, int b) const { return row.block(b); }
  GENPERF_HD Vi index(int b) const { return lane_numbers(b); }
  GENPERF_HD int total(Vi n) const {
    alignas(64) int32_t lane[kLanes];
    store(lane, n);
    int sum = 0;
    for (int i : lane) sum += i;
    return sum;
  }
};

// One row after another; a thread's own.
class Weights {
 public:
  Weights(int64_t classes, float temperature, int64_t top_k, float top_p)
      : blocks_(blocks_of(classes)),
        temperature_(temperature),
        top_p_(top_p),
        top_k_(top_k < classes ? static_cast<int>(top_k) : 0),
        sums_(tree_size(classes)),
        leaves_(top_p < 1.0f ? blocks_ * kLanes : 0) {}

  void set(const Row& row) {
    row_ = &row;
    limit_ = Limit{};
    largest_ = largest();
    if (top_k_ > 0) {
      limit_ = limit_of(OfRow(), row, static_cast<int>(blocks_), static_cast<int>(row.n), top_k_, largest_);
    }
    total_ = temperature_ == 1.0f ? sum_blocks<false>() : sum_blocks<true>();
    if (top_p_ < 1.0f && valid()) keep_nucleus();
  }

  // The largest logit's weight is 1; the sum of NaN is NaN.
  bool valid() const { return total_ >= 1.0f; }
  float total() const { return total_; }

  // Of a block of 16 classes.
  GENPERF_HD Vf block(int64_t b) const {
    return temperature_ == 1.0f ? weight_of<false>(b) : weight_of<true>(b);
  }

  int64_t choose(double u) const {
    const double target = u * static_cast<double>(total_);
    double before = 0.0;
    int64_t chosen = 0;
    const float* levels[kMaxLevels];
    int top = 0;
    int64_t width = blocks_;
    for (const float* level = sums_.get();; width = blocks_of(width)) {
      levels[top] = level;
      if (width <= kLanes) break;
      level += blocks_of(width) * kLanes;
      ++top;
    }
    for (; top >= 0; --top) chosen = chosen * kLeaf + child_of(levels[top] + chosen * kLeaf, target, before);
    alignas(64) float leaf[kLanes];
    store(leaf, block(chosen));
    return chosen * kLeaf + child_of(leaf, target, before);
  }

  bool keeps(int64_t index) const {
    const float x = row_->data[index];
    return !(x < limit_.least) && !(x == limit_.least && index >= limit_.end);
  }

  // Nats of a class.
  float log_prob(int64_t index) const {
    if (!valid() || index < 0 || index >= row_->n) return kNaN;
    if (!keeps(index)) return -kInfinity;
    return (row_->data[index] - largest_) / temperature_ - log_normal(total_);
  }

 private:
  static constexpr int kMaxLevels = 8;

  // Floats of the sums of all levels, each in whole blocks.
  static int64_t tree_size(int64_t classes) {
    int64_t size = 0;
    for (int64_t width = blocks_of(classes);; width = blocks_of(width)) {
      size += blocks_of(width) * kLanes;
      if (width <= kLanes) return size;
    }
  }

  float largest() const {
    Vf held[2] = {splat<Vf>(-kInfinity), splat<Vf>(-kInfinity)};
    int64_t b = 0;
    for (; b + 1 < blocks_; b += 2) {
      for (int i = 0; i < 2; ++i) {
        const Vf x = row_->block(b + i);
        held[i] = select(x > held[i], x, held[i]);
      }
    }
    if (b < blocks_) {
      const Vf x = row_->block(b);
      held[0] = select(x > held[0], x, held[0]);
    }
    return maximum_of(select(held[1] > held[0], held[1], held[0]));
  }

  template <bool kDivided>
  GENPERF_HD Vf exponential(Vf x) const {
    x = x - largest_;
    if constexpr (kDivided) x = x / temperature_;
    return exp(x);
  }

  template <bool kDivided>
  GENPERF_HD Vf weight_of(int64_t b) const {
    const Vf x = row_->block(b);
    return limit_.weight(exponential<kDivided>(x), x, lane_numbers(b));
  }

  // Fills the tree and returns its root, given a block's weights.
  template <class Function>
  GENPERF_HD float sum_tree(Function weights) {
    float* level = sums_.get();
    int64_t width = blocks_, b = 0;
    for (; b + 3 < width; b += 4) {
      const Quad sums = block_sums(folded(weights(b)), folded(weights(b + 1)), folded(weights(b + 2)),
                                   folded(weights(b + 3)));
      std::memcpy(level + b, &sums, sizeof sums);
    }
    for (; b < width; ++b) level[b] = sum_of(weights(b));
    for (;;) {
      for (int64_t i = width; i < blocks_of(width) * kLanes; ++i) level[i] = 0.0f;
      if (width <= kLanes) return sum_of(load(level));
      float* const above = level + blocks_of(width) * kLanes;
      width = blocks_of(width);
      for (b = 0; b < width; ++b) above[b] = sum_of(load(level + b * kLanes));
      level = above;
    }
  }

  static GENPERF_HD float sum_of(Vf x) {
    const Quad q = folded(x);
    return (q[0] + q[2]) + (q[1] + q[3]);
  }

  template <bool kDivided>
  float sum_blocks() {
    if (top_p_ < 1.0f) {
      for (int64_t b = 0; b < blocks_; ++b) store(leaves_.get() + b * kLanes, weight_of<kDivided>(b));
      return sum_tree([&](int64_t b) { return load(leaves_.get() + b * kLanes); });
    }
    if (top_k_ > 0) return sum_tree([&](int64_t b) { return weight_of<kDivided>(b); });
    return sum_tree([&](int64_t b) { return exponential<kDivided>(row_->block(b)); });
  }

  float sum_within(const Limit& limit) {
    return sum_tree([&](int64_t b) {
      return limit.weight(load(leaves_.get() + b * kLanes), row_->block(b), lane_numbers(b));
    });
  }

  // Limits the row to its nucleus: bisection over all floats, then over the indices of those equal to the
  // least that is kept. A sum never falls as weights are added, also when rounded.
  void keep_nucleus() {
    const double wanted = static_cast<double>(top_p_) * static_cast<double>(total_);
    auto enough = [&](const Limit& limit) { return static_cast<double>(sum_within(limit)) >= wanted; };
    int32_t low = order_of(to_bits(limit_.least)), high = order_of(to_bits(largest_));
    while (low < high) {
      const int32_t middle =
          low + static_cast<int32_t>((static_cast<uint32_t>(high) - static_cast<uint32_t>(low) + 1) / 2);
      if (enough({from_bits<float>(order_of(middle)), INT32_MAX})) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    const float least = from_bits<float>(order_of(low));
    int64_t first = 1, last = row_->n;
    while (first < last) {
      const int64_t middle = (first + last) / 2;
      if (enough({least, static_cast<int32_t>(middle)})) {
        last = middle;
      } else {
        first = middle + 1;
      }
    }
    limit_ = {least, static_cast<int32_t>(first)};
    total_ = sum_within(limit_);
  }

  int64_t blocks_;
  float temperature_, top_p_;
  int top_k_;
  Scratch<float> sums_, leaves_;
  const Row* row_ = nullptr;
  Limit limit_;
  float largest_ = 0.0f, total_ = 0.0f;
};

}  // namespace GENPERF_ISA
}  // namespace genperf
