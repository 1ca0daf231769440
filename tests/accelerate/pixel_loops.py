"""Small models with loops that draw pixel by pixel, as repositories write them."""

import torch
import torch.nn.functional as F
from torch import nn

from genperf.nn.autoregressive import GatedPixelCNN, GatedPixelCNNRGB


def randomised(model, gain=1.5):
    """The model with weights large enough that its logits differ, in eval mode."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, gain / max(1.0, p[0].numel() ** 0.5) if p.dim() > 1 else 0.3)
    return model.eval()


class Masked(nn.Conv2d):
    """Looks at pixels before (A), or also at the pixel itself (B)."""

    def __init__(self, kind, ins, outs, size=3):
        super().__init__(ins, outs, size, padding=size // 2)
        mask = torch.ones(size, size)
        mask[size // 2, size // 2 + (kind == "B") :] = 0
        mask[size // 2 + 1 :] = 0
        self.register_buffer("mask", mask.expand_as(self.weight).clone())

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class Codes(GatedPixelCNN):
    """Class indices, with labels."""

    def __init__(self):
        super().__init__(input_dim=7, dim=8, n_layers=2, n_classes=5)

    def generate(self, label, shape=(8, 8), batch_size=64):
        codes = torch.zeros(batch_size, *shape, dtype=torch.int64, device=next(self.parameters()).device)
        for i in range(shape[0]):
            for j in range(shape[1]):
                logits = self.forward(codes, label)
                p = F.softmax(logits[:, :, i, j], -1)
                codes.data[:, i, j].copy_(p.multinomial(1).squeeze().data)
        return codes


class Colours(GatedPixelCNNRGB):
    """Levels as floats, one channel after another; the labels are drawn where none is given."""

    def __init__(self):
        super().__init__(color_levels=5, hidden_fmaps=12, hidden_layers=1, out_hidden_fmaps=9)
        self.levels = 5

    def sample(self, shape, count, label=None, device="cuda"):
        images = torch.zeros(count, *shape).to(device)
        if label is None:
            labels = torch.randint(high=10, size=(count,)).to(device)
        else:
            labels = (label * torch.ones(count)).to(device).long()
        with torch.no_grad():
            for i in range(shape[1]):
                for j in range(shape[2]):
                    for c in range(shape[0]):
                        logits = self.forward(images, labels)
                        p = torch.softmax(logits[:, :, c, i, j], dim=1)
                        level = torch.multinomial(p, 1).squeeze().float()
                        images[:, c, i, j] = level / (self.levels - 1)
        return images


class Stack(nn.Module):
    """A masked stack on floats; ``output`` makes what it gives of the logits."""

    def __init__(self, ins=1, outs=1, norm=False, output=lambda y: y):
        super().__init__()
        self.layers = nn.Sequential(Masked("A", ins, 6, 5), nn.ReLU(), Masked("B", 6, 6), nn.ReLU())
        if norm:
            self.layers.append(nn.BatchNorm2d(6))
        self.last = nn.Conv2d(6, outs, 1)
        self.output = output

    def forward(self, x):
        return self.output(self.last(self.layers(x)))


class Base(nn.Module):
    """Holds its network as ``net``; the image is 1 where a Bernoulli variable is."""

    size = (6, 6)

    def __init__(self, **options):
        super().__init__()
        self.net = Stack(**options)
        self.calls = []

    def logits(self, x):
        return self.net(x)


class Bits(Base):
    @torch.no_grad()
    def sample(self, n=4, height=6, width=6):
        self.calls.append(n)
        x = torch.zeros(n, 1, height, width)
        for row in range(height):
            for col in range(width):
                p = torch.sigmoid(self.net(x)[:, :, row, col])
                x[:, :, row, col] = torch.bernoulli(p)
        return x, x.mean()


class Warm(Base):
    """With a temperature; draws class indices and gives the network one-channel floats."""

    def __init__(self):
        super().__init__(outs=4)

    def sample(self, n, temperature=1.0, start=None):
        x = torch.zeros(n, 1, *self.size) if start is None else start.clone()
        with torch.no_grad():
            for i in range(self.size[0]):
                for j in range(self.size[1]):
                    if start is not None and start[0, 0, i, j] > 0:
                        continue
                    logits = self.net(x)[:, :, i, j] / temperature
                    x[:, 0, i, j] = torch.distributions.Categorical(logits=logits).sample().float()
        return x


class Named(Bits):
    """The network gives a mapping, or a tuple."""

    def __init__(self, kind):
        outputs = {"dict": lambda y: {"logits": y, "count": 3}, "tuple": lambda y: (y, None)}
        super().__init__(output=outputs[kind])
        self.key = {"dict": "logits", "tuple": 0}[kind]

    @torch.no_grad()
    def sample(self, n=4):
        x = torch.zeros(n, 1, 5, 6)
        for i in range(5):
            for j in range(6):
                x[:, :, i, j] = torch.bernoulli(self.net(x)[self.key][:, :, i, j].sigmoid())
        return x


class AllChannels(Base):
    """One call of the network for the three channels of a pixel."""

    def __init__(self):
        super().__init__(ins=3, outs=12)

    def sample(self, n):
        x = torch.zeros(n, 3, *self.size)
        for i in range(self.size[0]):
            for j in range(self.size[1]):
                logits = self.net(x)[:, :, i, j].view(n, 3, 4)
                for c in range(3):
                    x[:, c, i, j] = logits[:, c].softmax(1).multinomial(1)[:, 0].float() / 3
        return x


class Columns(Base):
    """Column by column: another order than that in which a row-major stack is causal."""

    @torch.no_grad()
    def sample(self, n=2):
        x = torch.zeros(n, 1, *self.size)
        for j in range(self.size[1]):
            for i in range(self.size[0]):
                x[:, :, i, j] = torch.bernoulli(self.net(x)[:, :, i, j].sigmoid())
        return x


class Sees(Base):
    """Its network looks at all neighbours."""

    def __init__(self):
        super().__init__()
        self.net.layers[2] = nn.Conv2d(6, 6, 3, padding=1)

    sample = Bits.sample


class Scales(Base):
    """Writes to what its network gives."""

    @torch.no_grad()
    def sample(self, n=2):
        x = torch.zeros(n, 1, *self.size)
        for i in range(self.size[0]):
            for j in range(self.size[1]):
                logits = self.net(x).mul_(0.7)
                x[:, :, i, j] = torch.bernoulli(logits[:, :, i, j].sigmoid())
        return x


class Peeks(Base):
    """Reads the output at the last pixel each time."""

    @torch.no_grad()
    def sample(self, n=2):
        x = torch.zeros(n, 1, *self.size)
        for i in range(self.size[0]):
            for j in range(self.size[1]):
                logits = self.net(x)
                x[:, :, i, j] = torch.bernoulli((logits[:, :, i, j] + logits[:, :, -1, -1]).sigmoid())
        return x


class Tracks(Base):
    """Its result has a gradient, which is zero: that of torch.bernoulli."""

    def sample(self, n=2):
        x = torch.zeros(n, 1, *self.size)
        for i in range(self.size[0]):
            for j in range(self.size[1]):
                x[:, :, i, j] = torch.bernoulli(self.net(x)[:, :, i, j].sigmoid())
        return x


class Asks(Base):
    """Takes an argument without which it cannot be tried."""

    @torch.no_grad()
    def sample(self, n, mood):
        x = torch.zeros(n, 1, *self.size)
        for i in range(self.size[0]):
            for j in range(self.size[1]):
                x[:, :, i, j] = torch.bernoulli((mood * self.net(x)[:, :, i, j]).sigmoid())
        return x


class Twice(Base):
    """Two networks, one after the other."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(1, 1, 1)

    @torch.no_grad()
    def sample(self, n=2):
        x = torch.zeros(n, 1, *self.size)
        for i in range(self.size[0]):
            for j in range(self.size[1]):
                x[:, :, i, j] = torch.bernoulli(self.head(self.net(x))[:, :, i, j].sigmoid())
        return x


class Once(nn.Module):
    """No loop over pixels."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)

    def sample(self, n=2):
        x = torch.zeros(n, 4)
        for _ in range(3):
            x = F.one_hot(self.net(x).softmax(1).multinomial(1)[:, 0], 4).float()
        return x
