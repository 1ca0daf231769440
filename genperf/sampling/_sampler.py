"""A compiled model that can be sampled from."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from genperf.sampling import _arguments as arguments
from genperf.sampling import _share, _store, heads
from genperf.sampling._executors import Executor, build, choose, with_images
from genperf.sampling._explain import explain
from genperf.sampling._graph import capture
from genperf.sampling._interface import Interface
from genperf.sampling._ir import Graph
from genperf.sampling._memory import Need, is_out_of_memory
from genperf.sampling._model import check_mode, device_of, dtype_of, fingerprint, preserved, unwrapped
from genperf.sampling._plan import Plan, refill
from genperf.sampling._plan import plan as make_plan
from genperf.sampling._program import HeadKind, Program

FORMAT, VERSION = "genperf.sampling", 1


@dataclass
class Recorded:
    """The model that a plan was recorded from, and what it was recorded with."""

    model: nn.Module
    fixed: dict[str, Any]
    seen: Any = None  # fingerprint

    def graph(self, interface: Interface, cond: Mapping[str, Tensor]) -> Graph:
        """A recording of an image for each row of ``cond``, of two at least."""
        model, images = self.model, max(2, arguments.rows_of(cond))
        check_mode(model)
        device, dtype = device_of(model), dtype_of(model)
        first, second = (
            interface.encoded(interface.random_values(images, seed, narrow), dtype).to(device)
            for seed, narrow in ((1, False), (2, True))
        )
        keywords = {**self.fixed, **expanded(cond, images, device)}
        with preserved(model):
            return capture(interface.adapted(model), first, second, interface.classes, (), keywords)

    def call(self, interface: Interface, values: Tensor, cond: Mapping[str, Tensor]) -> Any:
        """The model's output for values [B, rows, cols, V]."""
        encoded = interface.encoded(values, dtype_of(self.model)).to(device_of(self.model))
        keywords = {**self.fixed, **expanded(cond, len(values), encoded.device)}
        return self.model(interface.to_model(encoded), **keywords)


def expanded(cond: Mapping[str, Tensor], images: int, device: torch.device) -> dict[str, Tensor]:
    """One row an image, in memory of its own as a model may want it."""
    return {n: t.to(device).expand(images, *t.shape[1:]).contiguous() for n, t in cond.items()}


