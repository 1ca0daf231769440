"""genperf.nn.GumbelQuantize: what taming-transformers computes, from the same parameters and draws."""

from __future__ import annotations

import numpy
import pytest
import torch
import torch.nn.functional as F
from genperf_testing.cases import normals

from genperf.nn import GumbelQuantize


def expected(module, z, temperature, hard):
    """Quantized, loss, indices and logits, by one-hot products."""
    logits = module.proj(z)
    chosen = logits if module.remap is None else logits[:, module.used]
    y = F.gumbel_softmax(chosen, tau=temperature, dim=1, hard=hard)
    one_hot = y
    if module.remap is not None:
        one_hot = torch.zeros_like(logits)
        one_hot[:, module.used] = y
    quantized = torch.einsum("bkhw,kd->bdhw", one_hot, module.embed.weight)
    q = chosen.softmax(1)
    divergence = (q * (q * module.n_embed + 1e-10).log()).sum(1).mean()
    return quantized, module.kl_weight * divergence, y.argmax(1), chosen


@pytest.mark.parametrize("remap", [None, [1, 4, 5, 17]], ids=["all", "remap"])
@pytest.mark.parametrize(("training", "straight_through"), [(True, True), (True, False), (False, False)])
def test_results_and_gradients(training, straight_through, remap):
    torch.manual_seed(0)
    module = GumbelQuantize(6, 5, 20, straight_through, kl_weight=0.3, temp_init=0.9, remap=remap)
    module.train(training)
    z = normals((2, 6, 7, 8), "z").requires_grad_()
    leaves = [z, *module.parameters()]
    torch.manual_seed(1)
    quantized, loss, (_, _, indices), logits = module(z, return_logits=True)
    torch.manual_seed(1)
    theirs = expected(module, z, 0.9, straight_through or not training)
    torch.testing.assert_close((quantized, loss, logits), (theirs[0], theirs[1], theirs[3]))
    assert torch.equal(indices, theirs[2])
    weight = normals(tuple(quantized.shape), "weight")
    mine = torch.autograd.grad((quantized * weight).sum() + loss, leaves)
    other = torch.autograd.grad((theirs[0] * weight).sum() + theirs[1], leaves)
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_temperature_of_a_call():
    module, z = GumbelQuantize(3, 4, 9, straight_through=False), normals((1, 3, 4, 4), "z")
    torch.manual_seed(1)
    quantized = module(z, temp=0.1)[0]
    torch.manual_seed(1)
    torch.testing.assert_close(quantized, expected(module, z, 0.1, False)[0])


def test_state_dict():
    shapes = {k: tuple(v.shape) for k, v in GumbelQuantize(6, 5, 20).state_dict().items()}
    assert shapes == {"proj.weight": (20, 6, 1, 1), "proj.bias": (20,), "embed.weight": (20, 5)}
    assert GumbelQuantize(6, 5, 20, remap=[3, 4]).state_dict()["used"].tolist() == [3, 4]


def test_plain_interface():
    quantized, loss, indices = GumbelQuantize(3, 4, 9, use_vqinterface=False)(normals((2, 3, 5, 6), "z"))
    assert quantized.shape == (2, 4, 5, 6)
    assert loss.shape == ()
    assert indices.shape == (2, 5, 6)


@pytest.mark.parametrize("rng", ["torch", "philox"])
def test_repeats_from_a_seed(rng):
    module, z = GumbelQuantize(3, 4, 9, rng=rng), normals((2, 3, 5, 6), "z")
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(module(z)[2][2])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_remap_from_a_file(tmp_path):
    numpy.save(tmp_path / "used.npy", numpy.array([2, 5, 7]))
    module = GumbelQuantize(3, 4, 9, remap=str(tmp_path / "used.npy"), unknown_index="extra")
    assert module.re_embed == 4
    assert module.unknown_index == 3
    entry = module.get_codebook_entry(torch.tensor([0, 1, 2, 3]), (1, 2, 2, 4))
    assert torch.equal(entry, module.embed.weight[[2, 5, 7, 2]].view(1, 2, 2, 4).movedim(-1, 1))


def test_codebook_entry_of_drawn_indices():
    module = GumbelQuantize(3, 4, 9).eval()
    quantized, _, (_, _, indices) = module(normals((2, 3, 5, 6), "z"))
    assert torch.equal(module.get_codebook_entry(indices.flatten(), (2, 5, 6, 4)), quantized)
    with pytest.raises(ValueError, match="indices has 3 elements, expected 60"):
        module.get_codebook_entry(torch.zeros(3, dtype=torch.int64), (2, 5, 6, 4))


def test_autocast():
    module, z = GumbelQuantize(3, 4, 9), normals((2, 3, 5, 6), "z")
    with torch.autocast("cpu", torch.bfloat16):
        quantized, loss, _ = module(z)
    assert quantized.dtype == torch.bfloat16
    (quantized.sum() + loss).backward()
    assert module.embed.weight.grad.dtype == torch.float32


def test_compile():
    module, z = GumbelQuantize(3, 4, 9, rng="philox"), normals((2, 3, 5, 6), "z")
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    quantized, loss, (_, _, indices) = compiled(z)
    (quantized.sum() + loss).backward()
    assert torch.equal(module.get_codebook_entry(indices.flatten(), (2, 5, 6, 4)), quantized)


def test_unknown_rng():
    with pytest.raises(ValueError, match="rng is 'numpy'"):
        GumbelQuantize(3, 4, 9, rng="numpy")
