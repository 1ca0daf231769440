"""Records one real forward of an unmodified model as a list of functional aten calls.

Only what depends on the sampled input is recorded; everything else (masked or normalised weights,
conditioning networks, position maps) has been computed when it is used, and enters as a constant.
In-place writes are resolved: a storage that depends on the input has a current value, and reading any
tensor over that storage means reading a view of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from genperf.sampling._calls import Call, Recording, Value, equal
from genperf.sampling._errors import CaptureError
from genperf.sampling._views import (
    IN_PLACE,
    SAME,
    SILENT_VIEWS,
    Step,
    Target,
    aten,
    meta_result,
    name_of,
    steps_of,
    undo,
)


@dataclass(eq=False)
class _Root:
    """A storage with something in it that depends on the input, or did; ``value`` is what it holds."""

    storage: StorageWeakRef  # as long as it lives, no other storage has its address
    geometry: tuple[Any, ...]
    value: Value | Tensor
    views: dict[Any, Value | Tensor] = field(default_factory=dict)  # of (value, steps): that part of it
    last: tuple[tuple[Step, ...], Value | Tensor] | None = None  # where it was written, its value before


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return (tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype)


def _is_contiguous(geometry: tuple[Any, ...]) -> bool:
    size = 1
    for n, stride in zip(reversed(geometry[0]), reversed(geometry[1]), strict=True):
        if n != 1 and stride != size:
            return False
        size *= n
    return True


def _copy(tensor: Tensor) -> Tensor:
    """A copy that stays expanded where the tensor is."""
    kept = tensor
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            kept = kept.narrow(dim, 0, 1)
    return kept.clone().expand_as(tensor)


def _is_value(a: Any) -> bool:
    return isinstance(a, Value)


_SHAPE_ONLY = ("_like", "aten.new_")  # makes a tensor of which the input gives only the shape
_UNINITIALISED = ("aten.empty", "aten.new_empty")
_OVERWRITES = ("copy_", "fill_", "zero_")


class _Recorder(TorchDispatchMode):
    def __init__(self, expected: Recording | None) -> None:
        super().__init__()
        self._expected = expected
        self.calls: list[Call] = []
        self.host_reads: list[str] = []
        self.module = ""
        self._roots: dict[int, _Root] = {}
        # tensor -> geometry of the tensor that it is a view of, steps from there
        self._chains: Any = WeakIdKeyDictionary()

    def start(self, tensor: Tensor) -> Value:
        value = Value(-1, 0, tuple(tensor.shape), tensor.dtype)
        self._bind(tensor, value)
        return value

    def _bind(self, tensor: Tensor, value: Value | Tensor) -> _Root:
        storage = tensor.untyped_storage()
        root = self._roots[storage._cdata] = _Root(StorageWeakRef(storage), _geometry(tensor), value)
        self._chains[tensor] = (root.geometry, ())
        return root

    def _root(self, tensor: Tensor) -> _Root | None:
        return self._roots.get(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else None

    def _fail(self, why: str) -> CaptureError:
        return CaptureError(f"{self.module or 'the model'}: {why}")

    def read(self, a: Any) -> Any:
        """The current Value of a tensor, or a copy of it if it is a constant; anything else as it is."""
        if not isinstance(a, Tensor):
            return a
        root = self._root(a)
        if root is None:  # what is constant may be written to later
            return _copy(a.detach())
        return self._part(root, root.value, self._steps(root, a))

    def _steps(self, root: _Root, tensor: Tensor) -> tuple[Step, ...]:
        """The way from a root to a tensor over its storage."""
        origin, steps = self._chains.get(tensor, (_geometry(tensor), ()))
        if origin == root.geometry:
            return steps
        both = (origin, root.geometry)
        sizes = {(math.prod(g[0]), *g[2:]) for g in both}
        if len(sizes) == 1 and all(map(_is_contiguous, both)):
            return (Step(aten.reshape.default, (origin[0],)), *steps)
        raise self._fail(
            "reads a part of a tensor that was made outside of torch's dispatcher (for example through "
            "numpy); use torch operations for it"
        )

    def _part(self, root: _Root, value: Value | Tensor, steps: tuple[Step, ...]) -> Value | Tensor:
        known = len(steps)
        while known and (value, steps[:known]) not in root.views:
            known -= 1
        part = root.views[value, steps[:known]] if known else value
        for i, step in enumerate(steps[known:], start=known + 1):
            part = root.views[value, steps[:i]] = self._apply(step.target, (part, *step.operands()))
        return part

    def _apply(self, target: Target, args: tuple[Any, ...]) -> Any:
        """Record a call that the model did not make, or compute it, if its operands are constants."""
        if any(map(_is_value, args)):
            return self._record(target, args, {}, meta_result(target, args, _is_value))
        return target(*args)

    def _record(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any], like: Any) -> Any:
        """Append a call whose results look like ``like`` (a tensor or a sequence of them)."""
        many = isinstance(like, (tuple, list))
        results = tuple(
            Value(len(self.calls), i, tuple(r.shape), r.dtype) if isinstance(r, Tensor) else None
            for i, r in enumerate(like if many else [like])
        )
        call = Call(target, args, kwargs, results, self.module)
        if self._expected is not None:
            self._compare(call)
            call = Call(target, (), {}, results, self.module)  # constants may be large
        self.calls.append(call)
        return results if many else results[0]

    def _compare(self, call: Call) -> None:
        assert self._expected is not None
        calls = self._expected.calls
        same = len(self.calls) < len(calls) and equal(call, calls[len(self.calls)])
        if not same:
            raise CaptureError(f"{call.name}: what the model computes depends on the values of its input")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func.overloadpacket)
        if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in name:
            raise self._fail(f"{name} draws random numbers inside forward; call model.eval() first")
        aliases = [a.alias_info for a in func._schema.arguments]
        written = [i for i, a in enumerate(aliases) if a is not None and a.is_write]
        if func in IN_PLACE or (not written and (any(aliases) or func in SAME or func in SILENT_VIEWS)):
            return self._view(func, args, kwargs)
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if name.startswith(_UNINITIALISED):
            return func(*args, **kwargs).zero_()  # as a constant the same each time
        if not any(self._root(t) is not None for t in tensors):
            return func(*args, **kwargs)
        if name.endswith(_SHAPE_ONLY[0]) or name.startswith(_SHAPE_ONLY[1]):
            return func(*args, **kwargs)
        symbolic = tree_map(self.read, (args, kwargs))
        if written:
            return self._write(func, args, kwargs, symbolic, written)
        result = func(*args, **kwargs)
        if not any(map(_is_value, tree_leaves(symbolic))):
            return result
        if func is aten._local_scalar_dense.default:
            self.host_reads.append(self.module)
            return result
        values = self._record(func, symbolic[0], symbolic[1], result)
        many = isinstance(result, (tuple, list))
        for tensor, value in zip(result if many else [result], values if many else [values], strict=True):
            if isinstance(tensor, Tensor):
                if self._root(tensor) is not None:
                    raise self._fail(f"{name} returns the memory of its argument; clone it")
                self._bind(tensor, value)
        return result

    def _view(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        base = args[0] if args and isinstance(args[0], Tensor) else None
        if base is None or kwargs:
            tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
            if any(self._root(t) is not None for t in tensors):
                raise self._fail(f"{func.overloadpacket} is not supported with these arguments")
            return func(*args, **kwargs)
        origin, steps = self._chains.get(base, (_geometry(base), ()))
        if self._root(base) is not None:
            self._steps(self._root(base), base)  # type: ignore[arg-type]  # raises unless the way is known
        rank = base.dim()
        result = func(*args, **kwargs)
        taken = steps_of(IN_PLACE.get(func, func), args[1:], result, rank)
        if taken is None and self._root(base) is not None:
            raise self._fail(f"{func.overloadpacket} is a view that is not supported")
        parts = result if isinstance(result, (tuple, list)) else [result]
        for i, tensor in enumerate(parts):
            self._chains[tensor] = (origin, (*steps, *(taken[i : i + 1] if taken else ())))
        return result

    def _write(self, func: Any, args: Any, kwargs: Any, symbolic: Any, written: list[int]) -> Any:
        name = name_of(func)
        if len(written) != 1 or written[0] >= len(args) or not isinstance(args[written[0]], Tensor):
            raise self._fail(f"{func.overloadpacket} writes several tensors, or into out=")
        target = args[written[0]]
        if target.numel() == 0:
            return func(*args, **kwargs)
        operands = [a for i, a in enumerate(symbolic[0]) if i != written[0] or name not in _OVERWRITES]
        live = any(map(_is_value, tree_leaves((operands, symbolic[1]))))
        root = self._root(target)
        if root is None:
            if not live:
                return func(*args, **kwargs)
            root = self._constant_root(target)
        steps = self._steps(root, target)
        result = func(*args, **kwargs)
        if not live:
            part: Any = target.detach().clone()
        elif name in _OVERWRITES:
            part = symbolic[0][1]
            if part.dtype != target.dtype:
                part = self._record(aten._to_copy.default, (part,), {"dtype": target.dtype}, target)
            if part.shape != target.shape:
                part = self._apply(aten.expand.default, (part, list(target.shape)))
        else:
            part = self._record(func, symbolic[0], symbolic[1], target)
        self._replace(root, steps, part)
        return result

    def _constant_root(self, target: Tensor) -> _Root:
        """A root of what ``target``, a constant so far, is a view of."""
        (shape, stride, offset, dtype), _ = self._chains.get(target, (_geometry(target), ()))
        whole = torch.empty(0, dtype=dtype, device=target.device)
        whole.set_(target.untyped_storage(), offset, shape, stride)
        storage = target.untyped_storage()
        root = self._roots[storage._cdata] = _Root(StorageWeakRef(storage), _geometry(whole), whole.clone())
        return root

    def _replace(self, root: _Root, steps: tuple[Step, ...], part: Value | Tensor) -> None:
        """Give the part of a root at ``steps`` another value."""
        before = root.value
        if root.last is not None and root.last[0] == steps:  # a part that is written again
            before = root.last[1]
        if part is self._part(root, root.value, steps):
            return
        whole = part
        for i in reversed(range(len(steps))):
            outer = self._part(root, before, steps[:i])
            way = undo(steps[i], tuple(outer.shape))
            if way is None:
                raise self._fail(
                    f"writes in place into a view by {name_of(steps[i].target)} of a tensor that depends on "
                    "the input; clone it first"
                )
            whole = self._apply(way.target, (*((outer, whole) if way.into else (whole,)), *way.args))
        root.value = whole
        root.last = (steps, before)
        root.views[whole, steps] = part


@contextmanager
def _plain_attention() -> Iterator[None]:
    """nn.MultiheadAttention as its separate operations also in eval mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


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
    expected: Recording | None = None,
) -> Recording:
    """Run ``call(example, *arguments, **keywords)`` once and record what depends on ``example``.

    Raises:
        CaptureError: if the model cannot be recorded, or if it does not run the program of ``expected``,
            on the same constants. The recording has no constants then.
    """
    recorder = _Recorder(expected)
    example = example.clone()
    with torch.no_grad(), _plain_attention(), _module_names(model, recorder), recorder:
        start = recorder.start(example)
        output = call(example, *arguments, **(keywords or {}))
        symbolic = tree_map(recorder.read, output)
    if expected is not None and len(expected.calls) > len(recorder.calls):
        name = expected.calls[len(recorder.calls)].name
        raise CaptureError(f"{name}: what the model computes depends on the values of its input")
    return Recording(start, recorder.calls, symbolic, recorder.host_reads)
