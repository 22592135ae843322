"""Train the VAE: reconstruct pictures through a small Gaussian bottleneck.

B batch, C latent channels, h w latents, H W pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from ldm.config import AutoencoderStage
from ldm.data.images import WHITE, to_pixels
from ldm.data.pictures import Pictures
from ldm.errors import UserError
from ldm.evaluation.distances import frechet_metric
from ldm.evaluation.features import InceptionFeatures
from ldm.evaluation.real import to_rgb
from ldm.nn.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm.nn.discriminator import PatchDiscriminator
from ldm.ranks import say
from ldm.training.flops import count_flops, on_meta, twin
from ldm.training.module import StageModule, randn, step_generator
from ldm.training.optim import build_optimizer
from ldm.training.perceptual import LPIPS

SSIM_WINDOW = 11


class AutoencoderModule(StageModule):
    """LightningModule of the VAE stage.

    LDM (arXiv:2112.10752) Eq. 25, with the weights w of the config:

        L = L_rec / exp(s) + s + w_kl KL(q(z|x) ‖ N(0, I)) + w_adv λ L_adv(x̂),   x̂ = D(z), z ~ q(z|x)
        L_rec = w_1 |x - x̂| + w_2 (x - x̂)² + w_p LPIPS(x, x̂),                   L_adv = -mean(ψ(x̂)).

    Every term is a mean, over pixels, latents, positions or patches, so that none depends on resolution. The square
    moves large errors first. s, zero unless `learned_logvar`, is the logarithm of the error to be expected, by which
    the likelihood is calibrated (arXiv:1903.05789, arXiv:2006.13202). λ is `adaptive_weight`.

    The discriminator ψ is there from step `start` on: the VAE's step leaves its parameters alone, and its own step
    follows, on the same pictures, past Lightning. So a global step is a step of the VAE, for the schedule, the average,
    `max_steps` and `start` alike.

    Validation shows held-out pictures to the average, where there is one: PSNR, SSIM and LPIPS as means over batches,
    and with `rfid` the Fréchet distance of Inception's features between all pictures that it sees and their
    reconstructions by the posterior's mean. As any FID it is too large over few, see `trainer.val_batches`.

    Raises:
        UserError: LPIPS or rFID was asked for and the weights cannot be had.
    """

    stage = "autoencoder"
    logvar: nn.Parameter | None

    def __init__(self, vae: AutoencoderKL, config: AutoencoderStage, seed: int) -> None:
        super().__init__(vae, config.optim, config.max_steps, seed, config.ema_decay)
        self.config = config
        if config.train == "decoder":
            for part in (vae.encoder, vae.quant_conv):
                if part is not None:
                    part.requires_grad_(False)
        self.register_parameter("logvar", nn.Parameter(torch.zeros(())) if config.learned_logvar else None)
        # Outside the module tree: no checkpoint and no gradient synchronisation sees it.
        self.frozen: tuple[LPIPS, ...] = ()
        for name, looks in (("perceptual=null", config.perceptual), ("rfid=false", config.rfid)):
            if looks and vae.config["out_channels"] == 4:
                raise UserError(f"LPIPS and Inception see RGB, and this VAE has alpha: set autoencoder.{name}")
        if config.perceptual:
            self.frozen = (LPIPS(config.perceptual),)
        self.inception: InceptionFeatures | None = None
        if config.rfid:
            weights = config.rfid if isinstance(config.rfid, str) else None
            self.inception = InceptionFeatures(
                weights, torch.device("cpu"), "autoencoder.rfid", "autoencoder.rfid=false trains all the same"
            )
            self.frechet = frechet_metric(self.inception.num_features)
        self.discriminator: PatchDiscriminator | None = None
        if config.discriminator:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.discriminator = PatchDiscriminator(
                    vae.config["out_channels"], config.discriminator.channels, config.discriminator.num_layers
                )
            # Without gradients but in its own step: neither the VAE's backward nor DDP, which wraps what has them, sees
            # its parameters.
            self.discriminator.requires_grad_(False)
            self.discriminator_optimizer = torch.optim.Adam(
                self.discriminator.parameters(), lr=config.discriminator.lr, betas=(0.5, 0.9)
            )
        self._shown: tuple[Tensor, Tensor] | None = None  # real pictures and reconstructions of this step
        self._discriminator_state: dict[str, Any] | None = None

    # ------------------------------------------------------------------------------------------------------- steps

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        losses, reconstruction = self.losses(self.network, image, self.generator(batch_idx), self.judged)
        if self.judged:
            self._shown = (image, reconstruction.detach())
        self.log_losses(losses, len(image))
        return losses["loss"]

    @property
    def judged(self) -> bool:
        """Whether the discriminator takes part in this step."""
        return self.config.discriminator is not None and self.global_step >= self.config.discriminator.start

    def flops_per_image(self, batch: Mapping[str, Any]) -> int:
        """Count those of the VAE; the networks that judge it are left out."""
        vae: Any = twin(self.network)
        return count_flops(lambda: vae.decode(DiagonalGaussian(vae.encode(on_meta(batch["image"]))).mode()))

    def on_validation_epoch_start(self) -> None:
        if self.inception is not None:
            self.frechet.reset()

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        image = batch["image"]
        losses, _ = self.losses(
            self.evaluated, image, step_generator(self.seed, batch_idx, rank=self.global_rank, device=self.device)
        )
        reconstruction = self.evaluated.decode(DiagonalGaussian(self.evaluated.encode(image)).mode())
        losses["psnr"] = 10 * torch.log10(4 / F.mse_loss(reconstruction, image))  # the range [-1, 1] is 2 wide
        if min(image.shape[-2:]) >= SSIM_WINDOW:
            losses["ssim"] = similarity(reconstruction, image)
        for lpips in self.frozen:
            losses["lpips"] = lpips(reconstruction, image).mean()
        self.log_losses(losses, len(image))
        if self.inception is not None:
            for pictures, real in ((image, True), (reconstruction, False)):
                features = self.inception.images(to_rgb(to_pixels(pictures), WHITE))
                self.frechet.update(features.to(self.device, torch.float64), real=real)

    def on_validation_epoch_end(self) -> None:
        if self.inception is not None:
            self.log("autoencoder/val_rfid", self.frechet.compute().float(), sync_dist=True)

    def losses(
        self, vae: Any, image: Tensor, generator: torch.Generator, judged: bool = False
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return every term and their weighted sum `loss`; and the reconstruction.

        Args:
            vae: to take; the trained one or the average.
            image: (B, 3, H, W) in [-1, 1].
            generator: of the posterior's noise.
            judged: whether the discriminator has a say.
        """
        posterior = DiagonalGaussian(vae.encode(image).float())  # a sum over all latents needs more than bf16
        noise = self.rows(lambda n: randn(n, posterior.mean.shape, generator), len(image))
        reconstruction = vae.decode(posterior.sample(noise))
        config = self.config
        losses = {"l1": F.l1_loss(reconstruction, image), "l2": F.mse_loss(reconstruction, image)}
        error = config.l1 * losses["l1"] + config.l2 * losses["l2"]
        if config.perceptual:
            losses["lpips"] = self.frozen[0](reconstruction, image).mean()
            error = error + config.perceptual.weight * losses["lpips"]
        if self.logvar is not None:
            losses["logvar"] = self.logvar
            error = error / self.logvar.exp() + self.logvar
        losses["kl"] = posterior.kl().mean() / posterior.mean[0].numel()
        loss = error + config.kl_weight * losses["kl"]
        if judged and config.discriminator and self.discriminator is not None:
            losses["adversarial"] = -self.discriminator(reconstruction).float().mean()
            weight = torch.tensor(config.discriminator.weight, device=loss.device)
            if config.discriminator.adaptive:
                weight = weight * adaptive_weight(error, losses["adversarial"], vae.decoder.conv_out.weight)
            losses["adversarial_weight"] = weight
            loss = loss + weight * losses["adversarial"]
        return {"loss": loss, **losses}, reconstruction

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self._shown is not None and self.stepped:
            self._train_discriminator(*self._shown)
        self._shown = None

    def _train_discriminator(self, image: Tensor, reconstruction: Tensor) -> None:
        assert self.discriminator is not None
        self.discriminator.requires_grad_(True)
        with self.trainer.precision_plugin.forward_context():
            loss = hinge_loss(self.discriminator(image).float(), self.discriminator(reconstruction).float())
        loss.backward()
        self.log_losses({"discriminator": loss}, len(image))
        parameters = list(self.discriminator.parameters())
        mean_over_ranks([p.grad for p in parameters if p.grad is not None])
        if self.usable(parameters, self.optim.clip_norm):
            self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad()
        self.discriminator.requires_grad_(False)

    # ------------------------------------------------------------------------------------- optimizers, checkpoints

    def configure_optimizers(self) -> Any:
        if self.logvar is None:
            return super().configure_optimizers()
        trained = nn.ModuleList([self.network, nn.ParameterList([self.logvar])])
        return build_optimizer(trained, self.optim, self.max_steps)

    @property
    def checkpoint_size(self) -> int:
        """About the bytes of a checkpoint in float32, with the discriminator and the two moments of its Adam."""
        judge = self.discriminator.parameters() if self.discriminator is not None else ()
        return super().checkpoint_size + 4 * 3 * sum(p.numel() for p in judge)

    def on_fit_start(self) -> None:
        for lpips in self.frozen:
            lpips.to(self.device)
        if self.inception is not None:
            self.inception.to(self.device)
            trainer: Any = self.trainer
            seen = trainer.limit_val_batches * self.config.batch_size * trainer.world_size
            num = min(seen, len(trainer.datamodule.val))
            if 0 < num < self.inception.num_features:  # the covariance is not of full rank
                say(f"  rFID over {num} held-out pictures is far too large: compare it over the same ones alone")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.discriminator is not None:
            checkpoint["discriminator_optimizer"] = self.discriminator_optimizer.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._discriminator_state = checkpoint.get("discriminator_optimizer")

    def on_train_start(self) -> None:
        super().on_train_start()
        if self._discriminator_state is not None:  # now that the parameters are where they are trained
            self.discriminator_optimizer.load_state_dict(self._discriminator_state)
            self._discriminator_state = None

    @torch.no_grad()
    def preview(self, network: AutoencoderKL, num_images: int) -> tuple[Tensor, Sequence[str]] | None:
        """Return held-out pictures and, after each, its reconstruction."""
        pictures: Pictures = self.trainer.datamodule.val  # type: ignore[attr-defined]
        batch = pictures.__getitems__([(i, 0) for i in range(min(num_images // 2, len(pictures)))])
        image = batch["image"].to(self.device)
        reconstruction = network.decode(DiagonalGaussian(network.encode(image)).mode())
        pairs = torch.stack([image, reconstruction], dim=1).flatten(0, 1)
        return pairs, [text for caption in batch["caption"] for text in (caption, "reconstruction")]


def adaptive_weight(error: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Return the λ that gives the adversarial gradient the length of the reconstruction error's.

    taming-transformers (arXiv:2012.09841) Eq. 7:  λ = ‖∇ L_rec‖ / (‖∇ L_adv‖ + δ),  with respect to the weights of the
    decoder's last layer, δ = 1e-6; as in its code at most 1e4.
    """
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (error, adversarial)]
    mean_over_ranks(gradients)
    of_error, of_adversarial = (gradient.norm() for gradient in gradients)
    return (of_error / (of_adversarial + 1e-6)).clamp(max=1e4)


def similarity(image: Tensor, other: Tensor) -> Tensor:
    """Return the mean SSIM (Wang et al. 2004, Eq. 13) of images (B, C, H, W), cut to [-1, 1], in float32."""
    with torch.autocast(image.device.type, enabled=False):  # differences of squares need all their digits
        found = structural_similarity_index_measure(image.float(), other.float(), data_range=(-1.0, 1.0))
    assert isinstance(found, Tensor)
    return found


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss, of logits of any shape: (mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2.

    Geometric GAN (arXiv:1705.02894) Eq. 27, halved as in taming-transformers.
    """
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


@torch.no_grad()
def mean_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Average tensors over the processes of a run, in place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        parts = flat.div_(torch.distributed.get_world_size()).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


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
