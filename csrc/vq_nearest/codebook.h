// A codebook made ready for the products: centred and scaled (words.h packs it).
//
// In the products a codeword is C = scale c - centre, with c / |c| in place of c for the cosine. Any centre
// and any power of two would do; these come from a few codewords, as looking at all of them would cost much
// where vectors are few, and are medians, as one codeword far from the others must not spoil them. Where many
// are far, the codewords have to be those that some vectors are near to (recentre).
#pragma once

#include <algorithm>

#include "../common/scratch.h"
#include "plan.h"
#include "rows.h"
#include "vectors.h"

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
inline constexpr double kRoundoff = 0x1p-24;
inline constexpr int64_t kHeld = 32;                           // panels whose maxima are held
inline constexpr int64_t kMaximaPitch = kHeld * kNative + 16;  // not a power of two, for the cache's sake

class Codebook {
 public:
  const Rows rows;
  const int64_t codewords, dim, k;
  const Metric metric;
  Scratch<uint8_t> usable;  // finite, and not left out
  int64_t n_usable = -1;    // unknown
  Scratch<int64_t> first;   // the first k of the usable ones followed by the others
  Scratch<float> centre;
  float scale = 1.0f;
  double longest = 0.0;    // norm of a codeword in the products
  bool by_word = false;    // norms are so far apart that each codeword gets an error bound of its own
  Scratch<int32_t> order;  // where `by_word`, by norm: those of a panel are about equally long
  Scratch<float> half;     // half of the squared norms in the products

  explicit Codebook(const VqSearch& a)
      : rows(a.codebook),
        codewords(a.codewords),
        dim(a.dim),
        k(a.k),
        metric(a.metric),
        usable(codewords),
        first(k),
        centre(dim, 0.0f),
        order(codewords),
        half(codewords) {}

  // Which codewords are finite; enough for a search without the products.
  void find_usable() {
    if (n_usable >= 0) return;
    Scratch<float> buffer(dim);
    n_usable = 0;
    for (int64_t i = 0; i < codewords; ++i) n_usable += usable[i] = is_finite(rows.row(i, buffer.get()), dim);
    find_first();
  }

  // Centre, scale and norms. Where only the nearest is wanted, of equal codewords the first will do, and the
  // others are left out.
  void prepare() {
    if (choose_frame()) {
      measure_all();
    } else {
      n_usable = 0;
      for (int64_t i = 0; i < codewords; ++i) usable[i] = 0;
    }
    find_first();
  }

  // Whether a frame by some of the vectors is worth its cost.
  bool wants_vectors() const { return by_word && metric == Metric::kL2; }

  // After prepare: a frame for vectors like x [n, pitch()], of which codewords words[n] are the nearest.
  void recentre(const float* x, const int64_t* words, int n) {
    centre.fill(0.0f);
    scale = 1.0f;
    Scratch<float> sample(kSamples * pitch(), 0.0f);
    for (int j = 0; j < n; ++j) read_word(words[j], sample.get() + j * pitch());
    set_frame(sample.get(), x, n);
    measure_all();
    find_first();
  }

  // The codeword at a place of the panels.
  int64_t word_at(int64_t place) const { return by_word ? order[place] : place; }

  int64_t pitch() const { return (dim + kLanes - 1) / kLanes * kLanes; }

  // Codeword i as it is in the products; to `to`, which holds its raw values in between.
  void read_word(int64_t i, float* to) const {
    const float* c = rows.row(i, to);
    const float* m = centre.get();
    if (metric == Metric::kCosine) {
      const double factor = unit(c);
      for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<float>(c[d] * factor - m[d]);
    } else {
      for (int64_t d = 0; d < dim; ++d) to[d] = c[d] * scale - m[d];
    }
  }

  double length_slack() const { return 1.001 + static_cast<double>(dim) * 0x1p-26; }
  // At least the norm of a codeword.
  float upper_length(float half_square) const {
    return static_cast<float>(std::sqrt(2.0 * static_cast<double>(half_square)) * length_slack());
  }

