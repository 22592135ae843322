"""B batch, C latent channels, h w latents, H W pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import tiny
from ldm.data.pictures import Pictures
from ldm.data.shapes import Shapes
from ldm.data.sources import open_sources
from ldm.errors import UserError
from ldm.evaluation.evaluate import evaluate
from ldm.nn.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm.training import fit, stages
from ldm.training.autoencoder import AutoencoderModule, latent_statistics
from ldm.training.module import step_generator
from ldm.weights.folder import load_network
from runs import compose_values, tiny_config


@pytest.fixture
def module() -> AutoencoderModule:
    return AutoencoderModule(tiny.vae(), tiny_config("unused", "autoencoder.kl_weight=0.1").autoencoder, seed=0)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


# ------------------------------------------------------------------------------------------------------- the losses


def test_the_loss_is_the_sum_that_is_written_down(module, image):
    losses, _ = module.losses(module.network, image, step_generator(0, 0))
    noise = torch.randn(3, 4, 8, 8, generator=step_generator(0, 0))
    moments = module.network.encode(image)
    mean, logvar = moments.chunk(2, dim=1)
    reconstruction = module.network.decode(mean + (0.5 * logvar).exp() * noise)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    torch.testing.assert_close(losses["l1"], (reconstruction - image).abs().mean())
    torch.testing.assert_close(losses["kl"], kl)
    torch.testing.assert_close(losses["l2"], (reconstruction - image).square().mean())
    assert losses.keys() == {"loss", "l1", "l2", "kl"}
    assert losses["loss"] == losses["l1"] + losses["l2"] + 0.1 * losses["kl"]


def test_every_term_has_a_gradient_into_what_it_is_meant_for(module, image):
    network = module.network
    for term, value in module.losses(network, image, step_generator(0, 0))[0].items():
        network.zero_grad()
        value.backward(retain_graph=True)
        gradients = {name: p.grad for name, p in network.named_parameters()}
        reached = {name for name, grad in gradients.items() if grad is not None and grad.abs().sum() > 0}
        encoder = {name for name in gradients if name.startswith(("encoder", "quant_conv"))}
        assert reached >= encoder, f"{term}: {encoder - reached}"
        assert reached == (encoder if term == "kl" else set(gradients)), f"{term}: {set(gradients) - reached}"
        assert all(grad is None or grad.isfinite().all() for grad in gradients.values())


def test_the_loss_does_not_depend_on_resolution(module):
    """Means over pixels and latents: a picture tiled to twice the size costs about the same, up to its borders."""
    picture = F.interpolate(torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1)), size=64) * 2 - 1
    small, _ = module.losses(module.network, picture, step_generator(0, 0))
    large, _ = module.losses(module.network, picture.repeat(1, 1, 2, 2), step_generator(0, 0))
    for name in small:
        assert large[name].item() == pytest.approx(small[name].item(), rel=0.1)


def test_the_divergence_is_not_rounded_by_mixed_precision(module, image):
    exact = module.losses(module.network, image, step_generator(0, 0))[0]["kl"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = module.losses(module.network, image, step_generator(0, 0))
    assert mixed["kl"].dtype == torch.float32 and mixed["loss"].dtype == torch.float32
    assert mixed["kl"].item() == pytest.approx(exact.item(), rel=0.02)
    # bf16 has 8 bits: a sum over all latents would be a multiple of a large number
    per_sample = mixed["kl"].item() * 4 * 8 * 8
    assert abs(per_sample - round(per_sample)) > 1e-4


def test_training_lowers_the_loss(tmp_path):
    config = tiny_config(tmp_path, "stages=[autoencoder]", "autoencoder.max_steps=60", "trainer.val_every=20",
                         "autoencoder.optim.lr=1e-2")  # fmt: skip
    stages.run(config)
    lines = (tmp_path / "shapes" / "metrics.csv").read_text().splitlines()
    psnr = [float(line.split(",")[2]) for line in lines if line.startswith("autoencoder/val_psnr")]
    assert len(psnr) == 3 and psnr[0] < psnr[-1] - 1


def test_psnr_is_that_of_the_averaged_weights(tmp_path):
    """Validation looks at the average: the figure in metrics.csv is the exported network's own."""
    config = tiny_config(
        tmp_path, "stages=[autoencoder]", "autoencoder.ema_decay=0.9", "autoencoder.max_steps=4", "trainer.val_every=4",
        "autoencoder.optim.lr=1e-2", "autoencoder.optim.schedule=constant",
    )  # fmt: skip
    stages.run(config)
    lines = (tmp_path / "shapes" / "metrics.csv").read_text().splitlines()
    [psnr] = [float(line.split(",")[2]) for line in lines if line.startswith("autoencoder/val_psnr")]
    vae = load_network(AutoencoderKL, Path(config.run_dir) / "model" / "vae")
    val = Pictures(open_sources(config.data)[1], 16)
    image = val.images(range(8))
    with torch.inference_mode():
        error = F.mse_loss(vae.decode(DiagonalGaussian(vae.encode(image)).mode()), image)
    raw = AutoencoderKL(**vae.config)
    assert psnr == pytest.approx(float(10 * torch.log10(4 / error)), abs=0.01)
    state = torch.load(fit.checkpoint_path(config, "autoencoder"), weights_only=True)["state_dict"]
    raw.load_state_dict({k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")})
    with torch.inference_mode():
        error = F.mse_loss(raw.eval().decode(DiagonalGaussian(raw.encode(image)).mode()), image)
    assert abs(psnr - float(10 * torch.log10(4 / error))) > 0.01


# --------------------------------------------------------------------------------------------------------------- rFID


class SmallEye:
    """In Inception's place: 12 features, and what it was made with."""

    num_features = 12

    def __init__(self, weights, device, option="inception", instead=""):
        SmallEye.made = (weights, option)

    def to(self, device):
        return self

    def images(self, pictures):
        assert pictures.dtype == np.uint8 and pictures.shape[-1] == 3
        return torch.from_numpy(pictures[:, ::8, ::8].reshape(len(pictures), -1)).float() / 255


def test_rfid_is_over_all_of_validation_and_that_of_evaluation(tmp_path, monkeypatch, capsys):
    """Two batches of 5 and 3, and two validations, of which the second begins anew."""
    monkeypatch.setattr("ldm.training.autoencoder.InceptionFeatures", SmallEye)
    monkeypatch.setattr("ldm.evaluation.subject.InceptionFeatures", SmallEye)
    config = tiny_config(
        tmp_path, "autoencoder.rfid=some.pth", "autoencoder.batch_size=5", "autoencoder.max_steps=4",
        "trainer.val_every=2", "trainer.val_batches=5", "autoencoder.optim.lr=1e-2",
    )  # fmt: skip
    stages.run(config)
    assert SmallEye.made == ("some.pth", "autoencoder.rfid")
    assert "rFID over 8 held-out pictures is far too large" in capsys.readouterr().out
    lines = (Path(config.run_dir) / "metrics.csv").read_text().splitlines()
    found = [float(line.split(",")[2]) for line in lines if line.startswith("autoencoder/val_rfid")]
    asked = [f"ckpt={config.run_dir}", "metrics=[reconstruction]", "num_prompts=8", "inception=some.pth"]
    theirs = evaluate(compose_values("evaluate", asked))["reconstruction"]
    assert len(found) == 2 and found[0] != found[1]
    assert found[-1] == pytest.approx(theirs["rfid"], rel=1e-3) and found[-1] > 0.01


def test_rfid_decides_nothing_and_leaves_nothing_in_the_checkpoint(monkeypatch):
    monkeypatch.setattr("ldm.training.autoencoder.InceptionFeatures", SmallEye)
    plain, looking = (tiny_config("unused", *options) for options in ([], ["autoencoder.rfid=true"]))
    assert stages.stage_key(plain, "autoencoder") == stages.stage_key(looking, "autoencoder")
    with_it, without = (AutoencoderModule(tiny.vae(), each.autoencoder, seed=0) for each in (looking, plain))
    assert SmallEye.made[0] is None
    assert with_it.state_dict().keys() == without.state_dict().keys()
    assert len(list(with_it.parameters())) == len(list(without.parameters()))


def test_rfid_without_weights_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    def download(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    told = r"no route to host\): download https://\S+ to \S+hub\S+, or name the file with autoencoder\.rfid=…; .*=false"
    for value, message in (("true", told), ("nowhere.pth", r"autoencoder\.rfid=nowhere\.pth: there is no such file")):
        with pytest.raises(UserError, match=message):
            stages.run(tiny_config(tmp_path / "out", f"autoencoder.rfid={value}"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"set autoencoder\.rfid=false"):
        AutoencoderModule(
            tiny.vae(in_channels=4, out_channels=4), tiny_config("x", "autoencoder.rfid=true").autoencoder, seed=0
        )
    for overrides, message in (
        (["+vae.in_channels=4"], "has alpha: set autoencoder.rfid=false"),
        (["trainer.val_batches=1", "autoencoder.batch_size=1"], "validation sees 1: raise data.num_val"),
    ):
        with pytest.raises(UserError, match=message):
            tiny_config("unused", "autoencoder.rfid=true", *overrides)


@pytest.mark.parametrize("precision", ["bf16-mixed", "auto"])
def test_the_vae_may_have_a_precision_of_its_own(precision, tmp_path):
    config = tiny_config(tmp_path, "stages=[autoencoder]", f"autoencoder.precision={precision}")
    stages.run(config)
    vae = load_network(AutoencoderKL, Path(config.run_dir) / "model" / "vae")
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in vae.parameters())


def test_a_vae_that_diverged_is_told_and_not_exported(tmp_path):
    overrides = ["stages=[autoencoder]", "autoencoder.optim.lr=1e30", "autoencoder.max_steps=4"]
    with pytest.raises(UserError, match=r"autoencoder\.optim\.lr"):
        stages.run(tiny_config(tmp_path, *overrides))
    assert not (tmp_path / "stages").exists() or not list((tmp_path / "stages").iterdir())


# ---------------------------------------------------------------------------------------------- latent statistics


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[AutoencoderKL, Pictures, Pictures, AutoencoderKL]:
    """A VAE after some steps as it was trained, the training and the held-out pictures, and the VAE as exported."""
    config = tiny_config(
        tmp_path_factory.mktemp("trained"), "stages=[autoencoder]", "autoencoder.max_steps=60", "data.num_train=2000",
        "data.num_val=1000", "autoencoder.optim.lr=1e-2", "trainer.val_every=60",
    )  # fmt: skip
    stages.run(config)
    exported = load_network(AutoencoderKL, Path(config.run_dir) / "model" / "vae")
    raw = AutoencoderKL(**exported.config).eval()
    state = torch.load(fit.checkpoint_path(config, "autoencoder"), weights_only=True)["state_dict"]
    prefix = "ema.average."
    raw.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    train, val = (Pictures(source, 16) for source in open_sources(config.data))
    return raw, train, val, exported


def sampled_latents(vae: AutoencoderKL, pictures: Pictures) -> torch.Tensor:
    image = pictures.images(range(len(pictures)))
    with torch.inference_mode():
        moments = vae.encode(image)
        noise = torch.randn(len(image), 4, 8, 8, generator=torch.Generator().manual_seed(0))
        return vae.latents(moments, noise)


class Later:
    """The pictures of a source from an index on."""

    def __init__(self, source, start: int) -> None:
        self.source, self.start = source, start

    def __len__(self) -> int:
        return len(self.source) - self.start

    def __getitem__(self, index: int):
        return self.source[self.start + index]


@pytest.mark.parametrize(("split", "bound"), [("train", 0.1), ("val", 0.25)])
def test_latents_of_held_out_pictures_are_standard(trained, split, bound):
    """Of further pictures of the training scenes; and, less tightly, of the few scenes that were held out."""
    raw, train, val, exported = trained
    further = Shapes(split="train", num_images=3000, resolution=16, seed=train.source.seed)
    pictures = val if split == "val" else Pictures(Later(further, len(train)), 16)
    before, after = sampled_latents(raw, pictures), sampled_latents(exported, pictures)
    assert (before.mean((0, 2, 3)).abs() > 0.15).any() or ((before.std((0, 2, 3)) - 1).abs() > 0.15).any()
    assert after.mean((0, 2, 3)).abs().max() < bound
    assert (after.var((0, 2, 3)) - 1).abs().max() < bound + 0.05
    assert exported.config["scaling_factor"] == 1.0


def test_decoding_is_unchanged(trained):
    raw, _, val, exported = trained
    image = val.images(range(32))
    noise = torch.randn(32, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        pictures = [vae.image(vae.latents(vae.encode(image), noise)) for vae in (raw, exported)]
        means = [vae.decode(DiagonalGaussian(vae.encode(image)).mode()) for vae in (raw, exported)]
    torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-4)


def test_the_exported_vae_opens_in_diffusers_with_the_same_latents(trained, tmp_path):
    from diffusers import AutoencoderKL as Theirs

    from ldm.weights.folder import save_network

    *_, val, exported = trained
    save_network(exported, tmp_path / "vae")
    theirs = Theirs.from_pretrained(tmp_path / "vae").eval()
    image = val.images(range(4))
    with torch.inference_mode():
        latents = theirs.encode(image).latent_dist.mean * theirs.config.scaling_factor
        torch.testing.assert_close(latents, exported.latents(exported.encode(image)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_statistics_are_those_of_sampled_latents(trained, batch_size):
    raw, train, _, _ = trained
    subset = Pictures(train.source, 16)
    mean, std = latent_statistics(raw, subset, batch_size, most=100)
    image = subset.images(range(0, 2000, 20))
    with torch.inference_mode():
        moments = DiagonalGaussian(raw.encode(image).double())
    torch.testing.assert_close(mean.double(), moments.mean.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    exact = (moments.mean**2 + moments.std**2).mean((0, 2, 3)) - moments.mean.mean((0, 2, 3)) ** 2
    torch.testing.assert_close(std.double(), exact.sqrt(), rtol=1e-4, atol=1e-5)


def test_statistics_of_latents_count_the_scaling_that_is_there(trained):
    raw, train, _, _ = trained
    scaled = AutoencoderKL(**{**raw.config, "scaling_factor": 0.5}).eval()
    scaled.load_state_dict(raw.state_dict())
    plain, half = (latent_statistics(vae, train, 64, most=64) for vae in (raw, scaled))
    torch.testing.assert_close(half[0], plain[0] / 2)
    torch.testing.assert_close(half[1], plain[1] / 2)


def test_a_vae_without_quant_convolutions_gets_the_scalar(tmp_path):
    config = tiny_config(
        tmp_path, "stages=[autoencoder]", "+vae.use_quant_conv=false", "+vae.use_post_quant_conv=false",
        "autoencoder.max_steps=10", "data.num_val=64",
    )  # fmt: skip
    stages.run(config)
    vae = load_network(AutoencoderKL, Path(config.run_dir) / "model" / "vae")
    assert vae.config["scaling_factor"] != 1.0
    latents = sampled_latents(vae, Pictures(open_sources(config.data)[0], 16))
    deviations = latents - latents.mean((0, 2, 3), keepdim=True)
    assert float(deviations.std()) < 1.3 and 0.8 < float(latents.std()) < 1.2
