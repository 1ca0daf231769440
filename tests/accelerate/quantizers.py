"""Small vector quantizers of the structures that accelerate knows, and some that it must leave alone."""

import types
from collections import OrderedDict

import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn


def _all_reduce(tensor):
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


processes = types.SimpleNamespace(all_reduce=_all_reduce)


def squared_distances(rows, words):
    return rows.pow(2).sum(1, keepdim=True) - 2 * rows @ words.t() + words.pow(2).sum(1)


class ImageQuantizer(nn.Module):
    """As VectorQuantizer2 of taming-transformers and VectorQuantizer of diffusers."""

    def __init__(self, n_e=16, e_dim=6, beta=0.25, legacy=True, sane_index_shape=False, remap=None):
        super().__init__()
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.legacy, self.sane_index_shape, self.remap = legacy, sane_index_shape, remap
        self.embedding = nn.Embedding(n_e, e_dim)
        self.embedding.weight.data.uniform_(-1.0, 1.0)
        if remap is not None:
            self.register_buffer("used", torch.tensor([int(i) for i in remap.split()]))

    def to_used(self, indices):
        return (indices[:, None] == self.used).long().argmax(1)

    def forward(self, z, temp=None, return_logits=False):
        assert temp is None or temp == 1.0
        last = z.permute(0, 2, 3, 1).contiguous()
        rows = last.view(-1, self.e_dim)
        indices = torch.argmin(squared_distances(rows, self.embedding.weight), dim=1)
        z_q = self.embedding(indices).view(last.shape)
        commitment, codebook = ((z_q.detach() - last) ** 2).mean(), ((z_q - last.detach()) ** 2).mean()
        loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
        z_q = (last + (z_q - last).detach()).permute(0, 3, 1, 2).contiguous()
        if self.remap is not None:
            indices = self.to_used(indices)
        if self.sane_index_shape:
            indices = indices.reshape(z_q.shape[0], z_q.shape[2], z_q.shape[3])
        return z_q, loss, (None, None, indices)


class OneHotQuantizer(nn.Module):
    """As the first VectorQuantizer of taming-transformers: one-hot vectors and perplexity are returned."""

    def __init__(self, n_e=16, e_dim=6, beta=0.25):
        super().__init__()
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.embedding = nn.Embedding(n_e, e_dim)

    def forward(self, z):
        z = z.permute(0, 2, 3, 1).contiguous()
        rows = z.view(-1, self.e_dim)
        indices = torch.argmin(squared_distances(rows, self.embedding.weight), dim=1).unsqueeze(1)
        one_hot = torch.zeros(len(indices), self.n_e).to(z)
        one_hot.scatter_(1, indices, 1)
        z_q = (one_hot @ self.embedding.weight).view(z.shape)
        loss = (z_q.detach() - z).pow(2).mean() + self.beta * (z_q - z.detach()).pow(2).mean()
        z_q = z + (z_q - z).detach()
        share = one_hot.mean(0)
        perplexity = torch.exp(-torch.sum(share * torch.log(share + 1e-10)))
        return z_q.permute(0, 3, 1, 2).contiguous(), loss, (perplexity, one_hot, indices)


class TransposedAverages(nn.Module):
    """As rosinality's Quantize: codebook [D, K] as a buffer, averages, sums added up over processes."""

    def __init__(self, dim=6, n_embed=16, decay=0.9, eps=1e-5):
        super().__init__()
        self.dim, self.n_embed, self.decay, self.eps = dim, n_embed, decay, eps
        embed = torch.randn(dim, n_embed)
        self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.ones(n_embed))
        self.register_buffer("embed_avg", embed.clone())

    def forward(self, input):
        flat = input.reshape(-1, self.dim)
        _, indices = (-squared_distances(flat, self.embed.t())).max(1)
        one_hot = F.one_hot(indices, self.n_embed).type(flat.dtype)
        indices = indices.view(*input.shape[:-1])
        quantized = F.embedding(indices, self.embed.transpose(0, 1))
        if self.training:
            counts, sums = one_hot.sum(0), flat.transpose(0, 1) @ one_hot
            processes.all_reduce(counts)
            processes.all_reduce(sums)
            self.cluster_size.data.mul_(self.decay).add_(counts, alpha=1 - self.decay)
            self.embed_avg.data.mul_(self.decay).add_(sums, alpha=1 - self.decay)
            n = self.cluster_size.sum()
            smoothed = (self.cluster_size + self.eps) / (n + self.n_embed * self.eps) * n
            self.embed.data.copy_(self.embed_avg / smoothed.unsqueeze(0))
        diff = (quantized.detach() - input).pow(2).mean()
        return input + (quantized - input).detach(), diff, indices


