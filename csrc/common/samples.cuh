// Tensors as CUDA kernels see them: samples of `elements` elements each.
//
// An operand is read through one of two access policies. Vectors<T>: samples are contiguous and
// aligned, a thread moves four elements at a time. Strided: any layout and dtype, one at a time.
#pragma once

#include <type_traits>

#include "convert.h"
#include "cuda.h"
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
  static __device__ __forceinline__ void load_float(const Samples<kCount>& s, int k,
                                                    const Position<kCount>& at, float (&x)[4]) {
    float4 v = *reinterpret_cast<const float4*>(static_cast<const float*>(s[k].data) + at.offset(s, k));
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  }

  template <int kCount>
  static __device__ __forceinline__ void store_float(const Samples<kCount>& s, int k,
                                                     const Position<kCount>& at, const float (&x)[4]) {
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
  static __device__ __forceinline__ void load_float(const Samples<kCount>& s, int k,
                                                    const Position<kCount>& at, float (&x)[1]) {
    x[0] = static_cast<const float*>(s[k].data)[at.offset(s, k)];
  }

  template <int kCount>
  static __device__ __forceinline__ void store_float(const Samples<kCount>& s, int k,
                                                     const Position<kCount>& at, const float (&x)[1]) {
    static_cast<float*>(s[k].data)[at.offset(s, k)] = x[0];
  }
};

}  // namespace genperf
