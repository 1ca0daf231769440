"""Changing a module's class to a subclass with some methods replaced, and back.

The subclass has the name of the original and adds no state, so state_dict, ``isinstance``, ``repr``,
replication by DataParallel, hooks and ``torch.compile`` see what they saw before. A copy by
``copy.deepcopy`` stays accelerated; a pickle refers to the original class alone, and loads where
genperf is not installed.
"""

from __future__ import annotations

import copy
import copyreg
import weakref
from collections.abc import Hashable
from types import FunctionType
from typing import Any

from torch import nn

_MARK = "_genperf_original"
_swapped: dict[tuple[type, Hashable], type] = {}
_kept: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def original_class(cls: type) -> type:
    """The class that ``cls`` was made from, or ``cls`` itself if it is not an accelerated class."""
    return cls.__dict__.get(_MARK, cls)


def is_derived(cls: type) -> bool:
    """Whether a class made by someone else stands on top of an accelerated one."""
    return any(_MARK in base.__dict__ for base in cls.__mro__[1:])


def swapped_class(original: Any, key: Hashable, methods: dict[str, FunctionType]) -> type:
    """The subclass of ``original`` with ``methods``; one class for one (original, key)."""
    found = _swapped.get((original, key))
    if found is not None:
        return found

    def reduce_ex(self: Any, protocol: Any) -> Any:
        return _reduced_as(original, original.__reduce_ex__(self, protocol), type(self))

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        return _deepcopy(self, original, memo)

    namespace = {
        **methods,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": reduce_ex,
        "__deepcopy__": deepcopy,
        _MARK: original,
    }
    cls = type(original)(original.__name__, (original,), namespace)
    _swapped[original, key] = cls
    return cls


def kept_for(module: Any) -> dict[Any, Any]:
    """What the replaced methods of ``module`` keep from call to call, which is no state of the module.

    It must not refer to the module, or that would never be freed.
    """
    return _kept.setdefault(module, {})


def modules_of(model: Any) -> dict[str, Any]:
    """The modules of a model by name; of another object, "" for itself and the modules in its attributes."""
    if isinstance(model, nn.Module):
        return dict(model.named_modules())
    found: dict[str, Any] = {"": model}
    for attribute, value in vars(model).items():
        if isinstance(value, nn.Module):
            found.update({f"{attribute}.{n}" if n else attribute: m for n, m in value.named_modules()})
    return found


def restore_class(module: Any) -> None:
    """Give ``module`` its original class back; does nothing to a module that has it.

    Raises:
        RuntimeError: something else (a parametrization, for instance) changed the class afterwards.
    """
    cls = type(module)
    if is_derived(cls):
        raise RuntimeError(
            f"restore: the class of {cls.__qualname__} was changed again after accelerate; "
            f"undo that change (for instance remove the parametrization), then restore"
        )
    if original_class(cls) is not cls:
        module.__class__ = original_class(cls)
        _kept.pop(module, None)


def _reduced_as(original: Any, reduced: Any, cls: type) -> Any:
    """A result of ``__reduce_ex__`` with ``original`` in the place of ``cls``."""
    if not isinstance(reduced, tuple):
        return reduced
    function, arguments, *rest = reduced
    if function is copyreg.__newobj__:  # type: ignore[attr-defined]
        function = original.__new__  # pickle wants __newobj__ to be given the class of the object
    arguments = tuple(original if argument is cls else argument for argument in arguments)
    return (original if function is cls else function, arguments, *rest)


def _deepcopy(module: Any, original: Any, memo: dict[int, Any]) -> Any:
    inherited = getattr(original, "__deepcopy__", None)
    if inherited is not None:
        result = inherited(module, memo)
        if type(result) is original:
            result.__class__ = type(module)
        return result
    reduced: Any = original.__reduce_ex__(module, 4)
    function, arguments, *rest = reduced
    result = function(*copy.deepcopy(arguments, memo))
    memo[id(module)] = result
    if rest and rest[0] is not None:
        state = copy.deepcopy(rest[0], memo)
        if hasattr(result, "__setstate__"):
            result.__setstate__(state)
        else:
            result.__dict__.update(state)
    return result
