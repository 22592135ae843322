"""The training loss and the draw of its timesteps.

B batch, C channels, h w latents, L tokens, D width, T training steps.
"""

import torch
from einops import reduce
from torch import Tensor

from ldm.diffusion.denoiser import Network
from ldm.diffusion.parameterization import target
from ldm.diffusion.schedule import NoiseSchedule


def diffusion_loss(
    network: Network,
    schedule: NoiseSchedule,
    prediction_type: str,
    x_0: Tensor,
    context: Tensor,
    t: Tensor,
    noise: Tensor,
) -> Tensor:
    """Compute each sample's squared error of the network's prediction at x_t.

    DDPM (arXiv:2006.11239) Eq. 14, for `epsilon`:  L = ‖ε - ε_θ(√ᾱ_t x_0 + √(1 - ᾱ_t) ε, t)‖², here the mean over
    channels and positions; for the other prediction types with their target in ε's place.

    Args:
        network: network(x_t, t, context) -> prediction.
        schedule: gives x_t and the target's coefficients.
        prediction_type: `epsilon`, `v_prediction` or `sample`.
        x_0: (B, C, h, w) scaled latents.
        context: (B, L, D).
        t: (B,) int64 in [0, T).
        noise: (B, C, h, w) ε ~ N(0, I).

    Returns:
        (B,) at least float32, also under autocast.

    Raises:
        ValueError: an unknown `prediction_type`; shapes that do not fit; a prediction not of x_0's shape.
    """
    x_t = schedule.add_noise(x_0, noise, t)
    alpha, sigma = schedule.coefficients(t, x_0)
    wanted = target(prediction_type, x_0, noise, alpha, sigma)
    prediction = network(x_t, t, context)
    if prediction.shape != x_0.shape:
        raise ValueError(
            f"the network's prediction has shape {tuple(prediction.shape)}, x_0 has {tuple(x_0.shape)}; "
            "the network must put out as many channels as the latents have"
        )
    error = prediction.to(alpha.dtype) - wanted.to(alpha.dtype)
    return reduce(error**2, "b c h w -> b", "mean")


def stratified_timesteps(batch: int, num_train_timesteps: int, generator: torch.Generator) -> Tensor:
    """Draw timesteps spread evenly over a batch: one from each of B equal bins of [0, T), in random order.

    Each is uniform on [0, T) by itself, so the expected loss stays; its variance falls
    (arXiv:2107.00630 App. I.1, with random order in place of one shared offset).

    Args:
        batch: B.
        num_train_timesteps: T.
        generator: source of the draws; the result lies on its device.

    Returns:
        (B,) int64 in [0, T).

    >>> t = stratified_timesteps(4, 1000, torch.Generator().manual_seed(0))
    >>> (t.sort().values // 250).tolist()
    [0, 1, 2, 3]
    """
    device = generator.device
    bins = torch.randperm(batch, generator=generator, device=device)
    within = torch.rand(batch, generator=generator, device=device, dtype=torch.float64)
    t = ((bins + within) / batch * num_train_timesteps).long()
    # bins + within can round up to the next whole number, which for the last bin lies outside.
    return t.clamp(max=num_train_timesteps - 1)
