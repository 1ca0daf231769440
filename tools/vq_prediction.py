"""Prints a table of predicted times of ``vq_nearest`` on an H100, from counted operations and bytes.

For docs/vector_quantization.md. Nothing is measured: counts are those of kernels/vq_nearest.py with float32
inputs, and rates the data sheet's of the SXM5 module.
"""

from __future__ import annotations

from typing import NamedTuple

HALF_FLOPS = 989e12  # dense float16 with float32 sums
SIMPLE_OPERATIONS = 132 * 128 * 1.755e9  # per second: multiprocessors, lanes, clock
INTEGER_OPERATIONS = SIMPLE_OPERATIONS / 2  # minima, maxima and logic run at half rate
BYTES = 3.35e12  # per second, HBM3

SHAPES = {
    (16_384, 512, 64): "16k x 512 x 64",
    (262_144, 8_192, 256): "262k x 8192 x 256",
    (1_048_576, 16_384, 8): "1M x 16384 x 8",
    (294_912, 1_024, 128): "288k x 1024 x 128, a stage of residual quantization",
}


class Times(NamedTuple):
    """In microseconds."""

    memory: float
    products: float
    comparisons: float


def predicted(n: int, codewords: int, dim: int) -> Times:
    tiny = dim + 3 <= 32
    padded = max(16, 1 << (dim + 3 * tiny - 1).bit_length())
    # Read x twice, write and read it in float16 (and once more for each other tile of codewords from the
    # second-level cache); the codebook in float16; best, second and index written and read; the result.
    moved = n * (2 * 4 * dim + 2 * 2 * padded + 2 * 12 + 20) + 2 * codewords * padded
    scores = n * codewords
    if tiny:  # insert the number; minimum, two maxima
        comparisons = 4 * scores / INTEGER_OPERATIONS
    else:  # first term times scale and its subtraction; number; maximum, equality, selection, maximum
        comparisons = 2 * scores / SIMPLE_OPERATIONS + 5 * scores / INTEGER_OPERATIONS
    products = 2 * scores * padded / HALF_FLOPS
    return Times(*(1e6 * seconds for seconds in (moved / BYTES, products, comparisons)))


def main() -> None:
    print(
        "| N x K x D | memory, us | products, us | comparisons, us | largest to sum, us | N x K alone, us |"
    )
    print("|---|---|---|---|---|---|")
    for (n, codewords, dim), name in SHAPES.items():
        t = predicted(n, codewords, dim)
        matrix = 2 * 4 * n * codewords / BYTES * 1e6
        cells = [f"{v:.1f}" if v < 10 else f"{v:.0f}" for v in t] + [
            f"{max(t):.0f} to {sum(t):.0f}",
            f"{matrix:.0f}",
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
