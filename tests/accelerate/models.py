"""Small models of the structures that accelerate knows, as repositories write them."""

import functools

import numpy as np
import torch
from torch import nn


class DiagonalGaussianDistribution:
    """As in latent-diffusion, where the noise is drawn on the CPU."""

    def __init__(self, parameters, deterministic=False):
        self.parameters = parameters
        self.mean, self.logvar = torch.chunk(parameters, 2, dim=1)
        self.logvar = torch.clamp(self.logvar, -30.0, 20.0)
        self.deterministic = deterministic
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)
        if self.deterministic:
            self.var = self.std = torch.zeros_like(self.mean).to(device=self.parameters.device)

    def sample(self):
        return self.mean + self.std * torch.randn(self.mean.shape).to(device=self.parameters.device)

    def kl(self, other=None):
        if self.deterministic:
            return torch.Tensor([0.0])
        if other is None:
            return 0.5 * torch.sum(torch.pow(self.mean, 2) + self.var - 1.0 - self.logvar, dim=[1, 2, 3])
        return 0.5 * torch.sum(
            torch.pow(self.mean - other.mean, 2) / other.var
            + self.var / other.var
            - 1.0
            - self.logvar
            + other.logvar,
            dim=[1, 2, 3],
        )

    def nll(self, sample, dims=(1, 2, 3)):
        if self.deterministic:
            return torch.Tensor([0.0])
        return 0.5 * torch.sum(
            np.log(2.0 * np.pi) + self.logvar + torch.pow(sample - self.mean, 2) / self.var, dim=dims
        )

    def mode(self):
        return self.mean


class ScaledGaussianDistribution(DiagonalGaussianDistribution):
    """Looks like the other, and samples something else."""

    def sample(self):
        return self.mean + 2 * self.std * torch.randn(self.mean.shape)


def logged(method):
    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        self.calls += 1
        return method(self, *args, **kwargs)

    return wrapper


class LatentAutoencoder(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.calls = 0
        self.encoder = nn.Conv2d(3, 2 * channels, 3, padding=1)
        self.decoder = nn.Conv2d(channels, 3, 3, padding=1)

    @logged
    def encode(self, x) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(self.encoder(x))

    def decode(self, z):
        return self.decoder(z)

    def forward(self, x):
        posterior = self.encode(x)
        return self.decode(posterior.sample()), posterior.kl()


class ScaledAutoencoder(LatentAutoencoder):
    def encode(self, x):
        return ScaledGaussianDistribution(self.encoder(x))


class LinearVAE(nn.Module):
    """The structure of pytorch/examples: reparameterize, and the divergence written out in a loss."""

    def __init__(self, features=12, latent=6):
        super().__init__()
        self.encoder = nn.Linear(features, 2 * latent)
        self.decoder = nn.Linear(latent, features)

    def reparameterize(self, mu, logvar):
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def loss_function(self, recon, x, mu, logvar):
        bce = nn.functional.mse_loss(recon, x, reduction="sum")
        kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return bce + kld

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, dim=-1)
        recon = self.decoder(self.reparameterize(mu, logvar))
        return recon, self.loss_function(recon, x, mu, logvar)


class MeanInEval(LinearVAE):
    def reparameterize(self, mu, logvar):
        if self.training:
            std = logvar.mul(0.5).exp_()
            return torch.empty_like(std).normal_().mul(std).add_(mu)
        return mu


class ScaleFirst(LinearVAE):
    def reparametrize(self, log_sigma, mu):
        return mu + torch.exp(log_sigma) * torch.randn(mu.shape, dtype=mu.dtype)

    def reparameterize(self, mu, logvar):
        return self.reparametrize(0.5 * logvar, mu)


class StdAndNoise(LinearVAE):
    def _sample_gauss(self, mu, std):
        eps = torch.randn_like(std)
        return mu + eps * std, eps

    def reparameterize(self, mu, logvar):
        return self._sample_gauss(mu, torch.exp(0.5 * logvar))[0]


class Float32Noise(LinearVAE):
    def reparameterize(self, mu, logvar):
        std = torch.exp(logvar / 2)
        return mu + std * torch.FloatTensor(std.size()).normal_().to(std.device)


class SquareRoot(LinearVAE):
    def reparameterize(self, mu, logvar):
        return mu + torch.sqrt(torch.exp(logvar)) * torch.randn_like(mu)


class Tempered(LinearVAE):
    temperature = 0.5

    def reparameterize(self, mu, logvar):
        return mu + self.temperature * torch.exp(0.5 * logvar) * torch.randn_like(mu)


class Stores(LinearVAE):
    def reparameterize(self, mu, logvar):
        self.mu = mu
        return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


class Detached(LinearVAE):
    def reparameterize(self, mu, logvar):
        return mu + torch.exp(0.5 * logvar).detach() * torch.randn_like(mu)


class ManySamples(LinearVAE):
    def reparameterize(self, mu, logvar, n=1):
        return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


class Divergences(nn.Module):
    """The divergence in the ways that repositories write it."""

    def a(self, mu, log_var):
        return torch.mean(-0.5 * torch.sum(1 + log_var - mu**2 - log_var.exp(), dim=1), dim=0)

    def b(self, mu, log_var):
        return 0.5 * (mu * mu + torch.exp(log_var) - log_var - 1.0).sum(dim=-1)

    def c(self, mu, log_var):
        return -torch.sum(1.0 + log_var - torch.pow(mu, 2) - torch.exp(log_var), [1]) / 2

    def d(self, mu, log_var):
        return torch.sum(mu.square() + log_var.exp() - (1 + log_var), axis=-1) * 0.5

    def e(self, mu, log_var):
        return (1 + log_var - mu.pow(2) - log_var.exp()).sum().mul(-0.5)

    def forward(self, mu, log_var):
        return [self.a(mu, log_var), self.b(mu, log_var), self.c(mu, log_var), self.d(mu, log_var)]


class NotTheDivergence(nn.Module):
    def forward(self, mu, log_var):
        return (
            -0.5 * torch.sum(1 + log_var + mu.pow(2) - log_var.exp(), dim=-1),
            -0.25 * torch.sum(1 + log_var - mu.pow(2) - log_var.exp(), dim=-1),
            -0.5 * torch.sum(1 + log_var - mu.pow(2) - mu.exp(), dim=-1),
            -0.5 * torch.sum(2 + log_var - mu.pow(2) - log_var.exp(), dim=-1),
        )
