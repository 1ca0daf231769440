"""genperf.ops.masked_conv2d against torch's convolution in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from genperf_testing.cases import SHAPES, Case, normals
from genperf_testing.contract import threads

import genperf
from genperf.ops import masked_conv2d


def causal(rows, columns, kind="B"):
    """The mask [1, 1, rows, columns] of PixelCNN."""
    mask = torch.zeros(1, 1, rows, columns)
    mask[:, :, : rows // 2] = 1
    mask[:, :, rows // 2, : columns // 2 + (kind == "B")] = 1
    return mask


def rgb(outs, ins, size, kind="B", interleaved=True):
    """A mask [outs, ins, size, size] by which, at the centre, channels see those before them."""

    def group(n):
        return torch.arange(n) % 3 if interleaved else torch.arange(n) * 3 // n

    mask = causal(size, size, "A").repeat(outs, ins, 1, 1)
    before = group(outs)[:, None] - group(ins)[None] >= (1 if kind == "A" else 0)
    mask[:, :, size // 2, size // 2] = before.float()
    return mask


# The adapters of the contract: shapes [B, *] to images and to weights.


def _folded(x, channels, columns):
    """x [B, *] as images [B, channels, H, columns], filled up with zeros."""
    n = math.prod(x.shape[1:])
    size = max(1, -(-n // (channels * columns))) * channels * columns
    x = x.reshape(len(x), n)
    return (x if size == n else F.pad(x, (0, size - n))).view(
        len(x), channels, size // (channels * columns), columns
    )


def _weights(*shape):
    return [normals(shape, "weight").bfloat16().float(), normals(shape[:1], "bias").bfloat16().float()]


_ONE, _ONE_BIAS = _weights(1, 1, 3, 3)


def _one_channel(x):
    return (masked_conv2d(_folded(x, 1, 4), _ONE.to(x), causal(3, 3).to(x), _ONE_BIAS.to(x), padding=1),)


def _channels(x, weight, bias, mask):
    return (masked_conv2d(_folded(x, 3, 4), weight, mask, bias, padding=1),)


def _weight_and_bias(weight, bias, x):
    weight = _folded(weight, 1, 6).view(len(weight), -1, 3, 2)
    y = masked_conv2d(x, weight, causal(3, 2).to(x.device), bias.reshape(len(bias), -1)[:, 0], padding=1)
    return (y.transpose(0, 1),)


def _images(shape):
    return [normals((2, -(-math.prod(shape[1:]) // 6), 5, 6), "x")]


BACKENDS = ("reference", "cpu")
CASES = (
    Case("one channel", _one_channel, lambda shape: [normals(shape)], elementwise=False, per_sample=True,
         nan_as_reference=False, backends=BACKENDS),
    Case("channels", _channels, lambda shape: [normals(shape)],
         lambda shape: [*_weights(7, 3, 3, 3), rgb(7, 3, 3)], elementwise=False,
         nan_as_reference=False, backends=BACKENDS),
    Case("weight and bias", _weight_and_bias, lambda shape: [normals(shape), normals(shape, "b")],
         _images, elementwise=False, nan_as_reference=False, backends=BACKENDS,
         shapes=tuple(shape for shape in SHAPES if len(shape) > 1)),
)  # fmt: skip


MASKS = {
    "A 7x7": causal(7, 7, "A"),
    "B 7x7": causal(7, 7),
    "B 3x3": causal(3, 3),
    "B 1x3": causal(1, 3),
    "even": causal(4, 2),
    "RGB A": rgb(20, 9, 3, "A"),
    "RGB B": rgb(20, 9, 3),
    "RGB B in blocks": rgb(20, 9, 5, interleaved=False),
    "RGB 1x1": rgb(20, 9, 1),
    "by input": (torch.arange(9) % 2).float().view(1, 9, 1, 1),
    "by output": (torch.arange(20) % 4 > 1).float().view(20, 1, 1, 1),
    "scattered": (normals((20, 9, 3, 3), "mask") > 0.5).float(),
    "factors": normals((20, 9, 3, 3), "mask") * (normals((1, 1, 3, 3), "tap") > 0),
    "boolean": causal(3, 3).bool(),
    "integer": causal(3, 3).long(),
    "nothing": torch.zeros(1, 1, 3, 3),
    "everything": torch.ones(1, 1, 3, 3),
}


def _problem(mask, batch=2, outs=20, ins=9, height=11, width=13, dtype=torch.float32):
    size = mask.shape[2:] if mask.shape[2:] != (1, 1) or len(mask) * mask.shape[1] == outs * ins else (3, 3)
    x = normals((batch, ins, height, width), "x").to(dtype)
    weight, bias = normals((outs, ins, *size), "weight").to(dtype), normals((outs,), "bias").to(dtype)
    return x, weight, bias


def _with_gradients(function, *leaves):
    leaves = [x.detach().requires_grad_() for x in leaves]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, normals(tuple(y.shape), "gradient").to(y))


def _compare(x, weight, bias, mask, dense=False, **options):
    """Each result is within twice the error of torch's, and a few roundings of its size."""

    def definition(x, weight, bias):
        product = weight * mask.to(weight.dtype)
        if dense:
            product = weight + (product - weight).detach()
        return F.conv2d(x, product, bias, **options)

    actual = _with_gradients(
        lambda x, w, b: masked_conv2d(x, w, mask, b, **options, dense_gradient=dense), x, weight, bias
    )
    theirs = _with_gradients(definition, x, weight, bias)
    exact = _with_gradients(definition, x.double(), weight.double(), bias.double())
    for what, a, t, e in zip(("y", "x", "weight", "bias"), actual, theirs, exact, strict=True):
        assert a.dtype == t.dtype
        assert a.shape == e.shape
        scale = e.abs().max() if e.numel() else 0
        allowed = 2 * (t - e).abs().max() + 2e-7 * scale if e.numel() else 0
        assert ((a - e).abs() <= allowed).all(), f"{what}: {(a - e).abs().max():.3g}, allowed {allowed:.3g}"
    if not dense:
        assert (actual[2][(mask == 0).expand_as(weight)] == 0).all()


