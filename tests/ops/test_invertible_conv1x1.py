"""genperf.ops.invertible_conv1x1 against its definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from genperf_testing.cases import Case, normals
from genperf_testing.contract import threads

import genperf
from genperf import _backend
from genperf.ops import PLU, invertible_conv1x1, invertible_conv1x1_reverse, slogdet_inverse
from genperf.ops._invertible_conv1x1_ops import forward_op

EPSILON = torch.finfo(torch.float32).eps


def rotation(channels, *seed):
    return torch.linalg.qr(normals((channels, channels), "rotation", *seed).double())[0]


def matrix_of(channels, cond=3.0, sign=-1, dtype=torch.float32):
    """A matrix of a given condition number and sign of the determinant."""
    left, right = rotation(channels, "left"), rotation(channels, "right")
    matrix = left @ torch.logspace(0, math.log10(cond), channels, dtype=torch.float64).diag() @ right
    if matrix.det().sign() != sign:
        matrix[0] *= -1
    return (matrix / cond**0.5).to(dtype)


def plu_of(channels, dtype=torch.float32):
    p, lower, upper = torch.linalg.lu(rotation(channels, "plu"))
    s = upper.diag()
    noise = normals((channels, channels), "unused").double()  # where the factors are not read
    parts = (p, lower.tril(-1) + noise.triu(), upper.triu(1) + noise.tril(), s.sign(), s.abs().log())
    return PLU(*(t.to(dtype) for t in parts))


def matrix_of_plu(plu):
    unit = torch.eye(len(plu.log_s), dtype=torch.float64)
    diagonal = torch.diag(plu.sign_s.double() * plu.log_s.double().exp())
    return plu.p.double() @ (plu.l.double().tril(-1) + unit) @ (plu.u.double().triu(1) + diagonal)


def parameters_of(channels, dtype=torch.float32):
    """Shift, and a scale of both signs."""
    scale = 1 + 0.3 * normals((channels,), "scale").tanh()
    return normals((channels,), "shift").to(dtype), (scale * normals((channels,), "sign").sign()).to(dtype)


def definition(x, weight, shift, scale, inverse=False, lengths=None):
    """Output and log-determinant of x [B, C, N]."""
    shift, scale = shift[:, None], scale[:, None]
    y = torch.linalg.solve(weight, x) / scale - shift if inverse else weight @ (scale * (x + shift))
    n = torch.full((len(x),), x.shape[2], dtype=x.dtype)
    if lengths is not None:
        y = y * (torch.arange(x.shape[2]) < lengths[:, None])[:, None]
        n = lengths.to(x.dtype)
    logdet = n * (scale.abs().log().sum() + torch.linalg.slogdet(weight)[1])
    return y, -logdet if inverse else logdet


# The adapters of the contract: shapes [B, *] to three channels.


def _folded(x, last=False):
    """x [B, *] as [B, 3, N], or for ``last`` [B, N, 3], filled up with ones; one view if that is possible."""
    n = math.prod(x.shape[1:])
    size = max(1, -(-n // 3)) * 3
    x = x.reshape(len(x), n)
    x = x if size == n else F.pad(x, (0, size - n), value=1.0)
    return x.view(len(x), size // 3, 3) if last else x.view(len(x), 3, size // 3)


_WEIGHT, _PARAMETERS, _PLU = matrix_of(3), parameters_of(3), plu_of(3)


def _for(x, *tensors):
    """Parameters as they must be for x."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return tuple(t.to(x.device, dtype) for t in tensors)


def _channels_first(x):
    weight, shift, scale = _for(x, _WEIGHT, *_PARAMETERS)
    return invertible_conv1x1(_folded(x), weight, shift=shift, scale=scale)


def _parameters(x, weight, shift, log_scale):
    weight, shift, log_scale = _for(x, weight, shift, log_scale)
    weight = 2 * torch.eye(3).to(weight) + _folded(weight)[0, :, :1] * weight.new_tensor([0.25, -0.5, 0.5])
    shift, log_scale = _folded(shift)[0, :, 0], 0.25 * _folded(log_scale)[0, :, 0]
    return invertible_conv1x1(_folded(x), weight, shift=shift, log_scale=log_scale)


