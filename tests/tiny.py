"""The smallest networks that still have every part, with random weights everywhere: fresh ones end in zeros."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ldm.conditioner import Conditioner, train_tokenizer
from ldm.diffusion.schedule import NoiseSchedule
from ldm.nn.autoencoder import AutoencoderKL
from ldm.nn.clip import CLIP, TextTower
from ldm.nn.unet import UNet
from ldm.weights.folder import save_network, save_pipeline_index

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
VAE: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
    "scaling_factor": 0.8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
CAPTIONS = ("a large red circle on the left of a blue background", "a small green star, on black", "ein Pokémon 🙂")


@torch.no_grad()
def scrambled(module: nn.Module, seed: int = 0) -> Any:
    """Give every parameter a random value, of a size that keeps activations about as large as they come in."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            parameter.copy_(float("norm" in name and name.endswith("weight")) + 0.1 * noise)
        else:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return module.eval()


def unet(seed: int = 0, **options: Any) -> UNet:
    return scrambled(UNet(**{**UNET, **options}), seed)


def vae(seed: int = 1, **options: Any) -> AutoencoderKL:
    return scrambled(AutoencoderKL(**{**VAE, **options}), seed)


@lru_cache
def tokenizer() -> Any:
    return train_tokenizer(CAPTIONS, vocab_size=560, max_length=TEXT["max_position_embeddings"])


def text_options(**options: Any) -> dict[str, Any]:
    ids = {"vocab_size": len(tokenizer()), "eos_token_id": tokenizer().eos_token_id}
    return {**TEXT, **ids, **options}


def text_tower(seed: int = 2, **options: Any) -> TextTower:
    return scrambled(TextTower(**text_options(**options)), seed)


def clip(seed: int = 3) -> CLIP:
    return scrambled(CLIP(text_options(), VISION, projection_dim=8), seed)


def conditioner(seed: int = 2) -> Conditioner:
    return Conditioner(tokenizer(), text_tower(seed)).eval()


def write_model_folder(folder: Path, prediction_type: str = "epsilon", **unet_options: Any) -> Path:
    """Write a whole model folder."""
    save_network(unet(**unet_options), folder / "unet")
    save_network(vae(), folder / "vae")
    save_network(text_tower(), folder / "text_encoder")
    tokenizer().save_pretrained(folder / "tokenizer")
    settings = {"sampler": "ddim", "steps": 5, "guidance_scale": 3.0}
    save_pipeline_index(folder, NoiseSchedule(), prediction_type, settings)
    return folder


class Pixels:
    """A source of `num` random pictures of the given side."""

    def __init__(self, num: int, side: int = 16, seed: int = 0) -> None:
        self.pixels = np.random.default_rng(seed).integers(0, 256, (num, side, side, 3), dtype=np.uint8)
        self.texts = [f"a red circle number {i}" for i in range(num)]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.pixels[index], "captions": [self.texts[index]]}

    def captions(self) -> list[list[str]]:
        return [[text] for text in self.texts]

    def sizes(self) -> Any:
        return np.full((len(self), 2), self.pixels.shape[1], np.int32)

    def fingerprint(self) -> str:
        return repr((self.pixels.tobytes(), self.texts))
