"""What every op promises on every backend, as functions that raise AssertionError where it is not kept."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import genperf
from genperf_testing.cases import Case, Shape, normals

EPSILON = torch.finfo(torch.float32).eps

#: Roundings, in float32, by which a kernel may differ from the yardstick's order of operations even where
#: that one happens to be exact: an elementary function within 1 ulp, and the sum of at most three terms.
FLOOR = 6


@dataclass
class Results:
    """Outputs, and gradients of the inputs for the cotangents; None for those not depended on."""

    outputs: list[Tensor]
    gradients: list[Tensor | None]
    cotangents: list[Tensor]

    def all(self) -> list[Tensor]:
        return self.outputs + [g for g in self.gradients if g is not None]


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


def _outputs(case: Case, *tensors: Tensor) -> list[Tensor]:
    return [y for y in case.function(*tensors) if y is not None]


def _cotangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [normals(tuple(y.shape), "cotangent", i).to(y) for i, y in enumerate(outputs)]


def run(
    case: Case, inputs: Sequence[Tensor], constants: Sequence[Tensor], cotangents: list[Tensor] | None = None
) -> Results:
    """Forward and backward."""
    leaves = _leaves(inputs)
    outputs = _outputs(case, *leaves, *constants)
    if cotangents is None:
        cotangents = _cotangents(outputs)
    gradients: list[Tensor | None] = []
    differentiable = [(y, g) for y, g in zip(outputs, cotangents, strict=True) if y.requires_grad]
    if differentiable:
        gradients = list(
            torch.autograd.grad(
                [y for y, _ in differentiable], leaves, [g for _, g in differentiable], allow_unused=True
            )
        )
    return Results([y.detach() for y in outputs], gradients, cotangents)


def _double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.double() if x.is_floating_point() else x for x in tensors]


def _exact(
    case: Case, inputs: Sequence[Tensor], constants: Sequence[Tensor], cotangents: list[Tensor]
) -> Results:
    """The reference in float64, at these very inputs and cotangents."""
    with genperf.backend("reference"):
        return run(case, _double(inputs), _double(constants), _double(cotangents))


def same(actual: Tensor | None, expected: Tensor | None) -> bool:
    """Whether two results agree bit for bit, a NaN being equal to any NaN."""
    if actual is None or expected is None:
        return actual is expected
    return actual.dtype == expected.dtype and torch.equal(
        torch.nan_to_num(actual.detach(), nan=12345.0), torch.nan_to_num(expected.detach(), nan=12345.0)
    )


def _difference(actual: Tensor | None, expected: Tensor | None) -> str:
    if actual is None or expected is None or actual.shape != expected.shape:
        return ""
    places = (~torch.isclose(actual, expected, rtol=0, atol=0, equal_nan=True)).nonzero()
    if len(places) == 0:
        return f": {actual.dtype}, expected {expected.dtype}"
    first = tuple(places[0].tolist())
    return f" in {len(places)} places; at {first} {actual[first]:.9g}, expected {expected[first]:.9g}"


def assert_same(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None], what: str) -> None:
    assert len(actual) == len(expected), f"{what}: {len(actual)} results, expected {len(expected)}"
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert same(a, e), f"{what}: result {i} differs{_difference(a, e)}"


@dataclass(frozen=True)
class Truth:
    """What a case should give: exactly, as torch gives it, and what an ulp of the inputs changes.

    ``weights`` are the units in which errors count: an element's own size, the median size, and the largest
    change, in several tries, when every input, constant and cotangent moves by one float32 roundoff.
    """

    exact: Results
    yardstick: Results
    weights: list[Tensor | None]


@functools.lru_cache(maxsize=512)
def truth_of(case: Case, shape: Shape, dtype: torch.dtype, device: str) -> Truth:
    inputs, constants = case.tensors(shape, dtype, device)
    with genperf.backend("reference"):
        yardstick = run(case, inputs, constants)
    exact = _exact(case, inputs, constants, yardstick.cotangents)

    def moved(tensors: Sequence[Tensor], *seed: object) -> list[Tensor]:
        return [
            x.double() * (1 + EPSILON * normals(tuple(x.shape), i, *seed).sign().to(x.device))
            if x.is_floating_point()
            else x
            for i, x in enumerate(tensors)
        ]

    weights: list[Tensor | None] = [
        None if e is None else e.double().abs() for e in exact.outputs + exact.gradients
    ]
    weights = [w if w is None or w.numel() == 0 else w + w.median() for w in weights]
    for i in range(3):
        near = _exact(case, moved(inputs, i), moved(constants, i, "c"), moved(yardstick.cotangents, i, "g"))
        changes = zip(near.outputs + near.gradients, exact.outputs + exact.gradients, strict=True)
        for k, (n, e) in enumerate(changes):
            if e is not None:
                weights[k] = torch.maximum(weights[k], weights[k] + (n - e).abs() / EPSILON)
    return Truth(exact, yardstick, weights)


def assert_accurate(
    actual: Tensor, yardstick: Tensor | None, exact: Tensor, weight: Tensor, what: str
) -> None:
    """err(actual) <= 2 err(yardstick) + FLOOR, in units of ``weight``.

    Without a yardstick, torch's error is taken as eight roundings in float32 and one in the dtype.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    if not exact.is_floating_point():
        assert torch.equal(actual, exact), f"{what} differs{_difference(actual, exact)}"
        return
    assert exact.isfinite().all(), f"{what}: the case itself is not finite"
    within = exact.abs() <= torch.finfo(actual.dtype).max  # a gradient may exceed what float16 can hold

    def errors(x: Tensor) -> Tensor:
        overflown = torch.where(x.double() == exact.sign() * torch.inf, 0.0, torch.inf)
        return torch.where(
            within, (x.double() - exact).abs() / weight.clamp(min=1e-30), overflown
        ).nan_to_num(nan=torch.inf)

    allowed = FLOOR * EPSILON
    if yardstick is None:
        allowed += 8 * EPSILON + torch.finfo(actual.dtype).eps
    else:
        allowed += 2 * errors(yardstick).max().item()
    assert allowed < 0.02, f"{what}: the yardstick itself is off by {allowed:.3g}"
    worst = errors(actual).argmax().item()
    assert errors(actual).flatten()[worst] <= allowed, (
        f"{what}: error {errors(actual).flatten()[worst]:.3g}, allowed {allowed:.3g}: element {worst} is "
        f"{actual.flatten()[worst]:.9g}, expected {exact.flatten()[worst]:.9g}"
    )