def _channels_last(x):
    return invertible_conv1x1(_folded(x, True), PLU(*_for(x, *_PLU)), channel_dim=-1)


def _inverse(x):
    weight, shift, scale = _for(x, _WEIGHT, *_PARAMETERS)
    return invertible_conv1x1(_folded(x), weight, shift=shift, scale=scale, inverse=True)


def _x(shape):
    return [normals(shape)]


BACKENDS = ("reference", "cpu", "triton")
_SETTINGS = {"elementwise": False, "backends": BACKENDS}
CASES = (
    Case("channels first", _channels_first, _x, per_sample=True, **_SETTINGS),
    Case("parameters", _parameters, lambda shape: [normals(shape, i) for i in range(4)],
         shapes=((5, 24), (3, 7), (2, 3, 5, 4), (2, 1100)), nan_as_reference=False, **_SETTINGS),
    Case("channels last", _channels_last, _x, per_sample=True, **_SETTINGS),
    Case("inverse", _inverse, _x, per_sample=True, **_SETTINGS),
)  # fmt: skip


def _run(function, leaves):
    """Output, log-determinant and gradients by the leaves, for fixed cotangents."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    output, logdet = function(*leaves)
    cotangents = (
        normals(tuple(output.shape), "y").to(output),
        normals(tuple(logdet.shape), "logdet").to(logdet),
    )
    grads = torch.autograd.grad((output, logdet), leaves, cotangents)
    return output.detach(), logdet.detach(), *grads


def _compare(actual, theirs, exact, floor=4 * EPSILON):
    """Each result is within twice the error of torch's in the same dtype, and some roundings of its size."""
    for i, (a, t, e) in enumerate(zip(actual, theirs, exact, strict=True)):
        assert a.dtype == t.dtype
        assert a.shape == e.shape
        if e.numel() == 0:
            continue
        allowed = 2 * (t - e).abs().max() + floor * e.abs().max()
        assert (a - e).abs().max() <= allowed, f"result {i}: {(a - e).abs().max():.3g}, allowed {allowed:.3g}"


SIZES = [(2, 700), (3, 5), (4, 33), (12, 256), (13, 17), (48, 100), (50, 31), (100, 40), (192, 64), (300, 20)]


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize(("channels", "positions"), SIZES)
def test_channels(channels, positions, inverse, backend):
    if backend.backend not in BACKENDS or (backend.costly and channels > 50):
        pytest.skip("no such backend, or interpreted")
    x = normals((3, channels, positions))
    leaves = (x, matrix_of(channels), *parameters_of(channels))

    def function(x, weight, shift, scale):
        return invertible_conv1x1(x, weight, shift=shift, scale=scale, inverse=inverse)

    def in_torch(*leaves):
        return definition(*leaves, inverse=inverse)

    exact = _run(in_torch, [t.double() for t in leaves])
    _compare(_run(function, leaves), _run(in_torch, leaves), exact)


@pytest.mark.parametrize("size", [(7,), (5, 6), (3, 4, 5), ()], ids=str)
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_dimensions(size, channel_dim, backend):
    """Sequences, images, volumes and vectors, channels first or last."""
    if backend.backend not in BACKENDS:
        pytest.skip("no such backend")
    shape = (2, 12, *size)
    leaves = (matrix_of(12), *parameters_of(12))
    x = normals(shape).movedim(1, channel_dim).contiguous()

    def function(x, weight, shift, scale):
        return invertible_conv1x1(x, weight, shift=shift, scale=scale, channel_dim=channel_dim)

    def in_torch(x, *parameters):
        first = x.movedim(channel_dim, 1)
        y, logdet = definition(first.reshape(2, 12, -1), *parameters)
        return y.view(first.shape).movedim(1, channel_dim), logdet

    actual = _run(function, (x, *leaves))
    assert actual[0].is_contiguous()
    _compare(actual, _run(in_torch, (x, *leaves)), _run(in_torch, [t.double() for t in (x, *leaves)]))


LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "cropped": lambda x: F.pad(x, (3, 2, 1, 4), value=torch.nan)[:, :, 1:-4, 3:-2],
    "half of the channels": lambda x: torch.cat([x * torch.nan, x], 1)[:, x.shape[1] :],
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "every other": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "cropped, channels last": lambda x: LAYOUTS["channels last"](LAYOUTS["cropped"](x)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, kernel):
    """Of x and of the gradient of y, alone and together: the same bits for each position."""
    if kernel.backend not in BACKENDS or (kernel.costly and layout not in ("channels last", "cropped")):
        pytest.skip("no such backend, or interpreted")
    x, weight = normals((2, 13, 5, 16)).to(dtype), matrix_of(13)
    shift, scale = parameters_of(13)
    grad = normals((2, 13, 5, 16), "y").to(dtype)

    def run(x, grad):
        x = x.detach().requires_grad_()
        y, _ = invertible_conv1x1(x, weight.requires_grad_(), shift=shift, scale=scale)
        of_x, of_weight = torch.autograd.grad(y, (x, weight), grad)
        back = invertible_conv1x1_reverse(y.detach(), grad, weight.detach(), shift=shift, scale=scale)
        return y.detach(), of_x, back.x, back.grad_x, of_weight, back.grad_weight

    expected = run(x, grad)
    strided = LAYOUTS[layout](x)
    assert strided.stride() != x.stride()
    for moved in (run(strided, grad), run(x, LAYOUTS[layout](grad)), run(strided, LAYOUTS[layout](grad))):
        assert all(map(torch.equal, moved[:4], expected[:4]))
        torch.testing.assert_close(moved[4:], expected[4:], rtol=1e-5, atol=1e-4)
    assert run(strided, grad)[0].stride() == torch.empty_like(strided).stride()


def test_shapes_of_parameters():
    """Those of the public libraries: a kernel of size 1, and broadcastable parameters."""
    x, weight, (shift, scale) = normals((2, 6, 3, 5)), matrix_of(6), parameters_of(6)
    expected = invertible_conv1x1(x, weight, shift=shift, scale=scale)
    actual = invertible_conv1x1(
        x, weight[:, :, None, None], shift=shift.view(1, 6, 1, 1), scale=scale.view(1, 6, 1, 1)
    )
    assert all(map(torch.equal, actual, expected))
    of_logs = invertible_conv1x1(x, weight, shift=shift, log_scale=scale.abs().log())
    of_scale = invertible_conv1x1(x, weight, shift=shift, scale=scale.abs())
    torch.testing.assert_close(of_logs, of_scale)


@pytest.mark.parametrize("channels", [2, 12, 13, 150])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_plu(channels, inverse, backend):
    if backend.backend not in BACKENDS or (backend.costly and channels > 13):
        pytest.skip("no such backend, or interpreted")
    x, plu, (shift, scale) = normals((2, channels, 40)), plu_of(channels), parameters_of(channels)
    leaves = (x, plu.l, plu.u, plu.log_s, shift, scale)

    def function(x, lower, upper, log_s, shift, scale):
        factors = PLU(plu.p, lower, upper, plu.sign_s, log_s)
        return invertible_conv1x1(x, factors, shift=shift, scale=scale, inverse=inverse)

    def in_torch(x, lower, upper, log_s, shift, scale):
        weight = matrix_of_plu(PLU(plu.p, lower, upper, plu.sign_s, log_s)).to(x.dtype)
        return definition(x, weight, shift, scale, inverse)

    actual = _run(function, leaves)
    _compare(actual, _run(in_torch, leaves), _run(in_torch, [t.double() for t in leaves]), floor=8 * EPSILON)
    assert (actual[3].triu() == 0).all()
    assert (actual[4].tril() == 0).all()


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_lengths(inverse, channel_dim, backend):
    """What lies beyond is not read, is zero in output and gradient, and does not count."""
    if backend.backend not in BACKENDS:
        pytest.skip("no such backend")
    lengths = torch.tensor([37, 0, 12, 60])
    x, leaves = normals((4, 8, 60)), (matrix_of(8), *parameters_of(8))
    beyond = torch.arange(60) >= lengths[:, None, None]

    def function(x, *leaves):
        weight, shift, scale = leaves
        y, logdet = invertible_conv1x1(
            x.masked_fill(beyond, torch.nan).movedim(1, channel_dim), weight,
            shift=shift, scale=scale, inverse=inverse, lengths=lengths, channel_dim=channel_dim,
        )  # fmt: skip
        return y.movedim(channel_dim, 1), logdet

    def in_torch(*leaves):
        return definition(*leaves, inverse=inverse, lengths=lengths)

    actual = _run(function, (x, *leaves))
    _compare(actual, _run(in_torch, (x, *leaves)), _run(in_torch, [t.double() for t in (x, *leaves)]))
    assert (actual[0].masked_select(beyond) == 0).all()
    assert actual[1][1] == 0


