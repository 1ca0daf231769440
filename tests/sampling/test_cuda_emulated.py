"""The persistent CUDA kernel, emulated on the host: the same bits as the CPU executor, in every order."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from genperf_testing.programs import HEADS, random_program

from genperf import _backend
from genperf.sampling._cuda import CUDAExecutor
from genperf.sampling._cuda_cost import TeamPlan, predict
from genperf.sampling._native import CPUExecutor
from genperf.sampling._program import HeadKind
from genperf.sampling.heads import make_noise

_SIMT = Path(__file__).parent.parent / "simt"
_spec = importlib.util.spec_from_file_location("genperf_simt_build", _SIMT / "build.py")
simt = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(simt)

pytestmark = pytest.mark.skipif(
    _backend.native is None or _backend.native.isa() == "baseline",
    reason="needs the native CPU executor with fused multiply-adds",
)

KEY = torch.tensor([7, 11])
TEAMS = [
    TeamPlan("cluster", 2, 1),
    TeamPlan("cluster", 3, 2),
    TeamPlan("grid", 1, 2),
    TeamPlan("grid", 3, 1),
    TeamPlan("grid", 2, 2),
]


@pytest.fixture(autouse=True)
def emulated():
    with simt.emulated_cuda():
        yield


def start(executor, batch):
    state = executor.start(batch)
    state.workspace.fill_(float("nan"))
    state.values.fill_(float("nan"))
    return state


def sampled(executor, noise, **options):
    """The values, and the parameters of the last slot."""
    batch = options.pop("batch", None) or len(noise)
    state = start(executor, batch)
    slots = executor.program.slots
    executor.run(state, 0, slots, noise, **options)
    return state.values, executor.params(state, slots - 1)


def assert_same(actual, expected):
    # Values that are fed back without bounds may overflow, in both.
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("head", [h for h in HEADS if h != "callback"])
@pytest.mark.parametrize("seed", range(3))
def test_same_bits_as_the_cpu(seed, head):
    program = random_program(seed, head, wide=100)
    team = TEAMS[(seed + len(head)) % len(TEAMS)]
    noise = make_noise(program.head, KEY, range(3))
    expected = sampled(CPUExecutor(program), noise, temperature=0.9)
    assert_same(sampled(CUDAExecutor(program, "cpu", team=team), noise, temperature=0.9), expected)


@pytest.mark.parametrize("order", simt.SCHEDULES[1:])
@pytest.mark.parametrize("team", TEAMS, ids=lambda t: f"{t.kind}-{t.size}x{t.teams}")
def test_every_team_in_every_order(team, order):
    program = random_program(1, "categorical_rgb", rows=4, cols=4, wide=50)
    noise = make_noise(program.head, KEY, range(3))
    expected = sampled(CPUExecutor(program), noise)
    with simt.schedule(order):
        assert_same(sampled(CUDAExecutor(program, "cpu", team=team), noise), expected)


def _buffers(executor, noise, missing):
    """All line buffers after a run, in each of several orders, without the barriers before some steps."""
    for order in ("forward", "reverse", *(f"shuffle:{seed}" for seed in range(1, 4))):
        with simt.schedule(order):
            state = start(executor, len(noise))
            entries = state.entries.view(torch.int32).clone()
            entries[torch.isin(entries[:, 0], missing), 4] = 0
            state.entries = entries.view(torch.float32)
            executor.run(state, 0, executor.program.slots, noise)
            yield state.workspace.nan_to_num(1e30)


@pytest.mark.parametrize("kind", ["cluster", "grid"])
def test_a_missing_barrier_is_caught(kind):
    """Without barriers some order gives other numbers. Before one step that is so only where no other
    barrier happens to stand in for the missing one."""
    program = random_program(1, "categorical_rgb", rows=3, cols=3, wide=50)
    noise = make_noise(program.head, KEY, range(2))
    executor = CUDAExecutor(program, "cpu", team=TeamPlan(kind, 3, 1))
    entries = executor.start(2).entries.view(torch.int32)
    steps = entries[entries[:, 4] > 0, 0].unique()
    complete = list(_buffers(executor, noise, steps[:0]))
    assert all(torch.equal(found, complete[0]) for found in complete)

    def caught(missing):
        return any(not torch.equal(found, complete[0]) for found in _buffers(executor, noise, missing))

    assert caught(steps)
    assert any(caught(step) for step in steps[:-1].flip(0).split(1))


@pytest.mark.parametrize("head", ["categorical", "gaussian", "mixture", "categorical_rgb"])
def test_noise_of_a_key_is_made_in_the_kernel(head):
    program = random_program(3, head, rows=3, cols=3)
    executor = CUDAExecutor(program, "cpu", team=TeamPlan("grid", 2, 2))
    images = torch.tensor([4, 0, 9])
    expected = sampled(executor, make_noise(program.head, KEY, images))
    assert_same(sampled(executor, None, batch=3, key=KEY, images=images), expected)
    first = sampled(executor, make_noise(program.head, KEY, range(3)))
    assert_same(sampled(executor, None, batch=3, key=KEY), first)


@pytest.mark.parametrize("head", ["categorical", "categorical_rgb", "mixture"])
def test_known_values_top_k_and_parts(head):
    """Inpainting and top-k; many launches give what one gives, and one image what it is among others."""
    program = random_program(5, head, rows=4, cols=3)
    noise = make_noise(program.head, KEY, range(4))
    shape = (4, program.head.rows, program.head.cols, program.head.values)
    generator = torch.Generator().manual_seed(0)
    known = torch.rand(shape, generator=generator), torch.rand(shape, generator=generator) < 0.4
    if program.head.kind == HeadKind.CATEGORICAL:
        known = (known[0] * program.head.classes).floor(), known[1]
    options = {"temperature": 1.2, "top_k": 2, "known": known}
    expected = sampled(CPUExecutor(program), noise, **options)
    executor = CUDAExecutor(program, "cpu", team=TeamPlan("cluster", 2, 2))
    assert_same(sampled(executor, noise, **options), expected)
    state = start(executor, 4)
    for slot in range(0, program.slots, 2):
        executor.run(state, slot, min(slot + 2, program.slots), noise, **options)
    assert torch.equal(state.values, expected[0])
    options["known"] = known[0][:1], known[1][:1]
    assert torch.equal(sampled(executor, noise[:1], **options)[0], expected[0][:1])


def test_callback():
    program = random_program(4, "callback")
    values = torch.rand(
        3, program.head.rows, program.head.cols, 1, generator=torch.Generator().manual_seed(1)
    )
    params = []
    for executor in (CPUExecutor(program), CUDAExecutor(program, "cpu", team=TeamPlan("grid", 2, 2))):
        state = start(executor, 3)
        own = []
        for slot in range(program.slots):
            executor.run(state, slot, slot + 1, None)
            own.append(executor.params(state, slot).clone())
            y, x = divmod(slot, program.head.cols)
            executor.feed(state, slot, values[:, y, x, 0])
        assert torch.equal(state.values, values)
        params.append(torch.stack(own))
    assert_same(params[1:], params[:1])


@pytest.mark.parametrize("batch", [17, 40])
def test_many_images_take_large_tiles(batch):
    programs = (random_program(seed, "bernoulli", rows=2, cols=3, wide=150) for seed in range(6, 30))
    program = next(p for p in programs if all(c.stride_b == 0 for c in p.consts))
    noise = make_noise(program.head, KEY, range(batch))
    expected = sampled(CPUExecutor(program), noise)
    for team in (TeamPlan("cluster", 2, 1), TeamPlan("grid", 1, 1), TeamPlan("grid", 3, 1)):
        executor = CUDAExecutor(program, "cpu", team=team)
        assert_same(sampled(executor, noise), expected)
    tiles = executor.start(batch).entries.view(torch.int32)[:, 7]
    assert tiles.max() > 0


def test_prediction():
    program = random_program(0, "categorical", wide=100)
    cluster = predict(program, 1, team=TeamPlan("cluster", 16, 1))
    grid = predict(program, 1, team=TeamPlan("grid", 132, 1))
    assert cluster.phases == grid.phases > 1
    assert grid.barriers > 3 * cluster.barriers
    alone = predict(program, 1, team=TeamPlan("grid", 1, 1))
    assert alone.barriers == alone.phases == 0
    assert predict(program, 64).flops == pytest.approx(64 * cluster.flops)
    assert "phases" in str(cluster)
    best = predict(program, 1)
    assert best.total <= min(cluster.total, grid.total, alone.total)


def test_arguments_that_do_not_fit_are_named():
    program = random_program(1, "categorical")
    with pytest.raises(RuntimeError, match="device meta"):
        CUDAExecutor(program, "meta")
    with pytest.raises(ValueError, match=r"dtype: torch\.float64"):
        CUDAExecutor(program, "cpu", torch.float64)
    executor = CUDAExecutor(program, "cpu")
    with pytest.raises(ValueError, match="noise: None"):
        executor.run(executor.start(1), 0, 1, None)
