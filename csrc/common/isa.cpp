#include "isa.h"

#include <atomic>

namespace genperf {

bool has_isa(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && has_isa(Isa::avx2);
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Isa::baseline:
      break;
  }
#endif
  return isa == Isa::baseline;
}

static std::atomic<Isa>& chosen_isa() {
  static std::atomic<Isa> isa{has_isa(Isa::avx512) ? Isa::avx512
                              : has_isa(Isa::avx2) ? Isa::avx2
                                                   : Isa::baseline};
  return isa;
}

Isa current_isa() { return chosen_isa().load(std::memory_order_relaxed); }
void set_isa(Isa isa) { chosen_isa().store(isa, std::memory_order_relaxed); }

}  // namespace genperf