@pytest.mark.parametrize("channels", [4, 12, 48, 192])
@pytest.mark.parametrize("cond", [1.0, 3.0, 100.0])
def test_round_trip(channels, cond, backend):
    if backend.backend not in BACKENDS or (backend.costly and channels > 48):
        pytest.skip("no such backend, or interpreted")
    x, (shift, scale) = normals((2, channels, 64)), parameters_of(channels)
    for weight in (matrix_of(channels, cond), plu_of(channels)):
        y, logdet = invertible_conv1x1(x, weight)
        back, minus = invertible_conv1x1(y, weight, inverse=True)
        of = matrix_of_plu(weight) if isinstance(weight, PLU) else weight.double()
        assert (back - x).norm() <= 4 * EPSILON * torch.linalg.cond(of) * x.norm()
        torch.testing.assert_close(minus, -logdet)
    weight = matrix_of(channels, cond)
    y, _ = invertible_conv1x1(x, weight, shift=shift, scale=scale)
    back, _ = invertible_conv1x1(y, weight, shift=shift, scale=scale, inverse=True)
    bound = torch.linalg.cond(weight.double() * scale.double()) * (
        (x + shift[:, None]).norm() + shift.norm() * 128**0.5
    )
    assert (back - x).norm() <= 4 * EPSILON * bound


def test_round_trip_of_many_layers():
    """The condition numbers of 32 layers multiply, and still float32 holds."""
    x = normals((4, 48, 16, 16))
    layers = []
    for i in range(32):
        left, right = rotation(48, i), rotation(48, i, "right")
        layers.append((left @ torch.logspace(0, math.log10(3), 48).double().diag() @ right / 3**0.5).float())
    y = x
    for weight in layers:
        y = invertible_conv1x1(y, weight).output
    for weight in reversed(layers):
        y = invertible_conv1x1(y, weight, inverse=True).output
    assert (y - x).norm() <= 5e-4 * x.norm()


def test_an_offset_cancels_before_the_product():
    """Data around 10,000, as activation normalization is there to centre."""
    x, weight = normals((2, 12, 64)) + 1e4, matrix_of(12)
    shift, scale = -x.mean((0, 2)), parameters_of(12)[1]
    leaves = [x, weight, shift, scale]

    def function(x, weight, shift, scale):
        return invertible_conv1x1(x, weight, shift=shift, scale=scale)

    exact = _run(definition, [t.double() for t in leaves])
    _compare(_run(function, leaves), _run(definition, leaves), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype, backend):
    if backend.backend not in BACKENDS:
        pytest.skip("no such backend")
    x, parameters = normals((2, 13, 50)).to(dtype), (matrix_of(13), *parameters_of(13))

    def function(x, weight, shift, scale):
        return invertible_conv1x1(x, weight, shift=shift, scale=scale)

    def wide(x, weight, shift, scale):
        y, logdet = function(x.float(), weight, shift, scale)
        return y.to(dtype), logdet

    actual, expected = _run(function, (x, *parameters)), _run(wide, (x, *parameters))
    assert all(map(torch.equal, actual, expected))
    assert actual[0].dtype == actual[2].dtype == dtype
    assert actual[3].dtype == torch.float32


def test_autocast_changes_nothing(backend):
    if backend.backend not in BACKENDS:
        pytest.skip("no such backend")
    leaves = (normals((2, 12, 50)), matrix_of(12), *parameters_of(12))

    def function(x, weight, shift, scale):
        return invertible_conv1x1(x, weight, shift=shift, scale=scale)

    expected = _run(function, leaves)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, _run(function, leaves), expected))


