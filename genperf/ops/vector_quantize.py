"""Vector quantization with gradients: nearest codewords, gradient estimators, losses and usage.

Definitions: A. van den Oord et al., "Neural discrete representation learning", NeurIPS 2017
(arXiv:1711.00937), equations 1 to 3, with the straight-through estimator; C. Fifty et al., "Restructuring
vector quantization with the rotation trick", ICLR 2025 (arXiv:2410.06424), for the other one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import Operator
from genperf.ops import _vector_quantize_reference as formulas
from genperf.ops._vector_quantize_checks import check_options, check_rows
from genperf.ops._vector_quantize_reference import REDUCTIONS
from genperf.ops.vq_nearest import METRICS, NATIVE_DTYPES, check_operands, vq_nearest

__all__ = ["VectorQuantized", "vector_quantize"]


_METRIC_NAMES = {number: name for name, number in METRICS.items()}


class VectorQuantized(NamedTuple):
    """Results of :func:`vector_quantize`; those after ``loss`` are None unless asked for."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    counts: Tensor | None
    perplexity: Tensor | None
    commitment_loss: Tensor | None
    codebook_loss: Tensor | None


def _loss_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chosen(x: Tensor, codebook: Tensor, indices: Tensor | None, mask: Tensor | None, metric: int) -> Tensor:
    """The indices found or given, -1 where a vector is left out; contiguous."""
    n_codewords = codebook.shape[1]
    if indices is None:
        chosen = vq_nearest(x, codebook, _METRIC_NAMES[metric]).indices
    else:
        known = (indices >= 0) & (indices < n_codewords)
        if not x.is_cuda and not (known | (indices == -1)).all():  # no look at the device
            bad = indices[~known & (indices != -1)][0].item()
            raise ValueError(f"indices contains {bad}, expected -1 to {n_codewords - 1}")
        chosen = torch.where(known, indices, -1)
    if mask is not None:
        chosen = torch.where(mask, chosen, -1)
    return chosen.contiguous()


