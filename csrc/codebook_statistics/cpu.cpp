#include <stdexcept>
#include <string>

#include "../common/isa.h"
#include "codebook_statistics.h"

namespace genperf {

GENPERF_ISA_TABLE(codebook_statistics, CodebookStatisticsArgs);

void codebook_statistics_cpu(const CodebookStatisticsArgs& args) { codebook_statistics_isas(args); }

void throw_bad_index(int64_t index, int64_t codewords) {
  throw std::invalid_argument("indices contains " + std::to_string(index) + ", expected -1 to " +
                              std::to_string(codewords - 1));
}

}  // namespace genperf
