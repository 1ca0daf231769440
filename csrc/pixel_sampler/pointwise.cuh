// Pointwise steps, embeddings and attention of the persistent kernel.
#pragma once

#include "pointwise.h"
#include "step.cuh"

namespace genperf::pixel {

template <int kWidth>
__device__ __forceinline__ void load_channels(const float* from, int64_t stride, float (&x)[kWidth]) {
  if constexpr (kWidth == 4) {
    const float4 v = from ? *reinterpret_cast<const float4*>(from) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else {
    x[0] = from ? *from : 0.0f;
  }
}

template <int kWidth>
__device__ __forceinline__ void store_channels(float* to, const float (&x)[kWidth]) {
  if constexpr (kWidth == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
  } else {
    *to = x[0];
  }
}

// Elements are numbered by cell and channel; a member does all, or every size-th part of a shared step.
template <int kWidth>
__device__ __forceinline__ void run_pointwise(const Context& c, const Step& s, const Entry& e) {
  const int parts = s.channels / kWidth, total = e.cols * c.images * parts;
  const bool binary = is_binary(static_cast<Op>(s.op));
  const int first = e.shared ? c.rank * kThreads : 0, step = e.shared ? c.size * kThreads : kThreads;
  for (int item = first + static_cast<int>(threadIdx.x); item < total; item += step) {
    const int cell = item / parts, channel = (item - cell * parts) * kWidth;
    const int column = cell / c.images, b = cell - column * c.images, x = e.col + column;
    const float* from_a = source_at(c, s.a, e.row, x, b);
    const float* from_b = binary ? source_at(c, s.b, e.row, x, b) : nullptr;
    float va[kWidth], vb[kWidth];
    load_channels<kWidth>(from_a ? from_a + int64_t{channel} * s.a.stride_c : nullptr, s.a.stride_c, va);
    load_channels<kWidth>(from_b ? from_b + int64_t{channel} * s.b.stride_c : nullptr, s.b.stride_c, vb);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) va[i] = pointwise(static_cast<Op>(s.op), va[i], vb[i], s.p, s.q);
    store_channels<kWidth>(cell_at(c, s.out, e.row, x, b) + channel, va);
  }
}

template <int kWidth>
__device__ __forceinline__ void run_embed(const Context& c, const Step& s, const Entry& e) {
  const Head& head = c.args.head;
  const int parts = s.channels / kWidth, total = e.cols * c.images * parts;
  const int first = e.shared ? c.rank * kThreads : 0, step = e.shared ? c.size * kThreads : kThreads;
  for (int item = first + static_cast<int>(threadIdx.x); item < total; item += step) {
    const int cell = item / parts, channel = (item - cell * parts) * kWidth;
    const int column = cell / c.images, b = cell - column * c.images, x = e.col + column;
    const float* from = s.op ? source_at(c, s.a, e.row, x, b) : nullptr;
    float sum[kWidth];
    load_channels<kWidth>(from ? from + int64_t{channel} * s.a.stride_c : nullptr, s.a.stride_c, sum);
    const float* table = reinterpret_cast<const float*>(s.table) + channel;
    for (int t = 0; t < s.taps; ++t, table += int64_t{s.den} * s.channels) {
      const int2 tap = c.taps[s.tap_begin + t];
      const int y = e.row + tap.x, source_x = x + tap.y;
      if (y < 0 || y >= head.rows || source_x < 0 || source_x >= head.cols) continue;
      const float value = c.args.values[pixel_of(c, y, source_x, b) * head.values + s.num];
      // Of a value that is no class, or NaN: a row that exists.
      const bool valid = value >= 0.0f && value < static_cast<float>(s.den);
      float row[kWidth];
      load_channels<kWidth>(table + (valid ? static_cast<int64_t>(value) : 0) * s.channels, 1, row);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[i] += row[i];
    }
    store_channels<kWidth>(cell_at(c, s.out, e.row, x, b) + channel, sum);
  }
}

// The maximum over the block's threads, in all of them.
__device__ __forceinline__ float block_maximum(const Context& c, float x) {
  for (int half = 16; half > 0; half /= 2) {
    const float other = __shfl_xor_sync(~0u, x, half);
    x = x > other ? x : other;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) c.partials[threadIdx.x / 32] = x;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) x = x > c.partials[w] ? x : c.partials[w];
  return x;
}

