// Philox words, uniforms or normals into a contiguous array; common/philox.h has the definition.
//
// out: [*] float32 (normal, uniform) or int64 (bits: one 32-bit word an element). key: int64 [2]
// numbers the elements through the whole array, int64 [B, 2] within each of the B samples of `out`.
#pragma once

#include "../common/view.h"

namespace genperf {

enum class RandomKind : int { kNormal, kUniform, kBits };

struct PhiloxArgs {
  View out, key;
  RandomKind kind;
};

void philox_random_cpu(const PhiloxArgs& args);

// Returns a cudaError_t, 0 for success.
int philox_random_cuda(const PhiloxArgs& args, void* stream);

}  // namespace genperf
