"""What the persistent CUDA kernel is predicted to take, and the choice of team that rests on it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from ._cuda_hazards import Hazards
from ._cuda_steps import THREADS, Tile, _memory, depth, in_row, panels, tile_of
from ._program import BLOCK, PANEL, Attention, Conv, Embed, HeadKind, Program


@dataclass(frozen=True)
class Device:
    """What the cost model knows of a GPU. Seconds, bytes, bytes and operations a second."""

    name: str
    multiprocessors: int
    shared_bytes: int  # of a block
    cluster: int  # blocks of the largest thread-block cluster; 0: none
    clusters: int  # that run at once
    hbm: float = 3.0e12
    l2: float = 5.5e12
    grid_barrier: float = 1.0e-6
    cluster_barrier: float = 0.3e-6
    fma_rate: float = 60e12  # float32, two operations a fused multiply-add
    fma_latency: float = 4 / 1.755e9
    step: float = 0.15e-6  # barriers of a block and a read of the line buffers from L2

    def like(self, name: str, multiprocessors: int, shared_bytes: int, cluster: int, clusters: int) -> Device:
        """Another device, with rates in proportion to its multiprocessors."""
        share = multiprocessors / self.multiprocessors
        return replace(
            self,
            name=name,
            multiprocessors=multiprocessors,
            shared_bytes=shared_bytes,
            cluster=cluster,
            clusters=clusters,
            l2=self.l2 * share,
            fma_rate=self.fma_rate * share,
        )


DEVICES = {
    "H100": Device("H100", 132, 227 << 10, 16, 8),
    "A100": Device(
        "A100", 108, 163 << 10, 0, 0, hbm=1.4e12, l2=3.5e12, fma_rate=19.5e12, fma_latency=4 / 1.41e9
    ),
}


@dataclass(frozen=True)
class TeamPlan:
    """Blocks of a team, which is a thread-block cluster or part of a cooperative grid; and teams."""

    kind: Literal["cluster", "grid"]
    size: int
    teams: int


@dataclass(frozen=True)
class Prediction:
    """Of one image batch. Times in seconds; ``total`` is a floor: the kernel cannot be faster than its parts.

    ``phases`` are barriers of a team a pixel, ``steps`` are steps a pixel. ``chains`` is the latency of the
    chains of fused multiply-adds, ``weights`` the reading of weights that are not kept in shared memory,
    ``products`` the arithmetic; of these three the longest counts for each step.
    """

    device: str
    team: TeamPlan
    batch: int
    phases: float
    steps: float
    flops: float
    weight_bytes: float
    resident: float  # share of the in-row weights kept in shared memory
    barriers: float
    chains: float
    weights: float
    products: float
    overhead: float
    total: float

    def __str__(self) -> str:
        team = f"{self.team.teams} x {self.team.kind} of {self.team.size} blocks"
        products = self.total - self.barriers - self.overhead
        return (
            f"{self.device}, batch {self.batch}: {team}; {self.phases:.1f} phases and {self.steps:.1f} steps "
            f"a pixel; predicted {self.total * 1e3:.1f} ms = barriers {self.barriers * 1e3:.1f} + steps "
            f"{self.overhead * 1e3:.1f} + products {products * 1e3:.1f} (chains {self.chains * 1e3:.1f}, "
            f"weights {self.weights * 1e3:.1f}, flops {self.products * 1e3:.1f}); {self.resident:.0%} of the "
            "in-row weights in shared memory"
        )


def _serial_products(i: Conv, tile: Tile, cells: int, size: int) -> int:
    """Products that one thread works through one after another."""
    k, rounds = depth(i), max(1, -(-panels(i) // size))
    if tile.thread == 0:
        together = max(1, THREADS // (tile.cells * PANEL))
        return max(1, -(-rounds * -(-k // BLOCK) // together)) * min(k, BLOCK)
    tiles = -(-cells // tile.cells)
    return k * max(1, -(-tiles * panels(i) // (size * max(1, THREADS * tile.thread // (4 * tile.cells)))))


def predict(
    program: Program, batch: int, device: str | Device = "H100", team: TeamPlan | None = None
) -> Prediction:
    """The predicted time of one image batch, of the best team or a given one.

    Assumed of an H100, not measured: 3.0 TB/s from HBM, 5.5 TB/s from L2, 1 us a barrier of a grid, 0.3 us
    of a cluster, 60 TFLOP/s of float32, 4 cycles at 1.755 GHz a dependent multiply-add, 0.15 us a step.
    """
    hardware = DEVICES[device] if isinstance(device, str) else device
    if team is None:
        team = best_team(program, batch, hardware)
    images = max(1, -(-batch // team.teams))
    often = in_row(program)
    memory = _memory(program, images, program.tensors, hardware.shared_bytes)
    share = team.size / hardware.multiprocessors  # of the device, that one team has
    barrier = hardware.cluster_barrier if team.kind == "cluster" else hardware.grid_barrier
    runs = Counter(program.segments[:, 0].tolist())
    floats = {
        k: panels(i) * PANEL * depth(i) for k, i in enumerate(program.instructions) if isinstance(i, Conv)
    }
    hazards = Hazards(program, team.size, images)
    room, kept = memory.resident * team.size, set()
    for k in sorted(often, key=lambda k: -runs[k]):
        if floats[k] <= room:
            room -= floats[k]
            kept.add(k)
    chains = weights = products = longest = flops = weight_bytes = 0.0
    for (k, cols), count in Counter(map(tuple, program.segments[:, [0, 3]].tolist())).items():
        i = program.instructions[k]
        cells = cols * images
        if isinstance(i, Attention):
            done = (
                2.0 * cells * i.heads * (i.dim_k + i.dim_v) * program.tensors[i.count].double().mean().item()
            )
            chain, read = i.dim_k + BLOCK, 0.0
        elif isinstance(i, Conv):
            done = 2.0 * cells * depth(i) * i.channels
            tile = tile_of(i, cells, team.size, memory.sources, k not in often)
            chain = _serial_products(i, tile, cells, team.size)
            read = 0.0 if k in kept else 4.0 * floats[k]
        elif isinstance(i, Embed):
            done = 1.0 * cells * i.channels * (i.tap_end - i.tap_begin)
            each = 1 if hazards.shared(k, cols) else team.size
            chain, read = 0, 4.0 * done * each
        else:
            continue
        times = (
            chain * hardware.fma_latency,
            read / (hardware.l2 * share),
            done / (hardware.fma_rate * share),
        )
        chains += count * times[0]
        weights += count * times[1]
        products += count * times[2]
        longest += count * max(times)
        flops += count * done
        weight_bytes += count * read
    slot_begin, found = program.slot_begin.tolist(), 0
    pairs = [tuple(p) for p in program.segments[:, [0, 3]].tolist()]
    known: dict[tuple, int] = {}
    for slot in range(program.slots):
        key = tuple(pairs[slot_begin[slot] : slot_begin[slot + 1]])
        if key not in known:
            known[key] = sum(hazards.barriers(key, True))
        found += known[key]
    if team.size > 1 and program.head.kind != HeadKind.CALLBACK:
        found += program.slots
    pixels = program.head.rows * program.head.cols
    steps = len(program.segments) + 2 * program.slots
    # Teams beyond what runs at once wait for the others.
    rounds = -(-team.teams * team.size // hardware.multiprocessors)
    in_row_bytes = sum(floats[k] for k in often)
    times = (found * barrier if team.size > 1 else 0.0, steps * hardware.step, longest)
    return Prediction(
        hardware.name, team, batch, found / pixels, steps / pixels,
        flops * batch / images, weight_bytes * team.teams,
        sum(floats[k] for k in kept) / in_row_bytes if in_row_bytes else 1.0,
        rounds * times[0], rounds * chains, rounds * weights, rounds * products, rounds * times[1],
        rounds * sum(times),
    )  # fmt: skip


def candidates(batch: int, device: Device) -> list[TeamPlan]:
    """Clusters, parts of a grid and single blocks, as many as run at once and have an image."""
    found, size = [], device.cluster
    while size > 1:
        most = device.clusters * (device.cluster // size)
        found.append(TeamPlan("cluster", size, max(1, min(most, batch))))
        size //= 2
    teams = 1
    while teams <= min(batch, device.multiprocessors // 2):
        found.append(TeamPlan("grid", device.multiprocessors // teams, teams))
        teams *= 2
    found.append(TeamPlan("grid", 1, max(1, min(batch, device.multiprocessors))))
    return found


def best_team(program: Program, batch: int, device: Device) -> TeamPlan:
    """The team of the least predicted time."""
    return min(candidates(batch, device), key=lambda team: predict(program, batch, device, team).total)
