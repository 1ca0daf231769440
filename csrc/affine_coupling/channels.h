// The transformed channels of a coupling as tensors of one logical shape, what is copied beside them, and
// sums by channel.
#pragma once

#include <algorithm>

#include "../common/sample_chunks.h"
#include "../common/scratch.h"
#include "../common/subview.h"
#include "affine_coupling.h"

namespace genperf {
inline namespace GENPERF_ISA {

// Shift and raw scale; the latter absent where additive.
struct Halves {
  View t, u;
};

// The order in which the elements of a sample are walked: channel by channel; or position by position, where
// the channels of `like` lie next to each other.
class Walk {
 public:
  Walk(const CouplingArgs& a, const View& like) : a_(a), shape_(sliced(a.x, 1, a.start, a.n)) {
    last_ = like && like.ndim > 2 && like.stride[1] == 1 && like.stride[like.ndim - 1] != 1;
    shape_ = ordered(shape_);
  }

  const View& shape() const { return shape_; }

  View of_state(const View& v) const { return v ? collapse(ordered(sliced(v, 1, a_.start, a_.n))) : View{}; }

  // [2 n], [B, 2 n, *]: both parts, along dimension `dim`.
  Halves halves(const View& h, int dim) const {
    if (!h) return {};
    if (a_.scale == CouplingScale::kAdditive) return {h, View{}};
    View first = sliced(h, dim, 0, a_.n), second = sliced(h, dim, a_.interleaved ? 1 : a_.n, a_.n);
    if (a_.interleaved) first.stride[dim] *= 2, second.stride[dim] *= 2;
    return a_.shift_first ? Halves{first, second} : Halves{second, first};
  }

  Halves of_h(const View& h) const { return ordered(halves(h, 1)); }

  // [2 n] for each sample and position.
  Halves of_channels(const View& values) const {
    Halves parts = halves(values, 0);
    return ordered(Halves{broadcast(parts.t, 1), broadcast(parts.u, 1)});
  }

  // [B] for each channel and position.
  View of_samples(const View& values) const { return collapse(ordered(broadcast(values, 0))); }

  // [B, *] for each channel.
  View of_mask(const View& mask) const {
    if (!mask) return {};
    View out = a_.x;
    out.data = mask.data, out.dtype = mask.dtype;
    out.shape[1] = a_.n, out.stride[1] = 0;
    out.stride[0] = mask.stride[0];
    for (int d = 2; d < out.ndim; ++d) out.stride[d] = mask.stride[d - 1];
    return collapse(ordered(out));
  }

 private:
  View broadcast(const View& values, int dim) const {
    if (!values) return {};
    View out = a_.x;
    out.data = values.data, out.dtype = values.dtype;
    out.shape[1] = a_.n;
    for (int d = 0; d < out.ndim; ++d) out.stride[d] = d == dim ? values.stride[0] : 0;
    return out;
  }

  View ordered(const View& v) const {
    if (!last_ || !v) return v;
    View out = v;
    for (int d = 1; d + 1 < v.ndim; ++d) out.shape[d] = v.shape[d + 1], out.stride[d] = v.stride[d + 1];
    out.shape[v.ndim - 1] = v.shape[1], out.stride[v.ndim - 1] = v.stride[1];
    return out;
  }

  Halves ordered(const Halves& h) const {
    return {h.t ? collapse(ordered(h.t)) : View{}, h.u ? collapse(ordered(h.u)) : View{}};
  }

  const CouplingArgs& a_;
  View shape_;
  bool last_;
};

// The same elements of another tensor of the shape and type.
inline void copy_elements(const View& from, const View& to) {
  const SampleChunks plan(from, true);
  const View source = collapse(from), target = collapse(to);
#pragma omp parallel for schedule(static) if (plan.parallel())
  for (int64_t i = 0; i < plan.chunks; ++i) {
    alignas(64) Buffer in, out;
    const SampleChunks::Range r = plan.range(i);
    const float* x = read_chunk(source, r.start, r.n, in);
    float* y = open_chunk(target, r.start, r.n, out);
    std::memcpy(y, x, r.n * sizeof(float));
    close_chunk(target, r.start, r.n, y, out);
  }
}

// The channels of `from` that are not transformed, to `to`.
inline void copy_others(const CouplingArgs& a, const View& from, const View& to) {
  const int64_t ends[2][2] = {{0, a.start}, {a.start + a.n, from.shape[1]}};
  for (const auto& [first, last] : ends)
    if (first < last) copy_elements(sliced(from, 1, first, last - first), sliced(to, 1, first, last - first));
}

// Sums by channel over samples and positions, which are walked channel by channel: one double for each
// (sample, channel, chunk that holds elements of both).
class ChannelSums {
 public:
  ChannelSums(const SampleChunks& plan, int64_t channels, bool wanted)
      : plan_(plan),
        channels_(channels),
        row_(channels == 0 ? 0 : plan.per_sample / channels),
        pieces_(plan.samples_per_chunk > 1 ? 1 : row_ / kChunk + 2),
        partial_(wanted ? plan.samples * channels * pieces_ : 0, 0.0) {}

  explicit operator bool() const { return partial_.size() > 0; }

  void add(const SampleChunks::Range& r, const float* values) {
    if (!*this) return;
    const int64_t first = r.start - r.sample * plan_.per_sample;
    for (int64_t done = 0; done < r.n;) {
      const int64_t sample = r.sample + (first + done) / plan_.per_sample;
      const int64_t at = (first + done) % plan_.per_sample, channel = at / row_;
      const int64_t n = std::min<int64_t>((channel + 1) * row_ - at, r.n - done);
      const int64_t piece = pieces_ == 1 ? 0 : at / kChunk - channel * row_ / kChunk;
      partial_[(sample * channels_ + channel) * pieces_ + piece] =
          sum_chunk(values + done, static_cast<int>(n));
      done += n;
    }
  }

  void write(const View& sums) const {
    for (int64_t c = 0; c < channels_; ++c) {
      double sum = 0.0;
      for (int64_t s = 0; *this && s < plan_.samples; ++s)
        for (int64_t i = 0; i < pieces_; ++i) sum += partial_[(s * channels_ + c) * pieces_ + i];
      const float value = static_cast<float>(sum);
      if (sums.dtype == DType::kFloat32)
        static_cast<float*>(sums.data)[c * sums.stride[0]] = value;
      else
        narrow(&value, 1, sums.dtype, static_cast<uint16_t*>(sums.data) + c * sums.stride[0], 1);
    }
  }

 private:
  const SampleChunks& plan_;
  int64_t channels_, row_, pieces_;
  Scratch<double> partial_;
};

}  // namespace GENPERF_ISA
}  // namespace genperf
