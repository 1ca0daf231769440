"""The function behind ``genperf.accelerate``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from genperf import _op
from genperf.accelerate._pattern import Match, Options, Refusal, finders
from genperf.accelerate._report import Entry, Report
from genperf.accelerate._swap import is_derived, modules_of, original_class, swapped_class
from genperf.ops.gaussian_sample import gaussian_sample

Predicate = Callable[[str, nn.Module], bool]
Selection = str | Predicate | Iterable[str | Predicate] | None


def accelerate(
    model: Any,
    mode: str = "inference",
    only: Selection = None,
    exclude: Selection = None,
    strict: bool = False,
    rng: str = "torch",
) -> Report:
    """Make ``model`` faster in place, without changing what it computes.

    Each module that a pattern recognises, by its structure and by a numerical probe against the module's
    own code, gets a subclass of its own class, whose methods run genperf's kernels. Parameters, buffers,
    state_dict, ``isinstance``, hooks, ``copy.deepcopy`` (the copy is accelerated), pickling (as the
    original class), DataParallel, DistributedDataParallel and ``torch.compile`` keep working; a model
    that is already compiled or wrapped is accelerated inside. Everything else runs the original code,
    and the report says why. Accelerating again changes the options of what is accelerated.

    Args:
        model: any module; or an object with modules as attributes, such as a sampler of pythae.
        mode: "inference", or "training" to choose and to time for forward and backward. Gradients are
            right in both.
        only: module names to consider: patterns such as "encoder.*" (as in :mod:`fnmatch`; the model
            itself is ""), functions ``(name, module) -> bool``, or several of them. None: all.
        exclude: module names to leave out, in the same form.
        strict: raise if anything that is recognised cannot be covered, and make
            :meth:`Report.verify` raise on a mismatch.
        rng: "torch" draws the noise that eager torch would draw; "philox" draws genperf's own, which is
            faster, and the same on every backend.

    Returns:
        Report: prints as a table; ``verify(*inputs)`` compares with the original, ``restore()`` undoes.

    Raises:
        TypeError: ``model`` is not a module and has none, or ``only`` or ``exclude`` is of another type.
        ValueError: an unknown ``mode`` or ``rng``, or a pattern in ``only`` or ``exclude`` that fits no
            module.
        RuntimeError: ``strict`` and something recognised cannot be covered. Nothing is changed then.
    """
    modules = modules_of(model) if hasattr(model, "__dict__") and not isinstance(model, type) else {}
    if not isinstance(model, nn.Module) and len(modules) < 2:
        raise TypeError(f"model: {type(model).__name__}; expected a torch.nn.Module")
    if mode not in ("inference", "training"):
        raise ValueError(f'mode: {mode!r}; expected "inference" or "training"')
    if rng not in ("torch", "philox"):
        raise ValueError(f'rng: {rng!r}; expected "torch" or "philox"')
    options = Options(mode, rng)
    chosen = _selected(modules, only, "only", default=True)
    dropped = _selected(modules, exclude, "exclude", default=False)
    entries: list[Entry] = []
    classes: list[tuple[nn.Module, type]] = []
    for name, module in modules.items():
        if name in chosen and name not in dropped:
            cls, found = _plan(name, module, options)
            entries += found
            if cls is not None:
                classes.append((module, cls))
    refused = [entry for entry in entries if not entry.kernel]
    if strict and refused:
        reasons = "\n".join(f"  {e.name or '(model)'}: {e.was}: {e.reason}" for e in refused)
        raise RuntimeError(f"accelerate: strict, and left alone would be:\n{reasons}")
    for module, cls in classes:
        module.__class__ = cls
    return Report(model, options, strict, entries)


def _plan(name: str, module: nn.Module, options: Options) -> tuple[type | None, list[Entry]]:
    """The class for one module (None: its own), and what to report."""
    if is_derived(type(module)):
        reason = "its class was changed again after it was accelerated"
        return None, [Entry(name, type(module).__name__, reason=reason)]
    if isinstance(module, torch.jit.ScriptModule):
        return None, []
    original = original_class(type(module))
    entries: list[Entry] = []
    matches: list[Match] = []
    methods: dict = {}
    for find in finders(module):
        for found in find(module, original, options):
            taken = sorted(set(found.methods) & set(methods)) if isinstance(found, Match) else []
            if taken:
                found = Refusal(found.was, f"{', '.join(taken)} is already replaced for something else")
            if isinstance(found, Refusal):
                entries.append(Entry(name, found.was, reason=found.reason))
                continue
            matches.append(found)
            methods.update(found.methods)
            entries.append(Entry(name, found.was, found.kernel, found.backend or _backend_for(module)))
    if not matches:
        return None, entries
    return swapped_class(original, tuple(match.key for match in matches), methods), entries


def _backend_for(module: nn.Module) -> str:
    """The backend that gaussian_sample chooses for the device and dtype of the module."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    if like.is_meta:
        return "-"
    x = torch.zeros(1, 1, device=like.device, dtype=like.dtype)
    explanation = _op.explain(gaussian_sample, x, x, sample=False)
    return explanation.choices[-1].backend


def _selected(modules: dict[str, nn.Module], selection: Selection, argument: str, default: bool) -> set[str]:
    if selection is None:
        return set(modules) if default else set()
    parts = [selection] if isinstance(selection, str) or callable(selection) else selection
    if not isinstance(parts, Iterable):
        raise TypeError(
            f"{argument}: {type(selection).__name__}; expected a name pattern, a function or several"
        )
    selected: set[str] = set()
    for part in parts:
        if isinstance(part, str):
            fits = {name for name in modules if fnmatchcase(name, part)}
            if not fits:
                raise ValueError(f"{argument}: {part!r} fits the name of no module of the model")
        elif callable(part):
            fits = {name for name, module in modules.items() if part(name, module)}
        else:
            raise TypeError(f"{argument}: {type(part).__name__}; expected a name pattern or a function")
        selected |= fits
    return selected
