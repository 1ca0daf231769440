#include "../common/isa.h"
#include "bernoulli_sample.h"

namespace genperf {

GENPERF_ISA_TABLE(bernoulli_sample, BernoulliSampleArgs);

void bernoulli_sample_cpu(const BernoulliSampleArgs& args) { bernoulli_sample_isas(args); }

}  // namespace genperf
