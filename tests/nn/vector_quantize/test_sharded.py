"""A codebook in parts on two processes gives what the whole does."""

import math

import pytest
import torch
import torch.distributed as dist

from genperf.nn import ShardedCodebook, VectorQuantize
from genperf.ops import vq_nearest

WORLD, K, D = 2, 33, 6


def whole(case):
    """A codebook [K, D] and vectors for both ranks, 50 and 3 of them."""
    torch.manual_seed(7)
    codebook = torch.randn(K, D)
    x = torch.randn(53, D)
    if case == "ties":  # between the parts, and at a distance of one unit in the last place
        codebook[20] = codebook[3]
        codebook[17] = codebook[18] = codebook[0]
        x[:10] = codebook[3]
        x[50:] = codebook[17]
        codebook[30], codebook[2] = -codebook[5], codebook[5]
        x[10:20] = 0.0
        x[20:30] = codebook[5] * 1e-7
    elif case == "near ties":
        # x is in the middle of codewords that differ by +-h and by +-h (1 + 2^-23): float64 sums are equal
        codebook *= 100
        x[:] = 1e-3 * x
        codebook[32], codebook[1] = torch.zeros(D), torch.zeros(D)
        codebook[32, :2] = torch.tensor([1.0, 2.0**-40])
        codebook[1, :2] = torch.tensor([-1.0, 2.0**-39])
        x[:, 0] = 0.0
        x[:, 1] = 0.0
    elif case == "not finite":
        x[3, 1], x[51, 0], x[9, 2] = math.nan, math.inf, -math.inf
        codebook[0, 0], codebook[32, 1], codebook[16, 2] = math.nan, math.inf, math.nan
    elif case == "a part that is not finite":
        codebook[17:] = math.nan
    elif case == "nothing is finite":
        codebook[:] = math.nan
    return codebook, x


CASES = ("gaussian", "ties", "near ties", "not finite", "a part that is not finite", "nothing is finite")


def part(x, rank):
    return x[:50] if rank == 0 else x[50:]


def searches(rank):
    found = {}
    for cosine in (False, True):
        module = ShardedCodebook(D, K, use_cosine_sim=cosine)
        assert len(module.codebook) == 17 - rank
        assert module.start == 17 * rank
        for case in CASES:
            codebook, x = whole(case)
            module.load_part(codebook[:17] if rank == 0 else codebook[17:])
            for dtype in (torch.float32, torch.float16, torch.float64):
                rows = part(x, rank).to(dtype)
                found[cosine, case, dtype] = module.nearest(rows), module.codebook.clone()
    indices = module.nearest(x[:0])
    found["lookup"] = module.lookup(torch.tensor([[0, 32], [16, 17], [5, 5]])[rank:]), indices
    return found


def trains(rank):
    module = ShardedCodebook(D, K, threshold_ema_dead_code=0.1, seed=3)
    first = module.codebook.clone()
    codebook, _ = whole("gaussian")
    module.load_part(codebook[:17] if rank == 0 else codebook[17:])
    results = []
    for step in range(3):
        x = torch.randn(53, D, generator=torch.Generator().manual_seed(step)) * 3
        x = part(x, rank)[: 0 if step == 1 and rank == 1 else None].requires_grad_()
        quantized, indices, loss = module(x)
        (quantized.sin().sum() + loss).backward()
        results.append([quantized.detach(), indices, loss.detach(), x.grad, module.codebook.clone()])
    return first, results


def disagrees(rank):
    messages = []
    for module in (ShardedCodebook(D + rank, K), ShardedCodebook(D, K + rank)):
        try:
            module.nearest(torch.randn(4, module.dim))
            messages.append("no error")
        except ValueError as error:
            messages.append(str(error))
    return messages


RUNS = (searches, trains, disagrees)


