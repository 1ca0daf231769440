"""Vector quantization by a draw from logits: the Gumbel-softmax relaxation.

Definitions: E. Jang, S. Gu and B. Poole, "Categorical reparameterization with Gumbel-softmax", ICLR 2017
(arXiv:1611.01144); A. Ramesh et al., "Zero-shot text-to-image generation" (arXiv:2102.12092, DALL-E), with
the divergence from the uniform prior; ``GumbelQuantize`` of taming-transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import Operator
from genperf.ops._gumbel_quantize_reference import gathered, reference, reference_backward, wide
from genperf.ops._noise import check_noise, torch_gumbel
from genperf.ops.codebook_statistics import codebook_statistics
from genperf.ops.philox_random import FLOATS

__all__ = ["GumbelQuantized", "gumbel_quantize"]

_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_GRID = 65535  # of the second and third dimension of a launch


class GumbelQuantized(NamedTuple):
    """Results of :func:`gumbel_quantize`; ``kl`` is None unless asked for."""

    quantized: Tensor
    indices: Tensor
    kl: Tensor | None


def _outputs(
    logits: Tensor, codebook: Tensor, noise: Tensor | None, key: Tensor | None,
    temperature: float, hard: bool, want_kl: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    batch, _, positions = logits.shape
    return (
        codebook.new_empty(batch, codebook.shape[1], positions),
        logits.new_empty(batch, positions, dtype=torch.int64),
        wide(logits.new_empty(batch, positions)) if want_kl else None,
    )


def _gradients(
    grad: Tensor | None, grad_kl: Tensor | None, logits: Tensor, codebook: Tensor,
    noise: Tensor | None, key: Tensor | None, indices: Tensor,
    temperature: float, hard: bool, want_logits: bool, want_codebook: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    return (
        logits.new_empty(logits.shape) if want_logits else None,
        codebook.new_empty(codebook.shape) if want_codebook else None,
    )


def _cpu(logits, codebook, noise, key, temperature, hard, want_kl):
    quantized, indices, kl = _outputs(logits, codebook, noise, key, temperature, hard, want_kl)
    mix = None if hard else quantized if quantized.dtype == torch.float32 else quantized.float()
    _backend.native.cpu.gumbel_quantize_forward(  # type: ignore[union-attr]
        logits, codebook, noise, key, indices, kl, mix, temperature
    )
    return gathered(codebook, indices) if mix is None else mix.to(codebook.dtype), indices, kl


def _cpu_backward(
    grad, grad_kl, logits, codebook, noise, key, indices, temperature, hard, want_logits, want_codebook
):
    of_logits = logits.new_empty(logits.shape) if want_logits else None
    of_codebook = None
    if want_codebook:
        of_codebook = torch.zeros(codebook.shape, device=codebook.device)
        if grad is not None and hard:
            of_codebook = codebook_statistics(grad, indices, len(codebook), dim=1).sums
    mixing = None if hard or grad is None else of_codebook
    if want_logits or mixing is not None:
        grad_kl = None if grad_kl is None or not want_logits else grad_kl.contiguous()
        _backend.native.cpu.gumbel_quantize_backward(  # type: ignore[union-attr]
            logits, codebook, noise, key, grad, grad_kl, of_logits, mixing, temperature
        )
    return of_logits, None if of_codebook is None else of_codebook.to(codebook.dtype)


def _refuses(logits: Tensor, *_: Any) -> str | None:
    return None if logits.dtype in _NATIVE_DTYPES else f"{logits.dtype} is left to the reference"


def _refuses_backward(grad: Any, grad_kl: Any, logits: Tensor, *_: Any) -> str | None:
    return _refuses(logits)


def _triton(*args):
    from genperf.kernels.gumbel_quantize import gumbel_quantize

    return gumbel_quantize(*args)


def _triton_backward(*args):
    from genperf.kernels.gumbel_quantize import gumbel_quantize_backward

    return gumbel_quantize_backward(*args)


def _refuses_triton(logits: Tensor, *_: Any) -> str | None:
    batch, n_codewords = logits.shape[:2]
    if batch > LARGEST_GRID:
        return f"{batch} samples, at most {LARGEST_GRID}"
    return f"{n_codewords} codewords, below 2^25" if n_codewords >= 2**25 else _refuses(logits)


def _refuses_triton_backward(grad: Any, grad_kl: Any, logits: Tensor, *_: Any) -> str | None:
    return _refuses_triton(logits)


_INPUTS = "Tensor logits, Tensor codebook, Tensor? noise, Tensor? key"
_forward_op = Operator(
    "gumbel_quantize",
    f"({_INPUTS}, float temperature, bool hard, bool want_kl)"
    " -> (Tensor quantized, Tensor indices, Tensor kl)",
    reference,
    _outputs,
)
_forward_op.implement("cpu", _cpu, _refuses)
_forward_op.implement("triton", _triton, _refuses_triton)
_backward_op = Operator(
    "gumbel_quantize_backward",
    f"(Tensor? grad, Tensor? grad_kl, {_INPUTS}, Tensor indices, float temperature, bool hard,"
    " bool want_logits, bool want_codebook) -> (Tensor grad_logits, Tensor grad_codebook)",
    reference_backward,
    _gradients,
)
_backward_op.implement("cpu", _cpu_backward, _refuses_backward)
_backward_op.implement("triton", _triton_backward, _refuses_triton_backward)


class _GumbelQuantize(torch.autograd.Function):
    """Saves the inputs and the indices; backward makes the noise again from its key."""

    @staticmethod
    def forward(ctx, logits, codebook, noise, key, temperature, hard, want_kl):
        quantized, indices, kl = _forward_op(logits, codebook, noise, key, temperature, hard, want_kl)
        ctx.save_for_backward(logits, codebook, noise, key, indices)
        ctx.settings = temperature, hard
        ctx.want_kl = want_kl
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return quantized, indices, wide(logits.new_empty(0)) if kl is None else kl

    @staticmethod
    def backward(ctx, grad, _, grad_kl):
        # A divergence that was not asked for may come with an empty gradient.
        grad_kl, wanted = grad_kl if ctx.want_kl else None, ctx.needs_input_grad[:2]
        if grad is None and grad_kl is None:
            return (None,) * 7
        # With create_graph=True the formulas themselves are differentiated.
        run = reference_backward if torch.is_grad_enabled() else _backward_op
        of_logits, of_codebook = run(grad, grad_kl, *ctx.saved_tensors, *ctx.settings, *wanted)
        return of_logits if wanted[0] else None, of_codebook if wanted[1] else None, *(None,) * 5


def gumbel_quantize(
    logits: Tensor,
    codebook: Tensor,
    temperature: float = 1.0,
    hard: bool = True,
    *,
    kl: bool = True,
    noise: Tensor | None = None,
    key: Tensor | None = None,
    rng: str = "philox",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> GumbelQuantized:
    """A codeword for each position, drawn from its logits, with the gradient of the Gumbel-softmax.

    With standard Gumbel noise ``g`` and ``y = softmax((logits + g) / temperature)`` over the K codewords:

    - ``indices = argmax_k (logits_k + g_k)``, the lowest where several are: a draw from softmax(logits);
    - ``quantized`` is ``codebook[indices]``, gathered, or with ``hard=False`` the mix ``y @ codebook``;
    - ``kl = log K + sum_k q_k log q_k``, ``q = softmax(logits)``: the divergence from the uniform prior.

    The gradient of ``quantized`` by the logits is that of the mix either way (straight-through where hard);
    by the codebook it is that of the codewords given out. ``y`` is never stored: backward makes noise and
    softmax again. Where K is large, the largest term in both passes is the product of codebook and gradient.

    The largest sum is taken away before the division by the temperature, so that no finite logits and no
    temperature give a NaN; a logit of -inf is never drawn. A position with a NaN gets ``quantized`` and
    ``kl`` NaN and the index 0.

    Conventions of public code: taming-transformers' loss is ``kl_weight * kl.mean()``; DALL-E's of
    dalle-pytorch is ``kl_div_loss_weight * kl.sum() / B``.

    On the CPU the positions are the vector lanes, those of several samples together where a sample has few: a
    batch of vectors is fast, a single position is not.

    Backends: ``cpu`` (baseline, AVX2, AVX-512), ``triton``, ``reference``. There is no CUDA C++ kernel:
    reading the logits once is what bounds it, and Triton does that.

    Args:
        logits: [B, K, *], any strides. float32, float16, bfloat16, or float64 (by the reference alone).
        codebook: [K, D] of the dtype of ``logits``.
        temperature: finite, at least 1e-6.
        hard: whether ``quantized`` is a codeword rather than a mix.
        kl: whether to compute the divergence.
        noise: Gumbel noise of shape and dtype of ``logits``; without a gradient.
        key: int64 [2], or [B, 2] with one for each sample, from :func:`draw_key`, for the noise of
            docs/randomness.md.
        rng: "philox" draws a key; "torch" draws the noise itself, the very numbers of
            ``torch.nn.functional.gumbel_softmax`` on these logits.
        generator: what either is drawn from; a list has one for each sample.

    Returns:
        :class:`GumbelQuantized`: ``quantized`` [B, D, *] of the dtype of ``codebook``; ``indices``, int64
        [B, *]; ``kl`` [B, *] in nats, float32 (float64 for float64), or None.

    Raises:
        TypeError: for a non-tensor, a dtype that is not as above, or arguments of other types.
        ValueError: for shapes, devices or numbers that do not fit; the message says which.
        RuntimeError: if a backend was forced that cannot run.
    """
    _check(logits, codebook, temperature, hard, kl)
    noise, key = check_noise("gumbel_quantize", "logits", logits, noise, key, rng, generator, torch_gumbel)
    batch, n_codewords, *space = logits.shape
    positions = math.prod(space)
    flat = logits.reshape(batch, n_codewords, positions)
    if noise is not None:
        noise = noise.reshape(batch, n_codewords, positions)
    quantized, indices, divergence = _GumbelQuantize.apply(
        flat, codebook, noise, key, float(temperature), hard, kl
    )
    return GumbelQuantized(
        quantized.view(batch, codebook.shape[1], *space),
        indices.clamp(min=0).view(batch, *space),
        divergence.view(batch, *space) if kl else None,
    )


def _check(logits: Any, codebook: Any, temperature: Any, hard: Any, kl: Any) -> None:
    for name, tensor in (("logits", logits), ("codebook", codebook)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"gumbel_quantize: {name} is {type(tensor).__name__}, expected a tensor")
    if logits.dtype not in FLOATS:
        raise TypeError(f"gumbel_quantize: logits is {logits.dtype}, expected one of {FLOATS}")
    if codebook.dtype != logits.dtype:
        raise TypeError(f"gumbel_quantize: codebook is {codebook.dtype}, expected {logits.dtype}, as logits")
    if codebook.device != logits.device:
        raise ValueError(
            f"gumbel_quantize: codebook is on {codebook.device}, expected {logits.device}, as logits"
        )
    if codebook.dim() != 2 or codebook.numel() == 0:
        raise ValueError(
            f"gumbel_quantize: codebook has shape {tuple(codebook.shape)}, expected [K, D], each at least 1"
        )
    if logits.dim() < 2 or logits.shape[1] != len(codebook):
        raise ValueError(
            f"gumbel_quantize: logits has shape {tuple(logits.shape)}, expected [B, {len(codebook)}, *] for "
            f"a codebook of shape {tuple(codebook.shape)}"
        )
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"gumbel_quantize: temperature is {type(temperature).__name__}, expected a number")
    if not 1e-6 <= temperature < math.inf:
        raise ValueError(f"gumbel_quantize: temperature is {temperature}, expected a finite number >= 1e-6")
    for name, flag in (("hard", hard), ("kl", kl)):
        if type(flag) is not bool:
            raise TypeError(f"gumbel_quantize: {name} is {type(flag).__name__}, expected a bool")