// One head of one cell of one image; see attention.h for the order of the sums. Shared memory: a weight a
// key, and a sum a block of keys for each channel and for the weights.
__device__ __forceinline__ void attend(const Context& c, const Step& s, const Entry& e, int x, int b,
                                       int head, int keys) {
  const int dim_k = s.channels_in, dim_v = s.op, blocks = (keys + kBlock - 1) / kBlock;
  float* weights = c.sources;
  float* sums = c.sources + keys;                   // [blocks, dim_v + 1]
  const float* q = source_at(c, s.a, e.row, x, b);  // null: 0
  if (q) q += head * dim_k;
  __syncthreads();
  float largest = -kInfinity;
  for (int j = threadIdx.x; j < keys; j += kThreads) {
    const float* k = cell_at(c, s.b, j / s.den + s.b.dy, j % s.den + s.b.dx, b) + head * dim_k;
    float total = 0.0f;
    for (int block = 0; block < dim_k; block += kBlock) {
      float sum = 0.0f;
      for (int i = block; i < dim_k && i < block + kBlock; ++i) sum = __fmaf_rn(q ? q[i] : 0.0f, k[i], sum);
      total = block == 0 ? sum : total + sum;
    }
    weights[j] = total * s.p;
    largest = weights[j] > largest ? weights[j] : largest;
  }
  largest = block_maximum(c, largest);
  for (int j = threadIdx.x; j < keys; j += kThreads) weights[j] = exp(weights[j] - largest);
  __syncthreads();
  for (int item = threadIdx.x; item < blocks * (dim_v + 1); item += kThreads) {
    const int block = item / (dim_v + 1), i = item - block * (dim_v + 1);
    const int end = (block + 1) * kBlock < keys ? (block + 1) * kBlock : keys;
    float sum = 0.0f;
    for (int j = block * kBlock; j < end; ++j) {
      if (i == dim_v) {
        sum += weights[j];
      } else {
        const float* v = cell_at(c, s.c, j / s.den + s.c.dy, j % s.den + s.c.dx, b) + head * dim_v;
        sum = __fmaf_rn(weights[j], v[i], sum);
      }
    }
    sums[item] = sum;
  }
  __syncthreads();
  float* out = cell_at(c, s.out, e.row, x, b) + head * dim_v;
  for (int i = threadIdx.x; i < dim_v; i += kThreads) {
    float total = sums[i], weight = sums[dim_v];
    for (int block = 1; block < blocks; ++block) {
      total += sums[block * (dim_v + 1) + i];
      weight += sums[block * (dim_v + 1) + dim_v];
    }
    out[i] = total / weight;
  }
}

// Heads of cells are shared out among the members.
__device__ __forceinline__ void run_attention(const Context& c, const Step& s, const Entry& e) {
  const int total = e.cols * c.images * s.channels;
  for (int item = c.rank; item < total; item += c.size) {
    const int cell = item / s.channels, head = item - cell * s.channels;
    const int column = cell / c.images, b = cell - column * c.images, x = e.col + column;
    const int keys = static_cast<int>(reinterpret_cast<const int64_t*>(s.table)[e.row * s.den + x]);
    if (keys > 0) {
      attend(c, s, e, x, b, head, keys);
      continue;
    }
    float* out = cell_at(c, s.out, e.row, x, b) + head * s.op;
    for (int i = threadIdx.x; i < s.op; i += kThreads) out[i] = 0.0f;
  }
}

}  // namespace genperf::pixel
