"""New functions out of existing ones: the same code with other objects behind some names.

A rewritten function keeps the globals, defaults, name and closure of the original, so that what the
library changes in its own module later is still seen. A name that is to mean something else becomes a
closure variable: the function's source is compiled again inside a scope that binds it. Source that does
not compile to what is running (an edited file, generated code) is refused.
"""

from __future__ import annotations

import ast
import copy
import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType
from typing import Any


class CannotRewrite(Exception):  # noqa: N818
    """The function's source is missing, or is not what is running."""


def methods_of(cls: type) -> dict[str, FunctionType]:
    """The plain functions among the attributes of ``cls``, without those of torch and of builtins."""
    found: dict[str, FunctionType] = {}
    hidden: set[str] = set()
    for base in cls.__mro__:
        if base is object or base.__module__.partition(".")[0] in ("torch", "builtins", "typing", "abc"):
            continue
        for name, value in base.__dict__.items():
            if name not in hidden and isinstance(value, FunctionType):
                found[name] = value
            hidden.add(name)
    return found


def global_names(code: CodeType) -> set[str]:
    """The names that ``code``, and the code nested in it, looks up among the globals."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= global_names(constant)
    return names


def referenced(function: FunctionType) -> dict[str, Any]:
    """The global objects that ``function`` refers to, by name, its decorators' inner functions included."""
    found = {}
    for inner in _chain(function):
        names = global_names(inner.__code__)
        found.update({name: inner.__globals__[name] for name in names if name in inner.__globals__})
    return found


def rebind(function: FunctionType, old: object, new: object) -> FunctionType:
    """A copy of ``function`` in which every global name that holds ``old`` holds ``new``.

    Decorators made of closures are copied with the function inside them.

    Raises:
        CannotRewrite: see the module's docstring.
    """
    return rebind_all(function, [(old, new)])


def rebind_all(function: FunctionType, replacements: list[tuple[Any, Any]]) -> FunctionType:
    """:func:`rebind` for several pairs of an old and a new object."""

    def innermost(inner: FunctionType) -> FunctionType:
        bindings = {
            name: new
            for name in global_names(inner.__code__)
            for old, new in replacements
            if inner.__globals__.get(name) is old
        }
        return recompile(inner, bindings) if bindings else inner

    return _map_chain(function, innermost)


def recompile(
    function: FunctionType,
    bindings: dict[str, Any],
    transform: Callable[[ast.FunctionDef], ast.AST] | None = None,
) -> FunctionType:
    """``function`` compiled again from its source, with ``bindings`` as closure variables.

    Args:
        transform: applied to a copy of the syntax tree of the function before it is compiled.

    Raises:
        CannotRewrite: see the module's docstring.
    """
    definition = copy.deepcopy(syntax_tree(function))
    tree = definition if transform is None else ast.fix_missing_locations(transform(definition))
    code = _compile(function, tree, (*function.__code__.co_freevars, *bindings))
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells.update({name: CellType(value) for name, value in bindings.items()})
    return _like(function, code, tuple(cells[name] for name in code.co_freevars))


def recompile_inside(
    function: FunctionType, bindings: dict[str, Any], transform: Callable[[ast.FunctionDef], ast.AST]
) -> FunctionType:
    """:func:`recompile` for the function inside all decorators, which are copied with it.

    Raises:
        CannotRewrite: see the module's docstring; or a decorator is not made of closures.
    """
    inner = inspect.unwrap(function)
    made = _map_chain(function, lambda f: recompile(f, bindings, transform) if f is inner else f)
    if made is function:
        raise CannotRewrite(f"a decorator of {function.__qualname__} is not known")
    return made


