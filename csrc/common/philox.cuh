// Philox keys that lie in device memory, and the normals of a thread's elements.
#pragma once

#include "cuda.h"
#include "philox.h"
#include "view.h"

namespace genperf {

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
