// Scores by products of 8-bit integers, several times as fast as in float32. Vectors and codewords are
// rounded to multiples of a step of their own, and what this changes in a product is bounded by the norms of
// the remainders (docs/vector_quantization.md).
//
// Products are added in 16 bits, two chains for each codeword: of the elements d with d % 4 < 2, and of the
// others. A chain goes over kChain elements at most. Its partial sums may wrap, as its sum does not: the
// norms of both factors' elements of a chain are at most kLongestChain, whose square is below 2^15.
#pragma once

#include "words.h"

namespace genperf {
namespace GENPERF_ISA {
namespace vq {

inline constexpr int64_t kChain = 64;  // elements of two chains
inline constexpr int kLongestChain = 181;

// Numbers rounded to multiples of a step: v = step q + remainder, |q| <= 127.
struct Rounded {
  float step;
  float remainder;  // its sum of squares
};

// v [pitch], of zeros from the end of the vector to a multiple of kLanes, to q [pitch]. With `kPairs`, |q_d|
// + |q_(d + 1)| <= 128 for even d: the products of such two with numbers up to 255 add up to less than 2^15.
template <bool kPairs>
inline Rounded round_to_bytes(const float* v, int64_t pitch, int8_t* q) {
  float most = 0.0f, longest = 0.0f;
  for (int64_t c = 0; c < pitch; c += kChain) {
    Vf largest = splat<Vf>(0.0f), square = largest;
    for (int64_t d = c; d < std::min(c + kChain, pitch); d += kLanes) {
      const Vf x = load(v + d);
      largest = for_parts<Vf>([&](int i) {
        Nf size = magnitude(x.part[i]);
        if (kPairs) size = size + swap_neighbours(size);
        return max_of(largest.part[i], size);
      });
      square = multiply_add(x, x, square);
    }
    float lanes[2][kLanes];
    store(lanes[0], largest);
    store(lanes[1], square);
    float chain[2] = {};
    for (int i = 0; i < kLanes; ++i) {
      most = std::max(most, lanes[0][i]);
      chain[i / 2 % 2] += lanes[1][i];
    }
    longest = std::max(longest, std::max(chain[0], chain[1]));
  }
  // Rounding adds at most sqrt(kChain / 2) / 2 to the norm of a chain.
  constexpr float kLongest = kLongestChain - 2.9f;
  float inverse = 0.0f, step = 0.0f;
  if (most > 1e-15f) {  // and the squares are normal numbers
    inverse = std::min(127.0f / most, kLongest / std::sqrt(longest));
    step = 1.0f / inverse;
  }
  constexpr float kToInteger = 0x1.8p23f;
  Vf remainder = splat<Vf>(0.0f);
  for (int64_t d = 0; d < pitch; d += kLanes) {
    const Vf x = load(v + d), shifted = x * inverse + kToInteger;
    const Vf rest = multiply_add(kToInteger - shifted, splat<Vf>(step), x);
    remainder = multiply_add(rest, rest, remainder);
    for (int i = 0; i < kParts; ++i) {
      typedef int8_t Bytes __attribute__((vector_size(kNative)));
      const Bytes bytes = __builtin_convertvector((Vi::Native)shifted.part[i], Bytes);
      std::memcpy(q + d + i * kNative, &bytes, sizeof bytes);
    }
  }
  return {step, sum_of(remainder)};
}

// Panels of a header, kWidth steps, and for each chain the sum that it begins with and kWidth bytes for each
// of its elements, those of four elements together.
class ByteWords : public Words {
 public:
  explicit ByteWords(const Codebook& from) : Words(from), error_(panels()) {}

  int64_t panel_floats() const { return (kFirst + quads() + chains()) * kWidth; }
  int64_t quads() const { return (book.dim + 3) / 4; }
  int64_t chains() const { return (book.dim + kChain - 1) / kChain; }

