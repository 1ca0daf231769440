"""Choosing a backend and an instruction set, and being told why."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
import textwrap
import types

import pytest
import torch

import genperf
from genperf import _backend, _op
from genperf.__main__ import main
from genperf._op import Operator
from genperf.ops import gaussian_sample

T = torch.zeros(2, 3)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    names = ("GENPERF_BACKEND", "GENPERF_CPU_ISA", "TRITON_INTERPRET")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=inherited | environment,
    )


def chosen(x: torch.Tensor = T, **options) -> str:
    """The backend of one call."""
    (choice,) = genperf.explain(gaussian_sample, x, x, noise=x, **options).choices
    return choice.backend


# backend


def test_the_cpu_kernels_are_the_default():
    assert chosen() == "cpu"
    assert chosen(T.double()) == "reference"


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_a_backend_by_name(name):
    with genperf.backend(name):
        assert chosen() == name
    assert chosen() == "cpu"


def test_blocks_nest_and_end_with_an_error():
    with genperf.backend("reference"):
        with genperf.backend("cpu"):
            assert chosen() == "cpu"
        assert chosen() == "reference"
        with pytest.raises(KeyError), genperf.backend("cpu"):
            raise KeyError
        assert chosen() == "reference"
    assert chosen() == "cpu"


@pytest.mark.parametrize("name", ["gpu", "", None])
def test_an_unknown_backend(name):
    with (
        pytest.raises(ValueError, match=r"unknown backend .*; expected one of cpu, cuda, triton, reference"),
        genperf.backend(name),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "x", "reason"),
    [
        ("cpu", T.double(), "torch.float64 is left to the reference"),
        ("cpu", torch.zeros(9 * (1,)), "9 dimensions, at most 8"),
        ("cpu", T.to("meta"), "the tensors are on meta"),
        ("triton", T.to("meta"), "the tensors are on meta"),
    ],
    ids=str,
)
def test_a_forced_backend_that_cannot_run_tells_why(name, x, reason):
    if name == "triton":
        pytest.importorskip("triton")
    with (
        genperf.backend(name),
        pytest.raises(RuntimeError, match=f"genperf::gaussian_sample: backend '{name}' cannot run: {reason}"),
    ):
        gaussian_sample(x, x, noise=x)


def test_cuda_without_cuda_tells_why():
    reason = "the tensors are on cpu" if hasattr(_backend.native, "cuda") else "CUDA kernels are not built in"
    with genperf.backend("cuda"), pytest.raises(RuntimeError, match=f"backend 'cuda' cannot run: {reason}"):
        gaussian_sample(T, T)


def test_triton_on_the_cpu_tells_of_its_interpreter():
    if importlib.util.find_spec("triton") is None:
        reason = "triton is not installed"
    else:
        reason = "the tensors are on cpu; TRITON_INTERPRET=1 interprets it"
    result = python(
        """
        import torch
        from genperf.ops import gaussian_sample
        gaussian_sample(torch.zeros(2, 3), torch.zeros(2, 3), noise=torch.zeros(2, 3))
        """,
        GENPERF_BACKEND="triton",
    )
    assert result.returncode == 1
    assert f"RuntimeError: genperf::gaussian_sample: backend 'triton' cannot run: {reason}" in result.stderr


def test_a_missing_extension_module_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_backend, "native", None)
    monkeypatch.setattr(_backend, "_native_error", "no such file")
    _backend._forget_choices()
    try:
        with genperf.backend("cpu"), pytest.raises(RuntimeError, match=r"cannot be loaded \(no such file\)"):
            gaussian_sample(T, T)
        explanation = genperf.explain(gaussian_sample, T, T, noise=T)
        assert explanation.choices[0].backend == "reference"
        assert ("cpu", "the extension module cannot be loaded (no such file)") in explanation.choices[
            0
        ].refusals
        assert genperf.cpu_isas() == ()
        with pytest.raises(ValueError, match="'baseline' cannot be used here"), genperf.cpu_isa("baseline"):
            pass
        assert "missing: no such file" in _backend.doctor()
    finally:
        monkeypatch.undo()
        _backend._forget_choices()


def test_autocast_and_inference_mode_change_nothing():
    expected = gaussian_sample(T + 1, T, noise=T + 0.5)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        out = gaussian_sample(T + 1, T, noise=T + 0.5)
    assert out.z.dtype == torch.float32
    assert torch.equal(out.z, expected.z)
    assert torch.equal(out.kl, expected.kl)


def test_the_interpreter_runs_only_where_it_is_forced(monkeypatch):
    """As ENVIRONMENT.md has it: it is some thousand times slower than the reference."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with genperf.backend("triton"):
        assert chosen() == "triton"
    monkeypatch.setattr(_backend, "native", None)
    _backend._forget_choices()
    try:
        assert chosen() == "reference"
    finally:
        monkeypatch.undo()
        _backend._forget_choices()


