// Samples of the mixture of logistics of PixelCNN++: a mixture for each position, then the image channels,
// each clamped to [-1, 1] before the next takes its share.
//
// Layout: params [B, P, *] as for mixture_logistic_nll, any strides; out [B, C, *] of its dtype. Uniforms are
// float32: of_values [B, C, *], any strides; of_mixture [B, 1, *], from which the mixture is found by the
// inverse of the cumulative distribution as pixel_sampler/head.h has it, or [B, K, *], K > 1, where it is the
// largest logit / temperature + Gumbel noise. Or the key, int64 [2] or [B, 2], makes uniforms [B, *, 1 + C].
//
// Numerics: float32, the bits of pixel_sampler/head.h. NaN where there is nothing to choose from.
#pragma once

#include "../common/view.h"

namespace genperf {

struct MixtureLogisticSampleArgs {
  View params, of_mixture, of_values, key, out;
  int64_t mixtures;
  bool logits, unit;  // unit: values in [0, 1]
  float min_log_scale;
  float temperature, heat;  // of the logits; what multiplies the scales
};

void mixture_logistic_sample_cpu(const MixtureLogisticSampleArgs& args);

}  // namespace genperf
