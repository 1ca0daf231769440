"""A loop over pixels as one call of a sampler, where it is known how the loop draws and what it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from genperf import sampling
from genperf.accelerate._network import Arguments, Unsuited, check_suited, module_of, originals
from genperf.accelerate._stepwise import Abandoned, Planned, Session, Stepping, planned, put_back


@dataclass(frozen=True)
class Meaning:
    """The loop draws one of ``classes`` from the softmax, and writes ``class * scale + offset``.

    ``class_dim`` is that of :class:`genperf.sampling.Categorical`.
    """

    classes: int
    class_dim: int
    scale: float
    offset: float

    def values(self, classes: Tensor, dtype: torch.dtype) -> Tensor:
        return classes.to(dtype) if not dtype.is_floating_point else self._scaled(classes).to(dtype)

    def _scaled(self, classes: Tensor) -> Tensor:
        return classes.double() * self.scale + self.offset


class Whole(Session):
    """One run of a loop, abandoned at its first call, with the image drawn.

    Attributes:
        image: the tensor that the loop fills, once the loop is abandoned.
        stopped: why the network itself is called instead, or "".
    """

    def __init__(self, kept: dict[Any, Any], meaning: Meaning) -> None:
        super().__init__()
        self.stopped = ""
        self._kept = kept
        self._meaning = meaning

    def output(self, network: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if not self.stopped:
            try:
                self._sample(network, Arguments(args, kwargs))
            except Unsuited as reason:
                self.stopped = str(reason)
        if not self.stopped:
            raise Abandoned
        return network(*args, **kwargs)

    def _sample(self, network: Callable[..., Any], given: Arguments) -> None:
        meaning, module = self._meaning, module_of(network)
        check_suited(module, given)
        head = sampling.Categorical(meaning.classes, given.channels, meaning.class_dim)
        feedback: Any = "index"
        if given.image.is_floating_point():
            feedback = sampling.Scaled(meaning.scale, meaning.offset)
        plans: dict[Any, Planned] = {}
        try:
            with originals(module):
                plan = planned(self._kept, plans, given.key("whole"), network, given, head, feedback)
                found = plan.sampler.sample(given.batch, cond=given.rows)
        except (sampling.CaptureError, sampling.CausalityError) as error:
            raise Unsuited(f"{type(error).__name__}: {error}") from error
        finally:
            put_back(self._kept, plans)
        self.image = given.image
        with torch.no_grad():
            self.image.copy_(meaning.values(found, self.image.dtype))


def find(session: Stepping, run: Callable[[Session], Any]) -> Meaning | None:
    """What a loop does, from a run in which the draws of ``torch.multinomial`` are replaced; None if unknown.

    Args:
        session: of the run, with a limit above its number of calls.
        run: gives what the loop returns.
    """
    forced = _Forced()
    with forced:
        result = run(session)
    image = session.image
    if result is not image or image is None or session.stopped or forced.odd:
        return None
    channels = image.shape[1] if image.dim() == 4 else 1
    if len(forced.drawn) != session.calls or len({p.shape[1] for p, _ in forced.drawn}) != 1:
        return None
    classes = forced.drawn[0][0].shape[1]
    grid = image.reshape(len(image), channels, -1).transpose(1, 2).flatten(1)  # [B, draws in order]
    drawn = torch.cat([c for _, c in forced.drawn], 1)
    if grid.shape != drawn.shape or classes < 2:
        return None
    class_dim = _class_dim(session, forced, classes, channels)
    low, high = (grid[drawn == k][:1] for k in (0, classes - 1))
    if class_dim is None or not len(low) or not len(high):
        return None
    offset = low.double().item()
    meaning = Meaning(classes, class_dim, (high.double().item() - offset) / (classes - 1), offset)
    if meaning.scale == 0 or not torch.equal(meaning.values(drawn, grid.dtype), grid):
        return None
    return meaning


def _class_dim(session: Stepping, forced: _Forced, classes: int, channels: int) -> int | None:
    """Which dimension numbers the classes, where the loop draws from the softmax of the network's output."""
    for class_dim in (1, 2):
        for i, (probabilities, _) in enumerate(forced.drawn):
            params = session.params[i]
            if params.shape[1] != classes * channels:
                return None
            logits = params.view(
                len(params), *((classes, channels) if class_dim == 1 else (channels, classes))
            )
            logits = logits.select(2 if class_dim == 1 else 1, i % channels)
            total = probabilities.sum(1, keepdim=True)
            if not torch.allclose(logits.softmax(1), probabilities / total, rtol=1e-4, atol=1e-7):
                break
        else:
            return class_dim
    return None


class _Forced(TorchDispatchMode):
    """Gives ``torch.multinomial`` other results: class 0, the last class, then all over the range.

    Attributes:
        drawn: the probabilities [B, K] and classes [B, 1] of each call.
        odd: whether anything else was drawn, or several classes at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[Tensor, Tensor]] = []
        self.odd = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.multinomial.default:
            probabilities = args[0]
            if probabilities.dim() != 2 or result.shape[1] != 1:
                self.odd = True
                return result
            first = sum(len(c) for _, c in self.drawn)
            classes = probabilities.shape[1]
            number = torch.arange(first, first + len(result)).unsqueeze(1)
            forced = torch.where(
                number == 0, 0, torch.where(number == 1, classes - 1, number * 7919 % classes)
            )
            result.copy_(forced)
            self.drawn.append((probabilities.clone(), forced))
        elif torch.Tag.nondeterministic_seeded in func.tags and self.drawn:
            self.odd = True
        return result
