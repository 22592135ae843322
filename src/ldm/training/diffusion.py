"""Train the latent U-Net over a frozen VAE and a frozen text encoder.

B batch, C latent channels, h w latents, L tokens, D width, T training steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.conditioner import Conditioner
from ldm.config import Diffusion, Optim, Sampling
from ldm.diffusion.guidance import drop_captions
from ldm.diffusion.loss import diffusion_loss, stratified_timesteps
from ldm.diffusion.schedule import NoiseSchedule
from ldm.nn.autoencoder import AutoencoderKL
from ldm.nn.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline
from ldm.training.module import StageModule, step_generator


class DiffusionModule(StageModule):
    """LightningModule of the U-Net stage.

    A batch is {"image", "caption"}, encoded here, or {"moments", "context"} from the cache. The frozen parts stay
    outside the module tree: no checkpoint, optimizer or gradient synchronisation sees them.

    Args:
        unet: what is trained.
        schedule: noise schedule.
        config: prediction type, caption dropout, EMA.
        optim, max_steps, seed: see `StageModule`.
        vae, conditioner: frozen, in eval mode.
        sampling: how previews are drawn.
        prompts: captions of the previews.
    """

    stage = "diffusion"

    def __init__(
        self,
        unet: UNet,
        schedule: NoiseSchedule,
        config: Diffusion,
        optim: Optim,
        max_steps: int,
        seed: int,
        vae: AutoencoderKL,
        conditioner: Conditioner,
        sampling: Sampling,
        prompts: Sequence[str] = (),
    ) -> None:
        super().__init__(unet, optim, max_steps, seed, config.ema_decay)
        self.schedule, self.config, self.sampling, self.prompts = schedule, config, sampling, prompts
        self.frozen = (vae, conditioner)
        self.register_buffer("null_context", conditioner.null_context().detach().clone(), persistent=False)

    def on_fit_start(self) -> None:
        for module in self.frozen:
            module.to(self.device)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        generator = self.generator(batch_idx)
        x_0, context = self.encode(batch, generator)
        drop = torch.rand(len(x_0), generator=generator, device=self.device) < self.config.caption_dropout
        context = drop_captions(context, self.null_context, drop)  # type: ignore[arg-type]
        loss = self.loss(self.network, x_0, context, generator)
        self.log_losses({"loss": loss}, len(x_0))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        generator = step_generator(self.seed, batch_idx, rank=self.global_rank, device=self.device)
        x_0, context = self.encode(batch, generator)
        self.log_losses({"loss": self.loss(self.evaluated, x_0, context, generator)}, len(x_0))

    def encode(self, batch: Mapping[str, Any], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return freshly sampled latents (B, C, h, w) and context (B, L, D)."""
        vae, conditioner = self.frozen
        with torch.no_grad():
            moments = batch["moments"] if "moments" in batch else vae.encode(batch["image"])
            context = batch["context"] if "context" in batch else conditioner(batch["caption"])
            shape = (len(moments), moments.shape[1] // 2, *moments.shape[2:])
            noise = torch.randn(shape, generator=generator, device=generator.device)
            return vae.latents(moments, noise), context

    def loss(self, unet: Any, x_0: Tensor, context: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mean loss at freshly drawn timesteps and noise."""
        t = stratified_timesteps(len(x_0), self.schedule.num_train_timesteps, generator)
        noise = torch.randn(x_0.shape, generator=generator, device=generator.device)
        x_0 = x_0.contiguous(memory_format=torch.channels_last)
        noise = noise.contiguous(memory_format=torch.channels_last)
        return diffusion_loss(unet, self.schedule, self.config.prediction_type, x_0, context, t, noise).mean()

    def preview(self, num_images: int) -> tuple[Tensor, Sequence[str]] | None:
        """Draw the fixed prompts from fixed noise with the averaged weights."""
        prompts = list(self.prompts[:num_images])
        vae, conditioner = self.frozen
        pipeline = LatentDiffusionPipeline(
            self.evaluated,
            vae,
            conditioner,
            self.schedule,
            self.config.prediction_type,
            settings=self.sampling.model_dump(),
        )
        size = self.evaluated.config["sample_size"] * vae.downscale_factor
        images = pipeline.generate(prompts, range(self.seed, self.seed + len(prompts)), height=size, width=size)
        return torch.stack(list(images)), prompts
