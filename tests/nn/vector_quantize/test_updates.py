"""What a batch does to the codewords: averages, replacement of unused ones, k-means."""

import math

import pytest
import torch

from genperf.nn import GroupedResidualVQ, ResidualVQ, VectorQuantize
from genperf.nn.vector_quantize._kmeans import kmeans
from genperf.nn.vector_quantize._sampling import draw_positions, take_valid
from genperf.ops import draw_key


def made(*args, **options):
    torch.manual_seed(0)
    return VectorQuantize(*args, **options)


def test_zero_debias():
    """Against the definition in float64: Adam's correction of averages that start at 0."""
    decay, eps, n_codewords = 0.9, 1e-3, 16
    module = made(4, n_codewords, decay=decay, eps=eps, zero_debias=True)
    hidden_size, hidden_sum = torch.zeros(n_codewords).double(), torch.zeros(n_codewords, 4).double()
    for step in range(1, 6):
        x, before = torch.randn(100, 4), module.codebook.clone()
        indices = module(x)[1]
        counts = torch.bincount(indices, minlength=n_codewords).double()
        sums = torch.zeros(n_codewords, 4).double().index_add(0, indices, x.double())
        hidden_size = decay * hidden_size + (1 - decay) * counts
        hidden_sum = decay * hidden_sum + (1 - decay) * sums
        size, total = hidden_size / (1 - decay**step), hidden_sum / (1 - decay**step)
        n = size.sum()
        expected = total / ((size + eps) / (n + n_codewords * eps) * n)[:, None]
        expected = torch.where(size[:, None] > 0, expected, before)
        torch.testing.assert_close(module.codebook.double(), expected, rtol=1e-5, atol=1e-6)
        assert module._codebook.step == step
    other = made(4, n_codewords, decay=decay, eps=eps, zero_debias=True)
    other.load_state_dict(module.state_dict())
    for one in (module, other):
        one(x)
    assert torch.equal(module.codebook, other.codebook)


