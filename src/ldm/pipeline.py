"""From words to pictures: a model, loaded once, and one `generate` for text2img, img2img and inpainting.

B batch, C channels (of latents, or of pictures: 1 grey, 3 RGB, 4 RGBA), h w latents, H W pixels, L tokens, D width.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from ldm.canvas import Canvas, Picture, composite, latent_mask, make_canvas, masked_image
from ldm.codec import Codec
from ldm.conditioner import NULL_CAPTION, Conditioner
from ldm.data.images import MODES, to_pil, to_pixels, to_tensor
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grids import sigma_grid, start
from ldm.diffusion.guidance import GuidedDenoiser
from ldm.diffusion.masking import MaskedDenoiser
from ldm.diffusion.samplers import SAMPLERS, to_vp
from ldm.diffusion.schedule import FlowSchedule, NoiseSchedule
from ldm.errors import UserError
from ldm.nn.autoencoder import AutoencoderKL
from ldm.nn.unet import UNet
from ldm.options import Options, default_strength, resolve
from ldm.scheduler import read_scheduler
from ldm.weights.model import load_model

if TYPE_CHECKING:
    from PIL import Image

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Progress = Callable[[int, int, Tensor], None]
"""callback(step, num_steps, latents) after each step of a batch: its number from 0, and the x̂_0 that it led to."""


@dataclass(frozen=True)
class Ground:
    """A canvas as the networks see it: (1, 2C, h, w) moments, (1, 1, h, w) mask, moments of the masked picture."""

    moments: Tensor
    mask: Tensor | None
    masked: Tensor | None


class LatentDiffusionPipeline:
    """A text-to-image model: U-Net, VAE, conditioner, noise schedule, and how to sample unless told otherwise.

    Args:
        unet, vae, conditioner: networks in eval mode on one device.
        schedule: of the noise, as in training.
        prediction_type: what the U-Net predicts.
        grid: `spacing`, `steps_offset` and `final_sigma` of the step grid (see `sigma_grid`).
        settings: defaults of `sampler`, `steps` and `guidance_scale`.
        unet_file: where the U-Net's weights lie, if they do: what a model hash is taken of.
    """

    def __init__(
        self,
        unet: UNet,
        vae: AutoencoderKL,
        conditioner: Conditioner,
        schedule: NoiseSchedule | FlowSchedule,
        prediction_type: str,
        grid: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        unet_file: Path | None = None,
    ) -> None:
        self.unet, self.vae, self.conditioner, self.schedule = unet, vae, conditioner, schedule
        self.codec = Codec(vae)
        self.prediction_type = prediction_type
        self.grid = {"spacing": "trailing", "steps_offset": 0, "final_sigma": 0.0, **(grid or {})}
        self.settings = {"sampler": "ddim", "steps": 50, "guidance_scale": 7.5, **(settings or {})}
        self.unet_file = unet_file

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: str | torch.dtype = "fp32",
        device: str | torch.device = "auto",
        *,
        vae: str | None = None,
        text_encoder: str | None = None,
        unet: str | None = None,
        tokenizer: str | None = None,
        prediction_type: str | None = None,
        variant: str | None = None,
    ) -> Self:
        """Load a model: a folder in diffusers' format, a run directory, a hub id or a single file.

        Args:
            path: of the model.
            dtype: `fp32`, `bf16` or `fp16`, or torch's; a VAE whose values leave the range of fp16 runs in fp32.
            device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
            vae, text_encoder, unet, tokenizer: parts from elsewhere.
            prediction_type: what the U-Net predicts, where a single file cannot say.
            variant: of a folder's files, such as fp16.

        Raises:
            UserError: it is not there, is of another kind, or holds what we do not support.
        """
        torch_device = find_device(str(device))
        if isinstance(dtype, str) and dtype not in DTYPES:
            raise UserError(f"dtype={dtype} is unknown; there are: {', '.join(DTYPES)}")
        model = load_model(
            str(path),
            DTYPES[dtype] if isinstance(dtype, str) else dtype,
            vae=vae,
            text_encoder=text_encoder,
            unet=unet,
            tokenizer=tokenizer,
            prediction_type=prediction_type,
            variant=variant,
        )
        for name in ("in_channels", "out_channels"):
            if model.vae.config[name] not in MODES:
                raise UserError(
                    f"{path}: the VAE has {name}={model.vae.config[name]}; pictures have 1 (grey), 3 (RGB) or 4 (RGBA)"
                )
        try:
            schedule, predicted, grid, sampler = read_scheduler(model.scheduler)
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # the file may hold anything
            raise UserError(f"{path}: scheduler/scheduler_config.json: {error}") from error
        try:
            conditioner = Conditioner(model.tokenizer, model.text_tower)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        for module in (model.unet, model.vae, conditioner):
            module.to(torch_device).eval().requires_grad_(False)
        for network in (model.unet, model.vae):
            network.to(memory_format=torch.channels_last)
        settings = {"sampler": sampler, **model.settings}
        return cls(model.unet, model.vae, conditioner, schedule, predicted, grid, settings, model.unet_file)

    @property
    def downscale_factor(self) -> int:
        """Height and width in pixels must be divisible by this number."""
        return self.vae.downscale_factor * self.unet.downscale_factor

    @property
    def default_size(self) -> int:
        """Side in pixels of the pictures that the U-Net was trained on."""
        size = self.unet.config["sample_size"] or 64
        return (size if isinstance(size, int) else max(size)) * self.vae.downscale_factor

    @property
    def sees_mask(self) -> bool:
        """Whether the U-Net is one for inpainting, which is shown the mask and the masked picture."""
        return self.unet.sees_mask

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = NULL_CAPTION,
        seed: int | Sequence[int] = 0,
        num_images: int = 1,
        **options: Any,
    ) -> "list[Image.Image]":
        """Draw pictures of each prompt. Options are those of `generate`.

        Args:
            prompt: one, or several.
            negative_prompt: one for all, or one for each prompt.
            seed: picture i of the call is drawn from `seed + i`; several seeds are those of each prompt's pictures.
            num_images: of each prompt, where there is one seed.

        Returns:
            Pictures of mode L, RGB or RGBA, by the channels that the VAE gives.
        """
        if not isinstance(seed, int) and num_images != 1:
            raise UserError(f"seed={list(seed)} draws a picture for each seed: leave num_images out")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        asked = [(text, negative) for text, negative in zip(prompts, negatives, strict=True) for _ in range(num_images)]
        seeds = [seed + i for i in range(len(asked))] if isinstance(seed, int) else list(seed) * len(prompts)
        if not isinstance(seed, int):
            asked = [pair for pair in asked[::num_images] for _ in seed]
        images = self.generate([text for text, _ in asked], seeds, [negative for _, negative in asked], **options)
        return [to_pil(to_pixels(image)) for image in images]

    def resolve(self, options: Options) -> Options:
        """Fill in what this model decides, and check the rest; raises a UserError where they do not fit."""
        defaults = {name: self.settings[name] for name in ("sampler", "steps", "guidance_scale")}
        defaults["spacing"] = self.grid["spacing"]
        return resolve(options, defaults, self.schedule.num_train_timesteps, self.conditioner.num_layers)

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        negative_prompt: str | Sequence[str] = NULL_CAPTION,
        *,
        height: int | None = None,
        width: int | None = None,
        init_image: Picture | None = None,
        mask: Picture | None = None,
        outpaint: str | None = None,
        mask_blur: int = 0,
        batch_size: int = 16,
        vae_tile: int | None = None,
        callback: Progress | None = None,
        **options: Any,
    ) -> Iterator[Tensor]:
        """Draw pictures, giving each as soon as its batch is done.

        A picture is a function of its prompt, seed and settings, whatever the batch it is drawn in.

        Args:
            prompts: one for each picture.
            seeds: one for each picture.
            negative_prompt: what guidance leads away from; one for all, or one for each picture.
            height, width: pixels; None for the size of training, or of `init_image`.
            init_image: what to draw upon (img2img); see `ldm.canvas.make_canvas` for kinds and sizes.
            mask: white is repainted, black is kept to the pixel (inpainting).
            outpaint: `left:64,top:32`, pixels by which the picture grows.
            mask_blur: pixels over which the edge of the mask is soft.
            batch_size: pictures drawn at once.
            vae_tile: side in pixels of the tiles that the VAE works in; None works on whole pictures.
            callback: called after each step.
            options: those of `Options`.

        Returns:
            An iterator of (C, H, W) images in [-1, 1], in the order of the prompts.

        Raises:
            UserError: options that do not fit the model; a picture or mask that cannot be used; a seed out of range.
        """
        chosen = self.resolve(Options(**options))
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: at least one picture is drawn at once")
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        if not len(prompts) == len(seeds) == len(negatives):
            raise UserError(
                f"{len(prompts)} prompts, {len(seeds)} seeds, {len(negatives)} negative prompts: give as many"
            )
        if unfit := [seed for seed in seeds if not 0 <= seed < 2**64]:
            raise UserError(f"seed={unfit[0]}: seeds are whole numbers from 0 to 2^64 - 1")
        canvas = self._canvas(init_image, mask, outpaint, mask_blur, height, width)
        if canvas is None:
            size = height or self.default_size, width or self.default_size
            self._check_size(*size)
            if chosen.strength is not None:
                raise UserError("strength= belongs to init_image=, the picture to draw upon")
        else:
            size = canvas.pixels.shape[0], canvas.pixels.shape[1]
            if chosen.strength is None:
                chosen = replace(chosen, strength=default_strength(canvas.mask is not None))
        sigmas = self._sigmas(chosen)

        def pictures() -> Iterator[Tensor]:
            with torch.inference_mode():
                ground = None if canvas is None else self._ground(canvas, vae_tile)
            for begin in range(0, len(prompts), batch_size):
                chunk = slice(begin, begin + batch_size)
                # Pictures are handed out outside of inference mode: it would hold in the caller's code too.
                with torch.inference_mode():
                    latents = self._draw(
                        prompts[chunk], negatives[chunk], seeds[chunk], chosen, sigmas, size, ground, callback
                    )
                    images = self.decode(latents, vae_tile)
                for image in images:
                    yield image if canvas is None or canvas.mask is None else composite(canvas, image)

        return pictures()

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Map latents (B, C, h, w) to images (B, C, H, W) in [-1, 1]; see `Codec`."""
        return self.codec.decode(latents, tile)

    def _check_size(self, height: int, width: int) -> None:
        if min(height, width) < 1 or height % self.downscale_factor or width % self.downscale_factor:
            raise UserError(
                f"height={height} width={width}: this model draws sizes divisible by {self.downscale_factor}"
            )

    def _canvas(
        self,
        init_image: Picture | None,
        mask: Picture | None,
        outpaint: str | None,
        mask_blur: int,
        height: int | None,
        width: int | None,
    ) -> Canvas | None:
        if init_image is None:
            if mask is not None or outpaint or mask_blur:
                raise UserError("mask=, mask_blur= and outpaint= belong to init_image=, the picture to draw upon")
            if self.sees_mask:
                raise UserError("this is an inpainting model: give init_image= and mask= (or outpaint=)")
            return None
        canvas = make_canvas(
            init_image,
            mask,
            height=height,
            width=width,
            factor=self.downscale_factor,
            default_size=self.default_size,
            outpaint=outpaint,
            mask_blur=mask_blur,
            channels=self.vae.config["in_channels"],
        )
        if self.sees_mask and canvas.mask is None:
            raise UserError("this is an inpainting model: give mask= (or outpaint=) with init_image=")
        return canvas

    def _sigmas(self, options: Options) -> Tensor:
        """Return the noise levels to walk down, (N + 1,); with a strength the last ones of them."""
        assert options.steps and options.sampler and options.spacing
        sigmas = sigma_grid(
            self.schedule,
            options.steps,
            options.sampler,
            options.spacing,
            self.grid["steps_offset"],
            self.grid["final_sigma"],
        )
        if options.strength is None:
            return sigmas
        num_steps = int(options.steps * options.strength)
        if num_steps < 1:
            digits = 10 ** len(str(options.steps))
            least = -(-digits // options.steps) / digits
            raise UserError(
                f"strength={options.strength} of {options.steps} steps is less than one step: take more steps, or "
                f"strength={least:g} and more"
            )
        return sigmas[options.steps - num_steps :]

    def _ground(self, canvas: Canvas, tile: int | None) -> "Ground":
        device = self.unet.conv_in.weight.device
        mask = None if canvas.mask is None else latent_mask(canvas.mask, self.vae.downscale_factor).to(device)
        moments = self.codec.encode(to_tensor(canvas.pixels)[None], tile)
        masked = self.codec.encode(masked_image(canvas), tile) if self.sees_mask else None
        return Ground(moments, mask, masked)

    def _draw(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str],
        seeds: Sequence[int],
        options: Options,
        sigmas: Tensor,
        size: tuple[int, int],
        ground: "Ground | None",
        callback: Progress | None,
    ) -> Tensor:
        """Return (B, C, h, w) latents in float32."""
        assert options.sampler and options.spacing and options.guidance_scale is not None
        device, dtype = self.unet.conv_in.weight.device, self.unet.conv_in.weight.dtype
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        factor = self.vae.downscale_factor
        shape = (self.vae.config["latent_channels"], size[0] // factor, size[1] // factor)

        def noise(_: Tensor | None = None) -> Tensor:
            # Each picture has its own generator, on the CPU: the same draws on every device and in every batch.
            return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)

        # The draws come in diffusers' order: posterior, noise, posterior of the masked picture, then the sampler's.
        first = float(sigmas[0])
        from_noise = ground is None or (ground.mask is not None and options.strength == 1)
        x_0 = extra = None
        if ground is not None and not (from_noise and self.sees_mask):
            x_0 = self.vae.latents(ground.moments, noise())
        eps = noise()
        if from_noise:
            x = start(eps, sigmas, self.schedule, options.sampler, options.spacing)
        else:
            assert x_0 is not None
            x = x_0 + first * eps
        if ground is not None and ground.mask is not None and ground.masked is not None:
            seen = self.vae.latents(ground.masked, noise())
            extra = torch.cat([(ground.mask >= 0.5).float().expand(len(seen), -1, -1, -1), seen], dim=1)

        def network(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
            if extra is not None:
                x_t = torch.cat([x_t, extra.repeat(len(x_t) // len(extra), 1, 1, 1)], dim=1)
            return self.unet(x_t.to(dtype, memory_format=torch.channels_last), t, context)

        distinct = negatives if len(set(negatives)) > 1 else negatives[:1]
        context, null_context = (self.conditioner(t, options.clip_skip).to(dtype) for t in (prompts, distinct))
        low, high = options.guidance_interval or (0.0, None)
        denoise: Any = GuidedDenoiser(
            Denoiser(network, self.schedule, self.prediction_type),
            context,
            null_context,
            max(options.guidance_scale, 1.0),
            options.guidance_rescale,
            (low, math.inf if high is None else high),
        )
        masked = None
        if ground is not None and ground.mask is not None and not self.sees_mask:
            assert x_0 is not None
            denoise = masked = MaskedDenoiser(denoise, x_0, eps, ground.mask, first if from_noise else None)

        def report(step: int, _: Tensor, denoised: Tensor) -> None:
            if callback is not None:
                callback(step, len(sigmas) - 1, denoised)

        more = {"eta": options.eta} if options.eta else {}
        x = SAMPLERS[options.sampler](denoise, x, sigmas, noise, callback=report, **more)
        latents = to_vp(x, float(sigmas[-1]))  # only a variance-preserving grid ends above 0
        return latents if masked is None or x_0 is None else masked.keep(latents, x_0)


def find_device(device: str) -> torch.device:
    """Turn `auto` or a torch device string into a device that is there.

    Raises:
        UserError: it is not.
    """
    if device == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", device):
        raise UserError(f"device={device} is not available: choose auto, cpu, cuda, cuda:1, mps or xpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"device={device} is not available: {str(error).splitlines()[0]}") from error
    return found
