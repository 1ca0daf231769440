"""Modules and distribution objects over :mod:`genperf.ops`: parameters and state, no mathematics."""

from genperf.nn.diagonal_gaussian import DiagonalGaussian
from genperf.nn.masked_conv import MaskedConv2d

__all__ = ["DiagonalGaussian", "MaskedConv2d"]
