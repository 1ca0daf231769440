"""A network that a loop over pixels calls once a pixel, computed pixel by pixel.

The loop stays as its author wrote it: what it does with the network's output, how it draws and what it writes
back. Each call of the network gives its output as far as it is known by then, from
:meth:`genperf.sampling.Sampler.steps`; what later pixels decide is NaN. Whatever does not go pixel by pixel
calls the network itself.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from genperf import sampling
from genperf.accelerate._network import (
    Arguments,
    Network,
    Unsuited,
    check_suited,
    located,
    module_of,
    not_called,
    originals,
)

SHAPES = 4  # whose plans are kept for a module
FEW, SECONDS = 8, 5.0  # calls at least, and time, of a loop with a limit
_WRONG = 1e-3  # of the largest value of the output: far above rounding

_active: ContextVar[Session | None] = ContextVar("genperf_session", default=None)


class Abandoned(BaseException):  # passes through `except Exception` in a loop
    """The loop cannot go on with what it was given so far."""


def through(network: Callable[..., Any]) -> Callable[..., Any]:
    """What a rewritten loop calls in the place of ``network``."""
    session = _active.get()
    return network if session is None else partial(session, network)


class Session:
    """One run of a loop, which calls the network itself; counts the calls.

    Args:
        limit: calls after which the loop is abandoned; so it is where it takes long.

    Attributes:
        images: the image given to each call, where ``limit`` is set.
        image: the very tensor of the last call.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.calls = 0
        self.images: list[Tensor] = []
        self.image: Tensor | None = None
        self._start = time.monotonic()

    def __enter__(self) -> Session:
        self._token = _active.set(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _active.reset(self._token)

    def __call__(self, network: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if self.limit is not None:
            if self.calls == self.limit or (self.calls >= FEW and self.slow()):
                raise Abandoned
            try:
                self.image = Arguments(args, kwargs).image
            except Unsuited:
                raise Abandoned from None
            self.images.append(self.image.clone())
        self.calls += 1
        return self.output(network, args, kwargs)

    def output(self, network: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return network(*args, **kwargs)

    def slow(self) -> bool:
        return time.monotonic() - self._start > SECONDS


class Stepping(Session):
    """One run of a loop, whose network is computed pixel by pixel where that can be.

    Args:
        kept: plans of earlier runs, see :func:`genperf.accelerate._swap.kept_for`.
        whole_pixels: one call gives all channels of a pixel, not one a channel.
        span: two numbers between which the image's values lie.

    Attributes:
        stopped: why calls go to the network itself now, or "".
        begun: whether anything was given that did not come from the network itself.
        params: the output [B, P] of each call, where ``limit`` is set.
    """

    def __init__(
        self, kept: dict[Any, Any], whole_pixels: bool, span: tuple[float, float], limit: int | None = None
    ) -> None:
        super().__init__(limit)
        self.stopped = ""
        self.begun = False
        self.params: list[Tensor] = []
        self._kept = kept
        self._whole_pixels, self._span = whole_pixels, span
        self._plans: dict[Any, Planned] = {}
        self._run: _Run | None = None
        self._last: Arguments | None = None
        self._key: Any = None

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        put_back(self._kept, self._plans)

    def slow(self) -> bool:
        return False  # its limit is the number of calls of a run with the network itself

    def refuse(self, reason: str) -> None:
        """Let the network itself be called from now on, in later runs of this kind, too."""
        self._plans.pop(self._key, None)
        self._kept[self._key] = self.stopped = reason

    def output(self, network: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.stopped:
            return network(*args, **kwargs)
        with torch.no_grad():
            try:
                given = self._last
                if given is None or not given.again(args, kwargs):
                    given = self._last = Arguments(args, kwargs)
                if self._run is None or self._run.finished:
                    self._run = self._begin(network, given)
                run = self._run
                found = run.step(given)
            except Unsuited as reason:
                self.stopped = str(reason)
                found = None
        if found is None:
            return network(*args, **kwargs)
        with torch.no_grad():
            self.begun = True
            if self.limit is not None:
                self.params.append(run.params.clone())
            if run.finished and not run.plan.checked:
                run.plan.checked = run.agrees(network(*args, **kwargs))
                if not run.plan.checked:
                    self.refuse("the network's output is another one pixel by pixel")
                    raise Abandoned
        return found

    def _begin(self, network: Callable[..., Any], given: Arguments) -> _Run:
        check_suited(module_of(network), given)
        self._key = given.key(self._whole_pixels)
        head = sampling.Callback(not_called, channels=given.channels, draw_noises=0, span=self._span)
        feedback = sampling.Scaled() if given.image.is_floating_point() else "index"
        with originals(module_of(network)):
            plan = planned(self._kept, self._plans, self._key, network, given, head, feedback)
            return _Run(plan, given, self._whole_pixels)


@dataclass
class Planned:
    """A sampler for one shape, with what its network is called with, and how its output looks."""

    sampler: sampling.Sampler
    network: Network
    of: weakref.ref[nn.Module]
    checked: bool = False


def planned(
    kept: dict[Any, Any],
    taken: dict[Any, Planned],
    key: Any,
    network: Callable[..., Any],
    given: Arguments,
    head: sampling.heads.Description,
    feedback: Any,
) -> Planned:
    """The plan for calls like ``given``: of this run, of an earlier one, or a new one."""
    module = module_of(network)
    plan = taken.pop(key, None) or kept.pop(key, None)
    if isinstance(plan, str):
        kept[key] = plan
        raise Unsuited(plan)
    if plan is None or plan.of() is not module:
        wrapper = Network(network, given)
        try:
            with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
                sampler = sampling.compile(
                    wrapper, given.shape, head, feedback=feedback, cond=given.rows, executor="cpu"
                )
        except (sampling.CaptureError, sampling.CausalityError) as error:
            kept[key] = f"{type(error).__name__}: {error}"
            raise Unsuited(kept[key]) from error
        except Exception as error:  # of the arguments, perhaps, which other calls do not share
            raise Unsuited(f"{type(error).__name__}: {error}") from error
        plan = Planned(sampler, wrapper, weakref.ref(module))
    plan.network.attach(network)
    taken[key] = plan
    return plan


def put_back(kept: dict[Any, Any], taken: dict[Any, Planned]) -> None:
    """Keep the plans of a run for later ones, without a reference to the network."""
    for key, plan in taken.items():
        plan.network.attach(None)
        kept[key] = plan
    taken.clear()
    for key in list(kept)[:-SHAPES]:
        kept.pop(key, None)


class _Run:
    """One batch of images."""

    def __init__(self, plan: Planned, given: Arguments, whole_pixels: bool) -> None:
        if not (given.image == given.image.flatten()[0]).all():
            raise Unsuited("it begins with an image that is not empty")
        self.plan = plan
        try:
            with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
                self._steps = plan.sampler.steps(given.batch, given.rows)
        except (ValueError, RuntimeError, MemoryError) as error:
            raise Unsuited(f"{type(error).__name__}: {error}") from error
        self._draws = given.channels if whole_pixels else 1
        self._given, self._calls = given, 0
        self._seen = given.image.clone(memory_format=torch.contiguous_format)
        self._grid = (given.batch, given.channels, *given.shape[-2:])
        self._buffer = plan.network.empty(given.batch)
        self._version = self._buffer._version
        self.finished = False

    def step(self, given: Arguments) -> Any:
        """The output of the next call; its arguments must be those of the next pixel."""
        steps = self._steps
        if self._buffer._version != self._version:
            raise Unsuited("the network's output is written to")
        if not given.like(self._given):
            raise Unsuited("the network's other arguments change from call to call")
        if self._calls:
            self._take(given.image)
        self._calls += 1
        pixel = steps.slot // self._grid[1]
        params = steps.params()
        cell = self.plan.network.cell(self._buffer, *divmod(pixel, self._grid[3]))
        self.params = params[:, : cell[0].numel()]
        cell.copy_(self.params.view(cell.shape))
        self._version = self._buffer._version
        self.finished = steps.slot + self._draws == steps.slots
        return self.plan.network.rebuilt(self._buffer)

    def _take(self, image: Tensor) -> None:
        """Feed what was drawn since the last call; nothing else must have changed."""
        steps = self._steps
        new, seen = image.reshape(self._grid), self._seen.view(self._grid)
        pixel, channel = divmod(steps.slot, self._grid[1])
        y, x = divmod(pixel, self._grid[3])
        drawn = slice(channel, channel + self._draws)
        seen[:, drawn, y, x] = new[:, drawn, y, x]
        if not torch.equal(image, self._seen):
            raise Unsuited("the image changes otherwise than pixel by pixel, row by row")
        for c in range(self._draws):
            if c:
                steps.params()
            steps.feed(new[:, channel + c, y, x])

    def agrees(self, output: Any) -> bool:
        """Whether all that was given is what the network itself gives, but for rounding."""
        expected = located(output)[1]
        if expected.shape != self._buffer.shape:
            return False
        largest = max(1.0, expected.abs().amax().item())
        return (expected - self._buffer).abs().amax().item() <= _WRONG * largest
