"""From a trained network to D(x, sigma) -> x̂_0, the one thing that samplers see.

B batch, C channels, h w latents, L tokens, D width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.parameterization import check_prediction_type, to_denoised, to_prediction
from ldm.diffusion.schedule import FlowSchedule, NoiseSchedule

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""network(x_t, t, context) -> prediction, of x_t's shape."""


class Denoiser:
    """Wrap a network and its schedule as x̂_0 = D(x, sigma, context) at x = x_0 + sigma·ε (arXiv:2206.00364 Eq. 7).

    The network sees x_t = alpha x, where alpha depends on the schedule.

    Raises:
        ValueError: an unknown `prediction_type`, or `epsilon` with a schedule that ends in pure noise.
    """

    def __init__(self, network: Network, schedule: NoiseSchedule | FlowSchedule, prediction_type: str) -> None:
        check_prediction_type(prediction_type, schedule.zero_terminal_snr)
        self.network = network
        self.schedule = schedule
        self.prediction_type = prediction_type

    def __call__(self, x: Tensor, sigma: float, context: Tensor) -> Tensor:
        """Estimate x_0.

        The network sees t as (B,) float32: whole where sigma is a training timestep's, fractional between two.

        Args:
            x: (B, C, h, w) x_0 + sigma·ε.
            sigma: above 0; outside the schedule the network is asked at its nearest timestep.
            context: (B, L, D).

        Returns:
            (B, C, h, w) x̂_0 in x's dtype.
        """
        t = self.schedule.sigma_to_t(sigma)
        if abs(t - round(t)) < 1e-4:
            t = round(t)
        x_t = x * self.schedule.alpha(sigma)
        prediction = self.network(x_t, torch.full((len(x),), t, dtype=torch.float32, device=x.device), context)
        # Under autocast the prediction comes in half precision; sigma · prediction must not be rounded to that.
        return self.to_denoised(prediction.to(x.dtype), x, sigma)

    def to_denoised(self, prediction: Tensor, x: Tensor, sigma: float) -> Tensor:
        """Turn the network's prediction for x: (B, C, h, w) x_0 + sigma·ε into x̂_0."""
        alpha = self.schedule.alpha(sigma)
        return to_denoised(self.prediction_type, prediction, alpha * x, alpha, alpha * sigma)

    def to_prediction(self, denoised: Tensor, x: Tensor, sigma: float) -> Tensor:
        """Turn x̂_0 into the network's prediction for x: (B, C, h, w) x_0 + sigma·ε, the inverse of `to_denoised`."""
        alpha = self.schedule.alpha(sigma)
        return to_prediction(self.prediction_type, denoised, alpha * x, alpha, alpha * sigma)
