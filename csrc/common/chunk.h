// Chunks of a tensor's elements in logical order, as plain float arrays in the first-level cache.
// Element type and strides are dealt with here, so that a kernel's loop sees neither.
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "convert.h"

namespace genperf {
inline namespace GENPERF_ISA {

// Elements of a chunk at most; a multiple of every vector width and of 4.
inline constexpr int kChunk = 512;
// A chunk is computed up to the next multiple of this; the fixed number of partial sums of a reduction.
inline constexpr int kPad = kLanes;

inline int padded(int n) { return (n + kPad - 1) / kPad * kPad; }

using Buffer = float[kChunk];

// Where logical element `start` of a collapsed view lies, and how many elements follow in its run
// along the last dimension.
struct Position {
  int64_t index[kMaxDims];
  int64_t offset;
  int64_t run;

  Position(const View& v, int64_t start) : offset(0) {
    for (int d = v.ndim - 1; d >= 0; --d) {
      int64_t outer = d == 0 ? 0 : start / v.shape[d];
      index[d] = start - outer * v.shape[d];
      offset += index[d] * v.stride[d];
      start = outer;
    }
    run = v.shape[v.ndim - 1] - index[v.ndim - 1];
  }

  // To the start of the next run.
  void next_run(const View& v) {
    int d = v.ndim - 1;
    offset -= index[d] * v.stride[d];
    index[d] = 0;
    run = v.shape[d];
    while (--d >= 0) {
      offset += v.stride[d];
      if (++index[d] < v.shape[d]) return;
      offset -= v.shape[d] * v.stride[d];
      index[d] = 0;
    }
  }
};

inline void widen(const uint16_t* from, int64_t stride, int n, DType dtype, float* to) {
  int i = 0;
#if defined(__F16C__)
  if (dtype == DType::kFloat16 && stride == 1) {
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  }
#endif
  if (dtype == DType::kFloat16) {
    for (; i < n; ++i) to[i] = float_from_float16(from[i * stride]);
  } else if (stride == 1) {
    for (; i < n; ++i) to[i] = float_from_bfloat16(from[i]);
  } else {
    for (; i < n; ++i) to[i] = float_from_bfloat16(from[i * stride]);
  }
}

inline void narrow(const float* from, int n, DType dtype, uint16_t* to, int64_t stride) {
  int i = 0;
#if defined(__F16C__)
  if (dtype == DType::kFloat16 && stride == 1) {
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  }
#endif
  if (dtype == DType::kFloat16) {
    for (; i < n; ++i) to[i * stride] = float16_from_float(from[i]);
  } else if (stride == 1) {
    for (; i < n; ++i) to[i] = bfloat16_from_float(from[i]);
  } else {
    for (; i < n; ++i) to[i * stride] = bfloat16_from_float(from[i]);
  }
}

// Elements [start, start + n) of a collapsed view, readable up to padded(n): in place where they are
// contiguous float32, else copied to `buffer`. Null for an absent view.
inline const float* read_chunk(const View& v, int64_t start, int n, Buffer& buffer) {
  if (!v) return nullptr;
  Position at(v, start);
  int64_t stride = v.stride[v.ndim - 1];
  if (v.dtype == DType::kFloat32 && stride == 1 && n <= at.run && n % kPad == 0)
    return static_cast<const float*>(v.data) + at.offset;
  for (int done = 0; done < n;) {
    int count = at.run < n - done ? static_cast<int>(at.run) : n - done;
    if (v.dtype == DType::kFloat32) {
      const float* from = static_cast<const float*>(v.data) + at.offset;
      for (int i = 0; i < count; ++i) buffer[done + i] = from[i * stride];
    } else {
      widen(static_cast<const uint16_t*>(v.data) + at.offset, stride, count, v.dtype, buffer + done);
    }
    done += count;
    at.next_run(v);
  }
  for (int i = n; i < padded(n); ++i) buffer[i] = 0.0f;
  return buffer;
}

// Where a kernel may write elements [start, start + n) up to padded(n): in place, or `buffer`.
inline float* open_chunk(const View& v, int64_t start, int n, Buffer& buffer) {
  if (!v) return nullptr;
  Position at(v, start);
  bool in_place = v.dtype == DType::kFloat32 && v.stride[v.ndim - 1] == 1 && n <= at.run && n % kPad == 0;
  return in_place ? static_cast<float*>(v.data) + at.offset : buffer;
}

// Writes back what open_chunk gave out as `buffer`.
inline void close_chunk(const View& v, int64_t start, int n, const float* data, const Buffer& buffer) {
  if (data != buffer) return;
  Position at(v, start);
  int64_t stride = v.stride[v.ndim - 1];
  for (int done = 0; done < n;) {
    int count = at.run < n - done ? static_cast<int>(at.run) : n - done;
    if (v.dtype == DType::kFloat32) {
      float* to = static_cast<float*>(v.data) + at.offset;
      for (int i = 0; i < count; ++i) to[i * stride] = data[done + i];
    } else {
      narrow(data + done, count, v.dtype, static_cast<uint16_t*>(v.data) + at.offset, stride);
    }
    done += count;
    at.next_run(v);
  }
}

// The sum of n floats: element i goes to partial sum i % 16.
inline double sum_chunk(const float* x, int n) {
  Vf partial = splat<Vf>(0.0f);
  int i = 0;
  for (; i + kPad <= n; i += kPad) partial = partial + load(x + i);
  float lanes[kPad];
  store(lanes, partial);
  for (; i < n; ++i) lanes[i % kPad] += x[i];
  double sum = 0.0;
  for (float lane : lanes) sum += lane;
  return sum;
}

}  // namespace GENPERF_ISA
}  // namespace genperf
