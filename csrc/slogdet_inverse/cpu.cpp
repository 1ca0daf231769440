#include "../common/isa.h"
#include "slogdet_inverse.h"

namespace genperf {

GENPERF_ISA_TABLE(slogdet_inverse, SlogdetInverseArgs);

void slogdet_inverse_cpu(const SlogdetInverseArgs& args) { slogdet_inverse_isas(args); }

}  // namespace genperf
