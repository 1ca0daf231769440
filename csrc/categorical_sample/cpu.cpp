#include "../common/isa.h"
#include "categorical_sample.h"

namespace genperf {

GENPERF_ISA_TABLE(categorical_draw, CategoricalArgs);
GENPERF_ISA_TABLE(categorical_nats, CategoricalArgs);
GENPERF_ISA_TABLE(categorical_gradient, CategoricalArgs);

void categorical_sample_cpu(const CategoricalArgs& args) { categorical_draw_isas(args); }
void categorical_log_prob_cpu(const CategoricalArgs& args) { categorical_nats_isas(args); }
void categorical_log_prob_backward_cpu(const CategoricalArgs& args) { categorical_gradient_isas(args); }

}  // namespace genperf
