"""genperf.ops.affine_coupling against the formulas of public libraries, autograd and its own inverse."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from genperf_testing.cases import EMPTY, SHAPES, Case, normals

import genperf
from genperf.ops import affine_coupling, affine_coupling_reverse

SCALES = ("sigmoid", "exp", "tanh", "softplus", "additive")
FORMS = ("shift_scale", "scale_shift", "unshift_scale")
OPTIONS = {
    "sigmoid": {"eps": 1e-3},
    "exp": {"prefactor": 0.5},
    "tanh": {"clamp": 1.5, "slope": 0.7},
    "softplus": {"clamp": 1.2},
    "additive": {},
}
BACKENDS = ("reference", "cpu")


def _case(name, with_h_scale=False, with_mask=False, additive=False, **options):
    """The shape is that of one part: ``x`` and ``h`` have twice its channels."""

    def wide(shape):
        return (shape[0], 2 * shape[1], *shape[2:])

    def function(x, h, *rest):
        rest = list(rest)
        h_scale = rest.pop(0) if with_h_scale else None
        mask = rest.pop(0) if with_mask else None
        return affine_coupling(x, h, h_scale=h_scale, mask=mask, **options)

    def inputs(shape):
        return [normals(wide(shape), "x"), normals(shape if additive else wide(shape), "h")]

    def constants(shape):
        h_scale = [normals((2 * shape[1],), "h_scale").abs()] if with_h_scale else []
        mask = [normals((shape[0], *shape[2:]), "mask") > -1] if with_mask else []
        return h_scale + mask

    return Case(
        name, function, inputs, constants, elementwise=False, backends=(*BACKENDS, "triton"),
        per_sample=not with_h_scale, saves_outputs=True,
        shapes=tuple(s for s in SHAPES + EMPTY if len(s) > 1 and s[1] > 0),
    )  # fmt: skip


CASES = (
    _case("sigmoid"),
    _case("tanh, interleaved, inverse, masked", with_mask=True, scale="tanh", form="scale_shift",
          layout="interleaved", inverse=True),
    _case("exp, scaled h, first part", with_h_scale=True, scale="exp", form="scale_shift",
          transformed="first", shift_first=False, prefactor=0.3),
    _case("softplus, inverse", scale="softplus", clamp=1.0, form="unshift_scale", inverse=True),
    _case("sigmoid and a constant", scale="sigmoid", eps=1e-3, form="scale_shift"),
    _case("additive, masked", with_mask=True, additive=True, scale="additive"),
)  # fmt: skip


def _tensors(shape=(3, 6, 4, 5), additive=False, dtype=torch.float64):
    h_shape = (shape[0], shape[1] // 2 if additive else shape[1], *shape[2:])
    return normals(shape, "x").to(dtype), normals(h_shape, "h").to(dtype)


def expected(x, h, scale, form, layout, shift_first, transformed, inverse, numbers):
    """Step by step, as libraries do it."""
    x1, x2 = x.chunk(2, 1)
    if transformed == "first":
        x1, x2 = x2, x1
    h = numbers.get("prefactor", 1) * h
    if scale == "additive":
        t, s = h, torch.ones_like(h)
    else:
        t, u = (h[:, 0::2], h[:, 1::2]) if layout == "interleaved" else h.chunk(2, 1)
        if not shift_first:
            t, u = u, t
        if scale == "sigmoid":
            s = torch.sigmoid(u + numbers.get("offset", 2)) + numbers.get("eps", 0)
        elif scale == "exp":
            s = torch.exp(u)
        elif scale == "tanh":
            clamp = numbers.get("clamp", 2)
            s = torch.exp(clamp * torch.tanh(numbers.get("slope", 1 / clamp) * u))
        else:
            s = (F.softplus(u) + numbers.get("eps", 1e-3)).clamp(0, numbers.get("clamp", 3))
    if form == "scale_shift":
        y2 = (x2 - t) / s if inverse else x2 * s + t
    else:
        t = -t if form == "unshift_scale" else t
        y2 = x2 / s - t if inverse else (x2 + t) * s
    logdet = s.log().flatten(1).sum(1)
    y = torch.cat([y2, x1] if transformed == "first" else [x1, y2], 1)
    return y, -logdet if inverse else logdet


ALL = list(itertools.product(SCALES, FORMS, (False, True)))


@pytest.mark.parametrize(("scale", "form", "inverse"), ALL)
def test_definition_and_gradients(scale, form, inverse):
    """Values, and the gradients from outputs, against autograd through the steps."""
    numbers = OPTIONS[scale]
    for layout, shift_first, transformed in itertools.product(
        ("halves", "interleaved"), (True, False), ("second", "first")
    ):
        tensors = _tensors(additive=scale == "additive")
        mine, theirs = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
        options = {
            "layout": layout,
            "shift_first": shift_first,
            "transformed": transformed,
            "inverse": inverse,
        }
        out = affine_coupling(*mine, scale=scale, form=form, **options, **numbers)
        truth = expected(*theirs, scale, form, numbers=numbers, **options)
        cotangents = [normals(tuple(y.shape), i).double() for i, y in enumerate(out)]
        for a, e in zip(out, truth, strict=True):
            torch.testing.assert_close(a, e)
        torch.testing.assert_close(
            torch.autograd.grad(out, mine, cotangents),
            torch.autograd.grad(
                truth[: 1 + (scale != "additive")], theirs, cotangents[: 1 + (scale != "additive")]
            ),
        )


@pytest.mark.parametrize(("scale", "form", "inverse"), ALL)
def test_gradcheck(scale, form, inverse):
    x, h = (t.requires_grad_() for t in _tensors((2, 4, 3), scale == "additive"))
    h_scale = normals((h.shape[1],), "h_scale").double().requires_grad_()
    mask = torch.tensor([[True, True, False], [True, True, True]])

    def function(x, h, h_scale):
        return affine_coupling(
            x, h, scale=scale, form=form, inverse=inverse, h_scale=h_scale, mask=mask, **OPTIONS[scale]
        )

    assert torch.autograd.gradcheck(function, (x, h, h_scale))
    assert torch.autograd.gradgradcheck(function, (x, h, h_scale))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scale", ["tanh", "exp"])
def test_volume_preserving(scale, inverse):
    """As FrEIA's GIN, and with a mask as if the sample ended there."""
    x, h = (t.requires_grad_() for t in _tensors((2, 4, 6)))
    options = {"scale": scale, "form": "scale_shift", "volume_preserving": True, "inverse": inverse}
    y, logdet = affine_coupling(x, h, **options)
    t, u = h.chunk(2, 1)
    log_s = 2 * torch.tanh(u / 2) if scale == "tanh" else u
    log_s = log_s - log_s.mean((1, 2), keepdim=True)
    x2 = x[:, 2:]
    torch.testing.assert_close(y[:, 2:], (x2 - t) * (-log_s).exp() if inverse else x2 * log_s.exp() + t)
    assert torch.equal(logdet, torch.zeros(2).double())
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    masked = affine_coupling(x, h, mask=mask, **options)
    torch.testing.assert_close(
        masked.output[:1, :, :4], affine_coupling(x[:1, :, :4], h[:1, :, :4], **options).output
    )
    function = lambda x, h: affine_coupling(x, h, mask=mask, **options)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, h))
    assert torch.autograd.gradgradcheck(function, (x, h))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", SCALES)
