// CPU kernel, built once per instruction set (GENPERF_ISA).
#include "../common/uniform_ends.h"
#include "bernoulli_sample.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

void draw(const UniformChunks& uniforms, const float* logits, int n, float temperature, float* out) {
  for (int i = 0; i < n; i += kLanes) {
    const UniformEnds u = uniforms.noise() ? ends_from_uniform(uniforms.uniforms(i)) : uniforms.ends(i);
    // The logarithms are of positive numbers; a uniform of 0 or 1 is below all or no probabilities.
    const Vi positive = u.distance > 0.0f;
    const Vf w = select(positive, u.distance, splat<Vf>(0.5f));
    const Vf logit = select(positive, log(w) - log_1p(-w), splat<Vf>(-kInfinity));
    const Vf quantile = select(u.below, logit, -logit) * temperature;
    const Vf l = load(logits + i);
    const Vf x = select(l > quantile, splat<Vf>(1.0f), splat<Vf>(0.0f));
    store(out + i, select(l == l, x, l));
  }
}

}  // namespace

void bernoulli_sample(const BernoulliSampleArgs& a) {
  const int64_t n = a.out.numel(), samples = a.key.ndim == 2 ? a.key.shape[0] : 1;
  const int64_t per_sample = samples == 0 ? 0 : n / samples;
  const int64_t chunks_per_sample = (per_sample + kChunk - 1) / kChunk;
  const View out = collapse(a.out), logits = collapse(a.logits);

#pragma omp parallel if (n >= 16384)
  {
    UniformChunks uniforms(a.noise, a.key);
    alignas(64) Buffer to_buffer, from_buffer;
#pragma omp for schedule(static)
    for (int64_t c = 0; c < samples * chunks_per_sample; ++c) {
      const int64_t sample = c / chunks_per_sample, first = (c % chunks_per_sample) * kChunk;
      const int count = static_cast<int>(per_sample - first < kChunk ? per_sample - first : kChunk);
      const int64_t start = sample * per_sample + first;
      uniforms.read(sample, per_sample, first, count);
      float* const to = open_chunk(out, start, count, to_buffer);
      draw(uniforms, read_chunk(logits, start, count, from_buffer), count, a.temperature, to);
      close_chunk(out, start, count, to, to_buffer);
    }
  }
}

}  // namespace GENPERF_ISA
}  // namespace genperf
