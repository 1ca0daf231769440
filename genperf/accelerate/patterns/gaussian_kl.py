"""The divergence to the standard normal, written out in a method: pythae's losses, and those of many
repositories. ``-0.5 * torch.sum(1 + log_var - mu.pow(2) - log_var.exp(), dim=-1)``, and every other way to
write that sum, becomes one call of the kernel; the rest of the method stays what it was.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from genperf.accelerate._pattern import Match, Options, Refusal
from genperf.accelerate._rewrite import CannotRewrite, methods_of, recompile, syntax_tree
from genperf.nn._eager_sample import FEW_ELEMENTS
from genperf.ops.gaussian_sample import gaussian_sample

_NAME = "_genperf_gaussian_kl"


def find(module: nn.Module, cls: type, options: Options) -> Iterator[Match | Refusal]:
    """Yield a match for the methods of ``cls`` that compute the divergence."""
    methods, refused = _rewritten(cls)
    overridden = sorted(set(methods) & set(module.__dict__))
    for name, reason in refused.items():
        yield Refusal(f"{cls.__name__}.{name}: KL to N(0, 1)", reason)
    if overridden:
        yield Refusal(
            f"{cls.__name__}: KL to N(0, 1)", f"{', '.join(overridden)} is set on the module itself"
        )
    elif methods:
        was = f"{cls.__name__}.{', '.join(methods)}: KL to N(0, 1)"
        yield Match(was, "gaussian_sample", "gaussian_kl", methods)


@functools.cache
def _rewritten(cls: type) -> tuple[dict[str, FunctionType], dict[str, str]]:
    """The methods of ``cls`` with the divergence replaced, and the reasons for those that could not be."""
    methods, refused = {}, {}
    for name, function in methods_of(cls).items():
        if not {"exp", "sum"} <= set(function.__code__.co_names):
            continue
        try:
            found = [match for node in ast.walk(syntax_tree(function)) if (match := match_divergence(node))]
            if not found:
                continue
            reason = next((reason for match in found if (reason := match.disagreement())), "")
            if reason:
                refused[name] = reason
                continue
            bindings = {_NAME: gaussian_kl}
            methods[name] = recompile(function, bindings, lambda tree: _Replace().visit(tree))
        except CannotRewrite as error:
            if "exp" in function.__code__.co_names and "pow" in function.__code__.co_names:
                refused[name] = str(error)
    return methods, refused


def gaussian_kl(mean: Tensor, logvar: Tensor, dim: int | list[int] | tuple[int, ...] | None = None) -> Tensor:
    """KL of N(mean, exp(logvar)) to N(0, 1), summed over ``dim`` (None: all), in float32 or wider.

    On the CPU the definition itself is used where the call of a kernel costs more than the arithmetic.
    """
    if not (isinstance(mean, Tensor) and isinstance(logvar, Tensor) and mean.dtype == logvar.dtype):
        mean, logvar = torch.as_tensor(mean), torch.as_tensor(logvar)
        dtype = torch.promote_types(mean.dtype, logvar.dtype)
        mean, logvar = mean.to(dtype), logvar.to(dtype)
    if mean.device.type == "cpu" and mean.numel() < FEW_ELEMENTS:
        terms = mean.square() + logvar.exp() - 1 - logvar
        return 0.5 * (terms.sum() if dim is None else terms.sum(dim=dim))
    rank = max(mean.ndim, logvar.ndim)
    dims = None if dim is None else sorted(d % rank for d in ([dim] if isinstance(dim, int) else dim))
    per_sample = rank > 0 and dims in (None, list(range(1, rank)))
    kl = gaussian_sample(mean, logvar, sample=False, reduction="sample" if per_sample else "none").kl
    assert kl is not None
    if dims is None:
        return kl.sum()
    return kl if per_sample else kl.sum(dim=dims)


class Divergence:
    """An expression that computes the divergence, by the syntax of its mean, log-variance and dims."""

    def __init__(self, expression: ast.expr, mean: ast.expr, logvar: ast.expr, dim: ast.expr | None) -> None:
        self.expression, self.mean, self.logvar, self.dim = expression, mean, logvar, dim

    def call(self) -> ast.Call:
        """The call that replaces the expression."""
        arguments = [self.mean, self.logvar, *([self.dim] if self.dim is not None else [])]
        call = ast.Call(ast.Name(_NAME, ast.Load()), arguments, [])
        return ast.copy_location(call, self.expression)

    def disagreement(self) -> str:
        """Why the kernel does not give the values and gradients of the expression; "" if it does."""
        names = {ast.dump(self.mean): "mean", ast.dump(self.logvar): "logvar"}
        probe = _Rename(names).visit(ast.parse(ast.unparse(self.expression), mode="eval"))
        code = compile(ast.fix_missing_locations(probe), "<probe>", "eval")
        generator = torch.Generator().manual_seed(0)
        for shape in ((5, 7), (3, 2, 4, 6)):
            mean, logvar = (
                torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
                for _ in range(2)
            )
            try:
                theirs = eval(code, {"torch": torch}, {"mean": mean, "logvar": logvar})
            except (IndexError, RuntimeError):
                continue
            except Exception as error:
                return f"the probe failed with {type(error).__name__}: {error}"
            dim = eval(compile(ast.Expression(self.dim), "<probe>", "eval")) if self.dim is not None else None
            ours = gaussian_kl(mean, logvar, dim)
            pairs = [(theirs, ours)]
            pairs += zip(*(torch.autograd.grad(v.sum(), (mean, logvar)) for v in (theirs, ours)), strict=True)
            for expected, actual in pairs:
                if expected.shape != actual.shape or not torch.allclose(
                    expected, actual, rtol=1e-9, atol=1e-9
                ):
                    return "the probe gave another value than the divergence"
        return ""


def match_divergence(node: ast.AST) -> Divergence | None:
    """The divergence that ``node`` computes, or None.

    It is ``c * sum(s * (-1 - L + M^2 + exp(L)))`` with ``c * s = 0.5``: terms in any order, powers and
    exponentials as functions, methods or operators, the factor on either side or as ``/ 2``.
    """
    if not isinstance(node, ast.expr):
        return None
    factor, inner = _factor(node)
    if not isinstance(inner, ast.Call):
        return None
    summed = _sum_arguments(inner)
    if summed is None:
        return None
    terms, dim = summed
    signed = list(_terms(terms, 1))
    if len(signed) != 4:
        return None
    by_kind: dict[str, tuple[int, Any]] = {}
    for sign, term in signed:
        by_kind.setdefault(_kind(term), (sign, _operand(term)))
    if set(by_kind) != {"one", "square", "exp", "name"}:
        return None
    sign = by_kind["exp"][0]
    expected = {"one": -sign, "name": -sign, "square": sign, "exp": sign}
    if any(by_kind[kind][0] != expected[kind] for kind in expected) or factor * sign != 0.5:
        return None
    logvar, mean = by_kind["name"][1], by_kind["square"][1]
    if ast.dump(logvar) != ast.dump(by_kind["exp"][1]) or not (_is_plain(mean) and _is_plain(logvar)):
        return None
    return Divergence(node, mean, logvar, dim)


def _factor(node: ast.expr) -> tuple[float, ast.expr]:
    """``node`` as a number times an expression."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        factor, inner = _factor(node.operand)
        return -factor, inner
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div)):
        number = _number(node.right)
        if number:
            factor, inner = _factor(node.left)
            return (factor * number if isinstance(node.op, ast.Mult) else factor / number), inner
        number = _number(node.left)
        if number is not None and isinstance(node.op, ast.Mult):
            factor, inner = _factor(node.right)
            return factor * number, inner
    return 1.0, node


