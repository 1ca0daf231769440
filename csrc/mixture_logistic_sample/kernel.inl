// The CPU kernel, built once per instruction set (GENPERF_ISA). Vector lanes are positions.
#include "../common/logistic.h"
#include "../common/philox_cpu.h"
#include "../common/planes.h"
#include "../common/scratch.h"
#include "../pixel_sampler/head.h"
#include "mixture_logistic_sample.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

constexpr int kMaxChannels = 3;

// The uniforms of a tile, [slot][position].
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

  // `u` has slots tiles: the mixture's, if there are logits, then the values'.
  void read(int64_t start, int n, float* u) const {
    Planes::Span span;
    if (!key) {
      const int first = slots - channels;
      if (first && !gumbel()) {
        of_mixture.locate(start, n, span);
        copy(of_mixture, span, n, 1, u);
      }
      of_values.locate(start, n, span);
      copy(of_values, span, n, channels, u + first * kTile);
      return;
    }
    for (int done = 0; done < n;) {
      const int64_t at = start + done, sample = key.ndim == 2 ? at / per_sample : 0;
      const int64_t within = key.ndim == 2 ? at - sample * per_sample : at;
      const int64_t left = key.ndim == 2 ? per_sample - within : n;
      const int count = left < n - done ? static_cast<int>(left) : n - done;
      alignas(64) PhiloxBuffer buffer;
      const float* x = philox_chunk<Distribution::kUniform>(philox_key(key, sample), within * slots,
                                                            count * slots, buffer);
      for (int i = 0; i < count; ++i)
        for (int j = 0; j < slots; ++j) u[j * kTile + done + i] = x[i * slots + j];
      done += count;
    }
  }

 private:
  static void copy(const Planes& from, const Planes::Span& span, int n, int channels, float* to) {
    for (int c = 0; c < channels; ++c)
      for (int i = 0; i < n; ++i) to[c * kTile + i] = from.element(span, i, c);
  }
};

using Index = int32_t[kLanes];

