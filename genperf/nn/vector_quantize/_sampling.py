"""Random vectors of a batch for codewords, of fixed size and without a look at the host."""

from __future__ import annotations

import torch
from torch import Tensor

from genperf.ops.philox_random import philox_random

_PRIME = 2654435761  # above any number of codewords, so that its multiples visit all strata


def draw_positions(n_valid: Tensor, order: Tensor, n_wanted: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """A random one of the valid vectors for each codeword that wants one, none twice if there are enough.

    The vectors are cut into as many strata of equal length as can be, at most one for each codeword, and
    one is drawn of each; codewords that follow each other take distant strata.

    Args:
        n_valid: int64 [heads, 1], the number of vectors.
        order: int64 [heads, K], the codewords that want one, counted from 0; anything elsewhere.
        n_wanted: int64 [heads, 1], how many do.
        key: int64 [2], of :func:`genperf.ops.draw_key`.

    Returns:
        Positions among the valid vectors, int64 [heads, K]; and bool [heads, K], whether no other codeword
        has the vector. Which codewords go without, where vectors are too few, is random.
    """
    heads, n_codewords = order.shape
    random = philox_random((heads, n_codewords + 3), key, "bits")
    order = (order + random[:, :1]) % n_wanted.clamp(min=1)
    n_strata = n_valid.clamp(1, n_codewords)
    stratum = (order * _PRIME + random[:, 1:2]) % n_strata
    first, end = stratum * n_valid // n_strata, (stratum + 1) * n_valid // n_strata
    position = first + random[:, 3:] % (end - first).clamp(min=1)
    # The first stratum begins anywhere, as strata may differ by one in length.
    return (position + random[:, 2:3]) % n_valid.clamp(min=1), order < n_valid


def take_valid(x: Tensor, valid: Tensor, position: Tensor, dim: int) -> Tensor:
    """Vectors by their position among the valid ones, in row-major order.

    Args:
        x: [heads, *], not empty, with the vectors along dimension ``dim``; any strides, not copied.
        valid: bool [heads, *], the shape of x without ``dim``.
        position: int64 [heads, K]; where it is out of range, the vector is any.

    Returns:
        [heads, K, D].
    """
    seen = valid.flatten(1).cumsum(1)
    rows = torch.searchsorted(seen, position + 1).clamp(max=seen.shape[1] - 1)
    index = []
    for size in reversed(valid.shape[1:]):
        index.append(rows % size)
        rows = rows // size
    heads = torch.arange(x.shape[0], device=x.device)[:, None].expand_as(position)
    where = (heads, *reversed(index))
    return x.movedim(dim, -1)[where]
