// A codebook made ready for the products: centred, scaled, and packed by panels of kWidth codewords.
#pragma once

#include <cmath>

#include "../common/scratch.h"
#include "plan.h"
#include "rows.h"

namespace genperf {
namespace GENPERF_ISA {
namespace vq {

#if defined(__AVX512F__)
inline constexpr int kTile = 8, kWide = 2;
#elif defined(__AVX2__)
inline constexpr int kTile = 6, kWide = 1;
#else
inline constexpr int kTile = 2, kWide = 1;
#endif
inline constexpr int kWidth = kWide * kLanes;  // codewords of a panel

// 2^exponent, as far as a normal float32 goes.
inline float power_of_two(int exponent) {
  return bits_float(static_cast<uint32_t>((exponent < -126  ? -126
                                           : exponent > 126 ? 126
                                                            : exponent) +
                                          127)
                    << 23);
}

struct Codebook {
  const Rows rows;
  const int64_t codewords, dim;
  const Metric metric;
  Scratch<uint8_t> usable;  // finite, and not left out
  int64_t n_usable = 0;
  Scratch<int64_t> first;  // the first k of the usable ones followed by the others
  // In the products a codeword is (c - mean) scale, with c / |c| in place of c for the cosine.
  Scratch<float> mean;
  float scale = 1.0f;    // a power of two
  double longest = 0.0;  // norm of a vector in the products

  explicit Codebook(const VqSearch& a)
      : rows(a.codebook),
        codewords(a.codewords),
        dim(a.dim),
        metric(a.metric),
        usable(codewords),
        first(a.k),
        mean(dim, 0.0f) {
    each([&](int64_t i, const float* c) { usable[i] = is_finite(c, dim); });
    for (int64_t i = 0; i < codewords; ++i) n_usable += usable[i];
    int64_t found = 0;
    for (int pass = 1; pass >= 0; --pass)
      for (int64_t i = 0; i < codewords && found < a.k; ++i)
        if (usable[i] == pass) first[found++] = i;
  }

  void prepare() {
    Scratch<double> sum(dim, 0.0);
    each([&](int64_t i, const float* c) {
      if (!usable[i]) return;
      const double factor = unit(c);
      for (int64_t d = 0; d < dim; ++d) sum[d] += c[d] * factor;
    });
    for (int64_t d = 0; d < dim && n_usable > 0; ++d) mean[d] = static_cast<float>(sum[d] / n_usable);
    Scratch<double> most(dim, 0.0), p(dim);
    double longest_square = 0.0, largest = 0.0;
    each([&](int64_t i, const float* c) {
      if (!usable[i]) return;
      const double factor = unit(c);
      for (int64_t d = 0; d < dim; ++d) {
        p[d] = c[d] * factor - mean[d];
        most[d] = std::fabs(p[d]) > most[d] ? std::fabs(p[d]) : most[d];
      }
      const double square = sum_squares(p.get());
      longest_square = square > longest_square ? square : longest_square;
    });
    int exponent = 0;
    for (int64_t d = 0; d < dim; ++d) largest = most[d] > largest ? most[d] : largest;
    std::frexp(largest, &exponent);
    scale = power_of_two(-exponent);
    longest = std::sqrt(longest_square) * scale;
  }

  // Where only the nearest is wanted, of equal codewords the first will do.
  void leave_out_duplicates() {
    int64_t slots = 16;
    while (slots < 2 * codewords) slots *= 2;
    Scratch<int64_t> table(slots, -1);
    Scratch<float> theirs(dim);
    each([&](int64_t i, const float* c) {
      if (!usable[i]) return;
      int64_t slot = static_cast<int64_t>(hash(c)) & (slots - 1);
      while (table[slot] >= 0 && !equal(c, rows.row(table[slot], theirs.get())))
        slot = (slot + 1) & (slots - 1);
      usable[i] = table[slot] < 0;
      if (usable[i]) table[slot] = i;
    });
  }

  // The panel of codewords from `begin`: kWidth first terms of the sums, and kWidth floats for each
  // dimension. The first term is -|p|^2 / 2 for the distance, 0 for products, and -inf for what is not to be
  // found.
  void pack(int64_t begin, float* to) const {
    Scratch<float> buffer(dim, 0.0f);
    Scratch<double> p(dim);
    for (int lane = 0; lane < kWidth; ++lane) {
      const int64_t i = begin + lane;
      const bool present = i < codewords && usable[i];
      const float* c = present ? rows.row(i, buffer.get()) : buffer.get();
      const double factor = unit(c);
      for (int64_t d = 0; d < dim; ++d) p[d] = present ? (c[d] * factor - mean[d]) * scale : 0.0;
      to[lane] = !present                ? -kInfinity
                 : metric == Metric::kL2 ? -0.5f * static_cast<float>(sum_squares(p.get()))
                                         : 0.0f;
      float* column = to + kWidth + lane;
      for (int64_t d = 0; d < dim; ++d) column[d * kWidth] = static_cast<float>(p[d]);
    }
  }

 private:
  template <class Function>
  void each(Function f) const {
    Scratch<float> buffer(dim);
    for (int64_t i = 0; i < codewords; ++i) f(i, rows.row(i, buffer.get()));
  }

  // In eight sums side by side, as are the hashes, which keeps a vector unit busy.
  template <class T>
  double sum_squares(const T* p) const {
    double sum[8] = {};
    int64_t d = 0;
    for (; d + 8 <= dim; d += 8)
      for (int j = 0; j < 8; ++j) sum[j] += static_cast<double>(p[d + j]) * p[d + j];
    for (; d < dim; ++d) sum[0] += static_cast<double>(p[d]) * p[d];
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
  }

  // The same for 0 and -0.
  uint64_t hash(const float* c) const {
    uint32_t part[8] = {};
    const auto mix = [&](int j, float x) { part[j] = (part[j] ^ float_bits(x + 0.0f)) * 0x9E3779B1u; };
    int64_t d = 0;
    for (; d + 8 <= dim; d += 8)
      for (int j = 0; j < 8; ++j) {
        mix(j, c[d + j]);
        part[j] ^= part[j] >> 15;
      }
    for (; d < dim; ++d) mix(static_cast<int>(d & 7), c[d]);
    uint64_t all = 0;
    for (uint32_t p : part) {
      all = (all ^ p) * 0x9E3779B97F4A7C15u;
      all ^= all >> 32;
    }
    return all;
  }

  bool equal(const float* a, const float* b) const {
    for (int64_t d = 0; d < dim; ++d)
      if (a[d] != b[d]) return false;
    return true;
  }

  // What the codeword is multiplied by.
  double unit(const float* c) const {
    if (metric != Metric::kCosine) return 1.0;
    const double square = sum_squares(c);
    return square == 0.0 ? 0.0 : 1.0 / std::sqrt(square);
  }
};

}  // namespace vq
}  // namespace GENPERF_ISA
}  // namespace genperf