// head.h's choice among at most 16 classes, for 16 positions at a time: the same sums in the same order.
void choose_few(const Tile& logits, int classes, int i, Vf u, float temperature, Index& chosen) {
  Vf largest = splat<Vf>(-kInfinity), weight[pixel::kLeaf];
  for (int k = 0; k < classes; ++k) {
    const Vf x = load(logits[k] + i);
    largest = select(x > largest, x, largest);
  }
  for (int k = 0; k < pixel::kLeaf; ++k) weight[k] = splat<Vf>(0.0f);
  for (int k = 0; k < classes; ++k) weight[k] = exp((load(logits[k] + i) - largest) / temperature);
  Vf sum[pixel::kLeaf / 2];
  for (int j = 0; j < pixel::kLeaf / 2; ++j) sum[j] = weight[j] + weight[j + pixel::kLeaf / 2];
  for (int half = pixel::kLeaf / 4; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) sum[j] = sum[j] + sum[j + half];
  alignas(64) float total[kLanes], uniform[kLanes], w[kLanes];
  store(total, sum[0]), store(uniform, u);
  alignas(64) double target[kLanes], running[kLanes] = {}, short_of[kLanes] = {}, last[kLanes] = {};
  for (int lane = 0; lane < kLanes; ++lane)
    target[lane] = static_cast<double>(uniform[lane]) * static_cast<double>(total[lane]);
  for (int k = 0; k < classes; ++k) {
    store(w, weight[k]);
    for (int lane = 0; lane < kLanes; ++lane) {
      running[lane] = running[lane] + static_cast<double>(w[lane]);
      short_of[lane] = short_of[lane] + (running[lane] < target[lane] ? 1.0 : 0.0);
      last[lane] = w[lane] > 0.0f ? static_cast<double>(k) : last[lane];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const double k = short_of[lane] < last[lane] ? short_of[lane] : last[lane];
    chosen[lane] = total[lane] >= 1.0f ? static_cast<int32_t>(k) : -1;
  }
}

// The largest logit with Gumbel noise.
void choose_largest(const Tile& logits, const Tile& uniforms, int64_t classes, int i, float temperature,
                    Index& chosen) {
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

}  // namespace

void mixture_logistic_draw(const MixtureLogisticSampleArgs& a) {
  const Planes from(a.params), out(a.out);
  const int channels = static_cast<int>(out.channels());
  const int64_t positions = a.out.numel() / (channels > 0 ? channels : 1),
                per_sample = a.out.shape[0] > 0 ? positions / a.out.shape[0] : 0,
                tiles = (positions + kTile - 1) / kTile;
  const int64_t k = a.mixtures, block = k * (channels == 1 ? 2 : 3), first = a.logits ? k : 0;
  const Uniforms uniforms(a, per_sample);
  const bool few = k <= pixel::kLeaf, gumbel = uniforms.gumbel();
  pixel::Head head{};
  head.kind = pixel::HeadKind::kCategorical;
  head.classes = static_cast<int32_t>(k);
#pragma omp parallel if (positions * from.channels() >= 16384)
  {
    Scratch<float> logits_buffer(first * kTile), noise_buffer(gumbel ? k * kTile : 0),
        tree(few ? 0 : pixel::head_scratch(head));
    alignas(64) float u[(1 + kMaxChannels) * kTile] = {}, out_buffer[kMaxChannels * kTile];
    // Of the mixtures that were chosen: means, log-scales and coefficients.
    alignas(64) float part[3][kMaxChannels][kLanes] = {};
    Planes::Span span, to;
    Index chosen = {};
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t start = t * kTile, left = positions - start;
      const int n = static_cast<int>(left < kTile ? left : kTile);
      uniforms.read(start, n, u);
      Tile noise{};
      if (gumbel) {
        uniforms.of_mixture.locate(start, n, span);
        noise = uniforms.of_mixture.read(span, n, k, noise_buffer.get());
      }
      from.locate(start, n, span);
      const Tile logits = a.logits ? from.read(span, n, k, logits_buffer.get()) : Tile{};
      out.locate(start, n, to);
      const Tile values{out_buffer};
      for (int i = 0; i < n; i += kLanes) {
        const int size = n - i < kLanes ? n - i : kLanes;
        if (a.logits && gumbel) {
          choose_largest(logits, noise, k, i, a.temperature, chosen);
        } else if (a.logits && few) {
          choose_few(logits, static_cast<int>(k), i, load(u + i), a.temperature, chosen);
        } else if (a.logits) {
          for (int lane = 0; lane < size; ++lane)
            chosen[lane] = pixel::choose(pixel::Serial(), logits[0] + i + lane, kTile, static_cast<int>(k),
                                         u[i + lane], a.temperature, 0, tree.get());
        }
        for (int lane = 0; lane < size; ++lane) {
          for (int c = 0; c < channels; ++c) {
            for (int p = 0; p < (channels == 1 ? 2 : 3); ++p) {
              const int64_t channel = first + c * block + p * k + chosen[lane];
              part[p][c][lane] = chosen[lane] < 0 ? kNaN : from.element(span, i + lane, channel);
            }
          }
        }
        Vf drawn[kMaxChannels];
        for (int c = 0; c < channels; ++c) {
          Vf mean = load(part[0][c]), derivative;
          for (int other = 0; other < c; ++other)
            mean = mean + tanh(load(part[2][c - 1 + other]), derivative) * drawn[other];
          const Vf uniform = load(u + (uniforms.slots - channels + c) * kTile + i);
          drawn[c] = logistic_value(mean, load(part[1][c]), uniform, a.min_log_scale, a.heat);
          store(values[c] + i, a.unit ? drawn[c] * 0.5f + 0.5f : drawn[c]);
        }
      }
      out.write(to, n, out_buffer);
    }
    Planes::finish();
  }
}

}  // namespace GENPERF_ISA
}  // namespace genperf
