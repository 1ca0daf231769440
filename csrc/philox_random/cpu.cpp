#include "../common/isa.h"
#include "philox_random.h"

namespace genperf {

GENPERF_ISA_TABLE(philox_random, PhiloxArgs);

void philox_random_cpu(const PhiloxArgs& args) { philox_random_isas(args); }

}  // namespace genperf
