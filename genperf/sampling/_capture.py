"""Records one real forward of an unmodified model as a list of functional aten calls.

Only what depends on the sampled input is recorded; everything else (masked or normalised weights,
conditioning networks, position maps) has been computed when it is used, and enters as a constant.
In-place writes are resolved: a storage that depends on the input has a current value, and reading any
tensor over that storage means reading a view of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from genperf.sampling._errors import CaptureError


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor that depends on the input: result ``index`` of recorded call ``call``; -1 is the input."""

    call: int
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """One aten call: ``args`` and ``kwargs`` hold Values, constant tensors and plain numbers."""

    target: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Value | None, ...]
    module: str

    @property
    def name(self) -> str:
        where = self.module or "the model's own forward"
        return f"{where} ({self.target.overloadpacket})"


@dataclass
class Recording:
    """The calls of one forward, and its output with Values in the place of tensors."""

    input: Value
    calls: list[Call]
    output: Any
    host_reads: list[str]


@dataclass(eq=False)
class _Root:
    """A storage that depends on the input."""

    storage: torch.UntypedStorage
    geometry: tuple[Any, ...]
    value: Value
    views: dict[Any, Value] = field(default_factory=dict)


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return (tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype)


_aten = torch.ops.aten
_RANDOM = ("dropout", "bernoulli", "aten.rand", "aten.normal", "multinomial", "exponential_", "random")
_ALIASES = {_aten.alias.default, _aten.detach.default}
_SHAPE_ONLY = ("_like", "aten.new_")  # makes a tensor of which the input gives only the shape


