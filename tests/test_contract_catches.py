"""Each check of the contract fails for an implementation that breaks it."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from genperf_testing import contract
from genperf_testing.cases import Case, all_cases, normals

import genperf
from genperf import _backend
from genperf.ops import gaussian_sample as public
from genperf.ops import philox_random
from genperf.ops.gaussian_sample import _backward_op, _forward_op

CASES = {case.name: case for case in all_cases()["gaussian_sample"]}
ELEMENT = CASES["logsigma, prior, none"]
SUM = CASES["logvar"]
KEYS = CASES["logvar, prior, keys"]
MEAN, SCALE, NOISE, KEY, TRANSFORM, LOW, HIGH, REDUCE = 0, 1, 4, 5, 6, 7, 8, 11  # arguments of the forward op
GRADIENTS = 3  # arguments of the backward op that come before those


@contextmanager
def broken(operator, wrong: Callable):
    """Backend ``cpu`` is ``wrong(run, *args)``, where ``run`` is right."""
    right = operator._implementations["cpu"]
    operator.implement("cpu", functools.partial(wrong, right.run), right.refuses)
    _backend._forget_choices()
    try:
        with genperf.backend("cpu"):
            yield
    finally:
        operator.implement("cpu", right.run, right.refuses)
        _backend._forget_choices()


def replaced(args: tuple, **by_index) -> list:
    return [by_index.get(f"a{i}", arg) for i, arg in enumerate(args)]


def _kl_off(run, *args):
    z, kl, log_prob = run(*args)
    return z, kl * (1 + 1e-5), log_prob


def _one_kl_off(run, *args):
    z, kl, log_prob = run(*args)
    kl.view(-1)[-1] *= 1 + 1e-4
    return z, kl, log_prob


def _z_in_half(run, *args):
    z, *rest = run(*args)
    return z.bfloat16().to(z.dtype), *rest


def _even_rows_alone(run, *args):
    z, *rest = run(*args)
    out = torch.empty_like(z)
    out[::2] = z[::2]
    return out, *rest


def _noise_by_one(run, *args):
    mean, key = args[MEAN], args[KEY]
    noise = philox_random((mean.numel() + 1,), key)[1:].view(mean.shape)
    return run(*replaced(args, a4=noise, a5=None))


def _kl_in_the_inputs_dtype(run, *args):
    z, kl, log_prob = run(*args)
    return z, kl.to(z.dtype), log_prob


def _absent(run, *args):
    z, kl, _ = run(*args)
    return z, kl, torch.zeros_like(kl)


_calls = itertools.count()


def _by_call(run, *args):
    z, kl, log_prob = run(*args)
    return z, kl * (1 + 2.0**-23 * (next(_calls) % 2)), log_prob


def _by_threads(run, *args):
    """Partial sums, as many as there are threads."""
    z, kl, log_prob = run(*replaced(args, a11=False))
    return (
        z,
        sum(part.sum(1) for part in kl.flatten(1).chunk(torch.get_num_threads(), 1)),
        log_prob.flatten(1).sum(1),
    )


def _by_batch(run, *args):
    z, kl, log_prob = run(*args)
    return z, kl * (1 + 2.0**-23 * (len(kl) > 2)), log_prob


def _key_of_the_batch(run, *args):
    """One key for all, where each sample has its own."""
    return run(*replaced(args, a5=args[KEY][0]))


def _strides_ignored(run, *args):
    mean = args[MEAN]
    at_hand = mean.as_strided(mean.shape, torch.empty(mean.shape).stride(), mean.storage_offset())
    return run(*replaced(args, a0=at_hand))


def _stride_of_another(run, *args):
    """A contiguous scale is read with the strides of the mean, where it is long enough."""
    mean, scale = args[MEAN], args[SCALE]
    if sum((n - 1) * s for n, s in zip(mean.shape, mean.stride(), strict=True)) < scale.numel():
        scale = scale.contiguous().as_strided(scale.shape, mean.stride())
    return run(*replaced(args, a1=scale))


def _nan_lost(run, *args):
    return tuple(None if x is None else x.nan_to_num(0.0) for x in run(*args))


def _nan_spread(run, *args):
    z, kl, log_prob = run(*args)
    return z, kl + 0 * kl.sum(), log_prob


def _exclusive_clamp(run, *args):
    scale, low, high = (args[GRADIENTS + i] for i in (SCALE, LOW, HIGH))
    grad_mean, grad_scale, *rest = run(*args)
    return grad_mean, torch.where((scale > low) & (scale < high), grad_scale, 0.0), *rest


def _other_noise(run, *args):
    """The backward pass draws noise of its own."""
    return run(*replaced(args, a8=args[GRADIENTS + KEY] + 1))


def _no_prior_gradient(run, *args):
    grad_mean, grad_scale, of_prior_mean, of_prior_scale = run(*args)
    return grad_mean, grad_scale, of_prior_mean, torch.zeros_like(of_prior_scale)


def _counting(run, *args):
    """The gradients of later passes differ."""
    grad_mean, *rest = run(*args)
    return grad_mean + next(_calls), *rest


def _kept_buffer(run, *args, _room={}):  # noqa: B006
    """A buffer of an earlier pass is added to."""
    grad_mean, *rest = run(*args)
    _room["sum"] = _room.get("sum", 0) + grad_mean
    return _room["sum"], *rest


def accuracy(case, shape=(5, 24), dtype=torch.float32):
    return lambda: contract.check_accuracy(case, shape, dtype)


def layouts(case):
    def check():
        for layout in contract.LAYOUTS:
            contract.check_layout(case, (2, 3, 4, 5), layout, torch.float32)

    return check


MUTATIONS = [
    (_forward_op, _kl_off, accuracy(SUM)),
    (_forward_op, _kl_off, accuracy(ELEMENT)),
    (_forward_op, _one_kl_off, accuracy(SUM)),
    (_forward_op, _one_kl_off, accuracy(ELEMENT, (2, 1100))),
    (_forward_op, _z_in_half, accuracy(SUM)),
    (_forward_op, _z_in_half, accuracy(SUM, dtype=torch.float16)),
    (_forward_op, _even_rows_alone, accuracy(SUM)),
    (_forward_op, _noise_by_one, accuracy(SUM)),
    (_forward_op, _kl_in_the_inputs_dtype, accuracy(SUM, dtype=torch.bfloat16)),
    (_forward_op, _absent, accuracy(SUM)),
    (_backward_op, _exclusive_clamp, accuracy(CASES["logvar, clamp, prior, boundary"])),
    (_backward_op, _other_noise, accuracy(SUM)),
    (_backward_op, _no_prior_gradient, accuracy(KEYS)),
    (_forward_op, _by_call, lambda: contract.check_repeatable(SUM, (3, 9001))),
    (_forward_op, _by_threads, lambda: contract.check_repeatable(SUM, (3, 9001))),
    (_backward_op, _counting, lambda: contract.check_repeatable(SUM, (3, 9001))),
    (_forward_op, _by_batch, lambda: contract.check_batch_composition(KEYS, (5, 24))),
    (_forward_op, _key_of_the_batch, lambda: contract.check_batch_composition(KEYS, (5, 24))),
    (_forward_op, _strides_ignored, layouts(SUM)),
    (_forward_op, _stride_of_another, layouts(SUM)),
    (_forward_op, _nan_lost, lambda: contract.check_nan_locality(SUM)),
    (_forward_op, _nan_spread, lambda: contract.check_nan_locality(SUM)),
    (_backward_op, _nan_lost, lambda: contract.check_nan_locality(SUM)),
    (_backward_op, _counting, lambda: contract.check_retained_graph(SUM)),
    (_backward_op, _kept_buffer, lambda: contract.check_retained_graph(SUM)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "wrong", "check"), MUTATIONS, ids=[m[1].__name__[1:] for m in MUTATIONS]
)
def test_a_broken_kernel_is_caught(operator, wrong, check):
    with genperf.backend("cpu"):
        check()
    with broken(operator, wrong), pytest.raises(AssertionError):
        check()


def test_wrong_second_derivatives_are_caught(monkeypatch):
    """Of formulas that are differentiated once more with a factor lost."""
    module = genperf.ops.gaussian_sample.__globals__
    right = module["reference_backward"]

    def wrong(*args):
        grad_mean, grad_scale, *rest = right(*args)
        return grad_mean, grad_scale.detach(), *rest

    with genperf.backend("cpu"):
        contract.check_double_backward(KEYS)
        contract.truth_of.cache_clear()
        contract.truth_of(contract.second_derivatives(KEYS), KEYS.shapes[0], torch.float32, "cpu")
        monkeypatch.setitem(module, "reference_backward", wrong)
        with pytest.raises(AssertionError):
            contract.check_double_backward(KEYS)


def test_what_is_saved_is_caught():
    case = Case("exp", lambda x, y, key: [public(x, y, key=key).z.exp()], SUM.inputs, SUM.constants)
    with pytest.raises(AssertionError, match=r"exp: keeps \[\(5, 24\)\]"):
        contract.check_saves_only_inputs(case, (5, 24))


def test_a_graph_break_is_caught():
    def function(x, y, key):
        if x.sum() > 0:
            x = x + 1
        return public(x, y, key=key)

    case = Case("break", function, SUM.inputs, SUM.constants)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        contract.check_compile(case, (5, 24))


def test_a_fake_kernel_that_lies_is_caught():
    def transposed(run, *args):
        z, *rest = run(*args)
        return z.T.contiguous().T, *rest

    with broken(_forward_op, transposed):
        calls = contract.recorded_calls(SUM, (3, 7))
        with pytest.raises(Exception, match="test_faketensor failed"):
            torch.library.opcheck(*calls[0], test_utils=("test_faketensor",))


def test_an_output_that_is_an_input_is_caught():
    with broken(_forward_op, lambda run, *args: (args[MEAN], *run(*args)[1:])):
        calls = contract.recorded_calls(SUM, (3, 7))
        with pytest.raises(Exception, match="test_schema failed"):
            torch.library.opcheck(*calls[0], test_utils=("test_schema",))


def _allocate(like):
    return (
        torch.empty(3), torch.empty_like(like), like.new_empty(2, 2), torch.empty(4, dtype=torch.int64),
        torch.zeros(3),
    )  # fmt: skip


def test_memory_of_genperf_starts_as_nan():
    within = types.FunctionType(_allocate.__code__, {"torch": torch, "__name__": "genperf.ops.some_op"})
    *floats, integers, zeros = within(normals((2, 3)).bfloat16())
    assert all(x.isnan().all() for x in floats)
    assert (integers != 0).all()
    assert (zeros == 0).all()
