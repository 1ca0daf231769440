#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "../common/isa.h"
#include "../common/subview.h"
#include "exact.h"
#include "plan.h"

namespace genperf {

GENPERF_ISA_TABLE(vq_search, VqSearch);

#if defined(__x86_64__)
constexpr unsigned kFlushAndDenormalsAreZero = 0x8040;
Subnormals::Subnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~kFlushAndDenormalsAreZero); }
Subnormals::~Subnormals() { _mm_setcsr(saved_); }
#else
Subnormals::Subnormals() = default;
Subnormals::~Subnormals() = default;
#endif

namespace {

double product(float a, float b) { return static_cast<double>(a) * static_cast<double>(b); }

// The sign of |x - a|^2 - |x - b|^2.
int compare_l2(const float* x, const float* a, const float* b, int64_t dim) {
  ExactSum sum;
  for (int64_t d = 0; d < dim; ++d) {
    if (a[d] == b[d]) continue;
    sum.add(product(a[d], a[d]));
    sum.add(-product(b[d], b[d]));
    sum.add(-2 * product(x[d], a[d]));
    sum.add(2 * product(x[d], b[d]));
  }
  return sum.finish();
}

int compare_dot(const float* x, const float* a, const float* b, int64_t dim) {
  ExactSum sum;
  for (int64_t d = 0; d < dim; ++d) {
    if (a[d] == b[d]) continue;
    sum.add(product(x[d], b[d]));
    sum.add(-product(x[d], a[d]));
  }
  return sum.finish();
}

ExactSum dot(const float* x, const float* y, int64_t dim) {
  ExactSum sum;
  for (int64_t d = 0; d < dim; ++d) sum.add(product(x[d], y[d]));
  return sum;
}

// By the signs of x.a and x.b, and, where these agree, by (x.a)^2 |b|^2 and (x.b)^2 |a|^2.
int compare_cosine(const float* x, const float* a, const float* b, int64_t dim) {
  ExactSum xa = dot(x, a, dim), xb = dot(x, b, dim);
  const int sign_a = xa.finish(), sign_b = xb.finish();
  if (sign_a != sign_b || sign_a == 0) return sign_b - sign_a;
  ExactSum aa = dot(a, a, dim), bb = dot(b, b, dim);
  aa.finish(), bb.finish();
  constexpr int kN = ExactSum::kDigits;
  const Product<kN, kN> square_a(xa, xa), square_b(xb, xb);
  return -sign_a * Product<2 * kN, kN>(square_a, bb).compare(Product<2 * kN, kN>(square_b, aa));
}

}  // namespace

int compare_exactly(Metric metric, const float* x, const float* a, const float* b, int64_t dim) {
  switch (metric) {
    case Metric::kL2:
      return compare_l2(x, a, b, dim);
    case Metric::kCosine:
      return compare_cosine(x, a, b, dim);
    case Metric::kDot:
      break;
  }
  return compare_dot(x, a, b, dim);
}

void vq_nearest_cpu(const VqNearestArgs& a) {
  for (int64_t h = 0; h < a.x.shape[0]; ++h) {
    VqSearch s{};
    s.x = select_first(a.x, h), s.codebook = select_first(a.codebook, h);
    s.dim = s.codebook.shape[1], s.codewords = s.codebook.shape[0];
    s.n = s.x.numel() / s.dim, s.k = a.indices.shape[a.indices.ndim - 1];
    s.indices = static_cast<int64_t*>(a.indices.data) + h * s.n * s.k;
    s.distances = a.distances ? static_cast<float*>(a.distances.data) + h * s.n * s.k : nullptr;
    s.metric = a.metric;
    if (s.n > 0) vq_search_isas(s);
  }
}

}  // namespace genperf
