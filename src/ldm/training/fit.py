"""Build, fit and export each stage."""

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from ldm.conditioner import Conditioner, num_truncated, train_tokenizer
from ldm.config import Stage, TrainConfig
from ldm.data.datamodule import DataModule, Pictures
from ldm.data.latents import cached_latents
from ldm.data.sources import open_sources
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.nn.autoencoder import AutoencoderKL
from ldm.nn.clip import CLIP, TextTower
from ldm.nn.unet import UNet
from ldm.training.autoencoder import AutoencoderModule, latent_statistics
from ldm.training.checkpointing import AtomicCheckpointIO, last_checkpoint_callback, read_identity
from ldm.training.clip import ClipModule
from ldm.training.diffusion import DiffusionModule
from ldm.training.loggers import MetricsCSV
from ldm.training.module import StageModule
from ldm.training.stages import PARTS, record_result, require_result, stage_inputs
from ldm.weights.folder import (
    find_part,
    load_network,
    load_tokenizer,
    save_network,
    save_pipeline_index,
    written_atomically,
)

ENCODE_BATCH = 64


# ------------------------------------------------------------------------------------------------------ the stages


def fit_autoencoder(config: TrainConfig, place: Path) -> float | None:
    """Train the VAE, fold its latent statistics into it, and write `vae/` into `place`."""
    train, val = _pictures(config)
    module = AutoencoderModule(build_vae(config), config.autoencoder, config.seed)
    trainer = _fit(config, module, DataModule(train, val, **_feeding(config, config.autoencoder.batch_size)))
    if trainer.is_global_zero:
        vae = module.evaluated.to(trainer.strategy.root_device).eval()
        vae.fold_latent_statistics(*latent_statistics(vae, train, ENCODE_BATCH))
        with written_atomically(place) as folder:
            save_network(vae, folder / "vae")
            record_result(config, "autoencoder", folder)
    trainer.strategy.barrier()
    return _validation_loss(trainer, module)


def fit_clip(config: TrainConfig, place: Path) -> float | None:
    """Train the vocabulary and both towers; write `clip/`, `text_encoder/` and `tokenizer/` into `place`."""
    train, val = _pictures(config)
    tokenizer = train_tokenizer(
        train.source.captions(), config.text_encoder.vocab_size or 49408, config.text_encoder.max_length or 77
    )
    clip = build_clip(config, tokenizer)
    max_length = clip.config["text_config"]["max_position_embeddings"]
    module = ClipModule(clip, tokenizer, max_length, config.clip, config.seed)
    trainer = _fit(config, module, DataModule(train, val, **_feeding(config, config.clip.batch_size)))
    if trainer.is_global_zero:
        with written_atomically(place) as folder:
            save_network(clip, folder / "clip")
            save_network(clip.text_model, folder / "text_encoder")
            tokenizer.save_pretrained(folder / "tokenizer")
            record_result(config, "clip", folder)
    trainer.strategy.barrier()
    return _validation_loss(trainer, module)


def fit_diffusion(config: TrainConfig, place: Path) -> float | None:
    """Train the U-Net over the frozen VAE and text encoder; complete the model folder `place`."""
    vae, conditioner = load_frozen(config)
    unet = build_unet(config, vae, conditioner)
    schedule = build_schedule(config)
    train, val = _pictures(config)
    prompts = [val.source.captions()[i] for i in range(min(len(val), 64))]
    if cut := num_truncated(conditioner, train.source.captions()):
        print(f"  {cut} of {len(train)} captions are longer than {conditioner.max_length} tokens and are cut there")
    module = DiffusionModule(
        unet, schedule, config.diffusion, config.optim, config.trainer.max_steps, config.seed,
        vae, conditioner, config.sampling, prompts,
    )  # fmt: skip
    trainer = _build_trainer(config, module)
    datasets: tuple[Any, Any] = (train, val)
    if config.data.cache:
        device = trainer.strategy.root_device
        root = Path(config.output_dir) / "cache"
        encoders = vae.to(device), conditioner.to(device)
        datasets = cached_latents(root, train, *encoders), cached_latents(root, val, *encoders)
    _fit(config, module, DataModule(*datasets, **_feeding(config, config.data.batch_size)), trainer)
    if trainer.is_global_zero:
        if config.vae.pretrained:
            save_network(vae, place / "vae")
        if config.text_encoder.pretrained:
            save_network(conditioner.text_tower, place / "text_encoder")
            conditioner.tokenizer.save_pretrained(place / "tokenizer")
        save_network(module.evaluated, place / PARTS["diffusion"])
        save_pipeline_index(place, schedule, config.diffusion.prediction_type, config.sampling.model_dump())
        record_result(config, "diffusion", place)
    trainer.strategy.barrier()
    return _validation_loss(trainer, module)


