"""genperf.ops.vq_nearest in the contract suite; what is its own is tested in tests/ops/vq_nearest/."""

from __future__ import annotations

from genperf_testing.cases import SHAPES, Case
from genperf_testing.nearest import grid

from genperf.ops import vq_nearest


def _case(name, backends=("reference", "cpu"), n_codewords=37, **options):
    return Case(
        name,
        lambda x, codebook: vq_nearest(x, codebook, **options),
        constants=lambda shape: [grid(shape, "x"), grid((n_codewords, shape[-1]), "codebook")],
        elementwise=False,
        shapes=(*(shape for shape in SHAPES if len(shape) > 1), (0, 4), (0, 2, 3)),
        backends=backends,
    )


CASES = (
    _case("l2", ("reference", "cpu", "triton"), return_distance=True),
    _case("dot", ("reference", "cpu", "triton"), metric="dot"),
    _case("cosine", ("reference", "cpu", "triton"), metric="cosine", return_distance=True),
    _case("three nearest", ("reference", "cpu", "triton"), k=3, return_distance=True),
    _case("many codewords", n_codewords=300),
)