class Sampler:
    """Draws samples of an autoregressive model pixel by pixel; made by :func:`genperf.sampling.compile`.

    Weights that change after compile (an optimizer's step, ``load_state_dict``, ``.to``, writes through
    ``.data``) are noticed by the next :meth:`sample`, which records the model again; so is new
    conditioning. What is not a parameter, buffer or conditioning is not watched: call :meth:`refresh`.

    Copies share the model. A pickled sampler, like a saved one, comes back without it.

    Attributes:
        shape: of one sample: (T,), (H, W) or (C, H, W).
        head: its description, see :mod:`genperf.sampling.heads`.
        feedback: "index", "one_hot" or :class:`Scaled`.
        plan: the program, with a role and a name for each instruction.
        probe_error: largest difference between the program's parameters and the model's own on one random
            sample; None where the probe was left out.
    """

    def __init__(
        self,
        interface: Interface,
        plan: Plan,
        cond: dict[str, Tensor],
        recorded: Recorded | None,
        executor: str,
        device: torch.device | str | None,
    ) -> None:
        self.plan = plan
        self.probe_error: float | None = None
        self._interface = interface
        self._cond = cond  # of compile
        self._now: dict[str, Tensor] | None = None  # the conditioning in the plan's constants
        self._recorded = recorded
        self._asked, self._device_given = executor, device
        self._executor: tuple[range | None, Executor] | None = None
        self._channels_last = False
        self._place()

    @property
    def shape(self) -> tuple[int, ...]:
        return self._interface.shape

    @property
    def head(self) -> heads.Description:
        return self._interface.head

    @property
    def feedback(self) -> Any:
        return self._interface.feedback

    @property
    def program(self) -> Program:
        return self.plan.program

    def sample(
        self,
        batch: int = 1,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        noise: Tensor | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
        cond: Mapping[str, Tensor] | None = None,
        progress: bool = False,
        distributed: bool = False,
    ) -> Tensor:
        """Draw a batch of samples.

        An image depends on the seed and its number in the batch alone: not on the rest of the batch, on the
        number of threads or on that of processes.

        Args:
            batch: number of images.
            temperature: positive. Divides logits; multiplies the scale of a Gaussian and of logistics.
            top_k: of a categorical head, how many of the most probable classes are kept; 0 keeps all.
            noise: the caller's own random numbers float32 [B, rows, cols, noises], see
                :func:`genperf.sampling.heads.make_noise`.
            seed: of the noise; instead, a key is drawn from ``generator``, by default torch's.
            prefix: known values [B or 1, *shape], and where they hold: bool, broadcast to [B, *shape]. All
                other pixels are drawn given those before them (in raster order).
            cond: another conditioning than that of compile: the same names, 1 or B rows.
            progress: show a bar of the rows (needs tqdm).
            distributed: return this process's share of the batch alone: its rank among torch.distributed's
                processes, or torchrun's. ``noise``, ``prefix`` and ``cond`` are those of the whole batch.

        Returns:
            int64 (categorical, Bernoulli) or float32 [B, *shape], on the sampler's device.

        Raises:
            TypeError, ValueError: for an argument that does not fit; the message names it.
            CaptureError: if the model changed in such a way that it has to be compiled again.
            MemoryError: if the plan needs more memory than there is.
            RuntimeError: for a new ``cond`` without the model.
        """
        batch = arguments.check_batch(batch)
        head = self.program.head
        temperature, top_k = arguments.check_choice(head, temperature, top_k)
        arguments.check_noise(head, batch, noise, seed, generator)
        known = arguments.check_prefix(self._interface, batch, prefix)
        own = arguments.fitting_cond("sample", self._cond, cond, batch)
        rank, world = _share.process() if distributed else (0, 1)
        images = _share.share(batch, rank, world)
        key = _share.common_key(seed, generator, world) if noise is None else None
        if known is not None and known[1].all():
            return self._interface.sample(known[0][images.start : images.stop].to(self._device))
        self._notice_changes()
        need = Need(self.program, len(images), self._device)
        parts = _parts(images, need)
        found = [torch.zeros(0, head.rows, head.cols, head.values, device=self._device)]
        try:
            with _bar(head.rows * len(parts), progress) as bar:
                for part in parts:
                    cut = slice(part.start, part.stop)
                    drawn = heads.make_noise(head, key, part, self._device) if noise is None else noise[cut]
                    here = None if known is None else (known[0][cut], known[1][cut])
                    run = Run(self._prepared(own, part), drawn, temperature, top_k, here)
                    found.append(run(self.head, bar))
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise need.error() from error
            raise
        return self._interface.sample(torch.cat(found))

    def log_prob(self, x: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        """Log-likelihood of images, from one pass of the model itself (teacher forcing), differentiable.

        Args:
            x: [B, *shape] as :meth:`sample` gives them.
            cond: see :meth:`sample`.

        Returns:
            Nats [B], on the model's device; of a density for a Gaussian head.

        Raises:
            TypeError, ValueError: for an argument that does not fit, and for a callback head.
            RuntimeError: for a sampler without its model.
        """
        if self._recorded is None:
            raise RuntimeError(
                "log_prob: this sampler was loaded without its model; give model to Sampler.load"
            )
        if self.head.kind == HeadKind.CALLBACK:
            raise TypeError("log_prob: a callback head has no likelihood")
        if not isinstance(x, Tensor) or x.shape[1:] != self.shape or len(x) == 0:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"log_prob: x is {got}, expected a tensor [B, {', '.join(map(str, self.shape))}]"
            )
        wrong, expected = self._interface.wrong_values(x)
        if wrong.any():
            raise ValueError(f"log_prob: x has {x[wrong][0].item()}, expected {expected}")
        own = arguments.fitting_cond("log_prob", self._cond, cond, len(x))
        values = self._interface.values(x)
        found = self._interface.parameters(self._recorded.call(self._interface, values, own), len(x))
        params = found.get(self._channels_last, next(iter(found.values())))
        return heads.log_prob(self.head, params, values.permute(0, 3, 1, 2).flatten(2))

    def refresh(self) -> None:
        """Record the model again, with its weights of now.

        Raises:
            CaptureError: if the model changed in such a way that it has to be compiled again.
            RuntimeError: for a sampler without its model.
        """
        self._record(self._cond if self._now is None else self._now)

    def explain(self, batch: int = 1) -> str:
        """What runs when, its work, and the predicted time of the persistent CUDA kernel on an H100."""
        self._notice_changes()
        plan = self.plan
        return explain(plan.program, plan.roles, plan.names, self.executor, self._why, batch)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sampler, without its model, to a file for :meth:`load`.

        Raises:
            TypeError: for a callback head.
        """
        self._notice_changes()
        if self._recorded is not None and not arguments.same_cond(self._cond, self._now):
            self._record(self._cond)
        torch.save({**self._state(), "head": _store.head_to_plain(self.head)}, path)

    @staticmethod
    def load(
        path: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        fixed: Mapping[str, Any] | None = None,
        executor: str = "auto",
        device: torch.device | str | None = None,
    ) -> Sampler:
        """Read what :meth:`save` wrote. Needs no code but torch's: the file holds tensors and numbers.

        Args:
            model: the model, whose weights then replace those of the file; without it there is no
                :meth:`log_prob` and no new conditioning.
            fixed, executor, device: see :func:`genperf.sampling.compile`.

        Raises:
            ValueError: if the file is none of this format and version.
        """
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("version") != VERSION:
            raise ValueError(f"load: {os.fspath(path)} is no file of {FORMAT}, version {VERSION}")
        recorded = None if model is None else Recorded(unwrapped(model), dict(fixed or {}))
        state["head"] = _store.head_from_plain(state["head"])
        return Sampler._from_state({**state, "executor": executor, "device": device}, recorded)

    def _state(self) -> dict[str, Any]:
        cond = self._cond if self._now is None else self._now
        return {
            "format": FORMAT,
            "version": VERSION,
            "shape": list(self.shape),
            "head": self.head,
            "feedback": _store.feedback_to_plain(self.feedback),
            "program": _store.program_to_plain(self.program),
            "names": list(self.plan.names),
            "roles": list(self.plan.roles),
            "overlap": self.plan.overlap,
            "cond": {n: t.detach().cpu() for n, t in cond.items()},
            "probe_error": self.probe_error,
            "channels_last": self._channels_last,
            "executor": self._asked,
            "device": None if self._device_given is None else str(self._device_given),
        }

    @staticmethod
    def _from_state(state: dict[str, Any], recorded: Recorded | None) -> Sampler:
        feedback = _store.feedback_from_plain(state["feedback"])
        program = _store.program_from_plain(state["program"])
        plan = Plan(program, state["names"], state["roles"], state["head"], feedback, state["overlap"])
        interface = Interface(tuple(state["shape"]), state["head"], feedback)
        sampler = Sampler(interface, plan, state["cond"], recorded, state["executor"], state["device"])
        sampler._now = state["cond"]
        sampler.probe_error = state["probe_error"]
        sampler._channels_last = state["channels_last"]
        return sampler

    def __reduce__(self) -> tuple[Any, ...]:
        return Sampler._from_state, (self._state(), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Sampler:
        recorded = None if self._recorded is None else replace(self._recorded)
        copied = Sampler._from_state(copy.deepcopy(self._state(), memo), recorded)
        copied._cond = dict(self._cond)
        return copied

    def _notice_changes(self) -> None:
        recorded = self._recorded
        if recorded is not None and fingerprint(recorded.model) != recorded.seen:
            self._record(self._cond if self._now is None else self._now)

    def _record(self, cond: Mapping[str, Tensor]) -> None:
        """Put the model's weights and this conditioning into the plan."""
        if self._recorded is None:
            raise RuntimeError(
                "sample: this sampler was loaded without its model, so that its conditioning cannot change; "
                "give model to Sampler.load"
            )
        graph = self._recorded.graph(self._interface, cond)
        self._place()
        if self.plan.overlap == (self.executor == "cuda"):
            self.plan = make_plan(graph, self.head, self.feedback, not self.plan.overlap)
        else:
            refill(self.plan, graph)
        self._recorded_with(cond)

    def _recorded_with(self, cond: Mapping[str, Tensor]) -> None:
        assert self._recorded is not None
        self._now = {n: t.detach().clone() for n, t in cond.items()}
        self._recorded.seen = fingerprint(self._recorded.model)
        self._executor = None

    def _place(self) -> None:
        """Choose the device and the executor."""
        given, recorded = self._device_given, self._recorded
        own = torch.device("cpu") if recorded is None else device_of(recorded.model)
        self._device = own if given is None else torch.device(given)
        self.executor, self._why = choose(self._asked, self._device)

    def _prepared(self, cond: Mapping[str, Tensor], images: range) -> Executor:
        """The executor for some images of the batch that has this conditioning."""
        here = arguments.part_of(cond, images)
        if not any(arguments.same_cond(c, self._now) for c in (here, cond)):
            self._record(here)
        rows = None
        if arguments.rows_of(cond) > 1:
            rows = range(len(images)) if arguments.same_cond(here, self._now) else images
        if self._executor is None or self._executor[0] != rows:
            self._executor = rows, build(self.executor, with_images(self.program, rows), self._device)
        return self._executor[1]


