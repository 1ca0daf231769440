"""The autoregressive models: causal, alive in every tap, trainable."""

import copy
import pickle

import pytest
import torch
from genperf_testing.causality import DEAD, LIVE, past, response
from genperf_testing.models import FAMILIES, conditioning, example, tiny_model
from torch import nn

from genperf.nn import autoregressive as ar


@pytest.fixture(params=FAMILIES)
def tiny(request):
    return tiny_model(request.param)


class TestCausality:
    def test_no_distribution_sees_its_own_value_or_a_later_one(self, tiny):
        seen, may_see = response(tiny), past(tiny)
        assert seen.shape == may_see.shape
        assert seen[~may_see].max() < DEAD
        assert seen[may_see].max() > LIVE

    def test_every_neighbour_before_a_pixel_is_seen(self, tiny):
        seen = response(tiny)
        if len(tiny.shape) == 1:
            assert (seen.diagonal(-1) > LIVE).all()
            return
        height, width = tiny.shape[-2:]
        outputs, inputs = (count // (height * width) for count in seen.shape)
        seen = seen.view(outputs, height, width, inputs, height, width).amax(dim=(0, 3))
        for down, right in ((0, -1), (-1, -1), (-1, 0), (-1, 1)):
            assert seen[3, 2, 3 + down, 2 + right] > LIVE, (down, right)

    def test_earlier_channels_of_a_pixel_are_seen(self):
        """The gated model's first layer masks the channels twice: blue sees red, green sees neither."""
        expected = {"gated_pixelcnn_rgb": [(2, 0)], "pixelcnn_rgb": [(1, 0), (2, 0), (2, 1)]}
        for family, pairs in expected.items():
            tiny = tiny_model(family)
            pixels = tiny.shape[1] * tiny.shape[2]
            seen = response(tiny).view(3, pixels, 3, pixels).diagonal(dim1=1, dim2=3).amax(dim=2)
            assert [tuple(pair) for pair in (seen > LIVE).nonzero().tolist()] == pairs, family


class TestEveryFamily:
    def test_output(self, tiny):
        y = tiny.model(example(tiny, 3), **conditioning(tiny, 3))
        assert torch.isfinite(y).all()
        if tiny.head == "categorical":
            pixels = tiny.shape[1:] if tiny.shape[0] == 1 else tiny.shape
            assert y.shape == (3, tiny.model.classes, *pixels)
        else:
            parameters = {1: 3, 3: 10}[tiny.shape[0]] * tiny.model.mixture
            assert y.shape == (3, parameters, *tiny.shape[1:])

    def test_every_parameter_gets_a_gradient(self, tiny):
        y = tiny.model(example(tiny, 4), **conditioning(tiny, 4))
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        for name, parameter in tiny.model.named_parameters():
            if without_effect(tiny.model, name):
                continue
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 1e-3, name

    def test_state_dict_round_trip(self, tiny):
        other = copy.deepcopy(tiny.model)
        for parameter in other.parameters():
            nn.init.constant_(parameter, 0.5)
        other.load_state_dict(tiny.model.state_dict(), strict=True)
        x, kwargs = example(tiny), conditioning(tiny)
        assert torch.equal(other(x, **kwargs), tiny.model(x, **kwargs))

    def test_pickles_after_a_backward(self, tiny):
        x, kwargs = example(tiny), conditioning(tiny)
        y = tiny.model(x, **kwargs)
        y.sum().backward()
        assert torch.equal(pickle.loads(pickle.dumps(tiny.model))(x, **kwargs), y)

    def test_samples_of_a_batch_do_not_mix(self, tiny):
        x, kwargs = example(tiny, 3), conditioning(tiny, 3)
        alone = tiny.model(x[1:2], **{name: value[1:2] for name, value in kwargs.items()})
        torch.testing.assert_close(tiny.model(x, **kwargs)[1:2], alone, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("family", ["gated_pixelcnn_class", "gated_pixelcnn_rgb", "pixelsnail_cond"])
    def test_conditioning_matters(self, family):
        tiny = tiny_model(family)
        x, kwargs = example(tiny), conditioning(tiny)
        (name, value), *_ = kwargs.items()
        limit = getattr(tiny.model, "n_classes", 0) or tiny.model.classes
        other = tiny.model(x, **{name: (value + 1) % limit})
        change = (other - tiny.model(x, **kwargs)).abs().amax(dim=1)
        assert (change > LIVE).float().mean() > 0.9


class TestTinyModels:
    """The weights of the test models hide nothing."""

    def test_every_tap_matters(self, tiny):
        x, kwargs = example(tiny), conditioning(tiny)
        base = tiny.model(x, **kwargs)
        for name, parameter in tiny.model.named_parameters():
            if parameter.ndim < 3 or name.endswith("weight_g") or without_effect(tiny.model, name):
                continue
            for tap in torch.cartesian_prod(*(torch.arange(size) for size in parameter.shape[2:])).view(
                -1, parameter.ndim - 2
            ):
                with torch.no_grad():
                    place = parameter[(slice(None), slice(None), *tap)]
                    saved = place.clone()
                    place.neg_()  # which leaves the norm of a normalised weight
                    change = (tiny.model(x, **kwargs) - base).abs().max()
                    place.copy_(saved)
                assert (change > LIVE) != hidden(tiny.model, name, tap.tolist()), (name, tap)

    def test_the_weights_are_those_of_the_seed(self):
        again = tiny_model(FAMILIES[0]).model.state_dict()
        other = tiny_model(FAMILIES[0], seed=1).model.state_dict()
        first = tiny_model(FAMILIES[0]).model.state_dict()
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert not torch.equal(first["0.weight"], other["0.weight"])

    def test_images_are_not_square(self, tiny):
        assert len(tiny.shape) == 1 or tiny.shape[-1] != tiny.shape[-2]


def without_effect(model, name):
    """Parameters of the public definitions that no output depends on."""
    if isinstance(model, ar.GatedPixelCNNRGB):
        # After the last layer only the skip connection is read.
        return name.startswith(tuple(f"hidden_conv.{len(model.hidden_conv) - 1}.{n}_fc." for n in "vh"))
    # A bias of the keys adds the same to all scores of a query.
    return name.endswith("causal_attention.key.bias")


def hidden(model, name, tap):
    """Whether the definition masks this tap for every pair of channels."""
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, ar.MaskedConv2d):
        return bool((module.mask[(slice(None), slice(None), *tap)] == 0).all())
    if isinstance(model, ar.GatedPixelCNN) and name.startswith("layers.0."):
        return ("vert_stack" in name and tap[0] == 3) or ("horiz_stack" in name and tap[1] == 3)
    if isinstance(model, ar.PixelSNAIL) and ".resblocks." in name and "condition" not in name:
        rows, columns = module.kernel_size
        return tap[0] == rows - 1 and tap[1] >= columns // 2
    return False


def test_rgb_horizontal_stack_gets_the_row_above_as_published():
    """There v_fc and the label are added in place, and so reach the overlapping view one row up as well."""
    tiny = tiny_model("gated_pixelcnn_rgb")
    block, label = tiny.model.hidden_conv[0], torch.tensor([1])
    v = torch.randn(1, 12, 5, 6, generator=torch.Generator().manual_seed(2))
    given = []
    block.v_to_h.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    with torch.no_grad():
        block(v, v, label)
        padded = nn.functional.pad(v, (0, 0, block.rows, block.rows))
        conv = block.v_conv(padded)
        current, above = conv[:, :, 1 : -block.rows], conv[:, :, : -block.rows - 1]
        assert current.shape == above.shape == (1, 24, 5, 6)
        current += block.v_fc(v)
        current += block.label_embedding(label)[:, :, None, None]
    torch.testing.assert_close(given[0], above, rtol=1e-5, atol=1e-5)
