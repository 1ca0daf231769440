"""The modules against vector-quantize-pytorch, call by call from one state."""

import pytest
import torch

from genperf import nn

peers = pytest.importorskip("vector_quantize_pytorch")

SEQUENCE, IMAGE = (4, 50, 16), (3, 16, 5, 7)

QUANTIZERS = {
    "plain": (SEQUENCE, {}),
    "vectors alone": ((40, 16), {}),
    "straight-through": (SEQUENCE, {"rotation_trick": False, "commitment_weight": 0.25}),
    "no commitment": (SEQUENCE, {"commitment_weight": 0.0}),
    "cosine": (SEQUENCE, {"use_cosine_sim": True}),
    "projections": (SEQUENCE, {"codebook_dim": 8}),
    "layer norm": (SEQUENCE, {"codebook_dim": 8, "layernorm_after_project_in": True}),
    "heads": (SEQUENCE, {"codebook_dim": 8, "heads": 2, "separate_codebook_per_head": True}),
    "heads of one codebook": (SEQUENCE, {"codebook_dim": 8, "heads": 4}),
    "heads of cosines": (
        SEQUENCE,
        {"codebook_dim": 8, "heads": 2, "separate_codebook_per_head": True, "use_cosine_sim": True},
    ),
    "image": (IMAGE, {"accept_image_fmap": True}),
    "image with projections": (IMAGE, {"accept_image_fmap": True, "codebook_dim": 4}),
    "image with heads": (
        IMAGE,
        {"accept_image_fmap": True, "codebook_dim": 8, "heads": 2, "separate_codebook_per_head": True},
    ),
    "image with heads of one codebook": (IMAGE, {"accept_image_fmap": True, "codebook_dim": 8, "heads": 2}),
    "volume": ((2, 16, 3, 4, 5), {"accept_3d_fmap": True}),
    "channels first": ((4, 16, 50), {"channel_last": False}),
    "channels first with projections": ((4, 16, 50), {"channel_last": False, "codebook_dim": 4}),
    "learned": (SEQUENCE, {"learnable_codebook": True, "ema_update": False}),
    "learned, straight-through": (
        SEQUENCE,
        {"learnable_codebook": True, "ema_update": False, "rotation_trick": False},
    ),
    "no gradient of the output": (SEQUENCE, {"route_gradients_to_input": False}),
    "frozen": (SEQUENCE, {"freeze_codebook": True}),
    "slow averages": (SEQUENCE, {"decay": 0.99, "eps": 1e-3}),
}

RESIDUALS = {
    "plain": (SEQUENCE, {"num_quantizers": 4}, {}),
    "cosine": (SEQUENCE, {"num_quantizers": 3, "use_cosine_sim": True}, {}),
    "learned": (SEQUENCE, {"num_quantizers": 3, "learnable_codebook": True, "ema_update": False}, {}),
    "sizes and projections": (SEQUENCE, {"codebook_size": (32, 16, 8), "codebook_dim": 8}, {}),
    "shared": (SEQUENCE, {"num_quantizers": 3, "shared_codebook": True}, {}),
    "gradient of residuals": (
        SEQUENCE,
        {"num_quantizers": 3, "quant_grad_frac": 0.3, "rotation_trick": False},
        {},
    ),
    "dropout": (
        SEQUENCE,
        {"num_quantizers": 6, "quantize_dropout": True},
        {"rand_quantize_dropout_fixed_seed": 3},
    ),
    "dropout of cosines": (
        SEQUENCE,
        {"num_quantizers": 6, "quantize_dropout": True, "use_cosine_sim": True},
        {"rand_quantize_dropout_fixed_seed": 4},
    ),
    "dropout in pairs": (
        SEQUENCE,
        {
            "num_quantizers": 6,
            "quantize_dropout": True,
            "quantize_dropout_multiple_of": 2,
            "quantize_dropout_cutoff_index": 1,
        },
        {"rand_quantize_dropout_fixed_seed": 5},
    ),
}

