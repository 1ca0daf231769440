// The standard normals of torch's CPU generator, bit for bit as torch.randn fills a contiguous float32
// tensor of 16 elements or more on a processor with AVX2 (torch 2.6 to 2.13; the caller compares).
//
// out:   [n] float32, n >= 16
// state: int64 [632], the bytes of torch.Generator.get_state(); left as torch would leave them
//
// Words: MT19937 (M. Matsumoto, T. Nishimura, "Mersenne Twister", ACM TOMACS 8, 1998). A uniform is the
// low 24 bits of a word times 2^-24. Every 16 of them become 16 normals by Box-Muller: lane j and lane
// j + 8 give radius and angle, and take radius cos(angle) and radius sin(angle). Where n is no multiple of
// 16, the last 16 elements are made anew from the next 16 words.
#pragma once

#include "../common/view.h"

namespace genperf {

struct TorchNormalArgs {
  View out, state;
};

void torch_normal_cpu(const TorchNormalArgs& args);

}  // namespace genperf
