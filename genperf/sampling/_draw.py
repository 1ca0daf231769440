"""Drawing a pixel's values, in torch: the specification for every executor.

``csrc/pixel_sampler/head.h`` is the same arithmetic in C++ and float32, with the same decisions but for the
rounding of the elementary functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genperf.ops._inverse_cdf import choose, excluded
from genperf.ops._mixture_logistic_reference import draw_values
from genperf.ops.philox_random import philox_random
from genperf.sampling._program import Head, HeadKind


def make_noise(
    head: Head, key: Tensor, images: Tensor | Sequence[int], device: torch.device | str | None = None
) -> Tensor:
    """Random numbers for the drawing of some images, which depend on the key and each image's index alone.

    Args:
        head: of the program.
        key: int64 [2], (seed, offset), see :func:`genperf.ops.draw_key`.
        images: indices of the images, int64 [B]: image i has the key (seed, offset + i).
        device: where the result is wanted; the key's by default.

    Returns:
        float32 [B, rows, cols, noises]: standard normals for a Gaussian head, else multiples of 2**-25 in
        [2**-25, 1], whatever the batch, the number of ranks and the device.
    """
    key = key.to(device)
    images = torch.as_tensor(images, dtype=torch.int64, device=key.device)
    keys = torch.stack([key[0].expand_as(images), key[1] + images], dim=1)
    distribution = "normal" if head.kind == HeadKind.GAUSSIAN else "uniform"
    return philox_random((len(images), head.rows, head.cols, head.noises), keys, distribution)


def draw(
    head: Head,
    params: Tensor,
    noise: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    index: int = 0,
    known: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The values of one draw of one pixel, for every image.

    Args:
        head: of the program; any but a callback.
        params: [B, P], the network's output at the pixel. Computed in float64 if it is that, else float32.
        noise: float32 [B, noises] of the pixel, see :func:`make_noise`.
        temperature: positive. Divides logits; multiplies the scale of a Gaussian and of logistics.
        top_k: of a categorical head, the number of classes kept, ties to the lowest index; 0 keeps all.
        index: number of the draw in the pixel, below ``head.draws``.
        known: values [B, head.values] of the pixel and a bool mask [B, head.values]: where it holds, the
            value is the known one, also in the means of the image channels after it.

    Returns:
        Values [B, head.values // head.draws].
    """
    params = params if params.dtype == torch.float64 else params.float()
    if head.kind == HeadKind.LOGISTIC_MIXTURE:
        return _draw_mixture(head, params, noise, temperature, known)
    at = index * head.stride_draw
    u = noise[:, index].to(params.dtype)
    if head.kind == HeadKind.CATEGORICAL:
        chosen, _ = choose(_logits(head, params, index), u, temperature, top_k)
        value = chosen.to(params.dtype)
    elif head.kind == HeadKind.BERNOULLI:
        value = (u <= torch.sigmoid(params[:, at] / temperature)).to(params.dtype)
    elif head.kind == HeadKind.GAUSSIAN:
        value = params[:, at] + params[:, at + head.stride_class].exp() * temperature * u
    else:
        raise ValueError("draw: a callback head draws nothing itself")
    if known is not None:
        value = torch.where(known[1][:, index], known[0][:, index].to(value.dtype), value)
    return value[:, None]


def margin(
    head: Head, params: Tensor, noise: Tensor, temperature: float = 1.0, top_k: int = 0, index: int = 0
) -> Tensor:
    """How far the choice of :func:`draw` is from another one, in units of the uniform number: float64 [B].

    A change of every logit by at most e moves the margin by at most e / (2 * temperature). The margin is
    infinite where nothing is chosen, or where there is nothing else to choose.
    """
    params, u = params.double(), noise[:, index].double()
    if head.kind == HeadKind.BERNOULLI:
        return (torch.sigmoid(params[:, index * head.stride_draw] / temperature) - u).abs()
    if head.kind == HeadKind.CATEGORICAL:
        logits = _logits(head, params, index)
    elif head.kind == HeadKind.LOGISTIC_MIXTURE:
        logits, top_k = params[:, : head.classes], 0
    else:
        return torch.full_like(u, torch.inf)
    limited = 0 < top_k < head.classes
    kept = logits.masked_fill(excluded(logits, top_k), -torch.inf) if limited else logits
    sums = (kept / temperature).softmax(1).cumsum(1)
    # A boundary lies between two classes of positive probability.
    inner = (sums > 0) & (sums < sums[:, -1:])
    nearest = (sums - u[:, None]).abs().masked_fill(~inner, torch.inf).amin(1)
    if limited:
        best = logits.topk(top_k + 1, 1).values
        gap = torch.where(best[:, -1] == -torch.inf, torch.inf, best[:, -2] - best[:, -1])
        nearest = nearest.minimum(gap / (4 * temperature))
    return nearest


def _logits(head: Head, params: Tensor, index: int) -> Tensor:
    at = index * head.stride_draw
    return params[:, at : at + head.classes * head.stride_class : head.stride_class][:, : head.classes]


def _draw_mixture(
    head: Head, params: Tensor, noise: Tensor, temperature: float, known: tuple[Tensor, Tensor] | None
) -> Tensor:
    k = head.classes
    mixture, valid = choose(params[:, :k], noise[:, 0].to(params.dtype), temperature)
    rest = params[:, k : k + head.values * head.stride_draw]
    return draw_values(rest, mixture, valid, noise[:, 1:], k, temperature, known=known)