FIT: Mapping[Stage, Callable[[TrainConfig, Path], float | None]] = {
    "autoencoder": fit_autoencoder,
    "clip": fit_clip,
    "diffusion": fit_diffusion,
}


# ---------------------------------------------------------------------------------------------------- the networks


def build_vae(config: TrainConfig) -> AutoencoderKL:
    """Build the VAE that a config describes, with fresh weights that are a function of the seed."""
    options = config.vae.options()
    num_levels = len(options.get("block_out_channels", [0]))
    return _build(
        AutoencoderKL,
        "vae",
        config.seed,
        scaling_factor=1.0,
        sample_size=config.data.resolution,
        down_block_types=["DownEncoderBlock2D"] * num_levels,
        up_block_types=["UpDecoderBlock2D"] * num_levels,
        **options,
    )


def build_clip(config: TrainConfig, tokenizer: Any) -> CLIP:
    """Build both towers of CLIP around a tokenizer."""
    part = config.text_encoder
    if part.text is None or part.vision is None:
        raise UserError("stage 'clip' needs both towers: text_encoder.text and text_encoder.vision (text_encoder=tiny)")
    text = {
        **part.text.options(),
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**part.vision.options(), "image_size": config.data.resolution}
    options = {} if part.projection_dim is None else {"projection_dim": part.projection_dim}
    return _build(CLIP, "text_encoder", config.seed, text_config=text, vision_config=vision, **options)


def build_unet(config: TrainConfig, vae: AutoencoderKL, conditioner: Conditioner) -> UNet:
    """Build the U-Net that fits a VAE and a text encoder: fresh, or with pretrained weights."""
    channels, width = vae.config["latent_channels"], conditioner.text_tower.config["hidden_size"]
    if config.unet.pretrained:
        unet = load_network(UNet, find_part(config.unet.pretrained, "unet"))
    else:
        defaults = {"in_channels": channels, "out_channels": channels, "cross_attention_dim": width}
        options = config.unet.options()
        sample_size = config.data.resolution // vae.downscale_factor
        unet = _build(UNet, "unet", config.seed, **{"sample_size": sample_size, **defaults, **options})
    for name, value in (("in_channels", channels), ("out_channels", channels), ("cross_attention_dim", width)):
        if unet.config[name] != value:
            raise UserError(
                f"unet.{name}={unet.config[name]} does not fit: the VAE has {channels} latent channels, "
                f"the text encoder is {width} wide"
            )
    factor = vae.downscale_factor * unet.downscale_factor
    if config.data.resolution % factor:
        raise UserError(f"data.resolution={config.data.resolution} must be a multiple of {factor}: the VAE and the "
                        f"U-Net halve it {factor.bit_length() - 1} times")  # fmt: skip
    return unet


def build_schedule(config: TrainConfig) -> NoiseSchedule:
    names = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
    return NoiseSchedule(**{name: getattr(config.diffusion, name) for name in names})


def load_frozen(config: TrainConfig) -> tuple[AutoencoderKL, Conditioner]:
    """Load the VAE and the conditioner that the U-Net is trained over: pretrained, or earlier stages' results."""
    vae_folder = (
        find_part(config.vae.pretrained, "vae")
        if config.vae.pretrained
        else require_result(config, "autoencoder") / "vae"
    )
    if config.text_encoder.pretrained:
        text_folder = find_part(config.text_encoder.pretrained, "text_encoder")
        tokenizer_folder = find_part(config.text_encoder.pretrained, "tokenizer")
    else:
        result = require_result(config, "clip")
        text_folder, tokenizer_folder = result / "text_encoder", result / "tokenizer"
    vae = load_network(AutoencoderKL, vae_folder).requires_grad_(False)
    vae.to(memory_format=torch.channels_last)
    conditioner = Conditioner(load_tokenizer(tokenizer_folder), load_network(TextTower, text_folder))
    return vae, conditioner.eval().requires_grad_(False)


