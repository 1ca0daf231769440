// CPU kernels, built once per instruction set (GENPERF_ISA).
#include "codebook_statistics.h"
#include "segments.h"

namespace genperf {
namespace GENPERF_ISA {

void codebook_statistics(const CodebookStatisticsArgs& a) {
  const int64_t heads = a.sums.shape[0], codewords = a.sums.shape[1], dim = a.sums.shape[2];
  const int64_t all = a.indices.numel(), n = heads == 0 ? 0 : all / heads, size = codewords * dim;
  float *const counts = static_cast<float*>(a.counts.data), *const sums = static_cast<float*>(a.sums.data);
  Scratch<int32_t> codes(all);
  const int64_t bad = read_codes(a.indices, codewords, codes.get());
  if (bad != -1) throw_bad_index(bad, codewords);
  const Segments s(n, codewords, dim, heads);
  Scratch<float> others(heads * (s.parts - 1) * size);  // sums of all parts but the first
  Scratch<int32_t> numbers(heads * s.parts * codewords);
  const int64_t units = heads * s.parts * s.slices;
  [[maybe_unused]] const bool large = all * dim > 1 << 16;
#pragma omp parallel if (large)
  {
#pragma omp for schedule(dynamic)
    for (int64_t u = 0; u < units; ++u) {
      const int64_t slice = u % s.slices, part = u / s.slices % s.parts, head = u / s.slices / s.parts;
      float* here = part == 0 ? sums + head * size : others.get() + (head * (s.parts - 1) + part - 1) * size;
      s.add(select_first(a.x, head), codes.get() + head * n, part, slice, here,
            numbers.get() + (head * s.parts + part) * codewords);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < heads * codewords; ++i) {
      const int64_t head = i / codewords, k = i % codewords;
      int64_t count = 0;
      for (int64_t p = 0; p < s.parts; ++p) {
        count += numbers[(head * s.parts + p) * codewords + k];
        if (p > 0)
          accumulate(others.get() + (head * (s.parts - 1) + p - 1) * size + k * dim, dim, sums + i * dim);
      }
      counts[i] = static_cast<float>(count);
    }
  }
}

}  // namespace GENPERF_ISA
}  // namespace genperf
