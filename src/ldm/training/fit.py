"""Fit and export each stage."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import nn

from ldm.conditioner import train_tokenizer
from ldm.config import Stage, TrainConfig
from ldm.data.datamodule import DataModule, explaining_lost_worker
from ldm.errors import UserError
from ldm.evaluation.features import ClipFeatures, InceptionFeatures
from ldm.files import written_atomically
from ldm.nn.autoencoder import AutoencoderKL
from ldm.plugins import build
from ldm.ranks import meet, part, say, say_once
from ldm.redact import fingerprinted, is_same
from ldm.training.autoencoder import AutoencoderModule, latent_statistics
from ldm.training.checkpointing import (
    PREVIOUS,
    VERSION,
    AtomicCheckpointIO,
    SaveCheckpoint,
    check_room,
    newest_whole,
)
from ldm.training.clip import ClipModule
from ldm.training.compiling import compile_blocks
from ldm.training.diffusion import DiffusionModule
from ldm.training.failures import explaining_want_of_memory
from ldm.training.feed import (
    ENCODE_BATCH,
    find_buckets,
    make_datamodule,
    open_cache,
    open_pictures,
    say_what_is_cut,
    warn_of_other_pictures,
)
from ldm.training.launching import build_strategy, environment, placed
from ldm.training.loggers import drop_rows
from ldm.training.measuring import Measure
from ldm.training.module import StageModule
from ldm.training.networks import build_clip, build_schedule, build_unet, build_vae, check_networks, load_frozen
from ldm.training.optim import build_optimizer
from ldm.training.peers import Watch
from ldm.training.posthoc import SaveAverages
from ldm.training.sharding import FSDP
from ldm.training.signals import CODES
from ldm.training.stages import (
    PARTS,
    is_done,
    record_result,
    stage_inputs,
    stage_steps,
)
from ldm.training.stopping import StopOnSignal, Stopped
from ldm.weights.folder import save_network, save_pipeline_index
from ldm.weights.model import load_part

Begin = Callable[[], None]  # called once all that can be wrong with a config has been looked at


def check_at_the_door(config: TrainConfig, stages: Sequence[Stage]) -> None:
    """Find what would stop any of these stages before the first of them is trained.

    Raises:
        UserError: networks or optimizers cannot be built; a checkpoint in the run directory is another config's.
    """
    placed(config.trainer)
    check_networks(config, stages)
    if "diffusion" in stages:
        asked, cpu = config.evaluation, torch.device("cpu")
        if {"fid", "kid"} & set(asked.metrics):
            InceptionFeatures(asked.inception, cpu, "evaluation.inception")
        if asked.clip and asked.metrics:
            ClipFeatures(asked.clip, cpu)
    for stage in stages:
        optim = config.optim if stage == "diffusion" else getattr(config, stage).optim
        build_optimizer(nn.Linear(1, 1), optim, stage_steps(config, stage))
        _resume_from(config, stage)


# ------------------------------------------------------------------------------------------------------ the stages


def fit_autoencoder(config: TrainConfig, place: Path, begin: Begin) -> None:
    """Train the VAE, fold its latent statistics into it, and write `vae/` into `place`.

    One that begins with pretrained weights is a result like any other; where its decoder alone is trained, its latents
    keep the statistics that they are known for.
    """
    vae = first_vae(config)
    adversary = config.autoencoder.discriminator
    if adversary and adversary.start >= config.autoencoder.max_steps:
        say(f"  autoencoder.discriminator.start={adversary.start} comes after the last step: there will be none")
    train, val = open_pictures(config, vae.config["in_channels"])
    module = AutoencoderModule(vae, config.autoencoder, config.seed)
    feed = make_datamodule(config, train, val, config.autoencoder.batch_size)
    trainer = _fit(config, module, feed, begin)
    if trainer.is_global_zero and not is_done(config, "autoencoder"):  # another run may have been faster
        vae = module.evaluated.to(trainer.strategy.root_device).eval()
        if config.autoencoder.train == "all":
            try:
                vae.fold_latent_statistics(*latent_statistics(vae, train, ENCODE_BATCH))
            except ValueError as error:
                raise UserError(f"training the VAE failed, try a lower autoencoder.optim.lr: {error}") from error
        with written_atomically(place) as folder:
            save_network(vae, folder / "vae")
            record_result(config, "autoencoder", folder, feed.content)
    meet()
    part()


def first_vae(config: TrainConfig) -> AutoencoderKL:
    """Build the VAE that the stage begins with: a fresh one, or a pretrained one to go on from."""
    if config.vae.pretrained is None:
        return build_vae(config)
    vae = load_part(AutoencoderKL, config.vae.pretrained, option="vae.pretrained")
    if config.data.resolution % vae.downscale_factor:
        raise UserError(
            f"data.resolution={config.data.resolution} must be a multiple of {vae.downscale_factor}, by which "
            f"vae.pretrained={config.vae.pretrained} makes pictures smaller"
        )
    say(f"  going on from {config.vae.pretrained}, autoencoder.train={config.autoencoder.train}")
    return vae


def fit_clip(config: TrainConfig, place: Path, begin: Begin) -> None:
    """Train the vocabulary and both towers; write `clip/`, `text_encoder/` and `tokenizer/` into `place`."""
    train, val = open_pictures(config)
    captions = (text for texts in train.captions for text in texts)
    told = config.text_encoder
    tokenizer = train_tokenizer(captions, told.vocab_size or 49408, told.max_length or 77)
    clip = build_clip(config, tokenizer)
    max_length = clip.config["text_config"]["max_position_embeddings"]
    module = ClipModule(clip, tokenizer, max_length, config.clip, config.seed)
    feed = make_datamodule(config, train, val, config.clip.batch_size)
    trainer = _fit(config, module, feed, begin)
    if trainer.is_global_zero and not is_done(config, "clip"):
        with written_atomically(place) as folder:
            save_network(clip, folder / "clip")
            save_network(clip.text_model, folder / "text_encoder")
            tokenizer.save_pretrained(folder / "tokenizer")
            record_result(config, "clip", folder, feed.content)
    meet()
    part()


def fit_diffusion(config: TrainConfig, place: Path, begin: Begin) -> None:
    """Train the U-Net over the frozen VAE and text encoder; complete the model folder `place`."""
    vae, conditioner = load_frozen(config)
    unet = build_unet(config, vae, conditioner.text_tower.config["hidden_size"])
    schedule = build_schedule(config)
    train, val = open_pictures(config, vae.config["in_channels"], find_buckets(config, vae, unet))
    prompts = [texts[0] for texts in val.captions[:64]]
    module = DiffusionModule(
        unet, schedule, config.diffusion, config.optim, config.trainer.max_steps, config.seed,
        vae, conditioner, config.sampling, prompts,
    )  # fmt: skip
    callbacks: list[pl.Callback] = []
    if config.diffusion.posthoc_ema:
        callbacks.append(SaveAverages(config.diffusion.posthoc_ema, Path(config.run_dir)))
    if config.evaluation.metrics:
        callbacks.append(Measure(config, module))
    trainer = build_trainer(config, module, *callbacks)
    if trainer.is_global_zero:
        say_what_is_cut(config, train, conditioner, trainer.world_size)
    datasets: tuple[Any, Any] = (train, val)
    if config.data.cache:
        device, num_readers = trainer.strategy.root_device, trainer.num_devices
        datasets = open_cache(config, train, val, vae, conditioner, device, num_readers)
    feed = make_datamodule(config, *datasets, config.data.batch_size, train)
    warn_of_other_pictures(config, feed.content)
    _fit(config, module, feed, begin, trainer)
    unet = module.whole(module.evaluated)
    if trainer.is_global_zero:
        if config.frozen_vae:
            save_network(vae, place / "vae")
        if config.text_encoder.pretrained:
            save_network(conditioner.text_tower, place / "text_encoder")
            with written_atomically(place / "tokenizer") as folder:
                conditioner.tokenizer.save_pretrained(folder)
        save_network(unet, place / PARTS["diffusion"])
        save_pipeline_index(place, schedule, config.diffusion.prediction_type, config.sampling.model_dump())
        record_result(config, "diffusion", place, feed.content)
    meet()
    part()


FIT: Mapping[Stage, Callable[[TrainConfig, Path, Begin], None]] = {
    "autoencoder": fit_autoencoder,
    "clip": fit_clip,
    "diffusion": fit_diffusion,
}


# -------------------------------------------------------------------------------------------------------- training


def build_trainer(config: TrainConfig, module: StageModule, *callbacks: pl.Callback) -> pl.Trainer:
    """Build the trainer of a stage, with the loggers and callbacks of the config and these.

    Raises:
        UserError: there is no such device, strategy, logger or callback.
    """
    # Lightning announces devices and tips at every start; what matters here is said by ourselves.
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning_fabric.utilities.distributed").setLevel(logging.WARNING)
    for name in ("accelerators.cuda", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"pytorch_lightning.{name}").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*")
    warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start of training.*")  # the EMA
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    # A run that was moved, or whose checkpoints come more often now: nothing is taken from the callback's own state.
    warnings.filterwarnings("ignore", message=".*The dirpath has changed from .*")
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided.*")
    warnings.filterwarnings("ignore", message=".*torch.distributed.nn.functional.all_gather is deprecated.*")
    warnings.filterwarnings("ignore", message=".*There is a wandb run already in progress.*")  # the stage before
    options = config.trainer
    devices, num_nodes = placed(options)
    # Like `optim`, `max_steps` and `data.batch_size`, accumulation is said for the diffusion stage.
    accumulate = options.accumulate_grad_batches if module.stage == "diffusion" else 1
    path = checkpoint_path(config, module.stage)
    try:
        return pl.Trainer(
            accelerator=options.accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=build_strategy(options, module.stage),
            precision=_precision(config, module.stage),
            max_steps=module.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=module.optim.clip_norm,
            val_check_interval=min(options.val_every, module.max_steps) * accumulate,
            check_val_every_n_epoch=None,
            limit_val_batches=options.val_batches,
            num_sanity_val_steps=0,
            log_every_n_steps=min(50, module.max_steps),
            logger=[build(node.node()) for node in config.logger.values()],
            callbacks=[
                Watch(60 * options.timeout_minutes),
                SaveCheckpoint(path, options.checkpoint_every),
                *(build(node.node()) for node in config.callbacks.values()),
                *callbacks,
                StopOnSignal(path),  # after all that the end of training brings with it
            ],
            plugins=[AtomicCheckpointIO(), *environment()],
            default_root_dir=config.run_dir,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, ValueError) as error:
        raise UserError(f"trainer: {error}") from error


def _precision(config: TrainConfig, stage: str) -> Any:
    """Return the precision a stage trains in; `auto` is bf16 where the hardware multiplies in it, else float32."""
    own = config.autoencoder.precision if stage == "autoencoder" else None
    precision = own or config.trainer.precision
    if precision != "auto":
        return precision
    if config.trainer.accelerator != "cpu" and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        fast = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return "bf16-mixed" if fast else "32-true"


def _fit(
    config: TrainConfig, module: StageModule, datamodule: DataModule, begin: Begin, trainer: pl.Trainer | None = None
) -> pl.Trainer:
    """Fit a stage, from its checkpoint on where there is one of the same config; leave a checkpoint of the end."""
    trainer = trainer or build_trainer(config, module)
    identity = {key: fingerprinted(value) for key, value in _identity(config, module.stage).items()}
    module.identity = {**identity, "pictures": datamodule.content}
    module.max_skipped = config.trainer.max_skipped
    if not isinstance(trainer.strategy, FSDP) and any(isinstance(part, nn.Conv2d) for part in module.network.modules()):
        module.to(memory_format=torch.channels_last)
    if config.trainer.compile:
        compile_blocks(module.network, many_shapes=module.stage == "diffusion" and config.data.buckets)
    path = checkpoint_path(config, module.stage)
    module.batch = datamodule.batch_size * trainer.accumulate_grad_batches * trainer.world_size
    resumed, step = _resume_from(config, module.stage, datamodule.content, module.batch) or (None, 0)
    check_room(path.parent, module.checkpoint_size)
    io: Any = trainer.strategy.checkpoint_io
    io.anew, io.damaged = resumed is None, resumed is not None and resumed.name == PREVIOUS
    begin()
    if resumed:
        say(f"  going on from step {step} ({resumed})")
    drop_rows(trainer, f"{module.stage}/", step)
    try:
        with (
            explaining_lost_worker(datamodule.num_workers),
            explaining_want_of_memory(config, module.stage, str(_precision(config, module.stage))),
        ):
            trainer.fit(module, datamodule, ckpt_path=resumed and str(resumed), weights_only=True)
    except Stopped as stopped:
        part()
        raise SystemExit(stopped.code) from None
    except SystemExit as ended:
        if ended.code in CODES.values():  # a signal outside of training
            raise
        if isinstance(ended, SIGTERMException):  # Lightning's answer to one, as if all were well
            raise SystemExit(143) from None
        raise KeyboardInterrupt from None
    return trainer


def checkpoint_path(config: TrainConfig, stage: Stage) -> Path:
    return Path(config.run_dir) / "checkpoints" / stage / "last.ckpt"


def _identity(config: TrainConfig, stage: Stage) -> dict[str, Any]:
    """Return what must be the same for a checkpoint to go on: a stage's inputs, less its length, secrets among them."""
    inputs = stage_inputs(config, stage)
    return {key: value for key, value in _flat(inputs) if not key.endswith("max_steps")}


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
    return pairs


