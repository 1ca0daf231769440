#include "../common/isa.h"
#include "element_nll.h"

namespace genperf {

GENPERF_ISA_TABLE(element_nll, ElementNllArgs);

void element_nll_cpu(const ElementNllArgs& args) { element_nll_isas(args); }

}  // namespace genperf
