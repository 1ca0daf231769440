// CPU kernel, built once per instruction set (GENPERF_ISA). A chunk passes through the first-level cache
// once.
#include "../common/logistic.h"
#include "../common/sample_chunks.h"
#include "element_nll.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

// A likelihood and its derivatives by first, second and x.
struct Element {
  Vf nll, first, second, x;
};

struct Bounds {
  float factor, low, high;
};

constexpr float kFar = 1152921504606846976.0f;         // 2^60
constexpr float kLeastLogScale = -41.58883083359672f;  // -log of it

struct BernoulliHead {
  template <bool kGradient>
  static GENPERF_HD Element evaluate(Vf l, Vf, Vf x, const Bounds&) {
    const Vf size = abs(l), e = exp(-size), u = 1.0f + e;
    const Vf share = select(l > 0.0f, 1.0f - x, x);
    Element out;
    // 0 where that is infinity times 0
    out.nll = select(share == 0.0f, share, size * share) + (log_normal(u) + (e - (u - 1.0f)) / u);
    if constexpr (kGradient) {
      out.first = select(l >= 0.0f, splat<Vf>(1.0f), e) / u - x;
      out.second = splat<Vf>(0.0f);
      out.x = -l;
    }
    return out;
  }
};

struct GaussianHead {
  template <bool kGradient>
  static GENPERF_HD Element evaluate(Vf mean, Vf raw, Vf x, const Bounds& b) {
    const Vf log_sigma = b.factor * clamp(raw, b.low, b.high);
    const Vf inverse = exp(-select(log_sigma < kLeastLogScale, splat<Vf>(kLeastLogScale), log_sigma));
    const Vf d = clamp(clamp(x - mean, -kFloatMax, kFloatMax) * inverse, -kFar, kFar);
    Element out;
    out.nll = 0.5f * d * d + log_sigma + 0.5f * kLog2Pi;
    if constexpr (kGradient) {
      out.x = d * inverse;
      out.first = -out.x;
      const Vf zero = splat<Vf>(0.0f);
      const Vf free = select(raw < b.low, zero, select(raw > b.high, zero, splat<Vf>(b.factor)));
      out.second = select(free == 0.0f, zero, free * (1.0f - d * d));
    }
    return out;
  }
};

struct Chunk {
  const float *first, *second, *x, *upstream;
  float *nll, *grad_first, *grad_second, *grad_x;
};

template <class Head, bool kGradient>
void loop(const Chunk& chunk, int n, const Bounds& bounds) {
  const Chunk c = chunk;  // in registers: the stores below might alias the arguments
  const Bounds b = bounds;
  for (int i = 0; i < n; i += kLanes) {
    const Vf second = c.second ? load(c.second + i) : splat<Vf>(0.0f);
    const Element e = Head::template evaluate<kGradient>(load(c.first + i), second, load(c.x + i), b);
    if (c.nll) store(c.nll + i, e.nll);
    if constexpr (kGradient) {
      const Vf g = c.upstream ? load(c.upstream + i) : splat<Vf>(1.0f);
      if (c.grad_first) store(c.grad_first + i, e.first * g);
      if (c.grad_second) store(c.grad_second + i, e.second * g);
      if (c.grad_x) store(c.grad_x + i, e.x * g);
    }
  }
}

// The upstream gradient of each element; null for 1.
const float* read_upstream(const ElementNllArgs& a, const View& collapsed, const SampleChunks::Range& r,
                           Buffer& buffer) {
  if (!a.grad_nll) return nullptr;
  if (a.reduction == 0) return read_chunk(collapsed, r.start, r.n, buffer);
  const int n = static_cast<int>(r.n / r.count);
  for (int64_t s = 0; s < r.count; ++s) {
    const float value = static_cast<const float*>(a.grad_nll.data)[a.reduction == 1 ? r.sample + s : 0];
    for (int i = 0; i < n; ++i) buffer[s * n + i] = value;
  }
  for (int i = r.n; i < padded(r.n); ++i) buffer[i] = 0.0f;
  return buffer;
}

}  // namespace

void element_nll(const ElementNllArgs& a) {
  const SampleChunks plan(a.x, a.reduction == 1);
  const Bounds bounds{a.factor, a.low, a.high};
  const bool gradient = a.grad_first || a.grad_second || a.grad_x, sums_wanted = a.nll && a.reduction;
  const auto run = a.head == ElementHead::kBernoulli
                       ? (gradient ? loop<BernoulliHead, true> : loop<BernoulliHead, false>)
                       : (gradient ? loop<GaussianHead, true> : loop<GaussianHead, false>);
  const auto flat = [](const View& v) { return v ? collapse(v) : v; };
  const View first = flat(a.first), second = flat(a.second), x = flat(a.x);
  const View nll = a.reduction ? View{} : flat(a.nll), upstream = flat(a.grad_nll);
  const View grad_first = flat(a.grad_first), grad_second = flat(a.grad_second), grad_x = flat(a.grad_x);
  SampleSums sums(a.nll, plan, sums_wanted, kFloatMax);

#pragma omp parallel for schedule(static) if (plan.parallel())
  for (int64_t i = 0; i < plan.chunks; ++i) {
    alignas(64) Buffer b_first, b_second, b_x, b_upstream, b_nll, b_grad_first, b_grad_second, b_grad_x;
    const SampleChunks::Range r = plan.range(i);
    Chunk c;
    c.first = read_chunk(first, r.start, r.n, b_first);
    c.second = read_chunk(second, r.start, r.n, b_second);
    c.x = read_chunk(x, r.start, r.n, b_x);
    c.upstream = read_upstream(a, upstream, r, b_upstream);
    c.nll = sums_wanted ? b_nll : open_chunk(nll, r.start, r.n, b_nll);
    c.grad_first = open_chunk(grad_first, r.start, r.n, b_grad_first);
    c.grad_second = open_chunk(grad_second, r.start, r.n, b_grad_second);
    c.grad_x = open_chunk(grad_x, r.start, r.n, b_grad_x);
    run(c, r.n, bounds);
    if (nll) close_chunk(nll, r.start, r.n, c.nll, b_nll);
    if (grad_first) close_chunk(grad_first, r.start, r.n, c.grad_first, b_grad_first);
    if (grad_second) close_chunk(grad_second, r.start, r.n, c.grad_second, b_grad_second);
    if (grad_x) close_chunk(grad_x, r.start, r.n, c.grad_x, b_grad_x);
    sums.add(r, b_nll);
  }
  sums.write();
}

}  // namespace GENPERF_ISA
}  // namespace genperf
