"""genperf.ops.slogdet_inverse against exact fractions and float64."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import pytest
import torch
from genperf_testing.backends import simt
from genperf_testing.cases import SHAPES, Case, normals
from genperf_testing.contract import assert_same, threads

import genperf
from genperf.ops import slogdet_inverse

BACKENDS = ("reference", "cpu", "cuda")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def _square(x, size):
    """Of each sample a matrix [size, size] whose largest elements are far from the diagonal."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    far = torch.eye(size).flip(0).to(x)
    return x.flatten(1)[:, : size * size].reshape(-1, size, size) / size**0.5 + 2 * far


def _batch(x):
    return slogdet_inverse(_square(x, math.isqrt(math.prod(x.shape[1:]))))


def _mixed(x):
    """As many sizes as samples."""
    largest = math.isqrt(x[0].numel())
    matrices = [_square(row[None], max(1, largest - i))[0] for i, row in enumerate(x)]
    sign, logabsdet, inverse, transpose, status = slogdet_inverse(matrices)
    return sign, logabsdet, *inverse, *transpose, status


def _case(name, function, shapes, **options):
    return Case(
        name, function, lambda shape: [normals(shape)], shapes=shapes, elementwise=False, backends=BACKENDS,
        saves_outputs=True, **options,
    )  # fmt: skip


_SHAPES = tuple(shape for shape in SHAPES if len(shape) > 1)
CASES = (
    _case("one size", _batch, (*_SHAPES, (0, 4), (0, 2, 3)), per_sample=True),
    _case("many sizes", _mixed, _SHAPES, nan_as_reference=False),
)


def skip_without(kernel):
    if kernel.backend not in BACKENDS:
        pytest.skip("the op has no such backend")


def exact_slogdet(matrix):
    """Sign and log|det| by elimination in fractions."""
    rows = [[Fraction(x) for x in row] for row in matrix.tolist()]
    det = Fraction(1)
    for k in range(len(rows)):
        pivot = next((i for i in range(k, len(rows)) if rows[i][k]), None)
        if pivot is None:
            return 0, -math.inf
        if pivot != k:
            rows[k], rows[pivot], det = rows[pivot], rows[k], -det
        det *= rows[k][k]
        for i in range(k + 1, len(rows)):
            factor = rows[i][k] / rows[k][k]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[k], strict=True)]
    numerator, denominator = abs(det.numerator), det.denominator
    shift = numerator.bit_length() - denominator.bit_length()
    return (1 if det > 0 else -1), math.log(abs(det) / Fraction(2) ** shift) + shift * math.log(2)


@functools.cache
def of_condition(size, condition, *seed):
    """A matrix in float64 with singular values spread evenly in their logarithm."""
    u, v = (torch.linalg.qr(normals((size, size), side, *seed).double())[0] for side in "uv")
    return u @ torch.logspace(0, -math.log10(condition), size, dtype=torch.float64).diag() @ v


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 12])
@DTYPES
def test_small_matrices_against_fractions(size, dtype, backend):
    skip_without(backend)
    matrices = torch.stack([normals((size, size), i).to(dtype) for i in range(4)])
    result = slogdet_inverse(matrices)
    for i, matrix in enumerate(matrices):
        sign, logabsdet = exact_slogdet(matrix)
        assert result.sign[i].item() == sign
        bound = (1e-13 if dtype == torch.float64 else 2**-24) * (abs(logabsdet) + 1)
        assert abs(result.logabsdet[i].item() - logabsdet) <= bound
    product = result.inverse.double() @ matrices.double()
    size_of_terms = result.inverse.double().abs() @ matrices.double().abs()
    epsilon = 2**-24 if dtype == torch.float32 else size * 2**-50 * torch.linalg.cond(matrices).max()
    assert ((product - torch.eye(size)).abs() <= epsilon * size_of_terms).all()
    assert torch.equal(result.inverse_transpose, result.inverse.mT)
    assert (result.status == 0).all()
    assert {t.dtype for t in result[:4]} == {dtype}


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("size", [12, 24, 48, 64, 65, 96, 192, 384])
def test_against_float64_up_to_condition_1e6(size, condition, backend):
    skip_without(backend)
    if size > 96 and (backend.isa in (None, "baseline") and (size, condition) != (192, 1e6)):
        pytest.skip("slow, and the code is the same")
    exact = of_condition(size, condition, size)
    sign, logabsdet = torch.linalg.slogdet(exact)
    result = slogdet_inverse(exact)
    assert result.sign == sign
    assert abs(result.logabsdet - logabsdet) <= 1e-13 * condition + 1e-12 * size
    eye = torch.eye(size, dtype=torch.float64)
    assert (result.inverse @ exact - eye).norm() <= 2**-49 * size * condition

    single = exact.float()
    sign, logabsdet = torch.linalg.slogdet(single.double())
    result = slogdet_inverse(single)
    assert result.sign == sign.float()
    assert abs(result.logabsdet.double() - logabsdet) <= 1e-6 * (1 + abs(logabsdet))
    inverse = torch.linalg.inv(single.double())
    worst = (result.inverse.double() - inverse).abs().max()
    assert worst <= (2**-24 + 2**-50 * size * condition) * inverse.abs().max()


