// Positions of a tensor [B, C, *], sixteen at a time, as a panel [C, 16] of float32 or as rows [16, C]. The
// positions of a sample follow on those of the one before it.
#pragma once

#include "../common/chunk.h"
#include "../common/scratch.h"
#include "../common/transpose.h"

namespace genperf {
namespace GENPERF_ISA {
namespace {

// The positions of all samples, one sample after another.
struct Positions {
  int64_t samples, of_sample;
  const int64_t* lengths;  // may be null

  explicit Positions(const View& x, const View& lengths)
      : samples(x.shape[0]),
        of_sample(1),
        lengths(static_cast<const int64_t*>(lengths ? lengths.data : nullptr)) {
    for (int d = 2; d < x.ndim; ++d) of_sample *= x.shape[d];
  }
  int64_t count() const { return samples * of_sample; }
  int64_t panels() const { return (count() + kLanes - 1) / kLanes; }
  int64_t live(int64_t sample) const { return lengths ? lengths[sample] : of_sample; }
  // The same; NaN where a length is none.
  double counted(int64_t sample) const {
    const int64_t n = live(sample);
    return n < 0 || n > of_sample ? std::nan("") : static_cast<double>(n);
  }
};

// Where the positions of a panel lie.
struct Places {
  int64_t offset[kLanes];  // of their first channel, in elements
  uint32_t live;           // bit by bit: whether they count
  int n;                   // that there are

  bool counts(int j) const { return live >> j & 1u; }
};

// to[position][channel] = from[channel][position], for `channels` rows of 16.
inline void to_rows(const float* from, int64_t channels, float* to, int64_t pitch) {
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4)
    for (int first = 0; first < kLanes; first += kNative) {
      Nf x[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) std::memcpy(&x[i], from + (c + i) * kLanes + first, sizeof x[i]);
      transpose_4(x);
#pragma GCC unroll 4
      for (int quad = 0; quad < kNative / 4; ++quad)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) store_quad(to + (first + 4 * quad + i) * pitch + c, x[i], quad);
    }
  for (; c < channels; ++c)
    for (int j = 0; j < kLanes; ++j) to[j * pitch + c] = from[c * kLanes + j];
}

// The other way round, from 16 rows anywhere.
inline void to_panel(const float* const* from, int64_t channels, float* to) {
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4)
    for (int first = 0; first < kLanes; first += kNative) {
      Nf x[4];
#pragma GCC unroll 4
      for (int quad = 0; quad < kNative / 4; ++quad)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) load_quad(x[i], from[first + 4 * quad + i] + c, quad);
      transpose_4(x);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) std::memcpy(to + (c + i) * kLanes + first, &x[i], sizeof x[i]);
    }
  for (; c < channels; ++c)
    for (int j = 0; j < kLanes; ++j) to[c * kLanes + j] = from[j][c];
}

class Field {
 public:
  const int64_t channels, pitch;  // pitch: a channel's stride

  Field(const View& v, const Positions& positions)
      : channels(v.shape[1]),
        pitch(v.stride[1]),
        positions_(positions),
        data_(v.data),
        dtype_(v.dtype),
        of_sample_(v.stride[0]),
        space_(space_of(v)),
        neighbours_(space_.ndim == 1 && space_.stride[0] == 1),
        zeros_(channels, 0.0f),
        rows_(pitch == 1 ? kLanes * row_pitch() : 0) {}

  bool is_float() const { return dtype_ == DType::kFloat32; }
  bool channels_last() const { return pitch == 1 && is_float(); }
  bool has_runs() const { return neighbours_ && is_float(); }

  // Where `count` panels begin whose positions all count and are neighbours in memory; null otherwise.
  float* run(int64_t panel, int64_t count) const {
    int64_t offset;
    return is_float() && is_run(panel, count, offset) ? floats(offset) : nullptr;
  }

  // Panels [panel, panel + count), each [C, 16], plus a number for each channel where `add` is given. Zeros
  // for positions that do not count.
  void read(int64_t panel, int64_t count, const float* add, float* to) const {
    int64_t offset;
    if (!is_run(panel, count, offset)) {
      if (count == 1) return scattered(places(panel), add, to);
      for (int64_t k = 0; k < count; ++k) read(panel + k, 1, add, to + k * channels * kLanes);
      return;
    }
    for (int64_t c = 0; c < channels; ++c, offset += pitch, to += kLanes)
      for (int64_t k = 0; k < count; ++k) {
        float* const panel_to = to + k * channels * kLanes;
        if (!is_float()) widen(halves(offset + k * kLanes), 1, kLanes, dtype_, panel_to);
        const Vf x = load(is_float() ? floats(offset + k * kLanes) : panel_to);
        store(panel_to, add ? x + add[c] : x);
      }
  }