  // Relative bounds of the errors of a sum of products of a codeword with a vector, and of `half` in it.
  double product_error() const {
    return 1.01 * kRoundoff * (std::min<double>(dim, kDepth) + dim / kDepth + 12.0);
  }
  double half_error() const { return product_error() + 1.01 * kRoundoff * (dim / kLanes + 8.0); }

  static constexpr int64_t kDepth = 256;  // products in one chain, at most
  static constexpr int kSamples = 9;      // codewords that a frame comes from, at most

 private:
  // What a codeword is multiplied by.
  double unit(const float* c) const {
    Vd sum = splat<Vd>(0.0);
    int64_t d = 0;
    for (; d + 8 <= dim; d += 8) sum = sum + load_doubles(c + d) * load_doubles(c + d);
    double square = sum_of(sum);
    for (; d < dim; ++d) square += static_cast<double>(c[d]) * c[d];
    return square == 0.0 ? 0.0 : 1.0 / std::sqrt(square);
  }

  // Sets centre and scale; false where no codeword is finite.
  bool choose_frame() {
    Scratch<float> sample(kSamples * pitch(), 0.0f);
    int n = 0;
    for (int j = 0; j < kSamples; ++j) {
      float* const to = sample.get() + n * pitch();
      for (int64_t i = j * codewords / kSamples; i < (j + 1) * codewords / kSamples; ++i) {
        const float* c = rows.row(i, to);
        if (!is_finite(c, dim)) continue;
        read_word(i, to);
        ++n;
        break;
      }
    }
    if (n == 0) return false;
    set_frame(sample.get(), sample.get(), n);
    return true;
  }

  // The centre is the median of n codewords `sample`, and the scale what brings the typical distance from it
  // of the rows `about` to between 1/2 and 1.
  void set_frame(const float* sample, const float* about, int n) {
    Scratch<float> sorted(kSamples * pitch());
    std::memcpy(sorted.get(), sample, n * pitch() * sizeof(float));
    for (int pass = 0; pass < n; ++pass)
      for (int j = pass & 1; j + 1 < n; j += 2) {
        float *a = sorted.get() + j * pitch(), *b = a + pitch();
        for (int64_t d = 0; d < dim; ++d) {
          const float low = a[d] < b[d] ? a[d] : b[d], high = a[d] < b[d] ? b[d] : a[d];
          a[d] = low, b[d] = high;
        }
      }
    const float* middle = sorted.get() + n / 2 * pitch();
    double size[kSamples] = {}, largest = 0.0;
    for (int j = 0; j < n; ++j)
      for (int64_t d = 0; d < dim; ++d) {
        size[j] = std::max(size[j], std::fabs(static_cast<double>(about[j * pitch() + d]) - middle[d]));
        largest = std::max(largest, std::fabs(static_cast<double>(middle[d])));
      }
    if (metric != Metric::kCosine) {
      // Sorted by hand: a template of the library would be shared by the builds for all instruction sets.
      for (int i = 1; i < n; ++i)
        for (int j = i; j > 0 && size[j] < size[j - 1]; --j) std::swap(size[j], size[j - 1]);
      double typical = size[n / 2];
      if (typical == 0.0) typical = largest_element(middle);
      // The centre may be far from 0, but not beyond float32.
      scale = std::min(power_of_two(-exponent_of(typical)), power_of_two(60 - exponent_of(largest)));
    }
    for (int64_t d = 0; d < dim; ++d) centre[d] = middle[d] * scale;
  }

  static int exponent_of(double x) {
    int exponent = 0;
    std::frexp(x, &exponent);
    return exponent;
  }

  // Of c - middle, or of c itself.
  double largest_element(const float* middle) const {
    Scratch<float> buffer(dim);
    double largest = 0.0;
    for (int64_t i = 0; i < codewords; ++i) {
      const float* c = rows.row(i, buffer.get());
      if (!is_finite(c, dim)) continue;
      for (int64_t d = 0; d < dim; ++d)
        largest = std::max(largest, std::fabs(static_cast<double>(c[d]) - (middle ? middle[d] : 0.0)));
    }
    return largest;
  }

  void measure_all() {
    if (measure()) return;
    shrink();
    measure();
  }