@DTYPES
def test_gradients(dtype, backend):
    skip_without(backend)
    w = of_condition(6, 30.0, "gradients").to(dtype).clone().requires_grad_()
    result = slogdet_inverse(w)
    (grad,) = torch.autograd.grad(result.logabsdet, w, retain_graph=True)
    assert torch.equal(grad, result.inverse_transpose)
    weight = normals((6, 6), "weight").to(dtype)
    mine = torch.autograd.grad(
        [(result.inverse * weight).sum(), (result.inverse_transpose @ weight).sum()], w
    )
    inverse = torch.linalg.inv(exact := w.detach().double().requires_grad_())
    weight = weight.double()
    theirs = torch.autograd.grad([(inverse * weight).sum(), (inverse.mT @ weight).sum()], exact)
    torch.testing.assert_close(
        mine[0].double(), theirs[0], rtol=1e-5, atol=1e-5 * theirs[0].abs().max().item()
    )


@pytest.mark.parametrize("flip", [False, True], ids=["det > 0", "det < 0"])
def test_gradients_by_finite_differences(flip, backend):
    skip_without(backend)
    if backend.name == "cuda":
        pytest.skip("the formulas are torch's, and emulated calls are slow")
    matrices = [of_condition(size, 4.0, size).clone() for size in (1, 3, 4)]
    for matrix in matrices:
        if (torch.linalg.slogdet(matrix).sign < 0) != flip:
            matrix[0].neg_()
        matrix.requires_grad_()

    def function(*ws):
        result = slogdet_inverse(ws)
        assert (result.sign == (-1 if flip else 1)).all()
        return (result.logabsdet, *result.inverse, *result.inverse_transpose)

    assert torch.autograd.gradcheck(function, matrices)
    assert torch.autograd.gradgradcheck(function, matrices)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_inverse_alone(backend):
    """The torch op writes it through the transposed one, which it then gives as well."""
    packed = of_condition(5, 20.0, 5).reshape(-1)
    with genperf.backend(backend):
        *_, inverse, transpose, _ = torch.ops.genperf.slogdet_inverse(packed, [5], True, False)
    assert torch.equal(inverse.view(5, 5).mT, transpose.view(5, 5))


@DTYPES
def test_determinants_alone(dtype, backend):
    """The same bits with fewer results; the gradient is there all the same."""
    skip_without(backend)
    sizes = [1, 3, 12, 12, 41, 70, 130]
    matrices = [of_condition(size, 20.0, size).to(dtype) for size in sizes]
    matrices.insert(3, torch.zeros(5, 5, dtype=dtype))
    whole, alone = slogdet_inverse(matrices), slogdet_inverse(matrices, inverses=False)
    leaves = [m.clone().requires_grad_() for m in matrices]
    trained = slogdet_inverse(leaves, inverses=False)
    for result in (alone, trained):
        assert result.inverse is None
        assert result.inverse_transpose is None
        assert torch.equal(result.sign, whole.sign)
        assert torch.equal(result.logabsdet, whole.logabsdet)
        assert torch.equal(result.status, whole.status)
    del leaves[3]
    grads = torch.autograd.grad(trained.logabsdet[trained.status == 0].sum(), leaves)
    del matrices[3]
    for grad, expected in zip(grads, slogdet_inverse(matrices).inverse_transpose, strict=True):
        assert torch.equal(grad, expected)


def test_absent_gradients(backend):
    """Only some results are differentiated, and only some matrices."""
    skip_without(backend)
    a, b = of_condition(3, 2.0, "a").clone().requires_grad_(), of_condition(4, 2.0, "b")
    result = slogdet_inverse([a, b])
    assert not result.sign.requires_grad
    assert not result.status.requires_grad
    result.inverse[0].sum().backward()
    torch.testing.assert_close(
        a.grad, -(a.detach().inverse().mT @ torch.ones(3, 3).double() @ a.detach().inverse().mT)
    )


