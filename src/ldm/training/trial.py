"""Steps that nobody keeps: what a run would train, before anything of it is there.

Networks that will be trained are built, those that are there are loaded: both cost the same.
"""

import time
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.conditioner import Conditioner, train_tokenizer
from ldm.config import Stage, TrainConfig
from ldm.data.order import Pick
from ldm.data.pictures import Pictures
from ldm.nn.autoencoder import AutoencoderKL
from ldm.training import fit
from ldm.training.autoencoder import AutoencoderModule
from ldm.training.checkpointing import SaveCheckpoint
from ldm.training.clip import ClipModule
from ldm.training.compiling import compile_blocks
from ldm.training.diffusion import DiffusionModule
from ldm.training.module import StageModule
from ldm.training.networks import build_clip, build_schedule, build_unet, load_conditioner, load_vae
from ldm.training.stages import is_done


def exists(config: TrainConfig, stage: Stage) -> bool:
    """Tell whether the VAE or the text encoder is there already: pretrained, or a stage's result."""
    pretrained = config.frozen_vae if stage == "autoencoder" else config.text_encoder.pretrained
    return bool(pretrained) or is_done(config, stage)


def any_vae(config: TrainConfig) -> AutoencoderKL:
    """Load the VAE, or build the one that will be trained."""
    return load_vae(config) if exists(config, "autoencoder") else fit.first_vae(config)


def any_conditioner(config: TrainConfig, pictures: Pictures) -> Conditioner:
    """Load the conditioner, or build the one that will be trained: it costs and cuts the same."""
    if exists(config, "clip"):
        return load_conditioner(config)
    part = config.text_encoder
    captions = (text for texts in pictures.captions for text in texts)
    tokenizer = train_tokenizer(captions, part.vocab_size or 49408, part.max_length or 77)
    return Conditioner(tokenizer, build_clip(config, tokenizer).text_model).eval().requires_grad_(False)


def build_module(config: TrainConfig, stage: Stage, vae: Any, conditioner: Conditioner, steps: int) -> StageModule:
    """Build what trains a stage over these encoders."""
    if stage == "autoencoder":
        return AutoencoderModule(fit.first_vae(config), config.autoencoder, config.seed)
    if stage == "clip":
        clip = build_clip(config, conditioner.tokenizer)
        return ClipModule(clip, conditioner.tokenizer, conditioner.max_length, config.clip, config.seed)
    unet = build_unet(config, vae, conditioner.text_tower.config["hidden_size"])
    return DiffusionModule(
        unet, build_schedule(config), config.diffusion, config.optim, steps, config.seed, vae, conditioner,
        config.sampling,
    )  # fmt: skip


def trial_trainer(config: TrainConfig, module: StageModule, steps: int, *callbacks: pl.Callback) -> pl.Trainer:
    """Build a trainer of a few steps in this process, which logs, saves and validates nothing."""
    one = {"max_steps": steps, "devices": 1, "num_nodes": 1, "strategy": "auto", "accumulate_grad_batches": 1}
    alone = config.trainer.model_copy(update=one)
    module.max_steps = steps
    quiet = config.model_copy(update={"trainer": alone, "logger": {}, "callbacks": {}})
    trainer = fit.build_trainer(quiet, module, *callbacks)
    built: Any = trainer
    built.callbacks = [callback for callback in built.callbacks if not isinstance(callback, SaveCheckpoint)]
    trainer.limit_val_batches = 0
    module.to(memory_format=torch.channels_last)
    if config.trainer.compile:
        compile_blocks(module.network)
    return trainer


class Again:
    """One batch again and again: what a step costs from the cache does not depend on what is in it."""

    bucket_of = None
    in_memory = True

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["moments"])

    def __getitems__(self, picks: Sequence[Pick]) -> dict[str, Tensor]:
        return self.batch


@torch.inference_mode()
def encoded(
    pictures: Pictures, members: Any, vae: Any, conditioner: Conditioner, batch_size: int
) -> tuple[Again, float]:
    """Encode one batch; return it, and the seconds that a picture took."""
    indices = [int(members[i % len(members)]) for i in range(batch_size)]
    device = next(vae.parameters()).device
    started = time.perf_counter()
    batch = pictures.__getitems__([(i, 0) for i in indices])
    moments = vae.encode(batch["image"].to(device, memory_format=torch.channels_last)).float().cpu()
    context = conditioner(batch["caption"]).float().cpu()
    seconds = (time.perf_counter() - started) / batch_size
    return Again({"moments": moments.clone(), "context": context.clone()}), seconds