  // The panel from place `begin`, with `buffer` of kWidth * pitch() floats.
  void pack(int64_t begin, float* to, float* buffer) {
    begin_panel(begin, to, buffer);
    const int64_t pitch = book.pitch();
    Scratch<int8_t> q(pitch);
    float error = 0.0f;
    for (int lane = 0; lane < kWidth; ++lane) {
      const Rounded rounded = round_to_bytes<true>(buffer + lane * pitch, pitch, q.get());
      to[kHeader * kWidth + lane] = rounded.step;
      const float length = book.by_word ? to[kWidth + lane] : static_cast<float>(book.longest);
      if (rounded.remainder > 0.0f)
        error = std::max(error, static_cast<float>(upper_norm(rounded.remainder)) / length);
      put(q.get(), to + kFirst * kWidth + lane);
    }
    error_[begin / kWidth] = 1.0001f * error;
  }

  // After all panels were packed. Whether it is of use to multiply these.
  bool precise() const { return error() < 0.25; }

  // The norm of a codeword's remainder, at most, by its own where each has a
  // bound of its own, or else by the longest codeword's.
  double error() const {
    float most = 0.0f;
    for (int64_t i = 0; i < panels(); ++i) most = std::max(most, error_[i]);
    return most;
  }

 private:
  friend class ByteScores;
  static constexpr int64_t kFirst = kHeader + 1;

  // Vectors are multiplied as q + 128, so that a chain begins with -128 times the sum of the codeword.
  void put(const int8_t* q, float* to) const {
    for (int64_t d = 0; d < 4 * quads(); d += kChain) {
      const int64_t end = std::min(d + kChain, 4 * quads());
      int sums[2] = {};
      for (int64_t i = d; i < end; ++i) sums[i / 2 % 2] += q[i];
      const uint16_t start[2] = {static_cast<uint16_t>(-128 * sums[0]),
                                 static_cast<uint16_t>(-128 * sums[1])};
      std::memcpy(to, start, sizeof start);
      to += kWidth;
      for (int64_t i = d; i < end; i += 4, to += kWidth) std::memcpy(to, q + i, 4);
    }
  }

  Scratch<float> error_;  // of each panel
};

// The scores of a block of vectors.
class ByteScores {
 public:
  using Packed = ByteWords;
  static constexpr bool kRough = true;  // many candidates
  static constexpr int kMostHits = 64;

  ByteScores(const Packed& words, int rows)
      : words_(words),
        quads_(words.quads()),
        error_(words.error()),
        packed_(rows * quads_, 0),
        vector_(words.book.pitch(), 0.0f),
        bytes_(words.book.pitch()),
        steps_(rows, 0.0f),
        remainders_(rows) {}

  static int64_t rows(int64_t dim) { return (1 << 17) / dim; }

  float place(int r, const float* x, bool centred, float scale) {
    const int64_t pitch = words_.book.pitch(), dim = words_.book.dim;
    const float* centre = words_.book.centre.get();
    float* const v = vector_.get();
    for (int64_t d = 0; d < dim; ++d) v[d] = centred ? x[d] * scale - centre[d] : x[d] * scale;
    Vf square = splat<Vf>(0.0f);
    for (int64_t d = 0; d < pitch; d += kLanes) square = multiply_add(load(v + d), load(v + d), square);
    const Rounded rounded = round_to_bytes<false>(v, pitch, bytes_.get());
    steps_[r] = rounded.step;
    remainders_[r] = rounded.remainder;
    uint32_t* to = packed_.get() + r / kTile * kTile * quads_ + r % kTile;
    for (int64_t i = 0; i < quads_; ++i, to += kTile) {
      uint32_t four;
      std::memcpy(&four, bytes_.get() + 4 * i, sizeof four);
      *to = four ^ 0x80808080u;
    }
    return sum_of(square);
  }

  double reach(int r, double norm) const {
    const double remainder = words_.upper_norm(remainders_[r]);
    return remainder + (norm + remainder) * (error_ + words_.book.product_error() * (1.0 + error_));
  }

