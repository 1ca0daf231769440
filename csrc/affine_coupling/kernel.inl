// CPU kernels, built once per instruction set (GENPERF_ISA). Chunks of the transformed part (see
// common/sample_chunks.h) pass through the first-level cache once.
#include "../common/sample_chunks.h"
#include "../common/scratch.h"
#include "../common/subview.h"
#include "channels.h"
#include "math.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

struct Chunk {
  const float *x, *t, *u, *t_scale, *u_scale, *mask, *grad_y, *grad_logdet;
  float *y, *term, *factor;                                 // forward
  float *grad_x, *grad_t, *grad_u, *rebuilt, *by_t, *by_u;  // backward; by_*: before h_scale, times h
};

using Loop = void (*)(const Chunk&, int, const CouplingParameters&);

template <CouplingScale kScale, bool kPre, bool kReciprocal>
void forward_loop(const Chunk& chunk, int n, const CouplingParameters& parameters) {
  const Chunk c = chunk;  // in registers: the stores below might alias the arguments
  const CouplingParameters p = parameters;
  const Vf zero = splat<Vf>(0.0f);
  for (int i = 0; i < n; i += kLanes) {
    Vf t = load(c.t + i), u = zero;
    if constexpr (kScale != CouplingScale::kAdditive) u = load(c.u + i);
    if (c.t_scale) t = t * load(c.t_scale + i);
    if (c.u_scale) u = u * load(c.u_scale + i);
    t = t * p.shift_factor;
    const auto s = coupling_factor<kScale>(u * p.prefactor, p);
    const Vf x = load(c.x + i);
    Vf y = kPre ? times<kReciprocal>(x + t, s.scale) : times<kReciprocal>(x, s.scale) + t;
    Vf term = s.term, factor = s.factor;
    if (c.mask) {
      const auto kept = load(c.mask + i) > 0.0f;
      y = select(kept, y, zero), term = select(kept, term, zero), factor = select(kept, factor, zero);
    }
    store(c.y + i, y);
    if constexpr (kScale != CouplingScale::kAdditive) {
      store(c.term + i, term);
      store(c.factor + i, factor);
    }
  }
}

template <CouplingScale kScale, bool kPre, bool kReciprocal>
void backward_loop(const Chunk& chunk, int n, const CouplingParameters& parameters) {
  const Chunk c = chunk;
  const CouplingParameters p = parameters;
  const Vf zero = splat<Vf>(0.0f);
  for (int i = 0; i < n; i += kLanes) {
    const Vf raw_t = load(c.t + i);
    Vf t = raw_t, raw_u = zero, u = zero;
    if constexpr (kScale != CouplingScale::kAdditive) u = raw_u = load(c.u + i);
    if (c.t_scale) t = t * load(c.t_scale + i);
    if (c.u_scale) u = u * load(c.u_scale + i);
    t = t * p.shift_factor;
    const auto s = coupling_factor<kScale>(u * p.prefactor, p);
    const Vf v = load(c.x + i), g = load(c.grad_y + i);
    Vf by_x = times<kReciprocal>(g, s.scale);
    Vf by_t = (kPre ? by_x : g) * p.shift_factor;
    Vf product = kPre ? v : v - t, x = v;  // the output, less the shift where it comes last
    if (p.from_output) {
      x = times<!kReciprocal>(product, s.scale);
      if constexpr (kPre) x = x - t;
    } else {
      product = times<kReciprocal>(kPre ? v + t : v, s.scale);
    }
    Vf by_u = zero;
    if constexpr (kScale != CouplingScale::kAdditive) {
      by_u = (g * product + load(c.grad_logdet + i)) * (s.derivative * p.prefactor);
      if constexpr (kReciprocal) by_u = -by_u;
    }
    Vf product_t = by_t * raw_t, product_u = by_u * raw_u;
    if (c.t_scale) by_t = by_t * load(c.t_scale + i);
    if (c.u_scale) by_u = by_u * load(c.u_scale + i);
    if (c.mask) {
      const auto kept = load(c.mask + i) > 0.0f;
      by_x = select(kept, by_x, zero), by_t = select(kept, by_t, zero), by_u = select(kept, by_u, zero);
      x = select(kept, x, zero);
      product_t = select(kept, product_t, zero), product_u = select(kept, product_u, zero);
    }
    store(c.grad_x + i, by_x);
    store(c.grad_t + i, by_t);
    if constexpr (kScale != CouplingScale::kAdditive) store(c.grad_u + i, by_u);
    if (c.rebuilt) store(c.rebuilt + i, x);
    if (c.by_t) store(c.by_t + i, product_t);
    if (c.by_u) store(c.by_u + i, product_u);
  }
}

template <CouplingScale kScale>
Loop forward_for(const CouplingArgs& a) {
  if (a.pre) return a.reciprocal ? forward_loop<kScale, true, true> : forward_loop<kScale, true, false>;
  return a.reciprocal ? forward_loop<kScale, false, true> : forward_loop<kScale, false, false>;
}

template <CouplingScale kScale>
Loop backward_for(const CouplingArgs& a) {
  if (a.pre) return a.reciprocal ? backward_loop<kScale, true, true> : backward_loop<kScale, true, false>;
  return a.reciprocal ? backward_loop<kScale, false, true> : backward_loop<kScale, false, false>;
}

#define GENPERF_BY_SCALE(function, a)                                              \
  ((a).scale == CouplingScale::kSigmoid    ? function<CouplingScale::kSigmoid>(a)  \
   : (a).scale == CouplingScale::kExp      ? function<CouplingScale::kExp>(a)      \
   : (a).scale == CouplingScale::kTanh     ? function<CouplingScale::kTanh>(a)     \
   : (a).scale == CouplingScale::kSoftplus ? function<CouplingScale::kSoftplus>(a) \
                                           : function<CouplingScale::kAdditive>(a))

}  // namespace