# explain


def test_explain_lists_every_op_in_order():
    x = T.clone().requires_grad_()

    def step():
        out = gaussian_sample(x, x)
        (out.z.sum() + out.kl.sum()).backward()

    explanation = genperf.explain(step)
    assert [(c.operator, c.backend) for c in explanation.choices] == [
        ("draw_key", "reference"),
        ("gaussian_sample", "cpu"),
        ("gaussian_sample_backward", "cpu"),
    ]
    text = str(explanation)
    for word in ("op", "backend", "why not another", "draw_key", "gaussian_sample_backward"):
        assert word in text
    assert repr(explanation) == text


def test_explain_gives_the_reasons():
    (choice,) = genperf.explain(gaussian_sample, T.double(), T.double(), noise=T.double()).choices
    reasons = dict(choice.refusals)
    assert reasons["cpu"] == "torch.float64 is left to the reference"
    assert set(reasons) == {"cpu", "cuda", "triton"}


def test_explain_takes_modules_and_keyword_arguments():
    class Module(torch.nn.Module):
        def forward(self, x, *, kl):
            return gaussian_sample(x, x, noise=x, kl=kl).z

    assert [c.backend for c in genperf.explain(Module(), T, kl=False).choices] == ["cpu"]
    assert genperf.explain(torch.relu, T).choices == []


def test_explain_ends_its_record_with_an_error():
    with pytest.raises(TypeError, match="mean is int"):
        genperf.explain(gaussian_sample, 1, T)
    explanation = genperf.explain(gaussian_sample, T, T, noise=T)
    gaussian_sample(T, T)
    assert len(explanation.choices) == 1


def test_explain_needs_a_callable():
    with pytest.raises(TypeError, match=r"genperf.explain: function is int, expected a callable"):
        genperf.explain(3)


# instruction sets


def test_instruction_sets():
    assert genperf.cpu_isas()[0] == "baseline"
    widest = _backend.native.isa()
    for name in genperf.cpu_isas():
        with genperf.cpu_isa(name):
            assert _backend.native.isa() == name
    assert _backend.native.isa() == widest
    with pytest.raises(KeyError), genperf.cpu_isa("baseline"):
        raise KeyError
    assert _backend.native.isa() == widest


@pytest.mark.parametrize("name", ["avx1024", "", None])
def test_an_unknown_instruction_set(name):
    with (
        pytest.raises(
            ValueError, match=r"genperf.cpu_isa: .* cannot be used here; expected one of \('baseline'"
        ),
        genperf.cpu_isa(name),
    ):
        pass


# environment


