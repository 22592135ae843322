"""Models as other tools write them: random, tiny, in the shape of Stable Diffusion 1.5 and 2.1."""

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

import tiny

SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False,
}  # fmt: skip
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": [32, 64], "attention_head_dim": 8},
    "sd21": {"block_out_channels": [64, 128], "attention_head_dim": [1, 2], "use_linear_projection": True},
}
TEXTS = {"sd15": {"hidden_act": "quick_gelu"}, "sd21": {"hidden_act": "gelu"}}


def write_vae(folder: Path, seed: int = 1) -> Path:
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[32, 64], down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, norm_num_groups=32, sample_size=32,
    )  # fmt: skip
    tiny.scrambled(vae, seed).save_pretrained(folder)
    return folder


def write_folder(folder: Path, kind: str, in_channels: int = 4) -> Path:
    """Write a whole pipeline folder with diffusers and transformers; `kind` is sd15 or sd21."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=in_channels, layers_per_block=1, norm_num_groups=32, cross_attention_dim=64,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"], **UNETS[kind],
    )  # fmt: skip
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=tiny.tokenizer().model_max_length,
            vocab_size=len(tiny.tokenizer()),
            bos_token_id=tiny.tokenizer().bos_token_id,
            eos_token_id=tiny.tokenizer().eos_token_id,
            **TEXTS[kind],
        )
    )
    if kind == "sd15":  # as published: DDIM's settings are there, though PNDM does not know them
        scheduler = diffusers.PNDMScheduler(
            skip_prk_steps=True, **{k: v for k, v in SCHEDULER.items() if k != "clip_sample"}
        )
        scheduler.register_to_config(clip_sample=False)
    else:
        scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", **SCHEDULER)
    vae = diffusers.AutoencoderKL.from_pretrained(write_vae(folder.with_name(f"{folder.name}-vae")))
    diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=tiny.scrambled(text, 2), tokenizer=tiny.tokenizer(), unet=tiny.scrambled(unet, 0),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_hub(root: Path) -> dict[str, Path]:
    """Tiny random models, written by the libraries whose format it is, under the hub ids that the configs name."""
    from diffusers import AutoencoderKL as TheirVAE
    from diffusers import UNet2DConditionModel as TheirUNet
    from transformers import CLIPConfig, CLIPModel

    from ldm.conditioner import train_tokenizer

    tokenizer = train_tokenizer(["a red circle", "a blue square"], 600, 16)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**text, "image_size": 16, "patch_size": 8}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = TheirVAE(
            block_out_channels=[8, 8], down_block_types=["DownEncoderBlock2D"] * 2, sample_size=16,
            up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4, latent_channels=4, scaling_factor=0.18215,
        )  # fmt: skip
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        unet = TheirUNet(
            block_out_channels=[8, 16], down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], layers_per_block=1,
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"], norm_num_groups=4, attention_head_dim=2,
            cross_attention_dim=16, sample_size=8,
        )  # fmt: skip
    unet.save_pretrained(root / "sd15" / "unet")
    vae.save_pretrained(root / "vae")
    clip.save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    return {
        "stabilityai/sd-vae-ft-mse": root / "vae",
        "openai/clip-vit-large-patch14": root / "clip",
        "stable-diffusion-v1-5/stable-diffusion-v1-5": root / "sd15",
    }
