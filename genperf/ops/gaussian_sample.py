"""The reparameterized Gaussian sample, its divergence and its log-probability.

Definitions: D. P. Kingma and M. Welling, "Auto-Encoding Variational Bayes", ICLR 2014, for the sample
and the divergence; the parametrizations are those of diffusers (log-variance), VDVAE (log-sigma),
torch.distributions (std), Stable Audio's Oobleck (softplus) and NVAE (soft clamp).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import Operator, cuda_stream
from genperf.ops._gaussian_sample_checks import (
    check_halves,
    check_noise,
    check_pair,
    check_prior,
    check_settings,
    checked_settings,
)
from genperf.ops._gaussian_sample_reference import reference, reference_backward
from genperf.ops.philox_random import passing

__all__ = ["GaussianSample", "gaussian_sample"]

_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_compiling = torch.compiler.is_dynamo_compiling


class GaussianSample(NamedTuple):
    """Results of :func:`gaussian_sample`; None for what was not asked for."""

    z: Tensor | None
    kl: Tensor | None
    log_prob: Tensor | None


def _sum_like(mean: Tensor, reduce: bool) -> Tensor:
    """Room for kl or log_prob."""
    if reduce and mean.dtype == torch.float32:
        return mean.new_empty(mean.size(0))
    dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
    return mean.new_empty(len(mean), dtype=dtype) if reduce else torch.empty_like(mean, dtype=dtype)


def _outputs(mean, scale, pm, ps, noise, key, t, lo, hi, offset, temperature, reduce, z, kl, log_prob):
    """Room for z, kl and log_prob; None for what is not wanted."""
    return (
        torch.empty_like(mean) if z else None,
        _sum_like(mean, reduce) if kl else None,
        _sum_like(mean, reduce) if log_prob else None,
    )


def _gradients(grad_z, grad_kl, grad_log_prob, mean, scale, prior_mean, prior_scale, *_):
    """Room for the four gradients; None for those of a prior that no divergence depends on."""
    with_prior = grad_kl is not None and prior_mean is not None
    return (
        torch.empty_like(mean),
        torch.empty_like(scale),
        torch.empty_like(prior_mean) if with_prior else None,
        torch.empty_like(prior_scale) if with_prior else None,
    )


def _cpu(
    mean, scale, pm, ps, noise, key, t, lo, hi, offset, temperature, reduce, want_z, want_kl, want_log_prob
):
    z = torch.empty_like(mean) if want_z else None
    kl = _sum_like(mean, reduce) if want_kl else None
    log_prob = _sum_like(mean, reduce) if want_log_prob else None
    _backend.native.cpu.gaussian_sample_forward(  # type: ignore[union-attr]
        mean, scale, pm, ps, noise, key, z, kl, log_prob, t, lo, hi, offset, temperature, reduce, None
    )
    return z, kl, log_prob


def _cpu_backward(*args):
    grads = _gradients(*args)
    _backend.native.cpu.gaussian_sample_backward(*args[:9], *grads, *args[9:])  # type: ignore[union-attr]
    return grads


def _cuda(*args):
    out = _outputs(*args)
    mean, reduce = args[0], args[11] and (out[1] is not None or out[2] is not None)
    cuda = _backend.cuda_functions()
    partials = None
    if reduce and (blocks := -(-mean[:1].numel() // cuda.gaussian_sample_block_elements)) > 1:
        partials = mean.new_empty(2, len(mean), blocks, dtype=torch.float64)
    cuda.gaussian_sample_forward(*args[:6], *out, *args[6:11], reduce, partials, cuda_stream(mean))
    return out


def _cuda_backward(*args):
    grads = _gradients(*args)
    _backend.cuda_functions().gaussian_sample_backward(*args[:9], *grads, *args[9:], cuda_stream(args[3]))
    return grads


def _triton(*args):
    from genperf.kernels.gaussian_sample import gaussian_sample_forward

    return gaussian_sample_forward(*args)


def _triton_backward(*args):
    from genperf.kernels.gaussian_sample import gaussian_sample_backward

    return gaussian_sample_backward(*args)


def _refuses(mean: Tensor, *_: Any) -> str | None:
    if mean.dtype in _NATIVE_DTYPES and mean.dim() <= 8:
        return None
    if mean.dtype not in _NATIVE_DTYPES:
        return f"{mean.dtype} is left to the reference"
    return f"{mean.dim()} dimensions, at most 8"


def _refuses_backward(grad_z: Any, grad_kl: Any, grad_log_prob: Any, mean: Tensor, *_: Any) -> str | None:
    return _refuses(mean)


_INPUTS = "Tensor mean, Tensor scale, Tensor? prior_mean, Tensor? prior_scale, Tensor? noise, Tensor? key"
_SETTINGS = "int transform, float low, float high, float offset, float temperature, bool reduce"

_forward_op = Operator(
    "gaussian_sample",
    f"({_INPUTS}, {_SETTINGS}, bool want_z, bool want_kl, bool want_log_prob)"
    " -> (Tensor z, Tensor kl, Tensor log_prob)",
    reference,
    _outputs,
)
_forward_op.implement(
    "cpu", _cpu, _refuses, direct=_backend.native.cpu.gaussian_sample_direct if _backend.native else None
)
_forward_op.implement("cuda", _cuda, _refuses)
_forward_op.implement("triton", _triton, _refuses)

_backward_op = Operator(
    "gaussian_sample_backward",
    f"(Tensor? grad_z, Tensor? grad_kl, Tensor? grad_log_prob, {_INPUTS}, {_SETTINGS})"
    " -> (Tensor grad_mean, Tensor grad_scale, Tensor grad_prior_mean, Tensor grad_prior_scale)",
    reference_backward,
    _gradients,
)
_backward_op.implement("cpu", _cpu_backward, _refuses_backward)
_backward_op.implement("cuda", _cuda_backward, _refuses_backward)
_backward_op.implement("triton", _triton_backward, _refuses_backward)


# Where mean and scale are the halves of one tensor along `dim`: the gradient is written in one piece,
# where autograd would have to concatenate two.


def _separated(grad_z, grad_kl, grad_log_prob, packed, dim, *rest):
    """The arguments of ``gaussian_sample_backward``."""
    return grad_z, grad_kl, grad_log_prob, *packed.chunk(2, dim), *rest


def _packed_gradients(grad_z, grad_kl, grad_log_prob, packed, dim, prior_mean, prior_scale, *_):
    with_prior = grad_kl is not None and prior_mean is not None
    return (
        torch.empty_like(packed),
        torch.empty_like(prior_mean) if with_prior else None,
        torch.empty_like(prior_scale) if with_prior else None,
    )


def _joined(backward):
    """A backward pass over separate tensors, its first two gradients concatenated."""

    def run(*args):
        grad_mean, grad_scale, *of_prior = backward(*_separated(*args))
        return torch.cat((grad_mean, grad_scale), args[4]), *of_prior

    return run


def _cpu_packed_backward(*args):
    grads = _packed_gradients(*args)
    halves, args = grads[0].chunk(2, args[4]), _separated(*args)
    _backend.native.cpu.gaussian_sample_backward(*args[:9], *halves, *grads[1:], *args[9:])  # type: ignore[union-attr]
    return grads


def _cuda_packed_backward(*args):
    grads = _packed_gradients(*args)
    halves, args = grads[0].chunk(2, args[4]), _separated(*args)
    stream = cuda_stream(args[3])
    _backend.cuda_functions().gaussian_sample_backward(*args[:9], *halves, *grads[1:], *args[9:], stream)
    return grads


_packed_backward_op = Operator(
    "gaussian_sample_packed_backward",
    "(Tensor? grad_z, Tensor? grad_kl, Tensor? grad_log_prob, Tensor packed, int dim,"
    f" Tensor? prior_mean, Tensor? prior_scale, Tensor? noise, Tensor? key, {_SETTINGS})"
    " -> (Tensor grad_packed, Tensor grad_prior_mean, Tensor grad_prior_scale)",
    _joined(reference_backward),
    _packed_gradients,
)
_packed_backward_op.implement("cpu", _cpu_packed_backward, _refuses_backward)
_packed_backward_op.implement("cuda", _cuda_packed_backward, _refuses_backward)
_packed_backward_op.implement("triton", _joined(_triton_backward), _refuses_backward)


class _GaussianSample(torch.autograd.Function):
    """Saves the inputs alone; the backward pass regenerates the noise from the key.

    ``scale`` is None where ``mean`` is packed: then ``dim`` tells along which dimension.
    """

    @staticmethod
    def forward(ctx, dim, mean, scale, *args):
        ctx.save_for_backward(mean, scale, *args[:4])
        ctx.dim, ctx.settings, ctx.wanted = dim, args[4:10], args[10:]
        ctx.set_materialize_grads(False)
        halves = mean.chunk(2, dim) if scale is None else (mean, scale)
        return tuple(mean.new_empty(0) if out is None else out for out in _forward_op(*halves, *args))

    @staticmethod
    def backward(ctx, *grads):
        # A result that was not asked for may come with an empty gradient.
        grads = tuple(grad if asked else None for grad, asked in zip(grads, ctx.wanted, strict=True))
        if all(grad is None for grad in grads):
            return (None,) * 16
        mean, scale, prior_mean, *_ = inputs = ctx.saved_tensors
        # With create_graph=True the formulas themselves are differentiated.
        formulas = torch.is_grad_enabled()
        of_prior: Sequence[Tensor | None]
        if scale is None:
            run = _joined(reference_backward) if formulas else _packed_backward_op
            of_mean, *of_prior = run(*grads, mean, ctx.dim, *inputs[2:], *ctx.settings)
            of_scale = None
        else:
            run = reference_backward if formulas else _backward_op
            of_mean, of_scale, *of_prior = run(*grads, *inputs, *ctx.settings)
        if prior_mean is None or grads[1] is None:
            of_prior = (None, None)
        return None, of_mean, of_scale, *of_prior, *(None,) * 11


def gaussian_sample(
    mean: Tensor,
    scale: Tensor | None = None,
    *,
    dim: int = 1,
    parametrization: str = "logvar",
    clamp: tuple[float, float] | None = None,
    offset: float | None = None,
    temperature: float = 1.0,
    prior: tuple[Tensor, Tensor] | None = None,
    sample: bool = True,
    kl: bool = True,
    log_prob: bool = False,
    reduction: str = "sample",
    noise: Tensor | None = None,
    key: Tensor | None = None,
    rng: str = "philox",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> GaussianSample:
    """Sample q = N(mu, sigma^2) as z = mu + sigma eps, with KL(q || prior) and log q(z), in one pass.

    Differentiable in mean, scale and prior; nothing but the inputs is kept for the backward pass.

    Args:
        mean: [B, *], float32, float16, bfloat16 (arithmetic in float32) or float64. Any strides.
        scale: broadcastable with ``mean``, same dtype. What it means is told by ``parametrization``:

            - "logvar": sigma = exp(scale / 2)
            - "logsigma": sigma = exp(scale)
            - "std": sigma = scale
            - "softplus": sigma = softplus(scale) + offset
            - "soft_clamp": sigma = exp(5 tanh(scale / 5)) + offset, and mu = 5 tanh(mean / 5); otherwise
              mu = mean
            None: ``mean`` is packed, [B, 2 C, *], and its halves along ``dim`` are the mean and the
            scale; its gradient then needs no concatenation.
        dim: see ``scale``.
        clamp: (low, high) bounds on ``scale``, for "logvar" and "logsigma".
        offset: added to sigma, for "softplus" (default 0) and "soft_clamp" (default 0.01).
        temperature: multiplies sigma of q, not of the prior.
        prior: (mean, scale) of the other Gaussian, in the same parametrization; None for N(0, 1).
        sample, kl, log_prob: which results are wanted.
        reduction: of kl and log_prob: "none" [B, *], "sample" [B], the sum over all but dimension 0, or
            "mean" [], the mean of those sums over the batch.
        noise: eps, of the shape and dtype of the result; not differentiated.
        key: int64 [2] or [B, 2], see :func:`genperf.ops.philox_random`; None draws one.
        rng: "philox" draws eps from a key, "torch" draws the noise of ``torch.randn``.
        generator: torch.Generator or a list of B of them; None for the default one.

    Returns:
        GaussianSample(z, kl, log_prob). z has the dtype of ``mean``; kl and log_prob are float32
        (float64 for float64). kl is never negative and saturates at the largest finite float32. A NaN
        in the inputs makes a NaN at its own place.

    Raises:
        TypeError: for a non-tensor, or a dtype that is not as above.
        ValueError: for shapes, devices, bounds or names that do not fit; the message says which.
        RuntimeError: if a backend was forced that cannot run.
    """
    if isinstance(clamp, list):
        clamp = tuple(clamp)
    compiling = _compiling()
    check = check_settings if compiling else checked_settings
    settings = check(parametrization, clamp, offset, temperature, reduction)
    if (
        prior is None and noise is None and generator is None and rng == "philox" and reduction != "mean"
        and not compiling and (direct := _forward_op.direct("cpu")) is not None
    ):  # fmt: skip
        results = direct(GaussianSample, mean, scale, key, passing, settings, sample, kl, log_prob)
        if results is not NotImplemented:
            return results
    packed = None
    if scale is None:
        packed, (mean, scale) = mean, check_halves(mean, dim)
    else:
        mean, scale = check_pair(mean, scale, "mean", "scale")
    if mean.dim() == 0 and settings[-1]:
        raise ValueError(
            f"gaussian_sample: mean has shape (), expected a batch dimension for reduction {reduction!r}"
        )
    prior_mean = prior_scale = None
    if prior is not None:
        prior_mean, prior_scale = check_prior(prior, mean)
    if sample or log_prob:
        noise, key = check_noise(mean, noise, key, rng, generator)
    else:
        noise = key = None
    args = (prior_mean, prior_scale, noise, key, *settings, sample, kl, log_prob)
    differentiable = torch.is_grad_enabled() and (
        (mean if packed is None else packed).requires_grad
        or scale.requires_grad
        or (prior_mean is not None and prior_mean.requires_grad)
        or (prior_scale is not None and prior_scale.requires_grad)
    )
    if not differentiable:
        z, divergence, density = _forward_op(mean, scale, *args)
    elif packed is None:
        z, divergence, density = _GaussianSample.apply(None, mean, scale, *args)
    else:
        z, divergence, density = _GaussianSample.apply(dim, packed, None, *args)
    if reduction == "mean":
        divergence, density = (
            x.mean() if asked else None for x, asked in ((divergence, kl), (density, log_prob))
        )
    return GaussianSample(z if sample else None, divergence if kl else None, density if log_prob else None)
