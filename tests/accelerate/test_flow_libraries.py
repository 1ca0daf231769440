"""accelerate on the flows of normflows, nflows and FrEIA."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import genperf

pytestmark = pytest.mark.filterwarnings("ignore")


def perturbed(model):
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def checked(model, *inputs, calls=(None,), strict=True):
    """Accelerated and equal to its original in float64 in each call; its report."""
    keys = list(model.state_dict())
    report = genperf.accelerate(model, mode="training", strict=strict)
    for call in calls:
        result = report.verify(*inputs, call=call, seconds=0)
        assert result, result
    assert list(model.state_dict()) == keys
    return report


def kernels(report):
    return [entry.kernel for entry in report.accelerated]


def inverse(model, x):
    return model.inverse(x)


class TestNormflows:
    @pytest.fixture(scope="class")
    def nf(self):
        return pytest.importorskip("normflows")

    @pytest.mark.parametrize("options", [{}, {"use_lu": False}, {"scale": False}, {"scale_map": "exp"},
                                         {"scale_map": "sigmoid_inv", "split_mode": "channel_inv"},
                                         {"net_actnorm": True}])  # fmt: skip
    def test_block(self, nf, options):
        torch.manual_seed(0)
        x = torch.randn(3, 5, 4, 6)
        block = nf.flows.GlowBlock(5, 8, **options)
        block.inverse(x)
        report = checked(perturbed(block), x, calls=(None, inverse))
        assert "invertible_conv1x1, actnorm folded" in kernels(report)
        assert "affine_coupling" in kernels(report)

    def test_checkerboard_is_left_alone(self, nf):
        x = torch.randn(2, 4, 4, 4)
        block = nf.flows.GlowBlock(4, 8, split_mode="checkerboard")
        block.inverse(x)
        report = checked(perturbed(block), x, strict=False)
        assert [e.name for e in report.left_alone] == ["flows.0"]
        assert "checkerboard" in report.left_alone[0].reason
        assert "invertible_conv1x1, actnorm folded" in kernels(report)

    def test_what_takes_vectors_is_left_alone(self, nf):
        report = genperf.accelerate(nf.flows.InvertibleAffine(6))
        assert "nothing would be gained" in report.left_alone[0].reason

    def test_actnorm_initialises_in_either_direction(self, nf):
        x = 2 + 3 * torch.randn(8, 4, 4, 4)
        for call in (nf.flows.ActNorm.forward, nf.flows.ActNorm.inverse):
            original = nf.flows.ActNorm((4, 1, 1))
            fast = copy.deepcopy(original)
            genperf.accelerate(fast, strict=True)
            name = call.__name__
            for _ in range(2):
                for a, b in zip(getattr(fast, name)(x), getattr(original, name)(x), strict=True):
                    torch.testing.assert_close(a, b)
            assert fast.data_dep_init_done == 1

    def test_multiscale_model(self, nf):
        torch.manual_seed(0)
        blocks = [[nf.flows.GlowBlock(4 * (i == 1) or 8, 8) for _ in range(2)] for i in range(2)]
        base = [nf.distributions.DiagGaussian(shape, trainable=False) for shape in ((8, 2, 2), (2, 4, 4))]
        steps = [[*of_level, nf.flows.Squeeze()] for of_level in blocks]
        model = nf.MultiscaleFlow(base, steps, [nf.flows.Merge()], class_cond=False)
        x = torch.rand(4, 1, 8, 8)
        model.log_prob(x, None)
        perturbed(model)
        before = model.log_prob(x, None)
        checked(model, x, calls=[lambda m, x: m.log_prob(x, None)])
        torch.testing.assert_close(model.log_prob(x, None), before, rtol=1e-5, atol=1e-4)
        z, logdet = model.inverse_and_log_det(x)
        back, negative = model.forward_and_log_det(z)
        torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(negative, -logdet, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(
            torch.compile(model, backend="aot_eager")(x, None), -before, rtol=1e-5, atol=1e-4
        )


class Convolution(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, padding=1)

    def forward(self, x, context=None):
        return self.conv(x)


class TestNflows:
    @pytest.fixture(scope="class")
    def transforms(self):
        pytest.importorskip("nflows.transforms")
        import nflows.transforms

        return nflows.transforms

    @pytest.mark.parametrize("mask", [[0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1, 0], [1, 1, 0, 0, 0]])
    def test_composition(self, transforms, mask):
        torch.manual_seed(0)
        n = len(mask)
        parts = [
            make()
            for _ in range(2)
            for make in (
                lambda: transforms.ActNorm(n),
                lambda: transforms.OneByOneConvolution(n, identity_init=False),
                lambda: transforms.AffineCouplingTransform(mask, Convolution),
            )
        ]
        model = transforms.CompositeTransform(parts)
        x = torch.randn(4, n, 4, 4)
        model(x)
        report = checked(perturbed(model), x, calls=(None, inverse))
        assert sorted({*kernels(report)}) == [
            "affine_coupling",
            "invertible_conv1x1",
            "invertible_conv1x1, actnorm folded",
            "none: torch, its flag read once",
        ]

    def test_what_takes_vectors_is_left_alone(self, transforms):
        for layer in (transforms.LULinear(5), transforms.NaiveLinear(5)):
            assert "nothing would be gained" in genperf.accelerate(layer).left_alone[0].reason
        parts = [transforms.ActNorm(6), transforms.LULinear(6)]
        report = genperf.accelerate(transforms.CompositeTransform(parts))
        assert [e.name for e in report.accelerated] == ["_transforms.0"]

    def test_cache_is_the_librarys(self, transforms):
        layer = perturbed(transforms.OneByOneConvolution(5)).eval()
        genperf.accelerate(layer, strict=True)
        x = torch.randn(2, 5, 3, 4)
        expected = layer(x)[0]
        layer.use_cache()
        torch.testing.assert_close(layer(x)[0], expected)
        assert layer.cache.weight is not None

    def test_additive_and_unconditional(self, transforms):
        x = torch.randn(3, 4, 4, 4)
        additive = transforms.AdditiveCouplingTransform([0, 1, 0, 1], Convolution)
        checked(perturbed(additive), x, calls=(None, inverse))
        both = transforms.AffineCouplingTransform(
            [0, 1], Convolution, unconditional_transform=lambda features: transforms.ActNorm(features)
        )
        assert [e.name for e in genperf.accelerate(both).left_alone] == [""]


class TestFreia:
    @pytest.fixture(scope="class")
    def modules(self):
        return pytest.importorskip("FrEIA.modules")

    @staticmethod
    def subnet(channels, out):
        return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, out, 1))

    @pytest.mark.parametrize("options", [{}, {"permute_soft": True}, {"gin_block": True},
                                         {"learned_householder_permutation": 2, "reverse_permutation": True},
                                         {"global_affine_type": "EXP"},
                                         {"global_affine_type": "SIGMOID"}])  # fmt: skip
    def test_block(self, modules, options):
        torch.manual_seed(0)
        np.random.seed(0)  # of scipy's rotations
        block = modules.AllInOneBlock([(5, 4, 6)], subnet_constructor=self.subnet, **options)
        calls = (None, lambda m, x: m(x, rev=True))
        report = checked(perturbed(block), [torch.randn(3, 5, 4, 6)], calls=calls)
        assert kernels(report) == ["affine_coupling, invertible_conv1x1"]

    def test_vectors_and_conditions(self, modules):
        vectors = modules.AllInOneBlock([(7,)], subnet_constructor=nn.Linear)
        assert "nothing would be gained" in genperf.accelerate(vectors).left_alone[0].reason
        block = modules.AllInOneBlock([(4, 4, 4)], [(2, 4, 4)], subnet_constructor=self.subnet)
        checked(perturbed(block), [torch.randn(3, 4, 4, 4)], [torch.randn(3, 2, 4, 4)])

    def test_fixed_convolution(self, modules):
        layer = modules.Fixed1x1Conv([(6, 4, 4)], M=torch.randn(6, 6))
        calls = (None, lambda m, x: m(x, rev=True))
        assert kernels(checked(layer, [torch.randn(3, 6, 4, 4)], calls=calls)) == ["invertible_conv1x1"]
