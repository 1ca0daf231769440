"""Losses, samplers and distributions of discretized logistics, of the structures that repositories have."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def _log_mass(x, means, log_scales, half=1 / 255, last=0.999):
    """Of the level at x: the logistic's mass, with the tails, or density times width where that is small."""
    inverse = torch.exp(-log_scales)
    upper, lower, middle = ((x - means + shift) * inverse for shift in (half, -half, 0.0))
    mass = torch.sigmoid(upper) - torch.sigmoid(lower)
    density = middle - log_scales - 2 * F.softplus(middle) + math.log(2 * half)
    inside = torch.where(mass > 1e-5, mass.clamp(min=1e-12).log(), density)
    return torch.where(x < -0.999, F.logsigmoid(upper), torch.where(x > last, F.logsigmoid(-lower), inside))


def _split(params, channels):
    """Channels last: logits [..., K], and [..., C, K] each of means, log-scales and coefficients."""
    each = 3 if channels > 1 else 2
    mixtures = params.shape[-1] // (1 + each * channels)
    rest = params[..., mixtures:].reshape(*params.shape[:-1], channels, each, mixtures)
    return params[..., :mixtures], *rest.unbind(-2)


def _log_likelihood(x, params, half=1 / 255):
    """Of images [B, H, W, C]: [B, H, W]."""
    logits, means, log_scales, *more = _split(params, x.shape[-1])
    x = x.unsqueeze(-1)
    if more:
        a, b, c = torch.tanh(more[0]).unbind(-2)
        red, green, _ = x.unbind(-2)
        shift = torch.stack([torch.zeros_like(a), a * red, b * red + c * green], -2)
        means = means + shift
    terms = _log_mass(x, means, log_scales.clamp(min=-7.0), half).sum(-2)
    return torch.logsumexp(terms + logits.log_softmax(-1), -1)


def _draw(params, channels, mixtures):
    """[B, H, W, C], of two arrays of uniforms."""
    logits, means, log_scales, *more = _split(params, channels)
    gumbel = -torch.log(-torch.log(torch.empty(logits.shape).uniform_(1e-5, 1.0 - 1e-5)))
    chosen = F.one_hot((logits + gumbel).argmax(-1), mixtures).to(params.dtype).unsqueeze(-2)
    mean = (means * chosen).sum(-1)
    scale = (log_scales * chosen).sum(-1).clamp(min=-7.0).exp()
    u = torch.empty(mean.shape).uniform_(1e-5, 1.0 - 1e-5)
    values = list((mean + scale * (u.log() - (1 - u).log())).unbind(-1))
    values[0] = values[0].clamp(-1, 1)
    if more:
        a, b, c = (torch.tanh(more[0]) * chosen).sum(-1).unbind(-1)
        values[1] = (values[1] + a * values[0]).clamp(-1, 1)
        values[2] = (values[2] + b * values[0] + c * values[1]).clamp(-1, 1)
    return torch.stack(values, -1)


def discretized_mix_logistic_loss(x, l):  # noqa: E741
    """Channels first, RGB, summed over everything."""
    return -_log_likelihood(x.permute(0, 2, 3, 1), l.permute(0, 2, 3, 1)).sum()


def discretized_mix_logistic_loss_1d(x, l):  # noqa: E741
    """Grey."""
    return -_log_likelihood(x.permute(0, 2, 3, 1), l.permute(0, 2, 3, 1)).sum()


def sample_from_discretized_mix_logistic(l, nr_mix):  # noqa: E741
    return _draw(l.permute(0, 2, 3, 1), 3, nr_mix).permute(0, 3, 1, 2)


def sample_from_discretized_mix_logistic_1d(l, nr_mix):  # noqa: E741
    return _draw(l.permute(0, 2, 3, 1), 1, nr_mix).permute(0, 3, 1, 2)


def mix_logistic_bits(pred, data, per_pixel=False):
    """Channels last, the image second, in bits."""
    bits = -_log_likelihood(data, pred) / math.log(2)
    return bits if per_pixel else bits.mean()


def low_bit_mix_logistic_loss(x, l, low_bit=False):  # noqa: E741
    """Channels last, the mean over the values of each sample."""
    nll = -_log_likelihood(x, l, 1 / 31 if low_bit else 1 / 255)
    return nll.sum(dim=[1, 2]) / np.prod(x.shape[1:])


def sample_mix_logistic_last(l, nr_mix):  # noqa: E741
    return _draw(l, 3, nr_mix)


def mix_logistic_wide_loss(x, l):  # noqa: E741
    """Log-scales have another bound."""
    return discretized_mix_logistic_loss(x, l.clamp(min=-3.0))


def sample_mix_logistic_unclamped(l, nr_mix):  # noqa: E741
    return 1.5 * _draw(l.permute(0, 2, 3, 1), 3, nr_mix).permute(0, 3, 1, 2)


class OutputNet(nn.Module):
    """A 1x1 convolution with the likelihood of its output, as VDVAE's."""

    def __init__(self, width=16, mixtures=4, low_bit=False):
        super().__init__()
        self.mixtures, self.low_bit = mixtures, low_bit
        self.out_conv = nn.Conv2d(width, 10 * mixtures, 1)

    def forward(self, z):
        return self.out_conv(z).permute(0, 2, 3, 1)

    def nll(self, z, x):
        return low_bit_mix_logistic_loss(x=x, l=self.forward(z), low_bit=self.low_bit)

    def sample(self, z):
        image = sample_mix_logistic_last(self.forward(z), self.mixtures)
        return ((image + 1.0) * 127.5).detach().clamp(0, 255).numpy().astype(np.uint8)

    def both(self, z, x):
        sampled = sample_mix_logistic_last(self.forward(z), self.mixtures)
        return low_bit_mix_logistic_loss(x, self.forward(z)), sampled