def work(rank, directory):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=WORLD)
    torch.save({run.__name__: run(rank) for run in RUNS}, f"{directory}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of ``RUNS`` returned in either of two processes."""
    directory = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (directory,), nprocs=WORLD)
    results = [torch.load(f"{directory}/{rank}", weights_only=False) for rank in range(WORLD)]
    return {name: [one[name] for one in results] for name in results[0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_indices_are_those_of_the_whole(both, case, cosine, dtype):
    _, x = whole(case)
    (first, codebook), (second, rest) = (one[cosine, case, dtype] for one in both["searches"])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, codebook = x.to(dtype).to(wide), torch.cat([codebook, rest]).to(wide)
    if cosine:
        x = torch.nn.functional.normalize(x, dim=-1, eps=1e-6)
    expected = vq_nearest(x, codebook, "dot" if cosine else "l2")
    assert torch.equal(torch.cat([first, second]), expected.indices)
    if case == "gaussian":
        assert (expected.indices < 17).any()
        assert (expected.indices >= 17).any()


def test_near_ties_are_beyond_float64():
    """Or the case would not test the exact comparison."""
    codebook, x = whole("near ties")
    distances = (x.double()[:, None] - codebook.double()).square().sum(2)
    assert (distances[:, 1] == distances[:, 32]).all()
    assert (vq_nearest(x, codebook).indices == 32).all()


def test_lookup(both):
    (first, none), (second, _) = (one["lookup"] for one in both["searches"])
    assert first.shape == (3, 2, D)
    assert second.shape == (2, 2, D)
    assert none.shape == (0,)
    assert torch.equal(first[1:].isnan(), second.isnan())


def test_training_is_that_of_the_whole(both):
    codebook, _ = whole("gaussian")
    module = VectorQuantize(D, K, threshold_ema_dead_code=0)
    module.codebook = codebook
    module._codebook.embed_avg.copy_(codebook)
    (_, first), (_, second) = both["trains"]
    for step, (one, other) in enumerate(zip(first, second, strict=True)):
        x = torch.randn(53, D, generator=torch.Generator().manual_seed(step)) * 3
        x = x[:50] if step == 1 else x
        rows = x.clone().requires_grad_()
        quantized, indices, _ = module(rows)
        n = len(one[0])
        actual = torch.cat([one[0], other[0]])
        assert torch.equal(torch.cat([one[1], other[1]]), indices)
        torch.testing.assert_close(actual, quantized, rtol=1e-4, atol=1e-5)
        error = (quantized[:n] - x[:n]).square().mean()
        torch.testing.assert_close(one[2], error, rtol=1e-3, atol=0)
        torch.testing.assert_close(torch.cat([one[4], other[4]]), module.codebook, rtol=1e-3, atol=1e-4)
        assert one[3].shape == one[0].shape
        assert one[3].isfinite().all()


def test_parts_start_different(both):
    (first, _), (second, _) = both["trains"]
    assert not torch.equal(first[:16], second)
    assert first.abs().max() <= math.sqrt(6 / (K * D))
    assert first.abs().max() > 0.9 * math.sqrt(6 / (K * D))


def test_disagreement_is_an_error(both):
    for messages in both["disagrees"]:
        assert messages[0] == "ShardedCodebook: D is 6, 7 on ranks 0 to 1, expected the same on all"
        assert "the number of codewords is 33, 34 on ranks 0 to 1" in messages[1]


def test_one_process():
    torch.manual_seed(0)
    module = ShardedCodebook(D, K)
    x = torch.randn(2, 9, D)
    expected = vq_nearest(x, module.codebook).indices
    assert torch.equal(module.nearest(x), expected)
    quantized, indices, loss = module.eval()(x)
    assert torch.equal(indices, expected)
    assert torch.equal(quantized, module.lookup(indices))
    assert loss == 0
    with pytest.raises(ValueError, match=r"ShardedCodebook: x has shape \(3, 5\), expected 6 channels"):
        module(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="codebook_size is 0, expected at least 1"):
        ShardedCodebook(D, 0)
