"""Two processes keep one codebook."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist

from genperf.nn import GroupedResidualVQ, ResidualVQ, VectorQuantize

WORLD = 2

MODULES = {
    "plain": lambda: VectorQuantize(8, 16),
    "replaced": lambda: VectorQuantize(8, 16, threshold_ema_dead_code=2),
    "k-means": lambda: VectorQuantize(8, 16, kmeans_init=True, threshold_ema_dead_code=2),
    "heads": lambda: VectorQuantize(8, 16, 4, 2, True, kmeans_init=True, use_cosine_sim=True),
    "learned": lambda: VectorQuantize(8, 16, learnable_codebook=True, threshold_ema_dead_code=2),
    "zero-debias": lambda: VectorQuantize(8, 16, zero_debias=True, threshold_ema_dead_code=1),
    "residual": lambda: ResidualVQ(
        dim=8, codebook_size=16, num_quantizers=3, quantize_dropout=True, threshold_ema_dead_code=1,
        kmeans_init=True,
    ),
    "shared": lambda: ResidualVQ(
        dim=8, codebook_size=16, num_quantizers=3, shared_codebook=True, threshold_ema_dead_code=1
    ),
    "grouped": lambda: GroupedResidualVQ(
        dim=8, codebook_size=16, num_quantizers=2, groups=2, threshold_ema_dead_code=1
    ),
}  # fmt: skip


def batches(case):
    """Batches of each step, for each rank: even, uneven, and empty on either rank or both."""
    generator = torch.Generator().manual_seed(case)
    sizes = [(40, 40), (50, 3), (0, 20), (7, 0), (0, 0), (30, 31)]
    return [[torch.randn(n, 8, generator=generator) for n in both_sizes] for both_sizes in sizes]


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def train_all(rank):
    """The states of all modules after every step, and how many messages were sent in it."""
    sent = []
    all_reduce = dist.all_reduce

    def counting(*args, **kwargs):
        sent.append(1)
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counting
    results = {}
    for name, make in MODULES.items():
        torch.manual_seed(0)
        module = make()
        torch.manual_seed(rank + 1)  # draws of its own on each rank
        results[name] = []
        for step in batches(0):
            before = len(sent)
            x = step[rank].clone().requires_grad_()
            quantized, _, losses = module(x)
            (quantized.sum() + losses.sum()).backward()
            results[name].append((state(module), len(sent) - before))
    return results


@pytest.mark.parametrize("name", MODULES)
def test_equal_codebooks_after_every_step(trained, name):
    steps = list(zip(trained[0][name], trained[1][name], strict=True))
    for (first, _), (second, _) in steps:
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    states = [first for (first, _), _ in steps]
    embed = next(key for key in states[0] if key.endswith("embed"))
    moving = [not torch.equal(a[embed], b[embed]) for a, b in itertools.pairwise(states)]
    assert moving[3] is False, "a step without vectors changed something"
    assert any(moving) or name == "learned"


@pytest.mark.parametrize("name", MODULES)
def test_one_message_a_step(trained, name):
    sent = [count for _, count in trained[0][name]]
    assert sent[1:] == [1] * (len(sent) - 1)
    assert sent[0] == 1 or "k-means" in name or name in ("heads", "residual")


def test_as_one_process_with_both_batches(trained):
    torch.manual_seed(0)
    module = MODULES["plain"]()
    for step, (actual, _) in zip(batches(0), trained[0]["plain"], strict=True):
        module(torch.cat(step))
        for key, value in state(module).items():
            torch.testing.assert_close(actual[key], value, rtol=1e-5, atol=1e-6)


def replaced_by(rank):
    """Every codeword is unused: all are replaced."""
    torch.manual_seed(0)
    module = VectorQuantize(8, 16, threshold_ema_dead_code=1e6, seed=3)
    torch.manual_seed(rank)
    x = torch.randn(40, 8)
    module(x)
    return x, state(module)


def test_both_ranks_supply_new_codewords(both):
    (x0, actual), (x1, _) = both["replaced_by"]
    embed = actual["_codebook.embed"][0]
    of_first = (embed[:, None] == x0).all(-1).any(1)
    of_second = (embed[:, None] == x1).all(-1).any(1)
    assert of_first.sum() == of_second.sum() == 8
    assert (of_first ^ of_second).all()
    assert len(embed.unique(dim=0)) == 16
    assert (actual["_codebook.cluster_size"] == 1e6).all()
    torch.testing.assert_close(actual["_codebook.embed_avg"], actual["_codebook.embed"] * 1e6)


def kmeans_of_halves(rank):
    torch.manual_seed(0)
    module = VectorQuantize(8, 16, kmeans_init=True, seed=5)
    x = torch.randn(90, 8, generator=torch.Generator().manual_seed(1))
    module(x[:33] if rank == 0 else x[33:], freeze_codebook=True)
    return state(module)


def test_kmeans_does_not_depend_on_the_partition(both):
    first, second = both["kmeans_of_halves"]
    assert all(torch.equal(first[key], second[key]) for key in first)
    module = VectorQuantize(8, 16, kmeans_init=True, seed=5)
    module(torch.randn(90, 8, generator=torch.Generator().manual_seed(1)), freeze_codebook=True)
    for key, value in state(module).items():
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-6)


DISAGREEMENTS = {
    "the number of codewords of codebook 0 is 16, 17": lambda r: VectorQuantize(8, 16 + r),
    "D of codebook 0 is 8, 9": lambda r: VectorQuantize(8 + r, 16),
    "the number of heads of codebook 0 is 1, 2": lambda r: VectorQuantize(8, 16, 8, r + 1, True),
    "whether codebook 0 replaces unused codewords is 0, 1": lambda r: VectorQuantize(
        8, 16, threshold_ema_dead_code=r
    ),
    "the number of codebooks is 2, 3": lambda r: ResidualVQ(dim=8, codebook_size=16, num_quantizers=2 + r),
    "the number of codewords of codebook 0 is 8, 9": lambda r: ResidualVQ(
        dim=8, codebook_size=((8, 9), (9, 8))[r]
    ),
    "k-means: the number of codewords is 16, 17": lambda r: VectorQuantize(8, 16 + r, kmeans_init=True),
}


def disagree(rank):
    messages = []
    for make in DISAGREEMENTS.values():
        module = make(rank)
        dim = module.dim
        try:
            module(torch.randn(20, dim))
            messages.append("no error")
        except ValueError as error:
            messages.append(str(error))
    module = VectorQuantize(8, 16 + rank, sync_codebook=False)
    module(torch.randn(20, 8))
    return messages


def test_disagreement_is_an_error_on_all_ranks(both):
    for messages in both["disagree"]:
        for expected, message in zip(DISAGREEMENTS, messages, strict=True):
            assert expected in message
            assert "on ranks 0 to 1, expected the same on all" in message


def compiled(rank):
    torch.manual_seed(0)
    module = VectorQuantize(8, 16, threshold_ema_dead_code=2)
    other = copy.deepcopy(module)
    function = torch.compile(other, fullgraph=True, backend="aot_eager")
    for i, step in enumerate(batches(1)[:2]):
        for one in (module, function):
            torch.manual_seed(10 * i + rank)
            one(step[rank])
    return state(module), state(other)


def test_compiled(both):
    states = [one for ranks in both["compiled"] for one in ranks]
    assert all(torch.equal(states[0][key], other[key]) for other in states for key in states[0])


def wrapped(rank):
    torch.manual_seed(rank)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), VectorQuantize(8, 16, threshold_ema_dead_code=2))
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in batches(2)[:2]:
        quantized, _, loss = parallel(step[rank])
        (quantized.square().mean() + loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return state(model)


def test_distributed_data_parallel(both):
    first, second = both["wrapped"]
    assert all(torch.equal(first[key], second[key]) for key in first)


def in_a_group(rank):
    alone = dist.new_group([0])
    torch.manual_seed(0)
    module = VectorQuantize(8, 16, process_group=alone if rank == 0 else None, sync_codebook=rank == 0)
    other = copy.deepcopy(module)
    for step in batches(3)[:2]:
        if rank == 0:
            module(step[0])
    return state(module), module.state_dict().keys() == other.state_dict().keys()


def test_group_of_its_own(both):
    (actual, same), _ = both["in_a_group"]
    torch.manual_seed(0)
    module = VectorQuantize(8, 16)
    for step in batches(3)[:2]:
        module(step[0])
    assert same
    assert all(torch.equal(actual[key], value) for key, value in state(module).items())


RUNS = (train_all, replaced_by, kmeans_of_halves, disagree, compiled, wrapped, in_a_group)


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


@pytest.fixture
def trained(both):
    return both["train_all"]
