"""The reparameterized Gaussian sample, its divergence and its log-probability.

Definitions: D. P. Kingma and M. Welling, "Auto-Encoding Variational Bayes", ICLR 2014, for the sample
and the divergence; the parametrizations are those of diffusers (log-variance), VDVAE (log-sigma),
torch.distributions (std), Stable Audio's Oobleck (softplus) and NVAE (soft clamp).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from genperf import _backend
from genperf._op import Operator, cuda_stream
from genperf._torch_normal import torch_normal
from genperf.ops.philox_random import FLOATS, check_key, draw_key, passing, reference_normals

__all__ = ["GaussianSample", "gaussian_sample"]

TRANSFORMS = {"logvar": 0, "logsigma": 1, "std": 2, "softplus": 3, "soft_clamp": 4}
_DEFAULT_OFFSET = {"softplus": 0.0, "soft_clamp": 1e-2}
_REDUCTIONS = ("none", "sample", "mean")
_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_compiling = torch.compiler.is_dynamo_compiling
_LARGEST = torch.finfo(torch.float32).max


class GaussianSample(NamedTuple):
    """Results of :func:`gaussian_sample`; None for what was not asked for."""

    z: Tensor | None
    kl: Tensor | None
    log_prob: Tensor | None


class _Gaussian(NamedTuple):
    """mu, sigma and log sigma, and the derivatives of them by the raw mean and scale."""

    mu: Tensor
    sigma: Tensor
    log_sigma: Tensor
    d_mu: Tensor
    d_sigma: Tensor
    d_log_sigma: Tensor


def _gaussian(
    mean: Tensor, scale: Tensor, transform: int, low: float, high: float, offset: float, temperature: float
) -> _Gaussian:
    mean, scale = _widened(mean), _widened(scale)
    one = torch.ones_like(mean)
    mu, d_mu = mean, one
    if transform in (TRANSFORMS["logvar"], TRANSFORMS["logsigma"]):
        factor = 0.5 if transform == TRANSFORMS["logvar"] else 1.0
        log_sigma = factor * scale.clamp(low, high)
        sigma = log_sigma.exp()
        d_log_sigma = factor * ((scale >= low) & (scale <= high)).to(scale.dtype)
        d_sigma = sigma * d_log_sigma
    elif transform == TRANSFORMS["std"]:
        sigma, log_sigma = scale, scale.log()
        d_sigma, d_log_sigma = one, scale.reciprocal()
    else:
        if transform == TRANSFORMS["softplus"]:
            sigma, d_sigma = F.softplus(scale) + offset, scale.sigmoid()
        else:
            e = (5 * torch.tanh(scale / 5)).exp()
            mu, d_mu = 5 * torch.tanh(mean / 5), torch.cosh(mean / 5) ** -2
            sigma, d_sigma = e + offset, e * torch.cosh(scale / 5) ** -2
        # 1 is the limit of the softplus, where both underflow.
        log_sigma, d_log_sigma = sigma.log(), torch.where(sigma == 0, one, d_sigma / sigma)
    return _Gaussian(
        mu, sigma * temperature, log_sigma + math.log(temperature), d_mu, d_sigma * temperature, d_log_sigma
    )


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _exp_m1_mx(x: Tensor) -> Tensor:
    """e^x - 1 - x, never negative: the series near 0, where the difference would cancel."""
    series = torch.full_like(x, 1 / math.factorial(14))
    for k in range(13, 1, -1):
        series = series * x + 1 / math.factorial(k)
    return torch.where(x.abs() <= 1, series * x * x, x.exp() - 1 - x)


def _divergence_parts(q: _Gaussian, prior: _Gaussian | None) -> tuple[Tensor, Tensor, Tensor]:
    """(mu - mu') / sigma', the same once more over sigma', and 2 (log sigma - log sigma')."""
    if prior is None:
        return q.mu, q.mu, 2 * q.log_sigma
    difference, precision = q.mu - prior.mu, (-prior.log_sigma).exp()
    shift = torch.where(difference == 0, difference, difference * precision)
    return shift, torch.where(shift == 0, shift, shift * precision), 2 * (q.log_sigma - prior.log_sigma)


def _noise(mean: Tensor, noise: Tensor | None, key: Tensor | None) -> Tensor:
    if noise is None:
        assert key is not None
        noise = reference_normals(mean.shape, key)
    return noise.to(_widened(mean).dtype)


def _reduced(x: Tensor, reduce: bool) -> Tensor:
    if not reduce:
        return x
    return x.flatten(1).sum(1, dtype=torch.float64).clamp(max=_LARGEST).to(x.dtype) if x.dim() > 1 else x


def _spread(grad: Tensor, mean: Tensor, reduce: bool) -> Tensor:
    """The gradient of a per-sample sum, for each element."""
    return grad.view([-1] + [1] * (mean.dim() - 1)) if reduce else grad


def _reference(
    mean, scale, prior_mean, prior_scale, noise, key,
    transform, low, high, offset, temperature, reduce, want_z, want_kl, want_log_prob,
):  # fmt: skip
    q = _gaussian(mean, scale, transform, low, high, offset, temperature)
    eps = _noise(mean, noise, key) if want_z or want_log_prob else torch.empty(0)
    z = kl = log_prob = None
    if want_z:
        z = torch.empty_like(mean).copy_(q.mu + q.sigma * eps)
    if want_kl:
        prior = prior_mean is not None and _gaussian(
            prior_mean, prior_scale, transform, low, high, offset, 1.0
        )
        shift, _, difference = _divergence_parts(q, prior or None)
        kl = (0.5 * shift * shift + 0.5 * _exp_m1_mx(difference)).clamp(max=_LARGEST)
        kl = _reduced(kl, reduce)
    if want_log_prob:
        log_prob = _reduced(-0.5 * eps * eps - q.log_sigma - 0.5 * math.log(2 * math.pi), reduce)
    return z, kl, log_prob


def _reference_backward(
    grad_z, grad_kl, grad_log_prob, mean, scale, prior_mean, prior_scale, noise, key,
    transform, low, high, offset, temperature, reduce,
):  # fmt: skip
    q = _gaussian(mean, scale, transform, low, high, offset, temperature)
    by_mu = by_scale = torch.zeros_like(q.mu)
    by_prior_mean = by_prior_scale = None
    if grad_z is not None:
        by_mu = by_mu + grad_z
        by_scale = by_scale + grad_z * _noise(mean, noise, key) * q.d_sigma
    if grad_log_prob is not None:
        by_scale = by_scale - _spread(grad_log_prob, mean, reduce) * q.d_log_sigma
    if grad_kl is not None:
        prior = None
        if prior_mean is not None:
            prior = _gaussian(prior_mean, prior_scale, transform, low, high, offset, 1.0)
        grad_kl = _spread(grad_kl, mean, reduce)
        shift, scaled_shift, difference = _divergence_parts(q, prior)
        by_mu = by_mu + grad_kl * scaled_shift
        by_scale = by_scale + grad_kl * difference.expm1() * q.d_log_sigma
        if prior is not None:
            by_prior_mean = -grad_kl * scaled_shift * prior.d_mu
            by_prior_scale = -grad_kl * (shift * shift + difference.expm1()) * prior.d_log_sigma
    grads = [(by_mu * q.d_mu).to(mean.dtype), by_scale.to(scale.dtype)]
    if by_prior_mean is None or by_prior_scale is None:
        return *grads, None, None
    return *grads, by_prior_mean.to(mean.dtype), by_prior_scale.to(mean.dtype)


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
    _reference,
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
    _reference_backward,
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
    _joined(_reference_backward),
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
            run = _joined(_reference_backward) if formulas else _packed_backward_op
            of_mean, *of_prior = run(*grads, mean, ctx.dim, *inputs[2:], *ctx.settings)
            of_scale = None
        else:
            run = _reference_backward if formulas else _backward_op
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
    check = _check_settings if compiling else _checked_settings
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
        packed, (mean, scale) = mean, _check_halves(mean, dim)
    else:
        mean, scale = _check_pair(mean, scale, "mean", "scale")
    if mean.dim() == 0 and settings[-1]:
        raise ValueError(
            f"gaussian_sample: mean has shape (), expected a batch dimension for reduction {reduction!r}"
        )
    prior_mean = prior_scale = None
    if prior is not None:
        prior_mean, prior_scale = _check_prior(prior, mean)
    if sample or log_prob:
        noise, key = _check_noise(mean, noise, key, rng, generator)
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


def _check_pair(mean: Any, scale: Any, first: str, second: str) -> tuple[Tensor, Tensor]:
    for name, x in ((first, mean), (second, scale)):
        if not isinstance(x, Tensor):
            raise TypeError(f"gaussian_sample: {name} is {type(x).__name__}, expected a tensor")
        if x.dtype not in FLOATS:
            raise TypeError(f"gaussian_sample: {name} is {x.dtype}, expected one of {FLOATS}")
    if scale.dtype != mean.dtype:
        raise TypeError(f"gaussian_sample: {second} is {scale.dtype}, expected {mean.dtype}, as {first}")
    if scale.device != mean.device:
        raise ValueError(
            f"gaussian_sample: {second} is on {scale.device}, expected {mean.device}, as {first}"
        )
    if scale.shape != mean.shape:
        try:
            mean, scale = torch.broadcast_tensors(mean, scale)
        except RuntimeError:
            raise ValueError(
                f"gaussian_sample: {second} has shape {tuple(scale.shape)}, expected one that broadcasts "
                f"with {first}, {tuple(mean.shape)}"
            ) from None
    return mean, scale


def _check_halves(packed: Any, dim: int) -> tuple[Tensor, Tensor]:
    if not isinstance(packed, Tensor):
        raise TypeError(f"gaussian_sample: mean is {type(packed).__name__}, expected a tensor")
    if not -packed.dim() <= dim < packed.dim() or packed.shape[dim] % 2:
        raise ValueError(
            f"gaussian_sample: mean has shape {tuple(packed.shape)}, expected an even size in dimension "
            f"{dim} to halve, since scale is None"
        )
    mean, scale = packed.detach().chunk(2, dim) if packed.shape[dim] else (packed.detach(), packed.detach())
    return _check_pair(mean, scale, "mean", "scale")


def _check_prior(prior: Any, mean: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(prior, (tuple, list)) or len(prior) != 2:
        raise TypeError(f"gaussian_sample: prior is {type(prior).__name__}, expected a pair (mean, scale)")
    prior_mean, prior_scale = _check_pair(prior[0], prior[1], "prior[0]", "prior[1]")
    if prior_mean.dtype != mean.dtype:
        raise TypeError(f"gaussian_sample: prior is {prior_mean.dtype}, expected {mean.dtype}, as mean")
    if prior_mean.device != mean.device:
        raise ValueError(f"gaussian_sample: prior is on {prior_mean.device}, expected {mean.device}, as mean")
    try:
        return prior_mean.expand(mean.shape), prior_scale.expand(mean.shape)
    except RuntimeError:
        raise ValueError(
            f"gaussian_sample: prior has shape {tuple(prior_mean.shape)}, expected one that broadcasts to "
            f"{tuple(mean.shape)}"
        ) from None


def _check_settings(
    parametrization: str,
    clamp: tuple[float, float] | None,
    offset: float | None,
    temperature: float,
    reduction: str,
) -> tuple[int, float, float, float, float, bool]:
    """The torch op's transform, low, high, offset, temperature and reduce."""
    if parametrization not in TRANSFORMS:
        raise ValueError(
            f"gaussian_sample: parametrization is {parametrization!r}, "
            f"expected one of {', '.join(TRANSFORMS)}"
        )
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"gaussian_sample: reduction is {reduction!r}, expected one of {', '.join(_REDUCTIONS)}"
        )
    low, high = -math.inf, math.inf
    if clamp is not None:
        if parametrization not in ("logvar", "logsigma"):
            raise ValueError(
                f"gaussian_sample: clamp is {clamp} for parametrization {parametrization!r}, expected None "
                "(only logvar and logsigma are clamped)"
            )
        if not isinstance(clamp, tuple) or len(clamp) != 2 or not clamp[0] <= clamp[1]:
            raise ValueError(f"gaussian_sample: clamp is {clamp}, expected (low, high) with low <= high")
        low, high = map(float, clamp)
    if offset is None:
        offset = _DEFAULT_OFFSET.get(parametrization, 0.0)
    elif parametrization not in _DEFAULT_OFFSET or not 0 <= offset < math.inf:
        raise ValueError(
            f"gaussian_sample: offset is {offset} for parametrization {parametrization!r}, expected a finite "
            f"number >= 0, for {' or '.join(_DEFAULT_OFFSET)} only"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"gaussian_sample: temperature is {temperature}, expected a finite number > 0")
    return TRANSFORMS[parametrization], low, high, float(offset), float(temperature), reduction != "none"


