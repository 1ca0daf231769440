"""A compiled model that can be sampled from."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from genperf.sampling import _arguments as arguments
from genperf.sampling import _share, _store, heads
from genperf.sampling._conditioning import Table
from genperf.sampling._executors import Executor, build, choose
from genperf.sampling._explain import explain
from genperf.sampling._interface import Interface
from genperf.sampling._memory import Need, is_out_of_memory
from genperf.sampling._model import device_of, unwrapped
from genperf.sampling._plan import Plan
from genperf.sampling._planned import NO_MODEL, Planned
from genperf.sampling._program import HeadKind, Program
from genperf.sampling._recorded import Recorded
from genperf.sampling._run import Noise, Run, parts_of, progress_bar
from genperf.sampling._steps import Steps

FORMAT, VERSION = "genperf.sampling", 1


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
        planned: Planned,
        cond: dict[str, Tensor],
        executor: str,
        device: torch.device | str | None,
    ) -> None:
        self.probe_error: float | None = None
        self._planned = planned
        self._interface = planned.interface
        self._cond = cond  # of compile
        self._asked, self._device_given = executor, device
        self._executor: tuple[Plan | None, Any, Executor | None] = (None, None, None)
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
    def plan(self) -> Plan:
        return self._planned.plan

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
            CaptureError, CausalityError: if the model changed in such a way that it cannot be sampled.
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
        self._planned.notice_changes()
        self._place()
        need = Need(self.program, len(images), self._device)
        parts = parts_of(images, need)
        found = [torch.zeros(0, head.rows, head.cols, head.values, device=self._device)]
        try:
            with progress_bar(head.rows * len(parts), progress) as bar:
                for part in parts:
                    cut = slice(part.start, part.stop)
                    here = None if known is None else (known[0][cut], known[1][cut])
                    numbers = Noise(part, noise, key)
                    run = Run(self._prepared(own, part), numbers, temperature, top_k, here)
                    found.append(run(self.head, bar))
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise need.error() from error
            raise
        return self._interface.sample(torch.cat(found))

    def steps(self, batch: int = 1, cond: Mapping[str, Tensor] | None = None) -> Steps:
        """A batch under way, for a caller that draws each value itself; of a :class:`Callback` head.

        Args:
            batch, cond: see :meth:`sample`.

        Raises:
            TypeError, ValueError: for an argument that does not fit, and for another head.
            CaptureError, CausalityError: if the model changed in such a way that it cannot be sampled.
            MemoryError: if not all images fit into memory at once.
        """
        if self.head.kind != HeadKind.CALLBACK:
            raise TypeError(f"steps: head is {self.head}, expected a Callback")
        batch = arguments.check_batch(batch)
        own = arguments.fitting_cond("steps", self._cond, cond, batch)
        self._planned.notice_changes()
        self._place()
        need = Need(self.program, batch, self._device)
        if need.chunk() < batch:
            raise need.error()
        return Steps(self._prepared(own, range(batch)), batch)

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
        if self._planned.recorded is None:
            raise RuntimeError(f"log_prob: {NO_MODEL}")
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
        found = self._interface.parameters(self._planned.recorded.call(self._interface, values, own), len(x))
        params = found.get(self._channels_last, next(iter(found.values())))
        return heads.log_prob(self.head, params, values.permute(0, 3, 1, 2).flatten(2))

    def refresh(self) -> None:
        """Record the model again, with its weights of now.

        Raises:
            CaptureError, CausalityError: if the model changed in such a way that it cannot be sampled.
            RuntimeError: for a sampler without its model.
        """
        self._planned.stale = True
        self._planned.learn(self._cond, range(1))

    def explain(self, batch: int = 1) -> str:
        """What runs when, its work, and the predicted time of the persistent CUDA kernel on an H100."""
        self._planned.notice_changes()
        self._planned.learn(self._cond, range(1))
        self._place()
        made = self.plan
        return explain(made.program, made.roles, made.names, self.executor, self._why, batch)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sampler, without its model, to a file for :meth:`load`.

        Raises:
            TypeError: for a callback head.
        """
        self._planned.notice_changes()
        self._planned.learn(self._cond, range(arguments.rows_of(self._cond)))
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
            model: the model, whose weights replace those of the file at the first use, where CaptureError
                says that its structure is another; without it there is no :meth:`log_prob` and no new
                conditioning.
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
        return {
            "format": FORMAT,
            "version": VERSION,
            "shape": list(self.shape),
            "head": self.head,
            "feedback": _store.feedback_to_plain(self.feedback),
            "program": _store.program_to_plain(self.program),
            "names": list(self.plan.names),
            "roles": list(self.plan.roles),
            "cond": {n: t.detach().cpu() for n, t in self._cond.items()},
            "rows": dict(self._planned.table.numbers),
            "table": dict(self._planned.table.tensors),
            "probe_error": self.probe_error,
            "channels_last": self._channels_last,
            "executor": self._asked,
            "device": None if self._device_given is None else str(self._device_given),
        }

    @staticmethod
    def _from_state(state: dict[str, Any], recorded: Recorded | None) -> Sampler:
        feedback = _store.feedback_from_plain(state["feedback"])
        program = _store.program_from_plain(state["program"])
        made = Plan(program, state["names"], state["roles"], state["head"], feedback)
        interface = Interface(tuple(state["shape"]), state["head"], feedback)
        planned = Planned(interface, made, recorded, Table(dict(state["rows"]), dict(state["table"])))
        sampler = Sampler(planned, state["cond"], state["executor"], state["device"])
        sampler.probe_error = state["probe_error"]
        sampler._channels_last = state["channels_last"]
        return sampler

    def __reduce__(self) -> tuple[Any, ...]:
        return Sampler._from_state, (self._state(), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Sampler:
        recorded = self._planned.recorded and replace(self._planned.recorded)
        return Sampler._from_state(copy.deepcopy(self._state(), memo), recorded)

    def _place(self) -> None:
        """Choose the device and the executor."""
        given, recorded = self._device_given, self._planned.recorded
        own = torch.device("cpu") if recorded is None else device_of(recorded.model)
        self._device = own if given is None else torch.device(given)
        self.executor, self._why = choose(self._asked, self._device)

    def _prepared(self, cond: Mapping[str, Tensor], images: range) -> Executor:
        """The executor for some images of the batch that has this conditioning."""
        numbers = self._planned.learn(cond, images)
        key = (self._planned.version, numbers, self.executor, self._device)
        made, known, executor = self._executor
        like = executor if made is self.plan else None
        if like is None or known != key:
            program = self._planned.program(numbers)
            executor = build(self.executor, program, self._device, like)
            self._executor = self.plan, key, executor
        assert executor is not None
        return executor
