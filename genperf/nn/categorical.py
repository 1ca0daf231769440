"""A categorical distribution at the output of a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genperf.ops.categorical_log_prob import categorical_log_prob
from genperf.ops.categorical_sample import categorical_sample


class Categorical:
    """One of K classes for each row of logits; used as ``torch.distributions.Categorical(logits=...)`` is.

    Its definitions are those of :func:`genperf.ops.categorical_sample`. The normalised logits are never
    stored.

    Args:
        logits: [*, K], or with the classes in dimension ``dim``.
        dim: that of the classes.
        temperature, top_k, top_p: which distribution it is, for draws and log-probabilities.
        rng: "philox" or "torch"; neither gives the draws of ``torch.multinomial``.
    """

    def __init__(
        self,
        logits: Tensor,
        *,
        dim: int = -1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        rng: str = "philox",
    ) -> None:
        self.logits, self.rng = logits, rng
        self._form: dict[str, Any] = {
            "dim": dim, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        }  # fmt: skip

    def log_prob(self, value: Tensor) -> Tensor:
        """Of classes int64, of the shape of the logits without ``dim``: nats."""
        return categorical_log_prob(self.logits, value, **self._form)

    def nll(self, value: Tensor) -> Tensor:
        """The negative of it: the cross-entropy with the classes."""
        return -self.log_prob(value)

    @property
    def mode(self) -> Tensor:
        """The most likely class, the first where several are."""
        return self.logits.argmax(self._form["dim"])

    def sample(
        self, generator: torch.Generator | Sequence[torch.Generator] | None = None, key: Tensor | None = None
    ) -> Tensor:
        """Classes int64, of the shape that ``log_prob`` takes."""
        drawn = categorical_sample(self.logits, rng=self.rng, generator=generator, key=key, **self._form)
        assert isinstance(drawn, Tensor)
        return drawn
