#include "../common/isa.h"
#include "gumbel_softmax.h"

namespace genperf {

GENPERF_ISA_TABLE(gumbel_softmax_forward, GumbelSoftmaxArgs);
GENPERF_ISA_TABLE(gumbel_softmax_backward, GumbelSoftmaxArgs);

void gumbel_softmax_forward_cpu(const GumbelSoftmaxArgs& args) { gumbel_softmax_forward_isas(args); }
void gumbel_softmax_backward_cpu(const GumbelSoftmaxArgs& args) { gumbel_softmax_backward_isas(args); }

}  // namespace genperf