void affine_coupling_forward(const CouplingArgs& a) {
  const CouplingParameters p(a);
  const Loop loop = GENPERF_BY_SCALE(forward_for, a);
  const Walk walk(a, a.x);
  const SampleChunks plan(walk.shape(), true);
  const View x = walk.of_state(a.x), y = walk.of_state(a.y), mask = walk.of_mask(a.mask);
  const Halves h = walk.of_h(a.h), scale = walk.of_channels(a.h_scale);
  SampleSums logdet(a.logdet, plan, true);

  if (a.y.data != a.x.data) copy_others(a, a.x, a.y);
#pragma omp parallel for schedule(static) if (plan.parallel())
  for (int64_t i = 0; i < plan.chunks; ++i) {
    alignas(64) Buffer b_x, b_t, b_u, b_t_scale, b_u_scale, b_mask, b_y, b_term, b_factor;
    const SampleChunks::Range r = plan.range(i);
    Chunk c{};
    c.x = read_chunk(x, r.start, r.n, b_x);
    c.t = read_chunk(h.t, r.start, r.n, b_t);
    c.u = read_chunk(h.u, r.start, r.n, b_u);
    c.t_scale = read_chunk(scale.t, r.start, r.n, b_t_scale);
    c.u_scale = read_chunk(scale.u, r.start, r.n, b_u_scale);
    c.mask = read_chunk(mask, r.start, r.n, b_mask);
    c.y = open_chunk(y, r.start, r.n, b_y);
    c.term = b_term;
    c.factor = b_factor;
    loop(c, r.n, p);
    close_chunk(y, r.start, r.n, c.y, b_y);
    if (a.scale == CouplingScale::kAdditive) continue;
    logdet.add_by(r, [&](int first, int n) {
      const double sum = log_scale_sum(b_term + first, b_factor + first, n, p);
      return a.reciprocal ? -sum : sum;
    });
  }
  logdet.write();
}

void affine_coupling_backward(const CouplingArgs& a) {
  const CouplingParameters p(a);
  const Loop loop = GENPERF_BY_SCALE(backward_for, a);
  const Walk walk(a, a.grad_h_scale ? View{} : a.x);
  const SampleChunks plan(walk.shape(), true);
  const View x = walk.of_state(a.x), grad_y = walk.of_state(a.grad_y), grad_x = walk.of_state(a.grad_x);
  const View rebuilt = walk.of_state(a.rebuilt), mask = walk.of_mask(a.mask);
  const Halves h = walk.of_h(a.h), grad_h = walk.of_h(a.grad_h), scale = walk.of_channels(a.h_scale);
  const View grad_logdet = walk.of_samples(a.grad_logdet);
  ChannelSums by_t(plan, a.n, bool(a.grad_h_scale)), by_u(plan, a.n, a.grad_h_scale && h.u);

  if (a.grad_x.data != a.grad_y.data) copy_others(a, a.grad_y, a.grad_x);
  if (a.rebuilt && a.rebuilt.data != a.x.data) copy_others(a, a.x, a.rebuilt);
#pragma omp parallel for schedule(static) if (plan.parallel())
  for (int64_t i = 0; i < plan.chunks; ++i) {
    alignas(64) Buffer b_x, b_t, b_u, b_t_scale, b_u_scale, b_mask, b_grad_y, b_grad_logdet;
    alignas(64) Buffer b_grad_x, b_grad_t, b_grad_u, b_rebuilt, b_by_t, b_by_u;
    const SampleChunks::Range r = plan.range(i);
    Chunk c{};
    c.x = read_chunk(x, r.start, r.n, b_x);
    c.t = read_chunk(h.t, r.start, r.n, b_t);
    c.u = read_chunk(h.u, r.start, r.n, b_u);
    c.t_scale = read_chunk(scale.t, r.start, r.n, b_t_scale);
    c.u_scale = read_chunk(scale.u, r.start, r.n, b_u_scale);
    c.mask = read_chunk(mask, r.start, r.n, b_mask);
    c.grad_y = read_chunk(grad_y, r.start, r.n, b_grad_y);
    c.grad_logdet = read_chunk(grad_logdet, r.start, r.n, b_grad_logdet);
    c.grad_x = open_chunk(grad_x, r.start, r.n, b_grad_x);
    c.grad_t = open_chunk(grad_h.t, r.start, r.n, b_grad_t);
    c.grad_u = open_chunk(grad_h.u, r.start, r.n, b_grad_u);
    c.rebuilt = open_chunk(rebuilt, r.start, r.n, b_rebuilt);
    c.by_t = by_t ? b_by_t : nullptr;
    c.by_u = by_u ? b_by_u : nullptr;
    loop(c, r.n, p);
    close_chunk(grad_x, r.start, r.n, c.grad_x, b_grad_x);
    close_chunk(grad_h.t, r.start, r.n, c.grad_t, b_grad_t);
    if (grad_h.u) close_chunk(grad_h.u, r.start, r.n, c.grad_u, b_grad_u);
    if (rebuilt) close_chunk(rebuilt, r.start, r.n, c.rebuilt, b_rebuilt);
    by_t.add(r, b_by_t);
    by_u.add(r, b_by_u);
  }
  if (!a.grad_h_scale) return;
  const Halves grad_scale = walk.halves(a.grad_h_scale, 0);
  by_t.write(grad_scale.t);
  if (grad_scale.u) by_u.write(grad_scale.u);
}

}  // namespace GENPERF_ISA
}  // namespace genperf
