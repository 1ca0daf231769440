// CPU kernels, built once per instruction set (GENPERF_ISA).
#include "codebook_statistics.h"
#include "codes.h"
#include "segments.h"

namespace genperf {
namespace GENPERF_ISA {

void codebook_statistics(const CodebookStatisticsArgs& a) {
  const int64_t heads = a.sums.shape[0], codewords = a.sums.shape[1], dim = a.sums.shape[2];
  if (heads == 0) return;
  const int64_t all = a.indices.numel();
  Scratch<int32_t> codes(all);
  read_codes(a.indices, codewords, codes.get());
  Segments segments(heads, all / heads, codewords, dim);
  segments.sum(a.x, codes.get(), AsTheyAre{}, static_cast<float*>(a.sums.data),
               static_cast<float*>(a.counts.data));
}

}  // namespace GENPERF_ISA
}  // namespace genperf
