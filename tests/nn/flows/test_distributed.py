"""Two processes: gradients by DistributedDataParallel, and one initialisation of activation normalization."""

import pytest
import torch
import torch.distributed as dist
from genperf_testing.flows import trained
from torch.nn.parallel import DistributedDataParallel

from genperf.nn.flows import ActNorm, Glow

WORLD = 2


def batch(rank, seed=0):
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(10 * seed + rank))
    return x * (rank + 1) + rank


def model():
    torch.manual_seed(0)
    return Glow((3, 8, 8), 2, 2, 8).double()


def work(rank, directory):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=WORLD)
    one = trained(model())
    parallel = DistributedDataParallel(one)
    grads = []
    for seed in range(2):
        latents, logdet = parallel(batch(rank, seed).double())
        loss = sum(t.square().sum() for t in latents) / 2 - logdet.sum()
        loss.backward()
        grads.append([p.grad.clone() for p in one.parameters()])
        one.zero_grad()
    fresh = DistributedDataParallel(model())  # initialised by the first batches of both
    fresh(batch(rank).double())
    norm = ActNorm(3)
    norm(batch(rank))
    torch.save((grads, fresh.module.state_dict(), norm.state_dict()), f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    directory = tmp_path_factory.mktemp("flows")
    torch.multiprocessing.spawn(work, (str(directory),), nprocs=WORLD)
    return [torch.load(directory / f"{rank}.pt") for rank in range(WORLD)]


def test_gradients_are_averaged(both):
    one = trained(model())
    for seed in range(2):
        expected = []
        for rank in range(WORLD):
            latents, logdet = one(batch(rank, seed).double())
            (sum(t.square().sum() for t in latents) / 2 - logdet.sum()).backward()
        expected = [p.grad / WORLD for p in one.parameters()]
        one.zero_grad()
        for grads, *_ in both:
            torch.testing.assert_close(grads[seed], expected, rtol=1e-9, atol=1e-9)


def test_processes_initialise_alike(both):
    first, second = (states for _, states, _ in both)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    joined = ActNorm(3)
    joined(torch.cat([batch(0), batch(1)]))
    for _, _, state in both:
        torch.testing.assert_close(state["shift"], joined.shift.detach())
        torch.testing.assert_close(state["log_scale"], joined.log_scale.detach())
