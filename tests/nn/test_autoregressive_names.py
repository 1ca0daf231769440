"""Names and sizes of the autoregressive models' parameters, loading, and errors."""

import pytest
import torch
from genperf_testing.models import randomise
from torch import nn

from genperf.nn import autoregressive as ar
from genperf.nn.autoregressive.weight_norm import (
    WeightNormConv2d,
    WeightNormConvTranspose2d,
    WeightNormLinear,
)


def build(cls, *args, **kwargs):
    with torch.device("meta"):
        return cls(*args, **kwargs)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def wb(*names):
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def bgv(*names):
    return {f"{name}.{kind}" for name in names for kind in ("bias", "weight_g", "weight_v")}


class TestNames:
    def test_pixelcnn(self):
        keys = {f"{3 * layer}.{name}" for layer in range(8) for name in ("weight", "mask")}
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        keys |= {f"{3 * layer + 1}.{name}" for layer in range(8) for name in statistics}
        keys |= wb("24", *(f"{3 * layer + 1}" for layer in range(8)))
        assert build(ar.PixelCNN).state_dict().keys() == keys

    def test_gated_pixelcnn(self):
        parts = ("vert_stack", "vert_to_horiz", "horiz_stack", "horiz_resid")
        keys = wb(
            "output_conv.0", "output_conv.2", *(f"layers.{n}.{part}" for n in range(15) for part in parts)
        )
        keys |= {"embedding.weight"} | {f"layers.{n}.class_cond_embedding.weight" for n in range(15)}
        state = build(ar.GatedPixelCNN).state_dict()
        assert state.keys() == keys
        assert state["layers.0.vert_stack.weight"].shape == (128, 64, 4, 7)
        assert state["layers.0.horiz_stack.weight"].shape == (128, 64, 1, 4)
        assert state["layers.1.vert_stack.weight"].shape == (128, 64, 2, 3)
        assert state["layers.1.horiz_stack.weight"].shape == (128, 64, 1, 2)

    def test_gated_pixelcnn_rgb(self):
        first = ("v_conv", "v_fc", "v_to_h", "h_conv", "h_fc")
        blocks = [f"hidden_conv.{n}" for n in range(6)]
        keys = wb("out_hidden_conv", "out_conv", *(f"causal_conv.{part}" for part in first))
        keys |= wb(*(f"{block}.{part}" for block in blocks for part in (*first, "h_skip")))
        keys |= {
            f"{block}.{part}.mask" for block in blocks for part in ("v_to_h", "h_conv", "h_fc", "h_skip")
        }
        keys |= {"causal_conv.h_conv.mask", "causal_conv.h_fc.mask", "out_hidden_conv.mask", "out_conv.mask"}
        keys |= {f"{name}.weight" for name in ("label_embedding", *(f"{b}.label_embedding" for b in blocks))}
        state = build(ar.GatedPixelCNNRGB).state_dict()
        assert state.keys() == keys
        assert state["causal_conv.v_conv.weight"].shape == (60, 3, 4, 7)
        assert state["out_conv.weight"].shape == (6, 10, 1, 1)

    def test_pixelcnnpp(self):
        keys = bgv("u_init.conv", "ul_init.0.conv", "ul_init.1.conv", "nin_out.lin_a")
        for stream in ("u_stream", "ul_stream"):
            keys |= bgv(*(f"downsize_{stream}.{level}.conv" for level in range(2)))
            keys |= bgv(*(f"upsize_{stream}.{level}.deconv" for level in range(2)))
            for way, counts in (("up", (5, 5, 5)), ("down", (5, 6, 6))):
                for level, count in enumerate(counts):
                    for n in range(count):
                        block = f"{way}_layers.{level}.{stream}.{n}"
                        keys |= bgv(f"{block}.conv_input.conv", f"{block}.conv_out.conv")
                        if (way, stream) != ("up", "u_stream"):
                            keys |= bgv(f"{block}.nin_skip.lin_a")
        state = build(ar.PixelCNNPP).state_dict()
        assert len(keys) == 567
        assert state.keys() == keys
        assert state["u_init.conv.weight_v"].shape == (80, 4, 2, 3)
        assert state["upsize_u_stream.0.deconv.weight_g"].shape == (80, 1, 1, 1)
        assert state["down_layers.0.ul_stream.0.nin_skip.lin_a.weight_v"].shape == (80, 320)

    def test_pixelsnail(self):
        keys = {"background"} | bgv("horizontal.conv.conv", "vertical.conv.conv", "out.1.conv")
        for b in (f"blocks.{n}" for n in range(4)):
            keys |= bgv(*(f"{b}.resblocks.{r}.conv{i}.conv.conv" for r in range(4) for i in (1, 2)))
            keys |= bgv(
                *(f"{b}.{part}_resblock.conv{i}.conv" for part in ("key", "query", "out") for i in (1, 2))
            )
            keys |= bgv(f"{b}.out_resblock.aux_conv.conv")
            keys |= bgv(*(f"{b}.causal_attention.{part}" for part in ("query", "key", "value")))
        assert build(ar.PixelSNAIL).state_dict().keys() == keys

    def test_pixelsnail_bottom(self):
        keys = {"background"} | bgv("horizontal.conv.conv", "vertical.conv.conv", "out.1.conv")
        keys |= bgv("cond_resnet.blocks.0.conv")
        keys |= bgv(*(f"cond_resnet.blocks.{n}.conv{i}.conv" for n in (1, 2, 3) for i in (1, 2)))
        for b in (f"blocks.{n}" for n in range(4)):
            keys |= bgv(f"{b}.out.conv")
            for block in (f"{b}.resblocks.{r}" for r in range(4)):
                keys |= bgv(f"{block}.conv1.conv.conv", f"{block}.conv2.conv.conv")
                keys |= {f"{block}.condition.conv.weight_{part}" for part in "gv"}
        assert build(ar.PixelSNAIL.bottom).state_dict().keys() == keys

    def test_wavenet(self):
        keys = {"embed.weight", "conv_out.conv.weight", "conv_end.conv.weight"}
        keys |= wb(*(f"{part}_layers.{n}.conv" for part in ("dilate", "skip") for n in range(16)))
        keys |= wb(*(f"res_layers.{n}.conv" for n in range(15)))
        assert build(ar.WaveNet).state_dict().keys() == keys
        keys |= wb("upsample", "cond_layers.conv")
        assert build(ar.WaveNet, n_cond_channels=80).state_dict().keys() == keys

    @pytest.mark.parametrize(
        ("model", "millions"),
        [
            (lambda: ar.GatedPixelCNN(512, 128, 15), 6.39),
            (lambda: ar.PixelCNNPP(5, 160), 53.66),
            (lambda: ar.PixelSNAIL(), 84.87),
        ],
        ids=["gated_pixelcnn_15x128", "pixelcnnpp_160", "pixelsnail_top"],
    )
    def test_published_sizes(self, model, millions):
        assert parameters(build(model)) / 1e6 == pytest.approx(millions, abs=0.005)


