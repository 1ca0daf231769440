#include "../common/isa.h"
#include "mixture_logistic_sample.h"

namespace genperf {

GENPERF_ISA_TABLE(mixture_logistic_draw, MixtureLogisticSampleArgs);

void mixture_logistic_sample_cpu(const MixtureLogisticSampleArgs& args) { mixture_logistic_draw_isas(args); }

}  // namespace genperf
