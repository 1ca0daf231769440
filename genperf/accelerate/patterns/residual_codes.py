"""The codes of residual vector quantization, as EnCodec, Hugging Face's Encodec, Mimi and others find them:

    for layer in self.layers[:n]:
        indices = layer.encode(residual)
        quantized = layer.decode(indices)
        residual = residual - quantized
        all_indices.append(indices)

The loop becomes one call of ``residual_vector_quantize``; what stands around it stays. Layers that do more
than to search and look up a codebook, such as project their input, keep the loop.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from genperf.accelerate._pattern import Match, Options, Refusal
from genperf.accelerate._quantizer import search_backend, tensor_of
from genperf.accelerate._quantizer_probe import codebooks, probing, random_copy
from genperf.accelerate._quantizer_source import Unknown
from genperf.accelerate._rewrite import CannotRewrite, methods_of, recompile_inside
from genperf.ops.residual_vector_quantize import residual_vector_quantize
from genperf.ops.vq_nearest import vq_nearest

_NAME = "_genperf_codes"


def find(module: nn.Module, cls: type, options: Options) -> Iterator[Match | Refusal]:
    """Yield a match or a refusal for an ``encode`` with such a loop."""
    function = methods_of(cls).get("encode")
    if function is None or not {"encode", "decode"} <= set(inspect.unwrap(function).__code__.co_names):
        return
    replacing = _Replacing()
    try:
        recompile_inside(function, {_NAME: None}, replacing.in_definition)
    except CannotRewrite:
        return
    if len(replacing.lists) != 1:
        return
    (layers,) = replacing.lists
    was = f"{cls.__name__}.encode: self.{layers} one after another"
    try:
        if "encode" in module.__dict__:
            raise Unknown("it is set on the module itself")
        if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
            raise Unknown("it is on the meta device, where nothing can be probed")
        stages = Stages(_codebook_of(getattr(module, layers, None)))
        method = recompile_inside(function, {_NAME: stages.codes}, _Replacing().in_definition)
    except (Unknown, CannotRewrite) as reason:
        yield Refusal(was, str(reason))
        return
    key = ("residual_codes", function, stages)
    yield Match(was, "residual_vector_quantize", key, {"encode": method}, search_backend(module))


class Stages:
    """Layers that look for the nearest word of their codebook of this name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stages) and self._name == other._name

    def __hash__(self) -> int:
        return hash(self._name)

    def codes(self, layers: Any, x: Tensor) -> list[Tensor]:
        """The codes [B, T] of each layer for x [B, D, T]."""
        books = [tensor_of(layer, self._name).detach() for layer in layers]
        dtype = reduce(torch.promote_types, [book.dtype for book in books], x.dtype)
        covered = x.dim() == 3 and x.numel() > 0 and dtype != torch.float64
        if not covered or any(book.device != x.device or book.shape[1] != x.shape[1] for book in books):
            return _one_after_another(layers, x)
        if not books:
            return []
        found = residual_vector_quantize(x.detach().to(dtype), [book.to(dtype) for book in books], dim=1)
        return list(found.indices.unbind(-1))


def _one_after_another(layers: Any, x: Tensor) -> list[Tensor]:
    codes = []
    for layer in layers:
        codes.append(layer.encode(x))
        x = x - layer.decode(codes[-1])
    return codes


class _Replacing(ast.NodeTransformer):
    """Replaces the loop, and notes the names of the lists of layers."""

    def __init__(self) -> None:
        self.lists: list[str] = []
        self._owner = ""
        self._ends: list[tuple[int, set[str]]] = []

    def in_definition(self, definition: ast.FunctionDef) -> ast.FunctionDef:
        self._owner = definition.args.args[0].arg if definition.args.args else ""
        definition = self.visit(definition)
        for node in ast.walk(definition):
            for line, names in self._ends:
                if isinstance(node, ast.Name) and node.id in names and getattr(node, "lineno", 0) > line:
                    self.lists.clear()  # the loop's variables are used after it
        return definition

    def visit_For(self, node: ast.For) -> ast.AST:
        layers = node.iter.value if isinstance(node.iter, ast.Subscript) else node.iter
        is_own = isinstance(layers, ast.Attribute) and isinstance(layers.value, ast.Name)
        names = _loop(node)
        if not is_own or names is None or layers.value.id != self._owner:  # type: ignore[attr-defined]
            return self.generic_visit(node)
        residual, codes, others = names
        self.lists.append(layers.attr)  # type: ignore[attr-defined]
        self._ends.append((node.end_lineno or node.lineno, {residual, *others}))
        call = ast.Call(ast.Name(_NAME, ast.Load()), [node.iter, ast.Name(residual, ast.Load())], [])
        extend = ast.Attribute(ast.Name(codes, ast.Load()), "extend", ast.Load())
        return ast.copy_location(ast.Expr(ast.Call(extend, [call], [])), node)


def _loop(node: ast.For) -> tuple[str, str, set[str]] | None:
    """The names of the residual and of the list of codes, and the others, if it is the loop."""
    if len(node.body) != 4 or node.orelse or not isinstance(node.target, ast.Name):
        return None
    layer = node.target.id
    values = [s.value for s in node.body if isinstance(s, ast.Assign) and len(s.targets) == 1]
    names = [s.targets[0] for s in node.body if isinstance(s, ast.Assign)]
    if len(values) != 3 or not all(isinstance(n, ast.Name) for n in names):
        return None
    indices, quantized, residual = (n.id for n in names)  # type: ignore[attr-defined]
    append = node.body[3]
    if not isinstance(append, ast.Expr) or not isinstance(append.value, ast.Call):
        return None
    codes = append.value.func
    if not isinstance(codes, ast.Attribute) or not isinstance(codes.value, ast.Name):
        return None
    found = [ast.unparse(v) for v in (*values, append)]
    expected = [
        f"{layer}.encode({residual})",
        f"{layer}.decode({indices})",
        f"{residual} - {quantized}",
        f"{codes.value.id}.append({indices})",
    ]
    return (residual, codes.value.id, {indices, quantized, layer}) if found == expected else None


def _codebook_of(layers: Any) -> str:
    """The name of the codebook that each of the layers searches and looks up, from runs in float64.

    Raises:
        Unknown: they do something else.
    """
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise Unknown("its layers are not in a ModuleList")
    kinds = {(type(layer), str(layer)): layer for layer in layers}
    reasons = [""]
    for part, owner in layers[0].named_modules():
        for book, transposed in codebooks(owner):
            name = f"{part}.{book}" if part else book
            if not transposed:
                reasons = [reason for layer in kinds.values() if (reason := _difference(layer, name))]
                if not reasons:
                    return name
    raise Unknown(reasons[0] or "its layers have no codebook")


def _difference(layer: Any, name: str) -> str:
    for training in (True, False):
        generator = torch.Generator().manual_seed(3)
        probe: Any = random_copy(layer, generator, training)
        try:
            with torch.no_grad(), probing(), torch.random.fork_rng(devices=[]):
                book = tensor_of(probe, name)
                x = 1.5 * torch.randn(2, book.shape[1], 5, generator=generator)
                indices = probe.encode(x)
                quantized = probe.decode(indices)
        except Exception as error:
            return f"its layers cannot be run alone: {type(error).__name__}: {error}"
        expected = vq_nearest(x, book, dim=1).indices
        if indices.shape != expected.shape or not torch.equal(indices, expected):
            return "its layers do more than to search a codebook"
        if not torch.equal(quantized, book[expected].movedim(-1, 1)):
            return "its layers do more than to look up a codebook"
    return ""