def test_constant_data_is_found_at_once_with_zero_debias():
    module = made(4, 1, decay=0.99, zero_debias=True)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(10, 4)
    module(x)
    torch.testing.assert_close(module.codebook[0], x[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("zero_debias", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
def test_replaced_codewords(cosine, zero_debias):
    """State and codeword agree, so that the next averages leave a codeword that is not chosen where it is."""
    module = made(8, 16, threshold_ema_dead_code=2, reset_cluster_size=5.0, use_cosine_sim=cosine,
                  zero_debias=zero_debias)  # fmt: skip
    x = torch.randn(100, 8) + 20  # near one or two codewords
    module(x)
    book = module._codebook
    vectors = torch.nn.functional.normalize(x, dim=-1, eps=1e-6) if cosine else x
    new = (module.codebook[:, None] == vectors).all(-1)
    assert new.any(1).sum() >= 12
    assert (new.sum(0) <= 1).all(), "a vector was taken twice"
    filled = 1 - 0.8 if zero_debias else 1.0
    for k in new.any(1).nonzero().flatten():
        torch.testing.assert_close(book.cluster_size[0, k], torch.tensor(5.0 * filled))
        torch.testing.assert_close(book.embed_avg[0, k], module.codebook[k] * 5.0 * filled)
    assert ((book.cluster_size[0] >= 2 * filled) | ~new.any(1)).all()
    before = module.codebook.clone()
    far = x[:1].expand(1000, 8)  # all choose one codeword
    chosen = module(far)[1][0]
    stay = new.any(1) & (torch.arange(16) != chosen)
    torch.testing.assert_close(module.codebook[stay], before[stay], rtol=1e-3, atol=0)


def test_no_codeword_in_use_is_replaced():
    module = made(4, 8, threshold_ema_dead_code=0.5)
    twin = made(4, 8)
    x = module.codebook.repeat(10, 1)
    for one in (module, twin):
        one(x)
    assert torch.equal(module.codebook, twin.codebook)


def test_few_vectors_replace_few_codewords():
    module = made(4, 64, threshold_ema_dead_code=1e6)
    before = module.codebook.clone()
    x = torch.randn(5, 4)
    module(x)
    new = (module.codebook[:, None] == x).all(-1)
    assert new.sum() == 5
    assert (new.sum(0) == 1).all()
    seen = new.any(1)
    for _ in range(200):
        x = torch.randn(5, 4)
        module(x)
        seen |= (module.codebook[:, None] == x).all(-1).any(1)
    assert seen.all(), "some codewords are never replaced"
    assert not torch.equal(before, module.codebook)


def test_only_valid_vectors_replace():
    module = made(4, 8, threshold_ema_dead_code=1e6)
    x = torch.randn(6, 50, 4)
    mask = torch.zeros(6, 50, dtype=torch.bool)
    mask[1, 3] = mask[2, 40:] = mask[5, :7] = True
    x[2, 41] = math.nan
    module(x, mask=mask)
    good = x[mask & x.isfinite().all(-1)]
    assert (module.codebook[:, None] == good).all(-1).any(1).all()


@pytest.mark.parametrize("layout", ["image", "heads", "shared heads"])
def test_vectors_of_other_layouts_replace(layout):
    if layout == "image":
        module = made(8, 16, accept_image_fmap=True, threshold_ema_dead_code=1e6)
        x = torch.randn(2, 8, 5, 7)
        module(x)
        assert (module.codebook[:, None] == x.movedim(1, -1).reshape(-1, 8)).all(-1).any(1).all()
        return
    separate = layout == "heads"
    module = made(8, 16, 4, 2, separate, threshold_ema_dead_code=1e6)
    x = torch.randn(30, 8)
    module(x)
    first, second = x[:, :4], x[:, 4:]
    if separate:
        assert (module.codebook[0][:, None] == first).all(-1).any(1).all()
        assert (module.codebook[1][:, None] == second).all(-1).any(1).all()
    else:
        assert (module.codebook[:, None] == torch.cat([first, second])).all(-1).any(1).all()


@pytest.mark.parametrize("cosine", [False, True], ids=["at once", "by stages"])
def test_residuals_replace(cosine):
    torch.manual_seed(0)
    module = ResidualVQ(dim=4, codebook_size=16, num_quantizers=3, threshold_ema_dead_code=1e6,
                        use_cosine_sim=cosine)  # fmt: skip
    before = module.codebooks.clone()
    x = torch.randn(60, 4)
    indices = module(x)[1]
    residual = x
    for i, codebook in enumerate(module.codebooks):
        rows = torch.nn.functional.normalize(residual, dim=-1, eps=1e-6) if cosine else residual
        distance = (codebook[:, None] - rows).abs().amax(-1).amin(1)
        assert (distance < 1e-6).all(), f"stage {i}"
        residual = residual - before[i][indices[:, i]]


def test_stages_that_share_take_turns():
    torch.manual_seed(0)
    module = ResidualVQ(dim=4, codebook_size=30, num_quantizers=3, shared_codebook=True,
                        threshold_ema_dead_code=1e6)  # fmt: skip
    before = module.codebooks[0].clone()
    x = torch.randn(60, 4)
    indices = module(x)[1]
    residual, left = x, 30
    for i in range(3):
        new = ((module.codebooks[0][:, None] - residual).abs().amax(-1).amin(1) < 1e-6).sum()
        assert new == 10
        left -= new
        residual = residual - before[indices[:, i]]
    assert left == 0


def test_seed():
    def run(seed, noise):
        module = made(4, 32, threshold_ema_dead_code=1e6, kmeans_init=True, seed=seed)
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(noise)
        for _ in range(3):
            module(torch.randn(100, 4, generator=generator))
        return module.codebook

    assert torch.equal(run(1, 0), run(1, 1))
    assert not torch.equal(run(1, 0), run(2, 0))
    assert not torch.equal(run(None, 0), run(None, 1))
    assert torch.equal(run(None, 0), run(None, 0))


@pytest.mark.parametrize("n_valid", [0, 1, 7, 64, 65, 1000])
@pytest.mark.parametrize("n_wanted", [1, 5, 64])
def test_drawn_positions(n_valid, n_wanted):
    """Distinct, in range, and each as often as the others."""
    torch.manual_seed(0)
    often = torch.zeros(n_valid)
    order = torch.arange(64)[None]
    for _ in range(200 if n_valid < 100 else 20):
        position, alone = draw_positions(
            torch.tensor([[n_valid]]), order, torch.tensor([[n_wanted]]), draw_key("cpu")
        )
        taken = position[0][(order < n_wanted)[0] & alone[0]]
        assert len(taken) == min(n_valid, n_wanted)
        assert len(taken.unique()) == len(taken)
        if n_valid:
            assert 0 <= taken.min() <= taken.max() < n_valid
            often += torch.bincount(taken, minlength=n_valid)
    if 0 < n_valid < 100:
        expected = 200 * min(n_valid, n_wanted) / n_valid
        assert (often - expected).abs().max() <= 5 * math.sqrt(expected) + 1e-6


def test_valid_vectors_are_counted_in_order():
    x = torch.randn(2, 4, 3, 5, 7)[:, :, :, 1:]  # [heads, B, D, H, W], not contiguous
    valid = torch.rand(2, 4, 4, 7) < 0.5
    rows = x.movedim(2, -1)
    n = int(valid.flatten(1).sum(1).min())
    position = torch.randint(n, (2, 9))
    taken = take_valid(x, valid, position, 2)
    for head in range(2):
        assert torch.equal(taken[head], rows[head][valid[head]][position[head]])


def test_kmeans_is_lloyds_algorithm():
    """Against float64 from the same start; the objective falls; well apart clusters are found."""
    torch.manual_seed(0)
    centres = torch.randn(8, 4) * 10
    x = (centres.repeat(50, 1) + torch.randn(400, 4))[None]
    valid = torch.ones(1, 400, dtype=torch.bool)
    means = kmeans(x, valid, 20, iterations=0, seed=3)[0][0].double()
    assert (x[0].double()[:, None] == means).all(-1).sum() == 20
    last = math.inf
    for n in range(1, 12):
        distances = torch.cdist(x[0].double(), means, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.min(1)
        objective = nearest.values.square().sum().item()
        assert objective <= last
        last = objective
        counts = torch.bincount(nearest.indices, minlength=20)
        sums = torch.zeros(20, 4).double().index_add(0, nearest.indices, x[0].double())
        means = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], means)
        actual, sizes = kmeans(x, valid, 20, iterations=n, seed=3)
        assert torch.equal(sizes[0].long(), counts)
        torch.testing.assert_close(actual[0].double(), means, rtol=1e-5, atol=1e-5)


def test_kmeans_init():
    module = made(4, 16, kmeans_init=True, kmeans_iters=5, seed=1)
    assert not module._codebook.initted
    assert not module.codebook.any()
    x = torch.randn(200, 4)
    expected, sizes = kmeans(x[None], torch.ones(1, 200, dtype=torch.bool), 16, iterations=5, seed=1)
    module.eval()
    module(x)  # as in the library, evaluation initialises too
    assert torch.equal(module.codebook, expected[0])
    assert torch.equal(module._codebook.cluster_size, sizes)
    assert torch.equal(module._codebook.embed_avg[0], expected[0] * sizes[0][:, None])
    assert module._codebook.initted
    module(torch.randn(200, 4))
    assert torch.equal(module.codebook, expected[0])


def test_kmeans_init_waits_for_vectors():
    module = made(4, 16, kmeans_init=True)
    module(torch.zeros(0, 4))
    module(torch.full((3, 4), math.nan))
    module(torch.randn(2, 3, 4), mask=torch.zeros(2, 3, dtype=torch.bool))
    assert not module._codebook.initted
    module(torch.randn(50, 4))
    assert module._codebook.initted
    module.load_state_dict(made(4, 16, kmeans_init=True).state_dict())
    module(torch.randn(50, 4))
    assert module._codebook.initted
    assert module.codebook.any()


@pytest.mark.parametrize("cosine", [False, True])
def test_kmeans_of_fewer_vectors_than_codewords(cosine):
    module = made(4, 16, kmeans_init=True, use_cosine_sim=cosine)
    x = torch.randn(5, 4)
    quantized, _, _ = module.eval()(x)
    torch.testing.assert_close(quantized, torch.nn.functional.normalize(x, dim=-1) if cosine else x)
    assert module.codebook.any(1).all(), "a codeword at the origin"
    module.train()
    for _ in range(3):
        module(x)
    assert module.codebook.norm(dim=1).min() > 0.1, "a codeword moves to the origin"


def test_empty_step_keeps_everything_but_a_later_one_goes_on():
    module, twin = made(4, 8), made(4, 8)
    x = torch.randn(20, 4)
    module(x)
    module(torch.zeros(0, 4))
    module(torch.randn(2, 3, 4), mask=torch.zeros(2, 3, dtype=torch.bool))
    module(x)
    twin(x)
    twin(x)
    assert torch.equal(module.codebook, twin.codebook)


BAD_OPTIONS = [
    (VectorQuantize, {"dim": 4, "codebook_size": 0}, ValueError, "codebook_size is 0, expected at least 1"),
    (VectorQuantize, {"dim": 4.0, "codebook_size": 8}, TypeError, "dim is 4.0, expected an integer"),
    (VectorQuantize, {"dim": 4, "codebook_size": 8, "heads": -1}, ValueError, "heads is -1"),
    (VectorQuantize, {"dim": 4, "codebook_size": 8, "decay": 1.5}, ValueError, "decay is 1.5, .* 0 to 1"),
    (VectorQuantize, {"dim": 4, "codebook_size": 8, "eps": math.nan}, ValueError, "eps is nan"),
    (VectorQuantize, {"dim": 4, "codebook_size": 8, "decay": "0.9"}, TypeError, "decay is '0.9', .*a number"),
    (
        VectorQuantize,
        {"dim": 4, "codebook_size": 8, "commitment_weight": -1.0},
        ValueError,
        "commitment_weight is -1.0, expected a number >= 0",
    ),
    (
        VectorQuantize,
        {"dim": 4, "codebook_size": 8, "learnable_codebook": True, "ema_update": True},
        ValueError,
        "ema_update is True with learnable_codebook=True",
    ),
    (
        VectorQuantize,
        {"dim": 4, "codebook_size": 8, "learnable_codebook": True, "use_cosine_sim": True},
        ValueError,
        "learnable_codebook is True with use_cosine_sim=True",
    ),
    (
        VectorQuantize,
        {"dim": 4, "codebook_size": 8, "accept_image_fmap": True, "accept_3d_fmap": True},
        ValueError,
        "accept_image_fmap is True with accept_3d_fmap=True",
    ),
    (VectorQuantize, {"dim": 4, "codebook_size": 8, "affine_param": True}, TypeError, "affine_param"),
    (ResidualVQ, {"dim": 4, "codebook_size": 8}, ValueError, "num_quantizers is None"),
    (
        ResidualVQ,
        {"dim": 4, "codebook_size": (8, 4), "num_quantizers": 3},
        ValueError,
        "expected one for each",
    ),
    (
        ResidualVQ,
        {"dim": 4, "codebook_size": (8, 4), "shared_codebook": True},
        ValueError,
        "shared_codebook=True, expected equal numbers",
    ),
    (
        ResidualVQ,
        {"dim": 4, "codebook_size": 8, "num_quantizers": 2, "quantize_dropout_cutoff_index": 2},
        ValueError,
        "quantize_dropout_cutoff_index is 2, expected 0 to 1",
    ),
    (ResidualVQ, {"dim": 4, "codebook_size": 8, "num_quantizers": 2, "heads": 2}, ValueError, "heads is 2"),
    (
        GroupedResidualVQ,
        {"dim": 5, "groups": 2, "codebook_size": 8, "num_quantizers": 2},
        ValueError,
        "dim is 5, expected a multiple of groups, which is 2",
    ),
]


@pytest.mark.parametrize(("module", "options", "error", "message"), BAD_OPTIONS)
def test_bad_options(module, options, error, message):
    with pytest.raises(error, match=message):
        module(**options)


MASK = torch.ones(2, 3, dtype=torch.bool)
BAD_CALLS = [
    (torch.zeros(2, 3, 5), {}, ValueError, r"x has shape \(2, 3, 5\), expected 4 channels in dimension 2"),
    (torch.zeros(4), {}, ValueError, r"x has shape \(4,\), expected at least 2 dimensions"),
    (torch.zeros(2, 3, 4, dtype=torch.int64), {}, TypeError, "x is torch.int64, expected a floating dtype"),
    (
        torch.zeros(2, 3, 4),
        {"mask": MASK.float()},
        TypeError,
        "mask is torch.float32, expected a bool tensor",
    ),
    (torch.zeros(2, 3, 4), {"mask": MASK[:1]}, ValueError, r"mask has shape \(1, 3\), expected \(2, 3\)"),
]


@pytest.mark.parametrize(("x", "arguments", "error", "message"), BAD_CALLS)
@pytest.mark.parametrize("kind", ["plain", "residual", "grouped"])
def test_bad_calls(kind, x, arguments, error, message):
    module = {
        "plain": lambda: VectorQuantize(4, 8),
        "residual": lambda: ResidualVQ(dim=4, codebook_size=8, num_quantizers=2),
        "grouped": lambda: GroupedResidualVQ(dim=4, codebook_size=8, num_quantizers=2, groups=2),
    }[kind]()
    with pytest.raises(error, match=message):
        module(x, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lens": [1, 2]}, TypeError, "lens is list, expected a tensor of integers"),
        ({"lens": torch.tensor([1.0, 2.0])}, TypeError, "lens is torch.float32"),
        ({"lens": torch.tensor([1, 2, 3])}, ValueError, r"lens has shape \(3,\) for x of shape \(2, 3, 4\)"),
        ({"lens": torch.tensor([1, 2]), "mask": MASK}, ValueError, "mask and lens are both given"),
    ],
)
def test_bad_lengths(arguments, error, message):
    with pytest.raises(error, match=message):
        VectorQuantize(4, 8)(torch.zeros(2, 3, 4), **arguments)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (torch.zeros(2, 3), TypeError, "indices is torch.float32, expected a tensor of integers"),
        (torch.zeros(2, dtype=torch.int64), ValueError, r"indices has shape \(2,\), expected \(2, 3\)"),
    ],
)
def test_bad_targets(indices, error, message):
    with pytest.raises(error, match=message):
        VectorQuantize(4, 8)(torch.zeros(2, 3, 4), indices)


def test_too_many_stages():
    module = ResidualVQ(dim=4, codebook_size=8, num_quantizers=2)
    with pytest.raises(ValueError, match=r"indices has shape \(5, 3\), expected at most 2 stages"):
        module.get_codes_from_indices(torch.zeros(5, 3, dtype=torch.int64))
