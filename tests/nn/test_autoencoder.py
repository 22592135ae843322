import json

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from ldm.nn.autoencoder import AutoencoderKL, DiagonalGaussian
from nn.configs import SD15_VAE


def options(channels: list[int], **others) -> dict:
    types = {
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }
    return {"block_out_channels": channels, "norm_num_groups": 4, **types, **others}


VARIANTS = {
    "sd15": {**SD15_VAE, "block_out_channels": [8, 16, 16, 16], "norm_num_groups": 8},
    "one level": options([8]),
    "two levels": options([8, 12], layers_per_block=2, latent_channels=3),
    "three levels": options([8, 4, 12], latent_channels=8),
    "no attention": options([8, 8], mid_block_add_attention=False),
    "no quant convolutions": options([8, 8], use_quant_conv=False, use_post_quant_conv=False, latent_channels=16),
    "gelu, grey": options([8, 8], act_fn="gelu", in_channels=1, out_channels=1),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(2, 2), (2, 3)])
def test_parity_with_diffusers(scramble, variant, size):
    theirs = scramble(DiffusersAutoencoderKL.from_config(VARIANTS[variant]))
    ours = AutoencoderKL.from_config(VARIANTS[variant]).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    height, width = (n * ours.downscale_factor for n in size)
    image = torch.rand(2, ours.config["in_channels"], height, width) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(image).latent_dist
        moments = ours.encode(image)
        assert moments.shape == (2, 2 * ours.config["latent_channels"], *size)
        torch.testing.assert_close(moments, posterior.parameters, atol=1e-4, rtol=0)
        z = torch.randn_like(posterior.mean)
        decoded = ours.decode(z)
        assert decoded.shape == image.shape
        torch.testing.assert_close(decoded, theirs.decode(z).sample, atol=1e-4, rtol=0)


