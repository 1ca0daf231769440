#include "../common/isa.h"
#include "vector_quantize.h"

namespace genperf {

GENPERF_ISA_TABLE(vector_quantize_forward, QuantizeArgs);
GENPERF_ISA_TABLE(vector_quantize_backward, QuantizeBackwardArgs);

void vector_quantize_forward_cpu(const QuantizeArgs& args) {
  if (!args.indices) {
    View nearest = args.chosen;
    nearest.shape[nearest.ndim] = nearest.stride[nearest.ndim] = 1;
    ++nearest.ndim;
    vq_nearest_cpu({args.x, args.codebook, nearest, {}, args.metric});
  }
  vector_quantize_forward_isas(args);
}

void vector_quantize_backward_cpu(const QuantizeBackwardArgs& args) { vector_quantize_backward_isas(args); }

}  // namespace genperf
