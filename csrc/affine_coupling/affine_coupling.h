// The affine coupling of a normalizing flow: one part of the channels is shifted and scaled.
//
//   out = (in + sign t) s^e  (pre)  or  in s^e + sign t,  e = -1 (reciprocal) or 1;  s = s(u)
//   logdet = e sum log s
//   backward, from the output y and (t, u), with g = dL/dy and l = dL/dlogdet:
//     dL/dx = g s^e;  dL/dt = sign dL/dx (pre) or sign g
//     dL/du = e (g p + l) (log s)'(u),  p = y (pre) or y - sign t
//
// Layout: x [B, C, *] of which channels [start, start + n) are transformed and the others copied; h [B, 2 n,
// *] holds t and u, in halves or interleaved ([B, n, *] of t where additive). Each tensor has strides and a
// type of its own. h_scale float32 [2 n] multiplies the channels of h, then `prefactor` all of it. mask [B,
// *] float32: where it is 0 the output is 0, and nothing counts.
//
// Numerics: float32 arithmetic for every input type. log s is finite wherever u is (kSigmoid with eps = 0).
// Sums run in a fixed order (chunks of a sample, partial sums in double): the same bits for any number of
// threads, and for a sample's results in any batch.
#pragma once

#include <cstdint>

#include "../common/view.h"

namespace genperf {

enum class CouplingScale : int { kSigmoid, kExp, kTanh, kSoftplus, kAdditive };

struct CouplingArgs {
  View x, h, h_scale, mask;  // x: the input; backward: the output, or the input unless `from_output`
  View y, logdet;            // forward: outputs; y may be x
  View grad_y, grad_logdet;  // backward: inputs
  // backward: outputs; grad_x may be grad_y, and `rebuilt`, the input made from the output, may be x or
  // absent
  View grad_x, grad_h, grad_h_scale, rebuilt;
  CouplingScale scale;
  bool pre;
  float sign;
  bool reciprocal;
  float prefactor, offset, eps, clamp, slope;
  bool interleaved, shift_first;
  int64_t start, n;
  bool from_output;
};

void affine_coupling_forward_cpu(const CouplingArgs& args);
void affine_coupling_backward_cpu(const CouplingArgs& args);

}  // namespace genperf
