"""B batch, C channels, H W pixels, h w latents."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from ldm.canvas import latent_mask
from ldm.config import TrainConfig, check
from ldm.data.images import to_tensor
from ldm.errors import UserError
from ldm.nn.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline
from ldm.training import networks, stages
from ldm.training.diffusion import DiffusionModule
from ldm.training.masks import ALL, NONE, latent_masks, random_masks, seeing
from ldm.training.module import step_generator
from runs import TINY, compose_values, run_script, tiny_config

INPAINTING = ("+unet.in_channels=9", "data.cache=false", "stages=[diffusion]")


def draw(batch: int = 2000, height: int = 24, width: int = 32, seed: int = 0) -> torch.Tensor:
    return random_masks(batch, height, width, torch.Generator().manual_seed(seed))


def test_masks_are_black_and_white_and_of_the_generator_alone():
    masks = draw()
    assert masks.shape == (2000, 1, 24, 32) and set(masks.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(draw(), masks) and not torch.equal(draw(seed=1), masks)


def test_some_masks_hide_all_some_nothing_and_most_a_part():
    hidden = draw().mean((1, 2, 3))
    assert (hidden == 1).float().mean() == pytest.approx(ALL, abs=0.03)
    assert (hidden == 0).float().mean() == pytest.approx(NONE, abs=0.02)
    part = hidden[(hidden > 0) & (hidden < 1)]
    assert 0.1 < part.mean() < 0.5 and part.std() > 0.08 and part.max() < 0.95
    assert (draw().mean(0) > 0.2).all() and (draw().mean(0) < 0.8).all()  # no place is always hidden, or always shown


def test_there_are_rectangles_and_strokes():
    masks = draw(400)[:, 0].bool()
    part = masks[(~masks.flatten(1).all(1)) & masks.flatten(1).any(1)]
    rows, columns = part.any(2), part.any(1)
    boxes = ((rows[:, :, None] & columns[:, None, :]) == part).all(2).all(1)
    assert 0.1 < boxes.float().mean() < 0.5  # one rectangle; the others are several, or strokes
    assert random_masks(50, 8, 8, torch.Generator().manual_seed(0)).mean() > 0.2  # as small as latents of thumbnails


def test_masks_of_latents_are_those_of_sampling():
    masks = draw(20)
    ours = latent_masks(masks, 8)
    theirs = torch.cat([latent_mask(mask[0].numpy(), 8) for mask in masks])
    assert torch.equal(ours, theirs)


# ------------------------------------------------------------------------------------------- what the network is shown


def build() -> DiffusionModule:
    config = check(TrainConfig, compose_values("train", [*TINY, "data.cache=false"]))
    vae, conditioner = tiny.vae().requires_grad_(False), tiny.conditioner().requires_grad_(False)
    return DiffusionModule(
        tiny.unet(in_channels=9), networks.build_schedule(config), config.diffusion, config.optim, 10, 0, vae,
        conditioner, config.sampling, list(tiny.CAPTIONS),
    )  # fmt: skip


@pytest.fixture
def batch() -> dict:
    image = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"image": image, "caption": [tiny.CAPTIONS[i % 3] for i in range(6)]}


def test_what_is_hidden_is_not_seen(batch, monkeypatch):
    module = build()
    masks = torch.zeros(6, 1, 16, 16)
    masks[:, :, :8] = 1
    monkeypatch.setattr("ldm.training.diffusion.random_masks", lambda *_: masks)
    seen = module.masked(batch, step_generator(0, 0))
    assert seen.shape == (6, 5, 8, 8) and torch.equal(seen[:, :1], latent_masks(masks, 2))
    other = {**batch, "image": torch.where(masks.bool(), torch.randn(6, 3, 16, 16), batch["image"])}
    assert torch.equal(module.masked(other, step_generator(0, 0)), seen)
    other = {**batch, "image": torch.where(masks.bool(), batch["image"], -batch["image"])}
    assert not torch.equal(module.masked(other, step_generator(0, 0)), seen)


def test_a_network_for_text_alone_sees_no_mask(batch):
    module = build()
    module.ema.average = tiny.unet()
    assert module.masked(batch, step_generator(0, 0)) is None
    unet = tiny.unet()
    assert seeing(unet, None) is unet


def test_training_shows_what_sampling_shows(batch, monkeypatch):
    """The same picture and mask give the network the same five channels behind x_t."""
    module = build()
    vae, conditioner = module.frozen
    monkeypatch.setattr(vae, "latents", lambda moments, noise: moments.chunk(2, dim=1)[0])  # without its own noise
    pixels, white = np.arange(768, dtype=np.uint8).reshape(16, 16, 3), np.zeros((16, 16), np.uint8)
    white[3:9, 4:11] = 255
    monkeypatch.setattr(
        "ldm.training.diffusion.random_masks", lambda *_: torch.from_numpy(white / np.float32(255))[None, None]
    )
    seen = module.masked({"image": to_tensor(pixels)[None]}, step_generator(0, 0))
    shown = []

    class Spy(UNet):
        def forward(self, x_t, t, context):
            shown.append(x_t)
            return super().forward(x_t, t, context)

    unet = tiny.unet(in_channels=9)
    unet.__class__ = Spy
    seeing(unet, seen)(torch.zeros(1, 4, 8, 8), torch.tensor([0]), torch.zeros(1, 3, 16))
    pipeline = LatentDiffusionPipeline(unet, vae, conditioner, module.schedule, "v_prediction")
    list(pipeline.generate(["x"], [0], init_image=pixels, mask=white, steps=1, guidance_scale=1.0))
    trained, sampled = shown
    assert trained.shape == sampled.shape == (1, 9, 8, 8)
    torch.testing.assert_close(trained[:, 4:], sampled[:, 4:], atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def inpainting(finished) -> TrainConfig:
    """A run that goes on from a U-Net for text alone."""
    overrides = [*INPAINTING, f"+unet.pretrained={finished.run_dir}", "name=inpainting", "optim.lr=1e-9"]
    config = tiny_config(finished.output_dir, *overrides)
    stages.run(config)
    return config


def test_an_inpainting_unet_begins_as_the_old_one(finished, inpainting):
    old = LatentDiffusionPipeline.from_pretrained(finished.run_dir).unet
    vae, conditioner = networks.load_frozen(inpainting)
    new = networks.build_unet(inpainting, vae, conditioner.text_tower.config["hidden_size"])
    assert new.sees_mask and new.conv_in.weight[:, 4:].abs().sum() == 0
    tiny.scrambled(old), tiny.scrambled(new.conv_out)  # a fresh U-Net predicts zeros
    new.conv_out.load_state_dict(old.conv_out.state_dict())
    state = {name: tensor for name, tensor in old.state_dict().items() if name != "conv_in.weight"}
    new.load_state_dict(state, strict=False)
    with torch.no_grad():
        new.conv_in.weight[:, :4] = old.conv_in.weight
    x_t, seen, t = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8, 8), torch.tensor([3, 500])
    context = torch.randn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(new(torch.cat([x_t, seen], 1), t, context), old(x_t, t, context))


def test_an_inpainting_model_is_drawn_with(inpainting, tmp_path):
    pipeline = LatentDiffusionPipeline.from_pretrained(inpainting.run_dir)
    assert pipeline.sees_mask
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(tmp_path / "picture.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = [f"init_image={tmp_path}/picture.png", f"mask={tmp_path}/mask.png", f"out={tmp_path}/out"]
    assert run_script("sample", f"ckpt={inpainting.run_dir}", "prompt=a fox", *arguments) == 0
    drawn = np.asarray(Image.open(next((tmp_path / "out").glob("*.png"))))
    assert (drawn[mask == 0] == 90).all() and (drawn[mask == 255] != 90).any()


def test_an_inpainting_unet_trains_from_nothing_with_previews(finished):
    overrides = [*INPAINTING, "name=inpainting-fresh", "callbacks.samples.every=2"]
    config = tiny_config(finished.output_dir, *overrides)
    stages.run(config)
    assert LatentDiffusionPipeline.from_pretrained(config.run_dir).sees_mask
    assert len(list((Path(config.run_dir) / "samples" / "diffusion").glob("*.png"))) == 2


def test_the_cache_has_no_pictures_to_mask(finished, inpainting):
    with pytest.raises(UserError, match=r"in_channels=9.*data\.cache=false"):
        tiny_config(finished.output_dir, "+unet.in_channels=9")
    # Here the weights say it, not the config.
    config = tiny_config(finished.output_dir, f"+unet.pretrained={inpainting.run_dir}", "stages=[diffusion]")
    with pytest.raises(UserError, match=r"in_channels=9.*data\.cache=false"):
        networks.build_unet(config, *_frozen(config))


def test_channels_that_do_not_fit_are_refused(finished, inpainting):
    for overrides in (["+unet.in_channels=7"], [f"+unet.pretrained={inpainting.run_dir}", "+unet.in_channels=4"]):
        config = tiny_config(finished.output_dir, *overrides, "stages=[diffusion]", "data.cache=false")
        with pytest.raises(UserError, match=r"unet\.in_channels=. does not fit: the VAE has 4 .*9 with a mask"):
            networks.build_unet(config, *_frozen(config))


def _frozen(config):
    vae, conditioner = networks.load_frozen(config)
    return vae, conditioner.text_tower.config["hidden_size"]
