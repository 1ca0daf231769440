"""csrc/pixel_sampler/head.h: the same bits on every instruction set and by a warp, the choices of torch."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch
from genperf_testing.backends import TESTS, simt

import genperf
from genperf.sampling._program import Program
from genperf.sampling.heads import (
    Bernoulli,
    Categorical,
    Gaussian,
    LogisticMixture,
    draw,
    make_noise,
    margin,
)

SOURCE = Path(__file__).parent / "head.cu"
ROUNDING = 2.0**-20
INF, NAN = torch.inf, torch.nan
FLAGS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"),
}


def build(isa, folder):
    library = folder / f"{isa}.so"
    subprocess.run(
        [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-Wall",
         "-Wextra", "-Werror", "-Wno-psabi", "-Wno-maybe-uninitialized", f"-DGENPERF_ISA={isa}", *FLAGS[isa],
         f"-I{TESTS.parent / 'csrc'}", "-x", "c++", str(SOURCE), "-o", str(library)],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def teams(tmp_path_factory):
    """A thread at each instruction set of this processor, and an emulated warp."""
    folder = tmp_path_factory.mktemp("head")
    libraries = {isa: build(isa, folder) for isa in FLAGS if isa in genperf.cpu_isas()}
    headers = [*(TESTS.parent / "csrc" / "pixel_sampler").glob("head.*"), TESTS.parent / "csrc/common/math.h"]
    stamp = max(path.stat().st_mtime_ns for path in headers)  # compile_source looks at the source alone
    return libraries | {"warp": simt().compile_source(SOURCE, "-Wno-unknown-pragmas", f"-DSTAMP={stamp}")}


def pointer(x):
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def native(library, head, params, noise, temperature=1.0, top_k=0, index=0, known=None):
    words, params, noise = Program(head).tables()["head"], params.contiguous(), noise.contiguous()
    values, mask = known or (None, None)
    out = torch.full((len(params), head.values // head.draws), 7e7)
    simt().call(
        library.draw_batch, pointer(words), *map(ctypes.c_int64, params.shape), index, pointer(params),
        pointer(noise), ctypes.c_float(temperature), ctypes.c_int64(top_k), pointer(values), pointer(mask),
        pointer(out),
    )  # fmt: skip
    return out


def same(teams, *args, **kwargs):
    """What all teams draw, bit for bit."""
    drawn = {name: native(library, *args, **kwargs) for name, library in teams.items()}
    first = drawn["baseline"]
    for name, other in drawn.items():
        assert torch.equal(other.isnan(), first.isnan()), name
        assert torch.equal(other.nan_to_num(), first.nan_to_num()), name
    return first


def noise_of(description, images):
    return make_noise(description.program(0, 1, 1), torch.tensor([7, 9]), range(images))[:, 0, 0]


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("classes", [2, 15, 16, 17, 32, 33, 256, 257, 4096, 4097, 65536])
def test_classes(teams, classes):
    images = 400 if classes < 1000 else 24 if classes < 60000 else 4
    description = Categorical(classes, 3)
    head, noise = description.program(0, 1, 1), noise_of(description, images)
    logits = 3 * normals(images, 3 * classes)
    logits[: images // 2] = logits[: images // 2].round()  # equal ones
    logits[::4] = logits[::4].abs().neg()
    logits[1::3, 1::7] = -INF
    noise[0], noise[1] = 2.0**-25, 1.0
    for temperature, top_k in ((1.0, 0), (0.7, 5), (2.0, classes // 2 + 1), (1.0, 1)):
        index = top_k % 3
        drawn = same(teams, head, logits, noise, temperature, top_k, index)
        expected = draw(head, logits, noise, temperature, top_k, index)
        certain = margin(head, logits, noise, temperature, top_k, index) > ROUNDING
        # Equal logits at the border of the top k leave no margin, and the choice is certain all the same.
        assert ((drawn == expected)[:, 0] | ~certain).all()
        assert (drawn == expected).double().mean() >= 0.99
        chosen = logits.view(images, classes, 3)[torch.arange(images), drawn[:, 0].long(), index]
        assert (chosen > -INF).all()


def test_the_share_of_probability_of_each_class(teams):
    """Of 70 classes, from the uniforms that bound it."""
    description, images = Categorical(70), 70
    head, logits = description.program(0, 1, 1), normals(1, 70)
    ends = logits.double().softmax(1).cumsum(1)[0]
    starts = torch.cat([torch.zeros(1), ends[:-1]])
    for u in (starts + 2.0**-20, ends - 2.0**-20):
        drawn = same(teams, head, logits.expand(images, -1), u.float()[:, None])
        assert torch.equal(drawn[:, 0], torch.arange(70.0))


@pytest.mark.parametrize("classes", [3, 40, 300])
@pytest.mark.parametrize("top_k", [0, 1, 2, 39, 40])
def test_top_k_of_equal_logits(teams, classes, top_k):
    head = Categorical(classes).program(0, 1, 1)
    logits = torch.zeros(60, classes)
    logits[20:40, classes // 2 :] = -0.0  # equal to 0
    logits[40:] = -INF
    logits[40:, -1] = -1e30
    noise = torch.linspace(2.0**-25, 1.0, 20).repeat(3)[:, None]
    drawn = same(teams, head, logits, noise, 1.0, top_k)[:, 0]
    kept = min(top_k or classes, classes)
    for rows in (drawn[:20], drawn[20:40]):
        assert (rows.min(), rows.max()) == (0, kept - 1)
    assert (drawn[40:] == classes - 1).all()


@pytest.mark.parametrize("classes", [2, 16, 17, 300])
@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_logits_that_are_no_distribution(teams, classes, top_k):
    head = Categorical(classes).program(0, 1, 1)
    logits = normals(6, classes)
    logits[0] = -INF
    logits[1] = NAN
    logits[2, -1] = NAN
    logits[3, 1] = INF
    logits[4], logits[4, 0] = -INF, NAN
    logits[5], logits[5, -1] = -3e38, 3e38
    for end in (2.0**-25, 0.5, 1.0):
        for temperature in (1e-38, 1.0, 1e30):
            drawn = same(teams, head, logits, torch.full((6, 1), end), temperature, top_k)
            assert drawn[:5, 0].tolist() == [0] * 5
            expected = draw(head, logits, torch.full((6, 1), end), temperature, top_k)
            assert torch.equal(drawn, expected)


@pytest.mark.parametrize(
    "description",
    [Bernoulli(3), Gaussian(3), LogisticMixture(10, 3), LogisticMixture(5, 1), LogisticMixture(40, 3)],
    ids=str,
)
@pytest.mark.parametrize("inpaint", [False, True])
def test_other_heads(teams, description, inpaint):
    images = 400
    head, noise = description.program(0, 1, 1), noise_of(description, images)
    params = 2 * normals(images, description.parameters)
    params[0], params[1, 0], params[2] = NAN, NAN, 90.0
    noise[3], noise[4] = 2.0**-25, 1.0
    known = (normals(images, description.values).clamp(-1, 1), normals(images, description.values) > 0.5)
    index = head.draws - 1
    drawn = same(teams, head, params, noise, 0.8, 0, index, known if inpaint else None)
    expected = draw(head, params.double(), noise, 0.8, 0, index, known if inpaint else None)
    single = draw(head, params, noise, 0.8, 0, index, known if inpaint else None)
    assert torch.equal(drawn.isnan(), single.isnan())
    certain = (margin(head, params, noise, 0.8, 0, index) > ROUNDING) & expected.isfinite().all(1)
    assert certain.sum() > images - 10
    error, stock = (x.double()[certain] - expected[certain] for x in (drawn, single))
    assert error.abs().max() <= 2 * stock.abs().max() + 1e-7


@pytest.mark.parametrize("name", simt().SCHEDULES)
def test_a_warp_does_not_depend_on_the_order_of_its_lanes(teams, name):
    head = Categorical(300).program(0, 1, 1)
    logits, noise = normals(10, 300).round(), noise_of(Categorical(300), 10)
    with simt().schedule(name):
        drawn = native(teams["warp"], head, logits, noise, 1.0, 20)
    assert torch.equal(drawn, native(teams["baseline"], head, logits, noise, 1.0, 20))