@dataclass
class Run:
    """One batch of images."""

    executor: Executor
    noise: Tensor
    temperature: float
    top_k: int
    known: tuple[Tensor, Tensor] | None

    def __call__(self, head: heads.Description, bar: Any) -> Tensor:
        """The values [B, rows, cols, V]; ``bar``, if any, is told of each row."""
        program = self.executor.program
        state = self.executor.start(len(self.noise))
        row = program.slots // program.head.rows
        step = program.slots if bar is None else row
        for begin in range(0, program.slots, step):
            if isinstance(head, heads.Callback):
                for slot in range(begin, begin + step):
                    self._call_back(head, state, slot)
            else:
                self.executor.run(
                    state, begin, begin + step, self.noise, self.temperature, self.top_k, self.known
                )
            if bar is not None:
                bar.update()
        return state.values

    def _call_back(self, head: heads.Callback, state: Any, slot: int) -> None:
        pixel, draw = divmod(slot, head.draws)
        y, x = divmod(pixel, self.executor.program.head.cols)
        self.executor.run(state, slot, slot + 1, None)
        params = self.executor.params(state, slot).clone()
        first = draw * head.draw_noises
        noise = self.noise[:, y, x, first : first + head.draw_noises].to(params.device)
        value = head.function(params, noise, draw)
        if not isinstance(value, Tensor) or value.shape != (len(params),):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"sample: the callback's function gave {got}, expected a tensor [{len(params)}]")
        if self.known is not None:
            values, mask = (t[:, y, x, draw].to(value.device) for t in self.known)
            value = torch.where(mask, values.to(value.dtype), value)
        self.executor.feed(state, slot, value)


def _parts(images: range, need: Need) -> list[range]:
    size = need.chunk() if images else 1
    return [images[at : at + size] for at in range(0, len(images), size)]


def _bar(rows: int, progress: bool) -> Any:
    if not progress:
        return nullcontext()
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("sample: progress needs tqdm: pip install tqdm", name=error.name) from None
    return tqdm(total=rows, unit="row", desc="sample")