class Output(OrderedDict):
    def __getattr__(self, name):
        return self[name]


class SmoothedAverages(nn.Module):
    """Smoothed counts are kept; the outputs are of the codebook after the update; a mapping is returned."""

    def __init__(self, num_embeddings=16, embedding_dim=6, commitment_cost=0.25, decay=0.9):
        super().__init__()
        self._k, self._d = num_embeddings, embedding_dim
        self._commitment_cost, self._decay = commitment_cost, decay
        self._embedding = nn.Embedding(num_embeddings, embedding_dim)
        self.register_buffer("_ema_cluster_size", torch.ones(num_embeddings))
        self._ema_w = nn.Parameter(self._embedding.weight.detach().clone())

    def forward(self, inputs, uses_ddp=False):
        flat = inputs.reshape(-1, self._d)
        indices = squared_distances(flat, self._embedding.weight).argmin(-1).unsqueeze(-1)
        one_hot = torch.zeros(len(indices), self._k, device=inputs.device)
        one_hot.scatter_(1, indices, 1)
        if self.training:
            counts, sums = one_hot.sum(0), one_hot.t() @ flat.detach()
            if uses_ddp:
                torch.distributed.all_reduce(counts)
                torch.distributed.all_reduce(sums)
            size = self._ema_cluster_size * self._decay + counts * (1 - self._decay)
            n = size.sum()
            size = (size + 1e-5) / (n + self._k * 1e-5) * n
            self._ema_cluster_size.copy_(size)
            self._ema_w.data.copy_(self._ema_w * self._decay + sums * (1 - self._decay))
            self._embedding.weight.data.copy_(self._ema_w / size.unsqueeze(1))
        quantized = (one_hot @ self._embedding.weight.detach()).view_as(inputs)
        loss = self._commitment_cost * F.mse_loss(quantized, inputs)
        quantized = inputs + (quantized - inputs).detach()
        share = one_hot.mean(0)
        return Output(
            quantized=quantized.permute(0, 3, 1, 2),
            loss=loss,
            perplexity=torch.exp(-torch.sum(share * torch.log(share + 1e-10))),
            indices=indices.reshape(inputs.shape[0], 1, *inputs.shape[1:3]),
        )


class Factorised(nn.Module):
    """As VectorQuantize of descript-audio-codec: search among directions in few dimensions."""

    def __init__(self, input_dim=10, codebook_size=16, codebook_dim=6):
        super().__init__()
        self.in_proj = nn.Conv1d(input_dim, codebook_dim, 1)
        self.out_proj = nn.Conv1d(codebook_dim, input_dim, 1)
        self.codebook = nn.Embedding(codebook_size, codebook_dim)

    def forward(self, z):
        z_e = self.in_proj(z)
        z_q, indices = self.decode_latents(z_e)
        commitment = F.mse_loss(z_e, z_q.detach(), reduction="none").mean([1, 2])
        codebook = F.mse_loss(z_q, z_e.detach(), reduction="none").mean([1, 2])
        return self.out_proj(z_e + (z_q - z_e).detach()), commitment, codebook, indices, z_e

    def decode_latents(self, latents):
        rows = F.normalize(latents.transpose(1, 2).reshape(-1, latents.shape[1]))
        words = F.normalize(self.codebook.weight)
        indices = (-squared_distances(rows, words)).max(1)[1].reshape(latents.shape[0], -1)
        return F.embedding(indices, self.codebook.weight).transpose(1, 2), indices


class Normalised(nn.Module):
    """As the quantizers of LlamaGen and ViT-VQGAN: everything happens among directions."""

    def __init__(self, n_e=16, e_dim=6, beta=0.25):
        super().__init__()
        self.beta = beta
        self.embedding = nn.Embedding(n_e, e_dim)

    def forward(self, z):
        z = F.normalize(z.permute(0, 2, 3, 1).contiguous(), dim=-1)
        words = F.normalize(self.embedding.weight, dim=-1)
        indices = squared_distances(z.flatten(0, 2), words).argmin(1)
        z_q = words[indices].view(z.shape)
        vq_loss, commit_loss = F.mse_loss(z_q, z.detach()), self.beta * F.mse_loss(z_q.detach(), z)
        z_q = (z + (z_q - z).detach()).permute(0, 3, 1, 2)
        return z_q, (vq_loss, commit_loss), indices


