"""Modules whose methods call ``torch.nn.functional.gumbel_softmax``: discrete VAEs, and quantizers that
:mod:`genperf.accelerate.patterns.gumbel_quantizer` does not take whole.

The call is rewritten, under whichever name it is made (``F.gumbel_softmax``, ``gumbel_softmax``); what the
kernel does not cover runs torch's function.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genperf.accelerate._distribution_target import Left
from genperf.accelerate._distribution_targets import softmax_by_kernel
from genperf.accelerate._pattern import Match, Options, Refusal
from genperf.accelerate._rewrite import CannotRewrite, methods_of, recompile_inside, syntax_tree
from genperf.accelerate.patterns import gumbel_quantizer

_NAME = "_genperf_gumbel_softmax"


def find(module: nn.Module, cls: type, options: Options) -> Iterator[Match | Refusal]:
    """Yield a match or a refusal for each method of ``cls`` with such a call."""
    users = _users(cls)
    if not users:
        return
    whole = [found for found in gumbel_quantizer.find(module, cls, options) if isinstance(found, Match)]
    taken = {name for found in whole for name in found.methods}
    for name, function in users.items():
        if name in taken:
            continue
        was = f"{cls.__name__}.{name}: gumbel_softmax"
        if name in module.__dict__:
            yield Refusal(was, "it is set on the module itself")
            continue
        try:
            method = _rewritten(function, options.rng)
        except CannotRewrite as error:
            yield Refusal(was, str(error))
            continue
        yield Match(was, "gumbel_softmax", ("gumbel_softmax", name, function, options.rng), {name: method})


@functools.cache
def _users(cls: type) -> dict[str, FunctionType]:
    """The methods with such a call."""
    found = {}
    for name, function in methods_of(cls).items():
        inner = inspect.unwrap(function)
        if not isinstance(inner, FunctionType) or "gumbel_softmax" not in inner.__code__.co_names:
            continue
        try:
            tree = syntax_tree(inner)
        except CannotRewrite:
            continue
        if any(_is_call(node, inner) for node in ast.walk(tree)):
            found[name] = function
    return found


def _is_call(node: ast.AST, function: FunctionType) -> bool:
    """Whether ``node`` calls what is now torch's function, by the global names of ``function``."""
    if not isinstance(node, ast.Call):
        return False
    path, called = [], node.func
    while isinstance(called, ast.Attribute):
        path.append(called.attr)
        called = called.value
    if not isinstance(called, ast.Name):
        return False
    value: Any = function.__globals__.get(called.id)
    for name in reversed(path):
        value = getattr(value, name, None)
    return value is F.gumbel_softmax


@functools.cache
def _rewritten(function: FunctionType, rng: str) -> FunctionType:
    inner = inspect.unwrap(function)
    assert isinstance(inner, FunctionType)

    def transform(tree: ast.FunctionDef) -> ast.AST:
        for node in ast.walk(tree):
            if _is_call(node, inner):
                assert isinstance(node, ast.Call)
                node.func = ast.copy_location(ast.Name(_NAME, ast.Load()), node.func)
        return tree

    return recompile_inside(function, {_NAME: _softmax(rng)}, transform)


@functools.cache
def _softmax(rng: str) -> Callable[..., Tensor]:
    @functools.wraps(F.gumbel_softmax)
    def softmax(*args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return F.gumbel_softmax(*args, **kwargs)
        try:
            return softmax_by_kernel(rng, *args, **kwargs)
        except (Left, TypeError):  # torch's function says what is wrong
            return F.gumbel_softmax(*args, **kwargs)

    return softmax
