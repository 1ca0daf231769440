"""The execution model of tests/simt, and the defects that it finds."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
import pytest

_SIMT = Path(__file__).parent / "simt"
_spec = importlib.util.spec_from_file_location("genperf_simt_build", _SIMT / "build.py")
simt = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(simt)


@pytest.fixture(scope="module")
def features() -> ctypes.CDLL:
    return simt.compile_source(_SIMT / "features.cu")


@pytest.fixture(params=simt.SCHEDULES)
def any_schedule(request):
    with simt.schedule(request.param):
        yield request.param


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _run(features: ctypes.CDLL, name: str, *arguments: object) -> None:
    simt.call(
        getattr(features, f"run_{name}"),
        *(_pointer(a) if isinstance(a, np.ndarray) else a for a in arguments),
    )


@pytest.mark.parametrize("width", [32, 16, 8])
def test_shuffles(features, any_schedule, width):
    out = np.zeros((32, 4), np.int32)
    _run(features, "shuffles", out, width)
    lane = np.arange(32)
    first, last = lane // width * width, lane // width * width + width - 1
    up, down = lane - 3, lane + 3
    np.testing.assert_array_equal(out[:, 0], first + 5)
    np.testing.assert_array_equal(out[:, 1], np.where(up >= first, up, lane))
    np.testing.assert_array_equal(out[:, 2], np.where(down <= last, down, lane))
    np.testing.assert_array_equal(out[:, 3], lane ^ 6)


def test_a_shuffle_carries_64_bits(features, any_schedule):
    out = np.zeros(32)
    _run(features, "wide_shuffle", out)
    np.testing.assert_array_equal(out, 0.1 * (np.arange(32) ^ 1))


def test_votes_of_part_of_a_warp(features, any_schedule):
    out = np.zeros((32, 3), np.uint32)
    _run(features, "votes", out)
    ballot = sum(1 << lane for lane in range(0, 32, 3))
    lower = np.arange(32) < 16
    np.testing.assert_array_equal(out[:, 0], np.where(lower, ballot & 0xFFFF, ballot & 0xFFFF0000))
    np.testing.assert_array_equal(out[:, 1], ~lower)
    np.testing.assert_array_equal(out[:, 2], lower)


def test_votes_of_a_block(features, any_schedule):
    out = np.zeros((96, 3), np.int32)
    _run(features, "block_votes", out)
    np.testing.assert_array_equal(out, np.tile([32, 1, 0], (96, 1)))


def test_indices_in_three_dimensions(features, any_schedule):
    out = np.zeros((12, 30), np.uint32)
    _run(features, "indices", out)
    np.testing.assert_array_equal(out, 1000 * np.arange(12)[:, None] + np.arange(30))


def test_atomics(features, any_schedule):
    i, u, f, d = np.zeros(6, np.int32), np.zeros(1, np.uint64), np.zeros(1, np.float32), np.zeros(1)
    _run(features, "atomics", i, u, f, d)
    np.testing.assert_array_equal(i, [150, -149, 149, 7, 9, 0])
    assert (u[0], f[0], d[0]) == (150 << 33, 75.0, 37.5)


def test_the_last_block_sees_all_others(features, any_schedule):
    tickets, values, out = np.zeros(1, np.int32), np.zeros(9, np.int32), np.zeros(1, np.int32)
    _run(features, "last_block", tickets, values, out)
    assert out[0] == 45


def test_grid_barrier(features, any_schedule):
    values, out = np.zeros(7, np.int32), np.zeros(7, np.int32)
    _run(features, "pass_on", values, out)
    np.testing.assert_array_equal(out, (np.arange(7) + 2) % 7)


def test_cluster_barrier(features, any_schedule):
    values, out = np.zeros(6, np.int32), np.zeros(6, np.int32)
    _run(features, "pass_on_in_pairs", values, out)
    np.testing.assert_array_equal(out, np.arange(6) ^ 1)


def test_a_cooperative_grid_may_spin(features, any_schedule):
    _run(features, "wait_for_block_1", np.zeros(1, np.int32))


def test_shared_memory_starts_as_nan(features):
    fixed, dynamic = np.zeros(32, np.float32), np.zeros(32, np.float32)
    _run(features, "read_shared", fixed, dynamic)
    assert np.isnan(fixed).all()
    assert np.isnan(dynamic).all()


def test_a_lane_that_left_brings_nan(features, any_schedule):
    out = np.zeros(20, np.float32)
    _run(features, "early_exit", out)
    np.testing.assert_array_equal(np.isnan(out), (np.arange(20) ^ 8) >= 20)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("two_barriers", (), r"divergent barrier in block \(0, 0, 0\): 32 threads waiting at __syncthreads "
         r"\(features.cu:\d+\), 32 threads waiting"),
        ("mismatched_exchange", (), "deadlock .* 16 threads waiting at __shfl_sync .* at __syncwarp"),
        ("outside_mask", (), r"__syncwarp by a lane outside its mask \(features.cu:\d+\)"),
        ("trapped", (), r"__trap \(features.cu:\d+\) in block \(0, 0, 0\), thread \(3, 0, 0\)"),
        ("unequal_grid_sync", (), "deadlock in block .*: 8 threads waiting at grid_sync"),
        ("plain_pass_on", (np.zeros(7, np.int32), np.zeros(7, np.int32)), "outside a cooperative launch"),
        ("unequal_cluster_sync", (), "deadlock in block .*: 8 threads waiting at cluster_sync"),
        ("plain_pass_on_in_pairs", (np.zeros(6, np.int32),) * 2, "outside a cluster launch"),
        ("clusters", (4, 3), r"invalid launch: grid \(4, 1, 1\)"),
        ("clusters", (34, 17), r"invalid launch: grid \(34, 1, 1\)"),
        ("wait_forever", (np.zeros(1, np.int32),), "deadlock in block .* 1 thread spinning"),
        ("write_shared", (32,), "dynamic shared memory of 128 bytes was overrun"),
        ("write_shared", (-1,), "dynamic shared memory of 128 bytes was overrun"),
        ("launch", (1, 1025, 4), r"invalid launch: grid \(1, 1, 1\), block \(1025, 1, 1\), 4 bytes"),
        ("launch", (0, 32, 4), r"invalid launch: grid \(0, 1, 1\)"),
        ("launch", (1, 32, 300_000), "invalid launch: .* 300000 bytes of shared memory"),
    ],
)  # fmt: skip
def test_faults_are_reported(features, any_schedule, name, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        _run(features, name, *arguments)


def test_an_unknown_schedule_is_refused(features):
    with simt.schedule("sideways"), pytest.raises(RuntimeError, match="'sideways', expected forward"):
        _run(features, "trapped")


def test_fibers_of_the_c_library():
    """Machines other than x86-64 switch contexts by ucontext."""
    library = simt.compile_source(_SIMT / "features.cu", "-DSIMT_UCONTEXT")
    values, out = np.zeros(7, np.int32), np.zeros(7, np.int32)
    _run(library, "pass_on", values, out)
    np.testing.assert_array_equal(out, (np.arange(7) + 2) % 7)


# Defects. Each source is right, or with -DBROKEN wrong in one place.


def _outcomes(source: str, n: int, x: np.ndarray, outputs: int, broken: bool, initial: float):
    """The output, float32 [outputs], under each of many schedules."""
    library = simt.compile_source(_SIMT / "broken" / f"{source}.cu", *(["-DBROKEN"] if broken else []))
    results = []
    for order in (*simt.SCHEDULES, *(f"shuffle:{seed}" for seed in range(3, 9))):
        out = np.full(outputs, initial, np.float32)
        with simt.schedule(order):
            simt.call(library.run, _pointer(x), _pointer(out), n)
        results.append(out)
    return results


def _inputs(n: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(n, dtype=np.float32)


def _distinct(results: list[np.ndarray]) -> int:
    return len({out.tobytes() for out in results})


def test_a_missing_barrier_is_caught():
    x = _inputs(5 * 128)
    right = _outcomes("missing_barrier", 5, x, 5, broken=False, initial=np.nan)
    assert _distinct(right) == 1
    np.testing.assert_allclose(right[0], x.reshape(5, 128).sum(1), rtol=1e-5)
    assert _distinct(_outcomes("missing_barrier", 5, x, 5, broken=True, initial=np.nan)) > 1


def test_a_missing_warp_synchronization_is_caught():
    x = _inputs(4 * 32)
    right = _outcomes("missing_warp_sync", 4, x, 4 * 32, broken=False, initial=np.nan)
    assert _distinct(right) == 1
    np.testing.assert_array_equal(right[0].reshape(4, 32), x.reshape(4, 32)[:, ::-1])
    assert _distinct(_outcomes("missing_warp_sync", 4, x, 4 * 32, broken=True, initial=np.nan)) > 1


def test_an_uninitialised_output_is_caught():
    x = _inputs(1003)
    for out in _outcomes("uninitialised_output", 1003, x, 1003, broken=False, initial=np.nan):
        np.testing.assert_array_equal(out, 2 * x)
    for out in _outcomes("uninitialised_output", 1003, x, 1003, broken=True, initial=np.nan):
        np.testing.assert_array_equal(np.flatnonzero(np.isnan(out)), [1000, 1001, 1002])


def test_float_atomics_are_caught():
    x = _inputs(50 * 32)
    right = _outcomes("float_atomics", 50, x, 51, broken=False, initial=0.0)
    assert _distinct(right) == 1
    np.testing.assert_allclose(right[0][0], x.sum(), rtol=1e-4)
    assert _distinct(_outcomes("float_atomics", 50, x, 51, broken=True, initial=0.0)) > 1


def test_a_barrier_in_divergent_code_is_caught():
    x = _inputs(100)
    right = _outcomes("divergent_barrier", 100, x, 100, broken=False, initial=np.nan)
    assert _distinct(right) == 1
    left = np.concatenate([[0], x[:-1]])
    left[64] = 0
    np.testing.assert_array_equal(right[0], x + left.astype(np.float32))
    stopped = (
        r"divergent barrier in block \(1, 0, 0\): 28 threads returned, "
        r"36 threads waiting at __syncthreads \(divergent_barrier.cu:\d+\)"
    )
    with pytest.raises(RuntimeError, match=stopped):
        _outcomes("divergent_barrier", 100, x, 100, broken=True, initial=np.nan)


# The library's own kernels. tests/ops and the contract suite compare them with the reference.


@pytest.mark.parametrize("shape", [(5, 24), (3, 7), (2, 3, 60, 64), (2, 9001)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_give_the_same_bits_in_every_schedule(shape, dtype):
    torch = pytest.importorskip("torch")
    import genperf

    torch.manual_seed(0)
    mean, scale = torch.randn(2, *shape).to(getattr(torch, dtype)).unbind()
    key = torch.tensor([3, 5])

    def results() -> list[bytes]:
        inputs = [t.clone().requires_grad_() for t in (mean, scale)]
        z, kl, log_prob = genperf.ops.gaussian_sample(*inputs, key=key, log_prob=True)
        (z.float().square().sum() + kl.sum() + log_prob.sum()).backward()
        numbers = genperf.ops.philox_random(shape, key)
        tensors = [z, kl, log_prob, numbers, *(t.grad for t in inputs)]
        assert not any(t.isnan().any() for t in tensors)
        return [t.detach().float().numpy().tobytes() for t in tensors]

    seen = []
    for order in simt.SCHEDULES:
        with simt.emulated_cuda(), genperf.backend("cuda"), simt.schedule(order):
            seen.append(results())
    assert all(result == seen[0] for result in seen)
