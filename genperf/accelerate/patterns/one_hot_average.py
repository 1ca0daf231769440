"""Codebooks that sum the vectors of each codeword by a product with one-hot vectors: EnCodec's and its kin.

Their forward initialises by k-means, replaces dead codes and moves averages in an order of its own. It stays
as it is, but for the one-hot matrix [N, K]: what is summed with it is summed from the indices.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from genperf.accelerate._pattern import Match, Options, Refusal
from genperf.accelerate._quantizer import search_backend
from genperf.accelerate._quantizer_probe import STATISTICS, Target, close, codebooks
from genperf.accelerate._quantizer_source import Unknown, first_argument
from genperf.accelerate._rewrite import CannotRewrite, methods_of, recompile_inside
from genperf.ops.codebook_statistics import codebook_statistics

_TRANSPOSES = ("t", "T", "mT", "transpose")
_SEARCHES = {"argmin", "argmax", "min", "max", "topk"}


def find(module: nn.Module, cls: type, options: Options) -> Iterator[Match | Refusal]:
    """Yield a match or a refusal for a forward with one-hot vectors that leaves the search to a method."""
    function = methods_of(cls).get("forward")
    if function is None or "quantize" not in methods_of(cls):
        return
    names = set(inspect.unwrap(function).__code__.co_names)
    if "one_hot" not in names or _SEARCHES & names:
        return
    was = f"{cls.__name__}.forward: averages of codewords"
    try:
        if "forward" in module.__dict__:
            raise Unknown("forward is set on the module itself")
        method = _rewritten(function)
        _check(module, function, method)
    except (Unknown, CannotRewrite) as reason:
        yield Refusal(was, str(reason))
        return
    yield Match(
        was, "codebook_statistics", ("one_hot_average", function), {"forward": method}, search_backend(module)
    )


class OneHot:
    """What stands for the one-hot vectors of ``indices`` in a product with the vectors x [N, D]."""

    def __init__(self, indices: Tensor, n_codewords: int, x: Tensor) -> None:
        self._indices, self._n_codewords, self._x = indices, n_codewords, x
        self._found: tuple[Tensor, Tensor] | None = None

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Counts [K] and sums [K, D]."""
        if self._found is None:
            x, indices = self._x.detach(), self._indices.reshape(-1)
            counts, sums = codebook_statistics(x, indices, self._n_codewords)
            self._found = counts, sums
        return self._found


def _counts(one_hot: OneHot) -> Tensor:
    return one_hot.statistics()[0]


def _sums(one_hot: OneHot) -> Tensor:
    return one_hot.statistics()[1]


def _rewritten(function: FunctionType) -> FunctionType:
    """``function`` without the one-hot matrix.

    Raises:
        Unknown: the matrix is used for something else.
    """
    bindings = {"_genperf_one_hot": OneHot, "_genperf_counts": _counts, "_genperf_sums": _sums}
    return recompile_inside(function, bindings, _without_one_hot)


def _without_one_hot(definition: ast.FunctionDef) -> ast.FunctionDef:
    made = [node for node in ast.walk(definition) if isinstance(node, ast.Assign) and _one_hot(node.value)]
    if len(made) != 1 or len(made[0].targets) != 1 or not isinstance(made[0].targets[0], ast.Name):
        raise Unknown("its one-hot vectors are not made once, under a name")
    (assignment,) = made
    name = assignment.targets[0].id  # type: ignore[attr-defined]
    replacing = _Replacing(name)
    call = _one_hot(assignment.value)
    assert call is not None
    definition = replacing.visit(definition)
    if len(replacing.vectors) != 1:
        raise Unknown("it does not multiply its one-hot vectors by the vectors once")
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    if len(given) != 2:
        raise Unknown("its one-hot vectors are made without the number of codewords")
    assignment.value = ast.Call(
        ast.Name("_genperf_one_hot", ast.Load()), [*given, ast.Name(replacing.vectors.pop(), ast.Load())], []
    )
    left = [node for node in ast.walk(definition) if isinstance(node, ast.Name) and node.id == name]
    if len(left) != 1 + replacing.count:
        raise Unknown("it uses its one-hot vectors for something else than sums")
    return definition


