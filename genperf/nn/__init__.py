"""Modules and distribution objects over :mod:`genperf.ops`: parameters and state, no mathematics."""

from genperf.nn.diagonal_gaussian import DiagonalGaussian
from genperf.nn.gumbel_quantize import GumbelQuantize
from genperf.nn.masked_conv import MaskedConv2d
from genperf.nn.vector_quantize import GroupedResidualVQ, ResidualVQ, ShardedCodebook, VectorQuantize

__all__ = [
    "DiagonalGaussian",
    "GroupedResidualVQ",
    "GumbelQuantize",
    "MaskedConv2d",
    "ResidualVQ",
    "ShardedCodebook",
    "VectorQuantize",
]
