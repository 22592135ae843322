"""From a trained network to D(x, sigma) -> x̂_0, the one thing that samplers see.

B batch, C channels, h w latents, L tokens, D width.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.parameterization import check_prediction_type, to_denoised
from ldm.diffusion.schedule import NoiseSchedule

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""network(x_t, t, context) -> prediction, of x_t's shape."""


class Denoiser:
    """Wrap a network and its schedule as x̂_0 = D(x, sigma, context) at x = x_0 + sigma·ε (arXiv:2206.00364 Eq. 7).

    Raises:
        ValueError: an unknown `prediction_type`.
    """

    def __init__(self, network: Network, schedule: NoiseSchedule, prediction_type: str) -> None:
        check_prediction_type(prediction_type)
        self.network = network
        self.schedule = schedule
        self.prediction_type = prediction_type

    def __call__(self, x: Tensor, sigma: float, context: Tensor) -> Tensor:
        """Estimate x_0.

        The network sees x_t = x / √(1 + sigma²), of about unit variance, and t as (B,) float32: whole where sigma is
        a training timestep's, fractional between two.

        Args:
            x: (B, C, h, w) x_0 + sigma·ε.
            sigma: above 0; outside the schedule the network is asked at its nearest timestep.
            context: (B, L, D).

        Returns:
            (B, C, h, w) x̂_0 in x's dtype.
        """
        # The VP state at this noise level: alpha² + sigma_t² = 1 and sigma_t / alpha = sigma.
        alpha = 1 / math.sqrt(1 + sigma**2)
        sigma_t = sigma * alpha
        t = self.schedule.sigma_to_t(sigma)
        if abs(t - round(t)) < 1e-4:
            t = round(t)
        x_t = x * alpha
        prediction = self.network(x_t, torch.full((len(x),), t, dtype=torch.float32, device=x.device), context)
        # Under autocast the prediction comes in half precision; sigma · prediction must not be rounded to that.
        return to_denoised(self.prediction_type, prediction.to(x.dtype), x_t, alpha, sigma_t)
