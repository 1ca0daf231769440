"""Sums over the processes of a group, with a check that they mean the same codebooks."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_numbers = itertools.count()
_tokens: weakref.WeakValueDictionary[str, Token] = weakref.WeakValueDictionary()


class Token:
    """What is known of one module in this process and not to be read from its tensors; of copies, nothing.

    Attributes:
        name: by which operators find it, which take no objects.
        agreed: whether its processes have compared the shapes of their codebooks.
        initialised: whether its codewords are known to be initialised.
    """

    def __init__(self) -> None:
        self.name = f"codebook {next(_numbers)}"
        self.agreed = False
        self.initialised = False
        _tokens[self.name] = self

    def __deepcopy__(self, memo: dict) -> Token:
        return Token()

    def __reduce__(self) -> tuple:
        return Token, ()


def find(name: str) -> Token:
    return _tokens[name]


def resolve(group: str | None) -> dist.ProcessGroup | None:
    """The group of this name; None for the default group."""
    return None if group is None else dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]


def world_size(group: str | None) -> int:
    """The number of processes in the group; 1 without torch.distributed."""
    return dist.get_world_size(resolve(group)) if dist.is_available() and dist.is_initialized() else 1


def rank(group: str | None) -> int:
    return dist.get_rank(resolve(group))


def gather(values: Sequence[int], device: torch.device, group: str | None) -> list[list[int]]:
    """The integers of every process, in the order of ranks. Reads them on the host."""
    own = torch.tensor(values, dtype=torch.int64, device=device)
    return torch.stack(all_gather(own, group)).tolist()


def check_agreement(
    properties: Mapping[str, int], device: torch.device, group: str | None, what: str
) -> None:
    """Raise ValueError, on every process, unless all have the same values.

    The first value tells how many others there are.
    """
    for names in (list(properties)[:1], list(properties)[1:]):
        compare(names, gather([properties[name] for name in names], device, group), what)


def compare(names: Iterable[str], everyone: Sequence[Sequence[int]], what: str) -> None:
    """Raise ValueError unless the processes, whose values by name these are, have the same."""
    for name, *values in zip(names, *everyone, strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"{what}: {name} is {', '.join(map(str, values))} on ranks 0 to {len(values) - 1}, "
                "expected the same on all"
            )


def all_gather(tensor: Tensor, group: str | None) -> list[Tensor]:
    """The tensors of all processes, of one shape, in the order of ranks."""
    tensor = tensor.contiguous()
    everyone = [torch.empty_like(tensor) for _ in range(world_size(group))]
    dist.all_gather(everyone, tensor, group=resolve(group))
    return everyone


def all_reduce(tensors: Sequence[Tensor], group: str | None) -> list[Tensor]:
    """The sums over the group, in one message."""
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(packed, group=resolve(group))
    return _unpacked(packed, tensors)


def _unpacked(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = packed.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


@torch.library.custom_op("genperf::sum_over_ranks", mutates_args=())
def _sum_over_ranks(
    packed: Tensor, token: str, group: str | None, names: str, values: Sequence[int]
) -> Tensor:
    known = _tokens[token]
    if not known.agreed:
        check_agreement(dict(zip(names.split(", "), values, strict=True)), packed.device, group, "codebooks")
        known.agreed = True
    packed = packed.clone()
    dist.all_reduce(packed, group=resolve(group))
    return packed


@_sum_over_ranks.register_fake
def _(packed: Tensor, token: str, group: str | None, names: str, values: Sequence[int]) -> Tensor:
    return torch.empty_like(packed)


def sum_over_ranks(
    tensors: Sequence[Tensor], token: Token, group: str | None, properties: Mapping[str, int]
) -> list[Tensor]:
    """:func:`all_reduce` for modules and torch.compile.

    At the first use of a token the processes compare ``properties``, and all raise ValueError where these
    differ: an all-reduce of other sizes would hang, or add what does not belong together.
    """
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    names = ", ".join(properties)
    return _unpacked(_sum_over_ranks(packed, token.name, group, names, list(properties.values())), tensors)