def test_round_trip_and_reverse(scale, backend):
    """The inverse gives back the input to a few roundings, the reverse pass the gradients of autograd."""
    for form, (transformed, inverse) in itertools.product(FORMS, (("second", False), ("first", True))):
        options = dict(scale=scale, form=form, transformed=transformed, **OPTIONS[scale])
        x, h = _tensors((3, 6, 40), scale == "additive", torch.float32)
        leaves = [x.clone().requires_grad_(), h.clone().requires_grad_()]
        with genperf.backend(backend):
            y, logdet = affine_coupling(*leaves, inverse=inverse, **options)
            back, minus = affine_coupling(y, h, inverse=not inverse, **options)
            grads = normals(tuple(y.shape), "g"), normals((3,), "gl")
            rebuilt = affine_coupling_reverse(y.detach(), h, *grads, inverse=inverse, **options)
            y2, g2 = y.detach().clone(), grads[0].clone()
            again = affine_coupling_reverse(y2, h, g2, grads[1], inverse=inverse, inplace=True, **options)
            gradients = torch.autograd.grad((y, logdet), leaves, grads)
        size = 1 + y.abs().max() + h.abs().max()
        scales = 1 if scale == "additive" else y.new_tensor(3).exp()
        assert (back - x).abs().max() <= 8 * 2**-24 * size * scales
        assert torch.equal(minus, -logdet)
        assert torch.equal(rebuilt.x, back)
        for a, e in zip(rebuilt[1:3], gradients, strict=True):
            assert torch.equal(a, e)
        assert rebuilt.grad_h_scale is None
        for a, e in zip(again[:3], rebuilt[:3], strict=True):
            assert torch.equal(a, e)
        assert again.x is y2
        assert again.grad_x is g2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", SCALES)