  template <bool kByWord>
  void score(const float* panel, int begin, int end, const float* reach, float* maxima) const {
    for (int g = begin; g < end; g += kTile) {
      float* const to = maxima + (g - begin) * kMaximaPitch;
      if (quads_ > kQuads)
        score_tile<kByWord, true>(panel, g, reach + g, to);
      else
        score_tile<kByWord, false>(panel, g, reach + g, to);
    }
  }

 private:
  static constexpr int kPieces = kWidth / kNative;  // native vectors of a row of a panel
  static constexpr int64_t kQuads = kChain / 4;
  using Ni = Vi::Native;
  using Ns = Vs::Native;

  // The sums of products of kTile vectors with up to kChain elements of the codewords at p.
  GENPERF_HD static void multiply(const float* p, const uint32_t* x, int64_t quads,
                                  Ns (&sum)[kTile][kPieces]) {
#pragma GCC unroll 4
    for (int i = 0; i < kPieces; ++i) {
      const Ns start = (Ns)load_native(p + i * kNative);
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r) sum[r][i] = start;
    }
    p += kWidth;
    for (int64_t q = 0; q < quads; ++q, p += kWidth, x += kTile) {
      Ni word[kPieces];
#pragma GCC unroll 4
      for (int i = 0; i < kPieces; ++i) word[i] = (Ni)load_native(p + i * kNative);
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r) {
        const Ni four = (Ni)(Nu{} + x[r]);
#pragma GCC unroll 4
        for (int i = 0; i < kPieces; ++i) sum[r][i] += multiply_bytes(four, word[i]);
      }
    }
  }

  template <bool kFirst>
  GENPERF_HD static void add(const Ns (&chain)[kTile][kPieces], Ni (&sums)[kTile][kPieces]) {
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < kPieces; ++i) {
        const Ni sum = add_neighbours(chain[r][i]);
        sums[r][i] = kFirst ? sum : sums[r][i] + sum;
      }
  }

  // Of kTile vectors from `g`.
  template <bool kByWord, bool kSeveral>
  void score_tile(const float* panel, int g, const float* reach, float* maxima) const {
    const float* p = panel + Packed::kFirst * kWidth;
    const uint32_t* x = packed_.get() + g * quads_;
    Ns chain[kTile][kPieces];
    Ni sums[kTile][kPieces];
    int64_t left = quads_;
    if constexpr (kSeveral) {
      multiply(p, x, kQuads, chain);
      add<true>(chain, sums);
      for (;;) {
        p += (1 + kQuads) * kWidth, x += kQuads * kTile, left -= kQuads;
        if (left <= kQuads) break;
        multiply(p, x, kQuads, chain);
        add<false>(chain, sums);
      }
    }
    multiply(p, x, left, chain);
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) {
      Nf most{};
#pragma GCC unroll 4
      for (int i = 0; i < kPieces; ++i) {
        Nf start = load_native(panel + i * kNative);
        if constexpr (kByWord)
          start = multiply_add(Nf{} + reach[r], load_native(panel + kWidth + i * kNative), start);
        const Nf step = load_native(panel + Packed::kHeader * kWidth + i * kNative);
        Ni sum = add_neighbours(chain[r][i]);
        if constexpr (kSeveral) sum += sums[r][i];
        const Nf score = multiply_add(__builtin_convertvector(sum, Nf) * steps_[g + r], step, start);
        most = i == 0 ? score : max_of(most, score);
      }
      store_native(maxima + r * kMaximaPitch, most);
    }
  }

  const Packed& words_;
  const int64_t quads_;
  const double error_;
  Scratch<uint32_t> packed_;  // four elements of each vector of a tile, and then the next four
  Scratch<float> vector_;
  Scratch<int8_t> bytes_;
  Scratch<float> steps_, remainders_;
};

}  // namespace vq
}  // namespace GENPERF_ISA
}  // namespace genperf
