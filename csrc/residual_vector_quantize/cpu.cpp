#include "../common/isa.h"
#include "residual_vector_quantize.h"

namespace genperf {

GENPERF_ISA_TABLE(residual_quantize, ResidualQuantizeArgs);
GENPERF_ISA_TABLE(residual_backward, ResidualBackwardArgs);
GENPERF_ISA_TABLE(residual_statistics, ResidualStatisticsArgs);

void residual_vector_quantize_cpu(const ResidualQuantizeArgs& a) { residual_quantize_isas(a); }

void residual_vector_quantize_backward_cpu(const ResidualBackwardArgs& a) { residual_backward_isas(a); }

void residual_codebook_statistics_cpu(const ResidualStatisticsArgs& a) { residual_statistics_isas(a); }

}  // namespace genperf
