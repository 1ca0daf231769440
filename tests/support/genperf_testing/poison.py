"""Memory that genperf allocates starts as NaN, so that what a kernel leaves unwritten is seen.

So does, but for its value, what C++ takes from the heap.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

INTEGER = -0x5A5A5A5A
M_PERTURB = -6  # of glibc's malloc.h: bytes that are allocated get the complement of this value


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        out = allocate(*args, **kwargs)
        if not torch.compiler.is_compiling():
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.split(".")[0] == "genperf":
                if out.is_floating_point():
                    out.fill_(torch.nan)
                elif out.dtype in (torch.int32, torch.int64):
                    out.fill_(INTEGER)
        return out

    return wrapper


def _perturb_heap(byte: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_PERTURB, byte)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    _perturb_heap(0x81)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield
    _perturb_heap(0)
