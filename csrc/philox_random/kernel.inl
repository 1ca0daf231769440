// CPU kernel, built once per instruction set (GENPERF_ISA).
#include "../common/philox_cpu.h"
#include "philox_random.h"

namespace genperf {
namespace GENPERF_ISA {

void philox_random(const PhiloxArgs& a) {
  const int64_t n = a.out.numel();
  const int64_t samples = a.key.ndim == 2 ? a.key.shape[0] : 1;
  const int64_t per_sample = samples == 0 ? 0 : n / samples;
  const int64_t chunks_per_sample = (per_sample + kChunk - 1) / kChunk;

#pragma omp parallel for schedule(static) if (n >= 16384)
  for (int64_t c = 0; c < samples * chunks_per_sample; ++c) {
    const int64_t sample = c / chunks_per_sample, first = (c % chunks_per_sample) * kChunk;
    const int count = static_cast<int>(per_sample - first < kChunk ? per_sample - first : kChunk);
    const int64_t start = sample * per_sample + first;
    const PhiloxKey key = philox_key(a.key, sample);
    if (a.kind == RandomKind::kBits) {
      for (int i = 0; i < count; i += 4) {
        uint32_t words[4];
        philox_words(key, (first + i) / 4, words);
        for (int j = 0; j < 4 && i + j < count; ++j)
          static_cast<int64_t*>(a.out.data)[start + i + j] = words[j];
      }
      continue;
    }
    alignas(64) PhiloxBuffer buffer;
    const float* x = a.kind == RandomKind::kNormal
                         ? philox_chunk<Distribution::kNormal>(key, first, count, buffer)
                         : philox_chunk<Distribution::kUniform>(key, first, count, buffer);
    std::memcpy(static_cast<float*>(a.out.data) + start, x, count * sizeof(float));
  }
}

}  // namespace GENPERF_ISA
}  // namespace genperf
