// Logits and noise of a block of positions, codeword by codeword, and the gradients that go the same way.
#pragma once

#include "../common/gumbel.h"
#include "../common/scratch.h"
#include "gumbel_quantize.h"

namespace genperf {
namespace GENPERF_ISA {
namespace {

// Positions whose values for all codewords are held at a time.
constexpr int kHeld = 64;
// Where a sample has fewer positions than this, a block takes those of several samples.
constexpr int64_t kFewPositions = 32;
// Elements of a sample that are turned at a time: what they are turned into stays in the first-level cache.
constexpr int kTurned = 128;

struct Source {
  const int64_t words, positions;
  const View logits, noise, key;
  const bool by_sample, few;

  explicit Source(const GumbelQuantizeArgs& a)
      : words(a.logits.shape[1]),
        positions(a.logits.shape[2]),
        logits(collapse(a.logits)),
        noise(a.noise ? collapse(a.noise) : a.noise),
        key(a.key),
        by_sample(a.key && a.key.ndim == 2),
        few(positions < kFewPositions) {}

  int64_t at(int64_t sample, int64_t word, int64_t position) const {
    return (sample * words + word) * positions + position;
  }
};

// Positions by blocks: within a sample, or of whole samples.
struct Blocks {
  const int64_t positions, length, per_sample, count;

  Blocks(const Source& source, int64_t samples, int64_t length)
      : positions(source.few ? samples * source.positions : source.positions),
        length(source.few && source.positions ? kHeld / source.positions * source.positions : length),
        per_sample((positions + this->length - 1) / this->length),
        count((source.few ? 1 : samples) * per_sample) {}

  // 0 where a block takes several samples, whose positions are counted through.
  int64_t sample(int64_t block) const { return block / per_sample; }
  int64_t first(int64_t block) const { return block % per_sample * length; }
  int size(int64_t block) const {
    const int64_t left = positions - first(block);
    return static_cast<int>(left < length ? left : length);
  }
};

// One for each thread.
class Reader {
 public:
  // `form`: as what noise of a key is wanted.
  Reader(const Source& source, GumbelForm form)
      : s_(source),
        form_(form),
        logits_(source.few ? source.words * kHeld : 0, 0.0f),
        noise_(logits_.size(), 0.0f) {}

  void open(int64_t sample, int64_t position, int n, bool with_noise) {
    sample_ = sample, position_ = position, n_ = n;
    if (!s_.few) return;
    gather(s_.logits, s_.words, logits_.get());
    if (!with_noise) return;
    if (s_.noise) return gather(s_.noise, s_.words, noise_.get());
    turn(s_.words, noise_.get(), [&](int64_t sample_here, int64_t i, int count) {
      const int64_t first = s_.at(s_.by_sample ? 0 : sample_here, 0, 0);
      return gumbel_chunk(form_, philox_key(s_.key, sample_here), first + i, count, noise_chunk_);
    });
  }

  // Readable up to padded(n).
  const float* logits(int64_t word) {
    if (s_.few) return logits_.get() + word * kHeld;
    return read_chunk(s_.logits, s_.at(sample_, word, position_), n_, chunk_);
  }

  const float* noise(int64_t word) {
    if (s_.few) return noise_.get() + word * kHeld;
    const int64_t element = s_.at(s_.by_sample ? 0 : sample_, word, position_);
    if (s_.key) return gumbel_chunk(form_, philox_key(s_.key, sample_), element, n_, noise_chunk_);
    return read_chunk(s_.noise, element, n_, reinterpret_cast<Buffer&>(noise_chunk_));
  }

  // Whether noise() gives words.
  bool gives_words() const { return s_.key && form_ == GumbelForm::kWords; }

  // The number of position i of the block within a tensor [B, channels, P], less that of its channel.
  int64_t place(int64_t channels, int i) const {
    const int64_t at = position_ + i;
    if (!s_.few) return sample_ * channels * s_.positions + at;
    return at / s_.positions * channels * s_.positions + at % s_.positions;
  }

  // The block of a collapsed view [B, channels, P] to rows of kHeld.
  void gather(const View& v, int64_t channels, float* to) {
    if (s_.few) {
      turn(channels, to, [&](int64_t sample_here, int64_t i, int count) {
        return read_chunk(v, sample_here * channels * s_.positions + i, count, chunk_);
      });
      return;
    }
    for (int64_t c = 0; c < channels; ++c) {
      const float* from = read_chunk(v, (sample_ * channels + c) * s_.positions + position_, n_, chunk_);
      for (int i = 0; i < n_; ++i) to[c * kHeld + i] = from[i];
    }
  }

  // Where the gradient of a word's logits goes, after they were read for the last time.
  float* open_gradient(const View& v, int64_t word) {
    if (s_.few) return logits_.get() + word * kHeld;
    return open_chunk(v, s_.at(sample_, word, position_), n_, out_);
  }

  void close_gradient(const View& v, int64_t word, const float* data) {
    if (!s_.few) close_chunk(v, s_.at(sample_, word, position_), n_, data, out_);
  }

  // After the last word.
  void close_gradients(const View& v) {
    if (!s_.few) return;
    for_turned(s_.words, [&](int64_t sample_here, int64_t i, int count, int column) {
      int64_t k = i / s_.positions, p = i % s_.positions;
      for (int j = 0; j < count; ++j) {
        out_[j] = logits_[k * kHeld + column + p];
        if (++p == s_.positions) p = 0, ++k;
      }
      close_chunk(v, s_.at(sample_here, 0, 0) + i, count, out_, out_);
    });
  }

 private:
  // f(sample, i, count, column) for pieces of `count` elements of each sample from element i on; `column` is
  // where the sample's positions begin in the block.
  template <class Function>
  void for_turned(int64_t channels, Function f) {
    const int64_t elements = channels * s_.positions, first = position_ / s_.positions;
    for (int64_t i = 0; i < elements; i += kTurned)
      for (int column = 0; column < n_; column += static_cast<int>(s_.positions))
        f(first + column / s_.positions, i, static_cast<int>(elements - i < kTurned ? elements - i : kTurned),
          column);
  }

  // read(sample, i, count) to rows of kHeld.
  template <class Read>
  void turn(int64_t channels, float* to, Read read) {
    for_turned(channels, [&](int64_t sample_here, int64_t i, int count, int column) {
      const float* from = read(sample_here, i, count);
      int64_t k = i / s_.positions, p = i % s_.positions;
      for (int j = 0; j < count; ++j) {
        to[k * kHeld + column + p] = from[j];
        if (++p == s_.positions) p = 0, ++k;
      }
    });
  }

  const Source& s_;
  const GumbelForm form_;
  Scratch<float> logits_, noise_;  // rows of kHeld, of few positions
  alignas(64) Buffer chunk_, out_;
  alignas(64) PhiloxBuffer noise_chunk_;
  int64_t sample_ = 0, position_ = 0;
  int n_ = 0;
};

}  // namespace
}  // namespace GENPERF_ISA
}  // namespace genperf
