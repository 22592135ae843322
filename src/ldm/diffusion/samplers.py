"""The samplers: ten ways down a grid of noise levels.

A sampler is `sampler(denoise, x, sigmas, noise, callback=None) -> x`. All it knows is `denoise(x, sigma) -> x̂_0`, and
it works in the coordinates x = x_0 + sigma·ε. A variance-preserving state (see `to_vp`) and a flow's are x times a
number.

- `denoise`: x̂_0 = denoise(x, sigma).
- `x`: (B, C, h, w), where it starts at `sigmas[0]`: `grids.start`, or a picture with noise.
- `sigmas`: (N + 1,) falling, as `grids.sigma_grid` gives them.
- `noise`: asked for each fresh draw; each sampler says how many that are for a grid that ends on 0.
- `callback`: called once after each step.
- The result is (B, C, h, w) x at `sigmas[-1]`, float32 at least: latents where that is 0, else see `to_vp`.

In these coordinates they all take one and the same step, `steps.advance`: towards an estimate of x_0, with or without
fresh noise. What makes a sampler is its estimate, the η of its noise, its grid, and a correction for a bent path. Those
that extrapolate from earlier steps are in `multistep`.

B batch, C channels, h w latents, N sampling steps.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.multistep import dpmpp_2m, dpmpp_2m_sde, lms, unipc
from ldm.diffusion.schedule import TERMINAL_SIGMA
from ldm.diffusion.steps import Callback, Denoise, Noise, advance, at_least_float32


def to_vp(x: Tensor, sigma: float) -> Tensor:
    """Turn x = x_0 + sigma·ε into the variance-preserving x_t; with `sigmas[-1]`, a sampler's result into latents."""
    return x / math.sqrt(1 + sigma**2)


@torch.no_grad()
def ddim(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None, eta: float = 0.0
) -> Tensor:
    """Sample with DDIM(η) (arXiv:2010.02502 Eq. 12 and 16): each step towards the x̂_0 of its start.

    N evaluations; no draws with η = 0, else N - 1.

    Args:
        denoise, x, sigmas, noise, callback: see the top of this file.
        eta: η from 0, deterministic, to 1, DDPM.

    Raises:
        ValueError: `eta` is not in 0..1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; choose 0 (deterministic) to 1 (DDPM)")
    x = at_least_float32(x)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        x = advance(x, denoised, sigma, sigma_next, noise, eta)
        if callback is not None:
            callback(step, x, denoised)
    return x


def ddpm(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None) -> Tensor:
    """Sample with DDPM (arXiv:2006.11239 Alg. 2, with the posterior variance β̃), on any grid: DDIM with η = 1.

    N evaluations, N - 1 draws.
    """
    return ddim(denoise, x, sigmas, noise, callback, eta=1.0)


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None) -> Tensor:
    """Sample with Euler's method (arXiv:2206.00364 Alg. 1 without its correction): DDIM with η = 0 on another grid.

    N evaluations, no draws.
    """
    return ddim(denoise, x, sigmas, noise, callback)


def euler_a(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None) -> Tensor:
    """Sample with Euler's method and ancestral noise, k-diffusion's `sample_euler_ancestral`: DDPM on another grid.

    N evaluations, N - 1 draws.
    """
    return ddim(denoise, x, sigmas, noise, callback, eta=1.0)


@torch.no_grad()
def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None) -> Tensor:
    """Sample with Heun's method, the trapezoid rule in sigma (arXiv:2206.00364 Alg. 1): second order.

    At most 2 N - 1 evaluations, no draws. A step to sigma 0, where the slope is not defined, is Euler's; and so is one
    from pure noise, over whose endless sigma no trapezoid can be laid.
    """
    x = at_least_float32(x)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        slope = (x - denoised) / sigma
        x = advance(x, denoised, sigma, sigma_next, noise)
        if sigma_next > 0 and sigma < TERMINAL_SIGMA:
            slope_next = (x - denoise(x, sigma_next)) / sigma_next
            x = x + (sigma_next - sigma) / 2 * (slope_next - slope)
        if callback is not None:
            callback(step, x, denoised)
    return x


@torch.no_grad()
def dpmpp_sde(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None) -> Tensor:
    """Sample with the stochastic DPM-Solver++(2S), k-diffusion's `sample_dpmpp_sde` with r = 1/2: second order.

    Each step goes towards the x̂_0 of its middle in log sigma, to where a first step has gone. The noise of both is that
    of one Brownian path over sigma; with independent noise the variance would be right to first order only.
    2 N - 1 evaluations, 2 (N - 1) draws.
    """
    x = at_least_float32(x)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = advance(x, denoised, sigma, sigma_next, noise)
        else:
            sigma_middle = math.sqrt(sigma * sigma_next)
            shared = (sigma - sigma_middle) / (sigma - sigma_next)  # of the path's variance
            draw = noise(x)
            middle = advance(x, denoised, sigma, sigma_middle, _always(draw), eta=1.0)
            draw = math.sqrt(shared) * draw + math.sqrt(1 - shared) * noise(x)
            x = advance(x, denoise(middle, sigma_middle), sigma, sigma_next, _always(draw), eta=1.0)
        if callback is not None:
            callback(step, x, denoised)
    return x


def _always(draw: Tensor) -> Noise:
    return lambda _: draw


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "euler": euler,
    "euler_a": euler_a,
    "heun": heun,
    "lms": lms,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_sde": dpmpp_sde,
    "unipc": unipc,
}
"""By name; each is called as `sampler(denoise, x, sigmas, noise, callback=callback)`, `ddim` also with `eta`."""

FAMILIES = {
    "ddim": "ddim",
    "ddpm": "ddim",
    "euler": "euler",
    "euler_a": "euler",
    "heun": "euler",
    "lms": "euler",
    "dpmpp_2m": "dpm",
    "dpmpp_2m_sde": "dpm",
    "dpmpp_sde": "euler",
    "unipc": "dpm",
}
"""Which samplers share a grid and a scale of the first noise in diffusers; `grids` says what each family means."""
