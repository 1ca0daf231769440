"""Processes draw their shares of a batch: together, the samples of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from genperf_testing import models, naive

from genperf.sampling import _share

WORKER = """
import sys
import torch
from genperf_testing import models, naive
torch.set_num_threads(1)
rank, world, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
tiny = models.tiny_model("gated_pixelcnn_class")
cond = models.conditioning(tiny, 5)
sampler = naive.compiled(tiny)
torch.manual_seed(rank)  # not what the others have
drawn = {"environment": sampler.sample(5, seed=3, cond=cond, distributed=True)}
try:
    sampler.sample(5, cond=cond, distributed=True)
except ValueError as error:
    drawn["error"] = str(error)
torch.distributed.init_process_group("gloo", "file://" + directory + "/store", rank=rank, world_size=world)
known = torch.zeros(5, *tiny.shape, dtype=torch.bool)
known[:, :2] = True
given = torch.arange(5)[:, None, None].expand(5, *tiny.shape)
drawn["seed"] = sampler.sample(5, seed=3, cond=cond, distributed=True)
drawn["known"] = sampler.sample(5, seed=3, cond=cond, distributed=True, prefix=(given, known))
drawn["own"] = sampler.sample(5, cond=cond, distributed=True)
generator, one = torch.Generator().manual_seed(8), {"label": cond["label"][:1]}
drawn["generator"] = sampler.sample(1, generator=generator, cond=one, distributed=True)
torch.save(drawn, directory + "/" + str(rank))
torch.distributed.destroy_process_group()
"""


def test_two_processes_draw_what_one_does(tmp_path):
    support = Path(__file__).parents[1] / "support"
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(support), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-c", WORKER, str(rank), "2", str(tmp_path)]
        processes.append(subprocess.Popen(command, env=environment))
    for process in processes:
        assert process.wait(timeout=120) == 0
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    tiny = models.tiny_model("gated_pixelcnn_class")
    cond = models.conditioning(tiny, 5)
    sampler = naive.compiled(tiny)
    known = torch.zeros(5, *tiny.shape, dtype=torch.bool)
    known[:, :2] = True
    given = torch.arange(5)[:, None, None].expand(5, *tiny.shape)
    torch.manual_seed(0)
    expected = {
        "environment": sampler.sample(5, seed=3, cond=cond),
        "seed": sampler.sample(5, seed=3, cond=cond),
        "known": sampler.sample(5, seed=3, cond=cond, prefix=(given, known)),
        "own": sampler.sample(5, cond=cond),
        "generator": sampler.sample(
            1, generator=torch.Generator().manual_seed(8), cond={"label": cond["label"][:1]}
        ),
    }
    assert "seed is None, expected a number that is the same in all 2 processes" in first["error"]
    for name, samples in expected.items():
        assert torch.equal(torch.cat([first[name], second[name]]), samples), name
    assert [len(first[n]) for n in expected] == [2, 2, 2, 2, 0]


def test_torchruns_environment(monkeypatch, no_process_group):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    tiny = models.tiny_model("gated_pixelcnn")
    sampler = naive.compiled(tiny)
    assert torch.equal(sampler.sample(7, seed=1, distributed=True), sampler.sample(7, seed=1)[2:4])
    values = sampler.sample(7, seed=2)
    everything = torch.ones(1, dtype=torch.bool)
    assert torch.equal(sampler.sample(7, seed=1, distributed=True, prefix=(values, everything)), values[2:4])


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares(batch, world):
    shares = [_share.share(batch, rank, world) for rank in range(world)]
    assert [i for s in shares for i in s] == list(range(batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