class TestMasks:
    def test_kernel(self):
        above, before = [1.0] * 5, [1.0, 1.0]
        for kind, centre in (("A", 0.0), ("B", 1.0)):
            mask = ar.MaskedConv2d(2, 3, 5, mask_type=kind).mask
            row = [*before, centre, 0.0, 0.0]
            expected = torch.tensor([above, above, row, [0.0] * 5, [0.0] * 5])
            assert torch.equal(mask, expected.expand(3, 2, 5, 5))

    def test_channels_of_the_current_pixel(self):
        for kind, diagonal in (("A", -1), ("B", 0)):
            mask = ar.MaskedConv2d(6, 9, 3, mask_type=kind, data_channels=3).mask
            assert torch.equal(mask[:, :, 1, 1], torch.ones(3, 3).tril(diagonal).repeat(3, 2))
            assert torch.equal(mask[:, :, 1, 0], torch.ones(9, 6))

    def test_masked_weights_are_never_read(self):
        conv = ar.MaskedConv2d(2, 3, (1, 3), mask_type="A", dilation=2)
        x = torch.randn(1, 2, 4, 7)
        before = conv(x)
        before.sum().backward()
        assert not conv.weight.grad[conv.mask == 0].any()
        with torch.no_grad():
            conv.weight[conv.mask == 0] = 9.0
        assert torch.equal(conv(x), before)


LAYERS = [
    (nn.Conv2d, WeightNormConv2d, (3, 4, (2, 3), 2)),
    (nn.ConvTranspose2d, WeightNormConvTranspose2d, (3, 4, (2, 3), 2)),
    (nn.Linear, WeightNormLinear, (5, 4)),
]