def test_extremes(scale, backend):
    """Of the raw scale: as the steps give it, but log s is finite, and a NaN stays where it is."""
    u = torch.tensor([-1e4, -200.0, -105.0, -50.0, 0.0, 50.0, 200.0, 1e4])
    x = torch.linspace(-2, 3, 16).view(1, 2, 8).requires_grad_()
    h = torch.stack([torch.full_like(u, 0.25), u])[
        None, (0,) if scale == "additive" else (0, 1)
    ].requires_grad_()
    with genperf.backend(backend):
        y, logdet = affine_coupling(x, h, scale=scale, form="scale_shift")
        of_x, of_h = torch.autograd.grad(logdet.sum() + y[:, 0].sum(), (x, h))
    if scale == "exp":
        assert torch.equal(y[:, 1].isinf(), torch.tensor([[False] * 6 + [True] * 2]))
    else:
        assert y.isfinite().all()
        truth, exact = expected(
            x.double(), h.double(), scale, "scale_shift", "halves", True, "second", False, {}
        )
        torch.testing.assert_close(y.double(), truth, rtol=1e-6, atol=1e-7)
        if scale != "sigmoid":
            torch.testing.assert_close(logdet.double(), exact, rtol=1e-6, atol=1e-6)
    if scale == "sigmoid":
        torch.testing.assert_close(logdet, F.logsigmoid(u + 2).sum()[None])
    assert logdet.isfinite().all()
    assert of_x[..., : 6 if scale == "exp" else 8].isfinite().all()
    assert of_h[..., : 6 if scale == "exp" else 8].isfinite().all()

    h = h.detach().clone()
    h[0, -1, 3] = torch.nan
    with genperf.backend(backend):
        y, logdet = affine_coupling(torch.cat([x, x]).detach(), torch.cat([h, h.nan_to_num()]), scale=scale)
    assert y[0, 1].isnan().tolist() == [False] * 3 + [True] + [False] * 4
    assert not y[:, 0].isnan().any()
    assert not y[1].isnan().any()
    assert logdet.isnan().tolist() == [scale != "additive", False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", SCALES)
def test_masked(scale, backend):
    """What is masked has no influence, even NaN, and the rest is as if the sample ended there."""
    x, h = _tensors((2, 4, 7), scale == "additive", torch.float32)
    lengths = torch.tensor([4, 7])
    mask = torch.arange(7) < lengths[:, None]
    h = torch.where(mask[:, None], h, torch.nan)
    x[:, 2:] = torch.where(mask[:, None], x[:, 2:], torch.inf)
    h_scale = normals((h.shape[1],), "scale").abs().requires_grad_()
    x.requires_grad_(), h.requires_grad_()
    with genperf.backend(backend):
        y, logdet = affine_coupling(x, h, scale=scale, lengths=lengths, h_scale=h_scale)
        gradients = torch.autograd.grad((y, logdet), (x, h, h_scale), (torch.ones_like(y), torch.ones(2)))
        for same in (mask, mask[:, None]):
            assert torch.equal(y, affine_coupling(x, h, scale=scale, mask=same, h_scale=h_scale).output)
        short = affine_coupling(x[:1, :, :4], h[:1, :, :4], scale=scale, h_scale=h_scale)
    torch.testing.assert_close((y[:1, :, :4], logdet[:1]), short[:2])
    assert torch.equal(y[0, 2:, 4:], torch.zeros(2, 3))
    assert torch.equal(y[:, :2], x[:, :2])
    assert all(g.isfinite().all() for g in gradients)
    assert torch.equal(gradients[1][0, :, 4:], torch.zeros(h.shape[1], 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaled_h(backend):
    """As if ``h`` had been multiplied before; one value a channel in any of its shapes."""
    x, h = _tensors((3, 6, 5, 4), dtype=torch.float32)
    scale = normals((1, 6, 1, 1), "scale").abs()
    leaves = [[t.clone().requires_grad_() for t in (x, h, scale)] for _ in range(2)]
    with genperf.backend(backend):
        mine = affine_coupling(leaves[0][0], leaves[0][1], h_scale=leaves[0][2])
        theirs = affine_coupling(leaves[1][0], leaves[1][1] * leaves[1][2])
        grads = normals(tuple(x.shape), "g"), normals((3,), "gl")
        gradients = [torch.autograd.grad(o, s, grads) for o, s in zip((mine, theirs), leaves, strict=True)]
        reverse = affine_coupling_reverse(mine[0].detach(), h, *grads, h_scale=scale)
    assert torch.equal(mine.output, theirs.output)
    assert torch.equal(mine.logdet, theirs.logdet)
    torch.testing.assert_close(*gradients)
    assert torch.equal(reverse.grad_h_scale, gradients[0][2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes(backend):
    """The flow's state in float32 beside a network in half precision, as under autocast."""
    x, h = _tensors((3, 6, 5, 4), dtype=torch.float32)
    half = h.bfloat16()
    leaves = [x.clone().requires_grad_(), half.clone().requires_grad_()]
    with genperf.backend(backend):
        y, logdet = affine_coupling(*leaves)
        exact = affine_coupling(x, half.float())
        grads = torch.autograd.grad((y, logdet), leaves, (torch.ones_like(y), torch.ones(3)))
    assert torch.equal(y, exact.output)
    assert torch.equal(logdet, exact.logdet)
    assert [g.dtype for g in grads] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place(backend):
    """The caller's tensor becomes the output; autograd knows that it was overwritten."""
    x, h = _tensors((3, 6, 5, 4), dtype=torch.float32)
    with genperf.backend(backend):
        truth = affine_coupling(x, h)
        own = x.clone()
        version = own._version
        out = affine_coupling(own, h, inplace=True)
        assert out.output is own
        assert own._version > version
        assert torch.equal(own, truth.output)
        assert torch.equal(out.logdet, truth.logdet)

        results = []
        for inplace in (False, True):
            leaves = [x.clone().requires_grad_(), h.clone().requires_grad_()]
            y, logdet = affine_coupling(leaves[0] * 1, leaves[1], inplace=inplace)
            results.append(
                torch.autograd.grad((y.square(), logdet), leaves, (torch.ones_like(y), torch.ones(3)))
            )
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

        leaf = x.clone().requires_grad_()
        saved = leaf.exp()
        y, _ = affine_coupling(saved, h, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        # Where torch does not allow it, there is a copy.
        kept = leaf.detach().clone()
        assert affine_coupling(leaf, h, inplace=True).output is not leaf
        assert affine_coupling((leaf * 1).chunk(2)[0], h[:2], inplace=True).output.shape == (2, 6, 5, 4)
        assert torch.equal(leaf, kept)


def test_split_and_channels_last():
    x, h = normals((2, 5, 4, 3), "x"), normals((2, 4, 4, 3), "h")
    y = affine_coupling(x, h, split=3).output
    torch.testing.assert_close(y[:, 3:], (x[:, 3:] + h[:, :2]) * torch.sigmoid(h[:, 2:] + 2))
    y = affine_coupling(x, h, split=2, transformed="first").output
    torch.testing.assert_close(y[:, :2], (x[:, :2] + h[:, :2]) * torch.sigmoid(h[:, 2:] + 2))
    last = affine_coupling(x.movedim(1, -1), h.movedim(1, -1), split=2, transformed="first", channel_dim=-1)
    assert torch.equal(last.output.movedim(-1, 1), y)
    grads = normals((2, 4, 3, 5), "g"), torch.ones(2)
    reverse = affine_coupling_reverse(
        last.output, h.movedim(1, -1), *grads, split=2, transformed="first", channel_dim=-1
    )
    torch.testing.assert_close(reverse.x.movedim(-1, 1), x)
    assert reverse.grad_h.shape == (2, 4, 3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 3)}, "x has 5 channels, expected an even number"),
        ({"h": torch.zeros(2, 6, 3)}, r"h has shape \(2, 6, 3\), expected \(2, 4, 3\)"),
        ({"h": torch.zeros(2, 4)}, "the same number of others"),
        ({"x": torch.zeros(4), "h": torch.zeros(4)}, "expected a batch dimension"),
        ({"x": None}, "x is NoneType, expected a tensor"),
        ({"h": torch.zeros(2, 4, 3, dtype=torch.int64)}, "h is torch.int64"),
        ({"h": torch.zeros(2, 4, 3, dtype=torch.float64)}, "float64 goes with float64 only"),
        ({"h": torch.zeros(2, 4, 3, device="meta")}, "h is on meta, expected cpu"),
        ({"split": 9}, "split is 9, expected an integer from 0 to 4"),
        ({"split": 1}, r"h has shape \(2, 4, 3\), expected \(2, 6, 3\)"),
        ({"scale": "Sigmoid"}, "scale is 'Sigmoid', expected one of sigmoid, exp"),
        ({"form": "scale"}, "form is 'scale', expected one of shift_scale"),
        ({"layout": "cross"}, "layout is 'cross'"),
        ({"transformed": 2}, "transformed is 2"),
        ({"shift_first": 1}, "shift_first is int, expected a bool"),
        ({"clamp": 2.0}, "clamp is 2.0 for scale 'sigmoid', expected None"),
        ({"scale": "tanh", "clamp": 0.0}, "clamp is 0"),
        ({"scale": "tanh", "slope": 0.0}, "slope is 0.0, expected a finite number, not 0"),
        ({"offset": float("nan")}, "offset is nan"),
        ({"eps": -1.0}, "eps is -1.0, expected a number >= 0"),
        ({"prefactor": 0.0}, "prefactor is 0.0"),
        (
            {"scale": "additive", "volume_preserving": True, "h": torch.zeros(2, 2, 3)},
            "volume_preserving is True",
        ),
        ({"h_scale": torch.ones(3)}, r"h_scale has shape \(3,\), expected \(4,\)"),
        ({"h_scale": 2.0}, "h_scale is float, expected a tensor"),
        ({"mask": torch.ones(2, 3)}, "mask is torch.float32, expected a bool tensor"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask has shape \(2, 4\) on cpu, expected \(2, 3\)"),
        ({"lengths": torch.ones(3, dtype=torch.int64)}, r"lengths has shape \(3,\)"),
        ({"lengths": torch.ones(2)}, "lengths is torch.float32, expected an int64"),
        ({"lengths": torch.ones(2), "mask": torch.ones(2, 3)}, "mask and lengths were given"),
        ({"channel_dim": 3}, "channel_dim is 3, expected a dimension of x"),
        ({"channel_dim": 0}, "channel_dim is 0, expected another than that of the batch"),
    ],
)
def test_errors(change, message):
    arguments = {"x": torch.zeros(2, 4, 3), "h": torch.zeros(2, 4, 3), **change}
    with pytest.raises((TypeError, ValueError), match=message) as error:
        affine_coupling(arguments.pop("x"), arguments.pop("h"), **arguments)
    assert str(error.value).startswith("affine_coupling: ")


def test_errors_of_reverse():
    y = torch.zeros(2, 4, 3)
    for grads, message in (
        ((torch.zeros(2, 4), torch.zeros(2)), "grad_y has shape (2, 4)"),
        ((y.half(), torch.zeros(2)), "dtype torch.float16"),
        ((y, torch.zeros(3)), "grad_logdet has shape (3,)"),
        ((y, torch.zeros(2).half()), "dtype torch.float16"),
        ((y, 1.0), "grad_logdet is float"),
    ):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)) as error:
            affine_coupling_reverse(y, y, *grads)
        assert str(error.value).startswith("affine_coupling_reverse: ")


def test_keeps_the_output_alone():
    """And not the input; in half precision, where the output is rounded, the input."""
    for dtype in (torch.float32, torch.bfloat16):
        x, h = (t.requires_grad_() for t in _tensors(dtype=dtype))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
            y = affine_coupling(x, h).output
        assert {t.data_ptr() for t in kept} == {h.data_ptr(), (y if dtype == torch.float32 else x).data_ptr()}