def assert_all_accurate(actual: Results, truth: Truth, what: str) -> None:
    is_reference = genperf._backend.forced() == "reference"
    results = actual.outputs + actual.gradients
    exact, yardstick = (x.outputs + x.gradients for x in (truth.exact, truth.yardstick))
    assert len(results) == len(exact), f"{what}: {len(results)} results, expected {len(exact)}"
    for i, (a, y, e, w) in enumerate(zip(results, yardstick, exact, truth.weights, strict=True)):
        assert (a is None) == (e is None), f"{what}, result {i}: absent or not"
        if a is not None:
            assert a.dtype == y.dtype, f"{what}, result {i}: {a.dtype}, expected {y.dtype}"
            assert a.device == y.device
            assert_accurate(a, None if is_reference else y, e, w, f"{what}, result {i}")


def check_accuracy(case: Case, shape: Shape, dtype: torch.dtype, device: str = "cpu") -> None:
    """Forward and backward against the reference in float64; the yardstick is the reference in that dtype."""
    truth = truth_of(case, shape, dtype, device)
    actual = run(case, *case.tensors(shape, dtype, device), truth.yardstick.cotangents)
    assert_all_accurate(actual, truth, f"{case.name} {shape} {dtype}")


@functools.cache
def second_derivatives(case: Case) -> Case:
    """The case whose outputs are the gradients of the given one."""

    def function(*tensors: Tensor) -> list[Tensor]:
        outputs = _outputs(case, *tensors)
        pairs = [(y, g) for y, g in zip(outputs, _cotangents(outputs), strict=True) if y.requires_grad]
        if not pairs:
            return []
        leaves = tensors[: len(case.inputs(case.shapes[0]))]
        gradients = torch.autograd.grad(
            [y for y, _ in pairs], leaves, [g for _, g in pairs], create_graph=True, allow_unused=True
        )
        return [g for g in gradients if g is not None]

    return dataclasses.replace(case, name=f"{case.name}, second derivatives", function=function)


def check_double_backward(case: Case, device: str = "cpu") -> None:
    """The gradients of the gradients, as above."""
    check_accuracy(second_derivatives(case), case.shapes[0], torch.float32, device)


