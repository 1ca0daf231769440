"""The model that a plan is recorded from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genperf.sampling._arguments import rows_of
from genperf.sampling._graph import capture
from genperf.sampling._interface import Interface
from genperf.sampling._ir import Graph
from genperf.sampling._model import check_mode, device_of, dtype_of, preserved


@dataclass
class Recorded:
    """The model that a plan was recorded from, and what it was recorded with."""

    model: nn.Module
    fixed: dict[str, Any]
    seen: Any = None  # fingerprint

    def graph(self, interface: Interface, cond: Mapping[str, Tensor], again: bool = True) -> Graph:
        """A recording of an image for each row of ``cond``, of two at least.

        Args:
            again: see by a second one, with other pixels, that the program does not depend on these.
        """
        model, images = self.model, max(2, rows_of(cond))
        check_mode(model)
        device, dtype = device_of(model), dtype_of(model)
        first, second = (
            interface.encoded(interface.random_values(images, seed, narrow), dtype).to(device)
            for seed, narrow in ((1, False), (2, True))
        )
        keywords = {**self.fixed, **expanded(cond, images, device)}
        with preserved(model):
            other = second if again else None
            return capture(interface.adapted(model), first, other, interface.classes, (), keywords)

    def call(self, interface: Interface, values: Tensor, cond: Mapping[str, Tensor]) -> Any:
        """The model's output for values [B, rows, cols, V]."""
        encoded = interface.encoded(values, dtype_of(self.model)).to(device_of(self.model))
        keywords = {**self.fixed, **expanded(cond, len(values), encoded.device)}
        return self.model(interface.to_model(encoded), **keywords)


def expanded(cond: Mapping[str, Tensor], images: int, device: torch.device) -> dict[str, Tensor]:
    """One row an image, in memory of its own as a model may want it."""
    return {n: t.to(device).expand(images, *t.shape[1:]).contiguous() for n, t in cond.items()}
