// CPU kernel, built once per instruction set (GENPERF_ISA).
#include "../common/logistic.h"
#include "../common/uniform_ends.h"
#include "truncated_normal.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

// By Horner's rule, the highest power first.
template <int kTerms>
GENPERF_HD Vf polynomial(Vf x, const float (&c)[kTerms]) {
  Vf y = splat<Vf>(c[0]);
#pragma GCC unroll 8
  for (int i = 1; i < kTerms; ++i) y = y * x + c[i];
  return y;
}

constexpr float kCentralNumerator[] = {59.10843276977539f, 159.28977966308594f, 50.434104919433594f,
                                       3.3871326446533203f};
constexpr float kCentralDenominator[] = {67.18669891357422f, 78.75720977783203f, 17.89512062072754f, 1.0f};
constexpr float kTailNumerator[] = {0.6401156187057495f, 5.35111665725708f, 5.392025947570801f,
                                    -5.0748419761657715f, -2.906881332397461f};
constexpr float kTailDenominator[] = {0.4525196850299835f, 3.793017625808716f, 4.832771301269531f, 1.0f};

// The quantile of the body: a rational function of q^2 about the median, elsewhere one of the root of the
// logarithm of the nearer tail.
GENPERF_HD Vf body(UniformEnds u, const float (&c)[9]) {
  const Vf w = u.distance, rest = 1.0f - w;
  const Vf q = select(u.below, c[0] + w * c[2], c[1] - w * c[2]);
  const Vi negative = q < 0.0f;
  const Vf low = c[3] + select(u.below, w, rest) * c[2], high = c[4] + select(u.below, rest, w) * c[2];
  const Vf t = sqrt_rn(-log(select(negative, low, high)));
  const Vf tail = polynomial(t, kTailNumerator), r = 0.180625f - q * q;
  const Vi central = abs(q) <= 0.425f;
  const Vf numerator = select(central, q * polynomial(r, kCentralNumerator), select(negative, -tail, tail));
  const Vf denominator = select(central, polynomial(r, kCentralDenominator), polynomial(t, kTailDenominator));
  return c[5] + c[6] * (numerator / denominator);
}

// A far tail: a step of Newton's method for x^2, from that of the exponential distribution.
GENPERF_HD Vf far_tail(UniformEnds u, const float (&c)[9]) {
  const Vf w = u.distance, rest = 1.0f - w;
  const Vf y = select(u.below, w, rest) * c[0];
  const Vi near = y <= 0.5f;
  const Vf of_near = log_1p(-select(near, y, splat<Vf>(0.0f)));
  const Vf of_far = log(c[1] + select(u.below, rest, w) * c[0]);
  Vf d = -2.0f * select(near, of_near, of_far);
  const Vf g = d * c[2], v = c[2] / (1.0f + g);
  const Vf mills =
      g * v * ((1.0f - 2.5f * (v + c[2])) + 12.333333015441895f * (v * v + v * c[2] + c[2] * c[2]));
  const Vf slope = 1.0f + v * (1.0f - v * (2.0f - 10.0f * v));
  d = d - (log_1p(g) - 2.0f * mills) / slope;
  return c[4] + c[3] * (d / (sqrt_rn(1.0f + d * c[2]) + 1.0f));
}

template <int kKind>
void draw(const UniformChunks& uniforms, int n, const float (&constants)[9], float* out) {
  float c[9];  // a copy: the stores below might alias the arguments
  std::memcpy(c, constants, sizeof c);
  for (int i = 0; i < n; i += kLanes) {
    UniformEnds u = uniforms.noise() ? ends_from_uniform(clamp(uniforms.uniforms(i), 2.98023223876953125e-8f,
                                                               0.999999940395355224609375f))
                                     : uniforms.ends(i);
    if constexpr (kKind == 2) u.below = u.below ^ -1;
    const Vf y = kKind == 0 ? body(u, c) : far_tail(u, c);
    store(out + i, clamp(y, c[7], c[8]));
  }
}

}  // namespace

void truncated_normal(const TruncatedNormalArgs& a) {
  const int64_t n = a.out.numel(), samples = a.key.ndim == 2 ? a.key.shape[0] : 1;
  const int64_t per_sample = samples == 0 ? 0 : n / samples;
  const int64_t chunks_per_sample = (per_sample + kChunk - 1) / kChunk;
  const View out = collapse(a.out);
  const auto loop = a.kind == 0 ? draw<0> : a.kind == 1 ? draw<1> : draw<2>;

#pragma omp parallel if (n >= 16384)
  {
    UniformChunks uniforms(a.noise, a.key);
    alignas(64) Buffer buffer;
#pragma omp for schedule(static)
    for (int64_t c = 0; c < samples * chunks_per_sample; ++c) {
      const int64_t sample = c / chunks_per_sample, first = (c % chunks_per_sample) * kChunk;
      const int count = static_cast<int>(per_sample - first < kChunk ? per_sample - first : kChunk);
      const int64_t start = sample * per_sample + first;
      uniforms.read(sample, per_sample, first, count);
      float* const to = open_chunk(out, start, count, buffer);
      loop(uniforms, count, a.constants, to);
      close_chunk(out, start, count, to, buffer);
    }
  }
}

}  // namespace GENPERF_ISA
}  // namespace genperf
