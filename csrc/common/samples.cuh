// Tensors as CUDA kernels see them: samples of `elements` elements each, cut into slices of work.
//
// An operand is read through one of two access policies. Vectors<T>: samples are contiguous and
// aligned, a thread moves four elements at a time. Strided: any layout and dtype, one at a time.
// How a sample is cut depends on `elements` and the policy alone, so that a sum has the same bits in
// every batch and on every device.
#pragma once

#include "convert.h"
#include "cuda.h"
#include "philox.h"
#include "view.h"

namespace genperf {

struct Operand {
  void* data = nullptr;  // null: absent
  DType dtype = DType::kFloat32;
  int64_t sample_stride = 0;
  int64_t stride[kMaxDims] = {};  // within a sample, innermost first

  GENPERF_HD explicit operator bool() const { return data != nullptr; }
};

// The operands of a kernel, with the shape that they share.
template <int kCount>
struct Samples {
  int64_t samples = 1, elements = 1;
  int ndim = 0;  // within a sample, merged where every operand allows it, innermost first
  int64_t shape[kMaxDims] = {};
  Operand operand[kCount];

  GENPERF_HD const Operand& operator[](int k) const { return operand[k]; }

  Samples() = default;
  // Views of shape [B, *], that of `whole`, or [B], which stands for one value a sample.
  // `by_sample` false lets contiguous samples become one.
  Samples(const View& whole, const View* const (&views)[kCount], bool by_sample) {
    if (whole.ndim > 0) samples = whole.shape[0];
    for (int k = 0; k < kCount; ++k) {
      if (!*views[k]) continue;
      operand[k].data = views[k]->data;
      operand[k].dtype = views[k]->dtype;
      operand[k].sample_stride = views[k]->ndim > 0 ? views[k]->stride[0] : 0;
    }
    for (int d = whole.ndim - 1; d > 0; --d) add_outer(whole, views, d);
    if (ndim == 0) {  // one element a sample
      ndim = 1;
      shape[0] = 1;
      for (Operand& o : operand) o.stride[0] = 1;
    }
    bool one_run = !by_sample && ndim == 1;
    for (const Operand& o : operand) {
      one_run = one_run && (!o || (o.stride[0] == 1 && o.sample_stride == elements));
    }
    if (one_run) {
      elements = shape[0] = elements * samples;
      samples = 1;
    }
  }

  // Whether Vectors can read operand k: runs of a multiple of four elements, on 16-byte boundaries.
  bool vectorizable(int k) const {
    const Operand& o = operand[k];
    return !o || (ndim == 1 && o.stride[0] == 1 && elements % 4 == 0 && o.sample_stride % 4 == 0 &&
                  reinterpret_cast<uintptr_t>(o.data) % 16 == 0);
  }

 private:
  void add_outer(const View& whole, const View* const (&views)[kCount], int d) {
    if (whole.shape[d] == 1) return;
    elements *= whole.shape[d];
    auto stride = [&](int k) { return views[k]->ndim == whole.ndim ? views[k]->stride[d] : 0; };
    bool merge = ndim > 0;
    for (int k = 0; merge && k < kCount; ++k) {
      if (operand[k]) merge = stride(k) == operand[k].stride[ndim - 1] * shape[ndim - 1];
    }
    if (merge) {
      shape[ndim - 1] *= whole.shape[d];
      return;
    }
    shape[ndim] = whole.shape[d];
    for (int k = 0; k < kCount; ++k) {
      if (operand[k]) operand[k].stride[ndim] = stride(k);
    }
    ++ndim;
  }
};

// Each access policy has a Position<kCount>, made once an element group from (Samples, sample, index),
// and loads and stores kWidth elements there. load_float, store_float: operands that are always float32.
//
// `T`: float, or uint16_t for either half type; 16 or 8 bytes an access.
template <class T>
struct Vectors {
  static constexpr int kWidth = 4;

  template <int kCount>
  struct Position {
    int64_t sample, index;
    __device__ __forceinline__ Position(const Samples<kCount>&, int64_t sample, int64_t index)
        : sample(sample), index(index) {}
    __device__ __forceinline__ int64_t offset(const Samples<kCount>& s, int k) const {
      return sample * s[k].sample_stride + index;
    }
  };

