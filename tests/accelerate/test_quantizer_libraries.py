"""accelerate on the vector quantizers of installed libraries."""

import copy

import pytest
import torch

import genperf

pytestmark = pytest.mark.filterwarnings("ignore")


def randomised(model):
    """With random codebooks, where the library leaves zeros to be loaded."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        for name in ("embed", "embed_sum"):
            buffer = module._buffers.get(name)
            if buffer is not None:
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return model


def both(model):
    """The model, a copy of it that is accelerated, and the report; everything recognised is covered."""
    fast = copy.deepcopy(model)
    return model, fast, genperf.accelerate(fast, mode="training", strict=True)


def vq_model():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=32,
        norm_num_groups=4,
        layers_per_block=1,
    )


def test_diffusers_vq_model():
    original, fast, report = both(vq_model())
    assert [(e.name, e.was) for e in report.accelerated] == [("quantize", "VectorQuantizer.forward")]
    x = torch.randn(2, 3, 32, 32)
    h = original.encode(x).latents
    for found, expected in zip(fast.quantize(h)[:2], original.quantize(h)[:2], strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.equal(fast.quantize(h)[2][2], original.quantize(h)[2][2])
    found, expected = fast(x), original(x)
    torch.testing.assert_close(found.sample, expected.sample)
    torch.testing.assert_close(found.commit_loss, expected.commit_loss)
    assert list(fast.state_dict()) == list(original.state_dict())

    def loss(model, x):
        output = model(x)
        return (output.sample - x).square().mean() + output.commit_loss.mean()

    assert report.verify(x, call=loss, seconds=0)


def test_diffusers_vq_model_saves_and_loads(tmp_path):
    model = vq_model().eval()
    genperf.accelerate(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(again(x).sample, model(x).sample)


@pytest.mark.parametrize("ema", [False, True])
def test_pythae_vqvae(ema):
    models = pytest.importorskip("pythae.models")
    torch.manual_seed(0)
    config = models.VQVAEConfig(input_dim=(1, 12, 12), latent_dim=4, num_embeddings=16, use_ema=ema)
    original, fast, report = both(models.VQVAE(config))
    x = {"data": torch.rand(6, 1, 12, 12)}
    assert "quantizer" in {e.name for e in report.accelerated}
    for _ in range(3):
        found, expected = fast(x), original(x)
        for key in ("loss", "z", "recon_x"):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)
        assert torch.equal(found.quantized_indices, expected.quantized_indices)
    for key, value in original.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[key], value)


def test_transformers_encodec():
    transformers = pytest.importorskip("transformers")
    config = transformers.EncodecConfig(
        codebook_size=32, codebook_dim=16, hidden_size=16, num_filters=4, num_lstm_layers=1
    )
    original, fast, report = both(randomised(transformers.EncodecModel(config)).eval())
    assert {e.kernel for e in report.accelerated} == {"residual_vector_quantize", "vq_nearest"}
    x = torch.randn(2, 1, 4000)
    with torch.no_grad():
        for bandwidth in (1.5, 6.0):
            found = fast.encode(x, bandwidth=bandwidth)
            assert torch.equal(found.audio_codes, original.encode(x, bandwidth=bandwidth).audio_codes)


def test_transformers_mimi():
    modeling = pytest.importorskip("transformers.models.mimi.modeling_mimi")
    config = modeling.MimiConfig(
        codebook_size=32, codebook_dim=8, hidden_size=12, vector_quantization_hidden_dimension=8,
        num_quantizers=5, num_semantic_quantizers=2,
    )  # fmt: skip
    original, fast, _ = both(randomised(modeling.MimiSplitResidualVectorQuantizer(config)).eval())
    x = torch.randn(2, 12, 21)
    with torch.no_grad():
        for n in (None, 3):
            codes = original.encode(x, num_quantizers=n)
            assert torch.equal(fast.encode(x, num_quantizers=n), codes)
        torch.testing.assert_close(fast.decode(codes.transpose(0, 1)), original.decode(codes.transpose(0, 1)))


@pytest.mark.parametrize("training", [False, True])
def test_transformers_dac(training):
    modeling = pytest.importorskip("transformers.models.dac.modeling_dac")
    config = modeling.DacConfig(
        codebook_size=32, codebook_dim=4, hidden_size=12, n_codebooks=3, quantizer_dropout=0.5
    )
    original, fast, report = both(modeling.DacResidualVectorQuantizer(config).train(training))
    assert {e.was for e in report.accelerated} == {"DacVectorQuantize.decode_latents"}
    results = []
    for model in (original, fast):
        torch.manual_seed(4)
        x = torch.randn(4, 12, 21, requires_grad=True)
        outputs = model(x)
        sum(y.sum() for y in outputs if y.is_floating_point()).backward()
        gradients = [p.grad for p in model.parameters()]
        results.append([*outputs, x.grad, *gradients])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(fast(x)[1], original(x)[1]) or training


@pytest.mark.parametrize(
    ("path", "name", "shape"),
    [
        ("chameleon.modeling_chameleon", "ChameleonVQVAEVectorQuantizer", (2, 8, 5, 7)),
        ("janus.modeling_janus", "JanusVQVAEVectorQuantizer", (2, 8, 5, 7)),
        ("glm_image.modeling_glm_image", "GlmImageVQVAEVectorQuantizer", (2, 8, 5, 7)),
        ("emu3.modeling_emu3", "Emu3VQVAEVectorQuantizer", (2, 3, 8, 5, 7)),
        ("xcodec.modeling_xcodec", "XcodecResidualVectorQuantization", (2, 8, 21)),
        (
            "higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer",
            "HiggsAudioV2TokenizerVectorQuantization",
            (2, 12, 21),
        ),
    ],
)
def test_transformers_quantizers(path, name, shape):
    modeling = pytest.importorskip(f"transformers.models.{path}")

    class Config:
        num_embeddings = codebook_size = 32
        embed_dim = codebook_dim = 8
        hidden_size, num_patches, num_quantizers, frame_rate = 12, 4, 3, 50

    torch.manual_seed(0)
    original, fast, report = both(randomised(getattr(modeling, name)(Config())).eval())
    assert report.accelerated
    x = torch.randn(shape)
    call = "encode" if "Residual" in name or "Higgs" in name else "forward"
    found, expected = (getattr(model, call)(x) for model in (fast, original))
    torch.testing.assert_close(found, expected)
