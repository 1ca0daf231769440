"""Layers whose weight is a direction times a length, and checkpoints that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_WRAPPERS = ("state_dict", "model_state_dict", "model")


def _split_weight(module: nn.Module) -> None:
    """Replaces the parameter ``weight`` by ``weight_g`` (its norms over dim 0) and ``weight_v``."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    del module.weight
    module.weight_g = nn.Parameter(torch.norm_except_dim(weight.detach(), 2, 0))
    module.weight_v = nn.Parameter(weight.detach())


class WeightNormConv2d(nn.Conv2d):
    """Convolution with weight normalisation (Salimans and Kingma 2016, arXiv:1602.07868).

    The weight is ``weight_g * weight_v / |weight_v|``, the norm taken for each output channel. The
    parameters are those of ``torch.nn.utils.weight_norm``: weight_g [O, 1, 1, 1], weight_v [O, I, kH, kW].
    """

    weight_g: Tensor
    weight_v: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _split_weight(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, I, H, W] -> [B, O, H', W'], as ``nn.Conv2d``."""
        return self._conv_forward(x, torch._weight_norm(self.weight_v, self.weight_g, 0), self.bias)


class WeightNormConvTranspose2d(nn.ConvTranspose2d):
    """Transposed convolution with weight normalisation.

    weight_g [I, 1, 1, 1] holds one length for each *input* channel, as ``torch.nn.utils.weight_norm``
    has it; TensorFlow's definition has one for each output channel.
    """

    weight_g: Tensor
    weight_v: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _split_weight(self)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[B, I, H, W] -> [B, O, H', W'], as ``nn.ConvTranspose2d`` with its ``output_padding``."""
        assert output_size is None
        weight = torch._weight_norm(self.weight_v, self.weight_g, 0)
        options: Any = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return F.conv_transpose2d(x, weight, self.bias, *options)


class WeightNormLinear(nn.Linear):
    """Linear map with weight normalisation for each output: weight_g [O, 1], weight_v [O, I]."""

    weight_g: Tensor
    weight_v: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _split_weight(self)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0), self.bias)


def load_checkpoint(model: nn.Module, checkpoint: Mapping[str, Any], *, strict: bool = True) -> nn.Module:
    """Loads a public checkpoint into a model of this package.

    Takes what ``torch.load`` gave: a state_dict, or a mapping that holds one under "state_dict",
    "model_state_dict" or "model". The prefixes of DataParallel and ``torch.compile`` ("module.",
    "_orig_mod.") go, and weights stored by ``torch.nn.utils.parametrizations.weight_norm`` are renamed.

    Args:
        model: a model of :mod:`genperf.nn.autoregressive`; changed in place.
        checkpoint: see above.
        strict: whether missing and superfluous keys are an error.

    Returns:
        nn.Module: ``model``.

    Raises:
        TypeError: ``checkpoint`` holds no state_dict.
        RuntimeError: keys or shapes do not fit the model.
    """
    state = checkpoint
    for key in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        wanted = ", ".join(repr(key) for key in _WRAPPERS)
        found = list(state)[:5] if isinstance(state, Mapping) else type(state).__name__
        raise TypeError(f"checkpoint: {found}; expected a state_dict, or one under {wanted}")
    renamed = {}
    for key, value in state.items():
        for prefix in ("module.", "_orig_mod."):
            key = key.removeprefix(prefix)
        key = key.replace("parametrizations.weight.original0", "weight_g")
        renamed[key.replace("parametrizations.weight.original1", "weight_v")] = value
    model.load_state_dict(renamed, strict=strict)
    return model
