"""What a stage is fed: its pictures, as squares or in buckets, or the cache of them; in the order of training."""

from pathlib import Path
from typing import Any

import torch

from ldm.conditioner import Conditioner, num_truncated
from ldm.config import ShapesData, Stage, TrainConfig
from ldm.data.buckets import Buckets
from ldm.data.cache_reader import CachedLatents
from ldm.data.datamodule import DataModule
from ldm.data.latents import at_once, cached_latents, encoders_digest
from ldm.data.pictures import Pictures
from ldm.data.sources import content, open_sources, training_order
from ldm.nn.autoencoder import AutoencoderKL
from ldm.nn.unet import UNet
from ldm.ranks import main_process, say
from ldm.training.failures import explaining_want_of_memory_to_encode
from ldm.training.networks import build_unet, load_frozen
from ldm.training.stages import recorded_pictures, require_result

ENCODE_BATCH = 64
CACHE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def open_pictures(config: TrainConfig, channels: int = 3, buckets: Buckets | None = None) -> tuple[Pictures, Pictures]:
    """Open the training and the validation pictures as a stage sees them: squares, or of the buckets' sizes.

    Raises:
        UserError: see `open_sources`.
    """
    # What a stream meets, any rank may meet; what is looked at beforehand, one lists for all.
    met_later = getattr(config.data, "streaming", False)
    report = Path(config.run_dir) / "quarantine.txt" if main_process() or met_later else None
    cache = Path(config.output_dir) / "cache" / "indexes"
    # A stream has no sizes, and needs none: it knows no buckets.
    sources: Any = open_sources(config.data, channels, cache, report)
    train, val = sources
    return training_views(config, train, buckets), validation_views(config, val, buckets)


def training_views(config: TrainConfig, source: Any, buckets: Buckets | None) -> Pictures:
    data = config.data
    return Pictures(source, data.resolution, config.seed, buckets, data.crop, data.flip, data.variants)


def validation_views(config: TrainConfig, source: Any, buckets: Buckets | None) -> Pictures:
    return Pictures(source, config.data.resolution, config.seed, buckets, fixed=True)


def find_buckets(config: TrainConfig, vae: AutoencoderKL, unet: UNet) -> Buckets | None:
    if not config.data.buckets:
        return None
    return Buckets(config.data.resolution, vae.downscale_factor * unet.downscale_factor)


def open_cache(
    config: TrainConfig,
    train: Pictures,
    val: Pictures,
    vae: AutoencoderKL,
    conditioner: Conditioner,
    device: torch.device,
    num_readers: int = 1,
) -> tuple[CachedLatents, CachedLatents]:
    """Open the caches of both splits, encoded first on `device` where they are not whole; the encoders leave it again.

    Raises:
        UserError: see `cached_latents`; the memory is not enough, with what to try.
    """
    root = Path(config.output_dir) / "cache"
    encoders = encoders_digest(vae, conditioner)
    dtype = CACHE_DTYPES[config.data.cache_dtype]
    memory: Any = device if config.data.cache_on_device else "auto"
    if config.data.cache == "build":
        memory = "disk"  # nobody will read it now
    views = at_once(ENCODE_BATCH, config.data.resolution, config.data.resolution)
    with explaining_want_of_memory_to_encode(config, views, device):
        vae.to(device), conditioner.to(device)
        train_cache, val_cache = (
            cached_latents(root, pictures, vae, conditioner, ENCODE_BATCH, dtype, memory, encoders, num_readers)
            for pictures in (train, val)
        )
    vae.cpu(), conditioner.cpu()
    return train_cache, val_cache


def build_cache(config: TrainConfig) -> None:
    """Encode every picture and caption, and train nothing.

    Raises:
        UserError: an encoder is not there yet; see `open_sources`.
    """
    vae, conditioner = load_frozen(config)
    unet = build_unet(config, vae, conditioner.text_tower.config["hidden_size"])
    train, val = open_pictures(config, vae.config["in_channels"], find_buckets(config, vae, unet))
    say_what_is_cut(config, train, conditioner)
    on_gpu = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    caches = open_cache(config, train, val, vae, conditioner, device)
    for name, cache in zip(("training", "validation"), caches, strict=True):
        say(f"  {name} cache of {len(cache)} pictures: {cache.folder} ({cache.nbytes / 2**20:.1f} MiB)")


def say_what_is_cut(config: TrainConfig, train: Pictures, conditioner: Conditioner, world_size: int = 1) -> None:
    captions = [text for texts in train.captions for text in texts]
    if cut := num_truncated(conditioner, captions):
        print(f"  {cut} of {len(captions)} captions are longer than {conditioner.max_length} tokens and are cut there")
    if train.buckets is not None:
        print(train.buckets.table(train.source.sizes(), config.data.batch_size, world_size), flush=True)


def make_datamodule(
    config: TrainConfig, train: Any, val: Any, batch_size: int, pictures: Pictures | None = None
) -> DataModule:
    source = (pictures or train).source
    order = training_order(source, config.seed)
    workers, overfit = config.data.num_workers, config.trainer.overfit_batches
    return DataModule(train, val, order, batch_size, workers, overfit, content(source))


def warn_of_other_pictures(config: TrainConfig, pictures: str) -> None:
    """Say when the VAE or CLIP that is there was trained on what the set no longer is: only its path names it."""
    stages: dict[Stage, str | None] = {"autoencoder": config.frozen_vae, "clip": config.text_encoder.pretrained}
    for stage, pretrained in stages.items():
        if pretrained or isinstance(config.data, ShapesData):
            continue
        folder = require_result(config, stage)
        if recorded_pictures(folder) not in (None, pictures):
            say(
                f"! the pictures or captions have changed since stage '{stage}' was trained; to train it anew, "
                f"remove {folder}"
            )
