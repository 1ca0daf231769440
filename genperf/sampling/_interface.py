"""What goes into a model and what comes out, and how that is one sample's values and parameters.

*Values* are float32 [B, rows, cols, V] here, as executors keep them; a *sample* is [B, *shape].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genperf.sampling._feedback import Feedback, Scaled
from genperf.sampling._model import Adapted, first_tensor
from genperf.sampling._program import HeadKind
from genperf.sampling.heads import Callback, Categorical, Description

_DISCRETE = (HeadKind.CATEGORICAL, HeadKind.BERNOULLI)


@dataclass(frozen=True)
class Interface:
    """``shape`` is that of one sample: (T,), (H, W) or (C, H, W)."""

    shape: tuple[int, ...]
    head: Description
    feedback: Feedback

    @property
    def rows(self) -> int:
        return 1 if len(self.shape) == 1 else self.shape[-2]

    @property
    def cols(self) -> int:
        return self.shape[-1]

    @property
    def classes(self) -> int | None:
        """Of an integer value; None for floats."""
        if isinstance(self.head, Categorical):
            return self.head.classes
        return 2 if self.head.kind == HeadKind.BERNOULLI else None

    @property
    def dtype(self) -> torch.dtype:
        """Of samples."""
        return torch.int64 if self.head.kind in _DISCRETE else torch.float32

    def check(self) -> None:
        """Raise ValueError where shape, head and feedback do not fit together."""
        channels = self.shape[0] if len(self.shape) == 3 else 1
        if channels != self.head.values:
            raise ValueError(
                f"compile: shape is {self.shape}, with {channels} values a pixel, but head {self.head} draws "
                f"{self.head.values}"
            )
        if self.feedback == "index" and channels > 1:
            raise ValueError(
                f"compile: feedback is 'index', expected one_hot or Scaled for {channels} channels a pixel"
            )
        if self.feedback == "index" and self.classes is None and self.head.kind != HeadKind.CALLBACK:
            raise ValueError(f"compile: feedback is 'index', expected Scaled for values of head {self.head}")
        if self.feedback == "one_hot" and self.classes is None:
            raise ValueError(f"compile: feedback is 'one_hot', but head {self.head} has no number of classes")

    def values(self, sample: Tensor) -> Tensor:
        """Values of a sample [B, *shape]."""
        cells = sample.reshape(len(sample), -1, self.rows, self.cols)
        return cells.permute(0, 2, 3, 1)

    def sample(self, values: Tensor) -> Tensor:
        cells = values.permute(0, 3, 1, 2).reshape(len(values), *self.shape)
        return cells.to(self.dtype)

    def encoded(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Values as they are recorded: int64 [B, (rows,) cols] or floats [B, channels, (rows,) cols]."""
        spatial = self.shape[-2:] if len(self.shape) > 1 else self.shape
        if self.feedback == "index":
            return values[..., 0].long().reshape(-1, *spatial)
        if isinstance(self.feedback, Scaled):
            # In float32, as executors do.
            cells = values.to(torch.promote_types(values.dtype, torch.float32))
            cells = (cells * self.feedback.scale + self.feedback.offset).to(dtype)
        else:
            assert self.classes is not None
            cells = F.one_hot(values.long(), self.classes).flatten(3).to(dtype)
        return cells.permute(0, 3, 1, 2).reshape(len(values), -1, *spatial)

    def to_model(self, encoded: Tensor) -> Tensor:
        """What the model itself takes: a channel dimension just where ``shape`` has one."""
        if self.feedback == "index":
            return encoded.unsqueeze(1) if len(self.shape) == 3 else encoded
        if isinstance(self.feedback, Scaled) and len(self.shape) < 3:
            return encoded[:, 0]
        return encoded

    def adapted(self, model: nn.Module) -> nn.Module:
        """The model as it is recorded."""
        same = len(self.shape) == 3 or self.feedback == "one_hot"
        if same if self.feedback != "index" else len(self.shape) < 3:
            return model
        return Adapted(model, self.to_model)

    def random_values(self, batch: int, seed: int, narrow: bool = False) -> Tensor:
        """Values that the head could draw; ``narrow``: of other statistics."""
        shape = (batch, self.rows, self.cols, self.head.values)
        rng = torch.Generator().manual_seed(seed)
        if self.classes is not None:
            most = max(1, self.classes // 2) if narrow else self.classes
            return torch.randint(most, shape, generator=rng).float()
        if self.head.kind == HeadKind.LOGISTIC_MIXTURE:
            return torch.rand(shape, generator=rng) * (0.6 if narrow else 2.0) - 1.0
        if self.feedback == "index":  # of a callback, which tells no range: 0 and 1 are classes of any model
            return torch.randint(1 if narrow else 2, shape, generator=rng).float()
        if isinstance(self.head, Callback) and self.head.span is not None:
            low, high = self.head.span
            return low + torch.rand(shape, generator=rng) * (high - low) * (0.4 if narrow else 1.0)
        return torch.randn(shape, generator=rng) * (0.3 if narrow else 1.0) - (2.0 if narrow else 0.0)

    def wrong_values(self, values: Tensor) -> tuple[Tensor, str]:
        """Which values the head could not draw, and what was expected."""
        if self.classes is not None:
            inside = (values >= 0) & (values < self.classes) & (values == values.floor())
            return ~inside, f"integers in 0 to {self.classes - 1}"
        if self.head.kind == HeadKind.LOGISTIC_MIXTURE:
            return ~((values >= -1) & (values <= 1)), "numbers in -1 to 1"
        return ~values.isfinite(), "finite numbers"

    def parameters(self, output: Any, batch: int) -> dict[bool, Tensor]:
        """A model's output as [B, P, cells], by whether its channels come after the cells: in each way that
        its shape allows."""
        out = first_tensor(output)
        cells = self.rows * self.cols
        found = {}
        if _ends_with(out.shape, cells):
            found[False] = out.reshape(batch, -1, cells)
        if out.shape[0] == batch * cells or _ends_with(out.shape[:0:-1], cells):
            found[True] = out.reshape(batch, cells, -1).transpose(1, 2)
        if not found:
            raise ValueError(
                f"compile: the model's output has shape {tuple(out.shape)} for {batch} images, expected "
                f"[B, channels, {', '.join(map(str, self.shape[-2:]))}]"
            )
        return found


def _ends_with(shape: Sequence[int], cells: int) -> bool:
    """Whether the last dimensions have ``cells`` elements together."""
    return any(math.prod(shape[i:]) == cells for i in range(1, len(shape)))


def find_feedback(
    call: Callable[[], None], shape: tuple[int, ...], head: Description | None, feedback: Feedback | None
) -> Feedback:
    """How values are fed back, where the model shows it.

    Args:
        call: of the model with class indices; raises where it takes none.
    """
    if feedback is not None:
        if feedback not in ("index", "one_hot") and not isinstance(feedback, Scaled):
            raise TypeError(f"compile: feedback is {feedback!r}, expected 'index', 'one_hot' or Scaled(...)")
        return feedback
    if head is not None and head.kind not in (HeadKind.CATEGORICAL, HeadKind.CALLBACK):
        return Scaled()
    try:
        call()
    except Exception as error:
        if head is not None and head.kind == HeadKind.CALLBACK:
            return Scaled()
        raise ValueError(
            "compile: feedback cannot be found: the model takes no int64 [B, "
            f"{', '.join(map(str, shape))}] of class indices ({first_line(error)}). Give feedback: "
            "Scaled(1, 0) for the index as a float, Scaled(1 / 255) for levels 0 to 255 as 0 to 1, "
            "'one_hot' for one channel a class; or give further arguments of forward by cond and fixed"
        ) from error
    return "index"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def find_head(output: Tensor, shape: tuple[int, ...]) -> Description:
    """The head of a model that takes class indices, from its output for one image: one logit a class."""
    classes, rest = divmod(output.numel(), math.prod(shape))
    if rest or classes < 2:
        raise ValueError(
            f"compile: head is None, and the model's output {tuple(output.shape)} is no logits of "
            f"classes for images {shape}; give head"
        )
    return Categorical(classes)