class AudioCodebook(nn.Module):
    """As EuclideanCodebook of EnCodec: k-means at first, dead codes replaced before the averages move."""

    def __init__(self, dim=6, codebook_size=16, kmeans_init=False, decay=0.9, threshold=2):
        super().__init__()
        self.decay, self.codebook_size, self.epsilon, self.threshold = decay, codebook_size, 1e-5, threshold
        embed = torch.randn(codebook_size, dim)
        self.register_buffer("inited", torch.tensor([not kmeans_init], dtype=torch.float32))
        self.register_buffer("cluster_size", torch.zeros(codebook_size))
        self.register_buffer("embed", embed)
        self.register_buffer("embed_avg", embed.clone())

    def init_embed_(self, data):
        if self.inited:
            return
        chosen = data[torch.randint(len(data), (self.codebook_size,))]
        self.embed.data.copy_(chosen)
        self.embed_avg.data.copy_(chosen)
        self.cluster_size.fill_(len(data) / self.codebook_size)
        self.inited.fill_(1)

    def expire_codes_(self, data):
        expired = self.cluster_size < self.threshold
        if torch.any(expired):
            chosen = data[torch.randint(len(data), (self.codebook_size,))]
            self.embed.data.copy_(torch.where(expired[:, None], chosen, self.embed))

    def quantize(self, x):
        return (-squared_distances(x, self.embed)).max(dim=-1).indices

    def dequantize(self, indices):
        return F.embedding(indices, self.embed)

    def encode(self, x):
        return self.quantize(x.flatten(0, -2)).view(x.shape[:-1])

    def decode(self, indices):
        return self.dequantize(indices)

    def forward(self, x):
        shape, dtype = x.shape, x.dtype
        x = x.flatten(0, -2)
        self.init_embed_(x)
        indices = self.quantize(x)
        one_hot = F.one_hot(indices, self.codebook_size).type(dtype)
        quantized = self.dequantize(indices.view(shape[:-1]))
        if self.training:
            self.expire_codes_(x)
            self.cluster_size.data.mul_(self.decay).add_(one_hot.sum(0), alpha=1 - self.decay)
            sums = x.t() @ one_hot
            self.embed_avg.data.mul_(self.decay).add_(sums.t(), alpha=1 - self.decay)
            total = self.cluster_size.sum()
            smoothed = (
                (self.cluster_size + self.epsilon) / (total + self.codebook_size * self.epsilon) * total
            )
            self.embed.data.copy_(self.embed_avg / smoothed.unsqueeze(1))
        return quantized, indices.view(shape[:-1])


class AudioLayer(nn.Module):
    def __init__(self, dim=6, codebook_dim=None, **options):
        super().__init__()
        inner = codebook_dim or dim
        self.project_in = nn.Linear(dim, inner) if inner != dim else nn.Identity()
        self.project_out = nn.Linear(inner, dim) if inner != dim else nn.Identity()
        self.codebook = AudioCodebook(inner, **options)

    def encode(self, x):
        return self.codebook.encode(self.project_in(x.transpose(1, 2)))

    def decode(self, indices):
        return self.project_out(self.codebook.decode(indices)).transpose(1, 2)

    def forward(self, x):
        x = self.project_in(x.transpose(1, 2))
        quantized, indices = self.codebook(x)
        if self.training:
            quantized = x + (quantized - x).detach()
        loss = F.mse_loss(quantized.detach(), x)
        return self.project_out(quantized).transpose(1, 2), indices, loss


class ResidualCodec(nn.Module):
    """As ResidualVectorQuantization of EnCodec and Hugging Face's Encodec."""

    def __init__(self, stages=3, **options):
        super().__init__()
        self.layers = nn.ModuleList([AudioLayer(**options) for _ in range(stages)])

    def encode(self, x, n_q=None):
        residual = x
        all_indices = []
        for layer in self.layers[: n_q or len(self.layers)]:
            indices = layer.encode(residual)
            quantized = layer.decode(indices)
            residual = residual - quantized
            all_indices.append(indices)
        return torch.stack(all_indices)

    def forward(self, x):
        total, losses, codes = 0.0, [], []
        for layer in self.layers:
            quantized, indices, loss = layer(x)
            x, total = x - quantized, total + quantized
            codes.append(indices)
            losses.append(loss)
        return total, torch.stack(codes), torch.stack(losses)


class UsedResidual(ResidualCodec):
    """What is left of the input is returned, too."""

    def encode(self, x):
        residual = x
        all_indices = []
        for layer in self.layers:
            indices = layer.encode(residual)
            quantized = layer.decode(indices)
            residual = residual - quantized
            all_indices.append(indices)
        return torch.stack(all_indices), residual


