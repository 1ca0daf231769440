#include "../common/isa.h"
#include "invertible_conv1x1.h"
#include "plu.h"

namespace genperf {

GENPERF_ISA_TABLE(invertible_forward, InvertibleConv1x1Args);
GENPERF_ISA_TABLE(invertible_backward, InvertibleConv1x1Args);
GENPERF_ISA_TABLE(plu_matrix, PluArgs);
GENPERF_ISA_TABLE(plu_matrix_backward, PluArgs);

void invertible_conv1x1_forward_cpu(const InvertibleConv1x1Args& args) { invertible_forward_isas(args); }
void invertible_conv1x1_backward_cpu(const InvertibleConv1x1Args& args) { invertible_backward_isas(args); }
void plu_matrix_cpu(const PluArgs& args) { plu_matrix_isas(args); }
void plu_matrix_backward_cpu(const PluArgs& args) { plu_matrix_backward_isas(args); }

}  // namespace genperf
