"""What a training step of Glow costs: ``glow_training.py --steps 32 --rounds 3``.

The same steps as public implementations write them, with activations kept, and with activations rebuilt:
CPU time, memory beyond parameters and their gradients and what each step adds to it, operations that start a
kernel, reads on the host, and the errors of the gradients against float64. On one thread.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from genperf.bench.measure import peak_bytes
from genperf.benchmarks.ops import bench_glow

READS = ("aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::nonzero")
VIEWS = frozenset(
    f"aten::{name}"
    for name in (
        "alias", "as_strided", "chunk", "detach", "expand", "permute", "select", "slice", "split", "squeeze",
        "t", "transpose", "unbind", "unsqueeze", "view",
    )
)  # fmt: skip

Step = Callable[[dict[str, Any]], list[Tensor]]


class Operations(TorchDispatchMode):
    """Counts them by name, without that of the overload."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


def step(run: Callable[..., tuple[Tensor, ...]]) -> Step:
    """Gradients of the negative log-density per dimension, by x and all parameters."""

    def gradients(inputs: dict[str, Any]) -> list[Tensor]:
        z, logdet = run(**inputs)
        loss = (z.square().sum() / 2 - logdet.sum()) / z.numel()
        return list(torch.autograd.grad(loss, [inputs["x"], *bench_glow.parameters(inputs)]))

    return gradients


VARIANTS: dict[str, Step] = {
    "eager": step(bench_glow.eager),
    "activations kept": step(bench_glow.stored.genperf),  # type: ignore[arg-type]
    "activations rebuilt": step(bench_glow.reversible.genperf),  # type: ignore[arg-type]
}


def problem(steps: int, arguments: argparse.Namespace) -> dict[str, Any]:
    shape = steps, arguments.batch, arguments.channels, arguments.size, arguments.size, arguments.hidden
    inputs = bench_glow.inputs(shape, torch.float32, torch.device("cpu"))
    inputs["x"].requires_grad_()
    return inputs


def peak(run: Step, inputs: dict[str, Any]) -> float:
    return peak_bytes(lambda: None, lambda _: run(inputs), torch.device("cpu")) / 2**20


def relative(got: list[Tensor], exact: list[Tensor]) -> float:
    squares = sum((a.double() - b).square().sum().item() for a, b in zip(got, exact, strict=True))
    return (squares / sum(b.square().sum().item() for b in exact)) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description="What a training step of Glow costs.")
    for name, default in {
        "steps": 32, "rounds": 3, "batch": 16, "channels": 12, "size": 16, "hidden": 512,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    fewer = problem(arguments.steps // 2, arguments)
    memory = {name: [peak(run, fewer)] for name, run in VARIANTS.items()}
    inputs = problem(arguments.steps, arguments)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(arguments.rounds):
        for name, run in VARIANTS.items():
            gc.collect()
            started = time.process_time()
            run(inputs)
            times[name].append(time.process_time() - started)
    exact = VARIANTS["eager"](
        {
            name: value.detach().double().requires_grad_() if name not in ("shape", "initialized") else value
            for name, value in inputs.items()
        }
    )
    rows = []
    for name, run in VARIANTS.items():
        memory[name].append(peak(run, inputs))
        with Operations() as operations:
            gradients = run(inputs)
        kernels = [operation for operation in operations.names if operation not in VIEWS]
        seconds, eager = (statistics.median(times[n]) for n in (name, "eager"))
        less, more = memory[name]
        rows.append(
            (
                name, f"{seconds:.2f} s", f"{seconds / eager:.2f}", f"{more:.1f} MiB",
                f"{(more - less) / (arguments.steps - arguments.steps // 2):.3f} MiB", len(kernels),
                sum(operation in READS for operation in kernels), f"{relative(gradients[:1], exact[:1]):.1e}",
                f"{relative(gradients[1:], exact[1:]):.1e}",
            )
        )  # fmt: skip
    headers = (
        "", "CPU time", "of eager", "memory", "per step", "kernels", "host reads", "error of dx",
        "of parameters",
    )  # fmt: skip
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