@DTYPES
def test_singular(dtype, backend):
    skip_without(backend)
    matrices = torch.eye(5, dtype=dtype).repeat(4, 1, 1)
    matrices[1, 2, 2] = 0.0
    matrices[2] = 0.0
    matrices[3, 4] = matrices[3, 3]
    matrices.requires_grad_()
    result = slogdet_inverse(matrices)
    assert result.status.tolist() == [0, 3, 1, 5]
    assert result.sign.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert result.logabsdet.tolist() == [0.0] + [-math.inf] * 3
    assert result.inverse[1:].isnan().all()
    assert result.inverse_transpose[1:].isnan().all()
    (grad,) = torch.autograd.grad(result.logabsdet.sum(), matrices)
    assert torch.equal(grad[0], torch.eye(5, dtype=dtype))
    assert grad[1:].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [1, 3, 12, 70])
def test_not_finite(size, bad, backend):
    skip_without(backend)
    matrices = torch.eye(size).repeat(3, 1, 1)
    matrices[1, size - 1, 0] = bad
    for result in (slogdet_inverse(matrices), slogdet_inverse([*matrices])):
        assert result.status.tolist() == [0, -1, 0]
        for x in result[:4]:
            assert x[1].isnan().all()
            assert x[0].isfinite().all()
            assert x[2].isfinite().all()


@DTYPES
@pytest.mark.parametrize("size", [12, 192])
def test_determinants_beyond_the_range(size, dtype, backend):
    """The determinant itself would underflow or overflow; its logarithm does not."""
    skip_without(backend)
    w = of_condition(size, 10.0, size).to(dtype)
    base = slogdet_inverse(w)
    for shift in (-100, 100):
        scale = 2.0**shift
        result = slogdet_inverse(w * scale)
        assert result.sign == base.sign
        expected = base.logabsdet.double() + size * shift * math.log(2)
        assert abs(result.logabsdet.double() - expected) <= 4 * torch.finfo(dtype).eps * abs(expected)
        assert torch.equal(result.inverse, base.inverse / scale)


@DTYPES
def test_same_bits_alone_among_others_and_for_any_number_of_threads(dtype, kernel):
    skip_without(kernel)
    sizes = [1, 2, 3, 5, 8, 12, 13, 24, 48, 64, 65, 100, 12, 12]
    matrices = [normals((size, size), i).to(dtype) for i, size in enumerate(sizes)]
    with threads(1):
        alone = [slogdet_inverse(m) for m in matrices]
    for n in (1, 2, 3):
        with threads(n):
            for order in (range(len(sizes)), range(len(sizes) - 1, -1, -1)):
                result = slogdet_inverse([matrices[i] for i in order])
                for place, i in enumerate(order):
                    assert torch.equal(result.sign[place], alone[i].sign)
                    assert torch.equal(result.logabsdet[place], alone[i].logabsdet)
                    assert torch.equal(result.inverse[place], alone[i].inverse)
                    assert torch.equal(result.inverse_transpose[place], alone[i].inverse_transpose)


@pytest.mark.parametrize("order", simt().SCHEDULES)
@DTYPES
def test_cuda_has_the_bits_of_the_cpu(dtype, order):
    """Emulated, with the order in which blocks and warps run; in shared memory and in the workspace."""
    if "avx2" not in genperf.cpu_isas():
        pytest.skip("this processor has no fused multiply-add of vectors")
    sizes = [1, 8, 12, 48, 64, 65, 130, 3, 12, 12] + ([257] if order == "forward" else [])
    matrices = [normals((size, size), size, i).to(dtype) for i, size in enumerate(sizes)]
    matrices[1][:, 2] = 0.0
    with genperf.backend("cpu"), genperf.cpu_isa("avx2"):
        expected = slogdet_inverse(matrices)
        determinants = slogdet_inverse(matrices, inverses=False)
    with simt().emulated_cuda(), simt().schedule(order), genperf.backend("cuda"):
        actual = slogdet_inverse(matrices)
        assert_same(slogdet_inverse(matrices, inverses=False)[:2], determinants[:2], "determinants")
    assert_same(actual[:2], expected[:2], "determinants")
    assert torch.equal(actual.status, expected.status)
    for a, e in zip(actual[2:4], expected[2:4], strict=True):
        assert_same(a, e, "inverses")


