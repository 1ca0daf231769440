"""The kernel that stands in for torch.randn on the CPU: the same bits, and the same generator after."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import genperf
from genperf import _backend, _torch_normal
from genperf._torch_normal import FEWEST, torch_normal
from genperf.nn import DiagonalGaussian
from genperf.ops import gaussian_sample

CPU = torch.device("cpu")
FIRST_WORD, WORDS = 3, 624  # of the engine's state, in int64
GIVEN = 608  # a multiple of 16 below them

with_kernel = pytest.mark.skipif(
    "avx2" not in genperf.cpu_isas() or torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="torch draws otherwise without AVX2",
)


def draw(shape, generator=None, dtype=torch.float32, device=CPU):
    return torch_normal(shape, generator=generator, dtype=dtype, device=device)


def pair(seed):
    return torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)


def same_bits(x, y):
    return torch.equal(x.view(torch.int32), y.view(torch.int32))


@pytest.fixture
def kernel(monkeypatch):
    """The kernel for every size that it can take; counts its calls."""
    calls = []
    run = _backend.native.cpu.torch_normal
    monkeypatch.setattr(_torch_normal, "FEWEST", 16)
    monkeypatch.setattr(_backend.native.cpu, "torch_normal", lambda *a: (calls.append(a), run(*a)))
    _torch_normal._difference.cache_clear()
    for isa in genperf.cpu_isas():
        with genperf.cpu_isa(isa):
            draw((16,))  # the comparison at the first use
    calls.clear()
    yield calls
    _torch_normal._difference.cache_clear()


@pytest.fixture(params=genperf.cpu_isas())
def isa(request):
    with genperf.cpu_isa(request.param):
        yield request.param


SIZES = [*range(16, 50), 255, 511, 512, 513, 527, 528, 529, 623, 624, 625, 640, 1024, 5003, 1 << 17]


@with_kernel
@pytest.mark.parametrize("seed", [0, 1, -3, 2**63 - 1])
def test_bits_and_state(kernel, isa, seed):
    ours, theirs = pair(seed)
    for n in SIZES:
        assert same_bits(draw((n,), ours), torch.randn(n, generator=theirs)), n
        assert torch.equal(ours.get_state(), theirs.get_state()), n
    assert len(kernel) == len(SIZES)


@with_kernel
def test_every_position_in_the_engines_words(kernel):
    ours, theirs = pair(5)
    for _ in range(WORDS + 1):
        for generator in (ours, theirs):
            torch.rand(1, generator=generator)
        assert same_bits(draw((16 + WORDS,), ours), torch.randn(16 + WORDS, generator=theirs))
    assert torch.equal(ours.get_state(), theirs.get_state())
    assert len(kernel) == WORDS + 1


@with_kernel
def test_between_calls_of_torch(kernel):
    """The generator's cached second normal, from draws of fewer than 16, is neither used nor lost."""
    ours, theirs = pair(7)
    others = [
        lambda g: torch.randn(3, generator=g),
        lambda g: torch.randn(1, generator=g, dtype=torch.float64),
        lambda g: torch.rand(5, generator=g),
        lambda g: torch.randint(1000, (7,), generator=g),
        lambda g: torch.randn(100, generator=g),
        lambda g: torch.empty(3).exponential_(generator=g),
        lambda g: torch.normal(1.0, 2.0, (5,), generator=g),
    ]
    for i in range(100):
        other = others[i * i % len(others)]
        assert torch.equal(other(ours), other(theirs))
        n = 16 + 37 * i % 1000
        assert same_bits(draw((n,), ours), torch.randn(n, generator=theirs))
        assert torch.equal(ours.get_state(), theirs.get_state())


@with_kernel
def test_shapes_and_the_default_generator(kernel):
    for shape in ((16,), (3, 50), (2, 1, 5, 7), torch.Size((4, 4)), (17, 1)):
        torch.manual_seed(3)
        ours = draw(shape)
        torch.manual_seed(3)
        assert ours.shape == shape
        assert same_bits(ours, torch.randn(shape))
    assert len(kernel) == 5