REVERSE = [
    {},
    {"inverse": True},
    {"plu": True},
    {"plu": True, "inverse": True},
    {"lengths": True},
    {"last": True},
]


@pytest.mark.parametrize("how", REVERSE, ids=str)
@pytest.mark.parametrize("logarithmic", [False, True], ids=["scale", "log_scale"])
def test_reverse(how, logarithmic, backend):
    """The input and all gradients from the output, against autograd in float64."""
    if backend.backend not in BACKENDS:
        pytest.skip("no such backend")
    channels = 12
    weight = plu_of(channels) if how.get("plu") else matrix_of(channels)
    shift, scale = parameters_of(channels)
    name = "log_scale" if logarithmic else "scale"
    scale = scale.abs().log() if logarithmic else scale
    options = {"inverse": how.get("inverse", False)}
    x = normals((3, channels, 70))
    if how.get("lengths"):
        options["lengths"] = torch.tensor([70, 3, 41])
        x = x * (torch.arange(70) < options["lengths"][:, None])[:, None]
    if how.get("last"):
        x, options["channel_dim"] = x.mT.contiguous(), -1

    def leaves_of(dtype):
        parts = list(weight) if isinstance(weight, PLU) else [weight]
        return [t.to(dtype).requires_grad_() for t in (x, shift, scale, *parts)]

    def run(leaves):
        x, shift, scale, *parts = leaves
        used = PLU(*parts) if len(parts) > 1 else parts[0]
        y, logdet = invertible_conv1x1(x, used, shift=shift, **{name: scale}, **options)
        return y, logdet, used

    def gradients(dtype):
        leaves = leaves_of(dtype)
        y, logdet, _ = run(leaves)
        cotangents = normals(tuple(y.shape), "y").to(dtype), normals(tuple(logdet.shape), "logdet").to(dtype)
        grads = torch.autograd.grad((y, logdet), leaves, cotangents, allow_unused=True)
        return y.detach(), cotangents, grads

    with genperf.backend("reference"):
        exact = gradients(torch.float64)[2]
    y, (grad_y, grad_logdet), theirs = gradients(torch.float32)
    found = invertible_conv1x1_reverse(
        y, grad_y, weight, shift=shift, **{name: scale}, grad_logdet=grad_logdet, **options
    )
    torch.testing.assert_close(found.x, x, rtol=0, atol=2e-5)
    of_weight = found.grad_weight
    if isinstance(weight, PLU):
        assert of_weight.p is None
        assert of_weight.sign_s is None
        of_weight = [t for t in of_weight if t is not None]
        theirs, exact = ([*g[:3], g[4], g[5], g[7]] for g in (theirs, exact))
    else:
        of_weight = [of_weight]
    actual = [found.grad_x, found.grad_shift, found.grad_scale, *of_weight]
    for i, (a, t, e) in enumerate(zip(actual, theirs, exact, strict=True)):
        error, allowed = (a - e).abs().max(), 4 * (t - e).abs().max() + 20 * EPSILON * e.abs().max()
        assert error <= allowed, f"gradient {i}: {error:.3g}, allowed {allowed:.3g}"


def test_reverse_of_what_the_caller_differentiates():
    """With the results of slogdet_inverse given, its own backward can bring the rest."""
    weight, (shift, scale) = matrix_of(6), parameters_of(6)
    y, grad_y, grad_logdet = normals((2, 6, 9)), normals((2, 6, 9), "g"), torch.tensor([0.5, -2.0])
    options = {"shift": shift, "scale": scale, "grad_logdet": grad_logdet}
    whole = invertible_conv1x1_reverse(y, grad_y, weight, **options)
    slogdet = slogdet_inverse(weight)
    part = invertible_conv1x1_reverse(y, grad_y, weight, **options, slogdet=slogdet, through_slogdet=False)
    torch.testing.assert_close(
        part.grad_weight + part.grad_logabsdet * slogdet.inverse.mT, whole.grad_weight, rtol=1e-5, atol=1e-5
    )
    assert part.grad_logabsdet == 9 * grad_logdet.sum()
    assert not whole.grad_weight.requires_grad


