// Convolutions of one cell that many numbers have no part in, being 0: half of what a ReLU lets through.
//
// Their weights are not read. For that they are packed by products: what remains of a matrix packed by panels
// is every second line or so of a stream, and the prefetchers of a processor fetch the others as well.
#pragma once

#include "context.h"

namespace genperf::pixel {
inline namespace GENPERF_ISA {

inline constexpr int64_t kSums = 1024;  // output channels

// sum += kCount products of n output values, in order; those after them are fetched meanwhile.
template <int kCount>
void add_products(const Factor* factor, const float* weight, int64_t n, float* sum) {
  const float *w[kCount], *next[kCount];
  Nf x[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    x[i] = splat<Nf>(factor[i].x);
    w[i] = weight + factor[i].k * n;
    next[i] = weight + factor[i + kAtOnce].k * n;
  }
  for (int64_t v = 0; v < n; v += kPanel) {
    Nf s[kParts];
#pragma GCC unroll 8
    for (int p = 0; p < kParts; ++p) s[p] = load_native(sum + v + p * kNativeLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      __builtin_prefetch(next[i] + v);
#pragma GCC unroll 8
      for (int p = 0; p < kParts; ++p)
        s[p] = fma_native(x[i], load_native(w[i] + v + p * kNativeLanes), s[p]);
    }
#pragma GCC unroll 8
    for (int p = 0; p < kParts; ++p) store_native(sum + v + p * kNativeLanes, s[p]);
  }
}

// convolve_one without the products with 0, which change no sum: it begins with +0.
inline void convolve_sparse(const Context& c, const Product& product, int64_t n, const float* from,
                            float* to) {
  Factor* last = c.factors;
  for (const Piece* p = product.pieces; p < product.pieces + product.piece_count; ++p) {
    const float* x = c.pointers[p->tap * kRows] + p->channel;
    for (int32_t i = 0; i < p->length; ++i) {
      *last = {static_cast<int32_t>(p->k) + i, x[i]};
      last += x[i] != 0.0f;
    }
  }
  for (int i = 0; i < 2 * kAtOnce; ++i) last[i] = {0, 0.0f};
  const Factor* factor = c.factors;
  alignas(64) float sum[kSums];
  for (int64_t block = kBlock; block < product.depth + kBlock; block += kBlock) {
    std::memset(sum, 0, n * sizeof(float));
    const Factor* end = factor;
    while (end < last && end->k < block) ++end;
    for (; factor + kAtOnce <= end; factor += kAtOnce)
      add_products<kAtOnce>(factor, product.by_product, n, sum);
    for (; factor < end; ++factor) add_products<1>(factor, product.by_product, n, sum);
    for (int64_t i = 0; i < n; i += kNativeLanes)
      store_native(to + i, load_native(from + i) + load_native(sum + i));
    from = to;
  }
}

// Whether enough of what a cell's taps read is 0 for that.
inline bool is_sparse(const Context& c, const Product& product, int taps, const Conv& conv) {
  if (!product.by_product || conv.channels > kSums) return false;
  int64_t zeros = 0;
  for (int t = 0; t < taps; ++t) {
    const float* x = c.pointers[t * kRows];
    for (int64_t i = 0; i < conv.channels_in; ++i) zeros += x[i] == 0.0f;
  }
  return zeros * 4 > product.depth;
}

}  // namespace GENPERF_ISA
}  // namespace genperf::pixel
