"""The nearest codeword of a vector quantizer, exactly.

Definition: the assignment step of A. van den Oord et al., "Neural discrete representation learning", NeurIPS
2017 (arXiv:1711.00937), equation 1. Which index is meant where rounding would decide is laid down in
docs/vector_quantization.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import Operator, direct_device
from genperf.ops.philox_random import FLOATS

__all__ = ["VqNearest", "vq_nearest"]

METRICS = {"l2": 0, "cosine": 1, "dot": 2}
LARGEST_K = 64
_L2, _, _DOT = METRICS.values()
NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_compiling = torch.compiler.is_dynamo_compiling
_CHUNK = 1 << 22  # elements of a chunk's score matrix in the reference
_TINY = torch.finfo(torch.float64).tiny


class VqNearest(NamedTuple):
    """Results of :func:`vq_nearest`; ``distances`` is None unless asked for."""

    indices: Tensor
    distances: Tensor | None


# The reference: scores in float64 with a bound of their error, and integers of any size where it overlaps.


def _integers(row: Tensor) -> tuple[list[int], int]:
    """The elements as integers over one denominator."""
    ratios = [value.as_integer_ratio() for value in row.tolist()]
    denominator = max(d for _, d in ratios)
    return [n * (denominator // d) for n, d in ratios], denominator


def _exact_key(x: Tensor, c: Tensor, metric: int) -> Fraction:
    """A number that orders codewords c as their distances from x do."""
    (xs, x_unit), (cs, c_unit) = _integers(x), _integers(c)
    dot = Fraction(sum(a * b for a, b in zip(xs, cs, strict=True)), x_unit * c_unit)
    if metric == _DOT:
        return -dot
    square = Fraction(sum(b * b for b in cs), c_unit * c_unit)
    if metric == _L2:
        return square - 2 * dot
    return Fraction(0) if dot == 0 else -dot * abs(dot) / square


def _first_occurrences(codebook: Tensor) -> Tensor:
    """Ascending indices of the rows that equal no earlier one."""
    _, group = torch.unique(codebook + 0.0, dim=0, return_inverse=True)  # + 0: -0 is 0
    n = len(codebook)
    first = group.new_full((n,), n).scatter_reduce_(0, group, torch.arange(n, device=group.device), "amin")
    return first[first < n].sort().values


def _scores(x: Tensor, words: Tensor, metric: int) -> tuple[Tensor, Tensor]:
    """In float64, what is least for the nearest codeword, [N, K], and a bound of its error."""
    dim = words.shape[1]
    u = (dim + 8) * 2.0**-52
    square, dot = words.square().sum(1), x @ words.T
    # D max|x| max|c| bounds the sum of |x c|; a root of a sum of squares might underflow.
    size = dim * x.abs().amax(1, keepdim=True) * words.abs().amax(1)
    if metric == _DOT:
        return -dot, u * (size + dim * _TINY)
    if metric == _L2:
        return square - 2 * dot, u * (square + 2 * size + dim * _TINY)
    length = torch.where(square == 0, 1.0, square.sqrt())
    unsafe = (square < dim * _TINY * 2.0**60) & words.any(1)
    return -dot / length, torch.where(unsafe, torch.inf, u * (size + dim * _TINY) / length)


def _search(x: Tensor, words: Tensor, metric: int, k: int) -> Tensor:
    """Positions of the k nearest of finite ``words`` [K, D] for each finite row of x [N, D], in float64."""
    score, error = _scores(x, words, metric)
    lower, upper = score - error, score + error
    # Written so that a NaN, where float64 overflows, makes a candidate.
    candidate = ~(lower > upper.nan_to_num(nan=torch.inf).kthvalue(k, dim=1, keepdim=True).values)
    index = score.topk(k, dim=1, largest=False).indices
    near, far = upper.gather(1, index)[:, :-1], lower.gather(1, index)[:, 1:]
    settled = (candidate.sum(1) == k) & (near < far).all(1) & upper.isfinite().all(1)
    for row in (~settled).nonzero().flatten().tolist():
        among = candidate[row].nonzero().flatten().tolist()
        among.sort(key=lambda i: (_exact_key(x[row], words[i], metric), i))
        index[row] = torch.tensor(among[:k], device=x.device)
    return index


def _distances(x: Tensor, words: Tensor, metric: int) -> Tensor:
    """From x [N, D] to words [N, k, D], in float64."""
    x = x[:, None]
    if metric == _L2:
        return (x - words).square().sum(2)
    dot = (x * words).sum(2)
    if metric == _DOT:
        return -dot
    lengths = x.norm(dim=2) * words.norm(dim=2)
    return (1 - dot / torch.where(lengths == 0, 1.0, lengths)).clamp(min=0)


def _reference(
    x: Tensor, codebook: Tensor, metric: int, k: int, want_distances: bool
) -> tuple[Tensor, Tensor | None]:
    indices, distances = [], []
    n_codewords, dim = codebook.shape[1:]
    for one, book in zip(x, codebook.double(), strict=True):
        finite = book.isfinite().all(1)
        order = torch.cat([finite.nonzero(), (~finite).nonzero()]).flatten()  # unusable codewords come last
        usable = order[: int(finite.sum())]
        if k == 1 and len(usable):
            usable = usable[_first_occurrences(book[usable])]
        found = min(k, len(usable))
        step = max(1, _CHUNK // max(n_codewords, k * dim))
        for rows in one.reshape(-1, dim).double().split(step):
            index = order[:k].repeat(len(rows), 1)
            good = rows.isfinite().all(1)
            if found:
                index[good, :found] = usable[_search(rows[good], book[usable], metric, found)]
            index[~good] = torch.arange(k, device=x.device)
            indices.append(index)
            if want_distances:
                distance = _distances(rows, book[index], metric)
                distance[~(good[:, None] & finite[index])] = torch.nan
                distances.append(distance)
    shape = [*x.shape[:-1], k]
    return _joined(indices, shape, x, torch.int64), (
        _joined(distances, shape, x, _distance_dtype(x)) if want_distances else None
    )


def _joined(parts: list[Tensor], shape: list[int], x: Tensor, dtype: torch.dtype) -> Tensor:
    return (torch.cat(parts) if parts else x.new_empty(0)).to(dtype).reshape(shape)


def _distance_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _outputs(
    x: Tensor, codebook: Tensor, metric: int, k: int, want_distances: bool
) -> tuple[Tensor, Tensor | None]:
    shape = [*x.shape[:-1], k]
    return x.new_empty(shape, dtype=torch.int64), (
        x.new_empty(shape, dtype=_distance_dtype(x)) if want_distances else None
    )


def _cpu(
    x: Tensor, codebook: Tensor, metric: int, k: int, want_distances: bool
) -> tuple[Tensor, Tensor | None]:
    indices, distances = _outputs(x, codebook, metric, k, want_distances)
    _backend.native.cpu.vq_nearest(x, codebook, indices, distances, metric)  # type: ignore[union-attr]
    return indices, distances


def _direct(x: Tensor, codebook: Tensor, metric: int) -> Any:
    """The indices [*] for x [*, D] and a codebook [K, D]; most of the time of a small call is views."""
    if x.dtype not in NATIVE_DTYPES or x.dim() > 7 or len(codebook) >= 2**31:
        return NotImplemented
    indices = x.new_empty(x.shape[:-1], dtype=torch.int64)
    _backend.native.cpu.vq_nearest(x, codebook, indices, None, metric)  # type: ignore[union-attr]
    return indices


def _refuses(x: Tensor, codebook: Tensor, *_: Any) -> str | None:
    if x.dtype not in NATIVE_DTYPES:
        return f"{x.dtype} is left to the reference"
    if x.dim() > 8:
        return f"{x.dim()} dimensions, at most 8"
    return None if codebook.shape[1] < 2**31 else f"{codebook.shape[1]} codewords, below 2^31"


def _triton(*args: Any) -> tuple[Tensor, Tensor | None]:
    from genperf.kernels.vq_nearest import vq_nearest

    return vq_nearest(*args)


_op = Operator(
    "vq_nearest",
    "(Tensor x, Tensor codebook, int metric, int k, bool want_distances)"
    " -> (Tensor indices, Tensor distances)",
    _reference,
    _outputs,
)
_op.implement("cpu", _cpu, _refuses, direct=_direct)
_op.implement("triton", _triton, _refuses)


def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    metric: str = "l2",
    *,
    dim: int = -1,
    k: int | None = None,
    return_distance: bool = False,
) -> VqNearest:
    """The index of the codeword nearest to each vector, exactly.

    The index is *the lowest that minimises the distance between the numbers as given*, in real arithmetic:
    no rounding, no dtype and no autocast changes it. ``metric`` says which distance:

    - ``"l2"``: the squared Euclidean distance ``|x - c|^2``;
    - ``"cosine"``: ``1 - x.c / (|x| |c|)``, where a zero vector has a cosine of 0 with every other;
    - ``"dot"``: ``-x.c``, so that the largest inner product is nearest.

    Low precision makes it fast: scores in float32 single out the few codewords within a proven bound of the
    best, and only these are ranked again in float64 and, where that cannot tell them apart, in exact integers
    (docs/vector_quantization.md). The matrix [N, K] of distances is never made.

    Backends: ``cpu`` (baseline, AVX2, AVX-512); ``triton``; ``reference`` (float64 in torch, with a look at
    the host) for the rest. There is no CUDA C++ kernel: a product of matrices in float16 with a short
    epilogue is what Triton is made for.

    A vector with a NaN or an infinity has no nearest codeword: its index is 0 (0, 1, ... for ``k``), and its
    distance is NaN. A codeword with one is never chosen; where nothing else is left its distance is NaN.

    Not differentiable: results carry no gradient. The result is the same for any number of threads and any
    batch around a vector.

    Args:
        x: [*, D] or, with ``dim``, with its vectors along another dimension, such as 1 for images
            [B, D, H, W]. Any strides, none are copied. float32, float16, bfloat16, or float64 (by the
            reference alone).
        codebook: [K, D]; or [heads, K, D], and then dimension 0 of ``x`` is that of the heads. Of the dtype
            of ``x``.
        metric: "l2", "cosine" or "dot".
        dim: the dimension of ``x`` that holds D.
        k: how many codewords to return, nearest first, equal distances by index; at most 64. None: one,
            without a dimension for it.
        return_distance: whether to compute the distances too.

    Returns:
        :class:`VqNearest`: ``indices``, int64 [*] or [*, k], the shape of ``x`` without ``dim``; and
        ``distances``, of that shape, float32 (float64 for float64), or None.

    Raises:
        TypeError: for a non-tensor, a dtype that is not as above, or arguments of other types.
        ValueError: for shapes, devices or numbers that do not fit; the message says which.
        RuntimeError: if a backend was forced that cannot run.
    """
    _check(x, codebook, metric, dim, k, return_distance)
    if (
        k is None and not return_distance and codebook.dim() == 2 and dim in (-1, x.dim() - 1)
        and not _compiling() and direct_device(x, codebook) == "cpu"
        and (direct := _op.direct("cpu")) is not None
    ):  # fmt: skip
        indices = direct(x, codebook, METRICS[metric])
        if indices is not NotImplemented:
            return VqNearest(indices, None)
    x, codebook = x.detach().movedim(dim, -1), codebook.detach()
    heads = codebook.dim() == 3
    if not heads:
        x, codebook = x[None], codebook[None]
    indices, distances = _op(x, codebook, METRICS[metric], 1 if k is None else k, return_distance)
    if not heads:
        indices, distances = indices[0], distances[0] if return_distance else None
    if k is None:
        indices, distances = indices[..., 0], distances[..., 0] if return_distance else None
    return VqNearest(indices, distances if return_distance else None)


def check_operands(
    op: str, x: Any, codebook: Any, metric: Any, dim: Any, metrics: Iterable[str] = METRICS
) -> None:
    """What vq_nearest, and ops that search as it does, refuse."""
    for name, tensor in (("x", x), ("codebook", codebook)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} is {type(tensor).__name__}, expected a tensor")
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x is {x.dtype}, expected one of {FLOATS}")
    if codebook.dtype != x.dtype:
        raise TypeError(f"{op}: codebook is {codebook.dtype}, expected {x.dtype}, as x")
    if codebook.device != x.device:
        raise ValueError(f"{op}: codebook is on {codebook.device}, expected {x.device}, as x")
    if not isinstance(metric, str) or metric not in metrics:
        raise ValueError(f"{op}: metric is {metric!r}, expected one of {', '.join(metrics)}")
    if codebook.dim() not in (2, 3) or codebook.shape[-2] == 0 or codebook.shape[-1] == 0:
        raise ValueError(
            f"{op}: codebook has shape {tuple(codebook.shape)}, expected [K, D] or [heads, K, D], "
            "with K and D of at least 1"
        )
    heads = codebook.dim() - 2
    if type(dim) is not int:
        raise TypeError(f"{op}: dim is {type(dim).__name__}, expected an integer")
    if not -x.dim() <= dim < x.dim() or (heads and dim % x.dim() == 0):
        raise ValueError(
            f"{op}: dim is {dim} for x of shape {tuple(x.shape)}, expected a dimension of it"
            + " after that of the heads" * heads
        )
    if x.shape[dim] != codebook.shape[-1]:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)}, expected {codebook.shape[-1]} in dimension {dim}, as "
            f"the codebook, {tuple(codebook.shape)}"
        )
    if heads and len(x) != len(codebook):
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)}, expected {len(codebook)} heads in dimension 0, as "
            f"the codebook, {tuple(codebook.shape)}"
        )


def _check(x: Any, codebook: Any, metric: Any, dim: Any, k: Any, return_distance: Any) -> None:
    check_operands("vq_nearest", x, codebook, metric, dim)
    most = min(LARGEST_K, codebook.shape[-2])
    if k is not None and type(k) is not int:
        raise TypeError(f"vq_nearest: k is {type(k).__name__}, expected an integer or None")
    if k is not None and not 1 <= k <= most:
        raise ValueError(
            f"vq_nearest: k is {k}, expected 1 to {most} for a codebook of shape {tuple(codebook.shape)}"
        )
    if type(return_distance) is not bool:
        raise TypeError(f"vq_nearest: return_distance is {type(return_distance).__name__}, expected a bool")
