"""What the source of a quantizer's method shows: what it reads, stores and branches on."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from genperf.accelerate._quantizer import PLAIN
from genperf.accelerate._rewrite import CannotRewrite, methods_of, syntax_tree

_MISSING = object()


class Unknown(Exception):  # noqa: N818
    """The method is not, or not certainly, one that genperf's ops can carry out."""


class Source:
    """A method and the methods of its module that it calls.

    Attributes:
        attributes: the plain attributes of the module that they read.
        stored: the attributes that they assign.
    """

    def __init__(self, module: nn.Module, cls: type, function: FunctionType) -> None:
        self._module, self._cls = module, cls
        self._trees: dict[FunctionType, ast.FunctionDef] = {}
        self._read: set[str] = set()
        self._tested: set[str] = set()
        self.stored: set[str] = set()
        self._add(function)
        instance = {**module.__dict__, **module._parameters, **module._buffers, **module._modules}
        plain = {n for n in self._read if n in instance and type(instance[n]) in PLAIN} - {"training"}
        self.attributes = {name: instance[name] for name in sorted(plain)}
        for name in sorted(self._read - plain - {"training"}):
            # What is missing belongs to a branch that is not taken: reading it would raise.
            value = instance.get(name, inspect.getattr_static(cls, name, _MISSING))
            if value is _MISSING:
                continue
            if name in self._tested:
                raise Unknown(f"it branches on {name} of its module")
            if not isinstance(value, (Tensor, nn.Module, property, FunctionType)):
                raise Unknown(f"it reads {name} of its module, a {type(value).__name__}")

    def _add(self, function: FunctionType) -> None:
        function = inspect.unwrap(function)
        if function in self._trees:
            return
        try:
            tree = syntax_tree(function)
        except CannotRewrite as error:
            raise Unknown(str(error)) from error
        self._trees[function] = tree
        owner = tree.args.args[0].arg if tree.args.args else ""
        methods = methods_of(self._cls)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and _is_name(node.value, owner):
                if isinstance(node.ctx, ast.Load):
                    self._read.add(node.attr)
                    if node.attr in methods:
                        self._add(methods[node.attr])
                else:
                    self.stored.add(node.attr)
            elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
                self._check_test(node.test, tree, owner, _only_raises(node))

    def _check_test(self, test: ast.expr, tree: ast.FunctionDef, owner: str, raises: bool) -> None:
        """Raise unless a probe takes the branch that every call takes, the plain attributes being equal."""
        arguments = [a.arg for a in (*tree.args.args, *tree.args.kwonlyargs)]
        if raises:
            return
        if _is_plain(test, owner, arguments):
            reads = [node for node in ast.walk(test) if isinstance(node, ast.Attribute)]
            self._tested.update(node.attr for node in reads)
            return
        raise Unknown(f"it branches on {ast.unparse(test)}")

    def names(self) -> set[str]:
        """The names of functions and attributes in them."""
        found: set[str] = set()
        for tree in self._trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute):
                    found.add(node.attr)
                elif isinstance(node, ast.Name):
                    found.add(node.id)
        return found

    def calls(self, name: str) -> Iterator[tuple[FunctionType, ast.Call, bool]]:
        """The calls of functions of that name, with whether they are within an ``if`` on an argument."""
        for function, tree in self._trees.items():
            arguments = {a.arg for a in (*tree.args.args[1:], *tree.args.kwonlyargs)}
            conditional = {
                id(inner)
                for node in ast.walk(tree)
                if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id in arguments
                for statement in node.body
                for inner in ast.walk(statement)
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and _last_name(node.func) == name:
                    yield function, node, id(node) in conditional


def value_of(function: FunctionType, node: ast.expr) -> Any:
    """The object that a dotted name of globals means in ``function``."""
    if isinstance(node, ast.Attribute):
        return getattr(value_of(function, node.value), node.attr)
    if isinstance(node, ast.Name) and node.id in function.__globals__:
        return function.__globals__[node.id]
    raise Unknown(f"{ast.unparse(node)} is not a global name")


def first_argument(function: FunctionType) -> str:
    """The name of the only argument without a default beside ``self``, or "" if there are others."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    usual = inspect.Parameter.POSITIONAL_OR_KEYWORD
    if not parameters or parameters[0].kind is not usual or parameters[0].default is not inspect._empty:
        return ""
    return "" if any(p.default is inspect._empty for p in parameters[1:]) else parameters[0].name


def as_method_of(function: FunctionType, method: Any) -> FunctionType:
    """``method(self, x, ...)`` under the name of ``function``, and ``x`` under the name of its argument."""
    code = method.__code__
    names = {"x": first_argument(function)}
    code = code.replace(co_varnames=tuple(names.get(name, name) for name in code.co_varnames))
    made = FunctionType(code, method.__globals__, function.__name__, None, method.__closure__)
    made.__qualname__, made.__doc__ = function.__qualname__, function.__doc__
    made.__module__ = function.__module__
    return made


def given_defaults(function: FunctionType) -> Callable[[tuple[Any, ...], dict[str, Any]], bool]:
    """A function that tells whether further arguments are the defaults."""
    parameters = list(inspect.signature(function).parameters.values())[2:]
    defaults = {p.name: p.default for p in parameters}
    names = tuple(defaults)

    def is_default(more: tuple[Any, ...], named: dict[str, Any]) -> bool:
        given = {**dict(zip(names, more, strict=False)), **named}
        return len(more) <= len(names) and all(
            name in defaults and _same(value, defaults[name]) for name, value in given.items()
        )

    return is_default


def _same(value: Any, default: Any) -> bool:
    return value is default or (type(value) in PLAIN and type(value) is type(default) and value == default)


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _only_raises(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and not node.orelse and all(isinstance(s, ast.Raise) for s in node.body)


def _is_plain(node: ast.expr, owner: str, arguments: list[str]) -> bool:
    """Whether a test reads nothing but constants, arguments and the module's attributes."""
    if isinstance(node, ast.Constant):
        return True
    if isinstance(node, ast.Name):
        return node.id in arguments[1:]
    if isinstance(node, ast.Attribute):
        return _is_name(node.value, owner)
    if isinstance(node, (ast.List, ast.Tuple)):
        return all(_is_plain(e, owner, arguments) for e in node.elts)
    if isinstance(node, ast.UnaryOp):
        return _is_plain(node.operand, owner, arguments)
    if isinstance(node, ast.BoolOp):
        return all(_is_plain(v, owner, arguments) for v in node.values)
    if isinstance(node, ast.Compare):
        return all(_is_plain(v, owner, arguments) for v in (node.left, *node.comparators))
    return False