@pytest.mark.parametrize("name", MASKS)
def test_masks(name, backend):
    if backend.backend not in BACKENDS:
        pytest.skip("the op has no such backend")
    mask = MASKS[name]
    padding = [k // 2 for k in _problem(mask)[1].shape[2:]]
    _compare(*_problem(mask), mask, padding=padding)
    _compare(*_problem(mask, batch=9, height=8, width=8), mask, padding=padding, dense=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": (1, 3), "padding": (0, 2), "dilation": (2, 1)},
        {"dilation": 2, "padding": 4},
        {"padding": (7, 0)},
        {"padding": "same"},
        {"padding": "valid"},
    ],
    ids=str,
)
def test_geometry(options):
    mask = causal(5, 3)
    _compare(*_problem(mask), mask, **options)


@pytest.mark.parametrize(
    "sizes",
    [
        {"ins": 1, "outs": 1},
        {"ins": 1, "outs": 70, "height": 28, "width": 28},
        {"ins": 130, "outs": 5, "batch": 1},
        {"ins": 70, "outs": 33, "batch": 3, "height": 5, "width": 4},
        {"ins": 2, "outs": 3, "height": 3, "width": 700},
        {"ins": 2, "outs": 3, "height": 300, "width": 1},
        {"batch": 11, "height": 6, "width": 6},
        {"batch": 0},
    ],
    ids=str,
)
def test_sizes(sizes):
    """More channels than one chain of products, images wider than a block, more images than slices."""
    mask = causal(3, 5)
    _compare(*_problem(mask, **sizes), mask, padding=(1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    x, weight, bias = _problem(causal(5, 5), dtype=dtype)
    mask = causal(5, 5)
    actual = _with_gradients(lambda *a: masked_conv2d(*a[:2], mask, a[2], padding=2), x, weight, bias)
    wide = _with_gradients(
        lambda *a: masked_conv2d(*a[:2], mask, a[2], padding=2), x.float(), weight.float(), bias.float()
    )
    assert all(torch.equal(a, w.to(dtype)) for a, w in zip(actual[:1], wide[:1], strict=True))
    for a, w in zip(actual[1:], wide[1:], strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), w, rtol=2**-7, atol=2**-7 * w.abs().max().item())


@pytest.mark.parametrize("missing", ["x", "weight", "bias"])
def test_gradients_that_are_not_asked_for(missing):
    x, weight, bias = _problem(causal(3, 3))
    leaves = {"x": x, "weight": weight, "bias": bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != missing)
    masked_conv2d(x, weight, causal(3, 3), bias, padding=1).sum().backward()
    whole = _with_gradients(lambda *a: masked_conv2d(*a[:2], causal(3, 3), a[2], padding=1), x, weight, bias)
    assert leaves[missing].grad is None
    assert all(leaf.grad.shape == leaf.shape for name, leaf in leaves.items() if name != missing)
    assert len(whole) == 4


def test_without_bias():
    x, weight, bias = _problem(causal(3, 3))
    y = masked_conv2d(x, weight, causal(3, 3), padding=1)
    assert torch.equal(y, masked_conv2d(x, weight, causal(3, 3), torch.zeros_like(bias), padding=1))


def test_what_is_masked_is_not_read():
    """NaN in masked weights, and in pixels and channels that no output may see, reaches nothing."""
    mask = rgb(6, 6, 5)
    x, weight, bias = _problem(mask, outs=6, ins=6)
    expected = masked_conv2d(x, weight, mask, bias, padding=2)
    weight[mask == 0] = torch.nan
    h, w = 4, 7
    x[:, :, h, w + 1 :] = torch.inf
    x[:, :, h + 1 :] = torch.nan
    actual = masked_conv2d(x, weight, mask, bias, padding=2)
    assert torch.equal(actual[:, :, :h], expected[:, :, :h])
    assert torch.equal(actual[:, :, h, : w + 1], expected[:, :, h, : w + 1])
    assert actual[:, :, h, w + 1].isnan().any() or actual[:, :, h, w + 1].isinf().any()


def test_a_nan_that_is_seen_shows():
    mask = causal(3, 3)
    x, weight, bias = _problem(mask, outs=4, ins=2, height=6, width=6)
    x[0, 1, 2, 3] = torch.nan
    seen = masked_conv2d(x, weight, mask, bias, padding=1).isnan()
    expected = torch.zeros_like(seen)
    expected[0, :, 2, 3:5] = True
    expected[0, :, 3, 2:5] = True
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("batch", [3, 13])
def test_the_same_bits_for_any_threads_and_batch(batch):
    mask = rgb(20, 9, 5)
    x, weight, bias = _problem(mask, batch=batch)

    def run(x):
        return _with_gradients(lambda *a: masked_conv2d(*a[:2], mask, a[2], padding=2), x, weight, bias)

    with threads(1):
        alone = run(x)
    for n in (2, 3, 5):
        with threads(n):
            assert all(map(torch.equal, run(x), alone))
    for i in (0, batch - 1):
        part = run(x[i : i + 1])[0]
        assert torch.equal(part, alone[0][i : i + 1])


@pytest.mark.parametrize("kind", ["channels last", "transposed", "sliced"])
def test_layouts_of_images(kind):
    mask = causal(3, 3)
    x, weight, bias = _problem(mask, height=12, width=12)
    moved = {
        "channels last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": torch.cat([x, x], 3)[..., :12],
    }[kind]
    expected = _with_gradients(lambda *a: masked_conv2d(*a[:2], mask, a[2], padding=1), x, weight, bias)
    actual = _with_gradients(lambda *a: masked_conv2d(*a[:2], mask, a[2], padding=1), moved, weight, bias)
    assert all(map(torch.equal, actual, expected))
    assert actual[0].is_contiguous(
        memory_format=torch.channels_last if kind == "channels last" else torch.contiguous_format
    )


@pytest.mark.parametrize("dense", [False, True])
def test_gradcheck(dense):
    mask = rgb(3, 3, 3).double()
    x, weight, bias = _problem(mask, outs=3, ins=3, height=3, width=4, dtype=torch.float64)
    if dense:  # only where nothing is masked is the dense gradient a derivative
        mask = torch.ones_like(mask)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def function(x, weight, bias):
        return masked_conv2d(x, weight, mask, bias, padding=1, dense_gradient=dense)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_dense_gradient_is_that_of_a_weight_masked_in_place():
    mask = causal(5, 5)
    x, weight, bias = _problem(mask)
    weight = weight * mask
    grads = _with_gradients(
        lambda *a: masked_conv2d(*a[:2], mask, a[2], padding=2, dense_gradient=True), x, weight, bias
    )
    expected = _with_gradients(lambda *a: F.conv2d(*a, padding=2), x, weight, bias)
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-4)
    assert (grads[2][(mask == 0).expand_as(weight)] != 0).all()