  // A panel as rows, of a tensor whose channels are neighbours.
  void read_rows(int64_t panel, const float* add, float* to, int64_t to_pitch) const {
    const Places p = places(panel);
    for (int j = 0; j < kLanes; ++j) {
      const float* from = p.counts(j) ? floats(p.offset[j]) : zeros_.get();
      if (add) {
        for (int64_t c = 0; c < channels; ++c) to[j * to_pitch + c] = from[c] + add[c];
      } else {
        std::memcpy(to + j * to_pitch, from, channels * sizeof(float));
      }
    }
  }

  // Panels to where they belong; zeros for positions that do not count.
  void write(int64_t panel, int64_t count, const float* from) {
    int64_t offset;
    if (!is_run(panel, count, offset)) {
      if (count == 1) return scatter(places(panel), from);
      for (int64_t k = 0; k < count; ++k) write(panel + k, 1, from + k * channels * kLanes);
      return;
    }
    for (int64_t c = 0; c < channels; ++c, offset += pitch, from += kLanes)
      for (int64_t k = 0; k < count; ++k) {
        const float* const panel_from = from + k * channels * kLanes;
        if (is_float())
          store(floats(offset + k * kLanes), load(panel_from));
        else
          narrow(panel_from, kLanes, dtype_, halves(offset + k * kLanes), 1);
      }
  }

 private:
  bool is_run(int64_t panel, int64_t count, int64_t& offset) const {
    const int64_t sample = panel * kLanes / positions_.of_sample,
                  at = panel * kLanes - sample * positions_.of_sample;
    offset = sample * of_sample_ + at;
    const int64_t end = at + count * kLanes;
    return neighbours_ && sample < positions_.samples && end <= positions_.of_sample &&
           end <= positions_.live(sample);
  }

  Places places(int64_t panel) const {
    const int64_t first = panel * kLanes, left = positions_.count() - first;
    const int64_t step = space_.stride[space_.ndim - 1];
    Places p;
    p.n = left < kLanes ? static_cast<int>(left) : kLanes;
    p.live = 0;
    for (int j = 0; j < p.n;) {
      const int64_t sample = (first + j) / positions_.of_sample, at = (first + j) % positions_.of_sample;
      const Position start(space_, at);
      const int count = start.run < p.n - j ? static_cast<int>(start.run) : p.n - j;
      for (int i = 0; i < count; ++i) p.offset[j + i] = sample * of_sample_ + start.offset + i * step;
      const int64_t live = positions_.live(sample) - at;
      const int here = live >= count ? count : live < 0 ? 0 : static_cast<int>(live);
      p.live |= ((1u << here) - 1u) << j;
      j += count;
    }
    return p;
  }

  void scattered(const Places& p, const float* add, float* to) const {
    if (channels_last()) {
      const float* from[kLanes];
      for (int j = 0; j < kLanes; ++j) from[j] = p.counts(j) ? floats(p.offset[j]) : zeros_.get();
      to_panel(from, channels, to);
    } else {
      for (int j = 0; j < kLanes; ++j)
        for (int64_t c = 0; c < channels; ++c)
          to[c * kLanes + j] = p.counts(j) ? value(p.offset[j] + c * pitch) : 0.0f;
    }
    for (int64_t c = 0; add && c < channels; ++c) store(to + c * kLanes, load(to + c * kLanes) + add[c]);
  }

  void scatter(const Places& p, const float* from) {
    if (channels_last()) {
      to_rows(from, channels, rows_.get(), row_pitch());
      for (int j = 0; j < p.n; ++j)
        std::memcpy(floats(p.offset[j]), p.counts(j) ? rows_.get() + j * row_pitch() : zeros_.get(),
                    channels * sizeof(float));
      return;
    }
    for (int j = 0; j < p.n; ++j)
      for (int64_t c = 0; c < channels; ++c) {
        const float x = p.counts(j) ? from[c * kLanes + j] : 0.0f;
        const int64_t at = p.offset[j] + c * pitch;
        if (is_float())
          *floats(at) = x;
        else
          narrow(&x, 1, dtype_, halves(at), 1);
      }
  }

  float* floats(int64_t offset) const { return static_cast<float*>(data_) + offset; }
  uint16_t* halves(int64_t offset) const { return static_cast<uint16_t*>(data_) + offset; }
  int64_t row_pitch() const { return channels + kLanes; }

  float value(int64_t offset) const {
    if (is_float()) return *floats(offset);
    float x;
    widen(halves(offset), 1, 1, dtype_, &x);
    return x;
  }

  static View space_of(const View& v) {
    View space = v;
    space.ndim = v.ndim - 2;
    for (int d = 2; d < v.ndim; ++d) space.shape[d - 2] = v.shape[d], space.stride[d - 2] = v.stride[d];
    return collapse(space);
  }

  const Positions& positions_;
  void* data_;
  DType dtype_;
  int64_t of_sample_;
  View space_;
  bool neighbours_;       // the positions of a sample in memory
  Scratch<float> zeros_;  // for each channel
  Scratch<float> rows_;   // on the way out, of a tensor whose channels are neighbours
};

}  // namespace
}  // namespace GENPERF_ISA
}  // namespace genperf
