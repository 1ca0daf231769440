"""Residual vector quantization: every stage quantizes what the stages before it have left.

Definition: N. Zeghidour et al., "SoundStream: an end-to-end neural audio codec", IEEE/ACM TASLP 2022
(arXiv:2107.03312), algorithm 1; in groups, D. Yang et al., "HiFi-Codec: group-residual vector quantization
for high fidelity audio codec", 2023 (arXiv:2305.02765).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import Operator
from genperf.ops import _residual_vector_quantize_reference as formulas
from genperf.ops._residual_vector_quantize_checks import Codebooks, check, refuses, refuses_triton
from genperf.ops.residual_codebook_statistics import statistics_op
from genperf.ops.vq_nearest import METRICS

__all__ = ["ResidualVectorQuantized", "residual_vector_quantize"]


class ResidualVectorQuantized(NamedTuple):
    """Results of :func:`residual_vector_quantize`."""

    quantized: Tensor
    indices: Tensor
    losses: Tensor


def _fake(
    x: Tensor, codebooks: Sequence[Tensor], limits: Tensor | None, n_stages: int, metric: int
) -> tuple[Tensor, Tensor, Tensor]:
    per_group = len(codebooks) // x.shape[0]
    return (
        torch.empty_like(x),
        x.new_empty((*x.shape[:-1], per_group), dtype=torch.int64),
        formulas.wide(x.new_empty(x.shape[0], per_group)),
    )


def _fake_backward(grad: Tensor, coefficients: Tensor, x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


_forward_op = Operator(
    "residual_vector_quantize",
    "(Tensor x, Tensor[] codebooks, Tensor? limits, int n_stages, int metric)"
    " -> (Tensor quantized, Tensor indices, Tensor squares)",
    formulas.reference,
    _fake,
)
_backward_op = Operator(
    "residual_vector_quantize_backward",
    "(Tensor grad, Tensor coefficients, Tensor x, Tensor[] codebooks, Tensor indices, bool rotation,"
    " bool of_sum, float fraction) -> Tensor",
    formulas.reference_backward,
    _fake_backward,
)


def _cpu(
    x: Tensor, codebooks: Sequence[Tensor], limits: Tensor | None, n_stages: int, metric: int
) -> tuple[Tensor, Tensor, Tensor]:
    quantized, indices, squares = results = _fake(x, codebooks, limits, n_stages, metric)
    _backend.native.cpu.residual_vector_quantize(  # type: ignore[union-attr]
        x, codebooks, limits, quantized, indices, squares, n_stages, metric
    )
    return results


def _cpu_backward(
    grad: Tensor, coefficients: Tensor, x: Tensor, codebooks: Sequence[Tensor], indices: Tensor,
    rotation: bool, of_sum: bool, fraction: float,
) -> Tensor:  # fmt: skip
    grad_x = torch.empty_like(x)
    _backend.native.cpu.residual_vector_quantize_backward(  # type: ignore[union-attr]
        grad, coefficients.contiguous(), x, codebooks, indices, grad_x, rotation, of_sum, fraction
    )
    return grad_x


def _triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from genperf.kernels.residual_vector_quantize import residual_vector_quantize

    return residual_vector_quantize(*args)


def _triton_backward(*args: Any) -> Tensor:
    from genperf.kernels.residual_vector_quantize import residual_vector_quantize_backward

    return residual_vector_quantize_backward(*args)


def _refuses_triton_backward(
    grad: Tensor, coefficients: Tensor, x: Tensor, codebooks: Sequence[Tensor], indices: Tensor,
    rotation: bool, of_sum: bool, fraction: float,
) -> str | None:  # fmt: skip
    if rotation and fraction > 0:
        return "a rotation with a residual gradient is left to the reference"
    if x.shape[-1] > 8192:
        return f"vectors of {x.shape[-1]} elements, at most 8192"
    return refuses_triton(x, codebooks)


_forward_op.implement("cpu", _cpu, refuses)
_forward_op.implement("triton", _triton, refuses_triton)
_backward_op.implement("cpu", _cpu_backward, lambda *args: refuses(*args[2:]))
_backward_op.implement("triton", _triton_backward, _refuses_triton_backward)


class _Settings(NamedTuple):
    n_stages: int
    metric: int
    rotation: bool
    of_sum: bool
    fraction: float
    commitment_weight: float
    codebook_weight: float


def _forward(
    x: Tensor, limits: Tensor | None, divisor: Tensor | int, settings: _Settings, codebooks: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    quantized, indices, squares = _forward_op(x, list(codebooks), limits, settings.n_stages, settings.metric)
    losses = squares * ((settings.commitment_weight + settings.codebook_weight) / divisor)
    return quantized, indices, losses


class _ResidualVectorQuantize(torch.autograd.Function):
    """Saves the inputs and the indices alone; the backward pass goes through the stages again."""

    @staticmethod
    def forward(ctx, x, limits, divisor, settings, *codebooks):
        quantized, indices, losses = _forward(x, limits, divisor, settings, codebooks)
        ctx.save_for_backward(x, indices, *codebooks)
        ctx.divisor, ctx.settings = divisor, settings
        ctx.mark_non_differentiable(indices)
        return quantized, indices, losses

    @staticmethod
    def backward(ctx, grad, _, grad_losses):
        x, indices, *codebooks = ctx.saved_tensors
        s = ctx.settings
        of_x, of_codebooks = None, [None] * len(codebooks)
        again = torch.is_grad_enabled()  # with create_graph=True the formulas themselves are differentiated
        scale = grad_losses * (2 / ctx.divisor)
        if ctx.needs_input_grad[0]:
            run = formulas.reference_backward if again else _backward_op
            coefficients = scale * s.commitment_weight
            of_x = run(grad, coefficients, x, codebooks, indices, s.rotation, s.of_sum, s.fraction)
        if s.codebook_weight > 0 and any(ctx.needs_input_grad[4:]):
            sums_of = formulas.reference_statistics if again else statistics_op
            _, sums = sums_of(x, codebooks, indices, True)
            coefficients = (scale * -s.codebook_weight).flatten()
            parts = sums.split([len(c) for c in codebooks])
            of_codebooks = [
                (part * coefficient).to(x.dtype) if wanted else None
                for part, coefficient, wanted in zip(
                    parts, coefficients, ctx.needs_input_grad[4:], strict=True
                )
            ]
        return of_x, None, None, None, *of_codebooks


def residual_vector_quantize(
    x: Tensor,
    codebooks: Codebooks,
    metric: str = "l2",
    *,
    dim: int = -1,
    n_stages: int | Tensor | None = None,
    mask: Tensor | None = None,
    estimator: str = "straight_through",
    estimator_of: str = "stages",
    residual_gradient: float = 0.0,
    commitment_weight: float = 1.0,
    codebook_weight: float = 0.0,
) -> ResidualVectorQuantized:
    """The sum of codewords, one from each codebook, that residual vector quantization makes of each vector.

    Stage i takes the nearest codeword ``c_i`` of the residual ``r_i``, where ``r_0 = x``, and leaves

        r_{i+1} = r_i - c_i,

    rounded to the dtype of ``x`` (for half precision, from float32), as the libraries compute it. Indices are
    exact, in the sense of :func:`vq_nearest`, for the residual so defined. ``quantized`` is ``c_0 + c_1 +
    ...``, summed in this order in float32 and rounded to the dtype of ``x``; where ``x`` is not finite it is
    NaN. The loss of stage i is

        commitment_weight * mean((sg[c_i] - r_i)^2) + codebook_weight * mean((c_i - sg[r_i])^2)

    where sg stops the gradient, and the mean is over all elements of all vectors, those that do not reach the
    stage counting as 0, as in DAC; of ``mask``'s vectors alone, where there is one; 0 for none.

    The gradient: each ``c_i`` in the sum passes its own to ``r_i``, unchanged ("straight_through") or turned
    and scaled as the rotation that takes ``r_i`` to it ("rotation"), and ``r_i`` passes it on to ``x``, as
    losses do. How public code spells it:

    - vector-quantize-pytorch: ``estimator_of="stages"``, ``residual_gradient=quant_grad_frac`` (0): all
      stages' gradients add up, so that straight-through gives ``x`` as many times the gradient of
      ``quantized`` as there are stages;
    - EnCodec: ``estimator_of="stages"``, ``residual_gradient=1``: as ``c_i`` is ``r_i`` plus a constant,
      ``r_{i+1}`` is a constant, and stages after the first have no commitment gradient;
    - audiocraft and Moshi: ``estimator_of="sum"``: the gradient of ``quantized`` goes to ``x`` once, and
      every stage has its commitment gradient.

    Backends: ``cpu`` (baseline, AVX2, AVX-512), where blocks of vectors go through all stages in cache;
    few vectors, such as a frame of a stream, without packed codebooks. ``triton``, for codebooks of one size:
    few vectors by "l2" in one launch, others with the launches of :func:`vq_nearest` for each stage.
    ``reference``, which calls :func:`vq_nearest` stage by stage.

    Args:
        x: [*, D], or with D along ``dim``; with groups [groups, *, D]. Any strides. float32, float16,
            bfloat16 or float64.
        codebooks: [stages, K, D], or [groups, stages, K, D] with the groups along dimension 0 of ``x``; or a
            sequence of the stages' codebooks [K, D], of which K may differ, or for groups a sequence of such
            sequences of one length. Of the dtype of ``x``.
        metric, dim: as of :func:`vq_nearest`.
        n_stages: how many stages to go through, 0 to all; or integers of the shape of the leading dimensions
            of ``x`` (after that of the groups), such as [B], for each sample: below 0 counts as 0, above all
            as all. None: all. Stages that are left out add nothing and have index -1.
        mask: bool, of the shape of ``x`` without ``dim`` and groups; False leaves out all stages of a vector:
            its ``quantized`` is 0, and it does not count in losses.
        estimator: "straight_through" or "rotation".
        estimator_of: "stages", or "sum": of ``quantized`` as a whole.
        residual_gradient: which fraction of its gradient ``r_{i+1} = r_i - c_i`` passes on to ``c_i``, 0 to
            1; 0 for "sum".
        commitment_weight, codebook_weight: finite numbers >= 0.

    Returns:
        :class:`ResidualVectorQuantized`: ``quantized``, of the shape, dtype and layout of ``x``; ``indices``,
        int64 [*, stages], the shape of ``x`` without ``dim`` and with the stages last; and ``losses``,
        [stages] or [groups, stages], float32 (float64 for float64).

    Raises:
        TypeError: for a non-tensor or a dtype that is not as above.
        ValueError: for shapes, devices, names or numbers that do not fit; the message says which.
        RuntimeError: if a backend was forced that cannot run.
    """
    books, groups = check(
        x, codebooks, metric, dim, n_stages, mask, estimator, estimator_of, residual_gradient,
        commitment_weight, codebook_weight,
    )  # fmt: skip
    vectors = x.movedim(dim, -1)
    if groups is None:
        vectors = vectors[None]
    per_group = len(books) // vectors.shape[0]
    limits, divisor = _limits(vectors, n_stages, mask, per_group)
    settings = _Settings(
        per_group if n_stages is None or isinstance(n_stages, Tensor) else n_stages, METRICS[metric],
        estimator == "rotation", estimator_of == "sum", float(residual_gradient),
        float(commitment_weight), float(codebook_weight),
    )  # fmt: skip
    if torch.is_grad_enabled() and (x.requires_grad or any(c.requires_grad for c in books)):
        results = _ResidualVectorQuantize.apply(vectors, limits, divisor, settings, *books)
    else:
        results = _forward(vectors, limits, divisor, settings, books)
    quantized, indices, losses = results if groups is not None else [y[0] for y in results]
    return ResidualVectorQuantized(quantized.movedim(-1, dim), indices, losses)


def _limits(
    x: Tensor, n_stages: int | Tensor | None, mask: Tensor | None, per_group: int
) -> tuple[Tensor | None, Tensor | int]:
    """The number of stages of each vector, [*], and of elements in a loss; x is [groups, *, D]."""
    shape, dim = x.shape[1:-1], x.shape[-1]
    limits = None
    if isinstance(n_stages, Tensor):
        limits = n_stages.long().view(*n_stages.shape, *[1] * (len(shape) - n_stages.dim())).expand(shape)
    if mask is None:
        return None if limits is None else limits.contiguous(), max(1, shape.numel() * dim)
    limits = torch.where(mask, per_group if limits is None else limits, 0)
    return limits.contiguous(), (mask.sum() * dim).clamp(min=1)