_checked_settings = functools.lru_cache(maxsize=256)(_check_settings)


def _check_noise(
    mean: Tensor, noise: Any, key: Any, rng: str, generator: Any
) -> tuple[Tensor | None, Tensor | None]:
    """The noise or the key to use, drawn where neither was given."""
    if (noise is not None) + (key is not None) + (generator is not None) > 1:
        raise ValueError(
            "gaussian_sample: more than one of noise, key and generator is given, expected one at most"
        )
    if rng not in ("philox", "torch"):
        raise ValueError(f"gaussian_sample: rng is {rng!r}, expected 'philox' or 'torch'")
    if noise is not None:
        if not isinstance(noise, Tensor) or noise.dtype != mean.dtype:
            got = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
            raise TypeError(f"gaussian_sample: noise is {got}, expected a {mean.dtype} tensor, as mean")
        if noise.shape != mean.shape or noise.device != mean.device:
            raise ValueError(
                f"gaussian_sample: noise has shape {tuple(noise.shape)} on {noise.device}, expected "
                f"{tuple(mean.shape)} on {mean.device}"
            )
        if noise.requires_grad:
            raise ValueError("gaussian_sample: noise requires a gradient, expected one that does not")
        return noise, None
    if key is not None:
        check_key(key, mean.shape, "gaussian_sample")
        if key.device != mean.device:
            raise ValueError(f"gaussian_sample: key is on {key.device}, expected {mean.device}, as mean")
        return None, key
    if isinstance(generator, (list, tuple)) and len(generator) != (mean.shape[0] if mean.dim() else 0):
        raise ValueError(
            f"gaussian_sample: generator has {len(generator)} entries, expected one for each of the samples "
            f"of mean, shape {tuple(mean.shape)}"
        )
    if rng == "torch":
        return torch_noise(mean, generator), None
    return None, draw_key(mean.device, generator)


def torch_noise(like: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
    """The noise that eager code would draw with ``torch.randn``: shape, dtype and device of ``like``.

    A list of generators draws one sample each; a CPU generator draws on the CPU for any device.
    """
    if isinstance(generator, (list, tuple)):
        rows = [torch_noise(row[None], g) for row, g in zip(like, generator, strict=True)]
        return torch.cat(rows) if rows else torch.empty_like(like)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"gaussian_sample: generator is {type(generator).__name__}, expected a torch.Generator or a list "
            "of them"
        )
    device = like.device if generator is None else generator.device
    return torch_normal(like.shape, generator=generator, dtype=like.dtype, device=device).to(like.device)