  template <int kCount>
  static __device__ __forceinline__ void load(const Samples<kCount>& s, int k, const Position<kCount>& at,
                                              float (&x)[4]) {
    if constexpr (std::is_same_v<T, float>) {
      load_float(s, k, at, x);
    } else {
      uint2 v = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(s[k].data) + at.offset(s, k));
      const uint16_t h[4] = {static_cast<uint16_t>(v.x), static_cast<uint16_t>(v.x >> 16),
                             static_cast<uint16_t>(v.y), static_cast<uint16_t>(v.y >> 16)};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x[j] = s[k].dtype == DType::kFloat16 ? float_from_float16(h[j]) : float_from_bfloat16(h[j]);
      }
    }
  }

  template <int kCount>
  static __device__ __forceinline__ void store(const Samples<kCount>& s, int k, const Position<kCount>& at,
                                               const float (&x)[4]) {
    if constexpr (std::is_same_v<T, float>) {
      store_float(s, k, at, x);
    } else {
      uint32_t h[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        h[j] = s[k].dtype == DType::kFloat16 ? float16_from_float(x[j]) : bfloat16_from_float(x[j]);
      }
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(s[k].data) + at.offset(s, k)) =
          make_uint2(h[0] | h[1] << 16, h[2] | h[3] << 16);
    }
  }

  template <int kCount>
  static __device__ __forceinline__ void load_float(const Samples<kCount>& s, int k, const Position<kCount>& at,
                                                    float (&x)[4]) {
    float4 v = *reinterpret_cast<const float4*>(static_cast<const float*>(s[k].data) + at.offset(s, k));
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  }

  template <int kCount>
  static __device__ __forceinline__ void store_float(const Samples<kCount>& s, int k, const Position<kCount>& at,
                                                     const float (&x)[4]) {
    *reinterpret_cast<float4*>(static_cast<float*>(s[k].data) + at.offset(s, k)) =
        make_float4(x[0], x[1], x[2], x[3]);
  }
};

struct Strided {
  static constexpr int kWidth = 1;

  template <int kCount>
  struct Position {
    int64_t offsets[kCount];

    __device__ __forceinline__ Position(const Samples<kCount>& s, int64_t sample, int64_t index) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) offsets[k] = sample * s[k].sample_stride;
#pragma unroll 1
      for (int d = 0; d < s.ndim; ++d) {
        const int64_t size = s.shape[d];
        const int64_t quotient = (index | size) >> 32 == 0
                                     ? static_cast<uint32_t>(index) / static_cast<uint32_t>(size)
                                     : index / size;
        const int64_t coordinate = index - quotient * size;
#pragma unroll
        for (int k = 0; k < kCount; ++k) offsets[k] += coordinate * s[k].stride[d];
        index = quotient;
      }
    }
    __device__ __forceinline__ int64_t offset(const Samples<kCount>&, int k) const { return offsets[k]; }
  };

  template <int kCount>
  static __device__ __forceinline__ void load(const Samples<kCount>& s, int k, const Position<kCount>& at,
                                              float (&x)[1]) {
    if (s[k].dtype == DType::kFloat32) return load_float(s, k, at, x);
    const uint16_t h = static_cast<const uint16_t*>(s[k].data)[at.offset(s, k)];
    x[0] = s[k].dtype == DType::kFloat16 ? float_from_float16(h) : float_from_bfloat16(h);
  }

  template <int kCount>
  static __device__ __forceinline__ void store(const Samples<kCount>& s, int k, const Position<kCount>& at,
                                               const float (&x)[1]) {
    if (s[k].dtype == DType::kFloat32) return store_float(s, k, at, x);
    static_cast<uint16_t*>(s[k].data)[at.offset(s, k)] =
        s[k].dtype == DType::kFloat16 ? float16_from_float(x[0]) : bfloat16_from_float(x[0]);
  }

  template <int kCount>
  static __device__ __forceinline__ void load_float(const Samples<kCount>& s, int k, const Position<kCount>& at,
                                                    float (&x)[1]) {
    x[0] = static_cast<const float*>(s[k].data)[at.offset(s, k)];
  }

  template <int kCount>
  static __device__ __forceinline__ void store_float(const Samples<kCount>& s, int k, const Position<kCount>& at,
                                                     const float (&x)[1]) {
    static_cast<float*>(s[k].data)[at.offset(s, k)] = x[0];
  }
};

