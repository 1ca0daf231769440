"""genperf.ops.residual_vector_quantize against the modules of public libraries, from shared codebooks."""

from __future__ import annotations

import pytest
import torch
from genperf_testing.cases import normals

from genperf.ops import residual_codebook_statistics, residual_vector_quantize

QUANTIZERS, CODEWORDS, DIM = 4, 64, 16


def lucidrains(grouped=False, **options):
    library = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    names = {"num_quantizers": QUANTIZERS, "codebook_size": CODEWORDS, "commitment_weight": 0.5, **options}
    if grouped:
        module = library.GroupedResidualVQ(dim=2 * DIM, groups=2, **names)
        rvqs = module.rvqs
    else:
        module = library.ResidualVQ(dim=DIM, **names)
        rvqs = [module]
    for g, rvq in enumerate(rvqs):
        for i, layer in enumerate(rvq.layers):
            layer._codebook.embed.data.copy_(normals((1, CODEWORDS, DIM), g, i) / (i + 1))
    return module


def codebooks_of(module):
    return module.codebooks.detach().clone()


def assert_close_gradients(mine, theirs, leaf_mine, leaf_theirs):
    """Of the quantized vectors and of the losses, separately."""
    for a, b in zip(mine, theirs, strict=True):
        weight = normals(tuple(b.shape), "weight")
        torch.testing.assert_close(
            torch.autograd.grad((a * weight).sum(), leaf_mine, retain_graph=True),
            torch.autograd.grad((b * weight).sum(), leaf_theirs, retain_graph=True),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip


@pytest.mark.parametrize("fraction", [0.0, 0.4])
@pytest.mark.parametrize("rotation", [False, True])
def test_residual_vq_in_training(rotation, fraction):
    module = lucidrains(rotation_trick=rotation, quant_grad_frac=fraction).train()
    codebooks = codebooks_of(module)
    mine, theirs = (normals((3, 50, DIM), "x").requires_grad_() for _ in range(2))
    quantized, indices, losses = module(theirs, freeze_codebook=True)
    out = residual_vector_quantize(
        mine, codebooks, estimator="rotation" if rotation else "straight_through",
        residual_gradient=fraction, commitment_weight=0.5,
    )  # fmt: skip
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.quantized, quantized)
    torch.testing.assert_close(out.losses, losses)
    assert_close_gradients((out.quantized, out.losses), (quantized, losses), mine, theirs)


def test_residuals_shorter_than_the_least_length():
    """Those of the last stage: the gradient is divided by 1e-6, not by their length."""
    module = lucidrains(num_quantizers=2, rotation_trick=True).train()
    for layer in module.layers:
        layer._codebook.embed.data.mul_(2**-10)
    codebooks = codebooks_of(module)
    x = codebooks[0, :50] + 1e-9 * normals((50, DIM), "x")
    mine, theirs = (x[None].clone().requires_grad_() for _ in range(2))
    quantized, indices, _ = module(theirs, freeze_codebook=True)
    out = residual_vector_quantize(mine, codebooks, estimator="rotation")
    assert torch.equal(out.indices, indices)
    assert ((x - codebooks[0, indices[0, :, 0]]).norm(dim=1) < 1e-8).all()
    weight = normals(tuple(x[None].shape), "weight")
    for y in (out.quantized, quantized):
        y.backward(weight)
    size = theirs.grad.norm(dim=-1, keepdim=True)
    assert size.min() > 100  # of the last stage, not of the one before
    torch.testing.assert_close(mine.grad / size, theirs.grad / size, rtol=0, atol=1e-3)


def test_residual_vq_in_evaluation():
    module = lucidrains().eval()
    x = normals((3, 200, DIM), "x")
    quantized, indices, _ = module(x)
    out = residual_vector_quantize(x, codebooks_of(module))
    assert torch.equal(out.indices, indices)
    assert torch.equal(out.quantized, quantized)


def test_residual_vq_in_evaluation_in_bfloat16():
    """Codewords and residuals are rounded as the library's are."""
    module = lucidrains().eval()
    x = normals((3, 200, DIM), "x").bfloat16()
    codebooks = codebooks_of(module).bfloat16()
    for layer, codebook in zip(module.layers, codebooks, strict=True):
        layer._codebook.embed.copy_(codebook[None])
    quantized, indices, _ = module(x)
    out = residual_vector_quantize(x, codebooks)
    assert torch.equal(out.indices, indices)
    # The library rounds the sum after every stage.
    torch.testing.assert_close(
        out.quantized, quantized, rtol=0, atol=QUANTIZERS * 2**-9 * quantized.abs().max().item()
    )