@with_kernel
@pytest.mark.parametrize("surrounding", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_surroundings(kernel, surrounding):
    """Those of the first use, in which the comparison runs, too."""
    _torch_normal._difference.cache_clear()
    ours, theirs = pair(1)
    torch.set_default_dtype(torch.float64)
    try:
        with surrounding():
            x, y = draw((64,), ours), torch.randn(64, generator=theirs, dtype=torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert kernel[-1][0] is x
    assert same_bits(x, y)
    assert (x.requires_grad, x.is_inference()) == (y.requires_grad, y.is_inference())


def untempered(word):
    """The engine's word of which ``word`` is given out: the tempering, solved bit by bit."""
    word = word ^ word >> 18
    word = word ^ word << 15 & 0xEFC60000
    low = word
    for _ in range(4):
        low = word ^ low << 7 & 0x9D2C5680
    high = low
    for _ in range(2):
        high = low ^ high >> 11
    return high & 0xFFFFFFFF


def at_words(generator, words):
    """``generator`` before it gives out these words, int64 [608]."""
    state = generator.get_state().view(torch.int64)
    state[1] = (state[1] >> 32 << 32) + GIVEN + 1
    state[2] = WORDS - GIVEN
    state[FIRST_WORD + WORDS - GIVEN : FIRST_WORD + WORDS] = untempered(words)
    return generator.set_state(state.view(torch.uint8))


@with_kernel
def test_extreme_uniforms(kernel, isa):
    """The ends, and the edges of octants and of the logarithm's halves: each as radius with each as angle."""
    edges = [k * 2**21 + i for k in range(8) for i in (-2, -1, 0, 1, 2)]
    uniforms = torch.tensor([*edges, *range(4913931, 4913935)]) & 0xFFFFFF
    radius, angle = torch.cartesian_prod(uniforms, uniforms).T
    ours, theirs = pair(0)
    given = torch.rand(GIVEN, generator=at_words(theirs, torch.arange(GIVEN)))
    assert torch.equal(given, torch.arange(GIVEN) * 2.0**-24)
    for i in range(0, len(radius), GIVEN // 2):
        words = torch.zeros(2, GIVEN // 2, dtype=torch.int64)
        for row, values in zip(words, (radius, angle), strict=True):
            values = values[i : i + GIVEN // 2]
            row[: len(values)] = values
        words = words.view(2, -1, 8).transpose(0, 1).flatten()
        x = draw((GIVEN,), at_words(ours, words))
        assert same_bits(x, torch.randn(GIVEN, generator=at_words(theirs, words)))
    assert kernel


@with_kernel
@pytest.mark.slow
def test_every_uniform(kernel):
    """All 2^24 of them as radius and, in another order, as angle."""
    ours, theirs = pair(0)
    k = torch.arange(2**24 + GIVEN)
    for i in range(0, 2**24, GIVEN // 2):
        radius = k[i : i + GIVEN // 2].view(-1, 8) & 0xFFFFFF
        words = torch.stack((radius, radius * 0x9E3779 + 5 & 0xFFFFFF), 1).flatten()
        x = draw((GIVEN,), at_words(ours, words))
        assert same_bits(x, torch.randn(GIVEN, generator=at_words(theirs, words))), i
    assert len(kernel) == -(-(2**24) // (GIVEN // 2))


# Who draws


def chosen(function, *args, **options):
    """The choice for the noise: its backend and the reasons against the kernel."""
    choices = genperf.explain(function, *args, **options).choices
    (choice,) = (c for c in choices if c.operator == "torch_normal")
    return choice.backend, dict(choice.refusals).get("cpu", "")


@with_kernel
def test_the_ops_draw_by_it():
    params = torch.zeros(4, 2, FEWEST)
    wanted = torch.randn(4, 1, FEWEST, generator=torch.Generator().manual_seed(2))
    options = {"rng": "torch", "generator": torch.Generator().manual_seed(2)}
    assert chosen(gaussian_sample, params, **options)[0] == "cpu"
    options["generator"].manual_seed(2)
    assert same_bits(gaussian_sample(params, **options).z, wanted)
    for generator in (None, torch.Generator().manual_seed(2)):
        assert chosen(DiagonalGaussian(params).sample, generator)[0] == "cpu"
    z = DiagonalGaussian(params).sample(torch.Generator().manual_seed(2))
    assert same_bits(z, wanted)


@with_kernel
@pytest.mark.parametrize(
    ("reason", "shape", "dtype"),
    [
        (f"{FEWEST - 1} elements, at least {FEWEST}", (FEWEST - 1,), torch.float32),
        ("torch.float64 is left to torch.randn", (FEWEST,), torch.float64),
        ("torch.bfloat16 is left to torch.randn", (FEWEST,), torch.bfloat16),
        ("0 elements", (0, 3), torch.float32),
    ],
)
def test_what_is_left_to_torch(reason, shape, dtype):
    ours, theirs = pair(1)
    backend, why = chosen(draw, shape, ours, dtype)
    assert backend == "reference"
    assert reason in why
    assert torch.equal(
        draw(shape, ours.manual_seed(1), dtype), torch.randn(shape, generator=theirs, dtype=dtype)
    )


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen = function
        return function(*args, **(kwargs or {}))


class WatchFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen = function
        return function(*args, **(kwargs or {}))


@with_kernel
def test_modes_see_the_draw():
    assert chosen(draw, (FEWEST,))[0] == "cpu"
    with Watch() as watch:
        backend, why = chosen(draw, (FEWEST,))
    assert (backend, watch.seen.overloadpacket) == ("reference", torch.ops.aten.randn)
    assert "mode" in why
    with WatchFunctions() as watch:
        assert chosen(draw, (FEWEST,))[0] == "reference"
    assert watch.seen is torch.randn


@with_kernel
def test_a_forced_backend_holds():
    with genperf.backend("reference"):
        assert chosen(draw, (FEWEST,)) == ("reference", "backend 'reference' is asked for")
    with genperf.backend("cpu"):
        assert chosen(draw, (FEWEST,))[0] == "cpu"


def wrong_number(run):
    def wrong(out, state):
        run(out, state)
        out[-1] = torch.nextafter(out[-1], out[-1] + 1)

    return wrong


def wrong_state(run):
    def wrong(out, state):
        run(out, state)
        state[FIRST_WORD + WORDS - 1] ^= 1 << 31

    return wrong


@with_kernel
@pytest.mark.parametrize(
    ("broken", "reason"),
    [(wrong_number, "gives other numbers"), (wrong_state, "leaves the generator otherwise")],
)
def test_a_kernel_that_differs_is_not_used(monkeypatch, broken, reason):
    monkeypatch.setattr(_backend.native.cpu, "torch_normal", broken(_backend.native.cpu.torch_normal))
    _torch_normal._difference.cache_clear()
    try:
        ours, theirs = pair(1)
        backend, why = chosen(draw, (FEWEST,), ours)
        assert backend == "reference"
        assert reason in why
        assert same_bits(draw((FEWEST,), ours.manual_seed(1)), torch.randn(FEWEST, generator=theirs))
    finally:
        _torch_normal._difference.cache_clear()


@pytest.mark.skipif(_backend.native is None, reason="no extension module")
def test_a_torch_without_avx2():
    """torch's other code, for any processor, calls the C library and gives other numbers."""
    code = """if True:
        import torch, genperf
        from genperf.ops import gaussian_sample
        zeros = torch.zeros(4, 1 << 14)
        choice = genperf.explain(gaussian_sample, zeros, zeros, rng="torch").choices[0]
        torch.manual_seed(1)
        z = gaussian_sample(zeros, zeros, rng="torch").z
        torch.manual_seed(1)
        print(choice.backend, torch.equal(z, torch.randn(4, 1 << 14)))
    """
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == ["reference", "True"], result.stdout + result.stderr


@with_kernel
def test_a_draw_meanwhile_is_not_drawn_again(kernel, monkeypatch):
    """Another thread draws while the kernel runs: its numbers stay its own."""
    ours, theirs = pair(1)
    run = _backend.native.cpu.torch_normal
    taken = []

    def disturbed(out, state):
        run(out, state)
        if len(taken) < disturbances:
            taken.append(torch.rand(7, generator=ours))

    monkeypatch.setattr(_backend.native.cpu, "torch_normal", disturbed)
    for disturbances in (1, 3):
        taken.clear()
        x = draw((1000,), ours)
        for others in taken:
            assert torch.equal(others, torch.rand(7, generator=theirs))
        assert len(taken) == disturbances
        assert same_bits(x, torch.randn(1000, generator=theirs))
        assert torch.equal(ours.get_state(), theirs.get_state())


@with_kernel
def test_threads_that_share_a_generator_share_its_numbers(kernel):
    ours, theirs = pair(9)
    draws = [[] for _ in range(4)]
    interval = sys.getswitchinterval()

    def work(mine):
        for _ in range(25):
            mine.append(draw((1 << 14,), ours))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in draws]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    first = sorted(x[0].item() for mine in draws for x in mine)
    assert first == sorted(torch.randn(1 << 14, generator=theirs)[0].item() for _ in range(100))
    assert torch.equal(ours.get_state(), theirs.get_state())
