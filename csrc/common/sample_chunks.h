// How a batch of samples is cut into chunks, and summed by sample.
//
// A chunk is part of one sample, or several whole samples where they are small. Chunks depend on the shape of
// a sample alone, so that its sums are the same in any batch and for any number of threads.
#pragma once

#include "chunk.h"

namespace genperf {
inline namespace GENPERF_ISA {

struct SampleChunks {
  int64_t samples, per_sample;  // unless `by_sample`, all elements are one sample
  int64_t samples_per_chunk, chunks_per_sample, chunks;

  SampleChunks(const View& shape, bool by_sample) {
    int64_t n = shape.numel();
    samples = by_sample ? shape.shape[0] : 1;
    per_sample = samples == 0 ? 0 : n / samples;
    samples_per_chunk = per_sample == 0 ? samples : per_sample >= kChunk ? 1 : kChunk / per_sample;
    chunks_per_sample = (per_sample + kChunk - 1) / kChunk;
    chunks = n == 0                  ? 0
             : samples_per_chunk > 1 ? (samples + samples_per_chunk - 1) / samples_per_chunk
                                     : samples * chunks_per_sample;
  }

  // Chunk c: elements [start, start + n) of samples [sample, sample + count).
  struct Range {
    int64_t start, sample, count;
    int n;
  };

  Range range(int64_t c) const {
    if (samples_per_chunk > 1) {
      int64_t sample = c * samples_per_chunk;
      int64_t count = sample + samples_per_chunk <= samples ? samples_per_chunk : samples - sample;
      return {sample * per_sample, sample, count, static_cast<int>(count * per_sample)};
    }
    int64_t sample = c / chunks_per_sample, first = (c % chunks_per_sample) * kChunk;
    int64_t n = per_sample - first < kChunk ? per_sample - first : kChunk;
    return {sample * per_sample + first, sample, 1, static_cast<int>(n)};
  }

  bool parallel() const { return chunks * kChunk >= 16384; }
};

// Sums over samples, to a float32 vector, at most `largest`: one double a (sample, chunk of the sample).
class SampleSums {
 public:
  SampleSums(const View& output, const SampleChunks& plan, bool wanted, double largest = kInfinity)
      : output_(output),
        plan_(plan),
        largest_(largest),
        partial_(wanted ? new double[plan.samples * columns()]() : nullptr) {}
  ~SampleSums() { delete[] partial_; }
  SampleSums(const SampleSums&) = delete;
  SampleSums& operator=(const SampleSums&) = delete;

  void add(const SampleChunks::Range& r, const float* values) {
    add_by(r, [=](int first, int n) { return sum_chunk(values + first, n); });
  }

  // `sum(first, n)`: that of elements [first, first + n) of the chunk.
  template <class Sum>
  void add_by(const SampleChunks::Range& r, Sum sum) {
    if (!partial_) return;
    int n = static_cast<int>(r.n / r.count);
    int64_t column = plan_.samples_per_chunk > 1 ? 0 : (r.start - r.sample * plan_.per_sample) / kChunk;
    for (int64_t s = 0; s < r.count; ++s)
      partial_[(r.sample + s) * columns() + column] = sum(static_cast<int>(s * n), n);
  }

  void write() const {
    if (!partial_) return;
    for (int64_t s = 0; s < plan_.samples; ++s) {
      double sum = 0.0;
      for (int64_t c = 0; c < columns(); ++c) sum += partial_[s * columns() + c];
      if (sum > largest_) sum = largest_;
      static_cast<float*>(output_.data)[s * output_.stride[0]] = static_cast<float>(sum);
    }
  }

 private:
  int64_t columns() const { return plan_.samples_per_chunk > 1 ? 1 : plan_.chunks_per_sample; }

  const View& output_;
  const SampleChunks& plan_;
  double largest_;
  double* partial_;
};

}  // namespace GENPERF_ISA
}  // namespace genperf
