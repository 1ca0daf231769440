"""``torch.randn`` on the CPU, faster: the same bits by ``csrc/torch_normal``, and the same generator after.

The kernel follows torch's own for float32 on x86-64 with AVX2. It is used only after a comparison, once a
process, has shown that the installed torch gives these bits on this machine.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import direct_device, note

#: Below this many elements, taking the generator's state and giving it back costs more than is gained.
FEWEST = 16384
_STATE_BYTES = 5056


def torch_normal(
    shape: Sequence[int],
    *,
    generator: torch.Generator | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """``torch.randn(shape, generator=generator, dtype=dtype, device=device)``."""
    if not torch.compiler.is_dynamo_compiling():
        refusal = _refusal(shape, dtype, device)
        note("torch_normal", refusal)
        if refusal is None:
            out = torch.empty(shape, dtype=dtype, device=device)
            if _draw(out, torch.default_generator if generator is None else generator):
                return out
    return torch.randn(shape, generator=generator, dtype=dtype, device=device)


def _refusal(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why torch itself has to draw; None if the kernel may."""
    if (n := torch.Size(shape).numel()) < FEWEST:
        return f"{n} elements, at least {FEWEST}"
    if _backend.forced() not in (None, "cpu"):
        return f"backend {_backend.forced()!r} is asked for"
    if (reason := _backend.unusable("cpu", device.type)) is not None:
        return reason
    if dtype != torch.float32:
        return f"{dtype} is left to torch.randn"
    if direct_device(device) is None or torch._C._len_torch_function_stack() > 0:
        return "a mode is active that may want to see the call of torch.randn"
    return _difference(_backend.native.isa())  # type: ignore[union-attr]


def _draw(out: Tensor, generator: torch.Generator) -> bool:
    """Fill ``out`` and move the generator on; False, with neither done, where other threads draw from it."""
    kernels = _backend.native.cpu  # type: ignore[union-attr]
    for _ in range(3):
        before = generator.get_state()
        after = before.clone()
        kernels.torch_normal(out, after.view(torch.int64))
        if kernels.exchange_state(generator, before, after):
            return True
    return False


@functools.cache
def _difference(isa: str) -> str | None:
    """In what the kernel differs from torch.randn here; None if a comparison finds nothing."""
    ours, theirs = torch.Generator(), torch.Generator()
    if ours.get_state().numel() != _STATE_BYTES:
        return f"the generator's state has {ours.get_state().numel()} bytes, expected {_STATE_BYTES}"
    for seed, n in enumerate((16, 17, 624, 1000, 20000)):
        for generator in (ours, theirs):
            torch.rand(seed, generator=generator.manual_seed(seed))  # not at the start of the engine's words
        out = torch.empty(n, dtype=torch.float32, device="cpu")
        expected = torch.randn(n, generator=theirs, dtype=torch.float32, device="cpu")
        if not _draw(out, ours) or not torch.equal(out.view(torch.int32), expected.view(torch.int32)):
            return f"torch.randn gives other numbers than the kernel, for seed {seed} and {n} elements"
        if not torch.equal(ours.get_state(), theirs.get_state()):
            return f"torch.randn leaves the generator otherwise, for seed {seed} and {n} elements"
    return None
