"""Modules and distribution objects over :mod:`genperf.ops`: parameters and state, no mathematics."""

from genperf.nn.diagonal_gaussian import DiagonalGaussian

__all__ = ["DiagonalGaussian"]