@contextmanager
def threads(n: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def check_repeatable(
    case: Case, shape: Shape, device: str = "cpu", thread_counts: Sequence[int] = (1, 2, 3)
) -> None:
    """The same bits each time, with any number of threads."""
    inputs, constants = case.tensors(shape, torch.float32, device)
    with threads(1):
        first = run(case, inputs, constants)
    for n in thread_counts:
        with threads(n):
            again = run(case, inputs, constants, first.cotangents)
            assert_same(again.all(), first.all(), f"{case.name} {shape}, {n} threads")


def check_retained_graph(case: Case, device: str = "cpu") -> None:
    """Three backward passes over one graph give the same gradients."""
    inputs, constants = case.tensors(case.shapes[0], torch.float32, device)
    leaves = _leaves(inputs)
    outputs = _outputs(case, *leaves, *constants)
    pairs = [(y, g) for y, g in zip(outputs, _cotangents(outputs), strict=True) if y.requires_grad]
    passes = [
        torch.autograd.grad(
            [y for y, _ in pairs], leaves, [g for _, g in pairs], retain_graph=True, allow_unused=True
        )
        for _ in range(3)
    ]
    for gradients in passes[1:]:
        assert_same(gradients, passes[0], f"{case.name}, backward again")


def check_batch_composition(case: Case, shape: Shape, device: str = "cpu") -> None:
    """A sample's results do not depend on the others that are in its batch."""
    inputs, constants = case.tensors(shape, torch.float32, device)
    whole = run(case, inputs, constants)
    for rows in ([1], [1, 0, 1]):
        some = run(
            case,
            [x[rows] for x in inputs],
            [x[rows] for x in constants],
            [g[rows] if g.dim() else g for g in whole.cotangents],
        )
        for a, e in zip(some.all(), whole.all(), strict=True):
            if e.dim():
                assert same(a, e[rows]), f"{case.name} {shape}, samples {rows}"


def _surrounded(x: Tensor, dim: int, where: Callable[[Tensor], Tensor]) -> Tensor:
    """A view, by ``where``, of a tensor of NaN three times as long in one dimension; it holds ``x``."""
    room = torch.cat([torch.full_like(x, torch.nan)] * 3, dim)  # keeps the order of the dimensions in memory
    return where(room).copy_(x)


def _middle(x: Tensor, dim: int) -> Callable[[Tensor], Tensor]:
    return lambda room: room.narrow(dim, x.shape[dim], x.shape[dim])


#: Ways to lay out a tensor. What lies around it is NaN.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "middle chunk of dimension 1": lambda x: _surrounded(x, 1, _middle(x, 1)),
    "middle chunk of the last dimension": lambda x: _surrounded(x, -1, _middle(x, -1)),
    "middle chunk of the batch": lambda x: _surrounded(x, 0, _middle(x, 0)),
    "every third element": lambda x: _surrounded(x, -1, lambda room: room[..., 1::3]),
    "every third sample": lambda x: _surrounded(x, 0, lambda room: room[2::3]),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "middle of channels last": lambda x: LAYOUTS["middle chunk of dimension 1"](
        x.movedim(1, -1).contiguous().movedim(-1, 1)
    ),
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "reversed dimensions": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(
        *reversed(range(x.dim()))
    ),
    "expanded batch": lambda x: x[:1].expand(x.shape),
    "expanded last dimension": lambda x: x[..., :1].expand(x.shape),
    "a single value": lambda x: x.flatten()[0].expand(x.shape),
    "odd address": lambda x: torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape),
}  # fmt: skip


