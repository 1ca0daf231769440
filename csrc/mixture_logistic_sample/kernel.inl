// The CPU kernel, built once per instruction set (GENPERF_ISA). Vector lanes are positions.
#include "../common/logistic.h"
#include "../common/mask.h"
#include "../common/philox_cpu.h"
#include "../common/planes.h"
#include "../common/scratch.h"
#include "../pixel_sampler/head.h"
#include "mixture_logistic_sample.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

constexpr int kMaxChannels = 3;

// A word of 16 groups from the order of philox_block to that of the groups.
Vu in_order(Vu word) {
  constexpr int kNativeLanes = kLanes / kParts, kQuads = kNativeLanes / 4;
  Nu lane;
  for (int i = 0; i < kNativeLanes; ++i) lane[i] = 4 * (i % kQuads) + i / kQuads;
  return for_parts<Vu>([&](int i) { return __builtin_shuffle(word.part[i], lane); });
}

// The uniforms of a tile, a row for each slot: the mixture's, if there are logits, then the values'.
struct Uniforms {
  const View key;
  const Planes of_mixture, of_values;
  const int channels, slots;
  const int64_t per_sample;

  Uniforms(const MixtureLogisticSampleArgs& a, int64_t per_sample)
      : key(a.key),
        of_mixture(a.of_mixture ? Planes(a.of_mixture) : Planes()),
        of_values(a.of_values ? Planes(a.of_values) : Planes()),
        channels(static_cast<int>(a.out.shape[1])),
        slots(channels + a.logits),
        per_sample(per_sample) {}

  bool gumbel() const { return !key && of_mixture.channels() > 1; }

  void read(int64_t start, int n, float* u) const {
    if (!key) {
      Planes::Span span;
      const int first = slots - channels;
      if (first && !gumbel()) {
        of_mixture.locate(start, n, span);
        copy(of_mixture, span, n, 1, u);
      }
      of_values.locate(start, n, span);
      copy(of_values, span, n, channels, u + first * kRow);
      return;
    }
    for (int done = 0; done < n;) {
      const int64_t at = start + done, sample = key.ndim == 2 ? at / per_sample : 0;
      const int64_t within = key.ndim == 2 ? at - sample * per_sample : at;
      const int64_t left = key.ndim == 2 ? per_sample - within : n;
      const int count = left < n - done ? static_cast<int>(left) : n - done;
      draw(philox_key(key, sample), within, count, u + done);
      done += count;
    }
  }

 private:
  static void copy(const Planes& from, const Planes::Span& span, int n, int channels, float* to) {
    for (int c = 0; c < channels; ++c)
      for (int i = 0; i < n; ++i) to[c * kRow + i] = from.element(span, i, c);
  }

  // Positions [start, start + n) of a sample; up to 15 more are written.
  void draw(PhiloxKey k, int64_t start, int n, float* u) const {
    if (slots == 4) {  // a position's are the four words of one group
      const PhiloxSchedule schedule(k);
      alignas(64) uint32_t words[kPhiloxBlock];
      for (int i = 0; i < n; i += kLanes) {
        philox_block(schedule, start + i, words);
        for (int j = 0; j < 4; ++j)
          store(u + j * kRow + i, uniform_from_bits<Vf>(in_order(load(words + j * kLanes))));
      }
      return;
    }
    alignas(64) PhiloxBuffer buffer;
    const float* x = philox_chunk<Distribution::kUniform>(k, start * slots, n * slots, buffer);
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < slots; ++j) u[j * kRow + i] = x[i * slots + j];
  }
};

// Doubles of a native vector, and as many of other types.
typedef double Nd __attribute__((vector_size(kNativeBytes)));
typedef int64_t Nl __attribute__((vector_size(kNativeBytes)));
typedef float HalfFloats __attribute__((vector_size(kNativeBytes / 2)));
typedef int32_t HalfInts __attribute__((vector_size(kNativeBytes / 2)));
constexpr int kDoubles = kNativeBytes / 8;

Nd doubles(const float* x) {
  HalfFloats narrow;
  std::memcpy(&narrow, x, sizeof narrow);
  return __builtin_convertvector(narrow, Nd);
}

