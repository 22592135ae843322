"""B batch, C latent channels, h w latents, L tokens, D width."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny
from ldm.conditioner import NULL_CAPTION
from ldm.config import TrainConfig, check
from ldm.diffusion.parameterization import target
from ldm.diffusion.schedule import FlowSchedule, NoiseSchedule
from ldm.errors import UserError
from ldm.pipeline import LatentDiffusionPipeline
from ldm.training import fit, stages
from ldm.training.diffusion import DiffusionModule
from ldm.training.module import step_generator
from ldm.training.networks import build_schedule
from ldm.weights.folder import load_weights
from runs import TINY, compose_values, tiny_config

CONFIG = check(TrainConfig, compose_values("train", TINY))


def build(
    prediction_type: str = "v_prediction", dropout: float = 0.0, changes: dict | None = None, **options
) -> DiffusionModule:
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}  # Stable Diffusion's
    settings = {"prediction_type": prediction_type, "caption_dropout": dropout, **betas, **(changes or {})}
    config = CONFIG.model_copy(update={"diffusion": CONFIG.diffusion.model_copy(update=settings)})
    vae, conditioner = tiny.vae().requires_grad_(False), tiny.conditioner().requires_grad_(False)
    module = DiffusionModule(
        tiny.unet(**options), build_schedule(config), config.diffusion, CONFIG.optim, 10, 0, vae, conditioner,
        CONFIG.sampling, list(tiny.CAPTIONS),
    )  # fmt: skip
    module.on_validation_epoch_start()
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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
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
    module.trainer.global_step = 1
    assert not torch.equal(module.training_step(batch, 0), first)
    module.trainer.global_step, module.share = 0, (1, 2)
    assert not torch.equal(module.training_step(batch, 0), first)
    module.share = (0, 1)
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


# ------------------------------------------------------------------------------------------------- frozen parts in half

HALF = {
    "32-true": (torch.float32, torch.float32),
    "bf16-mixed": (torch.bfloat16, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),  # Stable Diffusion's VAE overflows in fp16
}


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("inpainting", [False, True])
def test_frozen_parts_have_half_precision_where_training_has(precision, inpainting, batch):
    """What they give is float32, and near; those that were given stay whole, to be saved."""
    module = build(in_channels=9 if inpainting else 4)
    module.trainer.precision, given = precision, module.frozen
    exact = *module.encode(batch, step_generator(0, 0)), module.masked(batch, step_generator(0, 1))
    loss = module.training_step(batch, 0)
    module.on_fit_start()
    assert tuple(next(part.parameters()).dtype for part in module.frozen) == HALF[precision]
    assert all(p.dtype == torch.float32 for part in given for p in part.parameters())
    assert not any(p.requires_grad or part.training for part in module.frozen for p in part.parameters())
    for part, before, dtype in zip(module.frozen, given, HALF[precision], strict=True):
        assert (part is before) == (dtype == torch.float32)
    compute = HALF[precision][1]
    with torch.autocast("cpu", compute, enabled=compute != torch.float32):
        found = *module.encode(batch, step_generator(0, 0)), module.masked(batch, step_generator(0, 1))
        if compute != torch.float16:  # the U-Net does not train in it on a CPU
            again = module.training_step(batch, 0)
            assert again.dtype == torch.float32 and again.item() == pytest.approx(loss.item(), rel=0.02)
    for one, other, dtype in zip(exact, found, (HALF[precision][0], compute, HALF[precision][0]), strict=True):
        if one is None:
            assert not inpainting and other is None
        elif dtype == torch.float32:
            assert torch.equal(one, other)
        else:
            assert other.dtype == torch.float32 and not torch.equal(one, other)
            torch.testing.assert_close(other, one, rtol=0, atol=0.08)


@pytest.mark.parametrize("cache", ["true", "false"])
def test_a_run_in_mixed_precision_is_near_and_saves_its_parts_whole(cache, finished):
    """Validation too; and a cache is encoded as ever."""
    encoders = {part: stages.result_folder(finished, stage) for part, stage in
                (("vae", "autoencoder"), ("text_encoder", "clip"))}  # fmt: skip
    options = [f"+{part}.pretrained={folder}" for part, folder in encoders.items()]
    losses, caches = {}, []
    for precision in ("32-true", "bf16-mixed"):
        config = tiny_config(
            finished.output_dir, *options, f"name=half-{cache}-{precision}", f"data.cache={cache}",
            f"trainer.precision={precision}", "stages=[diffusion]",
        )  # fmt: skip
        stages.run(config)
        run = Path(config.run_dir)
        rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
        losses[precision] = {
            row[0]: float(row[2]) for row in rows if row[0] in ("diffusion/loss", "diffusion/val_loss")
        }
        for part, folder in encoders.items():
            kept, source = load_weights(run / "model" / part), load_weights(folder / part)
            assert all(torch.equal(kept[name], tensor) for name, tensor in source.items())
        caches.append(set((Path(config.output_dir) / "cache").iterdir()))
    assert caches[0] == caches[1]
    assert len(losses["32-true"]) == 2 and losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.02)
    assert losses["bf16-mixed"] != losses["32-true"]


# ------------------------------------------------------------------------------------------------------- objectives


def as_it_was(module: DiffusionModule, batch: dict) -> torch.Tensor:
    """Return the loss of a step by the objective without options, its draws in their order."""
    generator = module.generator(0)
    vae, conditioner = module.frozen
    moments = vae.encode(batch["image"])
    x_0 = vae.latents(moments, torch.randn(moments.chunk(2, 1)[0].shape, generator=generator))
    drop = torch.rand(len(x_0), generator=generator) < module.config.caption_dropout
    context = torch.where(drop[:, None, None], module.null_context, conditioner(batch["caption"]))
    bins = torch.randperm(len(x_0), generator=generator)
    t = ((bins + torch.rand(len(x_0), generator=generator, dtype=torch.float64)) / len(x_0) * 1000).long()
    noise = torch.randn(x_0.shape, generator=generator)
    x_0, noise = (each.contiguous(memory_format=torch.channels_last) for each in (x_0, noise))
    alpha, sigma = module.schedule.coefficients(t, x_0)
    wanted = target(module.config.prediction_type, x_0, noise, alpha, sigma)
    return ((module.network(alpha * x_0 + sigma * noise, t, context) - wanted) ** 2).mean((1, 2, 3)).mean()


RECORDED = {
    "epsilon": (1.330681562, 1.309513807, 1.337712884),
    "v_prediction": (1.157305718, 1.211030841, 1.242666245),
    "sample": (1.101780295, 1.296227098, 1.050430179),
}
"""Losses of two steps and of validation, from before the objective had options."""


@pytest.mark.parametrize("prediction_type", RECORDED)
def test_without_options_losses_are_what_they_were(prediction_type, batch):
    module = build(prediction_type, dropout=0.3)
    found = []
    for module.trainer.global_step in (0, 1):
        loss = module.training_step(batch, 0)
        assert torch.equal(loss, as_it_was(module, batch))
        found.append(loss.item())
    module.validation_step(batch, 0)
    found.append(float(module.logged[-1]["loss"]))
    assert found == pytest.approx(RECORDED[prediction_type], rel=1e-4)


OPTIONS = [
    {"weighting": "min_snr"}, {"weighting": "soft_min_snr"}, {"weighting": "p2"}, {"weighting": "debiased"},
    {"loss": "huber"}, {"offset_noise": 0.1}, {"input_perturbation": 0.1}, {"zero_terminal_snr": True},
    {"timesteps": "logit_normal"}, {"stratified": False}, {"prediction_type": "flow_prediction"},
    {"weighting": "min_snr", "snr_gamma": 0.1}, {"weighting": "p2", "p2_gamma": 0.5}, {"weighting": "p2", "p2_k": 3.0},
    {"loss": "huber", "huber_c": 1.0}, {"timesteps": "logit_normal", "timesteps_mean": 1.0},
    {"timesteps": "logit_normal", "timesteps_std": 0.5},
]  # fmt: skip


def test_every_option_changes_the_loss_and_is_a_function_of_the_step(batch):
    losses = []
    for changes in ({}, *OPTIONS):
        module = build(changes=changes)
        loss = module.training_step(batch, 0)
        assert loss.isfinite() and torch.equal(loss, module.training_step(batch, 0))
        losses.append(loss.item())
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("changes", OPTIONS[:6])
def test_validation_is_of_the_plain_objective(changes, batch):
    """So that runs with other weights and losses can be compared."""
    found = []
    for each in ({}, changes):
        module = build(changes=each)
        module.validation_step(batch, 0)
        found.append(float(module.logged[-1]["loss"]))
    assert found[0] == found[1]


def test_the_signal_to_noise_ratio_is_that_of_the_rescaled_betas(batch, monkeypatch):
    """At the last timestep there is no signal: its weight is zero."""
    monkeypatch.setattr("ldm.training.diffusion.draw_times", lambda batch, *_: torch.ones(batch))
    assert build(changes={"weighting": "min_snr", "zero_terminal_snr": True}).training_step(batch, 0) == 0
    assert build(changes={"weighting": "min_snr"}).training_step(batch, 0) > 0


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow_prediction"])
def test_ranks_share_the_timesteps_of_a_step(prediction_type, batch, monkeypatch):
    module, seen = build(prediction_type, changes={"timesteps": "uniform"}), []
    monkeypatch.setattr(module, "_losses", lambda unet, x_0, context, t, *_: seen.append(t) or x_0.sum())
    for rank in range(3):
        module.share = (rank, 3)
        module.training_step(batch, 0)
    bins = torch.cat(seen).mul(12).div(1000).long()
    assert (bins.sort().values == torch.arange(12)).all()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["diffusion=ddpm", "diffusion.zero_terminal_snr=true"], "diffusion=v or x0"),
        (["diffusion=flow", "diffusion.zero_terminal_snr=true"], "a flow has none"),
        (["diffusion=flow", "diffusion.weighting=min_snr"], "weighting=uniform"),
        (["diffusion=flow", "diffusion.weighting=p2"], "timesteps=logit_normal"),
        (["diffusion.snr_gamma=0"], "diffusion.snr_gamma"),
        (["diffusion.huber_c=-1"], "diffusion.huber_c"),
        (["diffusion.loss=l1"], "'l1'"),
        (["diffusion.timesteps_std=0"], "diffusion.timesteps_std"),
        (["diffusion.offset_noise=-0.1"], "diffusion.offset_noise"),
        (["+unet.in_channels=9"], "data.cache=false"),
        (["+unet.train=[mid_block]"], "needs unet.pretrained"),
    ],
)
def test_objectives_that_cannot_be_are_refused(overrides, says):
    with pytest.raises(UserError) as error:
        check(TrainConfig, compose_values("train", [*TINY, *overrides]))
    assert says in str(error.value)


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
    module.logged = [{name: loss.detach() for name, loss in losses.items()} for losses in module.logged]
    first, second, third = (float(losses["loss"]) for losses in module.logged)
    assert first == second != third
    first, second, third = (float(losses["loss_raw"]) for losses in module.logged)  # of the weights in training
    assert first != second == third


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow_prediction"])
def test_validation_loss_is_told_by_bands_of_timesteps(prediction_type, batch, monkeypatch):
    module, told, seen = build(prediction_type), {}, []
    losses = torch.arange(4.0)

    def known(unet, x_0, context, t, noise):
        seen.append(t)
        return losses if unet is module.evaluated else 10 * losses

    monkeypatch.setattr(module, "_losses", known)
    monkeypatch.setattr(module, "log", lambda key, value, **_: told.__setitem__(key, float(value)))
    module.trainer.strategy = SimpleNamespace(reduce=lambda sums, reduce_op: 2 * sums)  # another rank has the same
    module.on_validation_epoch_start()
    module.validation_step(batch, 0)
    module.validation_step(batch, 1)
    module.on_validation_epoch_end()
    bands = {"t000-250": 0, "t250-500": 1, "t500-750": 2, "t750-1000": 3}
    for name, factor in (("val_loss", 1), ("val_loss_raw", 10)):
        for band, i in bands.items():  # stratified: each batch of four has one in each band
            one, other = (losses[(t // 250).long() == i].item() for t in (seen[0], seen[2]))
            assert told[f"diffusion/{name}/{band}"] == pytest.approx(factor * (one + other) / 2)
    assert len(told) == 8 and torch.equal(seen[0], seen[1])
    module.on_validation_epoch_start()  # nothing is left of the validation before
    assert not any(sums.any() for sums in module.bands.values())


def test_a_band_without_samples_is_not_told(module, batch, monkeypatch):
    told = []
    monkeypatch.setattr(module, "log", lambda key, value, **_: told.append(key))
    module.trainer.strategy = SimpleNamespace(reduce=lambda sums, reduce_op: sums)
    module.validation_step({"image": batch["image"][:1], "caption": batch["caption"][:1]}, 0)
    module.on_validation_epoch_end()
    assert len(told) == 2


def test_validation_keeps_all_captions(batch):
    losses = []
    for rate in (0.0, 1.0):
        module = build(dropout=rate)
        module.validation_step(batch, 0)
        losses.append(float(module.logged[0]["loss"]))
    assert losses[0] == losses[1]


def test_a_preview_is_drawn_with_what_is_given_and_draws_nothing_from_training(module):
    state = torch.random.get_rng_state()
    first, captions = module.preview(module.evaluated, 2)
    assert first.shape == (2, 3, 16, 16) and list(captions) == list(tiny.CAPTIONS[:2])
    assert first.abs().max() <= 1
    assert torch.equal(module.preview(module.evaluated, 2)[0], first)
    with torch.no_grad():
        for parameter in module.network.parameters():
            parameter.zero_()
    assert torch.equal(module.preview(module.evaluated, 2)[0], first)
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad():
        for parameter in module.ema.average.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(module.preview(module.evaluated, 2)[0], first)


def test_training_goes_on_after_a_preview(module, batch):
    """Drawing happens in inference mode: nothing of that may be left in the networks."""
    module.preview(module.evaluated, 2)
    module.training_step(batch, 0).backward()
    module.ema.update(module.network)


# -------------------------------------------------------------------------------------------------------- whole runs


def test_the_model_folder_holds_the_average(finished):
    state = torch.load(fit.checkpoint_path(finished, "diffusion"), weights_only=True)["state_dict"]
    exported = load_weights(Path(finished.run_dir) / "model" / "unet")
    assert all(torch.equal(state[f"ema.average.{name}"], tensor) for name, tensor in exported.items())
    assert any(not torch.equal(state[f"network.{name}"], tensor) for name, tensor in exported.items())


@pytest.mark.parametrize("diffusion", ["ddpm", "v", "x0", "flow"])
def test_every_parameterisation_trains_and_draws(diffusion, finished):
    config = tiny_config(finished.output_dir, f"diffusion={diffusion}", f"name=as-{diffusion}", "stages=[diffusion]")
    stages.run(config)
    pipeline = LatentDiffusionPipeline.from_pretrained(config.run_dir)
    assert pipeline.prediction_type == config.diffusion.prediction_type
    assert isinstance(pipeline.schedule, FlowSchedule if diffusion == "flow" else NoiseSchedule)
    assert pipeline.settings == config.sampling.model_dump()
    [image] = pipeline.generate(["a red circle"], [0])
    assert image.shape == (3, 16, 16) and image.isfinite().all()
    if diffusion == "flow":  # DDIM is the straight Euler step of a flow
        [euler] = pipeline.generate(["a red circle"], [0], sampler="euler")
        torch.testing.assert_close(euler, image, atol=1e-4, rtol=0)


def test_many_options_of_the_objective_at_once_train_and_draw(finished):
    options = [
        "zero_terminal_snr=true", "loss=huber", "offset_noise=0.1", "input_perturbation=0.1",
        "timesteps=logit_normal", "stratified=false",
    ]  # fmt: skip
    overrides = [f"diffusion.{option}" for option in options]
    config = tiny_config(finished.output_dir, *overrides, "name=all-options", "stages=[diffusion]")
    stages.run(config)
    pipeline = LatentDiffusionPipeline.from_pretrained(config.run_dir)
    assert isinstance(pipeline.schedule, NoiseSchedule) and pipeline.schedule.zero_terminal_snr
    assert torch.equal(pipeline.schedule.alphas_cumprod, build_schedule(config).alphas_cumprod)
    [image] = pipeline.generate(["a red circle"], [0])
    assert image.isfinite().all()
    metrics = (Path(config.run_dir) / "metrics.csv").read_text()
    assert "nan" not in metrics and "inf" not in metrics


def test_validation_bands_are_logged(run_dir):
    rows = [line.split(",") for line in (run_dir / "metrics.csv").read_text().splitlines()]
    found = {row[0]: float(row[2]) for row in rows if row[0].startswith("diffusion/val_loss")}
    bands = ("t000-250", "t250-500", "t500-750", "t750-1000")
    for name in ("val_loss", "val_loss_raw"):  # of 8 pictures, two in each band
        assert sum(found[f"diffusion/{name}/{band}"] for band in bands) / 4 == pytest.approx(
            found[f"diffusion/{name}"], rel=1e-4
        )
    assert len(found) == 10


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


def test_the_validation_loss_falls_as_the_model_learns_and_rises_when_it_learns_by_heart(tmp_path):
    """Eight pictures again and again: what is learned of all pictures comes first, then what is true of these alone."""
    config = tiny_config(
        tmp_path, "data.num_train=8", "data.num_val=32", "unet.block_out_channels=[16,32]", "autoencoder.max_steps=30",
        "trainer.max_steps=200", "trainer.val_every=20", "trainer.val_batches=4", "trainer.checkpoint_every=1000",
        "optim.lr=1e-2", "optim.schedule=constant", "diffusion.ema_decay=0.9", "diffusion.caption_dropout=0",
    )  # fmt: skip
    stages.run(config)
    rows = [line.split(",") for line in (Path(config.run_dir) / "metrics.csv").read_text().splitlines()]
    for name in ("diffusion/val_loss", "diffusion/val_loss_raw"):
        losses = [float(row[2]) for row in rows if row[0] == name]
        assert min(losses) < 0.97 * losses[0] and losses[-1] > 1.2 * min(losses), losses
    trained = [float(row[2]) for row in rows if row[0] == "diffusion/loss"]
    assert trained[-1] < 0.8 * trained[0]
