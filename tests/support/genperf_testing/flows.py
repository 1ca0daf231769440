"""Steps of Glow written out in plain torch, as its public implementations have them, and small flows to
test."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genperf.nn.flows import CouplingNet, GlowStep, ReversibleSequence, ZeroConv2d


class EagerStep(nn.Module):
    """ActNorm, 1x1 convolution and affine coupling, one torch operation after another."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.register_buffer("initialized", torch.ones((), dtype=torch.uint8))
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels)).Q[:, :, None, None])
        self.first = nn.Conv2d(channels // 2, hidden, 3, padding=1)
        self.second = nn.Conv2d(hidden, hidden, 1)
        self.last = nn.Conv2d(hidden, channels, 3)
        self.zero_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        positions = x.shape[2] * x.shape[3]
        assert self.initialized.item() == 1  # as public implementations ask at each call
        y = self.log_scale.exp() * (x + self.loc)
        logdet = positions * self.log_scale.sum()
        y = F.conv2d(y, self.weight)
        logdet = logdet + positions * torch.slogdet(self.weight.squeeze().double())[1].to(x.dtype)
        a, b = y.chunk(2, 1)
        h = F.relu(self.first(a), inplace=True)
        h = F.relu(self.second(h), inplace=True)
        h = self.last(F.pad(h, [1, 1, 1, 1], value=1)) * torch.exp(self.zero_scale * 3)
        log_s, t = h.chunk(2, 1)
        s = torch.sigmoid(log_s + 2)
        return torch.cat([a, (b + t) * s], 1), logdet + torch.log(s).flatten(1).sum(1)


class EagerSequence(nn.Module):
    def __init__(self, n: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(EagerStep(channels, hidden) for _ in range(n))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for step in self.steps:
            x, logdet = step(x)
            total = total + logdet
        return x, total


def same_parameters(eager: EagerStep, step: GlowStep) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The parameters of both, in pairs; shapes differ by dimensions of 1."""
    net = step.coupling.net
    assert isinstance(net, CouplingNet)
    return [
        (eager.loc, step.actnorm.shift), (eager.log_scale, step.actnorm.log_scale),
        (eager.weight, step.conv.weight), (eager.zero_scale, net.out.scale),
        (eager.first.weight, net.conv1.weight), (eager.first.bias, net.conv1.bias),
        (eager.second.weight, net.conv2.weight), (eager.second.bias, net.conv2.bias),
        (eager.last.weight, net.out.weight), (eager.last.bias, net.out.bias),
    ]  # fmt: skip


def as_eager(sequence: ReversibleSequence, channels: int, hidden: int) -> EagerSequence:
    """The same steps in plain torch, with the same numbers."""
    eager = EagerSequence(len(sequence), channels, hidden)
    with torch.no_grad():
        for theirs, ours in zip(eager.steps, sequence, strict=True):
            for a, b in same_parameters(theirs, ours):
                a.copy_(b.view(a.shape))
    return eager


def trained(module: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters away from where they start, as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if hasattr(part, "initialized"):
                part.initialized.fill_(1)
                part.shift.normal_(0, 0.1, generator=generator)
                part.log_scale.normal_(0, 0.1, generator=generator)
            if isinstance(part, ZeroConv2d):
                part.weight.normal_(0, 0.01, generator=generator)
                part.bias.normal_(0, 0.05, generator=generator)
                part.scale.normal_(0, 0.05, generator=generator)
            if getattr(part, "permutation", None) == "dense":
                noise = torch.randn(part.weight.shape, generator=generator, dtype=torch.float32)
                part.weight.add_(0.05 * noise)
    return module


def sequence(
    n: int = 3, channels: int = 6, hidden: int = 8, *, permutation: str = "dense", order: str | None = None,
    **options: object,
) -> ReversibleSequence:  # fmt: skip
    """Steps of Glow with numbers as training leaves them."""
    made = {} if order is None else {"order": order}
    torch.manual_seed(0)
    steps = [GlowStep(channels, hidden=hidden, permutation=permutation, **made) for _ in range(n)]
    return trained(ReversibleSequence(steps, **options))
