#include "../common/isa.h"
#include "mixture_logistic_nll.h"

namespace genperf {

GENPERF_ISA_TABLE(mixture_logistic_forward, MixtureLogisticNllArgs);
GENPERF_ISA_TABLE(mixture_logistic_backward, MixtureLogisticNllArgs);

void mixture_logistic_nll_forward_cpu(const MixtureLogisticNllArgs& args) {
  mixture_logistic_forward_isas(args);
}
void mixture_logistic_nll_backward_cpu(const MixtureLogisticNllArgs& args) {
  mixture_logistic_backward_isas(args);
}

}  // namespace genperf
