"""A plan that follows its model: recorded again where weights or conditioning are new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from genperf.sampling._conditioning import MOST, Table, row_keys, rows
from genperf.sampling._errors import CaptureError
from genperf.sampling._interface import Interface
from genperf.sampling._ir import Graph
from genperf.sampling._model import fingerprint
from genperf.sampling._plan import Plan, plan, refill
from genperf.sampling._program import Program
from genperf.sampling._recorded import Recorded

NO_MODEL = "this sampler was loaded without its model; give model to Sampler.load"


@dataclass
class Planned:
    """``table`` holds the constants of the rows of conditioning that are known; ``version`` counts how often
    these were forgotten. Other weights are another plan.

    A stale plan is of other weights than the model's, and all rows of it have to be recorded again.
    """

    interface: Interface
    plan: Plan
    recorded: Recorded | None
    table: Table = field(default_factory=Table)
    stale: bool = False
    version: int = 0

    def notice_changes(self) -> None:
        if self.recorded is not None and fingerprint(self.recorded.model) != self.recorded.seen:
            self.stale = True

    def learn(self, cond: Mapping[str, Tensor], images: range) -> tuple[int, ...]:
        """Record what is not known of the model and of the conditioning of some images.

        Returns:
            The rows of the table that these images have; a single one where it is the same for all.
        """
        keys = row_keys(cond, images)
        missing = self._missing(keys, images)
        if missing and self.recorded is None:
            raise RuntimeError(f"sample: a new conditioning has to be recorded; {NO_MODEL}")
        if missing and not self.stale:
            if self.table.nbytes > MOST:
                self._forget()
                missing = self._missing(keys, images)
            graph = self._graph(cond, missing)
            try:
                refill(self.plan, graph)
            except CaptureError:  # a plan may do without constants that are 0
                self.stale = True
                missing = self._missing(keys, images)
        if missing and self.stale:
            self._plan_again(self._graph(cond, missing))
        if missing:
            self.add(list(missing))
        numbers = tuple(self.table.numbers[k] for k in keys)
        return numbers[:1] if len(set(numbers)) == 1 else numbers

    def add(self, keys: Sequence[str]) -> None:
        """The rows that the plan's own constants are of now."""
        self.table.add(keys, self.plan.program)
        self.stale = False

    def program(self, numbers: Sequence[int]) -> Program:
        """For images with these rows of the table."""
        return self.table.program(self.plan.program, numbers)

    def _missing(self, keys: Sequence[str], images: range) -> dict[str, int]:
        """The rows that have to be recorded, and an image that has each."""
        found = dict(zip(keys, images, strict=True))
        return {k: i for k, i in found.items() if self.stale or k not in self.table.numbers}

    def _graph(self, cond: Mapping[str, Tensor], missing: Mapping[str, int]) -> Graph:
        assert self.recorded is not None
        graph = self.recorded.graph(self.interface, rows(cond, list(missing.values())), self.stale)
        head = self.interface.head
        if graph.output.channels != (head.parameters or graph.output.channels):
            raise CaptureError(
                f"the model's output has {graph.output.channels} parameters a pixel now, but head {head} "
                f"reads {head.parameters}; compile it again"
            )
        return graph

    def _plan_again(self, graph: Graph) -> None:
        assert self.recorded is not None
        if self.recorded.seen is None:  # a file's: the model must be the one that was saved
            refill(self.plan, graph)
            self.plan = replace(self.plan)
        else:  # weights that were 0, or are now, make another plan
            self.plan = plan(graph, self.interface.head, self.interface.feedback)
        self.recorded.seen = fingerprint(self.recorded.model)
        self._forget()

    def _forget(self) -> None:
        self.table.clear()
        self.version += 1
