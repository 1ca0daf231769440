// CPU kernels, built once per instruction set (GENPERF_ISA). Vector lanes are positions. A block of 16
// positions goes over all mixtures once, which leaves their log-probabilities and derivatives in the
// first-level cache, and then over these.
#include "../common/mask.h"
#include "../common/planes.h"
#include "../common/scratch.h"
#include "math.h"
#include "mixture_logistic_nll.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

// Where parameter `part` of an image channel begins: means 0, log-scales 1, coefficients 2.
struct Layout {
  int64_t mixtures, first, block;

  explicit Layout(const MixtureLogisticNllArgs& a)
      : mixtures(a.mixtures),
        first(a.logits ? a.mixtures : 0),
        block(a.mixtures * (a.x.shape[1] == 1 ? 2 : 3)) {}

  int64_t at(int channel, int part, int64_t k) const { return first + channel * block + part * mixtures + k; }
};

// In whose block the share of channel `other` in the mean of `channel` stands.
constexpr int coefficient(int channel, int other) { return channel - 1 + other; }

constexpr int coefficients(int channels) { return channels == 1 ? 0 : 3; }

// What is kept of a mixture for the second pass, in blocks of 16 floats: its log-probability without `ratio`,
// then its weight; `ratio`, then the weight of its logit; for each image channel the derivatives by distance
// and log-scale; derivatives and values of the shares.
constexpr int kept(int channels) { return 2 + 2 * channels + 2 * coefficients(channels); }

// The running largest; NaN is left out, the sums tell of it.
GENPERF_HD Vf larger(Vf x, Vf y) { return select(x > y, x, y); }

// exp(x - largest), 0 where that is below 2^-124.
GENPERF_HD Vf weight(Vf x, Vf largest) {
  const Vf z = (x - largest) * kLog2E;
  return select(z < -124.0f, splat<Vf>(0.0f), exp2_down(z));
}

// Subtracted in place of a largest of -inf, where there is nothing to weigh.
GENPERF_HD Vf finite(Vf largest) { return select(largest == -kInfinity, splat<Vf>(0.0f), largest); }

struct Sums {
  Vf nll, largest, sum;  // of the mixtures' log-probabilities, without their `ratio`; of their weights
  Vf logits_largest, logits_sum;
};

// Positions i .. i + 15 of a tile, over all mixtures. `held` gets what is kept of each.
template <int kChannels, bool kExact, bool kGradient>
Sums sum_mixtures(const Layout& layout, bool logits, const LevelDefinition& d, const Tile& params,
                  const Vf* x, int i, float* held) {
  constexpr int kKept = kGradient ? kept(kChannels) : 2;
  constexpr int kShares = coefficients(kChannels);
  Sums s;
  s.largest = s.logits_largest = splat<Vf>(-kInfinity);
  bool tails[kChannels];
  for (int c = 0; c < kChannels; ++c) tails[c] = any((x[c] <= d.low) ^ (x[c] >= d.high));
  for (int64_t k = 0; k < layout.mixtures; ++k) {
    float* const keep = held + k * kKept * kLanes;
    const auto param = [&](int channel, int part) { return load(params[layout.at(channel, part, k)] + i); };
    Level<kExact, kGradient, Vf> level[kChannels];
    [[maybe_unused]] Vf share[3], slope[3];
    for (int c = 0; c < kChannels; ++c) level[c].scale(param(c, 1), d);
    if constexpr (kShares == 3) {
      Vf u[3], denominator[3], over[3];
      for (int j = 0; j < 3; ++j) u[j] = share_exponential(param(j, 2));
      for (int j = 0; j < 3; ++j) denominator[j] = 1.0f + u[j];
      reciprocals<3>(denominator, over);
      for (int j = 0; j < 3; ++j) share[j] = share_of(param(j, 2), u[j], over[j], slope[j]);
    }
    for (int c = 0; c < kChannels; ++c) {
      Vf mean = param(c, 0);
      for (int other = 0; other < c; ++other) mean = mean + share[coefficient(c, other)] * x[other];
      level[c].distance(x[c], mean, d);
    }
    Vf denominator[kChannels], over[kChannels];
    for (int c = 0; c < kChannels; ++c) level[c].parts();
    for (int c = 0; c < kChannels; ++c) denominator[c] = level[c].denominator;
    reciprocals<kChannels>(denominator, over);
    Vf joint = splat<Vf>(0.0f), ratio = splat<Vf>(1.0f);
    for (int c = 0; c < kChannels; ++c) {
      level[c].finish(x[c], param(c, 1), over[c], tails[c], d);
      joint = joint + level[c].exponent;
      ratio = ratio * level[c].ratio;
      if constexpr (kGradient) {
        store(keep + (2 + c) * kLanes, level[c].by_distance);
        store(keep + (2 + kChannels + c) * kLanes, level[c].by_log_scale);
      }
    }
    for (int j = 0; kGradient && j < kShares; ++j) {
      store(keep + (2 + 2 * kChannels + j) * kLanes, slope[j]);
      store(keep + (5 + 2 * kChannels + j) * kLanes, share[j]);
    }
    if (logits) {
      const Vf logit = load(params[k] + i);
      joint = joint + logit;
      s.logits_largest = larger(logit, s.logits_largest);
    }
    s.largest = larger(joint, s.largest);
    store(keep, joint);
    store(keep + kLanes, ratio);
  }
  const Vf largest = finite(s.largest);
  s.sum = s.logits_sum = splat<Vf>(0.0f);
  for (int64_t k = 0; k < layout.mixtures; ++k) {
    float* const keep = held + k * kKept * kLanes;
    const Vf w = weight(load(keep), largest) * load(keep + kLanes);
    s.sum = s.sum + w;
    if constexpr (kGradient) store(keep, w);
    if (!logits) continue;
    const Vf prior = weight(load(params[k] + i), s.logits_largest);
    s.logits_sum = s.logits_sum + prior;
    if constexpr (kGradient) store(keep + kLanes, prior);
  }
  s.nll = 0.0f - (s.largest + log(s.sum));
  if (logits) s.nll = s.nll + (s.logits_largest + log(s.logits_sum));
  return s;
}