class LazyCodebook(nn.Module):
    """As MimiEuclideanCodebook: the codebook is a property, computed once from averages."""

    def __init__(self, dim=6, codebook_size=16):
        super().__init__()
        self.register_buffer("cluster_usage", torch.rand(codebook_size) + 1)
        self.register_buffer("embed_sum", torch.randn(codebook_size, dim))
        self._embed = None

    @property
    def embed(self):
        if self._embed is None:
            self._embed = self.embed_sum / self.cluster_usage.clamp(min=1e-5)[:, None]
        return self._embed

    def quantize(self, x):
        return torch.cdist(x[None].float(), self.embed[None].float())[0].argmin(-1)

    def encode(self, x):
        return self.quantize(x.flatten(0, -2)).view(x.shape[:-1])

    def decode(self, indices):
        return F.embedding(indices, self.embed)


class RestartingQuantizer(TransposedAverages):
    """Codewords that are hardly used jump to a vector: which branch is taken depends on the data."""

    def forward(self, input):
        flat = input.reshape(-1, self.dim)
        indices = squared_distances(flat, self.embed.t()).argmin(1)
        if self.training and self.cluster_size.min() < 0.01:
            self.embed.data[:, 0] = flat[0]
        quantized = F.embedding(indices.view(input.shape[:-1]), self.embed.t())
        return input + (quantized - input).detach(), (quantized - input).pow(2).mean()


class InnerProductQuantizer(ImageQuantizer):
    """The largest inner product is chosen, which is not the nearest codeword."""

    def forward(self, z):
        rows = z.permute(0, 2, 3, 1).reshape(-1, self.e_dim)
        indices = (-rows @ self.embedding.weight.t()).argmin(1)
        z_q = self.embedding(indices).view(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
        return z + (z_q - z).detach(), indices


class NoisyQuantizer(ImageQuantizer):
    def forward(self, z):
        noisy = z + 0.1 * torch.randn_like(z)
        rows = noisy.permute(0, 2, 3, 1).reshape(-1, self.e_dim)
        indices = squared_distances(rows, self.embedding.weight).argmin(1)
        z_q = self.embedding(indices).view(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
        return z + (z_q - z).detach(), indices


class EntropyQuantizer(ImageQuantizer):
    """In training it has a loss over all codewords."""

    def forward(self, z):
        rows = z.permute(0, 2, 3, 1).reshape(-1, self.e_dim)
        distances = squared_distances(rows, self.embedding.weight)
        indices = distances.argmin(1)
        z_q = self.embedding(indices).view(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
        entropy = torch.special.entr((-distances).softmax(1)).sum(1).mean() if self.training else None
        return z + (z_q - z).detach(), entropy, indices


class CountingQuantizer(ImageQuantizer):
    def forward(self, z):
        rows = z.permute(0, 2, 3, 1).reshape(-1, self.e_dim)
        self.last = squared_distances(rows, self.embedding.weight).argmin(1)
        return self.embedding(self.last)


class GumbelQuantizer(nn.Module):
    """As GumbelQuantize of taming-transformers."""

    def __init__(self, channels=5, embedding_dim=6, n_embed=16, straight_through=True, kl_weight=0.02):
        super().__init__()
        self.n_embed, self.straight_through, self.kl_weight = n_embed, straight_through, kl_weight
        self.temperature = 1.3
        self.proj = nn.Conv2d(channels, n_embed, 1)
        self.embed = nn.Embedding(n_embed, embedding_dim)

    def forward(self, z, temp=None, return_logits=False):
        hard = self.straight_through if self.training else True
        temp = self.temperature if temp is None else temp
        logits = self.proj(z)
        one_hot = F.gumbel_softmax(logits, tau=temp, dim=1, hard=hard)
        z_q = torch.einsum("bnhw,nd->bdhw", one_hot, self.embed.weight)
        q = logits.softmax(1)
        diff = self.kl_weight * (q * torch.log(q * self.n_embed + 1e-10)).sum(1).mean()
        found = z_q, diff, (None, None, one_hot.argmax(1))
        return (*found, logits) if return_logits else found


class SharpGumbelQuantizer(GumbelQuantizer):
    """Draws from other probabilities than the softmax of its logits."""

    def forward(self, z):
        logits = self.proj(z)
        one_hot = F.gumbel_softmax(2 * logits, tau=self.temperature, dim=1, hard=True)
        return torch.einsum("bnhw,nd->bdhw", one_hot, self.embed.weight), one_hot.argmax(1)


class TextEncoder(nn.Module):
    """Looks for the end of a text by argmax, and has an embedding; it is no quantizer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 6)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return x[torch.arange(len(x)), tokens.argmax(-1)]