inline constexpr int kBlockTeam = 256;

// Who works on what: a team of threads (a power of two of lanes, up to a warp; or a whole block) takes
// one slice of one sample.
struct Teams {
  int64_t samples = 0, elements = 0, slices = 1, slice = 0;  // slices a sample, elements a slice
  int team = 1, block = 1;  // threads

  Teams() = default;
  // `most`: elements of a slice at most.
  Teams(int64_t samples, int64_t elements, int width, int64_t most) : samples(samples), elements(elements) {
    slices = elements > most ? (elements + most - 1) / most : 1;
    int64_t even = (elements + slices - 1) / slices;
    slice = slices == 1 ? elements : (even + 127) / 128 * 128;
    team = kBlockTeam;
    block = kBlockTeam;
    if (elements <= 4 * 32 * width) {
      for (team = 1; team < 32 && team * width < elements;) team *= 2;
      block = 128;
    }
  }

  dim3 grid() const {
    const int64_t per_block = block / team;
    return dim3(static_cast<unsigned>((samples * slices + per_block - 1) / per_block));
  }
};

// The calling thread's part: elements first + k * step of `sample`, k = 0, 1, ... below `last`.
struct Part {
  int64_t sample, slice, first, last;
  int step;
  bool leads;  // writes what the team has summed

  __device__ __forceinline__ Part(const Teams& t, int width) {
    int64_t item = blockIdx.x;
    int lane = threadIdx.x;
    if (t.team < t.block) {
      item = item * (t.block / t.team) + lane / t.team;
      lane %= t.team;
    }
    sample = item;
    slice = 0;
    if (t.slices > 1) {
      sample = item / t.slices;
      slice = item - sample * t.slices;
    }
    int64_t start = slice * t.slice;
    last = sample >= t.samples ? 0 : start + t.slice < t.elements ? start + t.slice : t.elements;
    first = start + lane * width;
    step = t.team * width;
    leads = lane == 0 && sample < t.samples;
  }
};

// Sums over the threads of each team, in an order that `team` alone decides. Every thread of the
// block takes part; the sums are right in each team's first thread.
template <int kSums>
__device__ __forceinline__ void team_sum(double (&x)[kSums], int team) {
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    for (int distance = (team < 32 ? team : 32) / 2; distance > 0; distance /= 2) {
      x[k] += __shfl_xor_sync(~0u, x[k], distance);
    }
  }
  if (team <= 32) return;
  GENPERF_SHARED(double, warp_sum, kSums * (kBlockTeam / 32));
  const int warps = kBlockTeam / 32, warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) warp_sum[k * warps + warp] = x[k];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      x[k] = 0.0;
      for (int w = 0; w < warps; ++w) x[k] += warp_sum[k * warps + w];
    }
  }
}

// Philox keys on the device: int64 [2], one for all (element numbers run through the whole tensor),
// or [B, 2], one a sample (they start anew in each).
struct Keys {
  const int64_t* data = nullptr;  // null: absent
  int64_t sample_stride = 0, word_stride = 0;
  bool by_sample = false;

  Keys() = default;
  explicit Keys(const View& v) {
    if (!v) return;
    data = static_cast<const int64_t*>(v.data);
    by_sample = v.ndim == 2;
    sample_stride = by_sample ? v.stride[0] : 0;
    word_stride = v.stride[v.ndim - 1];
  }

  GENPERF_HD explicit operator bool() const { return data != nullptr; }

  __device__ __forceinline__ PhiloxKey operator[](int64_t sample) const {
    const int64_t* words = data + sample * sample_stride;
    return {static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[word_stride])};
  }
};

// Input: element number, a multiple of 4 unless one normal is asked for. Output: the normals of
// elements index .. index + kWidth - 1.
template <int kWidth>
__device__ __forceinline__ void philox_normals_at(PhiloxKey key, uint64_t index, float (&normals)[kWidth]) {
  if constexpr (kWidth == 1) {
    uint32_t words[4];
    philox_words(key, index / 4, words);
    const bool upper = index & 2;
    float even, odd;
    normals_from_bits<float>(upper ? words[2] : words[0], upper ? words[3] : words[1], even, odd);
    normals[0] = index & 1 ? odd : even;
  } else {
    philox_normals(key, index / 4, normals);
  }
}

}  // namespace genperf
