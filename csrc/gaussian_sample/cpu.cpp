#include "../common/isa.h"
#include "gaussian_sample.h"

namespace genperf {

GENPERF_ISA_TABLE(gaussian_sample_forward, GaussianArgs);
GENPERF_ISA_TABLE(gaussian_sample_backward, GaussianArgs);

void gaussian_sample_forward_cpu(const GaussianArgs& args) { gaussian_sample_forward_isas(args); }
void gaussian_sample_backward_cpu(const GaussianArgs& args) { gaussian_sample_backward_isas(args); }

}  // namespace genperf
