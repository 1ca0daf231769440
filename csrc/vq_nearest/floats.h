// Scores in float32.
#pragma once

#include "words.h"

namespace genperf {
namespace GENPERF_ISA {
namespace vq {

// Panels of a header and kWidth floats for each dimension.
class FloatWords : public Words {
 public:
  using Words::Words;

  bool precise() const { return true; }
  int64_t panel_floats() const { return (book.dim + kHeader) * kWidth; }

  // The panel from place `begin`, with `buffer` of kWidth * pitch() floats.
  void pack(int64_t begin, float* to, float* buffer) {
    begin_panel(begin, to, buffer);
    transpose(buffer, to + kHeader * kWidth);
  }

 private:
  friend class FloatScores;

  // kWidth rows `pitch` apart, to columns.
  void transpose(const float* from, float* to) const {
    const int64_t step = book.pitch();
    int64_t d = 0;
    for (; d + 4 <= book.dim; d += 4)
      for (int lane = 0; lane < kWidth; lane += kNative) {
        const float* corner = from + lane * step + d;
        const Nf a = load_fours(corner, step), b = load_fours(corner + step, step),
                 c = load_fours(corner + 2 * step, step), e = load_fours(corner + 3 * step, step);
        const Nf low = unpack_low(a, b), high = unpack_high(a, b), low_2 = unpack_low(c, e),
                 high_2 = unpack_high(c, e);
        float* column = to + d * kWidth + lane;
        store_native(column, unpack_low_pairs(low, low_2));
        store_native(column + kWidth, unpack_high_pairs(low, low_2));
        store_native(column + 2 * kWidth, unpack_low_pairs(high, high_2));
        store_native(column + 3 * kWidth, unpack_high_pairs(high, high_2));
      }
    for (; d < book.dim; ++d)
      for (int lane = 0; lane < kWidth; ++lane) to[d * kWidth + lane] = from[lane * step + d];
  }
};

// The scores of a block of vectors.
class FloatScores {
 public:
  using Packed = FloatWords;
  static constexpr bool kRough = false;
  static constexpr int kMostHits = 32;  // groups of candidates that are kept of each vector, at least

  FloatScores(const Packed& words, int rows)
      : book_(words.book),
        dim_(book_.dim),
        packed_(rows * dim_, 0.0f),
        sums_(dim_ > Codebook::kDepth ? rows * kWidth : 0) {}

  // How many vectors a block should have.
  static int64_t rows(int64_t dim) { return (1 << 15) / dim; }

  // Vector r becomes X = x scale - centre, or x scale alone; its sum of squares.
  float place(int r, const float* x, bool centred, float scale) {
    float* const to = packed_.get() + r / kTile * kTile * dim_ + r % kTile;
    Vf sum = splat<Vf>(0.0f);
    alignas(64) float piece[kLanes];
    const float* centre = book_.centre.get();
    int64_t d = 0;
    for (; d + kLanes <= dim_; d += kLanes) {
      Vf v = load(x + d) * scale;
      if (centred) v = v - load(centre + d);
      sum = multiply_add(v, v, sum);
      store(piece, v);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) to[(d + i) * kTile] = piece[i];
    }
    float total = 0.0f;
    for (; d < dim_; ++d) {
      const float v = x[d] * scale - (centred ? centre[d] : 0.0f);
      total += v * v;
      to[d * kTile] = v;
    }
    return total + sum_of(sum);
  }

  // What, times the norm of a codeword, bounds the error of the sum of its products with vector r, of the
  // norm `norm` at most.
  double reach(int, double norm) const { return book_.product_error() * norm; }

  // The maxima of the scores of vectors [begin, end) with one panel, kMaximaPitch apart. Where `kByWord`
  // their error bounds, by `reach`, are added.
  template <bool kByWord>
  void score(const float* panel, int begin, int end, const float* reach, float* maxima) {
    for (int64_t d = 0; d < dim_; d += Codebook::kDepth)
      for (int g = begin; g < end; g += kTile)
        multiply<kByWord>(panel, d, std::min(Codebook::kDepth, dim_ - d), g, reach + g,
                          maxima + (g - begin) * kMaximaPitch);
  }

 private:
  // The terms [d, d + depth) of the scores of kTile vectors from `g` with one panel, and at the end their
  // maxima, kMaximaPitch apart.
  template <bool kByWord>
  void multiply(const float* panel, int64_t d, int64_t depth, int g, const float* reach, float* maxima) {
    Vf acc[kTile][kWide];
    if (d == 0) {
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) {
        const Vf start = load(panel + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kTile; ++r) {
          acc[r][v] = start;
          if constexpr (kByWord)
            acc[r][v] = multiply_add(splat<Vf>(reach[r]), load(panel + kWidth + v * kLanes), start);
        }
      }
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kWide; ++v) acc[r][v] = splat<Vf>(0.0f);
    }
    const float* p = panel + (Packed::kHeader + d) * kWidth;
    const float* x = packed_.get() + g * dim_ + d * kTile;
    for (int64_t i = 0; i < depth; ++i, p += kWidth, x += kTile) {
      Vf word[kWide];
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) word[v] = load(p + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r) {
        const Vf scalar = splat<Vf>(x[r]);
#pragma GCC unroll 2
        for (int v = 0; v < kWide; ++v) acc[r][v] = multiply_add(scalar, word[v], acc[r][v]);
      }
    }
    float* sums = sums_.get() + g * kWidth;
    if (d > 0) {
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kWide; ++v) acc[r][v] = acc[r][v] + load(sums + r * kWidth + v * kLanes);
    }
    if (d + depth < dim_) {
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kWide; ++v) store(sums + r * kWidth + v * kLanes, acc[r][v]);
      return;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) {
      Nf most = acc[r][0].part[0];
#pragma GCC unroll 8
      for (int i = 1; i < kWide * kParts; ++i) most = max_of(most, acc[r][i / kParts].part[i % kParts]);
      store_native(maxima + r * kMaximaPitch, most);
    }
  }

  const Codebook& book_;
  const int64_t dim_;
  Scratch<float> packed_, sums_;  // the vectors of a tile element by element
};

}  // namespace vq
}  // namespace GENPERF_ISA
}  // namespace genperf
