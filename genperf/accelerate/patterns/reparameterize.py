"""The reparameterization as a method: ``reparameterize(mu, logvar)`` of many repositories under its many
names, and ``_sample_gauss(mu, std) -> (z, eps)`` of pythae.

What the second argument means, the order of the two, what evaluation mode returns and how the noise is
drawn differ between repositories. They are found by running the method: a convention is accepted when it
gives, from the same seed, the bits of the method for every probe.
"""

from __future__ import annotations

import ast
import copy
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from genperf.accelerate._pattern import Match, Options, Refusal
from genperf.accelerate._rewrite import CannotRewrite, methods_of, syntax_tree
from genperf.nn._eager_sample import eager_sample
from genperf.ops.gaussian_sample import gaussian_sample
from genperf.ops.philox_random import draw_key, philox_random

_NAMES = re.compile(
    r"_*(reparam(eteri[sz](e|ation)|etri[sz](e|ation))?|sample_gauss(ian)?)(_trick)?", re.IGNORECASE
)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INDEPENDENT = {"training", "device", "dtype"}


@dataclass(frozen=True)
class Convention:
    """What a reparameterize method does with its two arguments.

    Attributes:
        parametrization: of the scale, as in :func:`genperf.ops.gaussian_sample`.
        mean_first: the mean is the first argument.
        noise_like_scale: the noise has the memory layout of the scale (``randn_like``), not a contiguous one.
        returns_noise: the result is (z, noise), not z.
        mean_in_eval: the result is the mean in evaluation mode.
        dtypes: the dtypes for which all of this was found to hold.
    """

    parametrization: str
    mean_first: bool
    noise_like_scale: bool
    returns_noise: bool
    mean_in_eval: bool = False
    dtypes: tuple[torch.dtype, ...] = ()

    def __str__(self) -> str:
        first, second = ("mean", self.parametrization) if self.mean_first else (self.parametrization, "mean")
        returns = "(z, noise)" if self.returns_noise else "z"
        return f"({first}, {second}) -> {returns}" + ("; the mean in eval" if self.mean_in_eval else "")


def find(module: nn.Module, cls: type, options: Options) -> Iterator[Match | Refusal]:
    """Yield a match or a refusal for each method of ``cls`` with such a name."""
    for name, function in methods_of(cls).items():
        if not _NAMES.fullmatch(name):
            continue
        was = f"{cls.__name__}.{name}"
        if name in module.__dict__:
            yield Refusal(was, "it is set on the module itself")
            continue
        try:
            convention = _convention(module, function)
        except _Unknown as reason:
            yield Refusal(was, str(reason))
            continue
        method = _replacement(function, convention, options.rng)
        key = ("reparameterize", name, function, convention, options.rng)
        yield Match(was + str(convention), "gaussian_sample", key, {name: method})


class _Unknown(Exception):  # noqa: N818
    """The method follows no known convention."""


def _convention(module: nn.Module, function: FunctionType) -> Convention:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    if len(parameters) != 2 or any(
        p.kind is not p.POSITIONAL_OR_KEYWORD or p.default is not p.empty for p in parameters
    ):
        raise _Unknown(f"it takes {inspect.signature(function)}, not a mean and a scale")
    _check_self(function)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        training = _Probe(module, function, training=True)
        convention = next(filter(training.fits, _candidates()), None)
        if convention is None:
            raise _Unknown(
                "it does not give the bits of mean + sigma * randn for a log-variance, log-sigma or std"
            )
        evaluation = _Probe(module, function, training=False)
        mean_in_eval = not evaluation.fits(convention)
        if mean_in_eval and not evaluation.gives_mean(convention):
            raise _Unknown("in evaluation mode it gives neither a sample nor the mean")
        dtypes = tuple(dtype for dtype in _DTYPES if training.fits(convention, dtype))
    found = Convention(
        convention.parametrization,
        convention.mean_first,
        convention.noise_like_scale,
        convention.returns_noise,
        mean_in_eval,
        dtypes,
    )
    training.check_gradients(found)
    return found


def _candidates() -> Iterator[Convention]:
    choices = itertools.product(("logvar", "logsigma", "std"), (True, False), (True, False), (False, True))
    return (Convention(*choice) for choice in choices)


def _check_self(function: FunctionType) -> None:
    """Raise unless the method depends on nothing of its module but its mode."""
    try:
        tree = syntax_tree(function)
    except CannotRewrite as error:
        raise _Unknown(str(error)) from error
    owner = tree.args.args[0].arg
    attributes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    ]
    own = [node for node in attributes if node.value.id == owner]  # type: ignore[attr-defined]
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == owner]
    if len(uses) > len(own):
        raise _Unknown("it uses its module in a way that is not known")
    stored = sorted({node.attr for node in own if not isinstance(node.ctx, ast.Load)})
    if stored:
        raise _Unknown(f"it stores {', '.join(stored)} on its module")
    read = sorted({node.attr for node in own} - _INDEPENDENT)
    if read:
        raise _Unknown(f"it reads {', '.join(read)} of its module")


