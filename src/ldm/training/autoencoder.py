"""Train the VAE: reconstruct pictures through a small Gaussian bottleneck.

B batch, C latent channels, h w latents, H W pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.config import AutoencoderStage
from ldm.data.pictures import Pictures
from ldm.nn.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm.training.module import StageModule, step_generator


class AutoencoderModule(StageModule):
    """LightningModule of the VAE stage.

    LDM (arXiv:2112.10752) section 3.1:  L = |x - x̂| + (x - x̂)² + λ KL(q(z|x) ‖ N(0, I)),  x̂ = D(z), z ~ q(z|x), the
    errors means over pixels and the divergence a mean over latents, so that none depends on resolution. The square
    moves large errors first. Each term is an entry of `losses`; perceptual and
    adversarial terms would be two more.
    """

    stage = "autoencoder"

    def __init__(self, vae: AutoencoderKL, config: AutoencoderStage, seed: int) -> None:
        super().__init__(vae, config.optim, config.max_steps, seed, config.ema_decay)
        self.kl_weight = config.kl_weight

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        losses = self.losses(self.network, image, self.generator(batch_idx))
        self.log_losses(losses, len(image))
        return losses["loss"]

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        image = batch["image"]
        losses = self.losses(
            self.evaluated, image, step_generator(self.seed, batch_idx, rank=self.global_rank, device=self.device)
        )
        error = F.mse_loss(self.evaluated.decode(DiagonalGaussian(self.evaluated.encode(image)).mode()), image)
        losses["psnr"] = 10 * torch.log10(4 / error)  # the range [-1, 1] is 2 wide
        self.log_losses(losses, len(image))

    def losses(self, vae: Any, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return every term and their weighted sum `loss`; `image` is (B, 3, H, W) in [-1, 1]."""
        posterior = DiagonalGaussian(vae.encode(image).float())  # a sum over all latents needs more than bf16
        noise = torch.randn(posterior.mean.shape, generator=generator, device=generator.device)
        reconstruction = vae.decode(posterior.sample(noise))
        l1, l2 = F.l1_loss(reconstruction, image), F.mse_loss(reconstruction, image)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": l1 + l2 + self.kl_weight * kl, "l1": l1, "l2": l2, "kl": kl}

    @torch.no_grad()
    def preview(self, num_images: int) -> tuple[Tensor, Sequence[str]] | None:
        """Return held-out pictures and, after each, its reconstruction."""
        pictures: Pictures = self.trainer.datamodule.val  # type: ignore[attr-defined]
        batch = pictures.__getitems__([(i, 0) for i in range(min(num_images // 2, len(pictures)))])
        image = batch["image"].to(self.device)
        reconstruction = self.evaluated.decode(DiagonalGaussian(self.evaluated.encode(image)).mode())
        pairs = torch.stack([image, reconstruction], dim=1).flatten(0, 1)
        return pairs, [text for caption in batch["caption"] for text in (caption, "reconstruction")]


@torch.inference_mode()
def latent_statistics(
    vae: AutoencoderKL, pictures: Pictures, batch_size: int, most: int = 2048
) -> tuple[Tensor, Tensor]:
    """Measure mean and standard deviation of each latent channel over a training set, in float64.

    The variance is that of a *sampled* latent: E[μ² + σ²] - E[μ]².

    Args:
        vae: in eval mode.
        pictures: the training set; of a larger one, `most` pictures spread evenly over it are taken.
        batch_size: of encoding.
        most: pictures at most; each has h·w latents a channel, so that 2048 leave an error of about one percent.

    Returns:
        Two (C,) float32 tensors.
    """
    device = next(vae.parameters()).device
    count = min(len(pictures), most)
    indices = [i * len(pictures) // count for i in range(count)]
    sums = torch.zeros(2, vae.config["latent_channels"], dtype=torch.float64)
    num_values = 0
    for start in range(0, count, batch_size):
        image = pictures.images(indices[start : start + batch_size])
        image = image.to(device, memory_format=torch.channels_last)
        moments = vae.encode(image)
        # In units of latents, so that a scaling_factor that the VAE already has is kept in step.
        mean = vae.latents(moments).double()
        variance = (DiagonalGaussian(moments).std * vae.config["scaling_factor"]).double() ** 2
        sums += torch.stack([mean.sum((0, 2, 3)), (mean**2 + variance).sum((0, 2, 3))]).cpu()
        num_values += mean[:, 0].numel()
    mean, square = sums / num_values
    return mean.float(), (square - mean**2).sqrt().float()
