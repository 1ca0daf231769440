"""Vector quantization with gradients: nearest codewords, gradient estimators, losses and usage.

Definitions: A. van den Oord et al., "Neural discrete representation learning", NeurIPS 2017
(arXiv:1711.00937), equations 1 to 3, with the straight-through estimator; C. Fifty et al., "Restructuring
vector quantization with the rotation trick", ICLR 2025 (arXiv:2410.06424), for the other one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genperf._op import Operator
from genperf.ops.vq_nearest import vq_nearest

__all__ = ["VectorQuantized", "vector_quantize"]

ESTIMATORS = ("straight_through", "rotation")


class VectorQuantized(NamedTuple):
    """Results of :func:`vector_quantize`; the last two are None unless asked for."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    counts: Tensor | None
    perplexity: Tensor | None


def _rows(indices: Tensor, codebook: Tensor) -> Tensor:
    """Rows of the codebook [heads, K, D] seen as one of heads K: [heads, *]."""
    heads, n_codewords = codebook.shape[:2]
    offset = torch.arange(heads, device=indices.device) * n_codewords
    return indices + offset.view(-1, *[1] * (indices.dim() - 1))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x over its length along the last dimension (0 for 0), and the length."""
    length = x.norm(dim=-1, keepdim=True)
    return x / torch.where(length == 0, 1.0, length), length


def _rotated_back(grad: Tensor, x: Tensor, q: Tensor) -> Tensor:
    """The gradient by x of (|q| / |x|) R x, constants but for x, where the rotation R turns x to q."""
    x_unit, x_length = _unit(x)
    q_unit, q_length = _unit(q)
    middle, _ = _unit(x_unit + q_unit)
    turned = grad - 2 * middle * (middle * grad).sum(-1, keepdim=True)
    turned = turned + 2 * x_unit * (q_unit * grad).sum(-1, keepdim=True)
    return turned * (q_length / torch.where(x_length == 0, 1.0, x_length))


def _reference(
    x: Tensor, codebook: Tensor, indices: Tensor, commitment_weight: float, codebook_weight: float
) -> tuple[Tensor, Tensor]:
    q = codebook.flatten(0, 1)[_rows(indices, codebook)]
    weight = (commitment_weight + codebook_weight) / max(1, x.numel())
    loss = (_wide(x) - _wide(q)).square().sum() * weight
    return (q + 0 * x).contiguous(), loss  # the product is NaN where x is not finite


def _fake(
    x: Tensor, codebook: Tensor, indices: Tensor, commitment_weight: float, codebook_weight: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _wide(x.new_empty(()))


def _reference_backward(
    grad: Tensor, grad_loss: Tensor, x: Tensor, codebook: Tensor, indices: Tensor,
    commitment_weight: float, codebook_weight: float, rotation: bool, want_x: bool, want_codebook: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    rows, factor = _rows(indices, codebook), 2 / max(1, x.numel())
    wide_x, q = _wide(x), _wide(codebook.flatten(0, 1)[rows])
    of_x = of_codebook = None
    if want_x:
        of_x = _rotated_back(_wide(grad), wide_x, q) if rotation else _wide(grad)
        of_x = (of_x + grad_loss * (commitment_weight * factor) * (wide_x - q)).to(x.dtype).contiguous()
    if want_codebook:
        by_row = (grad_loss * (codebook_weight * factor) * (q - wide_x)).flatten(0, -2)
        zeros = torch.zeros_like(_wide(codebook.flatten(0, 1)))
        if x.is_cuda:  # where it sorts, and index_add adds in any order
            of_codebook = zeros.index_put((rows.flatten(),), by_row, accumulate=True)
        else:
            of_codebook = zeros.index_add(0, rows.flatten(), by_row)
        of_codebook = of_codebook.view(codebook.shape).to(codebook.dtype).contiguous()
    return of_x, of_codebook


def _fake_backward(
    grad: Tensor, grad_loss: Tensor, x: Tensor, codebook: Tensor, indices: Tensor,
    commitment_weight: float, codebook_weight: float, rotation: bool, want_x: bool, want_codebook: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    return (
        x.new_empty(x.shape) if want_x else None,
        codebook.new_empty(codebook.shape) if want_codebook else None,
    )


_forward_op = Operator(
    "vector_quantize",
    "(Tensor x, Tensor codebook, Tensor indices, float commitment_weight, float codebook_weight)"
    " -> (Tensor quantized, Tensor loss)",
    _reference,
    _fake,
)
_backward_op = Operator(
    "vector_quantize_backward",
    "(Tensor grad, Tensor grad_loss, Tensor x, Tensor codebook, Tensor indices, float commitment_weight,"
    " float codebook_weight, bool rotation, bool want_x, bool want_codebook)"
    " -> (Tensor grad_x, Tensor grad_codebook)",
    _reference_backward,
    _fake_backward,
)


class _VectorQuantize(torch.autograd.Function):
    """Saves the inputs and the indices alone; the backward pass gathers the codewords again."""

    @staticmethod
    def forward(ctx, x, codebook, indices, commitment_weight, codebook_weight, rotation):
        ctx.save_for_backward(x, codebook, indices)
        ctx.settings = commitment_weight, codebook_weight, rotation
        return _forward_op(x, codebook, indices, commitment_weight, codebook_weight)

    @staticmethod
    def backward(ctx, grad, grad_loss):
        # With create_graph=True the formulas themselves are differentiated.
        run = _reference_backward if torch.is_grad_enabled() else _backward_op
        wanted = ctx.needs_input_grad[:2]
        of_x, of_codebook = run(grad, grad_loss, *ctx.saved_tensors, *ctx.settings, *wanted)
        return of_x if wanted[0] else None, of_codebook if wanted[1] else None, None, None, None, None


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    metric: str = "l2",
    *,
    dim: int = -1,
    estimator: str = "straight_through",
    commitment_weight: float = 1.0,
    codebook_weight: float = 0.0,
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
      ``commitment_weight=1``, ``codebook_weight=beta``.

    Products, sums and losses are computed in float32 for half-precision inputs. Runs on the backends of
    :func:`vq_nearest`; the gather, the loss and the gradients are torch operations.

    Args:
        x: [*, D], or with D along ``dim``; float32, float16, bfloat16 or float64.
        codebook: [K, D], or [heads, K, D] with the heads along dimension 0 of ``x``. Of the dtype of ``x``.
        metric, dim: as of :func:`vq_nearest`.
        estimator: "straight_through" or "rotation".
        commitment_weight, codebook_weight: finite numbers >= 0.
        return_usage: whether to count how often each codeword was chosen.

    Returns:
        :class:`VectorQuantized`: ``quantized``, shape and dtype of ``x``; ``indices``, int64, the shape of
        ``x`` without ``dim``; ``loss``, a float32 scalar (float64 for float64); and, with ``return_usage``,
        ``counts``, int64 [K] or [heads, K], and ``perplexity``, float32 [] or [heads], the exponential of the
        entropy of the counts (1 where there are none).

    Raises:
        TypeError: for a non-tensor or a dtype that is not as above.
        ValueError: for shapes, devices, names or numbers that do not fit; the message says which.
        RuntimeError: if a backend was forced that cannot run.
    """
    _check(estimator, commitment_weight, codebook_weight)
    indices = vq_nearest(x, codebook, metric, dim=dim).indices
    heads = codebook.dim() == 3
    vectors, words, chosen = x.movedim(dim, -1), codebook, indices
    if not heads:
        vectors, words, chosen = vectors[None], words[None], chosen[None]
    quantized, loss = _VectorQuantize.apply(
        vectors, words, chosen, float(commitment_weight), float(codebook_weight), estimator == "rotation"
    )
    quantized = (quantized if heads else quantized[0]).movedim(-1, dim)
    if x.is_contiguous():
        quantized = quantized.contiguous()
    counts, perplexity = _usage(chosen, words) if return_usage else (None, None)
    if counts is not None and perplexity is not None and not heads:
        counts, perplexity = counts[0], perplexity[0]
    return VectorQuantized(quantized, indices, loss, counts, perplexity)


def _usage(indices: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """How often each codeword was chosen, [heads, K], and the perplexity, [heads]."""
    rows = _rows(indices, codebook).flatten()
    counts = torch.zeros(codebook.shape[0] * codebook.shape[1], dtype=torch.int64, device=rows.device)
    counts = counts.scatter_add(0, rows, torch.ones_like(rows)).view(codebook.shape[:2])
    share = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    return counts, torch.special.entr(share).sum(1).exp().float()


def _check(estimator: Any, commitment_weight: Any, codebook_weight: Any) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"vector_quantize: estimator is {estimator!r}, expected one of {', '.join(ESTIMATORS)}"
        )
    for name, weight in (("commitment_weight", commitment_weight), ("codebook_weight", codebook_weight)):
        if not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
            raise ValueError(f"vector_quantize: {name} is {weight!r}, expected a finite number >= 0")
