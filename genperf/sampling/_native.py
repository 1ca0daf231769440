"""The CPU executor: a program packed for ``csrc/pixel_sampler``, and one native call for many slots."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genperf import _backend

from ._kernel_executor import KernelExecutor
from ._program import (
    PANEL,
    Attention,
    Const,
    Conv,
    Embed,
    HeadKind,
    Instruction,
    Pointwise,
    Program,
    pack_weight,
)

ALIGNMENT = 64  # bytes
_FLOAT = 4


def aligned(floats: int) -> Tensor:
    """Uninitialised float32 [floats] whose address is a multiple of ``ALIGNMENT``."""
    slack = ALIGNMENT // _FLOAT
    storage = torch.empty(floats + slack, dtype=torch.float32)
    first = -storage.data_ptr() % ALIGNMENT // _FLOAT
    return storage[first : first + floats]


@dataclass
class CPUState:
    """One batch of images under way: ``workspace`` and ``values`` as in the reference executor."""

    batch: int
    workspace: Tensor
    values: Tensor
    scratch: Tensor

    @property
    def images(self) -> int:
        return self.batch


class CPUExecutor(KernelExecutor):
    """Runs a program with the native CPU kernels, in float32, on ``torch.get_num_threads()`` threads.

    The values are the same bits for any number of threads and whatever else is in the batch.

    Args:
        like: an executor of a program with the same weights, to share them.
    """

    makes_noise = False

    def __init__(
        self,
        program: Program,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        like: CPUExecutor | None = None,
    ) -> None:
        if torch.device(device).type != "cpu":
            raise ValueError(f"CPUExecutor: device: {device}; expected the CPU")
        if dtype != torch.float32:
            raise ValueError(f"CPUExecutor: dtype: {dtype}; expected torch.float32")
        if _backend.native is None:
            raise RuntimeError(f"CPUExecutor: {_backend.unusable('cpu', 'cpu')}")
        super().__init__(program, torch.device("cpu"))
        self._weights: list[Tensor] = _pack(program) if like is None else like._weights
        consts = self._channels_last(program)
        tables = replace(program, consts=consts).tables()
        self._segments = program.segments.to("cpu", torch.int32).contiguous()
        self._slot_begin = program.slot_begin.to("cpu", torch.int64).contiguous()
        self._plan = _backend.native.cpu.PixelSampler(
            tables["head"], tables["buffers"], tables["consts"], tables["operands"], tables["taps"],
            tables["instructions"], self._segments.data_ptr(), len(self._segments), self._slot_begin,
            self._tensors, self._weights,
        )  # fmt: skip

    def start(self, batch: int) -> CPUState:
        """Memory for ``batch`` images; to be followed by :meth:`run` from slot 0."""
        head = self.program.head
        values = torch.empty(batch, head.rows, head.cols, head.values)
        return CPUState(batch, aligned(self.program.workspace * batch), values, aligned(0))

    def run(
        self,
        state: CPUState,
        begin: int,
        end: int,
        noise: Tensor | None,
        temperature: float = 1.0,
        top_k: int = 0,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Slots ``begin`` to ``end - 1``, in one native call: see :meth:`ReferenceExecutor.run`."""
        threads = torch.get_num_threads()
        if len(state.scratch) < threads * self._plan.scratch:
            state.scratch = aligned(threads * self._plan.scratch)
        noise = None if noise is None else noise.to("cpu", torch.float32).contiguous()
        if noise is None and self.program.head.kind != HeadKind.CALLBACK:
            raise ValueError("CPUExecutor.run: noise: None; expected a tensor for a head that draws")
        values = mask = None
        if known is not None:
            values = known[0].to("cpu", torch.float32).expand(state.values.shape).contiguous()
            mask = known[1].to("cpu", torch.bool).expand(state.values.shape).contiguous()
        self._plan.run(
            state.workspace.data_ptr(), state.values.data_ptr(), _address(noise), _address(values),
            _address(mask), state.scratch.data_ptr(), state.batch, begin, end, temperature, top_k, threads,
        )  # fmt: skip

    def _channels_last(self, program: Program) -> list[Const]:
        """The constants, with a copy of those whose channels are not side by side."""
        consts = list(program.consts)
        for index, const in enumerate(consts):
            if const.stride_c == 1:
                continue
            rows, cols, channels = _extent(program, index)
            batch = _images(self._tensors[const.index], const, rows, cols, channels)
            strides = (const.stride_b, const.stride_y, const.stride_x, const.stride_c)
            sizes = (batch, rows if const.stride_y else 1, cols if const.stride_x else 1, channels)
            copy = torch.as_strided(self._tensors[const.index], sizes, strides).contiguous()
            own = [s if strides[d] else 0 for d, s in enumerate(copy.stride()[:3])]
            consts[index] = Const(len(self._tensors), own[0], own[1], own[2], 1)
            self._tensors.append(copy)
        return consts


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _pack(program: Program) -> list[Tensor]:
    """The weights, one after another in aligned memory."""
    shapes = [(-(-w.shape[2] // PANEL), w.shape[0] * w.shape[1], PANEL) for w in program.weights]
    storage = aligned(sum(p * k * n for p, k, n in shapes))
    packed, at = [], 0
    for weight, (panels, depth, width) in zip(program.weights, shapes, strict=True):
        view = storage[at : at + panels * depth * width].view(panels, depth, width)
        packed.append(view.copy_(pack_weight(weight.detach().cpu())))
        at += view.numel()
    return packed


def _operands(i: Instruction) -> list[tuple[int, int]]:
    """The operands that an instruction reads, with how many channels of each."""
    if isinstance(i, Conv):
        return [(i.source, i.channels_in), (i.init, i.channels)]
    if isinstance(i, Pointwise):
        return [(i.a, i.channels), (i.b, i.channels)]
    if isinstance(i, Attention):
        return [(i.q, i.heads * i.dim_k), (i.k, i.heads * i.dim_k), (i.v, i.heads * i.dim_v)]
    assert isinstance(i, Embed)
    return [(i.init, i.channels)]


def _extent(program: Program, const: int) -> tuple[int, int, int]:
    """How many rows, columns and channels of a constant are read at most."""
    extent = [1, 1, 1]
    segments = program.segments.long()
    for index, i in enumerate(program.instructions):
        own = segments[segments[:, 0] == index]
        if not len(own):
            continue
        last = int(own[:, 1].max()), int((own[:, 2] + own[:, 3]).max()) - 1
        for number, channels in _operands(i):
            op = program.operands[number]
            if number < 0 or not op.is_const or op.index != const:
                continue
            reach = [last[0] + op.dy, last[1] + op.dx]
            if isinstance(i, Conv) and number == i.source:
                taps = program.taps[i.tap_begin : i.tap_end]
                reach = [
                    (last[d] * i.num + max(t[d] for t in taps)) // i.den + (op.dy, op.dx)[d] for d in (0, 1)
                ]
            if isinstance(i, Attention) and number != i.q:
                reach = [last[0] + op.dy, i.cols - 1 + op.dx]
            extent[0] = max(extent[0], min(reach[0] + 1, op.y1))
            extent[1] = max(extent[1], min(reach[1] + 1, op.x1))
            extent[2] = max(extent[2], op.channel + channels)
    return extent[0], extent[1], extent[2]


def _images(tensor: Tensor, const: Const, rows: int, cols: int, channels: int) -> int:
    """Images that a constant holds."""
    if const.stride_b == 0:
        return 1
    last = (rows - 1) * const.stride_y + (cols - 1) * const.stride_x + (channels - 1) * const.stride_c
    return (tensor.numel() - 1 - last) // const.stride_b + 1
