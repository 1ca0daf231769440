// CPU kernels, built once per instruction set (GENPERF_ISA).
#include "backward.h"
#include "forward.h"
#include "statistics.h"

namespace genperf {
namespace GENPERF_ISA {

void residual_quantize(const ResidualQuantizeArgs& a) { residual::quantize(a); }

void residual_backward(const ResidualBackwardArgs& a) { residual::backward(a); }

void residual_statistics(const ResidualStatisticsArgs& a) { residual::statistics(a); }

}  // namespace GENPERF_ISA
}  // namespace genperf
