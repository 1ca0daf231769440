"""The user's model from outside: called without a trace, and told apart from what it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from genperf import _backend
from genperf.sampling._errors import CaptureError

_COLUMNS = 509  # a prime, so that an exchange of channels, or of taps, moves values to other columns


class Adapted(nn.Module):
    """``model`` behind a change of its first argument; modules and parameters keep their names."""

    def __init__(self, model: nn.Module, adapt: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._inner = (model,)  # in a tuple, so that it is no submodule
        self._adapt = adapt

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._inner[0](self._adapt(x), *args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner[0].named_modules(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner[0].named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner[0].named_buffers(*args, **kwargs)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module itself, without ``torch.compile``, DataParallel or DistributedDataParallel around it."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, each once; several times faster than by their names."""
    seen = set()
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for tensor in own.values():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor


def device_of(model: nn.Module) -> torch.device:
    return next((t.device for t in tensors(model)), torch.device("cpu"))


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of the floats that the model takes and gives."""
    return next((t.dtype for t in tensors(model) if t.is_floating_point()), torch.get_default_dtype())


def check_mode(model: nn.Module) -> None:
    """Raise CaptureError where training mode changes what a module computes.

    A model in training mode that has no such module is fine. Dropout by a function is found when the
    forward is recorded.
    """
    for name, module in model.named_modules():
        if not module.training:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            what = "draws random numbers"
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            what = "looks at the whole batch"
        else:
            continue
        raise CaptureError(
            f"{name or 'the model'}: {type(module).__name__} in training mode {what}; call model.eval() first"
        )


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Undoes what a forward changes: parameters and buffers, attributes of modules, torch's random state.

    No gradients are recorded inside, and the caller's autocast and inference mode are off.
    """
    attributes = [
        (m, dict(m.__dict__), {k: copy.copy(v) for k, v in m.__dict__.items() if isinstance(v, (dict, list))})
        for m in model.modules()
    ]
    saved = [(t, t.detach().clone()) for t in tensors(model)]
    devices = {t.device.index or 0 for t in tensors(model) if t.is_cuda}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(sorted(devices)))
        for kind in {"cpu", *(t.device.type for t in tensors(model))}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))  # in which composite operations are not taken apart
        stack.enter_context(torch.no_grad())
        try:
            yield
        finally:
            for module, own, containers in attributes:
                module.__dict__.clear()
                module.__dict__.update(own)
                for name, before in containers.items():
                    container = own[name]
                    container.clear()
                    container.extend(before) if isinstance(container, list) else container.update(before)
            with torch.no_grad():
                for tensor, value in saved:
                    if not torch.equal(tensor, value):
                        tensor.data.copy_(value)


def fingerprint(model: nn.Module) -> Any:
    """Compares equal as long as no parameter or buffer was replaced, written to or moved.

    Writes through ``.data`` are seen too, by a checksum of the bits.
    """
    facts: list[Any] = []
    spans: list[tuple[int, int]] = []
    native = _backend.native
    for tensor in tensors(model):
        version = 0 if tensor.is_inference() else tensor._version
        address = tensor.data_ptr()
        facts.append((address, version, tensor.dtype, tensor.shape))
        if tensor.layout is not torch.strided:
            continue
        if native is not None and tensor.is_cpu and tensor.is_contiguous():
            spans.append((address, tensor.nbytes))
        else:
            facts.append(_sums(tensor))
    return facts, None if native is None else native.cpu.checksum(spans)


def _sums(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    octets = (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(torch.uint8)
    octets = octets.clone() if octets.storage_offset() % 8 else octets
    words = octets[: len(octets) // 8 * 8].view(torch.int64)
    whole = len(words) // _COLUMNS * _COLUMNS
    sums = [words[:whole].view(-1, _COLUMNS).sum(0), words[whole:], octets[len(words) * 8 :].long()]
    return torch.cat(sums).cpu().numpy().tobytes()


def first_tensor(output: Any) -> Tensor:
    """The tensor that a model's output begins with."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise CaptureError("the model's output has no tensor of floats")