def test_published_model_has_its_names_shapes_norms_and_size(anatomy):
    with torch.device("meta"):
        ours, theirs = AutoencoderKL.from_config(SD15_VAE), DiffusersAutoencoderKL.from_config(SD15_VAE)
    assert anatomy(ours) == anatomy(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert sum(parameter.numel() for parameter in ours.parameters()) == 83_653_863
    assert ours.config["scaling_factor"] == 0.18215  # not in the file: the default of its time
    assert ours.downscale_factor == 8


def test_what_diffusers_saves_can_be_read_and_the_other_way_round(tmp_path):
    theirs = DiffusersAutoencoderKL.from_config(VARIANTS["three levels"])
    theirs.save_config(tmp_path)
    ours = AutoencoderKL.from_config(json.loads((tmp_path / "config.json").read_text()))
    assert ours.config == {name: theirs.config[name] for name in ours.config}
    config = json.loads(json.dumps(ours.config))
    assert AutoencoderKL(**config).config == config
    assert DiffusersAutoencoderKL.from_config(config).state_dict().keys() == ours.state_dict().keys()


def test_block_types_may_be_left_out():
    vae = AutoencoderKL(block_out_channels=[8, 8, 8], norm_num_groups=4)
    assert vae.config["down_block_types"] == ["DownEncoderBlock2D"] * 3
    assert vae.downscale_factor == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents_mean": [0.0] * 4}, "AutoencoderKL: option latents_mean=.* is not supported"),
        ({"layer_per_block": 2}, "layer_per_block=2 in config.json is not known"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types='AttnDownEncoderBlock2D'"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types=.* has 1 entries, but block_out_channels has 2"),
        ({"act_fn": "tanh"}, "act_fn='tanh' is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKL.from_config({**VARIANTS["two levels"], **changes})


def test_a_size_that_cannot_be_halved_is_refused():
    vae = AutoencoderKL(**options([8, 8, 8]))
    with pytest.raises(ValueError, match=r"size 8x10 .* divisible by 4"):
        vae.encode(torch.zeros(1, 3, 8, 10))


def test_kl_agrees_with_torch_distributions():
    moments = torch.randn(3, 8, 2, 5, dtype=torch.float64) * 3
    posterior = DiagonalGaussian(moments)
    expected = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).sum((1, 2, 3))
    assert posterior.kl().shape == (3,)
    torch.testing.assert_close(posterior.kl(), expected)


def test_posterior_samples_have_its_mean_and_std():
    posterior = DiagonalGaussian(torch.randn(1, 4, 3, 3))
    samples = posterior.sample(torch.randn(20_000, 2, 3, 3))
    torch.testing.assert_close(samples.mean(0, keepdim=True), posterior.mode(), atol=0.15, rtol=0)
    torch.testing.assert_close(samples.std(0, keepdim=True) / posterior.std, torch.ones(1, 2, 3, 3), atol=0.05, rtol=0)


def test_log_variance_is_clamped():
    posterior = DiagonalGaussian(torch.tensor([0.0, 0.0, -100.0, 100.0]).view(1, 4, 1, 1))
    assert posterior.logvar.flatten().tolist() == [-30, 20]


def test_latents_are_shifted_and_scaled_and_image_undoes_it():
    vae = AutoencoderKL(**options([8, 8]), scaling_factor=0.5, shift_factor=0.3).eval()
    moments, noise = torch.randn(2, 8, 3, 3), torch.randn(2, 4, 3, 3)
    posterior = DiagonalGaussian(moments)
    torch.testing.assert_close(vae.latents(moments), (posterior.mode() - 0.3) * 0.5)
    torch.testing.assert_close(vae.latents(moments, noise), (posterior.sample(noise) - 0.3) * 0.5)
    with torch.no_grad():
        torch.testing.assert_close(vae.image(vae.latents(moments)), vae.decode(posterior.mode()), atol=1e-4, rtol=1e-4)


def statistics(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-channel mean and standard deviation."""
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3), correction=0)


def test_folding_statistics_standardises_latents_and_leaves_decoding_unchanged(scramble):
    vae = scramble(AutoencoderKL(**options([8, 8]), scaling_factor=0.3, shift_factor=-0.7))
    image, noise = torch.rand(8, 3, 8, 8) * 2 - 1, torch.randn(8, 4, 4, 4)
    with torch.no_grad():
        latents = vae.latents(vae.encode(image), noise)
        decoded, kept = vae.image(latents), {k: v.clone() for k, v in vae.state_dict().items() if "quant" not in k}
        vae.fold_latent_statistics(*statistics(latents))
        standardised = vae.latents(vae.encode(image), noise)
        mean, std = statistics(standardised)
        torch.testing.assert_close(mean, torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(std, torch.ones(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(vae.image(standardised), decoded, atol=1e-4, rtol=0)
        assert vae.config["scaling_factor"] == 1 and vae.config["shift_factor"] is None
        assert all(torch.equal(vae.state_dict()[name], value) for name, value in kept.items())

        theirs = DiffusersAutoencoderKL.from_config(vae.config).eval()
        theirs.load_state_dict(vae.state_dict(), strict=True)
        z = theirs.encode(image).latent_dist
        torch.testing.assert_close(z.mean + z.std * noise, standardised, atol=1e-4, rtol=0)
        torch.testing.assert_close(theirs.decode(standardised).sample, decoded, atol=1e-4, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    scaling_factor=st.floats(0.05, 5),
    shift_factor=st.none() | st.floats(-2, 2),
    mean=st.lists(st.floats(-5, 5), min_size=3, max_size=3),
    std=st.lists(st.floats(0.05, 20), min_size=3, max_size=3),
)
def test_folding_is_the_affine_map_it_says(scaling_factor, shift_factor, mean, std):
    mean, std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    vae = AutoencoderKL(
        block_out_channels=[4],
        norm_num_groups=2,
        latent_channels=3,
        mid_block_add_attention=False,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    ).double()
    image, noise = torch.rand(1, 3, 2, 2, dtype=torch.float64), torch.randn(1, 3, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        old = vae.latents(vae.encode(image), noise)
        decoded = vae.image(old)
        vae.fold_latent_statistics(mean, std)
        new = vae.latents(vae.encode(image), noise)
        torch.testing.assert_close(new, (old - mean[:, None, None]) / std[:, None, None])
        torch.testing.assert_close(vae.image(new), decoded)


@pytest.mark.parametrize("missing", ["use_quant_conv", "use_post_quant_conv"])
def test_without_the_convolutions_a_scalar_is_kept(scramble, missing):
    vae = scramble(AutoencoderKL(**options([8, 8]), **{missing: False}, scaling_factor=0.3))
    image = torch.rand(8, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        latents = vae.latents(vae.encode(image))
        decoded = vae.image(latents)
        vae.fold_latent_statistics(*statistics(latents))
        rescaled = vae.latents(vae.encode(image))
        assert rescaled.std(correction=0).item() == pytest.approx(1, abs=1e-4)
        assert vae.config["scaling_factor"] == pytest.approx(0.3 / latents.std(correction=0).item(), rel=1e-4)
        torch.testing.assert_close(vae.image(rescaled), decoded, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.zeros(3), torch.ones(3), r"must be \(4,\)"),
        (torch.zeros(4), torch.tensor([1.0, 1.0, 0.0, 1.0]), "std positive"),
        (torch.tensor([0.0, 0.0, torch.nan, 0.0]), torch.ones(4), "must be finite"),
    ],
)
def test_statistics_that_make_no_sense_are_refused(mean, std, message):
    vae = AutoencoderKL(**options([8]))
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        vae.fold_latent_statistics(mean, std)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
