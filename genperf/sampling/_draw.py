"""Drawing a pixel's values, in torch: the specification for every executor.

``csrc/pixel_sampler/head.h`` is the same arithmetic in C++ and float32, with the same decisions but for the
rounding of the elementary functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genperf.ops.philox_random import philox_random
from genperf.sampling._program import Head, HeadKind

LEAF = 16  # classes that are summed together, and sums that are summed together in turn
MIN_LOG_SCALE = -7.0
# As float32, so that the same uniform gives the same logistic number in float32 and in float64.
_CLAMP = tuple(torch.tensor([1e-5, 1 - 1e-5], dtype=torch.float32).tolist())


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
        chosen, _ = _choose(_logits(head, params, index), u, temperature, top_k)
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
    kept = logits.masked_fill(_excluded(logits, top_k), -torch.inf) if limited else logits
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


def _excluded(logits: Tensor, top_k: int) -> Tensor:
    """Which of logits [B, K] are not among the ``top_k`` largest, of equal ones the first. NaN is kept."""
    least = logits.topk(top_k, 1).values[:, -1:]
    ties = logits == least
    room = top_k - (logits > least).sum(1, keepdim=True)
    return (logits < least) | (ties & (ties.cumsum(1) > room))


def _choose(logits: Tensor, u: Tensor, temperature: float, top_k: int) -> tuple[Tensor, Tensor]:
    """The class of logits [B, K] at which the running sum of weights reaches ``u`` times their sum.

    Weights are ``exp((logit - max) / temperature)``. They are the leaves of a tree: 16 neighbours are
    summed, j + 8 to j, then j + 4 to j, j + 2 and j + 1; then 16 neighbouring sums, and so on. From the
    root down, the running sum goes in float64 over the 16 children one by one, starting from that of all
    before the parent, to the first at which it reaches ``u * sum``; where rounding lets it reach that at
    none, to the last positive one.

    Returns the class, and whether there was anything to choose from (else the class is 0).
    """
    weights = ((logits - logits.amax(1, keepdim=True)) / temperature).exp()
    if 0 < top_k < logits.shape[1]:
        weights = weights.masked_fill(_excluded(logits, top_k), 0.0)
    levels = [_padded(weights)]
    while levels[-1].shape[1] > LEAF:
        levels.append(_padded(_sum_neighbours(levels[-1])))
    total = _sum_neighbours(levels[-1])
    valid = total[:, 0] >= 1.0  # the largest logit's weight is 1; the sum of NaN is NaN
    target = u.double()[:, None] * total.double()
    chosen, before = torch.zeros_like(target, dtype=torch.int64), torch.zeros_like(target)
    position = torch.arange(LEAF, device=u.device)
    for level in reversed(levels):
        children = level.gather(1, chosen * LEAF + position)
        running = torch.cat([before, children], 1).cumsum(1)
        short = (running[:, 1:] < target).sum(1, keepdim=True)
        child = short.minimum(((children > 0) * position).amax(1, keepdim=True))
        before = running.gather(1, child)
        chosen = chosen * LEAF + child
    return torch.where(valid, chosen[:, 0], 0), valid


def _padded(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[1] % LEAF))


def _sum_neighbours(x: Tensor) -> Tensor:
    x = x.view(len(x), -1, LEAF)
    while (half := x.shape[2] // 2) > 0:
        x = x[:, :, :half] + x[:, :, half:]
    return x[:, :, 0]


def _draw_mixture(
    head: Head, params: Tensor, noise: Tensor, temperature: float, known: tuple[Tensor, Tensor] | None
) -> Tensor:
    batch, mixtures, block = len(params), head.classes, head.stride_draw
    u = noise[:, 1:].clamp(*_CLAMP).to(params.dtype)
    mixture, valid = _choose(params[:, :mixtures], noise[:, 0].to(params.dtype), temperature, 0)
    rest = params[:, mixtures : mixtures + head.values * block]
    rest = rest.reshape(batch, head.values, -1, mixtures)
    # [B, image channels, mean | log-scale | coefficient] of the chosen mixture
    chosen = rest[torch.arange(batch, device=params.device), :, :, mixture]
    scale = chosen[:, :, 1].clamp(min=MIN_LOG_SCALE).exp() * temperature
    deviation = scale * (u.log() - (1.0 - u).log())
    values: list[Tensor] = []
    for c in range(head.values):
        mean = chosen[:, c, 0]
        for before, value in enumerate(values):  # coefficients 0; 1 and 2
            mean = mean + torch.tanh(chosen[:, c - 1 + before, 2]) * value
        value = (mean + deviation[:, c]).clamp(-1.0, 1.0).masked_fill(~valid, torch.nan)
        if known is not None:
            value = torch.where(known[1][:, c], known[0][:, c].to(value.dtype), value)
        values.append(value)
    return torch.stack(values, 1)
