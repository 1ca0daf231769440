"""The Triton Philox for given groups; a file of its own, since triton.jit reads the source."""

import torch
import triton
import triton.language as tl

from genperf.kernels._philox import normals_of_groups, philox_words
from genperf.kernels._tile import LAUNCH


@triton.jit
def _blocks_kernel(p_keys, p_groups, p_words, p_normals):
    i = tl.program_id(0)
    seed, offset, group = tl.load(p_keys + 2 * i), tl.load(p_keys + 2 * i + 1), tl.load(p_groups + i)
    i_group = group + tl.zeros((1,), tl.int64)
    w0, w1, w2, w3 = philox_words(seed, offset, i_group)
    j = tl.arange(0, 1)
    tl.store(p_words + 4 * i + j, w0.to(tl.int64))
    tl.store(p_words + 4 * i + 1 + j, w1.to(tl.int64))
    tl.store(p_words + 4 * i + 2 + j, w2.to(tl.int64))
    tl.store(p_words + 4 * i + 3 + j, w3.to(tl.int64))
    tl.store(p_normals + 4 * i + tl.arange(0, 4), normals_of_groups(seed, offset, i_group))


def blocks(keys: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The four words, int64 [N, 4], and normals, float32 [N, 4], of int64 keys [N, 2] and groups [N]."""
    words = torch.full((len(groups), 4), -1, device=groups.device)
    normals = torch.full((len(groups), 4), torch.nan, device=groups.device)
    _blocks_kernel[(len(groups),)](keys, groups, words, normals, **LAUNCH)
    return words, normals
