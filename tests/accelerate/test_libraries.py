"""accelerate on models of public libraries, as installed."""

import copy
import pickle
import warnings

import pytest
import torch

import genperf
from genperf.nn import DiagonalGaussian

pytestmark = pytest.mark.filterwarnings("ignore")


def two_blocks(**more):
    return {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "sample_size": 16,
        **more,
    }


ASYMMETRIC = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "down_block_out_channels": (8, 16),
    "layers_per_down_block": 1,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "up_block_out_channels": (8, 16),
    "layers_per_up_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 16,
}
LTX_VIDEO = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 5,
    "spatio_temporal_scaling": (True, True, False, False),
    "decoder_spatio_temporal_scaling": (True, True, False, False),
    "decoder_inject_noise": (False,) * 5,
    "upsample_residual": (False,) * 4,
    "upsample_factor": (1,) * 4,
    "timestep_conditioning": False,
    "patch_size": 1,
    "patch_size_t": 1,
}
COGVIDEO = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "block_out_channels": (8, 8, 8, 8),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
QWEN_IMAGE = {
    "base_dim": 12,
    "z_dim": 4,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
WAN = {
    "base_dim": 3,
    "z_dim": 16,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
MOCHI = {
    "in_channels": 15,
    "out_channels": 3,
    "latent_channels": 4,
    "encoder_block_out_channels": (32,) * 4,
    "decoder_block_out_channels": (32,) * 4,
    "layers_per_block": (1,) * 5,
}
TEMPORAL = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "latent_channels": 4,
    "layers_per_block": 1,
    "sample_size": 16,
}
HUNYUAN = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
IMAGE, CLIP = (2, 3, 16, 16), (1, 3, 9, 16, 16)
DIFFUSERS = [
    ("AutoencoderKL", two_blocks(), IMAGE),
    ("AutoencoderKLFlux2", two_blocks(), IMAGE),
    ("AsymmetricAutoencoderKL", ASYMMETRIC, IMAGE),
    ("AutoencoderKLQwenImage", QWEN_IMAGE, (1, 3, 1, 16, 16)),
    ("AutoencoderKLHunyuanVideo", HUNYUAN, CLIP),
    ("AutoencoderKLLTXVideo", LTX_VIDEO, (2, 3, 9, 16, 16)),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            ("AutoencoderKLTemporalDecoder", TEMPORAL, IMAGE),
            ("AutoencoderKLCogVideoX", COGVIDEO, (1, 3, 8, 16, 16)),
            ("AutoencoderKLWan", WAN, CLIP),
            ("AutoencoderKLMochi", MOCHI, (1, 3, 7, 16, 16)),
        ]
    ),
]


def build_diffusers(name, config):
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    torch.manual_seed(0)
    return getattr(diffusers, name)(**config).eval()


def sampled(model, x):
    torch.manual_seed(1)
    with torch.no_grad():
        return model(x, sample_posterior=True).sample


@pytest.mark.parametrize(("name", "config", "shape"), DIFFUSERS)
def test_diffusers(name, config, shape):
    model = build_diffusers(name, config)
    x = torch.randn(shape)
    before, keys, cls = sampled(model, x), list(model.state_dict()), type(model)
    report = genperf.accelerate(model, mode="training", strict=True)
    assert [entry.name for entry in report.accelerated] == [""]
    assert torch.equal(sampled(model, x), before)
    posterior = model.encode(x).latent_dist
    assert isinstance(posterior, DiagonalGaussian)
    assert type(posterior).__name__ == "DiagonalGaussianDistribution"
    assert list(model.state_dict()) == keys
    assert torch.equal(sampled(copy.deepcopy(model), x), before)
    assert report.verify(x, sample_posterior=True, seconds=0)
    report.restore()
    assert type(model) is cls
    assert torch.equal(sampled(model, x), before)


