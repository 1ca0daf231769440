"""The reparameterized sample with the bits of eager torch, and the gradient of the fused kernel.

The standard deviation that a kernel computes and ``torch.exp`` agree to one unit in the last place,
not bit for bit, and ``torch.exp`` itself differs between builds. Where a user is promised eager's
samples, they are therefore computed by the operations eager uses, in place on one buffer, and the
divergence and the whole backward pass by ``genperf::gaussian_sample``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genperf._torch_normal import torch_normal
from genperf.ops._gaussian_sample_checks import torch_noise
from genperf.ops._gaussian_sample_reference import TRANSFORMS, reference_backward
from genperf.ops.gaussian_sample import _backward_op, _forward_op, _joined, _packed_backward_op

#: Below this many elements the calls cost more than the arithmetic.
FEW_ELEMENTS = 1 << 16

Bounds = tuple[float, float]

Generator = torch.Generator | list[torch.Generator] | None


def draw_noise(like: Tensor, generator: Generator = None, device: torch.device | None = None) -> Tensor:
    """Standard normal noise [*like.shape], contiguous, of ``like``'s dtype and on its device.

    The numbers are those of ``torch.randn`` from ``generator``: one generator, or a list with one for
    each sample of the batch (or with one for all, as in diffusers). CPU generators may be used with any
    device; ``device`` says where to draw without a generator (default: ``like``'s).
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) not in (1, like.shape[0]):
            raise ValueError(
                f"generator: a list of {len(generator)} for a batch of {like.shape[0]}; expected "
                f"one generator, or one for each sample"
            )
        return torch_noise(like, generator if len(generator) > 1 else generator[0])
    if generator is None and device is not None:
        return torch_normal(like.shape, generator=None, dtype=like.dtype, device=device).to(like.device)
    return torch_noise(like, generator)


class _EagerSample(torch.autograd.Function):
    """(mean, scale or None, noise) -> (z, kl or empty); nothing of input size is kept but the inputs.

    Without a scale, ``mean`` holds both as its halves along dim 1.
    """

    @staticmethod
    def forward(ctx, mean, scale, noise, transform, low, high, want_kl):
        ctx.save_for_backward(mean, scale, noise)
        ctx.settings = (transform, low, high, 0.0, 1.0, True)
        ctx.want_kl = want_kl
        ctx.set_materialize_grads(False)
        if scale is None:
            mean, scale = mean.chunk(2, 1)
        if transform == TRANSFORMS["std"]:
            z = torch.mul(scale, noise)
        else:
            z = torch.clamp(scale, low, high) if math.isfinite(low) or math.isfinite(high) else scale.clone()
            if transform == TRANSFORMS["logvar"]:
                z.mul_(0.5)
            z = z.exp_().mul_(noise)
        z.add_(mean)
        if not want_kl:
            return z, z.new_empty(0)
        kl = _forward_op(mean, scale, None, None, None, None, *ctx.settings, False, True, False)[1]
        return z, kl

    @staticmethod
    def backward(ctx, grad_z, grad_kl):
        if not ctx.want_kl:
            grad_kl = None
        if grad_z is None and grad_kl is None:
            return (None,) * 7
        mean, scale, noise = ctx.saved_tensors
        # With create_graph=True the formulas themselves are differentiated.
        formulas = torch.is_grad_enabled()
        if scale is None:
            run = _joined(reference_backward) if formulas else _packed_backward_op
            grads = run(grad_z, grad_kl, None, mean, 1, None, None, noise, None, *ctx.settings)
            return grads[0], *(None,) * 6
        run = reference_backward if formulas else _backward_op
        grads = run(grad_z, grad_kl, None, mean, scale, None, None, noise, None, *ctx.settings)
        return *grads[:2], *(None,) * 5


def eager_sample(
    mean: Tensor,
    scale: Tensor | None,
    noise: Tensor,
    *,
    parametrization: str = "logvar",
    clamp: Bounds | None = None,
    kl: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``mean + sigma * noise`` with the bits of eager torch, and KL [B] to the standard normal or None.

    ``mean``, ``scale`` and ``noise`` [B, *] have one shape and dtype; without a scale, ``mean`` [B, 2 C, *]
    holds both as its halves along dim 1. ``parametrization`` is "logvar",
    "logsigma" or "std", as in :func:`genperf.ops.gaussian_sample`. Gradients come from one launch of
    the fused backward kernel; a second differentiation is supported. Where neither the kernel's backward
    nor its divergence can pay (few elements, or a std, whose gradient is one product), the operations
    are left to autograd.
    """
    if not kl and (parametrization == "std" or noise.numel() < FEW_ELEMENTS):
        if scale is None:
            mean, scale = mean.chunk(2, 1)
        if parametrization != "std":
            scale = scale if clamp is None else torch.clamp(scale, *clamp)
            scale = torch.exp(0.5 * scale if parametrization == "logvar" else scale)
        return mean + scale * noise, None
    low, high = clamp or (-math.inf, math.inf)
    z, divergence = _EagerSample.apply(mean, scale, noise, TRANSFORMS[parametrization], low, high, kl)
    return z, divergence if kl else None
