"""B batch, C latent channels, h w latents, L tokens, D width."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny
from ldm.conditioner import NULL_CAPTION
from ldm.config import TrainConfig, check
from ldm.diffusion.schedule import NoiseSchedule
from ldm.pipeline import LatentDiffusionPipeline
from ldm.training import fit, stages
from ldm.training.diffusion import DiffusionModule
from ldm.training.module import step_generator
from ldm.weights.folder import load_weights
from runs import TINY, compose_values, tiny_config

CONFIG = check(TrainConfig, compose_values("train", TINY))


def build(prediction_type: str = "v_prediction", dropout: float = 0.0, **options) -> DiffusionModule:
    settings = CONFIG.diffusion.model_copy(update={"prediction_type": prediction_type, "caption_dropout": dropout})
    vae, conditioner = tiny.vae().requires_grad_(False), tiny.conditioner().requires_grad_(False)
    module = DiffusionModule(
        tiny.unet(**options), NoiseSchedule(), settings, CONFIG.optim, 10, 0, vae, conditioner, CONFIG.sampling,
        list(tiny.CAPTIONS),
    )  # fmt: skip
    module.trainer = SimpleNamespace(
        world_size=1, global_step=0, accumulate_grad_batches=1, training=True, global_rank=0, strategy=None
    )
    module.log_losses = lambda losses, batch_size: module.__dict__.setdefault("logged", []).append(losses)
    return module


@pytest.fixture
def module() -> DiffusionModule:
    return build()


@pytest.fixture
def batch() -> dict:
    image = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"image": image, "caption": [tiny.CAPTIONS[i % 3] for i in range(4)]}


def cached(module: DiffusionModule, batch: dict) -> dict:
    vae, conditioner = module.frozen
    with torch.inference_mode():
        return {"moments": vae.encode(batch["image"]).clone(), "context": conditioner(batch["caption"]).clone()}


# ----------------------------------------------------------------------------------------------------- a training step


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_gradient_reaches_exactly_what_is_trained(prediction_type, batch):
    module = build(prediction_type)
    loss = module.training_step(batch, 0)
    assert loss.isfinite() and loss.ndim == 0
    loss.backward()
    for name, parameter in module.network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
    for frozen in module.frozen:
        assert all(parameter.grad is None for parameter in frozen.parameters())
    assert all(parameter.grad is None for parameter in module.ema.parameters())


def test_frozen_parts_are_nowhere_in_the_module(module):
    names = {name.split(".")[0] for name, _ in module.named_parameters()}
    assert names == {"network", "ema"}
    assert {name.split(".")[0] for name in module.state_dict()} == {"network", "ema"}
    optimizer = module.configure_optimizers()["optimizer"]
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert given == {id(p) for p in module.network.parameters()}
    assert not any(frozen.training for frozen in module.train().frozen)


def test_a_batch_from_the_cache_is_the_same_batch(module, batch):
    assert torch.allclose(
        module.training_step(batch, 0), module.training_step(cached(module, batch), 0), rtol=1e-5, atol=1e-6
    )


def test_a_step_is_a_function_of_its_place(module, batch):
    first, again = module.training_step(batch, 0), module.training_step(batch, 0)
    assert torch.equal(first, again)
    for place in ("global_step", "global_rank"):
        setattr(module.trainer, place, 1)
        assert not torch.equal(module.training_step(batch, 0), first)
        setattr(module.trainer, place, 0)
    module.trainer.accumulate_grad_batches = 2
    assert not torch.equal(module.training_step(batch, 1), first)  # the second micro-batch
    assert torch.equal(module.training_step(batch, 2), first)


def test_latents_are_sampled_anew_each_step(module, batch):
    """The cache keeps moments, not a sample of them."""
    moments = cached(module, batch)
    latents = [module.encode(moments, step_generator(0, step))[0] for step in range(200)]
    assert not torch.equal(latents[0], latents[1])
    stacked = torch.stack(latents)
    mean, logvar = moments["moments"].chunk(2, dim=1)
    scale = module.frozen[0].config["scaling_factor"]
    deviations = (stacked.mean(0) - mean * scale) / ((0.5 * logvar).exp() * scale / 200**0.5)
    assert deviations.abs().mean() < 1.0 and deviations.abs().max() < 6
    spread = stacked.std(0) / ((0.5 * logvar).exp() * scale)
    assert abs(spread.mean() - 1) < 0.02


@pytest.mark.parametrize("from_cache", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_captions_are_dropped_sample_by_sample(rate, from_cache, batch, monkeypatch):
    module = build(dropout=rate)
    null = module.frozen[1]([NULL_CAPTION])[0]
    assert torch.equal(module.null_context, null)
    data = cached(module, batch) if from_cache else batch
    context = module.frozen[1](batch["caption"])
    seen = []
    monkeypatch.setattr(module, "loss", lambda unet, x_0, context, generator: seen.append(context) or x_0.sum())
    for step in range(150):
        module.trainer.global_step = step
        module.training_step(data, 0)
    dropped = torch.stack([(each == null).flatten(1).all(1) for each in seen])
    kept = torch.stack([torch.isclose(each, context, atol=1e-6).flatten(1).all(1) for each in seen])
    assert (dropped ^ kept).all()
    share = dropped.float().mean().item()
    assert share == pytest.approx(rate, abs=0.08 if 0 < rate < 1 else 0)
    if 0 < rate < 1:  # neither whole batches, nor the same captions each time
        assert dropped.float().std(1).mean() > 0 and dropped.any(0).all() and not dropped.all(0).any()
        assert (dropped.any(1) & ~dropped.all(1)).float().mean() > 0.5


def test_the_caption_matters_and_dropping_it_does_too(batch):
    with_captions, without = (build(dropout=rate).training_step(batch, 0) for rate in (0.0, 1.0))
    assert not torch.isclose(with_captions, without, rtol=1e-4)


# ------------------------------------------------------------------------------------------- validation and previews


def test_validation_is_of_the_average_and_always_the_same(module, batch):
    module.eval()
    module.validation_step(batch, 0)
    with torch.no_grad():
        for parameter in module.network.parameters():
            parameter.add_(1.0)
    module.trainer.global_step = 7
    module.validation_step(batch, 0)
    with torch.no_grad():
        for parameter in module.ema.average.parameters():
            parameter.mul_(1.1)
    module.validation_step(batch, 0)
    first, second, third = (float(losses["loss"]) for losses in module.logged)
    assert first == second != third


def test_validation_keeps_all_captions(batch):
    losses = []
    for rate in (0.0, 1.0):
        module = build(dropout=rate)
        module.validation_step(batch, 0)
        losses.append(float(module.logged[0]["loss"]))
    assert losses[0] == losses[1]


def test_a_preview_is_drawn_with_the_average_and_draws_nothing_from_training(module):
    state = torch.random.get_rng_state()
    first, captions = module.preview(2)
    assert first.shape == (2, 3, 16, 16) and list(captions) == list(tiny.CAPTIONS[:2])
    assert first.abs().max() <= 1
    assert torch.equal(module.preview(2)[0], first)
    with torch.no_grad():
        for parameter in module.network.parameters():
            parameter.zero_()
    assert torch.equal(module.preview(2)[0], first)
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad():
        for parameter in module.ema.average.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(module.preview(2)[0], first)


def test_training_goes_on_after_a_preview(module, batch):
    """Drawing happens in inference mode: nothing of that may be left in the networks."""
    module.preview(2)
    module.training_step(batch, 0).backward()
    module.ema.update(module.network)


# -------------------------------------------------------------------------------------------------------- whole runs


def test_the_model_folder_holds_the_average(finished):
    state = torch.load(fit.checkpoint_path(finished, "diffusion"), weights_only=True)["state_dict"]
    exported = load_weights(Path(finished.run_dir) / "model" / "unet")
    assert all(torch.equal(state[f"ema.average.{name}"], tensor) for name, tensor in exported.items())
    assert any(not torch.equal(state[f"network.{name}"], tensor) for name, tensor in exported.items())


@pytest.mark.parametrize("diffusion", ["ddpm", "v", "x0"])
def test_every_parameterisation_trains_and_draws(diffusion, finished):
    config = tiny_config(finished.output_dir, f"diffusion={diffusion}", f"name=as-{diffusion}", "stages=[diffusion]")
    stages.run(config)
    pipeline = LatentDiffusionPipeline.from_pretrained(config.run_dir)
    assert pipeline.prediction_type == config.diffusion.prediction_type
    assert pipeline.settings == config.sampling.model_dump()
    [image] = pipeline.generate(["a red circle"], [0])
    assert image.shape == (3, 16, 16) and image.isfinite().all()


def test_the_loss_falls_when_one_batch_is_trained_again_and_again(finished):
    config = tiny_config(
        finished.output_dir, "debug=overfit", "stages=[autoencoder,clip,diffusion]", "trainer.max_steps=100",
        "optim.lr=1e-2", "trainer.val_every=200", "diffusion.caption_dropout=0",
    )  # fmt: skip
    assert config.trainer.overfit_batches == 1
    stages.run(config)
    rows = [line.split(",") for line in (Path(config.run_dir) / "metrics.csv").read_text().splitlines()]
    losses = [float(row[2]) for row in rows if row[0] == "diffusion/loss"]
    assert len(losses) == 2 and losses[-1] < 0.9 * losses[0]