def _build(network: Any, group: str, seed: int, **options: Any) -> Any:
    """Build a network whose fresh weights are a function of the seed alone, and say so if its options cannot be."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return network(**options)
        except ValueError as error:
            raise UserError(f"{group}: {error}") from error


# -------------------------------------------------------------------------------------------------------- training


def _pictures(config: TrainConfig) -> tuple[Pictures, Pictures]:
    train, val = open_sources(config.data)
    return Pictures(train, config.data.resolution), Pictures(val, config.data.resolution)


def _feeding(config: TrainConfig, batch_size: int) -> dict[str, int]:
    return {
        "batch_size": batch_size,
        "seed": config.seed,
        "num_workers": config.data.num_workers,
        "overfit_batches": config.trainer.overfit_batches,
    }


def _build_trainer(config: TrainConfig, module: StageModule) -> pl.Trainer:
    from hydra.utils import instantiate

    # Lightning announces devices and tips at every start; what matters here is said by ourselves.
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    for name in ("accelerators.cuda", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"pytorch_lightning.{name}").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`isinstance(treespec, LeafSpec)` is deprecated.*")
    warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start of training.*")  # the EMA
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*`ModelCheckpoint.*`")
    options = config.trainer
    checkpoints = last_checkpoint_callback(checkpoint_path(config, module.stage).parent, options.checkpoint_every)
    try:
        return pl.Trainer(
            accelerator=options.accelerator,
            devices=options.devices,
            num_nodes=options.num_nodes,
            strategy=options.strategy,
            precision=options.precision,
            max_steps=module.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=options.accumulate_grad_batches,
            gradient_clip_val=module.optim.clip_norm,
            val_check_interval=options.val_every * options.accumulate_grad_batches,
            check_val_every_n_epoch=None,
            limit_val_batches=options.val_batches,
            num_sanity_val_steps=0,
            log_every_n_steps=min(50, module.max_steps),
            logger=[instantiate(node.node()) for node in config.logger.values()],
            callbacks=[checkpoints, *(instantiate(node.node()) for node in config.callbacks.values())],
            plugins=[AtomicCheckpointIO()],
            default_root_dir=config.run_dir,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except (pl.utilities.exceptions.MisconfigurationException, ValueError) as error:
        raise UserError(f"trainer: {error}") from error


def _fit(
    config: TrainConfig, module: StageModule, datamodule: DataModule, trainer: pl.Trainer | None = None
) -> pl.Trainer:
    """Fit a stage, from its checkpoint on where there is one of the same config; leave a checkpoint of the end."""
    trainer = trainer or _build_trainer(config, module)
    module.identity = _identity(config, module.stage)
    if any(isinstance(part, nn.Conv2d) for part in module.network.modules()):
        module.to(memory_format=torch.channels_last)
    path = checkpoint_path(config, module.stage)
    resume = _resume_from(config, module.stage)
    if resume:
        step = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
        print(f"  going on from step {step} ({path})", flush=True)
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV):
            logger.drop_from(module.stage, step if resume else 0)
    trainer.fit(module, datamodule, ckpt_path=resume, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    trainer.save_checkpoint(path)
    return trainer


def checkpoint_path(config: TrainConfig, stage: str) -> Path:
    return Path(config.run_dir) / "checkpoints" / stage / "last.ckpt"


def _identity(config: TrainConfig, stage: str) -> dict[str, Any]:
    """Return what must be the same for a checkpoint to go on: a stage's inputs, less its length."""
    inputs = stage_inputs(config, stage)  # type: ignore[arg-type]
    return {key: value for key, value in _flat(inputs) if not key.endswith("max_steps")}


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
    return pairs


def _resume_from(config: TrainConfig, stage: str) -> str | None:
    path = checkpoint_path(config, stage)
    if config.resume == "never" or not path.exists():
        return None
    found, wanted = read_identity(path), _identity(config, stage)
    changed = [key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)]
    if changed:
        told = "; ".join(f"{key}: {found.get(key)} then, {wanted.get(key)} now" for key in sorted(changed)[:5])
        raise UserError(
            f"{path} was trained with another config ({told}{'; …' if len(changed) > 5 else ''}). "
            f"Give this run a name of its own (name=…), or start it anew over the old one (resume=never)"
        )
    return str(path)


def _validation_loss(trainer: pl.Trainer, module: StageModule) -> float | None:
    loss = trainer.callback_metrics.get(f"{module.stage}/val_loss")
    return None if loss is None else float(loss)