// The gradients at positions i .. i + 15, from what was kept: those of a gradient of 1 by nll times
// `upstream`, so that the one or the other comes to the same bits.
template <int kChannels>
void write_gradients(const Layout& layout, bool logits, const Vf* x, const Sums& s, Vf upstream, int i,
                     const float* held, const Tile* grad_params, const Tile* grad_x) {
  constexpr int kKept = kept(kChannels);
  const Vf logits_over = 1.0f / s.logits_sum;
  Vf of_x[kChannels];
  for (Vf& g : of_x) g = splat<Vf>(0.0f);
  for (int64_t k = 0; k < layout.mixtures; ++k) {
    const float* const keep = held + k * kKept * kLanes;
    const Vf w = -(load(keep) / s.sum);  // of one mixture, exactly -1
    Vf by_distance[kChannels];
    for (int c = 0; c < kChannels; ++c) by_distance[c] = w * load(keep + (2 + c) * kLanes);
    if (grad_x) {
      for (int c = 0; c < kChannels; ++c) {
        of_x[c] = of_x[c] + by_distance[c];
        for (int other = 0; other < c; ++other) {
          const Vf share = load(keep + (5 + 2 * kChannels + coefficient(c, other)) * kLanes);
          of_x[other] = of_x[other] - by_distance[c] * share;
        }
      }
    }
    if (!grad_params) continue;
    const Tile& g = *grad_params;
    if (logits) store(g[k] + i, (load(keep + kLanes) * logits_over + w) * upstream);
    for (int c = 0; c < kChannels; ++c) {
      store(g[layout.at(c, 0, k)] + i, -by_distance[c] * upstream);
      store(g[layout.at(c, 1, k)] + i, w * load(keep + (2 + kChannels + c) * kLanes) * upstream);
      for (int other = 0; other < c; ++other) {
        const int j = coefficient(c, other);
        store(g[layout.at(j, 2, k)] + i,
              -by_distance[c] * x[other] * load(keep + (2 + 2 * kChannels + j) * kLanes) * upstream);
      }
    }
  }
  for (int c = 0; grad_x && c < kChannels; ++c) store((*grad_x)[c] + i, of_x[c] * upstream);
}

// All positions by tiles, which do not end with a sample.
struct Walk {
  const Layout layout;
  const LevelDefinition definition;
  const Planes params, x;
  const int64_t per_sample, positions, tiles;

  explicit Walk(const MixtureLogisticNllArgs& a)
      : layout(a),
        definition{a.half, log(2.0f * a.half), a.low, a.high, a.min_log_scale},
        params(a.params),
        x(a.x),
        per_sample(a.x.numel() == 0 ? 0 : a.x.numel() / a.x.shape[0] / a.x.shape[1]),
        positions(a.x.numel() == 0 ? 0 : a.x.shape[0] * per_sample),
        tiles((positions + kTile - 1) / kTile) {}