def test_compiled_with_changing_sizes():
    mask = causal(3, 3)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(x, weight, bias):
        return masked_conv2d(x, weight, mask, bias, padding=1)

    for batch, height in ((2, 5), (3, 8)):
        x, weight, bias = _problem(mask, batch=batch, height=height)
        expected = _with_gradients(lambda *a: masked_conv2d(*a[:2], mask, a[2], padding=1), x, weight, bias)
        assert all(map(torch.equal, _with_gradients(compiled, x, weight, bias), expected))


def test_backends():
    x, weight, bias = _problem(causal(3, 3))
    if genperf._backend.native:
        assert genperf.explain(masked_conv2d, x, weight, causal(3, 3), bias).choices[0].backend == "cpu"
    choice = genperf.explain(masked_conv2d, x.double(), weight.double(), causal(3, 3)).choices[0]
    assert choice.backend == "reference"
    assert ("cpu", "torch.float64 is left to the reference") in choice.refusals


X, W, M = torch.zeros(2, 3, 6, 6), torch.zeros(4, 3, 3, 3), torch.ones(1, 1, 3, 3)


@pytest.mark.parametrize(
    ("args", "kind", "text"),
    [
        ((None, W, M), TypeError, "x is NoneType"),
        ((X, W, [1]), TypeError, "mask is list"),
        ((X.int(), W, M), TypeError, "x is torch.int32"),
        ((X, W.double(), M), TypeError, "weight is torch.float64, expected torch.float32"),
        ((X, W, M, torch.zeros(4).half()), TypeError, "bias is torch.float16"),
        ((X, W, M.clone().requires_grad_()), TypeError, "mask is a tensor that requires a gradient"),
        ((X, W, M.to(torch.complex64)), TypeError, "mask is complex"),
        ((X[0], W, M), ValueError, r"x has shape \(3, 6, 6\), expected \[B, I, H, W\]"),
        ((X, W, M[0]), ValueError, "mask has shape"),
        ((X, W[:, :2], M), ValueError, "expected 3 input channels"),
        ((X, W[:0], M), ValueError, "no empty dimension"),
        ((X, W, torch.ones(1, 2, 3, 3)), ValueError, "expected one that broadcasts to weight"),
        ((X, W, M, torch.zeros(3)), ValueError, r"bias has shape \(3,\), expected \(4,\)"),
        ((X, W, M, torch.zeros(4, 1)), ValueError, r"expected \[O\]"),
        ((X, W, M.to("meta")), ValueError, "mask is on meta, expected cpu"),
        ((X, W, M, None, 0), ValueError, "stride is 0"),
        ((X, W, M, None, (1, 2, 3)), ValueError, "stride is"),
        ((X, W, M, None, 1, -1), ValueError, "padding is -1"),
        ((X, W, M, None, 1, "some"), ValueError, "padding is 'some'"),
        ((X, W, M, None, 2, "same"), ValueError, "expected stride 1 and an odd extent"),
        ((X, W, M, None, 1, 0, 0), ValueError, "dilation is 0"),
        ((X, W, M, None, 1, 0, 3), ValueError, "images not smaller"),
    ],
)
def test_errors(args, kind, text):
    with pytest.raises(kind, match=text):
        masked_conv2d(*args)