def _reference(
    x: Tensor, codebook: Tensor, indices: Tensor | None, mask: Tensor | None, metric: int, reduction: int,
    want_counts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    chosen = _chosen(x, codebook, indices, mask, metric)
    return (
        formulas.quantized(x, codebook, chosen),
        chosen,
        formulas.squares(x, codebook, chosen, reduction),
        formulas.counts(codebook, chosen) if want_counts else None,
    )


def _fake(
    x: Tensor, codebook: Tensor, indices: Tensor | None, mask: Tensor | None, metric: int, reduction: int,
    want_counts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    return (
        torch.empty_like(x),
        x.new_empty(x.shape[:-1], dtype=torch.int64),
        x.new_empty(formulas.loss_shape(x, reduction), dtype=_loss_dtype(x)),
        x.new_empty(codebook.shape[:2], dtype=torch.int64) if want_counts else None,
    )


def _reference_backward(
    grad: Tensor | None, of_commitment: Tensor | None, of_codebook: Tensor | None, x: Tensor,
    codebook: Tensor, indices: Tensor, reduction: int, rotation: bool, want_x: bool, want_codebook: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    grad_x, grad_codebook = formulas.backward(
        grad, of_commitment, of_codebook, x, codebook, indices, reduction, rotation, want_x, want_codebook
    )
    return (
        None if grad_x is None else torch.empty_like(x).copy_(grad_x),
        None if grad_codebook is None else grad_codebook.contiguous(),
    )


def _fake_backward(
    grad: Tensor | None, of_commitment: Tensor | None, of_codebook: Tensor | None, x: Tensor,
    codebook: Tensor, indices: Tensor, reduction: int, rotation: bool, want_x: bool, want_codebook: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    return (
        torch.empty_like(x) if want_x else None,
        codebook.new_empty(codebook.shape) if want_codebook else None,
    )


def _cpu(
    x: Tensor, codebook: Tensor, indices: Tensor | None, mask: Tensor | None, metric: int, reduction: int,
    want_counts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    out = _fake(x, codebook, indices, mask, metric, reduction, want_counts)
    mask = None if mask is None else mask.long()
    _backend.native.cpu.vector_quantize_forward(  # type: ignore[union-attr]
        x, codebook, indices, mask, *out, metric, reduction
    )
    return out


def _cpu_backward(
    grad: Tensor | None, of_commitment: Tensor | None, of_codebook: Tensor | None, x: Tensor,
    codebook: Tensor, indices: Tensor, reduction: int, rotation: bool, want_x: bool, want_codebook: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    tensors = (grad, of_commitment, of_codebook, x, codebook, indices)
    out = _fake_backward(*tensors, reduction, rotation, want_x, want_codebook)
    _backend.native.cpu.vector_quantize_backward(*tensors, *out, reduction, rotation)  # type: ignore[union-attr]
    return out


def _triton(
    x: Tensor, codebook: Tensor, indices: Tensor | None, mask: Tensor | None, metric: int, reduction: int,
    want_counts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    from genperf.kernels.vector_quantize import vector_quantize

    chosen = _chosen(x, codebook, indices, mask, metric)
    all_kept = indices is None and mask is None
    quantized, squares = vector_quantize(x, codebook, chosen, reduction, all_kept)
    return quantized, chosen, squares, formulas.counts(codebook, chosen) if want_counts else None


def _triton_backward(*args: Any) -> tuple[Tensor | None, Tensor | None]:
    from genperf.kernels.vector_quantize import vector_quantize_backward

    return vector_quantize_backward(*args)


def _refuses(x: Tensor, codebook: Tensor, *_: Any) -> str | None:
    if x.dtype not in NATIVE_DTYPES:
        return f"{x.dtype} is left to the reference"
    if x.dim() > 8:
        return f"{x.dim()} dimensions, at most 8"
    return None if codebook.shape[1] < 2**31 else f"{codebook.shape[1]} codewords, below 2^31"


_forward_op = Operator(
    "vector_quantize",
    "(Tensor x, Tensor codebook, Tensor? indices, Tensor? mask, int metric, int reduction, bool want_counts)"
    " -> (Tensor quantized, Tensor indices, Tensor squares, Tensor counts)",
    _reference,
    _fake,
)
_backward_op = Operator(
    "vector_quantize_backward",
    "(Tensor? grad, Tensor? of_commitment, Tensor? of_codebook, Tensor x, Tensor codebook, Tensor indices,"
    " int reduction, bool rotation, bool want_x, bool want_codebook)"
    " -> (Tensor grad_x, Tensor grad_codebook)",
    _reference_backward,
    _fake_backward,
)

_forward_op.implement("cpu", _cpu, _refuses)
_backward_op.implement("cpu", _cpu_backward, lambda *args: _refuses(*args[3:5]))
_forward_op.implement("triton", _triton, _refuses)
_backward_op.implement("triton", _triton_backward, lambda *args: _refuses(*args[3:5]))


def _scaled(grad: Tensor | None, weight: float, other: Tensor | None) -> Tensor | None:
    """grad * weight + other, of which each may be none."""
    if grad is None or weight == 0:
        return other
    return grad * weight if other is None else grad * weight + other


class _VectorQuantize(torch.autograd.Function):
    """Saves the inputs and the indices alone; the backward pass gathers the codewords again."""

    @staticmethod
    def forward(ctx, x, codebook, indices, mask, settings, weights, rotation, return_losses):
        quantized, chosen, squares, counts = _forward_op(x, codebook, indices, mask, *settings)
        ctx.save_for_backward(x, codebook, chosen)
        ctx.weights, ctx.reduction, ctx.rotation = weights, settings[1], rotation
        ctx.set_materialize_grads(False)
        counts = chosen.new_empty(0) if counts is None else counts
        ctx.mark_non_differentiable(chosen, counts)
        terms = (squares, squares.clone()) if return_losses else (None, None)
        return quantized, chosen, squares * sum(weights), counts, *terms

    @staticmethod
    def backward(ctx, *grads):
        grad, _, grad_loss, _, grad_commitment, grad_codebook = grads
        want_x, want_codebook = ctx.needs_input_grad[:2]
        grads = (
            grad,
            _scaled(grad_loss, ctx.weights[0], grad_commitment),
            _scaled(grad_loss, ctx.weights[1], grad_codebook),
        )
        # Where nothing depends on the codebook its gradient is none.
        want_codebook = want_codebook and grads[2] is not None
        want_x = want_x and (grad is not None or grads[1] is not None)
        of_x = of_codebook = None
        if want_x or want_codebook:
            # With create_graph=True the formulas themselves are differentiated.
            run: Callable[..., Any] = formulas.backward if torch.is_grad_enabled() else _backward_op
            of_x, of_codebook = run(
                *grads, *ctx.saved_tensors, ctx.reduction, ctx.rotation, want_x, want_codebook
            )
        return of_x if want_x else None, of_codebook if want_codebook else None, *(None,) * 6


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    metric: str = "l2",
    *,
    dim: int = -1,
    indices: Tensor | None = None,
    mask: Tensor | None = None,
    estimator: str = "straight_through",
    commitment_weight: float = 1.0,
    codebook_weight: float = 0.0,
    reduction: str = "mean",
    return_losses: bool = False,
    return_usage: bool = False,
) -> VectorQuantized:
    """The nearest codeword of each vector, with a gradient for the encoder and the losses of training.

    The indices are those of :func:`vq_nearest`, exact. ``quantized`` holds the codewords as they are, not
    ``x + (q - x)``, which rounds; where ``x`` is not finite it is NaN. Its gradient goes to ``x`` alone:
    unchanged ("straight_through"), or turned and scaled as the rotation that takes ``x`` to its codeword
    ("rotation"). The loss is

        commitment_weight * mean((sg[q] - x)^2) + codebook_weight * mean((q - sg[x])^2)

    where sg stops the gradient and the mean is over all elements (0 for none). How public code spells it:

    - EMA codebooks (vector-quantize-pytorch, rosinality, EnCodec): ``codebook_weight=0``;
    - VQ-VAE, VQGAN with ``legacy=False``, diffusers with ``legacy=False``: ``commitment_weight=beta``,
      ``codebook_weight=1``;
    - taming-transformers and diffusers with ``legacy=True``, their default, whose beta weighs the other term:
      ``commitment_weight=1``, ``codebook_weight=beta``;
    - descript-audio-codec: ``metric="cosine"``, ``reduction="sample"``, ``return_losses=True``.

    Products, sums and losses are computed in float32 for half-precision inputs, in an order that follows from
    the shapes alone: the same bits for any number of threads. The gradient of the codebook is summed as
    :func:`codebook_statistics` sums; nothing of the size [N, K] is made.

    Backends: ``cpu`` (baseline, AVX2, AVX-512), one native call forward and one backward;
    ``triton``, a kernel each for the gather with the losses, for the gradient of ``x``, and two for that of
    the codebook; ``reference``. The last two search on the backend of :func:`vq_nearest`. There is no CUDA
    C++ kernel: nothing here is beyond Triton.

    Args:
        x: [*, D], or with D along ``dim``; float32, float16, bfloat16 or float64.
        codebook: [K, D], or [heads, K, D] with the heads along dimension 0 of ``x``. Of the dtype of ``x``.
        metric, dim: as of :func:`vq_nearest`.
        indices: integers of the shape of ``x`` without ``dim``, from 0 to K - 1: the codewords to take, with
            no search; -1 leaves a vector out, as ``mask`` does.
        mask: bool, of the shape of ``x`` without ``dim``. Where it is False the vector is left out: its
            ``quantized`` is 0, its index -1, and it counts in no loss and no usage.
        estimator: "straight_through" or "rotation".
        commitment_weight, codebook_weight: finite numbers >= 0.
        reduction: what the losses are means over: all elements ("mean"), those of a sample along dimension 0
            ("sample"; dimension 1 with heads), or those of a vector ("none").
        return_losses: whether to return the two terms too, without their weights.
        return_usage: whether to count how often each codeword was chosen.

    Returns:
        :class:`VectorQuantized`: ``quantized``, of the shape, dtype and layout of ``x``; ``indices``, int64,
        the shape of ``x`` without ``dim``; ``loss``, float32 (float64 for float64), a scalar, [B] ([heads, B]
        with heads), or of the shape of ``indices``, by ``reduction``; with ``return_usage``, ``counts``,
        int64 [K] or [heads, K], and ``perplexity``, float32 [] or [heads], the exponential of the entropy of
        the counts (1 where there are none); and with ``return_losses``, ``commitment_loss`` and
        ``codebook_loss``, of the shape of ``loss``: one value with a gradient to ``x`` and one to the
        codebook.

    Raises:
        TypeError: for a non-tensor or a dtype that is not as above.
        ValueError: for shapes, devices, names or numbers that do not fit, and on the CPU for an index that is
            none (on a GPU, which is not looked at, it is taken for -1); the message says which.
        RuntimeError: if a backend was forced that cannot run.
    """
    check_options(
        estimator, commitment_weight, codebook_weight, reduction,
        return_losses=return_losses, return_usage=return_usage,
    )  # fmt: skip
    check_operands("vector_quantize", x, codebook, metric, dim)
    heads = codebook.dim() == 3
    check_rows(x, dim, heads, reduction, indices, mask)
    vectors = x.movedim(dim, -1)
    if indices is not None:
        indices = indices.long()
    if not heads:
        vectors, codebook = vectors[None], codebook[None]
        indices, mask = (None if rows is None else rows[None] for rows in (indices, mask))
    settings = METRICS[metric], REDUCTIONS[reduction], return_usage
    weights = float(commitment_weight), float(codebook_weight)
    try:
        quantized, chosen, loss, counts, commitment, of_codebook = _VectorQuantize.apply(
            vectors, codebook, indices, mask, settings, weights, estimator == "rotation", return_losses
        )
    except ValueError as error:
        raise ValueError(f"vector_quantize: {error}") from None
    perplexity = _perplexity(counts) if return_usage else None
    if not heads:
        quantized, chosen = quantized[0], chosen[0]
        if reduction != "mean":
            loss, commitment, of_codebook = (
                None if y is None else y[0] for y in (loss, commitment, of_codebook)
            )
        if perplexity is not None:
            counts, perplexity = counts[0], perplexity[0]
    return VectorQuantized(
        quantized.movedim(-1, dim),
        chosen,
        loss,
        counts if return_usage else None,
        perplexity,
        commitment if return_losses else None,
        of_codebook if return_losses else None,
    )


def _perplexity(counts: Tensor) -> Tensor:
    """Of counts [heads, K]: [heads]."""
    share = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    return torch.special.entr(share).sum(1).exp().float()