def test_cuda_with_more_sizes_than_a_launch_takes():
    matrices = [normals((size, size), i) for i, size in enumerate([1, 2] * 40)]
    expected = slogdet_inverse(matrices)
    with simt().emulated_cuda(), genperf.backend("cuda"):
        actual = slogdet_inverse(matrices)
    torch.testing.assert_close(actual.logabsdet, expected.logabsdet)
    for a, e in zip(actual.inverse, expected.inverse, strict=True):
        torch.testing.assert_close(a, e)


def test_cuda_refuses_what_its_registers_cannot_hold():
    matrices = [torch.eye(2), torch.eye(1025)]
    refused = pytest.raises(RuntimeError, match="a matrix of size 1025, at most 1024")
    with simt().emulated_cuda(), genperf.backend("cuda"), refused:
        slogdet_inverse(matrices)


@pytest.mark.parametrize("size", [31, 48, 130])
def test_permutations_are_exact(size, backend):
    """Every step exchanges rows."""
    skip_without(backend)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    w = torch.eye(size)[order]
    result = slogdet_inverse(w)
    assert torch.equal(result.inverse, w.T)
    assert result.logabsdet == 0.0
    assert result.sign == torch.linalg.slogdet(w).sign


@pytest.mark.slow
def test_large(backend):
    skip_without(backend)
    if backend.name == "cuda":
        pytest.skip("emulated, this takes minutes")
    w = normals((1024, 1024), "large")
    result = slogdet_inverse(w)
    sign, logabsdet = torch.linalg.slogdet(w.double())
    assert result.sign == sign.float()
    assert abs(result.logabsdet - logabsdet) <= 2**-23 * abs(logabsdet)
    assert (result.inverse.double() @ w.double() - torch.eye(1024)).abs().max() <= 1e-4


def test_shapes_and_strides(backend):
    skip_without(backend)
    w = normals((2, 3, 4, 4), "strides")
    result = slogdet_inverse(w)
    assert result.sign.shape == result.logabsdet.shape == result.status.shape == (2, 3)
    assert result.inverse.shape == result.inverse_transpose.shape == (2, 3, 4, 4)
    single = slogdet_inverse(w[1, 2])
    assert single.logabsdet.shape == ()
    assert torch.equal(single.inverse, result.inverse[1, 2])
    strided = slogdet_inverse(w.transpose(0, 1).mT)
    assert torch.equal(strided.inverse, slogdet_inverse(w.transpose(0, 1).mT.contiguous()).inverse)
    empty = slogdet_inverse(torch.empty(0, 3, 3))
    assert empty.inverse.shape == empty.inverse_transpose.shape == (0, 3, 3)
    assert empty.status.dtype == torch.int64


def test_compiled_without_a_graph_break():
    def function(a, b):
        result = slogdet_inverse([a, b, a @ a])
        return result.logabsdet.sum() + result.inverse[1].sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ws = [of_condition(3, 3.0, i).clone().requires_grad_() for i in range(2)]
    expected, actual = function(*ws), compiled(*ws)
    assert torch.equal(actual, expected)
    for a, e in zip(torch.autograd.grad(actual, ws), torch.autograd.grad(expected, ws), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize(
    ("matrices", "error", "words"),
    [
        ([], ValueError, "matrices is empty"),
        (torch.zeros(3), ValueError, r"matrices has shape \(3,\), expected \[\*, C, C\]"),
        (torch.zeros(2, 3), ValueError, r"matrices has shape \(2, 3\)"),
        (torch.zeros(2, 0, 0), ValueError, "C at least 1"),
        ([torch.eye(2), torch.zeros(1, 2, 2)], ValueError, r"matrices\[1\] has shape .*, expected \[C, C\]"),
        (torch.eye(2).half(), TypeError, "matrices is torch.float16, expected one of"),
        ([torch.eye(2), torch.eye(2).double()], TypeError, r"matrices\[1\] is torch.float64, expected"),
        ([torch.eye(2), torch.eye(2, device="meta")], ValueError, r"matrices\[1\] is on meta, expected cpu"),
        ([torch.eye(2), 3], TypeError, r"matrices\[1\] is int, expected a tensor"),
    ],
)  # fmt: skip
def test_errors(matrices, error, words):
    with pytest.raises(error, match=f"slogdet_inverse: .*{words}"):
        slogdet_inverse(matrices)
