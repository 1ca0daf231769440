"""Sampling of causal convolutional models pixel by pixel, faster by what is computed only once.

:func:`compile` records an unmodified model (masked-convolution PixelCNN, Gated PixelCNN, PixelCNN++,
PixelSNAIL, WaveNet and what is like them), proves that it is causal and plans its sampling; the
:class:`Sampler` that it returns draws images.
"""

from __future__ import annotations

from genperf.sampling import heads
from genperf.sampling._compile import compile
from genperf.sampling._errors import CaptureError, CausalityError
from genperf.sampling._feedback import Feedback, Scaled
from genperf.sampling._sampler import Sampler
from genperf.sampling.heads import Bernoulli, Callback, Categorical, Gaussian, LogisticMixture

__all__ = [
    "Bernoulli",
    "Callback",
    "CaptureError",
    "Categorical",
    "CausalityError",
    "Feedback",
    "Gaussian",
    "LogisticMixture",
    "Sampler",
    "Scaled",
    "compile",
    "heads",
]