def check_layout(case: Case, shape: Shape, layout: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Strides change nothing: neither those of all tensors and cotangents, nor of the first alone."""
    inputs, constants = case.tensors(shape, dtype, device)

    def lay_out(x: Tensor) -> Tensor:
        return LAYOUTS[layout](x) if x.is_floating_point() and x.dim() == len(shape) else x

    for what, strided, moved, move in (
        ("all", [lay_out(x) for x in inputs], [lay_out(x) for x in constants], lay_out),
        ("first", [lay_out(x) for x in inputs[:1]] + inputs[1:], constants, lambda g: g),
    ):
        cotangents = [move(g) for g in truth_of(case, shape, dtype, device).yardstick.cotangents]
        dense = ([x.contiguous() for x in tensors] for tensors in (strided, moved, cotangents))
        expected = run(case, *dense)
        actual = run(case, strided, moved, cotangents)
        _assert_alike(
            actual, expected, shape, f"{case.name} {shape} {dtype}, {layout} ({what})", case.elementwise
        )


def _assert_alike(actual: Results, expected: Results, shape: Shape, what: str, elementwise: bool) -> None:
    """Bit for bit; but a sum over a sample may follow the order of its elements in memory."""
    for i, (a, e) in enumerate(zip(actual.all(), expected.all(), strict=True)):
        if elementwise and e.dim() == len(shape):
            assert same(a, e), f"{what}: result {i} differs{_difference(a, e)}"
        else:
            torch.testing.assert_close(
                a, e, rtol=4 * EPSILON, atol=4 * EPSILON * e.abs().max().item(), msg=what
            )


def check_nan_locality(case: Case, device: str = "cpu") -> None:
    """A NaN stays at its own place, and is not lost where the reference keeps it."""
    shape = case.shapes[0]
    place = (1, shape[1] // 2)
    inputs, constants = case.tensors(shape, torch.float32, device)
    clean = run(case, inputs, constants)
    for i in range(len(inputs)):
        bad = [x.clone() for x in inputs]
        bad[i][place] = torch.nan
        actual = run(case, bad, constants, clean.cotangents)
        truth = _exact(case, bad, constants, actual.cotangents)
        for k, (a, e, c) in enumerate(zip(actual.all(), truth.all(), clean.all(), strict=True)):
            what = f"{case.name}, NaN in input {i}, result {k}"
            assert torch.equal(a.isnan(), e.isnan()), (
                f"{what}: NaN at other places than in the reference\n{a}"
            )
            if a.dim() == 0:
                continue
            here = torch.zeros_like(a, dtype=torch.bool)
            here[place if a.shape == shape and case.elementwise else 1] = True
            assert same(a[~here], c[~here]), f"{what}: changed elsewhere"


def check_saves_only_inputs(case: Case, shape: Shape, device: str = "cpu") -> None:
    """Nothing of input size is kept for the backward pass but the inputs and constants themselves, and
    results where the case says so."""
    inputs, constants = case.tensors(shape, torch.float32, device)
    leaves = _leaves(inputs)
    known = {x.untyped_storage().data_ptr() for x in (*leaves, *constants)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        outputs = _outputs(case, *leaves, *constants)
    if case.saves_outputs:
        known |= {y.untyped_storage().data_ptr() for y in outputs}
    extra = [x for x in kept if x.untyped_storage().data_ptr() not in known and x.numel() > 2 * shape[0]]
    if case.packs:
        packed = next(x for x in extra if x.numel() == sum(leaf.numel() for leaf in leaves))
        extra = [x for x in extra if x.untyped_storage().data_ptr() != packed.untyped_storage().data_ptr()]
    assert not extra, f"{case.name}: keeps {[tuple(x.shape) for x in extra]}"
    assert outputs


def check_compile(case: Case, shape: Shape, device: str = "cpu", compiler: str = "aot_eager") -> None:
    """torch.compile without a graph break, forward and backward, to the same bits.

    Inductor makes code of its own for what surrounds the op, such as the mean over the batch.
    """
    inputs, constants = case.tensors(shape, torch.float32, device)
    expected = run(case, inputs, constants)
    torch._dynamo.reset()
    compiled = Case(case.name, torch.compile(case.function, fullgraph=True, backend=compiler))
    actual = run(compiled, inputs, constants, expected.cotangents)
    if compiler == "inductor":
        torch.testing.assert_close(actual.all(), expected.all(), rtol=2 * EPSILON, atol=0)
    else:
        assert_same(actual.all(), expected.all(), f"{case.name} {shape}, compiled")


def check_cuda_graph(case: Case, shape: Shape) -> None:
    """Forward and backward are captured, and replayed for other inputs give the same bits."""
    inputs, constants = case.tensors(shape, torch.float32, "cuda")
    expected = run(case, inputs, constants)
    static = [torch.full_like(x, 0.5) for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(case, static, constants, expected.cotangents)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case, static, constants, expected.cotangents)
    for mine, theirs in zip(static, inputs, strict=True):
        mine.copy_(theirs)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured.all(), expected.all(), f"{case.name} {shape}, replayed")


class Recorder(TorchDispatchMode):
    """The calls of genperf's torch ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "genperf":
            self.calls.append((func, tuple(x.detach() if isinstance(x, Tensor) else x for x in args)))
        return func(*args, **(kwargs or {}))


def recorded_calls(
    case: Case, shape: Shape, device: str = "cpu"
) -> list[tuple[torch._ops.OpOverload, tuple]]:
    """The torch ops that forward and backward call, with their arguments."""
    inputs, constants = case.tensors(shape, torch.float32, device)
    with Recorder() as recorder:
        run(case, inputs, constants)
    assert recorder.calls, f"{case.name} calls no genperf op"
    return recorder.calls