def test_environment():
    code = """
        import torch
        import genperf
        from genperf import _backend, _op
        x = torch.zeros(2, 3)
        def chosen():
            return genperf.explain(genperf.ops.gaussian_sample, x, x, noise=x).choices[0].backend
        print(chosen(), _backend.native.isa())
        with genperf.backend("cpu"):
            print(chosen())
    """
    forced = python(code, GENPERF_BACKEND="reference", GENPERF_CPU_ISA="baseline")
    assert forced.stdout.split() == ["reference", "baseline", "cpu"]
    assert python(code).stdout.split() == ["cpu", genperf.cpu_isas()[-1], "cpu"]
    assert python(code, GENPERF_BACKEND="", GENPERF_CPU_ISA="").stdout.split()[0] == "cpu"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("GENPERF_BACKEND", "fpga", "unknown backend 'fpga'; expected one of cpu, cuda, triton, reference"),
        ("GENPERF_CPU_ISA", "mmx", "'mmx' cannot be used here; expected one of ('baseline'"),
    ],
)
def test_a_wrong_environment(name, value, message):
    result = python("import genperf; genperf.backend", **{name: value})
    assert result.returncode == 1
    assert f"ValueError: environment variable {name}: {message}" in result.stderr


# doctor


def test_doctor(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert text.strip() == _backend.doctor().strip()
    for word in (
        "genperf",
        torch.__version__,
        "triton",
        _backend.native.isa(),
        "CUDA kernels",
        *_backend.BACKENDS,
    ):
        assert word in text
    assert "Every op is asked" not in text
    with genperf.backend("reference"):
        assert "Every op is asked to use 'reference'." in _backend.doctor()


def test_doctor_as_a_command():
    result = subprocess.run([sys.executable, "-m", "genperf"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "extension module" in result.stdout
    assert (
        subprocess.run([sys.executable, "-m", "genperf", "--nonsense"], capture_output=True).returncode == 2
    )


# Operators


_numbers = itertools.count()


@pytest.fixture
def twice():
    """An op of our own, with a backend that takes positive sizes only."""
    operator = Operator(f"twice_{next(_numbers)}", "(Tensor x) -> Tensor", lambda x: 2 * x, torch.empty_like)
    calls = []

    def run(x):
        calls.append(x.shape)
        return 2 * x

    operator.implement("cpu", run, lambda x: None if x.numel() else "empty")
    yield types.SimpleNamespace(operator=operator, calls=calls)
    _backend.choices.remove(operator._usable)


def test_an_operator_falls_back_by_argument(twice):
    assert torch.equal(twice.operator(T + 1), T + 2 * 1)
    twice.operator(T[:0])
    assert twice.calls == [T.shape]
    assert twice.operator.choose(T[:0]).refusals[0] == ("cpu", "empty")
    assert twice.operator.backends == ("cpu", "reference")


def test_an_operator_without_the_forced_backend(twice):
    """Where an op has no choice but the reference, forcing another is no error; where it has, it is."""
    with genperf.backend("triton"), pytest.raises(RuntimeError, match="this op has no such backend"):
        twice.operator(T)


def test_an_operator_within_torch(twice):
    """Through the dispatcher: fake tensors, functorch and the profiler see the torch op."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        assert twice.operator(mode.from_tensor(T)).shape == T.shape
    assert not twice.calls
    with torch.profiler.profile() as profile:
        twice.operator(T)
    assert any(twice.operator.name in event.key for event in profile.key_averages())


# Calls past the dispatcher


@pytest.mark.parametrize("direct_device", [_op._direct_device, _op.direct_device], ids=["python", "native"])
def test_what_may_go_past_the_dispatcher(direct_device):
    """The decision in C++ is that in Python."""

    class Subclass(torch.Tensor):
        pass

    negated = torch.zeros(2, dtype=torch.complex64).conj().imag
    assert direct_device(T, None, True, 1, 0.5, [2, 3], torch.Generator()) == "cpu"
    assert direct_device(torch.nn.Parameter(T)) == "cpu"
    assert direct_device(None, T.to("meta"), T) == "meta"
    assert direct_device(None, torch.device("cuda:1")) == "cuda"
    assert direct_device() == "cpu"
    for arg in (negated, T.as_subclass(Subclass), "text", (1, 2)):
        assert direct_device(T, arg) is None
    with torch.profiler.profile():
        assert direct_device(T) is None
    inside = []
    torch.vmap(lambda x: (inside.append(direct_device(T)), x)[1])(T)
    torch.func.grad(lambda x: (inside.append(direct_device(x)), x.sum())[1])(T)
    assert inside == [None, None]


def listened_to(how: str):
    return {
        "profiler": torch.profiler.profile,
        "recorder": _op._recording,
        "reference": lambda: genperf.backend("reference"),
    }[how]()


@pytest.mark.parametrize("how", ["profiler", "recorder", "reference"])
def test_the_short_way_is_left_where_somebody_listens(how):
    key = torch.tensor([3, 4])
    short = gaussian_sample(T + 0.5, T, key=key, log_prob=True)
    with listened_to(how):
        long = gaussian_sample(T + 0.5, T, key=key, log_prob=True)
    for a, b in zip(short, long, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sample", "mean"])
def test_the_short_way_gives_the_same(dtype, reduction):
    """Bits, shapes, dtypes and strides; through the dispatcher where a profiler is listening."""
    torch.manual_seed(0)
    mean, scale = torch.randn(2, 5, 3, 4, dtype=dtype).transpose(0, 1).chunk(2, 3)
    wanted = itertools.product((False, True), repeat=3)
    for (sample, kl, log_prob), key in itertools.product(wanted, (None, torch.tensor([5, 6]))):
        options = {"sample": sample, "kl": kl, "log_prob": log_prob, "reduction": reduction, "key": key}
        torch.manual_seed(1)
        short = gaussian_sample(mean, scale, **options)
        torch.manual_seed(1)
        with torch.profiler.profile():
            long = gaussian_sample(mean, scale, **options)
        for a, b in zip(short, long, strict=True):
            if b is None:
                assert a is None
            else:
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
                assert torch.equal(a, b)


def test_a_negated_view():
    """A tensor whose sign is yet to be changed has other values than its memory."""
    x = torch.randn(3, 4, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    zero = torch.zeros(3, 4)
    assert torch.equal(gaussian_sample(x, zero, noise=zero).z, x)
    key = torch.tensor([1, 2])
    assert torch.equal(gaussian_sample(x, zero, key=key).z, gaussian_sample(x.resolve_neg(), zero, key=key).z)
    mean = x.detach().requires_grad_()
    gaussian_sample(mean, zero, noise=zero).kl.sum().backward()
    assert torch.equal(mean.grad, x)


class WithoutTable(torch.Tensor):
    """Read as torch before 2.10 lets every tensor be read: by its attributes."""

    __dlpack_c_exchange_api__ = None
    reads = 0

    def data_ptr(self):
        WithoutTable.reads += 1
        return super().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tensors_without_a_table_of_dlpack(dtype):
    packed, key = torch.randn(3, 4, 10).to(dtype), torch.tensor([5, 6])
    mean, scale = packed.transpose(1, 2)[:, 1:].chunk(2, 2)
    WithoutTable.reads = 0
    with genperf.backend("cpu"):
        expected = gaussian_sample(mean, scale, key=key)
        out = gaussian_sample(mean.as_subclass(WithoutTable), scale.as_subclass(WithoutTable), key=key)
    assert WithoutTable.reads == 2
    assert torch.equal(out.z, expected.z)
    assert torch.equal(out.kl, expected.kl)


def test_keys_in_inference_mode_and_threads():
    """The key that a call draws for itself is used again: not between threads, and in any mode."""
    import threading

    def draws() -> list[torch.Tensor]:
        with torch.inference_mode():
            first = gaussian_sample(T, T).z
        return [first, gaussian_sample(T, T).z]

    found = draws()
    thread = threading.Thread(target=lambda: found.extend(draws()))
    thread.start()
    thread.join()
    assert len({tuple(z.flatten().tolist()) for z in found}) == 4
