"""One batch of images, drawn a value at a time by the caller."""

from __future__ import annotations

from torch import Tensor

from genperf.sampling._executors import Executor


class Steps:
    """What :meth:`genperf.sampling.Sampler.steps` gives: :meth:`params` and :meth:`feed`, in turns.

    Attributes:
        slots: draws of an image in all.
        slot: number of the next draw.
    """

    def __init__(self, executor: Executor, batch: int) -> None:
        self.slots = executor.program.slots
        self.slot = 0
        self._executor = executor
        self._state = executor.start(batch)

    def params(self) -> Tensor:
        """The model's output at the next pixel [B, P], a view that is valid until :meth:`feed`."""
        self._executor.run(self._state, self.slot, self.slot + 1, None)
        return self._executor.params(self._state, self.slot)

    def feed(self, values: Tensor) -> None:
        """Take ``values`` [B] as what was drawn; :meth:`params` must have been called for them."""
        self._executor.feed(self._state, self.slot, values)
        self.slot += 1