def _number(node: ast.expr) -> float | None:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    return float(value) if isinstance(value, (int, float)) else None


def _sum_arguments(call: ast.Call) -> tuple[ast.expr, ast.expr | None] | None:
    """(summand, dim or None) of ``torch.sum(x, dim)`` or ``x.sum(dim)``."""
    if not isinstance(call.func, ast.Attribute) or call.func.attr != "sum":
        return None
    if isinstance(call.func.value, ast.Name) and call.func.value.id == "torch":
        arguments = call.args
    else:
        arguments = [call.func.value, *call.args]
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if set(keywords) - {"dim", "axis"} or not 1 <= len(arguments) + len(keywords) <= 2 or not arguments:
        return None
    dim = arguments[1] if len(arguments) == 2 else keywords.get("dim", keywords.get("axis"))
    if dim is not None:
        try:
            ast.literal_eval(dim)
        except ValueError:
            return None
    return arguments[0], dim


def _terms(node: ast.expr, sign: int) -> Iterator[tuple[int, ast.expr]]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        yield from _terms(node.left, sign)
        yield from _terms(node.right, sign if isinstance(node.op, ast.Add) else -sign)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield from _terms(node.operand, -sign)
    else:
        yield sign, node


def _call_of(node: ast.expr, names: tuple[str, ...]) -> list[ast.expr] | None:
    """The operands of ``torch.f(x, ...)`` or ``x.f(...)`` for a name f."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names):
        return None
    if node.keywords:
        return None
    if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
        return list(node.args)
    return [node.func.value, *node.args]


def _kind(term: ast.expr) -> str:
    if _number(term) == 1:
        return "one"
    if _square_of(term) is not None:
        return "square"
    if _call_of(term, ("exp",)) is not None:
        return "exp"
    return "name"


def _square_of(term: ast.expr) -> ast.expr | None:
    if isinstance(term, ast.BinOp):
        if isinstance(term.op, ast.Pow) and _number(term.right) == 2:
            return term.left
        if isinstance(term.op, ast.Mult) and ast.dump(term.left) == ast.dump(term.right):
            return term.left
    operands = _call_of(term, ("pow", "square"))
    if operands and (len(operands) == 1 or _number(operands[1]) == 2):
        return operands[0]
    return None


def _operand(term: ast.expr) -> ast.expr:
    square = _square_of(term)
    if square is not None:
        return square
    exponent = _call_of(term, ("exp",))
    return exponent[0] if exponent else term


def _is_plain(node: ast.expr) -> bool:
    """A name or a chain of attributes: what is evaluated once or twice without a difference."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


class _Replace(ast.NodeTransformer):
    def visit(self, node: ast.AST) -> Any:
        found = match_divergence(node)
        return found.call() if found else self.generic_visit(node)


class _Rename(ast.NodeTransformer):
    """Puts names in the place of expressions, given by their dumps."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit(self, node: ast.AST) -> Any:
        name = self.names.get(ast.dump(node)) if isinstance(node, ast.expr) else None
        return ast.Name(name, ast.Load()) if name else self.generic_visit(node)
