"""The peer of `train.py`: a plain loop that trains diffusers' U-Net, in the manner of its text-to-image recipe.

    python benchmarks/plain_loop.py settings.json

The frozen VAE and text encoder run in every step, on pictures that loader processes decode; timesteps are drawn
independently; the average of the weights is diffusers' `EMAModel`. Everything else is as `train.py` has it: the same
pictures, first weights, objective, caption dropout, optimizer, schedule, clipping and precision. What makes it faster
is switched on where it does: the VAE in channels_last, fused AdamW, a multi-tensor average, captions tokenized once.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from transformers import CLIPTextModel, CLIPTokenizer


class Pictures(Dataset[Any]):
    """PNGs and token ids of their captions; some captions are the empty one."""

    def __init__(self, folder: Path, tokenizer: Any, dropout: float) -> None:
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        self.paths = [folder / row["file_name"] for row in rows]
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        self.ids = tokenizer([row["text"] for row in rows], **options).input_ids
        self.null = tokenizer([""], **options).input_ids[0]
        self.dropout = dropout
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with Image.open(self.paths[index]) as picture:
            image = self.transform(picture.convert("RGB"))
        return image, self.null if random.random() < self.dropout else self.ids[index]


def main(settings: dict[str, Any]) -> None:
    parts, out = Path(settings["parts"]), Path(settings["out"])
    optim, diffusion = settings["optim"], settings["diffusion"]
    torch.manual_seed(settings["seed"])
    tokenizer = CLIPTokenizer.from_pretrained(parts / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(parts / "text_encoder").requires_grad_(False).eval()
    vae = AutoencoderKL.from_pretrained(parts / "vae").requires_grad_(False).eval()
    vae.to(memory_format=torch.channels_last)
    unet = UNet2DConditionModel.from_pretrained(parts / "unet").train()
    scheduler = DDPMScheduler(
        num_train_timesteps=diffusion["num_train_timesteps"], beta_start=diffusion["beta_start"],
        beta_end=diffusion["beta_end"], beta_schedule=diffusion["beta_schedule"],
        prediction_type=diffusion["prediction_type"],
    )  # fmt: skip
    ema = EMAModel(unet.parameters(), decay=diffusion["ema_decay"], foreach=True)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=optim["lr"], weight_decay=optim["weight_decay"], **optim["arguments"]
    )
    rates = get_scheduler(
        optim["schedule"], optimizer, num_warmup_steps=optim["warmup_steps"], num_training_steps=settings["max_steps"]
    )
    pictures = Pictures(Path(settings["pictures"]), tokenizer, diffusion["caption_dropout"])
    workers = settings["num_workers"]
    loader = DataLoader(
        pictures, settings["batch_size"], shuffle=True, drop_last=True, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip

    times: list[float] = []
    while len(times) < settings["max_steps"]:
        for image, ids in loader:
            with torch.no_grad():
                moments = vae.encode(image.contiguous(memory_format=torch.channels_last)).latent_dist
                latents = moments.sample() * vae.config.scaling_factor
                context = text_encoder(ids)[0]
            noise = torch.randn_like(latents)
            t = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),))
            x_t = scheduler.add_noise(latents, noise, t)
            is_velocity = diffusion["prediction_type"] == "v_prediction"
            target = scheduler.get_velocity(latents, noise, t) if is_velocity else noise
            loss = F.mse_loss(unet(x_t, t, context, return_dict=False)[0], target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), optim["clip_norm"])
            optimizer.step()
            rates.step()
            optimizer.zero_grad(set_to_none=True)
            ema.step(unet.parameters())
            times.append(time.time())
            if settings["every"] and len(times) % settings["every"] == 0:
                ema.store(unet.parameters())
                ema.copy_to(unet.parameters())
                state = {name: tensor.contiguous() for name, tensor in unet.state_dict().items()}
                save_file(state, out / f"step-{len(times):06d}.safetensors")
                ema.restore(unet.parameters())
            if len(times) == settings["max_steps"]:
                break
    ema.copy_to(unet.parameters())
    unet.save_pretrained(out / "unet")
    (out / "times.json").write_text(json.dumps(times), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
