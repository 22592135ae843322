"""Train the latent U-Net over a frozen VAE and a frozen text encoder.

B batch, C latent channels, h w latents, L tokens, D width, T training steps.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ldm.conditioner import Conditioner
from ldm.config import Diffusion, Optim, Sampling
from ldm.diffusion.guidance import drop_captions
from ldm.diffusion.loss import diffusion_loss, draw_times, logit_normal, loss_weight, offset_noise, perturbed
from ldm.diffusion.schedule import FlowSchedule, NoiseSchedule
from ldm.nn.autoencoder import AutoencoderKL
from ldm.nn.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline
from ldm.training.flops import count_flops, on_meta, twin
from ldm.training.masks import latent_masks, random_masks, seeing
from ldm.training.module import StageModule, randn, step_generator

NUM_BANDS = 4
# Of the frozen VAE and text encoder, by the precision of training: Stable Diffusion's VAE overflows in fp16.
FROZEN_DTYPES = {"bf16-mixed": (torch.bfloat16, torch.bfloat16), "16-mixed": (None, torch.float16)}
M = TypeVar("M", bound=nn.Module)


class DiffusionModule(StageModule):
    """LightningModule of the U-Net stage.

    A batch is {"image", "caption"}, encoded here, or {"moments", "context"} from the cache. The frozen parts stay
    outside the module tree: no checkpoint, optimizer or gradient synchronisation sees them.

    Validation is of the plain objective, whatever training is weighted by: the squared error at timesteps spread
    evenly, with the same pictures, captions, timesteps and noise each time. It is logged for the average
    (`val_loss`) and for the weights in training (`val_loss_raw`), over all timesteps and in bands of them.

    Args:
        unet: what is trained.
        schedule: noise schedule.
        config: prediction type, loss, timesteps, noise, caption dropout, EMA.
        optim, max_steps, seed: see `StageModule`.
        vae, conditioner: frozen, in eval mode.
        sampling: how previews are drawn.
        prompts: captions of the previews.
    """

    stage = "diffusion"

    def __init__(
        self,
        unet: UNet,
        schedule: NoiseSchedule | FlowSchedule,
        config: Diffusion,
        optim: Optim,
        max_steps: int,
        seed: int,
        vae: AutoencoderKL,
        conditioner: Conditioner,
        sampling: Sampling,
        prompts: Sequence[str] = (),
    ) -> None:
        super().__init__(unet, optim, max_steps, seed, config.ema_decay, config.posthoc_ema)
        self.schedule, self.config, self.sampling, self.prompts = schedule, config, sampling, prompts
        self.frozen = (vae, conditioner)
        self.register_buffer("null_context", conditioner.null_context().detach().clone(), persistent=False)
        self.bands: dict[str, Tensor] = {}  # of each validation loss: its sum and the count of samples, by timestep

    def on_fit_start(self) -> None:
        """Put the frozen parts where training is; under mixed precision copies in half, the given ones stay whole."""
        vae, conditioner = self.frozen
        vae_dtype, text_dtype = FROZEN_DTYPES.get(str(self.trainer.precision), (None, None))
        self.frozen = _placed(vae, self.device, vae_dtype), _placed(conditioner, self.device, text_dtype)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        generator = self.generator(batch_idx)
        x_0, context = self.encode(batch, generator)
        unet = seeing(self.network, self.masked(batch, generator))
        drop = self.rows(lambda n: torch.rand(n, generator=generator, device=self.device), len(x_0))
        drop = drop < self.config.caption_dropout
        context = drop_captions(context, self.null_context, drop)  # type: ignore[arg-type]
        loss = self.loss(unet, x_0, context, generator)
        self.log_losses({"loss": loss}, len(x_0))
        return loss

    def encode(self, batch: Mapping[str, Any], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return freshly sampled latents (B, C, h, w) and context (B, L, D)."""
        conditioner = self.frozen[1]
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):  # they have the dtype to compute in
            moments = batch["moments"] if "moments" in batch else self._moments(batch["image"])
            context = batch["context"] if "context" in batch else conditioner(batch["caption"]).float()
            return self._latents(moments, generator), context

    def masked(self, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor | None:
        """Return what an inpainting U-Net sees beside x_t: (B, 1 + C, h, w); None where the U-Net is none.

        The picture is hidden before it is encoded, as in sampling: latents know of pixels around their own.
        """
        if not self.evaluated.sees_mask:
            return None
        vae, image = self.frozen[0], batch["image"]
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            share = self.share if self.training else (0, 1)
            masks = random_masks(len(image), image.shape[2], image.shape[3], generator, share)
            latents = self._latents(self._moments(image * (1 - masks)), generator)
            return torch.cat([latent_masks(masks, vae.downscale_factor), latents], dim=1)

    def _moments(self, image: Tensor) -> Tensor:
        vae = self.frozen[0]
        return vae.encode(image.to(next(vae.parameters()).dtype)).float()

    def _latents(self, moments: Tensor, generator: torch.Generator) -> Tensor:
        shape = (len(moments), moments.shape[1] // 2, *moments.shape[2:])
        noise = self.rows(lambda n: randn(n, shape, generator), len(moments))
        latents: Tensor = self.frozen[0].latents(moments, noise)
        return latents

    def loss(self, unet: Any, x_0: Tensor, context: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mean weighted loss at freshly drawn timesteps and noise."""
        config, batch = self.config, len(x_0)
        times = self.rows(lambda n: draw_times(n, generator, config.stratified), batch)  # spread over all ranks
        if config.timesteps == "logit_normal":
            times = logit_normal(times, config.timesteps_mean, config.timesteps_std)
        t = self.schedule.timesteps(times)

        def draw(num: int) -> Tensor:
            noise = randn(num, x_0.shape, generator)
            if config.offset_noise:
                noise = offset_noise(noise, config.offset_noise, generator)
            if not config.input_perturbation:
                return noise[:, None]
            return torch.stack([noise, perturbed(noise, config.input_perturbation, generator)], dim=1)

        noise, *others = self.rows(draw, batch).unbind(1)
        input_noise = others[0] if others else None
        huber_c = config.huber_c if config.loss == "huber" else None
        losses = self._losses(unet, x_0, context, t, noise, input_noise, huber_c)
        if config.weighting != "uniform":
            alpha, sigma = self.schedule.coefficients(t, x_0)
            snr = (alpha / sigma).square().flatten()
            losses = losses * loss_weight(
                config.weighting, config.prediction_type, snr, config.snr_gamma, config.p2_gamma, config.p2_k
            )
        return losses.mean()

    def _losses(
        self,
        unet: Any,
        x_0: Tensor,
        context: Tensor,
        t: Tensor,
        noise: Tensor,
        input_noise: Tensor | None = None,
        huber_c: float | None = None,
    ) -> Tensor:
        x_0, noise = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x_0, noise))
        return diffusion_loss(
            unet, self.schedule, self.config.prediction_type, x_0, context, t, noise, input_noise, huber_c
        )

    # ---------------------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        self.bands = {name: torch.zeros(2, NUM_BANDS, device=self.device) for name in ("loss", "loss_raw")}

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        generator = step_generator(self.seed, batch_idx, rank=self.global_rank, device=self.device)
        x_0, context = self.encode(batch, generator)
        t = self.schedule.timesteps(draw_times(len(x_0), generator))
        noise = torch.randn(x_0.shape, generator=generator, device=generator.device)
        seen = self.masked(batch, generator)
        means = {}
        for name, unet in (("loss", self.evaluated), ("loss_raw", self.network)):
            losses = self._losses(seeing(unet, seen), x_0, context, t, noise)
            means[name] = losses.mean()
            self._sum_up(name, losses, t)
        self.log_losses(means, len(x_0))

    def _sum_up(self, name: str, losses: Tensor, t: Tensor) -> None:
        """Add losses (B,) at t (B,) to the sum and the count of each band."""
        band = (t * NUM_BANDS // self.schedule.num_train_timesteps).long().clamp(max=NUM_BANDS - 1)
        losses = losses.detach().float()
        self.bands[name].index_add_(1, band, torch.stack([losses, torch.ones_like(losses)]))

    def on_validation_epoch_end(self) -> None:
        last = self.schedule.num_train_timesteps
        ends = [f"{edge:0{len(str(last - 1))}d}" for edge in np.arange(NUM_BANDS + 1) * last // NUM_BANDS]
        for name, sums in self.bands.items():
            total, count = self.trainer.strategy.reduce(sums, reduce_op="sum")
            for band in count.nonzero().flatten().tolist():
                key = f"{self.stage}/val_{name}/t{ends[band]}-{ends[band + 1]}"
                self.log(key, total[band] / count[band], sync_dist=True)

    def flops_per_image(self, batch: Mapping[str, Any]) -> int:
        vae, conditioner = self.frozen
        unet: Any = twin(self.network)
        null_context: Any = self.null_context  # (L, D)
        height, width = batch["moments"].shape[2:] if "moments" in batch else vae.latent_size(on_meta(batch["image"]))
        x_t = torch.empty(1, unet.config["in_channels"], height, width, device="meta")
        context = torch.empty(1, *null_context.shape, device="meta")
        t = torch.empty(1, dtype=torch.int64, device="meta")
        flops = count_flops(lambda: unet(x_t, t, context))
        with torch.no_grad():
            if "moments" not in batch:
                encodings = 2 if self.evaluated.sees_mask else 1  # of the masked picture as well
                flops += encodings * count_flops(lambda: twin(vae).encode(on_meta(batch["image"])))
            if "context" not in batch:
                ids = torch.empty(1, len(null_context), dtype=torch.int64, device="meta")
                flops += count_flops(lambda: twin(conditioner.text_tower)(ids)[0])
        return flops

    def pipeline(self, unet: UNet) -> LatentDiffusionPipeline:
        """Return what draws with `unet`, the average or the weights in training, as `sample.py` will."""
        settings = self.sampling.model_dump()
        return LatentDiffusionPipeline(
            unet, *self.frozen, self.schedule, self.config.prediction_type, settings=settings
        )

    def preview(self, network: UNet, num_images: int) -> tuple[Tensor, Sequence[str]] | None:
        """Draw the fixed prompts from fixed noise; an inpainting U-Net draws all of it."""
        prompts = list(self.prompts[:num_images])
        pipeline = self.pipeline(network)
        size = pipeline.default_size
        ground: dict[str, Any] = {}
        if network.sees_mask:
            white = np.full((size, size), 255, np.uint8)
            ground = {"init_image": white, "mask": white}
        seeds = range(self.seed, self.seed + len(prompts))
        images = pipeline.generate(prompts, seeds, height=size, width=size, **ground)
        return torch.stack(list(images)), prompts


def _placed(part: M, device: torch.device, dtype: torch.dtype | None) -> M:
    """Return a part on a device; with a dtype a copy, since what was given is saved with the model."""
    return part.to(device) if dtype is None else copy.deepcopy(part).to(device, dtype)