GROUPED = {
    "plain": (SEQUENCE, {"num_quantizers": 3, "groups": 2}, {}),
    "cosine": (SEQUENCE, {"num_quantizers": 3, "groups": 2, "use_cosine_sim": True}, {}),
    "projections": (SEQUENCE, {"num_quantizers": 2, "groups": 4, "codebook_dim": 3}, {}),
}


def table(cases):
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


def call(module, x, weights, **arguments):
    """Outputs, and gradients of a sum of them, of one call."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    quantized, indices, loss, *_ = module(x, **arguments)
    total = (quantized * weights).sum() + loss.sum()
    if total.requires_grad:
        total.backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return quantized, indices, loss, gradients | {"x": x.grad}


def close(actual, expected, what):
    """Float32 sums of up to a few hundred terms in another order."""
    assert (actual is None) == (expected is None), what
    if actual is not None:
        assert actual.shape == expected.shape, what
        assert actual.dtype == expected.dtype, what
        size = expected.double().abs().max().clamp(min=1e-6)
        assert (actual.double() - expected.double()).abs().max() <= 1e-5 * size, what


def compare(ours, peer, shape, arguments):
    torch.manual_seed(1)
    for training in (True, True, False):
        ours.train(training)
        peer.train(training)
        ours.load_state_dict(peer.state_dict())
        x = torch.randn(shape)
        weights = torch.randn(shape)
        extra = arguments if training else {}
        expected = call(peer, x, weights, **extra)
        actual = call(ours, x, weights, **extra)
        assert torch.equal(actual[1], expected[1])
        close(actual[0], expected[0], "quantized")
        close(actual[2], expected[2], "loss")
        for name, gradient in expected[3].items():
            close(actual[3][name], gradient, f"gradient of {name}")
        state = ours.state_dict()
        assert list(state) == list(peer.state_dict())
        for name, value in peer.state_dict().items():
            close(state[name], value, name)


@table(QUANTIZERS)
def test_vector_quantize(case):
    shape, options = case
    torch.manual_seed(0)
    peer = peers.VectorQuantize(dim=16, codebook_size=32, **options)
    torch.manual_seed(0)
    ours = nn.VectorQuantize(dim=16, codebook_size=32, **options)
    for name, value in peer.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), f"{name} starts with other numbers"
    compare(ours, peer, shape, {})
    assert torch.equal(ours.codebook, peer.codebook)
    quantized, indices, _ = ours(torch.randn(shape))
    close(ours.get_output_from_indices(indices), quantized, "output from indices")
    if "heads" not in options or "separate_codebook_per_head" in options:  # else it does not join the heads
        assert torch.equal(ours.get_codes_from_indices(indices), peer.get_codes_from_indices(indices))


@pytest.mark.parametrize("argument", ["mask", "lens"])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("heads", [1, 2])
def test_padding(argument, zeros, heads):
    options = {"return_zeros_for_masked_padding": zeros}
    if heads > 1:
        options |= {"heads": 2, "codebook_dim": 8, "separate_codebook_per_head": True}
    torch.manual_seed(0)
    peer = peers.VectorQuantize(16, 32, **options)
    ours = nn.VectorQuantize(16, 32, **options)
    lens = torch.tensor([50, 1, 7, 30])
    arguments = {"lens": lens} if argument == "lens" else {"mask": torch.rand(4, 50) < 0.7}
    if heads == 1:
        compare(ours, peer, SEQUENCE, arguments)
        return
    # With heads its loss compares unlike shapes; the rest is compared without it.
    ours.commitment_weight = 0.0
    peer.has_commitment_loss = False
    compare(ours, peer, SEQUENCE, arguments)


CROSS_ENTROPIES = ("plain", "cosine", "heads", "heads of one codebook", "heads of cosines", "learned")


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
def test_cross_entropy(name):
    shape, options = QUANTIZERS[name]
    torch.manual_seed(0)
    peer = peers.VectorQuantize(dim=16, codebook_size=32, **options)
    ours = nn.VectorQuantize(dim=16, codebook_size=32, **options)
    for training in (True, False):
        ours.train(training)
        peer.train(training)
        ours.load_state_dict(peer.state_dict())
        x = torch.randn(shape)
        targets = torch.randint(-1, 32, ours.eval()(x)[1].shape)
        ours.train(training)
        found = []
        for module in (peer, ours):
            module.zero_grad()
            rows = x.clone().requires_grad_()
            # Its update is hidden from autograd: not frozen, its gradient would be by the new codewords.
            _, entropy = module(rows, indices=targets, freeze_codebook=name != "learned")
            entropy.backward()
            found.append([entropy, rows.grad, *(p.grad for p in module.parameters())])
        for expected, actual in zip(*found, strict=True):
            close(actual, expected, name)
        for key, value in peer.state_dict().items():
            close(ours.state_dict()[key], value, key)


@table(RESIDUALS)
def test_residual_vq(case):
    shape, options, arguments = case
    options = {"dim": 16, "codebook_size": 32} | options
    torch.manual_seed(0)
    peer, ours = peers.ResidualVQ(**options), nn.ResidualVQ(**options)
    compare(ours, peer, shape, arguments)
    x = torch.randn(shape)
    expected, actual = peer(x, return_all_codes=True), ours(x, return_all_codes=True)
    assert torch.equal(actual[3], expected[3])
    indices = expected[1][..., :1] if "quantize_dropout" in options else expected[1]
    for some in (expected[1], indices):
        codes = peer.get_output_from_indices(some)
        close(ours.get_output_from_indices(some), codes, "output from indices")
    for one, other in zip(ours.codebooks, peer.codebooks, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}], ids=["at once", "by stages"])
def test_padding_of_residuals(options):
    torch.manual_seed(0)
    peer = peers.ResidualVQ(dim=16, codebook_size=32, num_quantizers=3, **options)
    ours = nn.ResidualVQ(dim=16, codebook_size=32, num_quantizers=3, **options)
    if options:  # its masked loss compares codewords of length 1 with inputs of any
        for layer in (*peer.layers, *ours.layers):
            layer.commitment_weight = 0.0
    compare(ours, peer, SEQUENCE, {"mask": torch.rand(4, 50) < 0.7})


@table(GROUPED)
def test_grouped_residual_vq(case):
    shape, options, arguments = case
    torch.manual_seed(0)
    peer = peers.GroupedResidualVQ(dim=16, codebook_size=32, **options)
    ours = nn.GroupedResidualVQ(dim=16, codebook_size=32, **options)
    compare(ours, peer, shape, arguments)
    indices = peer(torch.randn(shape))[1]
    assert torch.equal(ours.get_codes_from_indices(indices), peer.get_codes_from_indices(indices))
    close(ours.get_output_from_indices(indices), peer.get_output_from_indices(indices), "output")


def test_codebook_is_assigned_as_there():
    peer, ours = peers.VectorQuantize(16, 32), nn.VectorQuantize(16, 32)
    codes = torch.randn(32, 16)
    peer.codebook = codes
    ours.codebook = codes
    assert torch.equal(ours._codebook.embed, peer._codebook.embed)


def test_where_indices_differ_ours_are_right():
    """Data with a mean of 30, where the expanded square of the distance cancels."""
    torch.manual_seed(0)
    peer = peers.VectorQuantize(16, 256).eval()
    ours = nn.VectorQuantize(16, 256).eval()
    peer.codebook = torch.randn(256, 16) + 30
    ours.load_state_dict(peer.state_dict())
    x = torch.randn(4096, 16) + 30
    expected, actual = peer(x)[1], ours(x)[1]
    distances = torch.cdist(x.double(), ours.codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    differ = (actual != expected).nonzero().flatten()
    assert len(differ) > 0
    assert (distances[differ, actual[differ]] < distances[differ, expected[differ]]).all()
    assert torch.equal(actual, distances.argmin(1))
