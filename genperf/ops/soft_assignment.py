"""The softmax over a codebook, by its sums: log-sum-exp, entropy, mean probabilities and cross-entropy.

Definitions: the entropy terms of L. Yu et al., "Language model beats diffusion: tokenizer is key to visual
generation", ICLR 2024 (arXiv:2310.05737), equation 4, and of P. Sun et al., "Autoregressive model beats
diffusion: Llama for scalable image generation" (arXiv:2406.06525, LlamaGen); the divergence of Y. Takida et
al., "SQ-VAE", ICML 2022 (arXiv:2205.07547), equation 9; the cross-entropy of vector-quantize-pytorch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import Operator
from genperf.ops._soft_assignment_checks import METRICS, check, check_targets
from genperf.ops._soft_assignment_reference import reference, reference_backward, wide_dtype

__all__ = ["SoftAssignment", "soft_assignment"]

_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_GRID = 65535  # of the second and third dimension of a launch


class SoftAssignment(NamedTuple):
    """Results of :func:`soft_assignment`; ``mean_prob`` and ``nll`` are None where not asked for."""

    log_sum_exp: Tensor
    entropy: Tensor
    mean_prob: Tensor | None
    nll: Tensor | None


def _outputs(
    x: Tensor, codebook: Tensor, targets: Tensor | None, metric: int, temperature: float, want_mean: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    rows, dtype = x.shape[:-1], wide_dtype(x)
    return (
        x.new_empty(rows, dtype=dtype),
        x.new_empty(rows, dtype=dtype),
        x.new_empty(codebook.shape[:2], dtype=dtype) if want_mean else None,
        None if targets is None else x.new_empty(rows, dtype=dtype),
    )


def _gradients(
    grad_lse: Tensor | None, grad_entropy: Tensor | None, grad_mean: Tensor | None, grad_nll: Tensor | None,
    x: Tensor, codebook: Tensor, targets: Tensor | None, metric: int, temperature: float,
    want_x: bool, want_codebook: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    return (
        x.new_empty(x.shape) if want_x else None,
        codebook.new_empty(codebook.shape) if want_codebook else None,
    )


def _cpu(x, codebook, targets, metric, temperature, want_mean):
    out = _outputs(x, codebook, targets, metric, temperature, want_mean)
    _backend.native.cpu.soft_assignment_forward(x, codebook, targets, *out, metric, temperature)  # type: ignore[union-attr]
    return out


def _cpu_backward(*args):
    out = _gradients(*args)
    cotangents = (None if g is None else g.contiguous() for g in args[:4])
    _backend.native.cpu.soft_assignment_backward(*cotangents, *args[4:7], *out, *args[7:9])  # type: ignore[union-attr]
    return out


def _refuses(x: Tensor, *_: Any) -> str | None:
    if x.dtype not in _NATIVE_DTYPES:
        return f"{x.dtype} is left to the reference"
    return f"{x.dim() - 1} dimensions, at most 7" if x.dim() > 8 else None


def _refuses_backward(grad_lse: Any, grad_entropy: Any, grad_mean: Any, grad_nll: Any, x: Tensor, *_: Any):
    return _refuses(x)


def _triton(*args):
    from genperf.kernels.soft_assignment import soft_assignment

    return soft_assignment(*args)


def _triton_backward(*args):
    from genperf.kernels.soft_assignment import soft_assignment_backward

    return soft_assignment_backward(*args)


def _refuses_triton(x: Tensor, codebook: Tensor, *_: Any) -> str | None:
    if x.dtype not in _NATIVE_DTYPES:
        return f"{x.dtype} is left to the reference"
    heads, n_codewords = codebook.shape[:2]
    if heads > LARGEST_GRID:
        return f"{heads} heads, at most {LARGEST_GRID}"
    return None if n_codewords <= 2**27 else f"{n_codewords} codewords, at most 2^27"


def _refuses_triton_backward(
    grad_lse: Any, grad_entropy: Any, grad_mean: Any, grad_nll: Any, x: Tensor, codebook: Tensor, *_: Any
) -> str | None:
    return _refuses_triton(x, codebook)


_INPUTS = "Tensor x, Tensor codebook, Tensor? targets, int metric, float temperature"
_forward_op = Operator(
    "soft_assignment",
    f"({_INPUTS}, bool want_mean) -> (Tensor log_sum_exp, Tensor entropy, Tensor mean_prob, Tensor nll)",
    reference,
    _outputs,
)
_forward_op.implement("cpu", _cpu, _refuses)
_forward_op.implement("triton", _triton, _refuses_triton)
_backward_op = Operator(
    "soft_assignment_backward",
    f"(Tensor? grad_lse, Tensor? grad_entropy, Tensor? grad_mean, Tensor? grad_nll, {_INPUTS},"
    " bool want_x, bool want_codebook) -> (Tensor grad_x, Tensor grad_codebook)",
    reference_backward,
    _gradients,
)
_backward_op.implement("cpu", _cpu_backward, _refuses_backward)
_backward_op.implement("triton", _triton_backward, _refuses_triton_backward)


class _SoftAssignment(torch.autograd.Function):
    """Saves the inputs alone; the backward pass computes the scores again."""

    @staticmethod
    def forward(ctx, x, codebook, targets, metric, temperature, want_mean):
        ctx.save_for_backward(x, codebook, targets)
        ctx.settings = metric, temperature
        ctx.present = True, True, want_mean, targets is not None
        ctx.set_materialize_grads(False)
        out = _forward_op(x, codebook, targets, metric, temperature, want_mean)
        return tuple(x.new_empty(0) if y is None else y for y in out)

    @staticmethod
    def backward(ctx, *grads):
        # A result that was not asked for may come with an empty gradient.
        grads = tuple(grad if there else None for grad, there in zip(grads, ctx.present, strict=True))
        wanted = ctx.needs_input_grad[:2]
        if all(grad is None for grad in grads):
            return (None,) * 6
        # With create_graph=True the formulas themselves are differentiated.
        run = reference_backward if torch.is_grad_enabled() else _backward_op
        of_x, of_codebook = run(*grads, *ctx.saved_tensors, *ctx.settings, *wanted)
        return of_x if wanted[0] else None, of_codebook if wanted[1] else None, None, None, None, None


def soft_assignment(
    x: Tensor,
    codebook: Tensor,
    metric: str = "l2",
    temperature: float = 1.0,
    *,
    dim: int = -1,
    targets: Tensor | None = None,
    mean_prob: bool = True,
) -> SoftAssignment:
    """What losses need of the softmax of each vector over all codewords, without the [N, K] matrix.

    With the scores ``s_k`` of a vector and ``p = softmax(s)``:

    - ``log_sum_exp = log sum_k exp(s_k)``;
    - ``entropy = -sum_k p_k log p_k``, in nats;
    - ``mean_prob``: the mean of ``p`` over all vectors;
    - ``nll = log_sum_exp - s_target``, the cross-entropy; 0 where the target is -1.

    =========== ====================================== =======================================================
    metric      s_k                                    remarks
    =========== ====================================== =======================================================
    "l2"        ``-|x - c_k|^2 / temperature``
    "euclidean" ``-max(|x - c_k|, 1e-4) / temperature``  the logits of vector-quantize-pytorch; no gradient
                                                       where the distance is less
    "cosine"    ``x.c_k / (|x| |c_k|) / temperature``  0 with a zero vector, without gradient
    "dot"       ``x.c_k / temperature``
    =========== ====================================== =======================================================

    All results are differentiable in ``x`` and ``codebook``. Arithmetic and sums are in float32 for half
    precision; the same inputs give the same bits for any number of threads. Both passes hold the scores of
    a block of vectors and compute those of the next in its place; backward computes them again and saves
    nothing but the inputs. docs/vector_quantization.md has recipes for the losses of public quantizers.

    Backends: ``cpu`` (baseline, AVX2, AVX-512), ``triton``, ``reference``. There is no CUDA C++ kernel:
    the time goes into products, which Triton makes of the same float32 multiply-adds.

    A vector with a NaN or an infinity makes its own results and ``mean_prob`` NaN; a codeword with one makes
    all results NaN, except where an infinite distance is a probability of 0.

    Args:
        x: [*, D], or with D along ``dim``; any strides. float32, float16, bfloat16, or float64 (by the
            reference alone).
        codebook: [K, D]; or [heads, K, D], and then dimension 0 of ``x`` is that of the heads. Of the dtype
            of ``x``.
        metric: one of the above.
        temperature: finite and > 0.
        dim: the dimension of ``x`` that holds D.
        targets: int64, the shape of ``x`` without ``dim``; each in [0, K), or -1 for none.
        mean_prob: whether to compute the mean probabilities, which takes part of the time of both passes.

    Returns:
        :class:`SoftAssignment`: ``log_sum_exp`` and ``entropy``, the shape of ``x`` without ``dim``;
        ``mean_prob`` [K] or [heads, K], zeros for no vectors; ``nll``, shape of ``targets``. All float32, or
        float64 for float64.

    Raises:
        TypeError: for a non-tensor, a dtype that is not as above, or arguments of other types.
        ValueError: for shapes, devices, numbers or (on the CPU) targets that do not fit. On a GPU, where
            they are not read, a target out of range gives a ``nll`` of NaN.
        RuntimeError: if a backend was forced that cannot run.
    """
    check(x, codebook, metric, temperature, dim, mean_prob)
    heads = codebook.dim() == 3
    vectors, words = x.movedim(dim, -1), codebook
    if targets is not None:
        targets = check_targets(targets, vectors, codebook.shape[-2])
    if not heads:
        vectors, words = vectors[None], words[None]
        targets = None if targets is None else targets[None]
    out = _SoftAssignment.apply(vectors, words, targets, METRICS[metric], float(temperature), mean_prob)
    lse, entropy, mean, nll = out if heads else (y[0] if y.dim() > 1 else y for y in out)
    return SoftAssignment(lse, entropy, mean if mean_prob else None, nll if targets is not None else None)