def syntax_tree(function: FunctionType) -> ast.FunctionDef:
    """The definition of ``function`` in its source; not to be modified.

    Raises:
        CannotRewrite: there is no source, the function is not found in it, or it is not what is running.
    """
    code = function.__code__
    try:
        lines, _ = inspect.findsource(code)
        module, compiled = _parse("".join(lines))
    except (OSError, SyntaxError, TypeError) as error:
        raise CannotRewrite(f"the source of {function.__qualname__} is not available") from error
    if not any(
        _same_code(code, candidate) for candidate in _codes(compiled, code.co_name, code.co_firstlineno)
    ):
        raise CannotRewrite(f"the source of {function.__qualname__} is not what is running")
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first == code.co_firstlineno:
                return node
    raise CannotRewrite(f"{function.__qualname__} is not a plain function in its source")


@functools.lru_cache(maxsize=64)
def _parse(source: str) -> tuple[ast.Module, CodeType]:
    module = ast.parse(source)
    return module, compile(source, "<source>", "exec", dont_inherit=True)


def _codes(code: CodeType, name: str, line: int) -> Iterator[CodeType]:
    """The code objects inside ``code`` with that name and first line."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_name == name and constant.co_firstlineno == line:
                yield constant
            yield from _codes(constant, name, line)


def _compile(function: FunctionType, node: ast.AST, free: tuple[str, ...]) -> CodeType:
    parts = function.__qualname__.split(".")
    owner = parts[-2] if len(parts) > 1 and parts[-2].isidentifier() else "_"
    arguments = ", ".join(name for name in free if name != "__class__")
    scope = ast.parse(f"def _({arguments}):\n    class {owner}:\n        pass")
    scope.body[0].body[0].body = [node]  # type: ignore[attr-defined]
    flags = function.__code__.co_flags & annotations.compiler_flag
    compiled = compile(scope, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    return next(_codes(compiled, function.__code__.co_name, function.__code__.co_firstlineno))


def _same_code(a: CodeType, b: CodeType) -> bool:
    if (a.co_code, a.co_names, a.co_varnames, a.co_freevars, a.co_cellvars) != (
        b.co_code,
        b.co_names,
        b.co_varnames,
        b.co_freevars,
        b.co_cellvars,
    ) or len(a.co_consts) != len(b.co_consts):
        return False
    for x, y in zip(a.co_consts, b.co_consts, strict=True):
        if isinstance(x, CodeType) and isinstance(y, CodeType):
            if not _same_code(x, y):
                return False
        elif type(x) is not type(y) or repr(x) != repr(y):
            return False
    return True


def _like(function: FunctionType, code: CodeType, closure: tuple[CellType, ...] | None) -> FunctionType:
    new = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure or None
    )
    new.__kwdefaults__ = function.__kwdefaults__
    new.__annotations__ = function.__annotations__
    new.__doc__ = function.__doc__
    new.__module__ = function.__module__
    new.__qualname__ = function.__qualname__
    new.__dict__.update(function.__dict__)
    return new


def _inner_functions(function: FunctionType) -> dict[int, FunctionType]:
    """The functions in the closure of a decorator's wrapper, by cell index."""
    found = {}
    for i, cell in enumerate(function.__closure__ or ()):
        try:
            value = cell.cell_contents
        except ValueError:
            continue
        if isinstance(value, FunctionType) and value is getattr(function, "__wrapped__", value):
            found[i] = value
    return found


def _chain(function: FunctionType, seen: frozenset[int] = frozenset()) -> list[FunctionType]:
    if id(function) in seen:
        return []
    chain = [function]
    for inner in _inner_functions(function).values():
        chain += _chain(inner, seen | {id(function)})
    return chain


def _map_chain(
    function: FunctionType, change: Callable[[FunctionType], FunctionType], seen: frozenset[int] = frozenset()
) -> FunctionType:
    if id(function) in seen:
        return function
    cells = list(function.__closure__ or ())
    changed: dict[int, FunctionType] = {}
    for i, inner in _inner_functions(function).items():
        new = _map_chain(inner, change, seen | {id(function)})
        if new is not inner:
            cells[i] = CellType(new)
            changed[id(inner)] = new
    if changed:
        wrapped = function.__dict__.get("__wrapped__")
        function = _like(function, function.__code__, tuple(cells))
        if id(wrapped) in changed:
            function.__dict__["__wrapped__"] = changed[id(wrapped)]
    return change(function)