// head.h's choice among at most 16 classes, for 16 positions at a time: the same sums in the same order.
void choose_few(const Tile& logits, int classes, int i, const float* u, float temperature, int32_t* chosen) {
  Vf largest = splat<Vf>(-kInfinity), least = splat<Vf>(kInfinity);
  for (int k = 0; k < classes; ++k) {
    const Vf x = load(logits[k] + i);
    largest = select(x > largest, x, largest);
    least = select(x < least, x, least);
  }
  alignas(64) float weight[pixel::kLeaf][kLanes];
  const bool cold = temperature != 1.0f;
  // In this range exp_bounded has the bits of exp.
  const bool far = any((least - largest) / temperature < -87.0f);
  for (int k = 0; k < classes; ++k) {
    Vf z = load(logits[k] + i) - largest;
    if (cold) z = z / temperature;
    store(weight[k], far ? exp(z) : exp_bounded(z));
  }
  for (int k = classes; k < pixel::kLeaf; ++k) store(weight[k], splat<Vf>(0.0f));
  Vf sum[pixel::kLeaf / 2];
  for (int j = 0; j < pixel::kLeaf / 2; ++j) sum[j] = load(weight[j]) + load(weight[j + pixel::kLeaf / 2]);
  for (int half = pixel::kLeaf / 4; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) sum[j] = sum[j] + sum[j + half];
  alignas(64) float total[kLanes];
  alignas(64) int32_t short_of[kLanes];
  store(total, sum[0]);
  for (int lane = 0; lane < kLanes; lane += kDoubles) {
    const Nd target = doubles(u + lane) * doubles(total + lane);
    Nd running{};
    Nl n{};
    for (int k = 0; k < classes; ++k) {
      running += doubles(weight[k] + lane);
      n -= running < target;
    }
    const HalfInts count = __builtin_convertvector(n, HalfInts);
    std::memcpy(short_of + lane, &count, sizeof count);
  }
  Vi index = load(short_of);
  const Vi none = index >= classes;
  if (any(none)) {  // rounding: the last of positive weight
    Vi last = splat<Vi>(0);
    for (int k = 0; k < classes; ++k) last = select(load(weight[k]) > 0.0f, splat<Vi>(k), last);
    index = select(none, last, index);
  }
  store(chosen, select(sum[0] >= 1.0f, index, splat<Vi>(-1)));
}

// The largest logit with Gumbel noise.
void choose_largest(const Tile& logits, const Tile& uniforms, int64_t classes, int i, float temperature,
                    int32_t* chosen) {
  Vf most = splat<Vf>(-kInfinity), largest = most, doubt = splat<Vf>(0.0f);
  Vi index = splat<Vi>(0);
  for (int64_t k = 0; k < classes; ++k) {
    const Vf logit = load(logits[k] + i), u = inner_uniform(load(uniforms[k] + i));
    const Vf score = logit / temperature - log_normal(-log_normal(u));
    const Vi better = score > most;
    most = select(better, score, most);
    index = select(better, splat<Vi>(static_cast<int32_t>(k)), index);
    largest = select(logit > largest, logit, largest);
    doubt = doubt + select(logit == -kInfinity, splat<Vf>(0.0f), logit) * 0.0f;
  }
  // The largest is finite, and none is NaN or +inf.
  store(chosen, select(largest * 0.0f + doubt == 0.0f, index, splat<Vi>(-1)));
}

struct Draw {
  const MixtureLogisticSampleArgs& a;
  const Planes from, out;
  const int channels, parts;
  const int64_t positions, mixtures, first, block;
  const Uniforms uniforms;

  explicit Draw(const MixtureLogisticSampleArgs& a)
      : a(a),
        from(a.params),
        out(a.out),
        channels(static_cast<int>(out.channels())),
        parts(channels == 1 ? 2 : 3),
        positions(channels > 0 ? a.out.numel() / channels : 0),
        mixtures(a.mixtures),
        first(a.logits ? a.mixtures : 0),
        block(mixtures * parts),
        uniforms(a, a.out.shape[0] > 0 ? positions / a.out.shape[0] : 0) {}

  // Part `part` of channel `channel` from a mixture's first mean on.
  int64_t shift(int channel, int part) const { return (channel * block + part * mixtures) * from.step(); }

