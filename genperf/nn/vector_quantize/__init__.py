"""Vector quantizers as modules: state and its updates, with the names of vector-quantize-pytorch."""

from genperf.nn.vector_quantize.residual import GroupedResidualVQ, ResidualVQ
from genperf.nn.vector_quantize.sharded import ShardedCodebook
from genperf.nn.vector_quantize.vector_quantize import LossBreakdown, VectorQuantize

__all__ = ["GroupedResidualVQ", "LossBreakdown", "ResidualVQ", "ShardedCodebook", "VectorQuantize"]
