"""From words to pictures: a model folder, loaded once, and one `generate`.

B batch, C channels, h w latents, H W pixels.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from ldm.conditioner import NULL_CAPTION, Conditioner
from ldm.data.images import to_pixels
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import GuidedDenoiser
from ldm.diffusion.parameterization import check_prediction_type
from ldm.diffusion.samplers import SAMPLERS, SPACINGS, from_vp, sigma_grid, to_vp
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.nn.autoencoder import AutoencoderKL
from ldm.nn.clip import TextTower
from ldm.nn.unet import UNet
from ldm.weights.folder import SETTINGS, find_model, load_json, load_network, load_tokenizer

if TYPE_CHECKING:
    from PIL import Image

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LatentDiffusionPipeline:
    """A text-to-image model: U-Net, VAE, conditioner, noise schedule, and how to sample unless told otherwise.

    Args:
        unet, vae, conditioner: networks in eval mode on one device. The VAE is best left in float32.
        schedule: the noise schedule of training.
        prediction_type: what the U-Net predicts.
        grid: `spacing`, `steps_offset` and `final_sigma` of the step grid (see `sigma_grid`).
        settings: defaults of `sampler`, `steps` and `guidance_scale`.
    """

    def __init__(
        self,
        unet: UNet,
        vae: AutoencoderKL,
        conditioner: Conditioner,
        schedule: NoiseSchedule,
        prediction_type: str,
        grid: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.unet, self.vae, self.conditioner, self.schedule = unet, vae, conditioner, schedule
        self.prediction_type = prediction_type
        self.grid = dict(grid or {})
        self.settings = {"sampler": "ddim", "steps": 50, "guidance_scale": 7.5, **(settings or {})}

    @classmethod
    def from_pretrained(cls, path: str, dtype: str = "fp32", device: str = "auto") -> Self:
        """Load a model folder in diffusers' format, or a run directory that holds one.

        Args:
            path: folder.
            dtype: `fp32`, `bf16` or `fp16`, of the U-Net and the text encoder; the VAE stays in float32, which half
                precision may overflow.
            device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.

        Raises:
            UserError: the folder is not there, is of another kind, or holds what we do not support.
        """
        folder, torch_device = find_model(path), find_device(device)
        scheduler = load_json(folder / "scheduler" / "scheduler_config.json")
        try:
            schedule = NoiseSchedule.from_config(scheduler)
            prediction_type = scheduler.get("prediction_type", "epsilon")
            check_prediction_type(prediction_type)
            if (spacing := scheduler.get("timestep_spacing", "leading")) not in SPACINGS:
                raise ValueError(f"timestep_spacing={spacing!r} is not supported (only {', '.join(SPACINGS)})")
            if not isinstance(steps_offset := scheduler.get("steps_offset", 0), int) or steps_offset < 0:
                raise ValueError(f"steps_offset={steps_offset!r} is not supported (only whole numbers from 0)")
        except (ValueError, TypeError) as error:
            raise UserError(f"{folder / 'scheduler' / 'scheduler_config.json'}: {error}") from error
        to_one = scheduler.get("set_alpha_to_one", True)
        grid = {
            "spacing": spacing,
            "steps_offset": steps_offset,
            "final_sigma": 0.0 if to_one else float(schedule.sigmas[0]),
        }
        text_tower = load_network(TextTower, folder / "text_encoder", DTYPES[dtype])
        unet = load_network(UNet, folder / "unet", DTYPES[dtype])
        vae = load_network(AutoencoderKL, folder / "vae")
        tokenizer = load_tokenizer(folder / "tokenizer")
        if unet.config["cross_attention_dim"] != text_tower.config["hidden_size"]:
            raise UserError(
                f"{folder}: the U-Net listens to context of width {unet.config['cross_attention_dim']}, "
                f"the text encoder gives {text_tower.config['hidden_size']}"
            )
        for name in ("in_channels", "out_channels"):
            if unet.config[name] != vae.config["latent_channels"]:
                raise UserError(
                    f"{folder}: the U-Net has {name}={unet.config[name]}, the VAE {vae.config['latent_channels']} "
                    "latent channels; models that also see a mask or another picture are not for text alone"
                )
        try:
            conditioner = Conditioner(tokenizer, text_tower)
        except ValueError as error:
            raise UserError(f"{folder}: {error}") from error
        settings = load_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
        for module in (unet, vae, conditioner):
            module.to(torch_device).eval().requires_grad_(False)
        for network in (unet, vae):
            network.to(memory_format=torch.channels_last)
        return cls(unet, vae, conditioner, schedule, prediction_type, grid, settings)

    @property
    def downscale_factor(self) -> int:
        """Height and width in pixels must be divisible by this number."""
        return self.vae.downscale_factor * self.unet.downscale_factor

    @property
    def default_size(self) -> int:
        """Side in pixels of the pictures that the U-Net was trained on."""
        size = self.unet.config["sample_size"] or 64
        return (size if isinstance(size, int) else max(size)) * self.vae.downscale_factor

    def __call__(
        self, prompt: str | Sequence[str], negative_prompt: str = NULL_CAPTION, seed: int = 0, **options: Any
    ) -> "list[Image.Image]":
        """Draw a picture of each prompt; picture i is drawn from `seed + i`. Options are those of `generate`."""
        from PIL import Image

        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        images = self.generate(prompts, [seed + i for i in range(len(prompts))], negative_prompt, **options)
        return [Image.fromarray(to_pixels(image)) for image in images]

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        negative_prompt: str = NULL_CAPTION,
        *,
        steps: int | None = None,
        sampler: str | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 16,
    ) -> Iterator[Tensor]:
        """Draw pictures, giving each as soon as its batch is done.

        A picture is a function of its prompt, seed and settings, whatever the batch it is drawn in.

        Args:
            prompts: one for each picture.
            seeds: one for each picture.
            negative_prompt: what guidance leads away from.
            steps, sampler, guidance_scale: None for the model's own defaults.
            height, width: pixels; None for the size of training.
            batch_size: pictures drawn at once.

        Yields:
            (3, H, W) images in [-1, 1], in the order of the prompts.

        Raises:
            UserError: an unknown sampler; a size that the networks cannot halve; no steps, or more than training has;
                a seed out of range.
        """
        sampler = self.settings["sampler"] if sampler is None else sampler
        steps = self.settings["steps"] if steps is None else steps
        guidance_scale = self.settings["guidance_scale"] if guidance_scale is None else guidance_scale
        height, width = height or self.default_size, width or self.default_size
        if sampler not in SAMPLERS:
            raise UserError(f"sampler={sampler} is unknown; there are: {', '.join(SAMPLERS)}")
        if min(height, width) < 1 or height % self.downscale_factor or width % self.downscale_factor:
            raise UserError(
                f"height={height} width={width}: this model draws sizes divisible by {self.downscale_factor}"
            )
        if not 1 <= steps <= self.schedule.num_train_timesteps:
            raise UserError(f"steps={steps}: this model takes 1 to {self.schedule.num_train_timesteps} steps")
        if unfit := [seed for seed in seeds if not 0 <= seed < 2**64]:
            raise UserError(f"seed={unfit[0]}: seeds are whole numbers from 0 to 2^64 - 1")
        sigmas = sigma_grid(self.schedule, steps, **self.grid)
        for start in range(0, len(prompts), batch_size):
            chunk = slice(start, start + batch_size)
            # Pictures are handed out outside of inference mode: it would hold in the caller's code too.
            with torch.inference_mode():
                latents = self._draw(
                    prompts[chunk], seeds[chunk], negative_prompt, sampler, sigmas, guidance_scale, height, width
                )
                latents = latents.to(next(self.vae.parameters()).dtype, memory_format=torch.channels_last)
                images = self.vae.image(latents).float().clamp(-1, 1)
            yield from images

    def _draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        negative_prompt: str,
        sampler: str,
        sigmas: Tensor,
        guidance_scale: float,
        height: int,
        width: int,
    ) -> Tensor:
        """Return (B, C, h, w) latents in float32."""
        device, dtype = self.unet.conv_in.weight.device, self.unet.conv_in.weight.dtype
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        factor = self.vae.downscale_factor
        shape = (self.vae.config["latent_channels"], height // factor, width // factor)

        def noise(_: Tensor | None = None) -> Tensor:
            # Each picture has its own generator, on the CPU: the same draws on every device and in every batch.
            return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)

        def network(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return self.unet(x_t.to(dtype, memory_format=torch.channels_last), t, context)

        context = self.conditioner(prompts).to(dtype)
        null_context = self.conditioner([negative_prompt]).to(dtype)
        denoiser = Denoiser(network, self.schedule, self.prediction_type)
        denoise = GuidedDenoiser(denoiser, context, null_context, guidance_scale)
        x = SAMPLERS[sampler](denoise, from_vp(noise(), float(sigmas[0])), sigmas, noise)
        return to_vp(x, float(sigmas[-1]))


def find_device(device: str) -> torch.device:
    """Turn `auto` or a torch device string into a device that is there.

    Raises:
        UserError: it is not.
    """
    if device == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"device={device} is not available: {str(error).splitlines()[0]}") from error
    return found
