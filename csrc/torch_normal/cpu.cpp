#include "../common/isa.h"
#include "torch_normal.h"

namespace genperf {

GENPERF_ISA_TABLE(torch_normal, TorchNormalArgs);

void torch_normal_cpu(const TorchNormalArgs& args) { torch_normal_isas(args); }

}  // namespace genperf