@pytest.mark.parametrize("logarithmic", [False, True], ids=["scale", "log_scale"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("plu", [False, True], ids=["dense", "plu"])
def test_gradcheck(plu, inverse, logarithmic):
    """Of all parameters at once, for negative scales and det < 0."""
    double = torch.float64
    weight = plu_of(3, double) if plu else matrix_of(3, 3.0, -1, double)
    shift, scale = parameters_of(3, double)
    assert (scale < 0).any()
    leaves = [normals((2, 3, 4)).double(), shift, scale.abs().log() if logarithmic else scale]
    leaves += [weight.l, weight.u, weight.log_s] if plu else [weight]
    leaves = [t.requires_grad_() for t in leaves]

    def function(x, shift, scale, *parts):
        used = PLU(weight.p, parts[0], parts[1], weight.sign_s, parts[2]) if plu else parts[0]
        name = "log_scale" if logarithmic else "scale"
        return tuple(invertible_conv1x1(x, used, shift=shift, **{name: scale}, inverse=inverse))

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_gradcheck_of_lengths():
    lengths = torch.tensor([3, 0, 5])
    leaves = [
        normals((3, 3, 5)).double(),
        matrix_of(3, dtype=torch.float64),
        *parameters_of(3, torch.float64),
    ]

    def function(x, weight, shift, scale):
        return tuple(invertible_conv1x1(x, weight, shift=shift, scale=scale, lengths=lengths))

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in leaves])


def test_results_of_slogdet_inverse_given():
    """Those of all layers from one call, with gradients through it."""
    weights = [matrix_of(c).requires_grad_() for c in (4, 6)]
    x = [normals((2, c, 10)) for c in (4, 6)]
    found = slogdet_inverse(weights)

    def layer(i):
        return type(found)(
            found.sign[i], found.logabsdet[i], found.inverse[i], found.inverse_transpose[i], None
        )

    for inverse in (False, True):
        alone = [invertible_conv1x1(a, w, inverse=inverse) for a, w in zip(x, weights, strict=True)]
        pooled = [
            invertible_conv1x1(a, w, slogdet=layer(i), inverse=inverse)
            for i, (a, w) in enumerate(zip(x, weights, strict=True))
        ]
        for a, p in zip(alone, pooled, strict=True):
            assert all(map(torch.equal, p, a))
        grads = [
            torch.autograd.grad(
                sum(y.square().sum() + logdet.sum() for y, logdet in results), weights, retain_graph=True
            )
            for results in (alone, pooled)
        ]
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 5])
def test_the_same_bits_for_any_threads_and_batch(batch, kernel):
    if kernel.backend not in BACKENDS:
        pytest.skip("no such backend")
    leaves = (normals((batch, 48, 40, 30)), matrix_of(48), *parameters_of(48))
    if kernel.costly:
        leaves = (normals((batch, 12, 40)), matrix_of(12), *parameters_of(12))

    def function(x, weight, shift, scale):
        return invertible_conv1x1(x, weight, shift=shift, scale=scale)

    with threads(1):
        first = _run(function, leaves)
    for n in (1,) if kernel.costly else (2, 3):
        with threads(n):
            assert all(map(torch.equal, _run(function, leaves), first))
    assert torch.equal(function(leaves[0][-1:], *leaves[1:]).output, first[0][-1:])


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_singular(inverse):
    weight = matrix_of(4)
    weight[2] = weight[1]
    weight.requires_grad_()
    x = normals((2, 4, 6)).requires_grad_()
    y, logdet = invertible_conv1x1(x, weight, inverse=inverse)
    status = slogdet_inverse(weight).status
    if not inverse and status > 0:  # an elimination may round a pivot to something else than 0
        assert (logdet == -math.inf).all()
        torch.testing.assert_close(y, torch.einsum("oc,bcn->bon", weight, x))
        assert torch.autograd.grad(y.sum(), weight, retain_graph=True)[0].isfinite().all()
        assert torch.autograd.grad(logdet.sum(), weight)[0].isnan().all()
    zero = torch.zeros(4, 4)
    y, logdet = invertible_conv1x1(x, zero, inverse=inverse)
    assert (logdet == (math.inf if inverse else -math.inf)).all()
    assert slogdet_inverse(zero).status > 0
    assert y.isnan().all() if inverse else (y == 0).all()


