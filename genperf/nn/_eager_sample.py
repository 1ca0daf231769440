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

from genperf.ops.gaussian_sample import (
    TRANSFORMS,
    _backward_op,
    _forward_op,
    _reference_backward,
    torch_noise,
)

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
        return torch.randn(like.shape, dtype=like.dtype, device=device).to(like.device)
    return torch_noise(like, generator)


class _EagerSample(torch.autograd.Function):
    """(mean, scale, noise) -> (z, kl or None); nothing of input size is kept but the inputs."""

    @staticmethod
    def forward(ctx, mean, scale, noise, transform, low, high, want_kl):
        ctx.save_for_backward(mean, scale, None, None, noise, None)
        ctx.settings = (transform, low, high, 0.0, 1.0, True)
        ctx.set_materialize_grads(False)
        if transform == TRANSFORMS["std"]:
            z = torch.mul(scale, noise)
        else:
            z = torch.clamp(scale, low, high) if math.isfinite(low) or math.isfinite(high) else scale.clone()
            if transform == TRANSFORMS["logvar"]:
                z.mul_(0.5)
            z = z.exp_().mul_(noise)
        z.add_(mean)
        if not want_kl:
            return z, None
        kl = _forward_op(mean, scale, None, None, None, None, *ctx.settings, False, True, False)[1]
        return z, kl

    @staticmethod
    def backward(ctx, grad_z, grad_kl):
        if grad_z is None and grad_kl is None:
            return (None,) * 7
        # With create_graph=True the formulas themselves are differentiated.
        run = _reference_backward if torch.is_grad_enabled() else _backward_op
        grad_mean, grad_scale, _, _ = run(grad_z, grad_kl, None, *ctx.saved_tensors, *ctx.settings)
        return grad_mean, grad_scale, *(None,) * 5


def eager_sample(
    mean: Tensor,
    scale: Tensor,
    noise: Tensor,
    *,
    parametrization: str = "logvar",
    clamp: Bounds | None = None,
    kl: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``mean + sigma * noise`` with the bits of eager torch, and KL [B] to the standard normal or None.

    ``mean``, ``scale`` and ``noise`` [B, *] have one shape and dtype; ``parametrization`` is "logvar",
    "logsigma" or "std", as in :func:`genperf.ops.gaussian_sample`. Gradients come from one launch of
    the fused backward kernel; a second differentiation is supported. Where neither the kernel's backward
    nor its divergence can pay (few elements, or a std, whose gradient is one product), the operations
    are left to autograd.
    """
    if not kl and (parametrization == "std" or mean.numel() < FEW_ELEMENTS):
        if parametrization != "std":
            scale = scale if clamp is None else torch.clamp(scale, *clamp)
            scale = torch.exp(0.5 * scale if parametrization == "logvar" else scale)
        return mean + scale * noise, None
    low, high = clamp or (-math.inf, math.inf)
    return _EagerSample.apply(mean, scale, noise, TRANSFORMS[parametrization], low, high, kl)