  int size(int64_t tile) const {
    const int64_t left = positions - tile * kTile;
    return static_cast<int>(left < kTile ? left : kTile);
  }
  bool parallel() const { return positions * params.channels() >= 16384; }
};

// The values of a block in [-1, 1].
template <int kChannels>
void read_values(const Tile& x, int i, bool unit, Vf* values) {
  for (int c = 0; c < kChannels; ++c) {
    values[c] = load(x[c] + i);
    if (unit) values[c] = 2.0f * values[c] - 1.0f;
  }
}

// The parameters of the tiles that a thread takes one after another. The next ones are asked for between the
// blocks of one, so that memory is read while there is arithmetic.
class Reader {
 public:
  explicit Reader(const Walk& walk)
      : walk_(walk), channels_(walk.params.channels()), buffer_(channels_ * kRow) {}

  Tile read(int64_t tile) {
    const int n = walk_.size(tile);
    walk_.params.locate(tile * kTile, n, span_);
    next_ = tile + 1 < walk_.tiles;
    if (next_) walk_.params.locate((tile + 1) * kTile, walk_.size(tile + 1), ahead_);
    return walk_.params.read(span_, n, channels_, buffer_.get());
  }
  // Before the block at position i.
  void prefetch(int i) const {
    if (next_) walk_.params.prefetch(ahead_, channels_ * i / kTile, channels_ * (i + kLanes) / kTile);
  }

 private:
  const Walk& walk_;
  const int64_t channels_;
  Scratch<float> buffer_;
  Planes::Span span_, ahead_;
  bool next_ = false;
};

// Their gradients, likewise: a tile's are written between the blocks of the next.
class Writer {
 public:
  explicit Writer(const View& to)
      : to_(to ? Planes(to) : Planes()), buffer_(2 * to_.channels() * kRow), written_(to_.channels()) {}

  Tile tile(int64_t start, int n) {
    to_.locate(start, n, span_[now_]);
    n_[now_] = n;
    return {buffer_.get() + now_ * to_.channels() * kRow};
  }
  // After the block at position i.
  void advance(int i) { write(to_.channels() * (i + kLanes) / kTile); }
  void finish_tile() {
    flush();
    now_ ^= 1;
    written_ = 0;
  }
  void flush() { write(to_.channels()); }

 private:
  void write(int64_t end) {
    const int before = now_ ^ 1;
    if (end > written_)
      to_.write(span_[before], n_[before], buffer_.get() + before * to_.channels() * kRow, written_, end);
    written_ = end > written_ ? end : written_;
  }

  const Planes to_;
  Scratch<float> buffer_;
  int64_t written_;  // channels of the tile before
  Planes::Span span_[2];
  int n_[2] = {}, now_ = 0;
};

template <int kChannels, bool kExact>
void forward(const MixtureLogisticNllArgs& a, const Walk& walk, float* nll) {
#pragma omp parallel if (walk.parallel())
  {
    Reader reader(walk);
    Scratch<float> held(walk.layout.mixtures * 2 * kLanes);
    alignas(64) float x_buffer[kChannels * kRow], out[kTile];
    Planes::Span span;
    Vf x[kChannels];
#pragma omp for schedule(static)
    for (int64_t t = 0; t < walk.tiles; ++t) {
      const int64_t start = t * kTile;
      const int n = walk.size(t);
      const Tile params = reader.read(t);
      walk.x.locate(start, n, span);
      const Tile values = walk.x.read(span, n, kChannels, x_buffer);
      float* const to = n == kTile ? nll + start : out;
      for (int i = 0; i < n; i += kLanes) {
        reader.prefetch(i);
        read_values<kChannels>(values, i, a.unit, x);
        const Sums s = sum_mixtures<kChannels, kExact, false>(walk.layout, a.logits, walk.definition, params,
                                                              x, i, held.get());
        store(to + i, s.nll);
      }
      for (int i = 0; to == out && i < n; ++i) nll[start + i] = out[i];
    }
  }
}

