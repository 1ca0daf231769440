// CUDA kernel: a thread makes four neighbouring numbers from each call of Philox, and stores them in
// 16-byte pieces where every sample starts on such a boundary.
#include <type_traits>

#include "../common/philox.cuh"
#include "philox_random.h"

namespace genperf {

namespace {

constexpr int kThreads = 256;
constexpr int kCallsPerThread = 4;

template <RandomKind kKind>
using Number = std::conditional_t<kKind == RandomKind::kBits, int64_t, float>;

// out: [samples, elements], contiguous. `calls` = ceil(elements / 4): Philox calls a sample.
template <RandomKind kKind>
__global__ void __launch_bounds__(kThreads)
    philox_random_kernel(Number<kKind>* out, Keys keys, int64_t samples, int64_t elements, int64_t calls,
                         bool aligned) {
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kCallsPerThread) + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kCallsPerThread; ++k) {
    const int64_t call = first + k * kThreads;
    if (call >= samples * calls) return;
    const int64_t sample = samples == 1 ? 0 : call / calls;
    const int64_t group = call - sample * calls;
    uint32_t words[4];
    philox_words(keys[sample], group, words);
    Number<kKind> x[4];
    if constexpr (kKind == RandomKind::kNormal) {
      normals_from_bits<float>(words[0], words[1], x[0], x[1]);
      normals_from_bits<float>(words[2], words[3], x[2], x[3]);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (kKind == RandomKind::kUniform) {
          x[j] = uniform_from_bits<float>(words[j]);
        } else {
          x[j] = words[j];
        }
      }
    }
    Number<kKind>* p = out + sample * elements + 4 * group;
    if (aligned) {
      struct alignas(16) Four {
        Number<kKind> x[4];
      };
      *reinterpret_cast<Four*>(p) = {x[0], x[1], x[2], x[3]};
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (4 * group + j < elements) p[j] = x[j];
      }
    }
  }
}

template <RandomKind kKind>
void launch(const PhiloxArgs& a, void* stream) {
  const int64_t samples = a.key.ndim == 2 ? a.key.shape[0] : 1;
  const int64_t elements = a.out.numel() / samples, calls = (elements + 3) / 4;
  const int64_t per_block = kThreads * kCallsPerThread;
  const bool aligned = elements % 4 == 0 && reinterpret_cast<uintptr_t>(a.out.data) % 16 == 0;
  GENPERF_LAUNCH((philox_random_kernel<kKind>),
                 static_cast<unsigned>((samples * calls + per_block - 1) / per_block), kThreads, 0, stream,
                 static_cast<Number<kKind>*>(a.out.data), Keys(a.key), samples, elements, calls, aligned);
}

}  // namespace

int philox_random_cuda(const PhiloxArgs& a, void* stream) {
  if (a.out.numel() == 0) return cudaSuccess;
  switch (a.kind) {
    case RandomKind::kNormal:
      launch<RandomKind::kNormal>(a, stream);
      break;
    case RandomKind::kUniform:
      launch<RandomKind::kUniform>(a, stream);
      break;
    case RandomKind::kBits:
      launch<RandomKind::kBits>(a, stream);
  }
  return cudaGetLastError();
}

}  // namespace genperf
