"""A plan computes what its graph does, never reads what is gone, and runs as much as it can by rows."""

import itertools
import random

import numpy as np
import pytest
import torch
from genperf_testing import graphs, idioms, models, plans

from genperf.sampling import _program as p
from genperf.sampling import heads
from genperf.sampling._errors import CaptureError, CausalityError
from genperf.sampling._plan import Plan, plan, refill, ring
from genperf.sampling._reference import ReferenceExecutor
from genperf.sampling._schedule import NEVER, runs_of
from genperf.sampling._simplify import simplify

NAMES = [*models.FAMILIES, *idioms.CAUSAL]


def _tiny(name: str) -> models.TinyModel:
    return idioms.idiom(name) if name in idioms.CAUSAL else models.tiny_model(name)


def _plan(name: str) -> tuple[models.TinyModel, plans.Planned, Plan]:
    tiny = _tiny(name)
    given = plans.planned(tiny)
    return tiny, given, plan(*given)


@pytest.mark.parametrize("name", NAMES)
def test_programs_compute_what_their_graphs_do(name: str) -> None:
    tiny, given, made = _plan(name)
    program, head = made.program, made.program.head
    values = plans.values_of(tiny, models.example(tiny, 2, seed=3), head)
    executor = ReferenceExecutor(program, dtype=torch.float64)
    truth = graphs.evaluate(simplify(given.graph, head.draws), plans.input_values(program, values))
    for slot, params in enumerate(plans.teacher_forced(executor, program, values)):
        (y, x), draw = divmod(slot // head.draws, head.cols), slot % head.draws
        own = plans.owned(head, draw, truth.shape[-1])
        torch.testing.assert_close(params[:, own], truth[:, y, x, own], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_simplified_graphs_compute_the_same(name: str) -> None:
    tiny = _tiny(name)
    graph, head, feedback = plans.planned(tiny)
    simple = simplify(graph, head.draws)
    assert len(simple.nodes) <= len(graph.nodes) - (name in models.FAMILIES)
    program = plan(graph, head, feedback).program
    values = plans.values_of(tiny, models.example(tiny, 2, seed=4), program.head)
    x = plans.input_values(program, values)
    torch.testing.assert_close(graphs.evaluate(simple, x), graphs.evaluate(graph, x), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_buffers_do_not_overlap(name: str) -> None:
    program = _plan(name)[2].program
    spans = sorted((b.offset, b.offset + b.ring_rows * b.ring_cols * b.channels) for b in program.buffers)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert spans[-1][1] <= program.workspace


def _convolutions(made: Plan) -> list[tuple[str, p.Conv, np.ndarray]]:
    segments = made.program.segments.numpy()
    return [
        (role, i, segments[segments[:, 0] == index])
        for index, (i, role) in enumerate(zip(made.program.instructions, made.roles, strict=True))
        if isinstance(i, p.Conv)
    ]


def test_the_vertical_stack_runs_a_row_at_a_time() -> None:
    """Weights are read once a row, or once a pixel, and every cell is computed once."""
    _, _, made = _plan("gated_pixelcnn")
    head = made.program.head
    found = _convolutions(made)
    rows = [c for c in found if c[0] in ("row", "ahead")]
    assert len(rows) == 2 * 3  # the vertical stack, and what it gives to the horizontal one
    for _, _, segments in rows:
        assert len(segments) <= head.rows
        assert (segments[:, 3] == head.cols).all()
    for role, _, segments in found:
        if role == "pixel":
            assert len(segments) == head.rows * head.cols


def test_taps_of_the_rows_above_run_ahead() -> None:
    """A 5x5 masked convolution leaves the taps of its own row, and those alone, to the pixel."""
    _, _, made = _plan("pixelcnn_raw")
    program = made.program
    found = _convolutions(made)
    ahead = [i for role, i, _ in found if role == "ahead"]
    assert len(ahead) == 3
    for conv in ahead:
        taps = program.taps[conv.tap_begin : conv.tap_end]
        assert taps
        assert all(dy < 0 for dy, _ in taps)
    for role, conv, _ in found:
        if role == "pixel":
            assert all(dy == 0 for dy, _ in program.taps[conv.tap_begin : conv.tap_end])


def test_a_stride_of_two_computes_coarse_cells_once() -> None:
    _, given, made = _plan("pixelcnnpp")
    segments = made.program.segments.numpy()
    computed = np.bincount(segments[:, 0], weights=segments[:, 3], minlength=len(made.program.instructions))
    sizes = {n.name: n.rows * n.cols for n in given.graph.nodes}
    for name, cells in zip(made.names, computed, strict=True):
        assert cells <= sizes[name]


def test_colours_are_computed_at_each_draw() -> None:
    _, _, made = _plan("pixelcnn_rgb")
    head = made.program.head
    computed = [
        int(segments[:, 3].sum()) / (head.rows * head.cols)
        for role, _, segments in _convolutions(made)
        if role == "pixel"
    ]
    assert max(computed) == 3
    ahead = [segments for role, _, segments in _convolutions(made) if role == "ahead"]
    assert ahead
    assert all(len(segments) <= head.rows for segments in ahead)


def test_line_buffers_hold_what_the_taps_reach() -> None:
    """15 layers of 3x3 keep two rows of each layer at most, not the image."""
    _, _, made = _plan("gated_pixelcnn")
    head = made.program.head
    assert all(b.ring_rows <= 4 for b in made.program.buffers)
    whole = sum(b.channels for b in made.program.buffers) * head.rows * head.cols
    assert made.program.workspace < whole / 8


def test_refill_takes_new_weights() -> None:
    tiny, _, made = _plan("gated_pixelcnn_class")
    models.randomise(tiny.model, seed=5)
    given = plans.planned(tiny)
    refill(made, given.graph)
    fresh = plan(*given).program
    assert all(torch.equal(a, b) for a, b in zip(made.program.weights, fresh.weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(made.program.tensors, fresh.tensors, strict=True))


def test_refill_refuses_another_model() -> None:
    made = _plan("gated_pixelcnn")[2]
    with pytest.raises(CaptureError, match="compile it again"):
        refill(made, plans.planned(models.tiny_model("pixelcnn_embedding")).graph)


def test_a_colour_that_sees_a_later_one_is_refused() -> None:
    graph, _, feedback = plans.planned(models.tiny_model("pixelcnn_rgb"))
    head = heads.Categorical(4, 3, class_dim=2)  # the model's output is [classes, colours], not this
    with pytest.raises(CausalityError, match=r"value \d, which is drawn at the same time or later"):
        plan(graph, head, feedback)


@pytest.mark.parametrize("seed", range(30))
def test_runs_cover_each_wanted_cell_once_in_time(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ready = rng.integers(0, 12, (4, 9))
    need = ready + rng.integers(0, 8, ready.shape)
    need[rng.random(ready.shape) < 0.15] = NEVER
    seen = np.zeros(ready.shape, dtype=int)
    last: dict[int, tuple[int, int, int]] = {}
    for slot, y, x, n in runs_of(ready, need):
        cells = np.s_[y, x : x + n]
        seen[cells] += 1
        assert ready[cells].max() <= slot == need[cells].min()
        if y in last and last[y][0] == x:  # it could not have been part of the run before
            assert max(last[y][1], ready[y, x]) > min(last[y][2], need[y, x])
        last[int(y)] = x + n, ready[cells].max(), need[cells].min()
    assert (seen == (need < NEVER)).all()


@pytest.mark.parametrize("seed", range(30))
def test_rings_are_the_smallest_that_lose_nothing(seed: int) -> None:
    rng = random.Random(seed)
    rows, cols = 5, 6
    first = np.arange(rows * cols).reshape(rows, cols)
    last = first + np.array([[rng.randrange(rng.choice([2, 9, 20])) for _ in range(cols)] for _ in first])

    def loses(r: int, c: int) -> bool:
        holder: dict[tuple[int, int], int] = {}
        for cell in range(rows * cols):
            y, x = divmod(cell, cols)
            before = holder.get((y % r, x % c))
            if before is not None and last.flat[before] >= first[y, x]:
                return True
            holder[y % r, x % c] = cell
        return False

    r, c = ring(first, last)
    assert not loses(r, c)
    assert r == 1 or loses(r - 1, cols)
    assert c == 1 or loses(r, {2: 1, 3: 2, 4: 3, 6: 4}[c])
