// Tiles of some positions of a tensor [B, channels, *], channel by channel, as plain float arrays. They are
// copies: channels whose distance is a power of two would fall upon each other in the first-level cache, and
// a plain copy keeps more reads in flight than arithmetic between them would, all the more the longer the
// stretches are in which memory is read.
#pragma once

#include "chunk.h"

namespace genperf {
inline namespace GENPERF_ISA {

// Positions of a tile: sixteen cache lines of each channel at a time.
inline constexpr int kTile = 256;
// From one channel of a tile to the next: with room for a block that begins at the last position, and no
// power of two.
inline constexpr int kRow = kTile + kLanes;

// The values of each channel.
struct Tile {
  float* data;

  GENPERF_HD float* operator[](int64_t channel) const { return data + channel * kRow; }
};

class Planes {
 public:
  Planes() : channels_(0), step_(0) {}
  explicit Planes(const View& v) : channels_(v.shape[1]), step_(v.stride[1]) {
    View w = v;  // without the channels
    for (int d = 1; d + 1 < v.ndim; ++d) w.shape[d] = v.shape[d + 1], w.stride[d] = v.stride[d + 1];
    w.ndim = v.ndim - 1;
    where_ = collapse(w);
    large_ = v.numel() >= int64_t{1} << 20;
  }

  int64_t channels() const { return channels_; }
  DType dtype() const { return where_.dtype; }

  // What lies where in positions [start, start + n).
  struct Span {
    int64_t offset[kTile];
    bool in_place = false;  // n = kTile contiguous floats
  };

  void locate(int64_t start, int n, Span& span) const {
    Position at(where_, start);
    const int64_t stride = where_.stride[where_.ndim - 1];
    span.in_place = where_.dtype == DType::kFloat32 && stride == 1 && n == kTile && at.run >= n;
    span.offset[0] = at.offset;
    if (span.in_place) return;
    for (int done = 0; done < n;) {
      const int count = at.run < n - done ? static_cast<int>(at.run) : n - done;
      for (int i = 0; i < count; ++i) span.offset[done + i] = at.offset + i * stride;
      done += count;
      at.next_run(where_);
    }
  }

  // The first `channels` channels; `buffer` has room for kRow floats of each. Past n they are zero up to
  // a whole block.
  Tile read(const Span& span, int n, int64_t channels, float* buffer) const {
    if (span.in_place) {
      const float* const from = static_cast<const float*>(where_.data) + span.offset[0];
      for (int64_t c = 0; c < channels; ++c)
        std::memcpy(buffer + c * kRow, from + c * step_, kTile * sizeof(float));
      return {buffer};
    }
    const bool by_channel = step_ != 1;
    const int64_t outer = by_channel ? channels : n, inner = by_channel ? n : channels;
    for (int64_t a = 0; a < outer; ++a) {
      for (int64_t b = 0; b < inner; ++b) {
        const int64_t c = by_channel ? a : b, i = by_channel ? b : a;
        buffer[c * kRow + i] = element(span.offset[i] + c * step_);
      }
    }
    for (int64_t c = 0; c < channels; ++c)
      for (int i = n; i < padded(n); ++i) buffer[c * kRow + i] = 0.0f;
    return {buffer};
  }

  // Writes all channels, or those of [begin, end).
  void write(const Span& span, int n, const float* buffer) const { write(span, n, buffer, 0, channels_); }
  void write(const Span& span, int n, const float* buffer, int64_t begin, int64_t end) const {
    if (span.in_place) {
      float* const to = static_cast<float*>(where_.data) + span.offset[0];
      for (int64_t c = begin; c < end; ++c) write_line(to + c * step_, buffer + c * kRow);
      return;
    }
    const bool by_channel = step_ != 1;
    const int64_t outer[] = {by_channel ? begin : 0, by_channel ? end : n};
    const int64_t inner[] = {by_channel ? 0 : begin, by_channel ? n : end};
    for (int64_t a = outer[0]; a < outer[1]; ++a) {
      for (int64_t b = inner[0]; b < inner[1]; ++b) {
        const int64_t c = by_channel ? a : b, i = by_channel ? b : a;
        put(span.offset[i] + c * step_, buffer[c * kRow + i]);
      }
    }
  }

  // After the last write() of a thread.
  static void finish() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
  }

  // Elements of their own: `place` of channel `channel` at position i, where the next channels are step() on.
  int64_t step() const { return step_; }
  int64_t place(const Span& span, int i, int64_t channel) const {
    return (span.in_place ? span.offset[0] + i : span.offset[i]) + channel * step_;
  }

  float element(const Span& span, int i, int64_t channel) const { return element(place(span, i, channel)); }

  // The elements at place[i] + shift.
  void gather(const int64_t* place, int n, int64_t shift, float* out) const {
    if (where_.dtype == DType::kFloat32) {
      const float* const from = static_cast<const float*>(where_.data) + shift;
      for (int i = 0; i < n; ++i) out[i] = from[place[i]];
    } else {
      for (int i = 0; i < n; ++i) out[i] = element(place[i] + shift);
    }
  }

  // Channels [begin, end) of a tile that is to be read, on their way to the second-level cache. For some at a
  // time, between arithmetic: a processor drops what is asked for at once.
  void prefetch(const Span& span, int64_t begin, int64_t end) const {
    if (!span.in_place) return;
    for (int64_t c = begin; c < end; ++c) {
      const float* const from = static_cast<const float*>(where_.data) + span.offset[0] + c * step_;
      for (int i = 0; i < kTile; i += 16) __builtin_prefetch(from + i, 0, 2);
    }
  }

 private:
  GENPERF_HD float element(int64_t at) const {
    if (where_.dtype == DType::kFloat32) return static_cast<const float*>(where_.data)[at];
    const uint16_t bits = static_cast<const uint16_t*>(where_.data)[at];
    return where_.dtype == DType::kFloat16 ? float_from_float16(bits) : float_from_bfloat16(bits);
  }

  GENPERF_HD void put(int64_t at, float x) const {
    if (where_.dtype == DType::kFloat32) {
      static_cast<float*>(where_.data)[at] = x;
    } else {
      static_cast<uint16_t*>(where_.data)[at] =
          where_.dtype == DType::kFloat16 ? float16_from_float(x) : bfloat16_from_float(x);
    }
  }

  // Past the caches where the tensor would not stay there, which spares them the reading of what is replaced.
  void write_line(float* to, const float* from) const {
#if defined(__x86_64__)
    if (large_ && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
      for (int i = 0; i < kTile; i += 4) _mm_stream_ps(to + i, _mm_loadu_ps(from + i));
      return;
    }
#endif
    std::memcpy(to, from, kTile * sizeof(float));
  }

  View where_;
  int64_t channels_, step_;
  bool large_ = false;
};

}  // namespace GENPERF_ISA
}  // namespace genperf
