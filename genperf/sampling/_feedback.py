"""How a drawn value goes back into the model's input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True)
class Scaled:
    """The model's input is ``value * scale + offset``, for each value of a pixel in a channel of its own.

    ``Scaled(1, 0)`` feeds values as they are (a raw class index, 0 or 1, a float), ``Scaled(1 / 255)``
    levels 0 to 255 as 0 to 1, ``Scaled(2 / 255, -1)`` as -1 to 1.
    """

    scale: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        for name in ("scale", "offset"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"Scaled: {name} is {value!r}, expected a number")
            if not math.isfinite(value):
                raise ValueError(f"Scaled: {name} is {value}, expected a finite number")
            object.__setattr__(self, name, float(value))
        if self.scale == 0:
            raise ValueError("Scaled: scale is 0, expected another number")


#: "index": int64, the drawn class itself. "one_hot": floats [B, draws * classes, ...], 1 in channel
#: ``draw * classes + value`` and 0 in the others.
Feedback: TypeAlias = Literal["index", "one_hot"] | Scaled
