"""Recognising the code of a public library: digests of the source of its methods.

What a library computes is told by its source, not by its version or the names of its classes. A digest is
taken over the syntax tree, so that comments and layout do not count, and includes the functions of the same
file that the method calls. It is the same for every version of Python.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from genperf.accelerate._rewrite import CannotRewrite, global_names, syntax_tree

_IGNORED = {"kind", "type_comment", "type_params"}


def digest(function: FunctionType) -> str:
    """Sixteen hexadecimal digits for what ``function`` and the functions that it calls in its file do.

    Raises:
        CannotRewrite: the source is missing, or is not what is running.
    """
    found: dict[str, str] = {}
    pending = [inspect.unwrap(function)]
    while pending:
        one = pending.pop()
        if one.__qualname__ in found:
            continue
        found[one.__qualname__] = repr(_plain(syntax_tree(one)))
        pending += _called(one)
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:16]


def differences(cls: type, known: dict[str, str]) -> list[str]:
    """The names of the methods and properties of ``cls`` whose digests are not those of ``known``."""
    differing = []
    for name, expected in known.items():
        attribute = inspect.getattr_static(cls, name, None)
        function = attribute.fget if isinstance(attribute, property) else attribute
        try:
            actual = digest(function) if isinstance(function, FunctionType) else ""
        except CannotRewrite:
            actual = ""
        if actual != expected:
            differing.append(name)
    return differing


def _called(function: FunctionType) -> Iterator[FunctionType]:
    """The functions of the same file among the globals that ``function`` refers to."""
    names = global_names(function.__code__)
    # A decorator and a default are looked up when the function is defined, which its code does not show.
    names |= {node.id for node in ast.walk(syntax_tree(function)) if isinstance(node, ast.Name)}
    for name in sorted(names & function.__globals__.keys()):
        value = inspect.unwrap(function.__globals__[name]) if callable(function.__globals__[name]) else None
        if isinstance(value, FunctionType) and value.__globals__ is function.__globals__:
            yield value


def _plain(node: Any) -> Any:
    """A syntax tree as nested tuples, without what is absent or differs between versions of Python."""
    if isinstance(node, ast.AST):
        fields = ((name, getattr(node, name, None)) for name in node._fields if name not in _IGNORED)
        return type(node).__name__, *((n, _plain(v)) for n, v in fields if v is not None and v != [])
    if isinstance(node, list):
        return tuple(_plain(item) for item in node)
    return node