def test_nan_in_the_weight():
    weight = matrix_of(4)
    weight[1, 2] = torch.nan
    y, logdet = invertible_conv1x1(normals((2, 4, 6)), weight)
    assert logdet.isnan().all()
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2, 3]].isfinite().all()
    assert invertible_conv1x1(normals((2, 4, 6)), weight, inverse=True).output.isnan().all()


def test_zero_scale():
    scale = torch.tensor([1.0, 0.0, 2.0])
    y, logdet = invertible_conv1x1(normals((2, 3, 6)), matrix_of(3), scale=scale)
    assert (logdet == -math.inf).all()
    assert y.isfinite().all()


def test_gradients_that_are_not_asked_for():
    shift, scale = parameters_of(6)
    leaves = {"x": normals((2, 6, 9)), "weight": matrix_of(6), "shift": shift, "scale": scale}
    whole = _run(lambda x, w, b, s: invertible_conv1x1(x, w, shift=b, scale=s), leaves.values())[2:]
    for i, missing in enumerate(leaves):
        for name, leaf in leaves.items():
            leaf.grad = None
            leaf.requires_grad_(name != missing)
        y, logdet = invertible_conv1x1(**leaves)
        cotangents = normals(tuple(y.shape), "y"), normals(tuple(logdet.shape), "logdet")
        torch.autograd.backward((y, logdet), cotangents)
        for k, (name, leaf) in enumerate(leaves.items()):
            assert leaf.grad is None if name == missing else torch.equal(leaf.grad, whole[k]), (i, name)


def test_compiled_with_changing_sizes():
    weight, (shift, scale) = matrix_of(6), parameters_of(6)

    def function(x, weight, shift, scale):
        y, logdet = invertible_conv1x1(x, weight, shift=shift, scale=scale)
        back, _ = invertible_conv1x1(y, weight, shift=shift, scale=scale, inverse=True)
        return y + back, logdet

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, height in ((2, 5), (3, 8)):
        leaves = (normals((batch, 6, height, 7)), weight, shift, scale)
        assert all(map(torch.equal, _run(compiled, leaves), _run(function, leaves)))


def test_backends():
    x, weight = normals((2, 4, 6)), matrix_of(4)
    choice = genperf.explain(invertible_conv1x1, x.double(), weight.double()).choices[-1]
    assert choice.operator == "invertible_conv1x1"
    assert choice.backend == "reference"


@pytest.mark.skipif(_backend.native is None, reason="no extension module")
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("kind", ["dense", "transposed", "given", "plu"])
def test_one_native_call_without_gradient(kind, inverse, monkeypatch):
    weight = plu_of(5) if kind == "plu" else matrix_of(5)
    if kind == "transposed":
        weight = weight[..., None].transpose(0, 1)
    shift, scale = (t.view(1, -1, 1) for t in parameters_of(5))
    leaf = normals((3, 5, 21)).requires_grad_()

    def function(x):
        given = slogdet_inverse(weight) if kind == "given" else None
        return invertible_conv1x1(x, weight, shift=shift, scale=scale, slogdet=given, inverse=inverse)

    step_by_step = function(leaf)
    assert step_by_step.output.requires_grad
    monkeypatch.setattr(forward_op, "run", None)
    for x in (leaf.detach(), torch.nn.Parameter(leaf.detach())):
        with torch.no_grad():
            assert all(map(torch.equal, function(x), step_by_step))
    with pytest.raises(TypeError):
        function(leaf)


X, W, LENGTHS = torch.zeros(2, 3, 6), torch.eye(3), torch.tensor([6, 0])
P = plu_of(3)