class TestLoad:
    @pytest.mark.filterwarnings("ignore::FutureWarning")
    @pytest.mark.parametrize(("public", "own", "args"), LAYERS)
    @pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
    def test_both_weight_norms_of_torch(self, public, own, args, norm):
        source = norm(public(*args))
        randomise(source, 3)
        model = ar.load_checkpoint(nn.ModuleList([own(*args)]), nn.ModuleList([source]).state_dict())
        x = torch.randn(2, 3, 4, 5)
        torch.testing.assert_close(model[0](x), source(x), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
    @pytest.mark.parametrize("under", [None, "model", "model_state_dict", "state_dict"])
    def test_prefixes_and_wrappers(self, prefix, under):
        source = randomise(ar.PixelCNN(4, 3, 2, 3))
        state = {prefix + key: value for key, value in source.state_dict().items()}
        model = ar.load_checkpoint(ar.PixelCNN(4, 3, 2, 3), {under: state, "args": None} if under else state)
        assert torch.equal(model.eval()(torch.ones(1, 1, 4, 4)), source(torch.ones(1, 1, 4, 4)))

    def test_what_holds_no_weights(self):
        for checkpoint in ({"epoch": 3}, {}, {"model": nn.Linear(1, 1)}, None):
            with pytest.raises(TypeError, match=r"checkpoint: .* expected a state_dict"):
                ar.load_checkpoint(nn.Linear(1, 1), checkpoint)

    def test_other_sizes(self):
        with pytest.raises(RuntimeError, match="size mismatch"):
            ar.load_checkpoint(ar.WaveNet(5, 2, 2, 4, 4, 5), ar.WaveNet(5, 2, 2, 6, 4, 5).state_dict())
        with pytest.raises(RuntimeError, match="Missing key"):
            ar.load_checkpoint(ar.WaveNet(5, 3, 2, 4, 4, 5), ar.WaveNet(5, 2, 2, 4, 4, 5).state_dict())


def long(*shape):
    return torch.zeros(shape, dtype=torch.int64)


class TestErrors:
    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: ar.MaskedConv2d(1, 1, 3, mask_type="C"), "mask_type: 'C'"),
            (lambda: ar.MaskedConv2d(1, 1, 4, mask_type="A"), "kernel_size rows: 4; expected an odd"),
            (lambda: ar.PixelCNN(layers=0), "layers: 0; expected a positive"),
            (lambda: ar.PixelCNN(in_channels=3), "channels: 64; expected a multiple of in_channels"),
            (lambda: ar.PixelCNN(embedding=-1), "embedding: -1"),
            (lambda: ar.GatedPixelCNN(n_classes=-1), "n_classes: -1"),
            (lambda: ar.GatedPixelCNNRGB(hidden_fmaps=32), "hidden_fmaps: 32; expected a multiple"),
            (lambda: ar.PixelCNNPP(input_channels=2), "input_channels: 2; expected 1 or 3"),
            (lambda: ar.PixelCNNPP(dropout=1.0), "dropout: 1.0"),
            (lambda: ar.PixelSNAIL(channel=24), "channel: 24; expected a multiple of 16"),
            (lambda: ar.PixelSNAIL(n_cond_res_block=3), "n_cond_res_block: 3, cond_res_channel: 0"),
            (lambda: ar.PixelSNAIL((32,)), "shape: .* expected"),
            (lambda: ar.WaveNet(n_cond_channels=-2), "n_cond_channels: -2"),
        ],
    )
    def test_arguments(self, build, message):
        with pytest.raises(ValueError, match=message):
            build()

    @pytest.mark.parametrize(
        ("model", "args", "error", "message"),
        [
            (lambda: ar.PixelCNN(4, 2, 1), [long(1, 1, 4, 4)], TypeError, "x: torch.int64; expected a float"),
            (
                lambda: ar.PixelCNN(4, 2, 1),
                [torch.zeros(1, 2, 4, 4)],
                ValueError,
                r"x: shape .*\[B, 1, H, W\]",
            ),
            (lambda: ar.GatedPixelCNN(4, 2, 1), [torch.zeros(1, 4, 4)], TypeError, "x: torch.float32"),
            (
                lambda: ar.GatedPixelCNN(4, 2, 1),
                [long(1, 4, 4)],
                ValueError,
                "label: None; expected one of 10",
            ),
            (
                lambda: ar.GatedPixelCNN(4, 2, 1),
                [long(2, 4, 4), long(1)],
                ValueError,
                r"label: .*expected \[2\]",
            ),
            (lambda: ar.GatedPixelCNN(4, 2, 1, 0), [long(1, 4, 4), long(1)], ValueError, "label: given"),
            (lambda: ar.PixelCNNPP(1, 2, 1), [torch.zeros(1, 3, 6, 8)], ValueError, "multiples of 4"),
            (lambda: ar.PixelSNAIL((4, 4), 3, 16, 3, 1, 1, 4), [long(1, 4, 5)], ValueError, "at most 4, 4"),
            (
                lambda: ar.PixelSNAIL((4, 4), 3, 16, 3, 1, 1, 4, n_cond_res_block=1, cond_res_channel=4),
                [long(1, 4, 4), long(1, 4, 4)],
                ValueError,
                r"condition: shape \(1, 4, 4\); expected \(1, 2, 2\)",
            ),
            (lambda: ar.WaveNet(3, 1, 1, 2, 2, 3), [long(1, 4, 4)], ValueError, r"x: shape .*\[B, T\]"),
            (
                lambda: ar.WaveNet(3, 1, 1, 2, 2, 3, 2, 4, 2),
                [long(1, 9), torch.zeros(1, 2, 2)],
                ValueError,
                "features: 2 frames, 6 steps; expected at least 9",
            ),
        ],
    )
    def test_inputs(self, model, args, error, message):
        with pytest.raises(error, match=message):
            model()(*args)


def test_wavenet_conditioning_and_fewer_rows():
    wavenet = randomise(ar.WaveNet(5, 3, 2, 4, 4, 5, 2, 4, 2))
    x, features = torch.arange(8)[None] % 5, torch.randn(1, 2, 4)
    assert (wavenet(x, features) - wavenet(x, features + 1)).abs().amax(1)[0, 1:].min() > 1e-4
    snail = randomise(ar.PixelSNAIL((6, 4), 3, 16, 3, 1, 1, 4))
    x = torch.arange(24).view(1, 6, 4) % 3
    torch.testing.assert_close(snail(x[:, :4]), snail(x)[:, :, :4])
