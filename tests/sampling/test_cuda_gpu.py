"""The persistent CUDA kernel on a device: the CPU executor's bits, graphs, time."""

from __future__ import annotations

import pytest
import torch
from genperf_testing.programs import HEADS, random_program

from genperf import _backend
from genperf.sampling._cuda import CUDAExecutor
from genperf.sampling._cuda_cost import TeamPlan
from genperf.sampling._native import CPUExecutor
from genperf.sampling.heads import make_noise

KEY = torch.tensor([7, 11])

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and _backend.unusable("cuda", "cuda") is not None,
        reason="the CUDA kernels are not built",
    ),
]


def sampled(executor, noise, **options):
    state = executor.start(len(noise))
    state.workspace.fill_(float("nan"))
    executor.run(state, 0, executor.program.slots, noise, **options)
    return state.values.cpu()


def teams():
    plans = [TeamPlan("grid", 1, 3), TeamPlan("grid", 7, 2), TeamPlan("grid", 64, 1)]
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
        plans += [TeamPlan("cluster", 4, 3), TeamPlan("cluster", 16, 1)]
    return plans


@pytest.mark.parametrize("head", [h for h in HEADS if h != "callback"])
@pytest.mark.parametrize("seed", range(3))
def test_same_bits_as_the_cpu(seed, head):
    program = random_program(seed, head, wide=200)
    noise = make_noise(program.head, KEY, range(5))
    expected = sampled(CPUExecutor(program), noise)
    for team in (None, *teams()):
        actual = sampled(CUDAExecutor(program, "cuda", team=team), noise)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("batch", [1, 3, 40, 300])
def test_any_batch(batch):
    program = random_program(1, "categorical", wide=200)
    noise = make_noise(program.head, KEY, range(batch))
    assert torch.equal(sampled(CUDAExecutor(program), noise), sampled(CPUExecutor(program), noise))


def test_runs_are_repeatable_and_a_graph_captures_one():
    program = random_program(2, "categorical", wide=200)
    executor = CUDAExecutor(program)
    noise = make_noise(program.head, KEY, range(4)).cuda()
    state = executor.start(4)
    key, images = KEY.cuda(), torch.arange(4, device="cuda")
    executor.run(state, 0, program.slots, noise)
    expected = state.values.clone()
    for options in ({"noise": noise}, {"noise": None, "key": key, "images": images}):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            executor.run(state, 0, program.slots, **options)
        for _ in range(3):
            state.values.fill_(float("nan"))
            state.workspace.fill_(float("nan"))
            graph.replay()
            assert torch.equal(state.values, expected)


def test_time_is_not_far_from_the_prediction():
    """Within a factor of 20 of the floor: what hangs, or runs team after team, is further off."""
    from genperf.sampling._cuda_cost import predict

    program = random_program(3, "categorical", rows=16, cols=16, wide=200)
    executor = CUDAExecutor(program)
    noise = make_noise(program.head, KEY, range(4)).cuda()
    state = executor.start(4)
    executor.run(state, 0, program.slots, noise)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    executor.run(state, 0, program.slots, noise)
    end.record()
    end.synchronize()
    floor = predict(program, 4, executor.hardware, state.team).total
    assert begin.elapsed_time(end) * 1e-3 < 20 * floor + 1e-3
