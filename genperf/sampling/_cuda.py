"""The CUDA executor: one launch of a persistent kernel for many slots of a batch of images.

Compiled and emulated; what has run on a device is in docs/gpu_status.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import cuda_stream

from ._cuda_cost import DEVICES, Device, TeamPlan, best_team
from ._cuda_steps import WARPS, Stream, build
from ._kernel_executor import KernelExecutor
from ._program import HeadKind, Program, pack_weight


@dataclass
class CUDAState:
    """One batch of images under way.

    ``workspace`` float32 [teams, floats of a team] holds the line buffers: images are split among teams,
    ``images`` each (the last may have fewer). ``values`` is float32 [B, rows, cols, values].
    """

    batch: int
    workspace: Tensor
    values: Tensor
    team: TeamPlan
    images: int
    stream: Stream
    entries: Tensor
    steps: Tensor
    resident: Tensor
    scratch: Tensor
    arrived: Tensor


class CUDAExecutor(KernelExecutor):
    """Runs a program with the persistent CUDA kernel, in float32.

    The values are the same bits for any batch and any team, and those of :class:`CPUExecutor`.

    Args:
        team: blocks of a team and their kind; by default the best for each batch by the cost model.

    Raises:
        RuntimeError: where the kernels are not built in.
        ValueError: for a device without CUDA, or another dtype than float32.
    """

    makes_noise = True

    def __init__(
        self,
        program: Program,
        device: torch.device | str = "cuda",
        dtype: torch.dtype = torch.float32,
        team: TeamPlan | None = None,
    ) -> None:
        if dtype != torch.float32:
            raise ValueError(f"CUDAExecutor: dtype: {dtype}; expected torch.float32")
        target = torch.device(device)
        if reason := _backend.unusable("cuda", target.type):
            raise RuntimeError(f"CUDAExecutor: device {target}: {reason}")
        super().__init__(program, target)
        self.team = team
        self._weights = [pack_weight(w.detach()).to(self.device) for w in program.weights]
        taps = torch.tensor(program.taps, dtype=torch.int32).view(-1, 2)
        self._taps = taps.to(self.device).view(torch.float32)
        self._head = program.tables()["head"].view(-1)
        self.hardware = _hardware(self.device)
        self._streams: dict[tuple[TeamPlan, int], tuple[Stream, tuple[Tensor, Tensor, Tensor]]] = {}

    def start(self, batch: int) -> CUDAState:
        """Memory for ``batch`` images; to be followed by :meth:`run` from slot 0."""
        head = self.program.head
        team = self.team or best_team(self.program, batch, self.hardware)
        images = max(1, -(-batch // team.teams))
        teams = max(1, -(-batch // images))
        key = (team, images)
        if key not in self._streams:
            stream = build(
                self.program, images, team.size, self._tensors, self._weights, self.hardware.shared_bytes
            )
            # The binding knows no integers of 32 bits.
            on_device = tuple(
                t.to(self.device).view(torch.float32) for t in (stream.entries, stream.steps, stream.resident)
            )
            self._streams[key] = stream, on_device  # type: ignore[assignment]
        stream, (entries, steps, resident) = self._streams[key]
        memory = stream.memory
        scratch = 0 if memory.head_in_shared else teams * team.size * WARPS * memory.head
        return CUDAState(
            batch,
            # Each team's begins at 16 bytes.
            torch.empty(teams, -(-self.program.workspace * images // 4) * 4, device=self.device),
            torch.empty(batch, head.rows, head.cols, head.values, device=self.device),
            team, images, stream, entries, steps, resident,
            torch.empty(scratch, device=self.device),
            torch.zeros(teams, 32, device=self.device),
        )  # fmt: skip

    def run(
        self,
        state: CUDAState,
        begin: int,
        end: int,
        noise: Tensor | None,
        temperature: float = 1.0,
        top_k: int = 0,
        known: tuple[Tensor, Tensor] | None = None,
        key: Tensor | None = None,
        images: Tensor | None = None,
    ) -> None:
        """Slots ``begin`` to ``end - 1``, in one launch: see :meth:`ReferenceExecutor.run`.

        Can be captured in a CUDA graph where all arguments are already on the device, contiguous and of the
        dtypes named here.

        Args:
            key: int64 [2], instead of ``noise``: the kernel makes what ``make_noise(head, key, images)`` is.
            images: int64 [B], with ``key``; 0, 1, ... by default.
        """
        if noise is None and key is None and self.program.head.kind != HeadKind.CALLBACK:
            raise ValueError(
                "CUDAExecutor.run: noise: None; expected a tensor, or a key, for a head that draws"
            )
        shape, device = state.values.shape, self.device
        noise = None if noise is None else noise.to(device, torch.float32).contiguous()
        values = mask = None
        if known is not None:
            values = known[0].to(device, torch.float32).expand(shape).contiguous()
            mask = known[1].to(device, torch.bool).expand(shape).contiguous()
        key = None if key is None else key.to(device, torch.int64).contiguous()
        images = None if images is None else images.to(device, torch.int64).contiguous()
        memory, offsets = state.stream.memory, state.stream.begin
        _backend.cuda_functions().pixel_sampler(
            state.entries, state.steps, state.resident, self._taps, state.workspace, state.values,
            noise, key, images, values, 0 if mask is None else mask.data_ptr(), state.scratch, state.arrived,
            self._head, offsets[begin], offsets[end], state.images, state.team.size,
            state.team.kind == "cluster", memory.sources, memory.head, memory.resident,
            memory.head_in_shared, temperature, top_k, cuda_stream(state.values),
        )  # fmt: skip


def _hardware(device: torch.device) -> Device:
    """The device that the cost model is asked about; an H100 where CUDA is emulated."""
    if device.type != "cuda":
        return DEVICES["H100"]
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 48 << 10)
    clusters = (0, 0)
    if properties.major >= 9:
        count = _backend.cuda_functions().pixel_sampler_clusters
        clusters = next(((size, n) for size in (16, 8, 4) if (n := count(size, shared)) > 0), (0, 0))
    return DEVICES["H100"].like(properties.name, properties.multi_processor_count, shared, *clusters)