@pytest.mark.parametrize(
    ("args", "options", "kind", "text"),
    [
        ((None, W), {}, TypeError, "x is NoneType"),
        ((X.int(), W), {}, TypeError, "x is torch.int32"),
        ((X[0, 0], W), {}, ValueError, r"x has shape \(6,\)"),
        ((X, W), {"channel_dim": 0}, ValueError, "channel_dim is 0"),
        ((X, W), {"channel_dim": 3}, ValueError, "channel_dim is 3"),
        ((X, W), {"channel_dim": 1.0}, TypeError, "channel_dim is float"),
        ((X, [1]), {}, TypeError, "weight is list"),
        ((X, W.half()), {}, TypeError, "weight is torch.float16, expected torch.float32 for inputs"),
        ((X.half(), W.half()), {}, TypeError, "weight is torch.float16, expected torch.float32"),
        ((X, W.double()), {}, TypeError, "weight is torch.float64, expected torch.float32"),
        ((X, W[:2]), {}, ValueError, r"weight has shape \(2, 3\), expected \(3, 3\)"),
        ((X, torch.eye(4)), {}, ValueError, r"weight has shape \(4, 4\), expected \(3, 3\)"),
        ((X, W[..., None].expand(3, 3, 2)), {}, ValueError, r"weight has shape \(3, 3, 2\)"),
        ((X, W[0]), {}, ValueError, r"weight has shape \(3,\)"),
        ((X, W.to("meta")), {}, ValueError, "weight is on meta, expected cpu"),
        ((X, W), {"channel_dim": -1}, ValueError, "for 6 channels"),
        ((X, tuple(P)[:4]), {}, TypeError, "weight is a tuple of 4"),
        ((X, P._replace(u=W[:2])), {}, ValueError, r"weight.u has shape \(2, 3\)"),
        ((X, P._replace(log_s=None)), {}, TypeError, "weight.log_s is NoneType"),
        ((X, W), {"shift": torch.zeros(4)}, ValueError, r"shift has shape \(4,\), expected \(3,\)"),
        ((X, W), {"scale": torch.zeros(3).half()}, TypeError, "scale is torch.float16"),
        ((X, W), {"scale": W[0], "log_scale": W[0]}, ValueError, "scale and log_scale are given"),
        ((X, W), {"lengths": [6, 0]}, TypeError, "lengths is list, expected an int64"),
        ((X, W), {"lengths": LENGTHS.int()}, TypeError, "lengths is torch.int32"),
        ((X, W), {"lengths": LENGTHS[:1]}, ValueError, r"lengths has shape \(1,\)"),
        ((X, W), {"lengths": LENGTHS + 1}, ValueError, "lengths has values from 1 to 7, expected 0 to 6"),
        ((X, W), {"lengths": LENGTHS - 1}, ValueError, "lengths has values from -1 to 5, expected 0 to 6"),
        ((X[..., None], W), {"lengths": LENGTHS}, ValueError, "expected sequences"),
        ((X, W), {"slogdet": (1, 2)}, TypeError, "slogdet.logabsdet is NoneType"),
        ((X, W), {"slogdet": slogdet_inverse(W[None])}, ValueError, r"slogdet.logabsdet has shape \(1,\)"),
        ((X, W), {"slogdet": slogdet_inverse(torch.eye(2)), "inverse": True}, ValueError, "slogdet.inverse"),
    ],
)  # fmt: skip
def test_errors(args, options, kind, text):
    with pytest.raises(kind, match=text):
        invertible_conv1x1(*args, **options)


@pytest.mark.parametrize(
    ("grad", "options", "kind", "text"),
    [
        (None, {}, TypeError, "grad_y is NoneType"),
        (X.double(), {}, TypeError, "grad_y is torch.float64, expected torch.float32"),
        (X[:1], {}, ValueError, r"grad_y has shape \(1, 3, 6\)"),
        (X, {"grad_logdet": torch.zeros(3)}, ValueError, r"grad_logdet is \(3,\), expected shape \(2,\)"),
        (X, {"shift": torch.zeros(4)}, ValueError, "shift has shape"),
    ],
)
def test_errors_of_reverse(grad, options, kind, text):
    with pytest.raises(kind, match=text):
        invertible_conv1x1_reverse(X, grad, W, **options)
