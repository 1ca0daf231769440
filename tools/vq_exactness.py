"""Counts wrong indices of ``vq_nearest`` over as many vectors as wanted: ``vq_exactness.py --rows 1e8``.

Every index is compared with float64, whose error bound says which codewords might be the nearest. Where
there are several, or where the index is another, integer arithmetic decides: the numbers as given are
fractions with one denominator. Prints a line for each kind of data; the exit status is 1 if an index is
wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from genperf.ops import vq_nearest

Data = tuple[Tensor, Tensor]


class Kind(NamedTuple):
    """``make(rows, codewords, dim)`` gives vectors and a codebook; ``share`` is its part of all rows."""

    make: Callable[[int, int, int], Data]
    share: float
    codewords: int = 256
    dim: int = 8


def _gaussian(rows: int, codewords: int, dim: int) -> Data:
    return torch.randn(rows, dim), torch.randn(codewords, dim)


def _k_means(rows: int, codewords: int, dim: int) -> Data:
    """Vectors of a mixture, and the means of those that are nearest to a few of them."""
    middles = 3 * torch.randn(32, dim)

    def draw(n: int) -> Tensor:
        return middles[torch.randint(32, (n,))] + torch.randn(n, dim)

    sample = draw(16 * codewords)
    codebook = sample[:codewords].clone()
    for _ in range(5):
        nearest = torch.cdist(sample, codebook).argmin(1)
        counts = torch.bincount(nearest, minlength=codewords)[:, None]
        sums = torch.zeros_like(codebook).index_add_(0, nearest, sample)
        codebook = torch.where(counts > 0, sums / counts.clamp(min=1), codebook)
    return draw(rows), codebook


def _vqgan(rows: int, codewords: int, dim: int) -> Data:
    return torch.randn(rows, dim), (2 * torch.rand(codewords, dim) - 1) / codewords


def _offset(rows: int, codewords: int, dim: int) -> Data:
    x, codebook = _gaussian(rows, codewords, dim)
    return x + 30, codebook + 30


def _scaled(factor: float) -> Callable[[int, int, int], Data]:
    def make(rows: int, codewords: int, dim: int) -> Data:
        x, codebook = _gaussian(rows, codewords, dim)
        return x * factor, codebook * factor

    return make


def _duplicates(rows: int, codewords: int, dim: int) -> Data:
    x, codebook = _gaussian(rows, codewords, dim)
    return x, codebook[torch.randint(codewords // 3, (codewords,))]


def _an_ulp_apart(rows: int, codewords: int, dim: int) -> Data:
    """Codewords in pairs that differ by one ulp of one element; vectors on and halfway between them."""
    half = torch.randn(codewords // 2, dim)
    moved = half.clone()
    at = torch.arange(len(half)), torch.arange(len(half)) % dim
    moved[at] = torch.nextafter(moved[at], torch.tensor(torch.inf))
    codebook = torch.cat([moved, half])
    i, j = torch.randint(codewords, (2, rows))
    x = (codebook[i] + codebook[j]) / 2
    return torch.where(torch.rand(rows, 1) < 0.5, x, torch.randn(rows, dim)), codebook


def _a_far_codeword(rows: int, codewords: int, dim: int) -> Data:
    x, codebook = _gaussian(rows, codewords, dim)
    codebook[codewords // 2] *= 1e6
    return x, codebook


def _mostly_far(rows: int, codewords: int, dim: int) -> Data:
    """As with unused codewords of a moving average, whose norms differ by orders of magnitude."""
    x, codebook = _gaussian(rows, codewords, dim)
    far = torch.rand(codewords, 1) < 0.9
    return x, torch.where(far, codebook * 10 ** (5 * torch.rand(codewords, 1)), codebook)


KINDS = {
    "gaussian": Kind(_gaussian, 0.2),
    "gaussian, 64 dimensions": Kind(_gaussian, 0.02, 512, 64),
    "k-means": Kind(_k_means, 0.2),
    "k-means, 32 dimensions": Kind(_k_means, 0.06, 256, 32),
    "VQGAN initialisation": Kind(_vqgan, 0.008, 16384, 8),
    "VQGAN initialisation, 256 dimensions": Kind(_vqgan, 0.0003, 16384, 256),
    "offset 30": Kind(_offset, 0.15),
    "offset 30, 100 dimensions": Kind(_offset, 0.03, 256, 100),
    "tiny": Kind(_scaled(1e-30), 0.1),
    "huge": Kind(_scaled(1e18), 0.1),
    "duplicates": Kind(_duplicates, 0.1),
    "an ulp apart": Kind(_an_ulp_apart, 0.01, 64),
    "an ulp apart, 32 dimensions": Kind(_an_ulp_apart, 0.002, 64, 32),
    "a far codeword": Kind(_a_far_codeword, 0.0107),
    "a far codeword, 32 dimensions": Kind(_a_far_codeword, 0.008, 256, 32),
    "mostly far codewords": Kind(_mostly_far, 0.001, 1024, 64),
}


def _integers(rows: Tensor) -> list[list[int]]:
    """The numbers times a power of two that makes integers of all."""
    ratios = [[v.as_integer_ratio() for v in row] for row in rows.tolist()]
    unit = max(d for row in ratios for _, d in row)
    return [[n * (unit // d) for n, d in row] for row in ratios]


def nearest_exactly(x: Tensor, codebook: Tensor, candidates: list[int]) -> int:
    """The lowest index among the candidates at the least distance."""
    (row, *words) = _integers(torch.cat([x[None], codebook[candidates]]))
    squares = [sum((a - b) ** 2 for a, b in zip(row, word, strict=True)) for word in words]
    return min(zip(squares, candidates, strict=True))[1]


def compare(x: Tensor, codebook: Tensor, index: Tensor) -> Counter[str]:
    """How many of the vectors x there are, are settled in either way, and have a wrong index."""
    # Of equal codewords the first is meant; the others are left out here.
    _, group = torch.unique(codebook + 0.0, dim=0, return_inverse=True)
    places = torch.arange(len(codebook))
    first = torch.full_like(places, len(codebook)).scatter_reduce_(0, group, places, "amin")
    first = first[first < len(codebook)].sort().values
    words = codebook[first].double()
    rows = x.double()
    score = torch.addmm(words.square().sum(1) / 2, rows, words.T, alpha=-1)
    longest = words.norm(dim=1).max()
    bound = (x.shape[1] + 8) * 2.0**-52 * (rows.norm(dim=1) * longest + longest.square())
    least, place = score.min(1)
    candidates = score <= (least + 2 * bound)[:, None]
    alone = candidates.sum(1) == 1
    settled = alone & (index == first[place])
    tally = Counter(rows=len(x), by_float64=int(settled.sum()))
    for row in (~settled).nonzero().flatten().tolist():
        among = first[candidates[row]].tolist()
        tally["by_integers"] += 1
        found = int(index[row])
        tally["wrong"] += nearest_exactly(x[row], codebook, sorted({*among, found})) != found
    return tally


def chunks(kind: Kind, rows: int, seed: int) -> Iterator[Data]:
    """Chunks with a codebook each, of at most 2^22 scores."""
    most = max(64, 2**22 // kind.codewords)
    for i, start in enumerate(range(0, rows, most)):
        torch.manual_seed(seed * 1_000_003 + i)
        yield kind.make(min(most, rows - start), kind.codewords, kind.dim)


def count(
    name: str, rows: int, seed: int = 0, search: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Counter[str]:
    tally: Counter[str] = Counter()
    for x, codebook in chunks(KINDS[name], rows, seed):
        index = search(x, codebook) if search else vq_nearest(x, codebook).indices
        tally.update(compare(x, codebook, index))
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=float, default=1e6, help="vectors in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this kind of data")
    args = parser.parse_args()
    kinds = args.kind or list(KINDS)
    share = sum(KINDS[name].share for name in kinds)
    total: Counter[str] = Counter()
    for name in kinds:
        start = time.process_time()
        one = count(name, max(1, round(args.rows * KINDS[name].share / share)), args.seed)
        seconds = time.process_time() - start
        print(f"{name}: {_described(one)} ({seconds:.0f} s)", flush=True)
        total.update(one)
    print(f"all: {_described(total)}")
    return int(total["wrong"] > 0)


def _described(tally: Counter[str]) -> str:
    return (
        f"{tally['rows']} vectors, {tally['by_float64']} settled by float64, "
        f"{tally['by_integers']} by integers, {tally['wrong']} wrong"
    )


if __name__ == "__main__":
    sys.exit(main())