class _Recorder(TorchDispatchMode):
    def __init__(self, parameters: Mapping[int, str]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.host_reads: list[str] = []
        self.module = ""
        self._roots: dict[int, _Root] = {}
        self._chains: Any = WeakIdKeyDictionary()  # tensor -> (root, view calls from the root)
        self._owned = parameters  # storages of parameters and buffers, which may change later

    def start(self, tensor: Tensor) -> Value:
        value = Value(-1, 0, tuple(tensor.shape), tensor.dtype)
        self._bind(tensor, value)
        return value

    def _bind(self, tensor: Tensor, value: Value) -> None:
        storage = tensor.untyped_storage()
        root = _Root(storage, _geometry(tensor), value)
        self._roots[storage._cdata] = root
        self._chains[tensor] = (root, ())

    def _root(self, tensor: Tensor) -> _Root | None:
        return self._roots.get(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else None

    def read(self, tensor: Tensor) -> Value | None:
        """The current value of a tensor; None for a constant."""
        root = self._root(tensor)
        if root is None:
            return None
        known = self._chains.get(tensor)
        if known is None:
            if _geometry(tensor) == root.geometry:
                return root.value
            raise CaptureError(
                f"{self.module or 'the model'}: reads a part of a tensor that was made outside of torch's "
                "dispatcher (for example through numpy); use torch operations for it"
            )
        value = root.value
        for step, (target, args, kwargs) in enumerate(known[1]):
            key = (root.value, known[1][: step + 1])
            if key not in root.views:
                root.views[key] = self._record(
                    target, (value, *args), dict(kwargs), _meta(target, value, args, kwargs)
                )
            value = root.views[key]
        return value

    def _record(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Any) -> Any:
        """Append a call whose results look like ``like`` (a tensor or a sequence of them)."""
        many = isinstance(like, (tuple, list))
        results = tuple(
            Value(len(self.calls), i, tuple(r.shape), r.dtype) if isinstance(r, Tensor) else None
            for i, r in enumerate(like if many else [like])
        )
        self.calls.append(Call(target, args, kwargs, results, self.module))
        return results if many else results[0]

    def _constant(self, tensor: Tensor) -> Tensor:
        owned = tensor.untyped_storage()._cdata in self._owned
        return tensor.detach().clone() if owned else tensor.detach()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, Tensor)]
        live = any(self._root(t) is not None for t in tensors)
        if not live:
            return func(*args, **kwargs)
        name = str(func.overloadpacket)
        if name.endswith(_SHAPE_ONLY[0]) or name.startswith(_SHAPE_ONLY[1]):
            return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default:
            self.host_reads.append(self.module)
            return func(*args, **kwargs)
        if any(word in name for word in _RANDOM):
            raise CaptureError(
                f"{self.module or 'the model'}: {name} draws random numbers inside forward; "
                "call model.eval() first"
            )
        schema = func._schema.arguments
        written = [i for i, a in enumerate(schema) if a.alias_info is not None and a.alias_info.is_write]
        views = (
            any(a.alias_info is not None and not a.alias_info.is_write for a in schema) or func in _ALIASES
        )
        if views and not written:
            return self._view(func, args, kwargs)
        symbolic = tree_map(self._operand, (args, kwargs))
        if written and isinstance(symbolic[0][written[0]], Tensor):
            before = [a.clone() if i == written[0] else a for i, a in enumerate(symbolic[0])]
            symbolic = (tuple(before), symbolic[1])
        result = func(*args, **kwargs)
        if written:
            self._write(func, args, kwargs, symbolic, written)
            return result
        values = self._record(func, symbolic[0], symbolic[1], result)
        for tensor, value in zip(
            tree_flatten(result)[0], values if isinstance(values, tuple) else [values], strict=True
        ):
            if isinstance(tensor, Tensor):
                self._bind(tensor, value)
        return result

    def _operand(self, a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        value = self.read(a)
        return self._constant(a) if value is None else value

    def _view(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        base = args[0] if isinstance(args[0], Tensor) else None
        if base is None:
            raise CaptureError(
                f"{self.module or 'the model'}: {func.overloadpacket} of a list is not supported"
            )
        root = self._root(base)
        assert root is not None
        known = self._chains.get(base)
        if known is None:
            self.read(base)  # raises unless it is the whole
            known = (root, ())
        result = func(*args, **kwargs)
        step = (func, args[1:], tuple(sorted(kwargs.items())))
        if isinstance(result, (tuple, list)):
            for i, tensor in enumerate(result):
                self._chains[tensor] = (root, (*known[1], (_Pick(func, i), _hashable(args[1:]), step[2])))
        elif func not in _ALIASES:
            self._chains[result] = (root, (*known[1], (func, _hashable(args[1:]), step[2])))
        else:
            self._chains[result] = known
        return result

    def _write(self, func: Any, args: Any, kwargs: Any, symbolic: Any, written: list[int]) -> None:
        if len(written) != 1 or written[0] >= len(args):
            raise CaptureError(f"{self.module or 'the model'}: {func.overloadpacket} writes several tensors")
        target = args[written[0]]
        root = self._root(target)
        chain = self._chains.get(target, (None, ()))[1] if root is not None else ()
        whole = not chain if root is not None else target.untyped_storage().nbytes() == target.nbytes
        if not whole:
            raise CaptureError(
                f"{self.module or 'the model'}: {func.overloadpacket} writes in place into a part of a "
                "tensor that depends on the input; write torch.cat or torch.nn.functional.pad instead"
            )
        value = self._record(func, symbolic[0], symbolic[1], target)
        if root is None:
            self._bind(target, value)
        else:
            root.value = value


class _Pick:
    """Result ``index`` of a view operator with several, such as split."""

    def __init__(self, func: Any, index: int) -> None:
        self.func, self.index = func, index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Pick) and (self.func, self.index) == (other.func, other.index)

    def __hash__(self) -> int:
        return hash((self.func, self.index))

    @property
    def overloadpacket(self) -> Any:
        return self.func.overloadpacket


def _hashable(args: Any) -> Any:
    return tuple(_hashable(a) if isinstance(a, (list, tuple)) else a for a in args)


def _meta(target: Any, value: Value, args: Any, kwargs: Any) -> Tensor:
    base = torch.empty(value.shape, dtype=value.dtype, device="meta")
    args = [list(a) if isinstance(a, tuple) else a for a in args]
    if isinstance(target, _Pick):
        return target.func(base, *args, **dict(kwargs))[target.index]
    return target(base, *args, **dict(kwargs))


@contextmanager
def _module_names(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Let the recorder know which submodule runs."""
    names = {id(m): n for n, m in model.named_modules()}
    stack: list[str] = []

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(recorder.module)
        recorder.module = names.get(id(module), recorder.module)

    def leave(module: nn.Module, *_: Any) -> None:
        recorder.module = stack.pop()

    before = nn.modules.module.register_module_forward_pre_hook(enter)
    after = nn.modules.module.register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def record(
    model: nn.Module,
    call: Callable[..., Any],
    example: Tensor,
    arguments: Sequence[Any] = (),
    keywords: Mapping[str, Any] | None = None,
) -> Recording:
    """Run ``call(example, *arguments, **keywords)`` once and record what depends on ``example``."""
    owned = {t.untyped_storage()._cdata: n for n, t in [*model.named_parameters(), *model.named_buffers()]}
    recorder = _Recorder(owned)
    example = example.clone()
    with torch.no_grad(), _module_names(model, recorder), recorder:
        start = recorder.start(example)
        output = call(example, *arguments, **(keywords or {}))
        symbolic = tree_map(lambda a: recorder._operand(a) if isinstance(a, Tensor) else a, output)
    return Recording(start, recorder.calls, symbolic, recorder.host_reads)


def same_program(a: Recording, b: Recording) -> str | None:
    """None if two recordings run the same calls on the same constants; else the first that differs."""
    for x, y in zip(a.calls, b.calls, strict=False):
        if x.target != y.target or not _equal((x.args, x.kwargs), (y.args, y.kwargs)):
            return x.name
    if len(a.calls) != len(b.calls):
        longer = a if len(a.calls) > len(b.calls) else b
        return longer.calls[min(len(a.calls), len(b.calls))].name
    return None


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Value):
        return isinstance(b, Value) and (a.call, a.index, a.shape) == (b.call, b.index, b.shape)
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return bool(a == b)
