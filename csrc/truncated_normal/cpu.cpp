#include "../common/isa.h"
#include "truncated_normal.h"

namespace genperf {

GENPERF_ISA_TABLE(truncated_normal, TruncatedNormalArgs);

void truncated_normal_cpu(const TruncatedNormalArgs& args) { truncated_normal_isas(args); }

}  // namespace genperf