  // The values of positions [0, n) of a tile, from the place of the chosen mixture's first mean, or of any
  // where `chosen` is -1, and the uniforms.
  template <int kChannels>
  void values(int n, const int64_t* place, const int32_t* chosen, const float* u, float* drawn) const {
    enum { kMean, kLogScale, kShare };
    alignas(64) float part[kShare + kChannels - 1][kRow];
    for (int c = 0; c < kChannels; ++c) {
      from.gather(place, n, shift(c, kMean), part[kMean]);
      from.gather(place, n, shift(c, kLogScale), part[kLogScale]);
      for (int other = 0; other < c; ++other)
        from.gather(place, n, shift(c - 1 + other, kShare), part[kShare + other]);
      for (int i = 0; i < n; i += kLanes) {
        Vf mean = select(load(chosen + i) < 0, splat<Vf>(kNaN), load(part[kMean] + i)), derivative;
        for (int other = 0; other < c; ++other)
          mean = mean + tanh(load(part[kShare + other] + i), derivative) * load(drawn + other * kRow + i);
        store(drawn + c * kRow + i, logistic_value(mean, load(part[kLogScale] + i), load(u + c * kRow + i),
                                                   a.min_log_scale, a.heat));
      }
    }
    for (int c = 0; a.unit && c < kChannels; ++c) {
      for (int i = 0; i < n; i += kLanes)
        store(drawn + c * kRow + i, load(drawn + c * kRow + i) * 0.5f + 0.5f);
    }
  }
};

// A thread's work: tile by tile.
struct Worker {
  const Draw& draw;
  const int mixtures;
  const bool gumbel, few;
  const int64_t rest;  // channels that are not logits
  Scratch<float> logits_buffer, noise_buffer, tree;
  alignas(64) float u[(1 + kMaxChannels) * kRow], drawn[kMaxChannels * kRow];
  alignas(64) int32_t chosen[kRow];
  int64_t place[kTile];
  Planes::Span span;

  explicit Worker(const Draw& draw)
      : draw(draw),
        mixtures(static_cast<int>(draw.mixtures)),
        gumbel(draw.uniforms.gumbel()),
        few(mixtures <= pixel::kLeaf),
        rest(draw.from.channels() - draw.first),
        logits_buffer(draw.first * kRow),
        noise_buffer(gumbel ? mixtures * kRow : 0),
        tree(few ? 0 : scratch_of(mixtures)) {}

  void run(int64_t start) {
    const MixtureLogisticSampleArgs& a = draw.a;
    const Planes& from = draw.from;
    const int64_t left = draw.positions - start;
    const int n = static_cast<int>(left < kTile ? left : kTile);
    draw.uniforms.read(start, n, u);
    Tile noise{};
    if (gumbel) {
      draw.uniforms.of_mixture.locate(start, n, span);
      noise = draw.uniforms.of_mixture.read(span, n, mixtures, noise_buffer.get());
    }
    from.locate(start, n, span);
    const Tile logits = from.read(span, n, draw.first, logits_buffer.get());
    for (int i = 0; i < n; i += kLanes) {
      if (!a.logits) {
        store(chosen + i, splat<Vi>(0));
      } else if (gumbel) {
        choose_largest(logits, noise, mixtures, i, a.temperature, chosen + i);
      } else if (few) {
        // Nearly every line has a value that is chosen.
        from.prefetch(span, draw.first + rest * i / kTile, draw.first + rest * (i + kLanes) / kTile);
        choose_few(logits, mixtures, i, u + i, a.temperature, chosen + i);
      } else {
        for (int j = i; j < i + kLanes && j < n; ++j)
          chosen[j] = pixel::choose(pixel::Serial(), logits[0] + j, kRow, mixtures, u[j], a.temperature, 0,
                                    tree.get());
      }
    }
    for (int i = 0; i < n; ++i) place[i] = from.place(span, i, draw.first + (chosen[i] < 0 ? 0 : chosen[i]));
    const float* const of_values = u + (draw.uniforms.slots - draw.channels) * kRow;
    if (draw.channels == 1) {
      draw.values<1>(n, place, chosen, of_values, drawn);
    } else {
      draw.values<3>(n, place, chosen, of_values, drawn);
    }
    draw.out.locate(start, n, span);
    draw.out.write(span, n, drawn);
  }

 private:
  static int64_t scratch_of(int mixtures) {
    pixel::Head head{};
    head.kind = pixel::HeadKind::kCategorical;
    head.classes = mixtures;
    return pixel::head_scratch(head);
  }
};

}  // namespace

void mixture_logistic_draw(const MixtureLogisticSampleArgs& a) {
  const Draw draw(a);
  if (draw.positions <= kTile) {  // of one pixel the team of threads would take as long as the draw
    if (draw.positions > 0) Worker(draw).run(0);
    Planes::finish();
    return;
  }
#pragma omp parallel if (draw.positions * draw.from.channels() >= 16384)
  {
    Worker worker(draw);
#pragma omp for schedule(static)
    for (int64_t start = 0; start < draw.positions; start += kTile) worker.run(start);
    Planes::finish();
  }
}

}  // namespace GENPERF_ISA
}  // namespace genperf
