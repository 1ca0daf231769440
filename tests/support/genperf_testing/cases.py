"""How an op is called, for the contract: a table ``CASES`` in each tests/ops/test_<op>.py."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genperf_testing.backends import TESTS, load

Shape = tuple[int, ...]

#: Odd and even, shorter and longer than a vector and a tile, of one sample, and empty.
SHAPES: tuple[Shape, ...] = ((5, 24), (3, 7), (1, 1), (2, 3, 5, 4), (2, 1100), (1, 2, 3, 2, 2, 3), (7,))
EMPTY: tuple[Shape, ...] = ((0,), (0, 4), (3, 0), (0, 2, 3))


@dataclass(frozen=True)
class Case:
    """One way to call an op.

    Attributes:
        name: unique among the op's cases.
        function: from the tensors of ``inputs`` and ``constants`` to the outputs, some of which may be None.
        inputs: for a shape [B, *] the float tensors of that shape that the op is differentiable in.
        constants: for a shape the other tensors, such as a key.
        shapes: which shapes it takes; ``shapes[0]`` is a small one with two dimensions.
        smooth: whether finite differences at ``inputs`` give the gradient.
        elementwise: whether an output of that shape, and the gradients, depend on nothing but the inputs
            at the same place, and outputs [B] on nothing but their sample.
        per_sample: whether dimension 0 of every tensor is that of the batch, so that a sample can be
            computed alone.
        nan_as_reference: whether a NaN reaches the places that it reaches in the reference; not so where
            an op leaves out products with zero, which then has tests of its own for this.
        saves_outputs: whether backward keeps results of forward.
        packs: whether ``function`` makes one tensor of the inputs, which the op may then keep.
        backends: which the op has.
    """

    name: str
    function: Callable[..., Sequence[Tensor | None]]
    inputs: Callable[[Shape], Sequence[Tensor]] = lambda shape: ()
    constants: Callable[[Shape], Sequence[Tensor]] = lambda shape: ()
    shapes: tuple[Shape, ...] = SHAPES + EMPTY
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    smooth: bool = True
    elementwise: bool = True
    per_sample: bool = False
    nan_as_reference: bool = True
    saves_outputs: bool = False
    packs: bool = False
    backends: tuple[str, ...] = ("reference", "cpu", "triton", "cuda")

    def tensors(
        self, shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and constants; floats among both have the dtype."""
        return (
            [x.to(device, dtype) for x in self.inputs(shape)],
            [x.to(device, dtype if x.is_floating_point() else x.dtype) for x in self.constants(shape)],
        )


def normals(shape: Shape, *seed: object) -> Tensor:
    """Standard normals that depend on nothing but the arguments."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr((shape, *seed)).encode()))
    return torch.randn(shape, generator=generator)


@functools.cache
def all_cases() -> dict[str, tuple[Case, ...]]:
    """For each op its cases."""
    files = sorted((TESTS / "ops").glob("test_*.py"))
    modules = {path.stem.removeprefix("test_"): load(path, f"genperf_cases.{path.stem}") for path in files}
    return {op: tuple(module.CASES) for op, module in modules.items()}