// `nll`, if given, gets the likelihoods; without an upstream gradient it is 1.
template <int kChannels, bool kExact>
void backward(const MixtureLogisticNllArgs& a, const Walk& walk, float* nll) {
  const Planes to_x = a.grad_x ? Planes(a.grad_x) : Planes();
  const float* const upstream = a.grad_nll ? static_cast<const float*>(a.grad_nll.data) : nullptr;
#pragma omp parallel if (walk.parallel())
  {
    Reader reader(walk);
    Writer writer(a.grad_params);
    Scratch<float> held(walk.layout.mixtures * kept(kChannels) * kLanes);
    alignas(64) float x_buffer[kChannels * kRow], grad_x_buffer[kChannels * kRow], factor[kTile] = {};
    Planes::Span span, x_span;
    Vf x[kChannels];
#pragma omp for schedule(static)
    for (int64_t t = 0; t < walk.tiles; ++t) {
      const int64_t start = t * kTile;
      const int n = walk.size(t);
      const Tile params = reader.read(t);
      walk.x.locate(start, n, span);
      const Tile values = walk.x.read(span, n, kChannels, x_buffer);
      for (int i = 0; i < n; ++i) {
        const int64_t at = a.reduction == 0   ? start + i
                           : a.reduction == 1 ? (start + i) / walk.per_sample
                                              : 0;
        factor[i] = upstream ? upstream[at] : 1.0f;
      }
      Tile grad_params{}, grad_x{};
      if (a.grad_params) grad_params = writer.tile(start, n);
      if (a.grad_x) {
        to_x.locate(start, n, x_span);
        grad_x = {grad_x_buffer};
      }
      for (int i = 0; i < n; i += kLanes) {
        reader.prefetch(i);
        read_values<kChannels>(values, i, a.unit, x);
        const Sums s = sum_mixtures<kChannels, kExact, true>(walk.layout, a.logits, walk.definition, params,
                                                             x, i, held.get());
        if (nll) {
          alignas(64) float out[kLanes];
          store(out, s.nll);
          for (int j = 0; j < kLanes && i + j < n; ++j) nll[start + i + j] = out[j];
        }
        write_gradients<kChannels>(walk.layout, a.logits, x, s, load(factor + i), i, held.get(),
                                   a.grad_params ? &grad_params : nullptr, a.grad_x ? &grad_x : nullptr);
        writer.advance(i);
        for (int c = 0; a.grad_x && a.unit && c < kChannels; ++c)
          store(grad_x[c] + i, 2.0f * load(grad_x[c] + i));
      }
      writer.finish_tile();
      if (a.grad_x) to_x.write(x_span, n, grad_x_buffer);
    }
    writer.flush();
    Planes::finish();
  }
}

// The sum of n floats in an order that follows from n alone.
double sum_of(const float* x, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; i += kChunk)
    sum += sum_chunk(x + i, static_cast<int>(n - i < kChunk ? n - i : kChunk));
  return sum;
}

// Where the likelihoods of all positions go, and their sums.
struct Each {
  const MixtureLogisticNllArgs& a;
  const int64_t per_sample;
  const Scratch<float> buffer;
  float* const out;
  float* const nll;  // null where they are not wanted

  Each(const MixtureLogisticNllArgs& a, const Walk& walk)
      : a(a),
        per_sample(walk.per_sample),
        buffer(a.nll && a.reduction != 0 ? walk.positions : 0),
        out(a.nll ? static_cast<float*>(a.nll.data) : nullptr),
        nll(a.reduction == 0 || !out ? out : buffer.get()) {}

  void reduce() const {
    if (!out || a.reduction == 0) return;
    double total = 0.0;
    for (int64_t b = 0; b < a.x.shape[0]; ++b) {
      const double sum = sum_of(nll + b * per_sample, per_sample);
      total += sum;
      if (a.reduction == 1) out[b] = static_cast<float>(sum);
    }
    if (a.reduction == 2) out[0] = static_cast<float>(total);
  }
};

}  // namespace

void mixture_logistic_forward(const MixtureLogisticNllArgs& a) {
  const Walk walk(a);
  const Each each(a, walk);
  const auto run = a.x.shape[1] == 1 ? (a.exact ? forward<1, true> : forward<1, false>)
                                     : (a.exact ? forward<3, true> : forward<3, false>);
  run(a, walk, each.nll);
  each.reduce();
}

void mixture_logistic_backward(const MixtureLogisticNllArgs& a) {
  const Walk walk(a);
  const Each each(a, walk);
  const auto run = a.x.shape[1] == 1 ? (a.exact ? backward<1, true> : backward<1, false>)
                                     : (a.exact ? backward<3, true> : backward<3, false>);
  run(a, walk, each.nll);
  each.reduce();
}

}  // namespace GENPERF_ISA
}  // namespace genperf
