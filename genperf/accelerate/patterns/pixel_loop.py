"""Loops that draw an image pixel by pixel and call a network for each: ``generate`` and ``sample`` of
PixelCNN repositories, and the sampler of pythae's VQ-VAE.

The loop stays, with its arguments, its way to draw and torch's random numbers; its network is computed pixel
by pixel by :mod:`genperf.sampling`. With ``rng="philox"`` a loop that draws from the softmax of the output
and returns the image becomes one native call with genperf's own noise.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn

from genperf.accelerate import _whole
from genperf.accelerate._network import module_of
from genperf.accelerate._pattern import Match, Options, Refusal
from genperf.accelerate._rewrite import CannotRewrite, methods_of, recompile_inside, syntax_tree
from genperf.accelerate._stepwise import Abandoned, Stepping, through
from genperf.accelerate._swap import kept_for
from genperf.accelerate._trial import Facts, Trial, Unknown, role_of

OBJECTS = True  # an object that is no module can be the owner of such a method

_NAME = "_genperf_through"
_METHODS = re.compile(r"_*(generate|sample|sampling)(_\w+)?")
_DRAWS = {"multinomial", "Categorical", "OneHotCategorical", "bernoulli", "bernoulli_", "Bernoulli", "argmax"}


def find(module: Any, cls: type, options: Options) -> Iterator[Match | Refusal]:
    """Yield a match or a refusal for each method of ``cls`` with such a loop."""
    for name, function in methods_of(cls).items():
        if not _METHODS.fullmatch(name) or not _DRAWS & _names(function):
            continue
        try:
            loop = _loop(function)
        except CannotRewrite as error:
            yield Refusal(f"{cls.__name__}.{name}", str(error))
            continue
        called = {} if loop is None else _networks(module, loop)
        if loop is None or not called:
            continue
        was = f"{cls.__name__}.{name}: {', '.join(called)} for each pixel"
        try:
            if name in module.__dict__:
                raise Unknown("it is set on the module itself")
            if len(called) > 1:
                raise Unknown("the output of one network goes into another")
            ((path, network),) = called.items()
            rewritten = _rewritten(function, path)
            trial = Trial(module, module_of(network), function, rewritten, loop.ends)
            facts = trial.facts(whole=options.rng == "philox")
        except Unknown as reason:
            yield Refusal(was, str(reason))
            continue
        if facts.needs_eval:
            was += f"; needs {path.removesuffix('.forward')}.eval()"
        key = ("pixel_loop", name, function, path, facts, options.rng)
        method = _replacement(function, rewritten, facts)
        kernel = "pixel_sampler" if facts.whole is None else "pixel_sampler, one call"
        yield Match(was, kernel, key, {name: method}, "cpu")


@dataclass(frozen=True)
class _Loop:
    """The calls in loops within loops, by how their function is written: ``self``, ``self.forward``, ..."""

    owner: str
    paths: tuple[str, ...]
    ends: bool  # nothing follows the loops but the return of a name


# the method's source


def _names(function: FunctionType) -> set[str]:
    inner = inspect.unwrap(function)
    return set(inner.__code__.co_names) if isinstance(inner, FunctionType) else set()


@functools.cache
def _loop(function: FunctionType) -> _Loop | None:
    inner = inspect.unwrap(function)
    tree = syntax_tree(inner)
    if not tree.args.args:
        return None
    owner = tree.args.args[0].arg
    calls = [call for call in _inner_calls(tree) if _root(call.func) == owner]
    if not calls:
        return None
    paths = tuple(dict.fromkeys(ast.unparse(call.func) for call in calls))
    tries = any(isinstance(node, (ast.Try, ast.Yield, ast.YieldFrom)) for node in ast.walk(tree))
    return _Loop(owner, paths, not tries and _ends_with_loop(tree.body))


def _inner_calls(tree: ast.AST, depth: int = 0) -> Iterator[ast.Call]:
    """The calls in loops within loops."""
    for node in ast.iter_child_nodes(tree):
        if depth >= 2 and isinstance(node, ast.Call):
            yield node
        yield from _inner_calls(node, depth + isinstance(node, ast.For))


def _root(node: ast.AST) -> str | None:
    """``a`` of ``a.b.c``."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _ends_with_loop(body: list[ast.stmt], returned: bool = False) -> bool:
    last = body[-1]
    if not returned and isinstance(last, ast.Return):
        return isinstance(last.value, ast.Name) and len(body) > 1 and _ends_with_loop(body[:-1], True)
    if isinstance(last, ast.With):
        return _ends_with_loop(last.body, returned)
    return (
        returned
        and isinstance(last, ast.For)
        and next(_inner_calls(ast.Module([last], [])), None) is not None
    )


def _networks(owner: Any, loop: _Loop) -> dict[str, Any]:
    """Those of the called things that are modules, or the forward of one."""
    found = {}
    for path in loop.paths:
        value = owner
        for name in path.split(".")[1:]:
            value = getattr(value, name, None)
        bound = getattr(value, "__self__", None)
        is_forward = isinstance(bound, nn.Module) and getattr(value, "__name__", "") == "forward"
        if isinstance(value, nn.Module) or is_forward:
            found[path] = value
    return found


def _rewritten(function: FunctionType, path: str) -> FunctionType:
    """The method with ``through(network)(...)`` in the place of ``network(...)``."""

    def transform(tree: ast.FunctionDef) -> ast.AST:
        for call in _inner_calls(tree):
            if ast.unparse(call.func) == path:
                call.func = ast.Call(ast.Name(_NAME, ast.Load()), [call.func], [])
        return tree

    try:
        return recompile_inside(function, {_NAME: through}, transform)
    except CannotRewrite as error:
        raise Unknown(str(error)) from error


# the method's replacement


def _replacement(function: FunctionType, stepped: FunctionType, facts: Facts) -> FunctionType:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        unknown = _unknown_arguments(signature, (self, *args), kwargs)
        if any(role_of(name) != "choice" for name in unknown):
            return function(self, *args, **kwargs)
        if facts.whole is not None and not unknown:
            whole = _whole.Whole(kept_for(self), facts.whole)
            try:
                with whole:
                    return stepped(self, *args, **kwargs)
            except Abandoned:
                return whole.image
            finally:
                _tell(function, whole.stopped)
        state = torch.get_rng_state()
        session = Stepping(kept_for(self), facts.whole_pixels, facts.span)
        try:
            with session:
                return stepped(self, *args, **kwargs)
        except (Exception, Abandoned) as error:
            if not session.begun:
                raise
            failure = f"pixel by pixel it raises {type(error).__name__}: {error}"
        finally:
            _tell(function, session.stopped)
        torch.set_rng_state(state)
        result = function(self, *args, **kwargs)
        if not session.stopped:  # the failure is none of the loop's own
            session.refuse(failure)
            _tell(function, failure)
        return result

    return method  # type: ignore[return-value]


def _unknown_arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> set[str]:
    """The names of arguments that are not of a known role and not the default."""
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return set()  # the method itself will say so
    found = set()
    for name in list(given)[1:]:
        value, default = given[name], signature.parameters[name].default
        if role_of(name) in ("", "choice") and not (value is default or _is_equal(value, default)):
            found.add(name)
    return found


def _is_equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, (bool, int, float, str)) and a == b


def _tell(function: FunctionType, reason: str) -> None:
    if reason:
        warnings.warn(f"{function.__qualname__} runs as it was: {reason}", RuntimeWarning, stacklevel=3)