def _resume_from(
    config: TrainConfig, stage: Stage, pictures: str | None = None, batch: int | None = None
) -> tuple[Path, int] | None:
    """Return the checkpoint that a stage goes on from and its step; None where it begins anew.

    Args:
        config: the run's.
        stage: one of its stages.
        pictures: hash of the set, where it is known already.
        batch: samples of an optimizer step on all ranks, where their number is known already. How that is shared out
            between ranks and micro-batches may have changed.

    Raises:
        UserError: no checkpoint can be read, or it is another config's, of other pictures, or past the last step.
    """
    if config.resume == "never" or (found := newest_whole(checkpoint_path(config, stage).parent)) is None:
        return None
    path, header, faults = found
    for fault in faults:
        say_once(f"  warning: {fault}")
    mend = "Give this run a name of its own (name=…), or start it anew over the old one (resume=never)"
    then, wanted = dict(header.identity), _identity(config, stage)
    if None not in (seen := then.pop("pictures", None), pictures) and seen != pictures:
        raise UserError(
            f"{path} was trained on other pictures or captions than are there now, going on would be another run. "
            f"{mend}"
        )
    changed = {key for key in then.keys() | wanted.keys() if not is_same(then.get(key), wanted.get(key))}
    shared_out = {key for key in changed if key.rpartition(".")[2] in ("batch_size", "accumulate_grad_batches")}
    if header.batch is not None and (batch == header.batch or (batch is None and changed == shared_out)):
        changed -= shared_out
    if changed:
        now_there = {key: fingerprinted(value) for key, value in wanted.items()}
        there = [(key, then.get(key, "not there"), now_there.get(key, "not there")) for key in sorted(changed)[:5]]
        told = "; ".join(f"{key}: {before} then, {now} now" for key, before, now in there)
        older = "It is of an earlier release of ldm, which can go on with it. " if header.version < VERSION else ""
        more = "; …" if len(changed) > 5 else ""
        raise UserError(f"{path} was trained with another config ({told}{more}). {older}{mend}")
    if header.step > (last := stage_steps(config, stage)):
        raise UserError(f"{path} is at step {header.step}, past the {last} that this run asks for. {mend}")
    if None not in (batch, header.batch) and batch != header.batch:
        say(f"  {batch} samples a step from here on, {header.batch} before: on other ranks. The learning rate stays")
    return path, header.step