class OtherNet(OutputNet):
    def nll(self, z, x):
        return mix_logistic_wide_loss(x.permute(0, 3, 1, 2), self.out_conv(z))


class Normal:
    """Mean and log-sigma softly clamped to (-5, 5); the noise is overwritten with the sample."""

    def __init__(self, mu, log_sigma, temp=1.0):
        self.mu = 5.0 * torch.tanh(mu / 5.0)
        self.sigma = torch.exp(5.0 * torch.tanh(log_sigma / 5.0)) + 1e-2
        if temp != 1.0:
            self.sigma *= temp

    def sample(self):
        eps = self.mu.mul(0).normal_()
        z = eps.mul_(self.sigma).add_(self.mu)
        return z, eps

    def log_p(self, z):
        return -0.5 * ((z - self.mu) / self.sigma).square() - 0.5 * np.log(2 * np.pi) - self.sigma.log()

    def kl(self, other):
        shift, ratio = (self.mu - other.mu) / other.sigma, self.sigma / other.sigma
        return 0.5 * (shift * shift + ratio * ratio) - 0.5 - torch.log(ratio)


class WiderNormal(Normal):
    def __init__(self, mu, log_sigma):
        super().__init__(2 * mu, log_sigma)

    def sample(self):
        return super().sample()

    def kl(self, other):
        return super().kl(other)


class DiscLogistic:
    def __init__(self, param):
        self.means, log_scales = param.chunk(2, dim=1)
        self.log_scales = log_scales.clamp(min=-8.0)

    def log_prob(self, samples):
        assert samples.min() >= 0
        assert samples.max() <= 1
        return _log_mass(2 * samples - 1, self.means, self.log_scales, last=0.99)

    def sample(self):
        u = torch.empty(self.means.size()).uniform_(1e-5, 1.0 - 1e-5).cuda()
        x = self.means + self.log_scales.exp() * (u.log() - (1 - u).log())
        return x.clamp(-1, 1) / 2 + 0.5


class DiscMixLogistic:
    """RGB, channels first, of values in [0, 1]; the last level but one takes the tail too."""

    def __init__(self, param, num_mix=10, num_bits=8):
        assert param.shape[1] == 10 * num_mix
        self.logit_probs, self.half = param[:, :num_mix], 1 / (2**num_bits - 1)
        blocks = param[:, num_mix:].unflatten(1, (3, 3, num_mix))
        self.means, log_scales, coeffs = blocks.unbind(2)
        self.log_scales, self.coeffs = log_scales.clamp(min=-7.0), coeffs.tanh()

    def log_prob(self, samples):
        assert samples.min() >= 0
        assert samples.max() <= 1
        x = (2 * samples - 1).unsqueeze(2)
        a, b, c = self.coeffs.unbind(1)
        red, green, _ = x.unbind(1)
        means = self.means + torch.stack([0 * a, a * red, b * red + c * green], 1)
        terms = _log_mass(x, means, self.log_scales, self.half, 0.99).sum(1)
        return torch.logsumexp(terms + self.logit_probs.log_softmax(1), 1)

    def sample(self, t=1.0):
        u = torch.empty(self.logit_probs.size()).uniform_(1e-5, 1.0 - 1e-5).cuda()
        chosen = F.one_hot((self.logit_probs / t - torch.log(-u.log())).argmax(1), u.shape[1])
        chosen = chosen.movedim(-1, 1).unsqueeze(1)
        mean, log_scale, coeffs = ((v * chosen).sum(2) for v in (self.means, self.log_scales, self.coeffs))
        u = torch.empty(mean.size()).uniform_(1e-5, 1.0 - 1e-5).cuda()
        x = list((mean + log_scale.exp() / t * (u.log() - (1 - u).log())).unbind(1))
        x[0] = x[0].clamp(-1, 1)
        x[1] = (x[1] + coeffs[:, 0] * x[0]).clamp(-1, 1)
        x[2] = (x[2] + coeffs[:, 1] * x[0] + coeffs[:, 2] * x[1]).clamp(-1, 1)
        return torch.stack(x, 1) / 2 + 0.5

    def mean(self):
        return (self.means * self.logit_probs.softmax(1).unsqueeze(1)).sum(2)


class HierarchicalVAE(nn.Module):
    """A posterior and a prior of NVAE's form, and a mixture of logistics for each pixel."""

    def __init__(self, latent=4, mixtures=3):
        super().__init__()
        self.latent, self.mixtures = latent, mixtures
        self.encoder = nn.Conv2d(3, 2 * latent, 3, padding=1)
        self.prior = nn.Parameter(0.1 * torch.randn(1, 2 * latent, 8, 8))
        self.decoder = nn.Conv2d(latent, 10 * mixtures, 3, padding=1)

    def forward(self, x):
        mu, log_sigma = self.encoder(x).chunk(2, 1)
        q = Normal(mu, log_sigma)
        z, _ = q.sample()
        prior = self.prior.expand(len(x), -1, -1, -1).chunk(2, 1)
        p = Normal(*prior)
        return self.decoder_output(self.decoder(z)), q.kl(p).sum((1, 2, 3)), q.log_p(z).sum((1, 2, 3))

    def decoder_output(self, logits):
        return DiscMixLogistic(logits, self.mixtures, num_bits=8)

    def loss(self, x):
        output, kl, log_q = self(x)
        return kl - output.log_prob(x).sum((1, 2)) + 0 * log_q
