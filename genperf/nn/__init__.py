"""Modules and distribution objects over :mod:`genperf.ops`: parameters and state, no mathematics."""

from genperf.nn.categorical import Categorical
from genperf.nn.diagonal_gaussian import DiagonalGaussian
from genperf.nn.element_heads import Bernoulli, Gaussian
from genperf.nn.flows import (
    ActNorm,
    AffineCoupling,
    Glow,
    GlowStep,
    InvertibleConv1x1,
    ReversibleSequence,
    Split,
    Squeeze,
    Unsqueeze,
)
from genperf.nn.gumbel_quantize import GumbelQuantize
from genperf.nn.masked_conv import MaskedConv2d
from genperf.nn.mixture_logistic import DiscretizedLogistic, MixtureLogistic
from genperf.nn.truncated_normal import TruncatedNormal, trunc_normal_
from genperf.nn.vector_quantize import GroupedResidualVQ, ResidualVQ, ShardedCodebook, VectorQuantize

__all__ = [
    "ActNorm",
    "AffineCoupling",
    "Bernoulli",
    "Categorical",
    "DiagonalGaussian",
    "DiscretizedLogistic",
    "Gaussian",
    "Glow",
    "GlowStep",
    "GroupedResidualVQ",
    "GumbelQuantize",
    "InvertibleConv1x1",
    "MaskedConv2d",
    "MixtureLogistic",
    "ResidualVQ",
    "ReversibleSequence",
    "ShardedCodebook",
    "Split",
    "Squeeze",
    "TruncatedNormal",
    "Unsqueeze",
    "VectorQuantize",
    "trunc_normal_",
]
