"""Counts and sums of the residuals of every codeword of a residual vector quantizer, for its EMA update.

Definition: A. van den Oord et al., "Neural discrete representation learning", NeurIPS 2017
(arXiv:1711.00937), appendix A.1, for every stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import Operator
from genperf.ops import _residual_vector_quantize_reference as formulas
from genperf.ops._residual_vector_quantize_checks import (
    Codebooks,
    check_vectors,
    refuses,
    refuses_triton,
)

__all__ = ["ResidualCodebookStatistics", "residual_codebook_statistics"]


class ResidualCodebookStatistics(NamedTuple):
    """Results of :func:`residual_codebook_statistics`: tensors, or lists nested as the codebooks were."""

    counts: Any
    sums: Any


def _fake(
    x: Tensor, codebooks: Sequence[Tensor], indices: Tensor, differences: bool
) -> tuple[Tensor, Tensor]:
    rows = sum(len(c) for c in codebooks)
    return formulas.wide(x.new_empty(rows)), formulas.wide(x.new_empty(rows, x.shape[-1]))


statistics_op = Operator(
    "residual_codebook_statistics",
    "(Tensor x, Tensor[] codebooks, Tensor indices, bool differences) -> (Tensor counts, Tensor sums)",
    formulas.reference_statistics,
    _fake,
)


def _cpu(x: Tensor, codebooks: Sequence[Tensor], indices: Tensor, differences: bool) -> tuple[Tensor, Tensor]:
    counts, sums = results = _fake(x, codebooks, indices, differences)
    _backend.native.cpu.residual_codebook_statistics(  # type: ignore[union-attr]
        x, codebooks, indices.contiguous(), counts, sums, differences
    )
    return results


def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    from genperf.kernels.residual_codebook_statistics import residual_codebook_statistics

    return residual_codebook_statistics(*args)


statistics_op.implement("cpu", _cpu, refuses)
statistics_op.implement("triton", _triton, refuses_triton)


def residual_codebook_statistics(
    x: Tensor, codebooks: Codebooks, indices: Tensor, *, dim: int = -1
) -> ResidualCodebookStatistics:
    """How often each codeword of each stage was chosen, and the sum of the residuals that chose it.

    The residuals are computed again from ``x`` and the codewords chosen, as :func:`residual_vector_quantize`
    computes them; of all stages together they are never written. Sums are float32 in a fixed order, whatever
    the number of threads. No gradient.

    Backends: ``cpu`` (baseline, AVX2, AVX-512); ``triton``, for codebooks of one size, which sorts the
    indices of all stages at once; ``reference``.

    Args:
        x, codebooks, dim: as of :func:`residual_vector_quantize`; the codebooks as they were when the indices
            were chosen.
        indices: integers [*, stages], as that returns them; -1, where a stage was left out, counts nowhere.
            It must be below the number of codewords; larger ones are an error on the CPU.

    Returns:
        :class:`ResidualCodebookStatistics`: for codebooks [stages, K, D] or [groups, stages, K, D],
        ``counts`` without D and ``sums`` of that shape; for sequences, lists nested as they are, of [K] and
        [K, D].
        float32 (float64 for float64).

    Raises:
        TypeError: for a non-tensor or a dtype that is not as above.
        ValueError: for shapes, devices or numbers that do not fit; the message says which.
        RuntimeError: if a backend was forced that cannot run.
    """
    op = "residual_codebook_statistics"
    books, groups = check_vectors(op, x, codebooks, dim)
    per_group = len(books) // (groups or 1)
    _check_indices(op, x, indices, dim, per_group)
    vectors, chosen = x.detach().movedim(dim, -1), indices
    if groups is None:
        vectors, chosen = vectors[None], chosen[None]
    counts, sums = statistics_op(vectors, [c.detach() for c in books], chosen.long(), False)
    if isinstance(codebooks, Tensor):
        return ResidualCodebookStatistics(counts.view(codebooks.shape[:-1]), sums.view(codebooks.shape))
    sizes = [len(c) for c in books]
    parts = [list(y.split(sizes)) for y in (counts, sums)]
    if groups is not None:
        parts = [[y[g * per_group : (g + 1) * per_group] for g in range(groups)] for y in parts]
    return ResidualCodebookStatistics(*parts)


def _check_indices(op: str, x: Tensor, indices: Any, dim: int, per_group: int) -> None:
    if not isinstance(indices, Tensor):
        raise TypeError(f"{op}: indices is {type(indices).__name__}, expected a tensor")
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(f"{op}: indices is {indices.dtype}, expected integers")
    if indices.device != x.device:
        raise ValueError(f"{op}: indices is on {indices.device}, expected {x.device}, as x")
    shape = list(x.shape)
    del shape[dim]
    shape.append(per_group)
    if list(indices.shape) != shape:
        raise ValueError(f"{op}: indices has shape {tuple(indices.shape)}, expected {tuple(shape)}")