  // Norms, and which codewords are usable; false where one is too long.
  bool measure() {
    constexpr float kLongest = 0x1p100f;
    Scratch<float> word(pitch(), 0.0f), weights(pitch(), 0.0f);
    Scratch<int64_t> table(k == 1 ? slots() : 0, -1);
    uint32_t state = 1;
    for (int64_t d = 0; d < dim; ++d) {
      state = state * 1664525u + 1013904223u;
      weights[d] = 0.5f + static_cast<float>(state >> 8) * 0x1p-24f;
    }
    n_usable = 0;
    double sum = 0.0, most = 0.0;
    for (int64_t i = 0; i < codewords; ++i) {
      read_word(i, word.get());
      Vf square = splat<Vf>(0.0f), mark = square;
      for (int64_t d = 0; d < dim; d += kLanes) {
        const Vf v = load(word.get() + d);
        square = multiply_add(v, v, square);
        mark = multiply_add(v, load(weights.get() + d), mark);
      }
      half[i] = 0.5f * sum_of(square);
      usable[i] = half[i] < kLongest || is_finite(rows.row(i, word.get()), dim);
      if (!usable[i]) continue;
      if (!(half[i] < kLongest)) return false;
      if (k == 1) usable[i] = is_new(i, table, float_bits(half[i]), float_bits(sum_of(mark)));
      if (!usable[i]) continue;
      ++n_usable;
      sum += std::sqrt(half[i]);
      most = std::max(most, std::sqrt(static_cast<double>(half[i])));
    }
    longest = std::sqrt(2.0) * most * length_slack();
    by_word = most * static_cast<double>(n_usable) > 4.0 * sum;
    if (by_word) sort();
    return true;
  }

  // By exponent and three bits more.
  void sort() {
    constexpr int kKeys = 1 << 11;
    const auto key = [&](int64_t i) { return float_bits(half[i]) >> 20 & (kKeys - 1); };
    Scratch<int32_t> place(kKeys + 1, 0);
    for (int64_t i = 0; i < codewords; ++i) ++place[key(i) + 1];
    for (int j = 0; j < kKeys; ++j) place[j + 1] += place[j];
    for (int64_t i = 0; i < codewords; ++i) order[place[key(i)]++] = static_cast<int32_t>(i);
  }

  // A scale with which no codeword is too long.
  void shrink() {
    const float before = scale;
    const int root = exponent_of(static_cast<double>(dim)) / 2;
    scale = power_of_two(46 - root - exponent_of(largest_element(nullptr)));
    for (int64_t d = 0; d < dim; ++d) centre[d] = static_cast<float>(centre[d] / before * scale);
  }

  int64_t slots() const {
    int64_t n = 16;
    while (n < 2 * codewords) n *= 2;
    return n;
  }

  // Whether no earlier codeword equals codeword i. Equal ones have the same two sums.
  bool is_new(int64_t i, const Scratch<int64_t>& table, uint32_t a, uint32_t b) const {
    const uint64_t mixed = (static_cast<uint64_t>(a) << 32 | b) * 0x9E3779B97F4A7C15u;
    const int64_t mask = table.size() - 1;
    int64_t slot = static_cast<int64_t>(mixed >> 32) & mask;
    for (; table[slot] >= 0; slot = (slot + 1) & mask)
      if (float_bits(half[table[slot]]) == a && equal(table[slot], i)) return false;
    table[slot] = i;
    return true;
  }

  bool equal(int64_t i, int64_t j) const {
    Scratch<float> buffer(2 * dim);
    const float *a = rows.row(i, buffer.get()), *b = rows.row(j, buffer.get() + dim);
    for (int64_t d = 0; d < dim; ++d)
      if (a[d] != b[d]) return false;
    return true;
  }

  void find_first() {
    int64_t found = 0;
    for (int pass = 1; pass >= 0; --pass)
      for (int64_t i = 0; i < codewords && found < k; ++i)
        if (usable[i] == pass) first[found++] = i;
  }
};

}  // namespace vq
}  // namespace GENPERF_ISA
}  // namespace genperf
