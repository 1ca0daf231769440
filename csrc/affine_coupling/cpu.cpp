#include "../common/isa.h"
#include "affine_coupling.h"

namespace genperf {

GENPERF_ISA_TABLE(affine_coupling_forward, CouplingArgs);
GENPERF_ISA_TABLE(affine_coupling_backward, CouplingArgs);

void affine_coupling_forward_cpu(const CouplingArgs& args) { affine_coupling_forward_isas(args); }
void affine_coupling_backward_cpu(const CouplingArgs& args) { affine_coupling_backward_isas(args); }

}  // namespace genperf
