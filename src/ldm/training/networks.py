"""Build the networks that a config describes, or load them."""

from collections.abc import Collection
from typing import Any

import torch

from ldm.conditioner import Conditioner, train_tokenizer
from ldm.config import Stage, TrainConfig
from ldm.diffusion.schedule import FlowSchedule, NoiseSchedule
from ldm.errors import UserError
from ldm.nn.autoencoder import AutoencoderKL
from ldm.nn.clip import CLIP, TextTower
from ldm.nn.unet import UNet
from ldm.training.finetune import check_prediction, train_only, widen
from ldm.training.stages import require_result
from ldm.weights.model import load_part
from ldm.weights.tokenizer import load_text_tokenizer


def check_networks(config: TrainConfig, stages: Collection[Stage]) -> None:
    """Build on the meta device what these stages will train: a fault shows now, not when the stage before is done.

    Pretrained networks are no part of it, but for what a U-Net predicts: they are loaded first thing.

    Raises:
        UserError: options of a network, or two networks, do not fit together.
    """
    part, text = config.text_encoder, config.text_encoder.text
    with torch.device("meta"):
        vae = None if config.vae.pretrained else build_vae(config)
        if "clip" in stages:
            build_clip(config, train_tokenizer([], part.vocab_size or 49408, part.max_length or 77))
        if "diffusion" in stages and vae and text and not config.unet.pretrained:
            build_unet(config, vae, text.hidden_size)
    if "diffusion" in stages and config.unet.pretrained:
        check_prediction(config.unet.pretrained, config.diffusion.prediction_type)


def build_vae(config: TrainConfig) -> AutoencoderKL:
    """Build the VAE that a config describes, with fresh weights that are a function of the seed."""
    options = config.vae.options()
    num_levels = len(options.get("block_out_channels", [0]))
    channels = options.pop("in_channels", 3)
    return _build(
        AutoencoderKL,
        "vae",
        config.seed,
        scaling_factor=1.0,
        sample_size=config.data.resolution,
        in_channels=channels,
        out_channels=channels,
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


def build_unet(config: TrainConfig, vae: AutoencoderKL, width: int) -> UNet:
    """Build the U-Net that fits a VAE and context of a width: fresh, or with pretrained weights.

    With `unet.in_channels` = 2C + 1 it is one for inpainting, which sees a mask and the masked picture too.

    Raises:
        UserError: its options, its weights, the VAE and the text encoder do not fit together.
    """
    channels = vae.config["latent_channels"]
    in_channels = config.unet.in_channels
    if config.unet.pretrained:
        check_prediction(config.unet.pretrained, config.diffusion.prediction_type)
        unet = load_part(UNet, config.unet.pretrained, option="unet.pretrained")
        if in_channels == 2 * channels + 1 and unet.config["in_channels"] == channels:
            widen(unet, 2 * channels + 1)
    else:
        defaults = {"in_channels": channels, "out_channels": channels, "cross_attention_dim": width}
        options = config.unet.options()
        sample_size = config.data.resolution // vae.downscale_factor
        unet = _build(UNet, "unet", config.seed, **{"sample_size": sample_size, **defaults, **options})
    fitting = (channels, 2 * channels + 1) if in_channels in (None, unet.config["in_channels"]) else (in_channels,)
    for name, values in (("in_channels", fitting), ("out_channels", (channels,)), ("cross_attention_dim", (width,))):
        if unet.config[name] not in values:
            raise UserError(
                f"unet.{name}={unet.config[name]} does not fit: the VAE has {channels} latent channels"
                f"{f' ({2 * channels + 1} with a mask and a masked picture)' if name == 'in_channels' else ''}, "
                f"the text encoder is {width} wide"
            )
    if unet.sees_mask and config.data.cache:
        raise UserError(
            f"unet.in_channels={unet.config['in_channels']} is a U-Net for inpainting: it learns from masked pictures, "
            "and the cache keeps none; take data.cache=false"
        )
    factor = vae.downscale_factor * unet.downscale_factor
    if config.data.resolution % factor:
        raise UserError(f"data.resolution={config.data.resolution} must be a multiple of {factor}: the VAE and the "
                        f"U-Net halve it {factor.bit_length() - 1} times")  # fmt: skip
    train_only(unet, config.unet.train)
    unet.gradient_checkpointing = bool(config.unet.gradient_checkpointing)
    return unet


def build_schedule(config: TrainConfig) -> NoiseSchedule | FlowSchedule:
    """Build what noise a config trains with: a flow has straight paths, and no betas."""
    diffusion = config.diffusion
    if diffusion.prediction_type == "flow_prediction":
        return FlowSchedule(diffusion.num_train_timesteps)
    return NoiseSchedule(
        diffusion.beta_schedule,
        diffusion.beta_start,
        diffusion.beta_end,
        diffusion.num_train_timesteps,
        rescale_betas_zero_snr=diffusion.zero_terminal_snr,
    )


def load_frozen(config: TrainConfig) -> tuple[AutoencoderKL, Conditioner]:
    """Load the VAE and the conditioner that the U-Net is trained over: pretrained, or earlier stages' results."""
    return load_vae(config), load_conditioner(config)


def load_vae(config: TrainConfig) -> AutoencoderKL:
    source = config.frozen_vae or str(require_result(config, "autoencoder"))
    vae = load_part(AutoencoderKL, source, option="vae.pretrained").requires_grad_(False)
    return vae.to(memory_format=torch.channels_last)


def load_conditioner(config: TrainConfig) -> Conditioner:
    source = config.text_encoder.pretrained or str(require_result(config, "clip"))
    text_tower = load_part(TextTower, source, option="text_encoder.pretrained")
    tokenizer = load_text_tokenizer(source, text_tower, "text_encoder.pretrained")
    try:
        return Conditioner(tokenizer, text_tower).eval().requires_grad_(False)
    except ValueError as error:
        raise UserError(f"text_encoder.pretrained={source}: {error}") from error


def _build(network: Any, group: str, seed: int, **options: Any) -> Any:
    """Build a network whose fresh weights are a function of the seed alone, and say so if its options cannot be."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return network(**options)
        except ValueError as error:
            raise UserError(f"{group}: {error}") from error
