"""What all samplers share: their contract's types, and the one step that they take.

B batch, C channels, h w latents.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
"""denoise(x, sigma) -> x̂_0, in x's shape and dtype."""

Noise = Callable[[Tensor], Tensor]
"""noise(x) -> a fresh draw of N(0, I) like x; `torch.randn_like` is one."""

Callback = Callable[[int, Tensor, Tensor], None]
"""callback(step, x, denoised) after each step: its number from 0, the new x, and the x̂_0 asked for at its start."""


def at_least_float32(x: Tensor) -> Tensor:
    """Lift half precision, which would lose what small steps add."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
    ratio = sigma_next / sigma
    # 1 - fresh and fresh, each without a difference of near equals
    kept = (1 - eta) * (1 + eta) + (eta * ratio) ** 2
    fresh = eta**2 * (1 - ratio) * (1 + ratio)
    return sigma_next * math.sqrt(kept), sigma_next * math.sqrt(fresh)


def advance(x: Tensor, estimate: Tensor, sigma: float, sigma_next: float, noise: Noise, eta: float = 0.0) -> Tensor:
    """Step from sigma to sigma_next along the line through x and an estimate of x_0, with noise of share η.

    DDIM (arXiv:2010.02502) Eq. 12; with η = 0 Euler's step on dx/dsigma = (x - x̂_0) / sigma (arXiv:2206.00364 Eq. 1)
    and DPM-Solver++'s (arXiv:2211.01095 Prop. 4.1, x̂_0 constant); with η = 1 DDPM's and SDE-DPM-Solver++'s.
    `noise` is asked where the step adds noise: η > 0 and sigma_next > 0.
    """
    sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
    x = estimate + sigma_down / sigma * (x - estimate)
    return x + sigma_up * noise(x) if sigma_up > 0 else x
