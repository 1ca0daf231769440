"""The same noise in several runs of one model: a tape of the random draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# fmt: off
_DRAWS = frozenset([
    "rand", "rand_like", "randn", "randn_like", "normal", "normal_", "normal_functional",
    "uniform", "uniform_", "bernoulli", "bernoulli_", "exponential", "exponential_", "log_normal_", "cauchy_",
    "geometric_", "randint", "randint_like", "randperm", "random", "random_", "multinomial",
])
# fmt: on

_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class NoiseMismatch(RuntimeError):  # noqa: N818
    """A run drew other noise than the run that was recorded."""


class NoiseTape:
    """Records the random draws of one run and gives them, cast, to other runs.

    What is recorded is the result of each drawing operator of aten (``randn``, ``normal_``,
    ``bernoulli``, dropout's mask, ...), in order. A replay takes each draw from the tape in the dtype
    and on the device of the replaying run. A genperf op that would draw its noise in the kernel, from
    a key, is given the recorded numbers instead.

    Example::

        tape = NoiseTape()
        with tape.record():
            expected = model(x)
        with tape.replay():
            actual = copy.deepcopy(model).double()(x.double())
    """

    def __init__(self) -> None:
        self.draws: list[tuple[str, Tensor]] = []

    @contextmanager
    def record(self) -> Iterator[None]:
        """Within this context the draws of the current thread are recorded, on an emptied tape."""
        self.draws.clear()
        with _Recorder(self.draws):
            yield

    @contextmanager
    def replay(self, in_float64: bool = False) -> Iterator[None]:
        """Within this context draws come from the tape.

        Args:
            in_float64: the run is meant to be in float64: float64 is the default dtype, and what casts to
                a narrower floating dtype, or creates a tensor of one, gets float64.

        Raises:
            NoiseMismatch: a draw that the tape does not have next, or draws left over at the end.
        """
        player = _Player(self.draws, in_float64)
        default = torch.get_default_dtype()
        try:
            if in_float64:
                torch.set_default_dtype(torch.float64)
            with player:
                yield
        finally:
            torch.set_default_dtype(default)
        if player.next < len(self.draws):
            raise NoiseMismatch(
                f"{len(self.draws) - player.next} of {len(self.draws)} recorded draws were not made"
            )


def _name(func: Any) -> str:
    namespace, _, name = func._schema.name.partition("::")
    return name if namespace == "aten" else ""


class _Recorder(TorchDispatchMode):
    def __init__(self, draws: list[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.draws = draws

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = _name(func)
        if name in _DRAWS:
            self.draws.append((name, result.detach().clone()))
        elif name == "native_dropout":
            self.draws.append((name, result[1].detach().clone()))
        return result


class _Player(TorchDispatchMode):
    def __init__(self, draws: list[tuple[str, Tensor]], in_float64: bool) -> None:
        super().__init__()
        self.draws = draws
        self.in_float64 = in_float64
        self.next = 0
        self.noise_of_key: dict[int, tuple[Tensor, Tensor]] = {}  # by address; keys are kept alive

    def take(self, what: str, shape: torch.Size) -> Tensor:
        if self.next == len(self.draws):
            raise NoiseMismatch(f"{what} {tuple(shape)} drawn after the {len(self.draws)} recorded draws")
        name, draw = self.draws[self.next]
        if draw.shape != shape:
            raise NoiseMismatch(
                f"draw {self.next}: {what} {tuple(shape)}, where {name} {tuple(draw.shape)} was recorded"
            )
        self.next += 1
        return draw

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.in_float64 and kwargs.get("dtype") in _NARROW:
            kwargs = {**kwargs, "dtype": torch.float64}
        if func.namespace == "genperf":
            return self.run_with_noise(func, list(args))
        result = func(*args, **kwargs)
        name = _name(func)
        if name in _DRAWS:
            return result.copy_(self.take(name, result.shape))
        if name == "native_dropout":
            mask = self.take(name, result[1].shape)
            scale = 0.0 if args[1] == 1 else 1.0 / (1.0 - args[1])
            return args[0] * mask.to(args[0]) * scale, mask.to(result[1].device, copy=True)
        return result

    def take_as(self, what: str, shape: torch.Size) -> Tensor:
        """A draw that may have been made before dimensions were joined."""
        if self.next < len(self.draws) and self.draws[self.next][1].numel() == shape.numel():
            return self.take(what, self.draws[self.next][1].shape).reshape(shape)
        return self.take(what, shape)

    def take_channels_first(self, what: str, params: Tensor) -> Tensor:
        """Uniforms for params [B, P, *], which were drawn as [B, C, *] or as [B, *, C]."""
        drawn = self.draws[self.next][1].shape if self.next < len(self.draws) else torch.Size()
        last = drawn[1:-1] == params.shape[2:] and drawn[2:] != params.shape[2:]
        count = drawn[-1 if last else 1] if drawn else 0
        space = params.shape[2:]
        shape = (len(params), *space, count) if last else (len(params), count, *space)
        noise = self.take(what, torch.Size(shape)).to(params.device)
        return noise.movedim(-1, 1) if last else noise

    def run_with_noise(self, func: Any, args: list[Any]) -> Any:
        """Run a genperf op, with recorded noise in place of a key."""
        names = [argument.name for argument in func._schema.arguments]
        where = names.index("key") if "key" in names else len(args)
        key = args[where] if where < len(args) else None
        if key is None:
            return func(*args)
        if "of_mixture" in names:
            args[where] = None
            for name in ("of_mixture", "of_values"):
                i = names.index(name)
                args[i] = self.take_channels_first(func._schema.name, args[0])
            return func(*args)
        if "noise" not in names:
            result = func(*args)
            return result.copy_(self.take(func._schema.name, result.shape))
        address = key.data_ptr()
        if address not in self.noise_of_key:  # a forward pass, which takes the mean, or the logits
            like = args[names.index("mean" if "mean" in names else "logits")]
            noise = self.take_as(func._schema.name, like.shape).to(like)
            if self.draws[self.next - 1][0].startswith(
                "exponential"
            ):  # of which public code makes Gumbel noise
                noise = noise.log().neg()
            self.noise_of_key[address] = (noise, key)
        args[names.index("noise")], args[where] = self.noise_of_key[address][0], None
        return func(*args)