def test_statistics_are_those_of_the_update():
    module = lucidrains(rotation_trick=False, decay=0.0).train()
    codebooks = codebooks_of(module)
    x = normals((3, 50, DIM), "x")
    _, indices, _ = module(x)
    out = residual_vector_quantize(x, codebooks)
    assert torch.equal(out.indices, indices)
    counts, sums = residual_codebook_statistics(x, codebooks, out.indices)
    for i, layer in enumerate(module.layers):
        torch.testing.assert_close(counts[i], layer._codebook.cluster_size[0])
        torch.testing.assert_close(sums[i], layer._codebook.embed_avg[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_quantizer_dropout(seed):
    module = lucidrains(quantize_dropout=True).train()
    mine, theirs = (normals((2, 20, DIM), "x").requires_grad_() for _ in range(2))
    codebooks = codebooks_of(module)
    quantized, indices, losses = module(theirs, freeze_codebook=True, rand_quantize_dropout_fixed_seed=seed)
    n_stages = int((indices[0, 0] >= 0).sum())
    out = residual_vector_quantize(
        mine, codebooks, estimator="rotation", commitment_weight=0.5, n_stages=n_stages
    )
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.quantized, quantized)
    torch.testing.assert_close(out.losses, losses)
    assert_close_gradients((out.quantized, out.losses), (quantized, losses), mine, theirs)


def test_mask():
    module = lucidrains().train()
    mine, theirs = (normals((3, 20, DIM), "x").requires_grad_() for _ in range(2))
    mask = torch.arange(20) < torch.tensor([20, 7, 13])[:, None]
    codebooks = codebooks_of(module)
    quantized, indices, losses = module(theirs, mask=mask, freeze_codebook=True)
    out = residual_vector_quantize(mine, codebooks, estimator="rotation", commitment_weight=0.5, mask=mask)
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.quantized, quantized)
    torch.testing.assert_close(out.losses, losses)
    assert_close_gradients((out.quantized, out.losses), (quantized, losses), mine, theirs)


def test_grouped_residual_vq():
    module = lucidrains(grouped=True).train()
    codebooks = codebooks_of(module)
    mine, theirs = (normals((2, 30, 2 * DIM), "x").requires_grad_() for _ in range(2))
    quantized, indices, losses = module(theirs, freeze_codebook=True)
    groups = mine.unflatten(-1, (2, DIM)).movedim(-2, 0)
    out = residual_vector_quantize(groups, codebooks, estimator="rotation", commitment_weight=0.5)
    joined = out.quantized.movedim(0, -2).flatten(-2)
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(joined, quantized)
    torch.testing.assert_close(out.losses, losses)
    assert_close_gradients((joined, out.losses), (quantized, losses), mine, theirs)


@pytest.mark.parametrize("name", ["encodec", "mimi"])
def test_transformers(name):
    """Channels first; EnCodec by the expanded formula, Mimi by cdist."""
    transformers = pytest.importorskip("transformers")
    models = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    if name == "encodec":
        config = transformers.EncodecConfig(codebook_size=CODEWORDS, codebook_dim=DIM)
        module = models.EncodecResidualVectorQuantizer(config)
    else:
        config = transformers.MimiConfig(
            codebook_size=CODEWORDS, codebook_dim=DIM, vector_quantization_hidden_dimension=DIM,
            hidden_size=DIM, num_quantizers=QUANTIZERS,
        )  # fmt: skip
        module = models.MimiResidualVectorQuantizer(config)
    layers = module.layers[:QUANTIZERS]
    for i, layer in enumerate(layers):
        values = normals((CODEWORDS, DIM), "codebook", i) / (i + 1)
        (layer.codebook.embed if name == "encodec" else layer.codebook.embed_sum).copy_(values)
    x = normals((2, DIM, 40), "x")
    if name == "encodec":
        module.get_num_quantizers_for_bandwidth = lambda bandwidth: QUANTIZERS
        codes = module.encode(x)
        decoded = module.decode(codes)
    else:
        codes = module.encode(x)
        decoded = module.decode(codes.transpose(0, 1))
    out = residual_vector_quantize(x, [layer.codebook.embed for layer in layers], dim=1)
    assert torch.equal(out.indices.movedim(-1, 0), codes)
    torch.testing.assert_close(out.quantized, decoded)
