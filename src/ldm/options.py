"""How to sample: what a person may say, what the model decides, and what cannot be."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ldm.diffusion.grids import SPACINGS
from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import UserError
from ldm.scheduler import default_spacing


@dataclass(frozen=True)
class Options:
    """How to sample. What is None is the model's own choice, filled in by `resolve`.

    Args:
        sampler: a key of `SAMPLERS`.
        steps: N, from 1 to the steps of training.
        spacing: of the noise levels, one of `SPACINGS`.
        eta: DDIM's η; the other samplers have none.
        guidance_scale: w of classifier-free guidance; 1 and less is none, as in diffusers.
        guidance_rescale: φ, see `GuidedDenoiser`.
        guidance_interval: guide at noise levels low < sigma <= high only, a high of None is no limit; None guides at
            all of them.
        clip_skip: last layers of the text encoder to leave out, as diffusers counts them.
        strength: of img2img and inpainting, the part of the steps that is run; None is `default_strength`.
    """

    sampler: str | None = None
    steps: int | None = None
    spacing: str | None = None
    eta: float = 0.0
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float | None] | None = None
    clip_skip: int = 0
    strength: float | None = None


def default_strength(masked: bool) -> float:
    """Return how much of a picture goes where nobody says: 1 where a mask tells what to keep; as in diffusers."""
    return 1.0 if masked else 0.8


def resolve(options: Options, defaults: Mapping[str, Any], most_steps: int, num_layers: int) -> Options:
    """Fill in what the model decides, and check the rest.

    Args:
        options: as asked for.
        defaults: the model's `sampler`, `steps`, `guidance_scale` and, where it says so, `spacing`.
        most_steps: T, the timesteps of training.
        num_layers: of the text encoder.

    Raises:
        UserError: an unknown sampler or spacing, or a value out of range.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    stated = {name: value for name, value in defaults.items() if value is not None}
    chosen = replace(options, **{**stated, **given})
    if chosen.spacing is None:
        chosen = replace(chosen, spacing=default_spacing(str(chosen.sampler)))
    steps, interval, strength = chosen.steps, chosen.guidance_interval, chosen.strength
    if chosen.sampler not in tuple(SAMPLERS):  # a model may say anything, also what has no hash
        raise UserError(f"sampler={chosen.sampler} is unknown; there are: {', '.join(SAMPLERS)}")
    if chosen.spacing not in SPACINGS:
        raise UserError(f"spacing={chosen.spacing} is unknown; there are: {', '.join(SPACINGS)}")
    if not isinstance(steps, int) or not 1 <= steps <= most_steps:
        raise UserError(f"steps={steps}: this model takes 1 to {most_steps} steps")
    if not isinstance(chosen.guidance_scale, int | float) or not 0 <= chosen.guidance_scale < math.inf:
        raise UserError(f"guidance_scale={chosen.guidance_scale}: choose 1 (no guidance) or more")
    if not 0 <= chosen.eta <= 1 or (chosen.eta and chosen.sampler != "ddim"):
        raise UserError(f"eta={chosen.eta:g}: sampler=ddim takes 0 to 1, the others have none")
    if not 0 <= chosen.guidance_rescale <= 1:
        raise UserError(f"guidance_rescale={chosen.guidance_rescale:g}: choose 0 (off) to 1")
    if interval and not 0 <= interval[0] < (math.inf if interval[1] is None else interval[1]):
        raise UserError(f"guidance_interval={list(interval)}: give two noise levels, 0 <= low < high")
    if not 0 <= chosen.clip_skip < num_layers:
        raise UserError(
            f"clip_skip={chosen.clip_skip}: this text encoder has {num_layers} layers; choose 0 to {num_layers - 1}"
        )
    if strength is not None and not 0 < strength <= 1:
        raise UserError(f"strength={strength:g}: choose above 0 (the picture as it is) to 1 (nothing of it)")
    return chosen