class _Probe:
    """Runs the method on a shallow copy of the module, in one mode, and a convention beside it."""

    def __init__(self, module: nn.Module, function: FunctionType, training: bool) -> None:
        self.module = copy.copy(module)
        self.module.training = training
        self.function = function

    def run(self, function: Callable[..., Any], first: Tensor, second: Tensor) -> tuple[Any, Tensor]:
        """The result for the fixed seed, and the state of the generator afterwards."""
        torch.manual_seed(11)
        return function(self.module, first, second), torch.get_rng_state()

    def fits(self, convention: Convention, dtype: torch.dtype = torch.float32) -> bool:
        """Whether ``convention`` gives the bits and layouts of the method for all probes of ``dtype``."""
        method = _eager(convention)
        for first, second in _inputs(dtype):
            try:
                theirs, state = self.run(self.function, first, second)
            except Exception:
                return False
            ours, expected_state = self.run(method, first, second)
            theirs = theirs if isinstance(theirs, tuple) else (theirs,)
            ours = ours if isinstance(ours, tuple) else (ours,)
            if len(theirs) != len(ours) or not all(map(_identical, theirs, ours)):
                return False
            if not torch.equal(state, expected_state):
                return False
        return True

    def gives_mean(self, convention: Convention) -> bool:
        """Whether the method returns its mean and draws nothing."""
        for first, second in _inputs(torch.float32):
            torch.manual_seed(11)
            before = torch.get_rng_state()
            result, state = self.run(self.function, first, second)
            mean = first if convention.mean_first else second
            if result is not mean or not torch.equal(state, before):
                return False
        return not convention.returns_noise

    @torch.enable_grad()
    def check_gradients(self, convention: Convention) -> None:
        """Raise unless the method passes gradients to both arguments as the definition does."""
        gradients = []
        with torch.random.fork_rng(devices=[]):
            for function in (self.function, _eager(convention)):
                arguments = [x.double().requires_grad_() for x in next(_inputs(torch.float32))]
                result, _ = self.run(function, *arguments)
                z = result[0] if isinstance(result, tuple) else result
                if not z.requires_grad:
                    raise _Unknown("it gives no gradient")
                gradients.append(torch.autograd.grad(z.square().sum(), arguments, allow_unused=True))
        for theirs, ours in zip(*gradients, strict=True):
            if theirs is None or not torch.allclose(theirs, ours, rtol=1e-4, atol=1e-4):
                raise _Unknown("its gradient is not that of mean + sigma * noise")


def _identical(theirs: Any, ours: Tensor) -> bool:
    return (
        isinstance(theirs, Tensor)
        and theirs.dtype == ours.dtype
        and theirs.stride() == ours.stride()
        and torch.equal(theirs, ours)
    )


def _inputs(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of arguments: few and many elements, several ranks, transposed, halves of one tensor."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    yield normal(2, 3), normal(2, 3).abs()
    yield normal(9, 17), normal(9, 17)
    yield normal(2, 3, 4, 5), normal(2, 3, 4, 5)
    yield normal(6, 9).t(), normal(6, 9).t()
    yield normal(5, 24).chunk(2, dim=1)  # type: ignore[misc]


def _draw(convention: Convention, mean: Tensor, scale: Tensor) -> Tensor:
    if convention.noise_like_scale:
        return torch.randn_like(scale)
    return torch.randn(scale.shape, dtype=scale.dtype, device=scale.device)


def _eager(convention: Convention) -> Callable[..., Any]:
    """The convention by operations of torch."""

    def method(self: nn.Module, first: Tensor, second: Tensor) -> Any:
        mean, scale = (first, second) if convention.mean_first else (second, first)
        noise = _draw(convention, mean, scale)
        sigma = scale
        if convention.parametrization != "std":
            sigma = torch.exp(0.5 * scale if convention.parametrization == "logvar" else scale)
        z = mean + sigma * noise
        return (z, noise) if convention.returns_noise else z

    return method


def _replacement(function: FunctionType, convention: Convention, rng: str) -> FunctionType:
    """A method that follows ``convention`` with the kernel; what it does not cover runs ``function``."""
    parametrization, returns_noise = convention.parametrization, convention.returns_noise

    def method(self: nn.Module, first: Tensor, second: Tensor) -> Any:
        mean, scale = (first, second) if convention.mean_first else (second, first)
        if not (
            isinstance(mean, Tensor)
            and isinstance(scale, Tensor)
            and mean.dtype in convention.dtypes
            and scale.dtype == mean.dtype
            and scale.shape == mean.shape
            and scale.device == mean.device
        ):
            return function(self, first, second)
        if convention.mean_in_eval and not self.training:
            return mean
        z: Tensor | None
        noise: Tensor | None
        if rng == "philox":
            noise = None
            if returns_noise:
                noise = philox_random(mean.shape, draw_key(mean.device), dtype=mean.dtype)
        else:
            noise = _draw(convention, mean, scale)
        if noise is not None and mean.device.type == "cpu":
            z = eager_sample(mean, scale, noise, parametrization=parametrization)[0]
        else:
            z = gaussian_sample(mean, scale, parametrization=parametrization, kl=False, noise=noise).z
        return (z, noise) if returns_noise else z

    first, second = list(inspect.signature(function).parameters)[1:]
    method = _with_argument_names(method, first, second)
    method.__name__, method.__qualname__ = function.__name__, function.__qualname__
    method.__doc__, method.__module__ = function.__doc__, function.__module__
    return method


def _with_argument_names(method: Any, first: str, second: str) -> FunctionType:
    """``method`` with its arguments called ``first`` and ``second``, for callers that name them."""
    names = {"first": first, "second": second}
    code = method.__code__
    new = code.replace(co_varnames=tuple(names.get(name, name) for name in code.co_varnames))
    return FunctionType(new, method.__globals__, method.__name__, method.__defaults__, method.__closure__)
