"""Flows as modules: the steps of Glow, sequences of steps that train in constant memory, and the whole model.

A step maps data to noise: ``step(x, **conditions) -> (z, logdet)`` and ``step.inverse(z, **conditions) -> (x,
logdet)``, each with the log-determinant [B] of its own direction.
"""

from genperf.nn.flows._reversible import Reversed
from genperf.nn.flows.actnorm import ActNorm
from genperf.nn.flows.capture import Captured
from genperf.nn.flows.conv1x1 import InvertibleConv1x1
from genperf.nn.flows.coupling import AffineCoupling
from genperf.nn.flows.glow import Glow, dequantize
from genperf.nn.flows.nets import CouplingNet, ZeroConv2d
from genperf.nn.flows.sequence import ReversibleSequence
from genperf.nn.flows.squeeze import Split, Squeeze, Unsqueeze
from genperf.nn.flows.step import GlowStep

__all__ = [
    "ActNorm",
    "AffineCoupling",
    "Captured",
    "CouplingNet",
    "Glow",
    "GlowStep",
    "InvertibleConv1x1",
    "Reversed",
    "ReversibleSequence",
    "Split",
    "Squeeze",
    "Unsqueeze",
    "ZeroConv2d",
    "dequantize",
]