def _one_hot(node: ast.AST) -> ast.Call | None:
    """The call of ``one_hot`` in an expression that does no more than change its dtype."""
    while isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name):
            return node if node.func.id == "one_hot" else None
        if not isinstance(node.func, ast.Attribute):
            return None
        if node.func.attr == "one_hot":
            return node
        if node.func.attr not in ("type", "to", "float", "type_as"):
            return None
        node = node.func.value
    return None


class _Replacing(ast.NodeTransformer):
    """Replaces ``E.sum(0)`` and ``x.t() @ E`` or ``E.t() @ x``, E being the name of the one-hot vectors."""

    def __init__(self, name: str) -> None:
        self.name, self.count, self.vectors = name, 0, set[str]()

    def visit_Call(self, node: ast.Call) -> ast.AST:
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr == "sum" and self._is_it(function.value):
            values = [ast.unparse(a) for a in (*node.args, *(k.value for k in node.keywords))]
            if values == ["0"]:
                return self._call("_genperf_counts")
        if isinstance(function, ast.Attribute) and function.attr in ("matmul", "mm") and len(node.args) == 2:
            return self._product(*node.args) or self.generic_visit(node)
        return self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        found = self._product(node.left, node.right) if isinstance(node.op, ast.MatMult) else None
        return found or self.generic_visit(node)

    def _product(self, left: ast.expr, right: ast.expr) -> ast.AST | None:
        first = _transposed(left)
        if first is None:
            return None
        if self._is_it(right) and isinstance(first, ast.Name):
            self.vectors.add(first.id)
            return ast.Call(ast.Attribute(self._call("_genperf_sums"), "t", ast.Load()), [], [])
        if self._is_it(first) and isinstance(right, ast.Name):
            self.vectors.add(right.id)
            return self._call("_genperf_sums")
        return None

    def _is_it(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == self.name

    def _call(self, function: str) -> ast.Call:
        self.count += 1
        return ast.Call(ast.Name(function, ast.Load()), [ast.Name(self.name, ast.Load())], [])


def _transposed(node: ast.expr) -> ast.expr | None:
    """What ``node`` is the transpose of."""
    call = node if isinstance(node, ast.Call) else None
    attribute = call.func if call is not None else node
    if not isinstance(attribute, ast.Attribute) or attribute.attr not in _TRANSPOSES:
        return None
    plain = call is None or all(isinstance(a, (ast.Constant, ast.UnaryOp)) for a in call.args)
    return attribute.value if plain else None


def _check(module: nn.Module, function: FunctionType, method: FunctionType) -> None:
    """Raise unless both give the same on a copy in float64, in both modes, and change it alike."""
    if not first_argument(function):
        raise Unknown("it needs more than one argument")
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        raise Unknown("it is on the meta device, where nothing can be probed")
    reason = "it has no codebook of its own"
    for book, transposed in codebooks(module):
        reason = _difference(module, function, method, book, transposed)
        if not reason:
            return
    raise Unknown(reason)


def _difference(
    module: nn.Module, function: FunctionType, method: FunctionType, book: str, transposed: bool
) -> str:
    for training, rank in ((True, 3), (False, 3), (True, 2)):
        target = Target(module, function, training, book, transposed, rank, rank - 1)
        outcomes = []
        for one in (function, method):
            try:
                with torch.random.fork_rng(devices=[]):
                    outcomes.append(replace(target, function=one).run(target.probe(3)))
            except Exception as error:
                return f"it cannot be run alone: {type(error).__name__}: {error}"
        theirs, ours = outcomes
        pairs = [*zip(theirs.leaves, ours.leaves, strict=True)]
        pairs += [(theirs.after[name], ours.after[name]) for name in theirs.after]
        if theirs.structure != ours.structure or not all(_alike(a, b) for a, b in pairs):
            return "without its one-hot vectors it does something else"
    return ""


def _alike(a: Any, b: Any) -> bool:
    return close(a, b, STATISTICS) if isinstance(a, Tensor) else a == b
