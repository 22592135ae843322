"""Grids of noise levels, and the samplers that walk down them.

A sampler knows one thing, `denoise(x, sigma) -> x̂_0`, and works in the coordinates x = x_0 + sigma·ε. A
variance-preserving state is the same thing scaled: x_t = x / √(1 + sigma²), see `to_vp` and `from_vp`.

B batch, C channels, h w latents, T training steps, N sampling steps.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.schedule import NoiseSchedule

SPACINGS = ("leading", "linspace", "trailing")

Denoise = Callable[[Tensor, float], Tensor]
"""denoise(x, sigma) -> x̂_0, in x's shape and dtype."""

Noise = Callable[[Tensor], Tensor]
"""noise(x) -> a fresh draw of N(0, I) like x; `torch.randn_like` is one."""

Callback = Callable[[int, Tensor, Tensor], None]
"""callback(step, x, denoised) after each step: its number from 0, the new x, and the x̂_0 that led there."""


def timesteps(num_steps: int, spacing: str, num_train_timesteps: int, steps_offset: int = 0) -> Tensor:
    """Choose the timesteps at which a sampler asks the network, as diffusers' DDIM does (arXiv:2305.08891 Table 2).

    `trailing` starts at T - 1, `linspace` spans 0 to T - 1, `leading` takes every (T // N)-th from 0 and mostly starts
    below T - 1. With N = 1, `leading` and `linspace` ask at t = 0 only, where pure noise was never seen in training.

    Args:
        num_steps: N, from 1 to T.
        spacing: `leading`, `linspace` or `trailing`.
        num_train_timesteps: T.
        steps_offset: added to `leading` timesteps (Stable Diffusion has 1), as far as they stay below T; the other
            spacings do not look at it.

    Returns:
        (N,) int64, falling, all different, in [0, T).

    Raises:
        ValueError: `num_steps` is not in 1..T, or `spacing` is unknown, or `steps_offset` is negative.

    >>> timesteps(4, "trailing", 1000).tolist()
    [999, 749, 499, 249]
    >>> timesteps(4, "leading", 1000, steps_offset=1).tolist()
    [751, 501, 251, 1]
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(f"num_steps is {num_steps}; choose 1 to {num_train_timesteps}, the steps of training")
    if steps_offset < 0:
        raise ValueError(f"steps_offset is {steps_offset}; it must not be negative")
    t: np.ndarray
    if spacing == "leading":
        stride = num_train_timesteps // num_steps
        t = np.arange(num_steps)[::-1] * stride
        t = t + min(steps_offset, num_train_timesteps - 1 - t[0])
    elif spacing == "linspace":
        t = np.linspace(0, num_train_timesteps - 1, num_steps)[::-1].round()
    elif spacing == "trailing":
        # A fractional stride can make arange run one too far, to t = -1.
        t = np.arange(num_train_timesteps, 0, -num_train_timesteps / num_steps)[:num_steps].round() - 1
    else:
        raise ValueError(f"spacing is {spacing!r}; choose one of {', '.join(SPACINGS)}")
    return torch.from_numpy(t.astype(np.int64))


def sigma_grid(
    schedule: NoiseSchedule,
    num_steps: int,
    spacing: str = "trailing",
    steps_offset: int = 0,
    final_sigma: float = 0.0,
) -> Tensor:
    """List the noise levels of a run of N steps: those of N timesteps, then the one it ends on.

    Args:
        schedule: gives T and the sigma of each timestep.
        num_steps: N, from 1 to T.
        spacing: see `timesteps`.
        steps_offset: see `timesteps`.
        final_sigma: 0 ends on x̂_0. A scheduler config with `set_alpha_to_one` false (Stable Diffusion 1.x) means
            `schedule.sigmas[0]`.

    Returns:
        (N + 1,) float64 on the CPU, falling; the last two are equal where `final_sigma` is the last timestep's.

    Raises:
        ValueError: `final_sigma` is negative or above the last timestep's; and as `timesteps` does.
    """
    sigmas = schedule.sigmas[timesteps(num_steps, spacing, schedule.num_train_timesteps, steps_offset)]
    if not 0 <= final_sigma <= sigmas[-1]:
        raise ValueError(f"final_sigma is {final_sigma}; need 0 to {sigmas[-1]:.4g}, the last timestep's sigma")
    return torch.cat([sigmas, sigmas.new_tensor([final_sigma])])


def to_vp(x: Tensor, sigma: float) -> Tensor:
    """Turn x = x_0 + sigma·ε into the variance-preserving x_t; with `sigmas[-1]`, a sampler's result into latents."""
    return x / math.sqrt(1 + sigma**2)


def from_vp(x_t: Tensor, sigma: float) -> Tensor:
    """Turn a variance-preserving x_t into x = x_0 + sigma·ε, the inverse of `to_vp`.

    With `sigmas[0]` this makes pure noise N(0, I) the x that a sampler starts from, as diffusers starts.
    """
    return x_t * math.sqrt(1 + sigma**2)


def ancestral_step(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Split a step to sigma_next into going down to sigma_down and adding sigma_up of fresh noise.

    DDIM (arXiv:2010.02502) Eq. 16 in these coordinates:  sigma_up² = η² (1 - sigma_next² / sigma²) sigma_next², and
    sigma_down² + sigma_up² = sigma_next².

    >>> ancestral_step(5.0, 4.0, eta=0.0)
    (4.0, 0.0)
    >>> down, up = ancestral_step(5.0, 4.0, eta=1.0)
    >>> round(down, 6), round(up, 6)
    (3.2, 2.4)
    """
    fresh = eta**2 * (1 - (sigma_next / sigma) ** 2)
    return sigma_next * math.sqrt(1 - fresh), sigma_next * math.sqrt(fresh)


@torch.no_grad()
def ddim(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 0.0, callback: Callback | None = None
) -> Tensor:
    """Sample with DDIM(η) (arXiv:2010.02502 Eq. 12), here an Euler step and ancestral noise.

    Args:
        denoise: x̂_0 = denoise(x, sigma).
        x: (B, C, h, w) start at `sigmas[0]`, e.g. `from_vp(noise, sigmas[0])`.
        sigmas: (N + 1,) falling, as `sigma_grid` gives them.
        noise: asked for a draw at each step that adds noise, so never with η = 0.
        eta: η from 0, deterministic, to 1, DDPM.
        callback: called after each step.

    Returns:
        (B, C, h, w) x at `sigmas[-1]`, float32 at least; `to_vp` makes it latents where that is not 0.

    Raises:
        ValueError: `eta` is not in 0..1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; choose 0 (deterministic) to 1 (DDPM)")
    # Half precision would lose what small steps add.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        # Euler on dx/dsigma = (x - x̂_0) / sigma, from sigma to sigma_down
        x = denoised + sigma_down / sigma * (x - denoised)
        if sigma_up > 0:
            x = x + sigma_up * noise(x)
        if callback is not None:
            callback(step, x, denoised)
    return x


def ddpm(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None) -> Tensor:
    """Sample with DDPM (arXiv:2006.11239 Alg. 2, with the posterior variance β̃), on any grid: DDIM with η = 1.

    Arguments and result are those of `ddim`.
    """
    return ddim(denoise, x, sigmas, noise, eta=1.0, callback=callback)


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ddim": ddim, "ddpm": ddpm}
"""By name; each is called as `sampler(denoise, x, sigmas, noise, callback=callback)`."""