@pytest.mark.parametrize("rng", ["torch", "philox"])
def test_autoencoder_kl_in_training(rng):
    model = build_diffusers("AutoencoderKL", two_blocks())
    report = genperf.accelerate(model, mode="training", rng=rng)

    def loss(model, x):
        posterior = model.encode(x).latent_dist
        recon = model.decode(posterior.sample()).sample
        return torch.nn.functional.mse_loss(recon, x) + 1e-2 * posterior.kl().mean()

    assert report.verify(torch.randn(2, 3, 32, 32), call=loss, seconds=0)


def test_autoencoder_kl_survives_what_users_do(tmp_path):
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    model = build_diffusers("AutoencoderKL", two_blocks())
    x = torch.randn(IMAGE)
    before = sampled(model, x)
    genperf.accelerate(model)
    posterior = model.encode(x).latent_dist
    assert isinstance(posterior, DiagonalGaussianDistribution)
    assert isinstance(model.encode(x, return_dict=False)[0], DiagonalGaussian)
    model.enable_slicing()
    torch.testing.assert_close(sampled(model, x), before, rtol=1e-4, atol=1e-5)
    model.disable_slicing()
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded) is type(model).__mro__[1]
    assert torch.equal(sampled(loaded, x), before)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(sampled(again.eval(), x), before)
    generators = [torch.Generator().manual_seed(i) for i in (0, 1)]
    first = model.encode(x).latent_dist.sample(generators)
    generators = [torch.Generator().manual_seed(i) for i in (0, 1)]
    assert torch.equal(loaded.encode(x).latent_dist.sample(generators), first)


def test_autoencoder_kl_compiles_without_a_graph_break():
    model = build_diffusers("AutoencoderKL", two_blocks())
    x = torch.randn(IMAGE)
    genperf.accelerate(model)

    def encode(x):
        posterior = model.encode(x).latent_dist
        return posterior.sample(), posterior.kl()

    with torch.no_grad():
        torch.manual_seed(2)
        expected = encode(x)
        torch.manual_seed(2)
        actual = torch.compile(encode, fullgraph=True, backend="aot_eager")(x)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config", "recognised"),
    [
        (
            "AutoencoderTiny",
            {
                "encoder_block_out_channels": (8, 8),
                "decoder_block_out_channels": (8, 8),
                "num_encoder_blocks": (1, 1),
                "num_decoder_blocks": (1, 1),
            },
            False,
        ),
        (
            "AutoencoderOobleck",
            {
                "encoder_hidden_size": 12,
                "decoder_channels": 12,
                "decoder_input_channels": 6,
                "downsampling_ratios": [2, 4],
                "channel_multiples": [1, 2],
            },
            True,
        ),
    ],
)
def test_diffusers_models_with_another_latent_are_left_alone(name, config, recognised):
    model = build_diffusers(name, config)
    cls = type(model)
    report = genperf.accelerate(model)
    assert type(model) is cls
    assert not report.accelerated
    assert bool(report.left_alone) is recognised


#: name, whether the loss holds the divergence, arguments of forward
PYTHAE = [
    ("VAE", True, {}),
    ("BetaVAE", True, {}),
    ("DisentangledBetaVAE", True, {"epoch": 1}),
    ("FactorVAE", True, {}),
    ("VAEGAN", True, {}),
    ("IWAE", False, {}),
    ("CIWAE", False, {}),
    ("MIWAE", False, {}),
    ("PIWAE", False, {}),
    ("BetaTCVAE", False, {"dataset_size": 6}),
    ("VAMP", False, {"epoch": 1}),
    ("HVAE", False, {}),
    ("RHVAE", False, {}),
]


def build_pythae(name):
    pythae = pytest.importorskip("pythae.models")
    torch.manual_seed(0)
    config = getattr(pythae, f"{name}Config")(input_dim=(1, 12, 12), latent_dim=4)
    return getattr(pythae, name)(config)


