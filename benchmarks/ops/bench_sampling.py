"""Whole images drawn pixel by pixel: shapes are batch x rows x columns.

``naive`` calls the model once a pixel and draws from what it gives there; it is timed for one pixel, in the
middle of the image, and multiplied by the pixels. ``cached`` is the sampler's program run by torch, with line
buffers and rows at once, and a draw of few operations: what a careful user would write. ``graph`` replays
the naive step as a CUDA graph. Weights are random; they decide no timing.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from genperf import _backend
from genperf.bench import Benchmark, Case
from genperf.bench.graph_per_pixel import GraphPerPixel
from genperf.nn import autoregressive
from genperf.sampling import Sampler, compile, heads
from genperf.sampling._explain import Work, work_by_instruction
from genperf.sampling._program import Conv, Head, HeadKind
from genperf.sampling._reference import ReferenceExecutor

MARGIN = 1e-5  # of the uniform number: where a decision is that close, what was drawn stands


def gated_15x128() -> tuple[nn.Module, heads.Description]:
    return autoregressive.GatedPixelCNN(512, 128, 15, 0), heads.Categorical(512)


def gated_8x64() -> tuple[nn.Module, heads.Description]:
    return autoregressive.GatedPixelCNN(256, 64, 8, 0), heads.Categorical(256)


def pixelcnnpp_160() -> tuple[nn.Module, heads.Description]:
    return autoregressive.PixelCNNPP(5, 160, 10), heads.LogisticMixture(10, 3)


def pixelsnail_top() -> tuple[nn.Module, heads.Description]:
    return autoregressive.PixelSNAIL((32, 32), 512), heads.Categorical(512)


Build = Callable[[], tuple[nn.Module, heads.Description]]


@lru_cache(maxsize=1)  # one model at a time is enough memory
def compiled(build: Build, rows: int, cols: int, device: torch.device) -> tuple[nn.Module, Sampler]:
    torch.manual_seed(0)
    model, head = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # else biases are 0 in some models
                parameter.normal_(std=0.1)
    shape = (rows, cols) if head.values == 1 else (head.values, rows, cols)
    model = model.to(device).eval()
    return model, compile(model, shape, head)


def inputs_of(build: Build) -> Callable[[tuple[int, ...], torch.dtype, torch.device], dict[str, Any]]:
    def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        batch, rows, cols = shape
        model, sampler = compiled(build, rows, cols, device)
        head = sampler.program.head
        key = torch.tensor([1, 0])
        noise = heads.make_noise(head, key, range(batch), device)
        if head.kind == HeadKind.CATEGORICAL:
            x = torch.randint(head.classes, (batch, *sampler.shape), device=device)
        else:
            x = 2 * torch.rand(batch, *sampler.shape, device=device) - 1
        cache = ReferenceExecutor(sampler.program, device, draw=quick_draw)
        return {"model": model, "sampler": sampler, "cache": cache, "noise": noise, "x": x}

    return inputs


def middle(sampler: Sampler) -> tuple[int, int]:
    return sampler.program.head.rows // 2, sampler.program.head.cols // 2


def quick_draw(head: Head, params: Tensor, noise: Tensor, *_: Any) -> Tensor:
    """:func:`heads.draw`, without options, in as few operations as torch needs."""
    if head.kind != HeadKind.CATEGORICAL:
        return heads.draw(head, params, noise)
    sums = params[:, : head.classes].softmax(1).cumsum(1)
    return torch.searchsorted(sums, noise * sums[:, -1:]).clamp_(max=head.classes - 1).float()


def naive(model: nn.Module, sampler: Sampler, noise: Tensor, x: Tensor, **_: Any) -> tuple[Tensor, ...]:
    """One pixel of the loop."""
    y, col = middle(sampler)
    params = model(x)[..., y, col]
    return (quick_draw(sampler.program.head, params, noise[:, y, col]),)


def cached(sampler: Sampler, noise: Tensor, cache: ReferenceExecutor, **_: Any) -> tuple[Tensor, ...]:
    state = cache.start(len(noise))
    cache.run(state, 0, sampler.program.slots, noise)
    return (state.values,)


def graph(model: nn.Module, sampler: Sampler, noise: Tensor, x: Tensor, **_: Any) -> tuple[Tensor, ...]:
    if not x.is_cuda:
        raise NotImplementedError("CUDA graphs need a CUDA device")
    head = sampler.program.head

    def draw(params: Tensor, noise: Tensor) -> Tensor:
        values = quick_draw(head, params, noise)
        return values[:, 0] if head.values == 1 else values

    return (as_values(sampler, GraphPerPixel(model, sampler.shape, draw, x.dtype).sample(noise)),)


def genperf(sampler: Sampler, noise: Tensor, **_: Any) -> tuple[Tensor, ...]:
    return (as_values(sampler, sampler.sample(len(noise), noise=noise)),)


def as_values(sampler: Sampler, x: Tensor) -> Tensor:
    """Samples as float32 [batch, rows, columns, values]."""
    head = sampler.program.head
    return x.reshape(len(x), head.values, head.rows, head.cols).permute(0, 2, 3, 1).float()


def reference(
    model: nn.Module, sampler: Sampler, noise: Tensor, x: Tensor, drawn: Tensor, **_: Any
) -> tuple[Tensor, ...]:
    """What float64 draws at each pixel, given what was drawn before; where that is close, what was drawn."""
    head = sampler.program.head
    whole = drawn.dim() == 4
    values = drawn if whole else as_values(sampler, x)
    image = values.permute(0, 3, 1, 2).reshape(len(values), *sampler.shape)
    out = copy.deepcopy(model).double()(
        image.double() if head.kind == HeadKind.LOGISTIC_MIXTURE else image.long()
    )
    cells = [divmod(i, head.cols) for i in range(head.rows * head.cols)] if whole else [middle(sampler)]
    found = []
    for y, col in cells:
        params, own = out[..., y, col], noise[:, y, col]
        true = heads.draw(head, params, own)
        close = heads.margin(head, params, own) < MARGIN
        found.append(torch.where(close[:, None], values[:, y, col] if whole else drawn, true))
    return (torch.stack(found, 1).view_as(drawn),)


def draws(provider: str, inputs: dict[str, Any], outputs: tuple[Tensor, ...]) -> dict[str, Any]:
    return {"drawn": outputs[0].double(), "noise": inputs["noise"]}


def floor(inputs: dict[str, Any]) -> float:
    """Seconds for reading the weights of what runs once a pixel and multiplying by those of whole rows.

    Rates are measured here: of reads from memory of the size of the weights, and of a large product.
    """
    sampler, batch = inputs["sampler"], len(inputs["noise"])
    program, roles = sampler.program, sampler.plan.roles
    works = work_by_instruction(program)
    in_row = sum(w.weight_bytes / w.segments for w, r in zip(works, roles, strict=True) if r in _BY_PIXEL)
    stream, product = read_rate(int(in_row) // 4), matrix_rate()
    return sum(
        max(batch * work.flops / product, work.weight_bytes / stream)
        for work, i in zip(works, program.instructions, strict=True)
        if isinstance(i, Conv)
    )


_BY_PIXEL = ("pixel", "prefetch")


def read_rate(floats: int) -> float:
    """Bytes a second, when so many floats are read over and over by one thread."""
    x = torch.rand(floats)
    times = []
    for _ in range(7):
        begin = time.process_time()
        for _ in range(20):
            _backend.native.cpu.sum_floats(x)
        times.append(time.process_time() - begin)
    return 20 * 4 * floats / min(times)


def matrix_rate() -> float:
    """Operations a second in a product of 1024 x 1024 matrices."""
    a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
    times = []
    for _ in range(5):
        begin = time.process_time()
        torch.mm(a, b)
        times.append(time.process_time() - begin)
    return 2 * 1024**3 / min(times)


def works(build: Build, shape: tuple[int, ...]) -> list[Work]:
    """Of an image, by instruction."""
    return work_by_instruction(compiled(build, *shape[1:], torch.device("cpu"))[1].program)


def benchmark(op: str, build: Build, cases: tuple[tuple[int, ...], ...]) -> Benchmark:
    return Benchmark(
        op=op,
        cases=tuple(Case(shape, modes=("sample",)) for shape in cases),
        inputs=inputs_of(build),
        reference=reference,
        genperf=genperf,
        bytes=lambda shape, dtype, mode: int(sum(w.weight_bytes for w in works(build, shape))),
        flops=lambda shape, dtype, mode: int(shape[0] * sum(w.flops for w in works(build, shape))),
        baselines={"naive": naive, "cached": cached, "graph": graph},
        draws=draws,
        backends=("cpu", "cuda"),
        compile=False,
        group="sampling",
        parts={"naive": lambda shape: math.prod(shape[1:])},
        floor=floor,
    )


gated_15 = benchmark("gated_pixelcnn_15x128", gated_15x128, ((1, 32, 32), (16, 32, 32)))
gated_8 = benchmark("gated_pixelcnn_8x64", gated_8x64, ((1, 28, 28),))
plus_plus = benchmark("pixelcnnpp_160", pixelcnnpp_160, ((1, 32, 32),))
snail = benchmark("pixelsnail_top", pixelsnail_top, ((1, 32, 32),))
