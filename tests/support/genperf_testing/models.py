"""Small autoregressive models with weights that hide nothing: no zero biases, no unit statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from genperf.nn import autoregressive as ar


class TinyModel(NamedTuple):
    """A model in eval mode, and how its samples go in and come out.

    ``shape`` is that of one input: (H, W), (C, H, W) or (T,). ``input`` is "index" (int64), "raw" (the
    index as a float), "unit" (index / (classes - 1)) or "real" (floats in [-1, 1]). ``head`` is
    "categorical" (logits [B, K, *shape]) or "logistic_mixture" (PixelCNN++'s parameters).
    """

    model: nn.Module
    shape: tuple[int, ...]
    input: str
    head: str


def _pixelcnn_raw() -> TinyModel:
    return TinyModel(ar.PixelCNN(5, 6, 3, 5), (1, 6, 7), "raw", "categorical")


def _pixelcnn_embedding() -> TinyModel:
    return TinyModel(ar.PixelCNN(7, 6, 3, 3, embedding=4), (6, 7), "index", "categorical")


def _pixelcnn_rgb() -> TinyModel:
    return TinyModel(ar.PixelCNN(4, 12, 3, 3, in_channels=3), (3, 6, 5), "unit", "categorical")


def _gated_pixelcnn() -> TinyModel:
    return TinyModel(ar.GatedPixelCNN(9, 6, 3, 0, hidden_dim=10), (7, 6), "index", "categorical")


def _gated_pixelcnn_class() -> TinyModel:
    return TinyModel(ar.GatedPixelCNN(9, 6, 3, 4, hidden_dim=10), (6, 7), "index", "categorical")


def _gated_pixelcnn_rgb() -> TinyModel:
    model = ar.GatedPixelCNNRGB(4, 12, 2, 14, causal_ksize=5, hidden_ksize=3, n_classes=3)
    return TinyModel(model, (3, 5, 6), "unit", "categorical")


def _pixelcnnpp() -> TinyModel:
    return TinyModel(ar.PixelCNNPP(1, 5, 2), (3, 8, 12), "real", "logistic_mixture")


def _pixelcnnpp_grey() -> TinyModel:
    return TinyModel(ar.PixelCNNPP(1, 4, 3, 1), (1, 12, 8), "real", "logistic_mixture")


def _pixelsnail() -> TinyModel:
    return TinyModel(
        ar.PixelSNAIL((6, 5), 7, 16, 3, 2, 1, 10, n_out_res_block=1), (6, 5), "index", "categorical"
    )


def _pixelsnail_cond() -> TinyModel:
    condition = {"n_cond_res_block": 1, "cond_res_channel": 6}
    model = ar.PixelSNAIL((6, 8), 7, 10, 5, 1, 2, 8, attention=False, **condition)
    return TinyModel(model, (6, 8), "index", "categorical")


def _wavenet() -> TinyModel:
    return TinyModel(ar.WaveNet(9, 5, 4, 6, 8, 9), (24,), "index", "categorical")


_FAMILIES: dict[str, Callable[[], TinyModel]] = {
    "pixelcnn_raw": _pixelcnn_raw,
    "pixelcnn_embedding": _pixelcnn_embedding,
    "pixelcnn_rgb": _pixelcnn_rgb,
    "gated_pixelcnn": _gated_pixelcnn,
    "gated_pixelcnn_class": _gated_pixelcnn_class,
    "gated_pixelcnn_rgb": _gated_pixelcnn_rgb,
    "pixelcnnpp": _pixelcnnpp,
    "pixelcnnpp_grey": _pixelcnnpp_grey,
    "pixelsnail": _pixelsnail,
    "pixelsnail_cond": _pixelsnail_cond,
    "wavenet": _wavenet,
}
_GAIN = {
    "pixelcnn_embedding": 1.8,
    "gated_pixelcnn_rgb": 3.0,
    "pixelcnnpp": 1.4,
    "pixelsnail": 1.8,
    "pixelsnail_cond": 2.0,
}
FAMILIES = tuple(_FAMILIES)


def tiny_model(family: str, seed: int = 0) -> TinyModel:
    """A small model of one of ``FAMILIES``, float32, on the CPU, its weights drawn from ``seed``."""
    tiny = _FAMILIES[family]()
    randomise(tiny.model, seed, _GAIN.get(family, 1.5))
    return tiny


def randomise(model: nn.Module, seed: int = 0, gain: float = 1.5) -> nn.Module:
    """Draws every parameter and BatchNorm statistic of ``model`` anew, and puts it in eval mode.

    A weight's standard deviation is ``gain / sqrt(taps that are not masked)``: activations stay about 1, so
    that what is lost anywhere shows at the output.
    """
    rng = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=rng) * std)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=rng))

    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name in ("weight_g", "original0"):
                    uniform(parameter, 0.5 * gain, gain)
                elif name == "bias":
                    normal(parameter, 0.3)
                elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                    uniform(parameter, 0.7, 1.5)
                elif isinstance(module, nn.Embedding):
                    normal(parameter, 1.0)
                else:
                    taps = getattr(module, "mask", parameter)[-1]
                    fan_in = taps.sum() if hasattr(module, "mask") else taps.numel()
                    normal(parameter, gain / math.sqrt(max(1, fan_in)))
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert module.running_mean is not None
                assert module.running_var is not None
                normal(module.running_mean, 0.3)
                uniform(module.running_var, 0.5, 2.0)
    return model.eval()


def example(tiny: TinyModel, batch: int = 2, seed: int = 0) -> Tensor:
    """A random input [batch, *shape] of the model's input kind."""
    rng = torch.Generator().manual_seed(seed)
    shape = (batch, *tiny.shape)
    if tiny.input == "real":
        return 2 * torch.rand(shape, generator=rng) - 1
    index = torch.randint(tiny.model.classes, shape, generator=rng)
    if tiny.input == "index":
        return index
    return index / (tiny.model.classes - 1) if tiny.input == "unit" else index.float()


def conditioning(tiny: TinyModel, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """The further forward arguments of the model, empty for most: label [batch] or condition."""
    rng = torch.Generator().manual_seed(seed)
    if getattr(tiny.model, "n_classes", 0):
        return {"label": torch.randint(tiny.model.n_classes, (batch,), generator=rng)}
    if getattr(tiny.model, "conditional", False):
        half = [size // 2 for size in tiny.shape]
        return {"condition": torch.randint(tiny.model.classes, (batch, *half), generator=rng)}
    return {}