@pytest.mark.parametrize("rng", ["torch", "philox"])
@pytest.mark.parametrize(("name", "has_divergence", "kwargs"), PYTHAE)
def test_pythae(name, has_divergence, kwargs, rng):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_pythae(name)
        x = {"data": torch.rand(6, 1, 12, 12)}
        torch.manual_seed(1)
        before = model(x, **kwargs)
        keys, cls = list(model.state_dict()), type(model)
        report = genperf.accelerate(model, mode="training", strict=True, rng=rng)
        expected = {f"{name}._sample_gauss(mean, std) -> (z, noise)"}
        if has_divergence:
            expected.add(f"{name}.loss_function: KL to N(0, 1)")
        assert {entry.was for entry in report.accelerated} == expected
        if rng == "torch":
            torch.manual_seed(1)
            after = model(x, **kwargs)
            assert torch.equal(after.z, before.z)
        assert list(model.state_dict()) == keys
        assert report.verify(x, seconds=0, **kwargs)
        report.restore()
        assert type(model) is cls
        torch.manual_seed(1)
        assert torch.equal(model(x, **kwargs).loss, before.loss)


def test_pythae_saves_and_loads(tmp_path):
    model = build_pythae("VAE")
    genperf.accelerate(model)
    model.save(str(tmp_path))
    loaded = type(model).load_from_folder(str(tmp_path))
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)


def build_pythae_sampler():
    samplers = pytest.importorskip("pythae.samplers")
    models = pytest.importorskip("pythae.models")
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 4, 3, 2, 1)

        def forward(self, x):
            return ModelOutput(embedding=self.conv(x))

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.ConvTranspose2d(4, 1, 4, 2, 1)

        def forward(self, z):
            return ModelOutput(reconstruction=self.conv(z))

    torch.manual_seed(0)
    config = models.VQVAEConfig(input_dim=(1, 10, 12), latent_dim=4, num_embeddings=11)
    vqvae = models.VQVAE(config, encoder=Encoder(), decoder=Decoder())
    sampler = samplers.PixelCNNSampler(vqvae, samplers.PixelCNNSamplerConfig(n_layers=3, kernel_size=5))
    with torch.no_grad():
        for p in sampler.pixelcnn_model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.5))
    return sampler


def test_pythae_pixelcnn_sampler(tmp_path):
    sampler = build_pythae_sampler()
    cls = type(sampler)

    def draw(*args, **kwargs):
        torch.manual_seed(5)
        return sampler.sample(*args, **kwargs), torch.get_rng_state()

    entry = genperf.accelerate(sampler).entries[0]
    assert "The sampler needs to be fitted" in entry.reason
    assert type(sampler) is cls
    sampler.is_fitted = True
    sampler.pixelcnn_model.eval()  # which fit() does not do
    expected = draw(5, 2)
    report = genperf.accelerate(sampler)
    assert report.entries[0].was == "PixelCNNSampler.sample: self.pixelcnn_model for each pixel"
    assert report.entries[0].kernel == "pixel_sampler"
    assert {e.kernel for e in report.accelerated} == {
        "pixel_sampler",
        "gaussian_sample",
        "masked_conv2d",
        "vector_quantize",
    }
    assert isinstance(sampler, cls)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            found = draw(5, 2)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
    assert draw(3, 2, output_dir=str(tmp_path / "images"), return_gen=False)[0] is None
    assert len(list((tmp_path / "images").iterdir())) == 3
    twin = copy.deepcopy(sampler)
    assert type(twin) is type(sampler)
    sampler.pixelcnn_model.train()
    with pytest.warns(RuntimeWarning, match=r"runs as it was: net\.0\.1: BatchNorm2d in training mode"):
        draw(1)
    with pytest.raises(TypeError, match="verify: model is PixelCNNSampler, expected"):
        report.verify()
    report.restore()
    assert type(sampler) is cls
    assert all(type(m).__module__ != "genperf" for m in sampler.pixelcnn_model.modules())
    torch.manual_seed(5)
    assert torch.equal(twin.sample(5, 2), expected[0])
