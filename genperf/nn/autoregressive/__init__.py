"""Pixel-by-pixel models in plain torch, with the parameter names and mathematics of the public ones.

Their checkpoints load (:func:`load_checkpoint`), and a model can be trained from scratch.
Each maps an image or index map to the parameters of every pixel's distribution given the pixels before it in
raster order; :mod:`genperf.sampling` samples from them, as from any other causal model.
"""

from genperf.nn.autoregressive.gated import GatedPixelCNN
from genperf.nn.autoregressive.gated_rgb import GatedPixelCNNRGB
from genperf.nn.autoregressive.masked_conv import MaskedConv2d
from genperf.nn.autoregressive.pixelcnn import PixelCNN
from genperf.nn.autoregressive.pixelcnnpp import PixelCNNPP
from genperf.nn.autoregressive.pixelsnail import PixelSNAIL
from genperf.nn.autoregressive.wavenet import WaveNet
from genperf.nn.autoregressive.weight_norm import load_checkpoint

__all__ = [
    "GatedPixelCNN",
    "GatedPixelCNNRGB",
    "MaskedConv2d",
    "PixelCNN",
    "PixelCNNPP",
    "PixelSNAIL",
    "WaveNet",
    "load_checkpoint",
]
