// The arithmetic of one vector: x and its codeword c, of n floats.
#pragma once

#include <cmath>

#include "../common/lanes.h"

namespace genperf {
namespace GENPERF_ISA {

namespace {

inline Vf load_some(const float* p, int64_t n) {
  if (n >= kLanes) return load(p);
  float part[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}

inline void store_some(float* p, Vf v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  float part[kLanes];
  store(part, v);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

inline float total(Vf v) {
  float x[kLanes];
  store(x, v);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x[i] = x[i] + x[i + n];
  return x[0];
}

// The codeword to q, NaN where x is not finite; returns |x - c|^2.
inline float quantize_row(const float* x, const float* c, int64_t n, float* q) {
  Vf sum = splat<Vf>(0.0f);
  for (int64_t d = 0; d < n; d += kLanes) {
    const Vf xs = load_some(x + d, n - d), cs = load_some(c + d, n - d), difference = xs - cs;
    sum = sum + difference * difference;
    store_some(q + d, select(abs(xs) < kInfinity, cs, splat<Vf>(kNaN)), n - d);
  }
  return total(sum);
}

// g + a (x - c), of which g may be null.
inline void straight_row(const float* g, const float* x, const float* c, float a, int64_t n, float* to) {
  for (int64_t d = 0; d < n; d += kLanes) {
    const Vf pull = (load_some(x + d, n - d) - load_some(c + d, n - d)) * a;
    store_some(to + d, g ? load_some(g + d, n - d) + pull : pull, n - d);
  }
}

// The length of x, of which `square` is the sum of squares in float32.
inline float length_of(const float* x, int64_t n, float square) {
  if (square > 1e-30f && square < 1e30f) return std::sqrt(square);
  double exact = 0.0;
  for (int64_t d = 0; d < n; ++d) exact += static_cast<double>(x[d]) * x[d];
  return static_cast<float>(std::sqrt(exact));
}

inline constexpr float kShortest = 1e-6f;

// `length`, or kShortest; NaN stays.
inline float divisor_of(float length) { return length < kShortest ? kShortest : length; }

// g turned back by the rotation that takes x to c, times |c| / |x|: with u and v the units of x and c, and s
// their sum, (g - 2 s (s.g) / |s|^2 + 2 u (v.g)) |c| / |x|, where a length that divides is at least
// kShortest, as in vector-quantize-pytorch. `to` may be g.
inline void rotated_row(const float* g, const float* x, const float* c, int64_t n, float* to) {
  Vf xx = splat<Vf>(0.0f), cc = xx;
  for (int64_t d = 0; d < n; d += kLanes) {
    const Vf xs = load_some(x + d, n - d), cs = load_some(c + d, n - d);
    xx = xx + xs * xs;
    cc = cc + cs * cs;
  }
  const float length_x = length_of(x, n, total(xx)), length_c = length_of(c, n, total(cc));
  const float divisor_x = divisor_of(length_x), divisor_c = divisor_of(length_c);
  Vf ss = splat<Vf>(0.0f), sg = ss, vg = ss;
  for (int64_t d = 0; d < n; d += kLanes) {
    const Vf gs = load_some(g + d, n - d), v = load_some(c + d, n - d) / divisor_c;
    const Vf s = load_some(x + d, n - d) / divisor_x + v;
    ss = ss + s * s;
    sg = sg + s * gs;
    vg = vg + v * gs;
  }
  const float divisor_s = divisor_of(std::sqrt(total(ss)));
  const float of_s = 2.0f * total(sg) / divisor_s / divisor_s, of_u = 2.0f * total(vg);
  const float scale = length_c / divisor_x;
  for (int64_t d = 0; d < n; d += kLanes) {
    const Vf u = load_some(x + d, n - d) / divisor_x;
    const Vf s = u + load_some(c + d, n - d) / divisor_c;
    store_some(to + d, (load_some(g + d, n - d) - s * of_s + u * of_u) * scale, n - d);
  }
}

}  // namespace

}  // namespace GENPERF_ISA
}  // namespace genperf
