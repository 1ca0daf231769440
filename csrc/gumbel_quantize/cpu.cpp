#include "../common/isa.h"
#include "gumbel_quantize.h"

namespace genperf {

GENPERF_ISA_TABLE(gumbel_forward, GumbelQuantizeArgs);
GENPERF_ISA_TABLE(gumbel_backward, GumbelQuantizeArgs);

void gumbel_quantize_forward_cpu(const GumbelQuantizeArgs& args) { gumbel_forward_isas(args); }
void gumbel_quantize_backward_cpu(const GumbelQuantizeArgs& args) { gumbel_backward_isas(args); }

}  // namespace genperf
