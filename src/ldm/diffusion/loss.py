"""The training loss: its times, its noise, the error of a prediction, and the weight of each noise level.

B batch, C channels, h w latents, L tokens, D width, T training steps.
"""

import torch
from einops import reduce
from torch import Tensor

from ldm.diffusion.denoiser import Network
from ldm.diffusion.parameterization import target
from ldm.diffusion.schedule import FlowSchedule, NoiseSchedule

WEIGHTINGS = ("uniform", "min_snr", "soft_min_snr", "p2", "debiased")


def diffusion_loss(
    network: Network,
    schedule: NoiseSchedule | FlowSchedule,
    prediction_type: str,
    x_0: Tensor,
    context: Tensor,
    t: Tensor,
    noise: Tensor,
    input_noise: Tensor | None = None,
    huber_c: float | None = None,
) -> Tensor:
    """Compute each sample's error of the network's prediction at x_t, squared or pseudo-Huber.

    DDPM (arXiv:2006.11239) Eq. 14, for `epsilon`:  L = ‖ε - ε_θ(√ᾱ_t x_0 + √(1 - ᾱ_t) ε, t)‖², here the mean over
    channels and positions; for the other prediction types with their target in ε's place. For a flow that is the
    rectified flow's objective (arXiv:2209.03003 Eq. 1).

    Args:
        network: network(x_t, t, context) -> prediction.
        schedule: gives x_t and the target's coefficients.
        prediction_type: one of `PREDICTION_TYPES`.
        x_0: (B, C, h, w) scaled latents.
        context: (B, L, D).
        t: (B,) timesteps of the schedule.
        noise: (B, C, h, w) ε ~ N(0, I).
        input_noise: (B, C, h, w) what x_t is made with in ε's place, see `perturbed`; None for ε.
        huber_c: c of the pseudo-Huber loss (see `pseudo_huber`); None for the square.

    Returns:
        (B,) at least float32, also under autocast.

    Raises:
        ValueError: an unknown `prediction_type`; shapes that do not fit; a prediction not of x_0's shape.
    """
    x_t = schedule.add_noise(x_0, noise if input_noise is None else input_noise, t)
    alpha, sigma = schedule.coefficients(t, x_0)
    wanted = target(prediction_type, x_0, noise, alpha, sigma)
    prediction = network(x_t, t, context)
    if prediction.shape != x_0.shape:
        raise ValueError(
            f"the network's prediction has shape {tuple(prediction.shape)}, x_0 has {tuple(x_0.shape)}; "
            "the network must put out as many channels as the latents have"
        )
    error = prediction.to(alpha.dtype) - wanted.to(alpha.dtype)
    return reduce(error**2 if huber_c is None else pseudo_huber(error, huber_c), "b c h w -> b", "mean")


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """Compute 2c (√(e² + c²) - c) of each element: e² where it is small beside c, 2c |e| where it is large.

    The pseudo-Huber loss √(e² + c²) - c of arXiv:2403.16728, by element, brought to the size of the square; c is the
    same at all timesteps.

    >>> [round(pseudo_huber(torch.tensor(e), 0.1).item(), 6) for e in (0.001, 10.0)]
    [1e-06, 1.9801]
    """
    # √(e² + c²) - c, without the cancellation that would eat small errors.
    return 2 * c * error**2 / ((error**2 + c**2).sqrt() + c)


# --------------------------------------------------------------------------------------------------------- weights


def loss_weight(
    weighting: str,
    prediction_type: str,
    snr: Tensor,
    snr_gamma: float = 5.0,
    p2_gamma: float = 1.0,
    p2_k: float = 1.0,
) -> Tensor:
    """Give the factor on each sample's squared error, by the signal-to-noise ratio of its timestep.

    Each weighting is stated for one prediction type; the others get what makes it the same objective, by
    ‖ε̂ - ε‖² = snr ‖x̂_0 - x_0‖² and ‖v̂ - v‖² = (snr + 1) ‖x̂_0 - x_0‖². Stated for x_0:

    - `min_snr`: min(snr, γ); so for ε min(snr, γ) / snr, for v min(snr, γ) / (snr + 1) (Min-SNR-γ, arXiv:2303.09556)
    - `soft_min_snr`: 1 / (1 / snr + 1 / γ), a smooth `min_snr` (Soft-Min-SNR, arXiv:2401.11605: w(σ) = 1 / (σ² + γ⁻¹))
    - `p2`: snr / (k + snr)^γ, which is λ'_t = λ_t / (k + snr)^γ on ε's λ_t = 1 (arXiv:2204.00227)
    - `debiased`: √snr, which is 1 / √snr for ε (arXiv:2310.08442)

    `uniform` is 1 for every prediction type.

    Args:
        weighting: one of `WEIGHTINGS`.
        prediction_type: `epsilon`, `v_prediction` or `sample`.
        snr: (B,) ᾱ_t / (1 - ᾱ_t), of the schedule as it trains; 0 at a timestep of pure noise.
        snr_gamma: γ of both min-SNR weightings.
        p2_gamma, p2_k: γ and k of P2.

    Returns:
        (B,) of snr's dtype.

    Raises:
        ValueError: an unknown `weighting`, or a `prediction_type` that a weighting does not know.

    >>> snr = torch.tensor([0.5, 20.0])
    >>> loss_weight("min_snr", "epsilon", snr).tolist()
    [1.0, 0.25]
    """
    if weighting == "uniform":
        return torch.ones_like(snr)
    of_x_0 = {
        "min_snr": lambda: snr.clamp(max=snr_gamma),
        "soft_min_snr": lambda: snr * snr_gamma / (snr + snr_gamma),
        "p2": lambda: snr / (p2_k + snr) ** p2_gamma,
        "debiased": lambda: snr.sqrt(),
    }
    squares = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    if weighting not in of_x_0 or prediction_type not in squares:
        raise ValueError(
            f"weighting {weighting!r} of {prediction_type!r} is unknown; there are {', '.join(WEIGHTINGS)} "
            f"of {', '.join(squares)}"
        )
    return of_x_0[weighting]() / squares[prediction_type]


# ----------------------------------------------------------------------------------------------- times and noise


def draw_times(batch: int, generator: torch.Generator, stratified: bool = True) -> Tensor:
    """Draw times uniform on [0, 1]; stratified, they are spread evenly over the batch.

    Stratified there is one in each of B equal bins, in random order. The expected loss stays; its variance falls
    (arXiv:2107.00630 App. I.1, with random order in place of one shared offset).

    Args:
        batch: B.
        generator: source of the draws; the result lies on its device.
        stratified: whether to.

    Returns:
        (B,) float64 in [0, 1].

    >>> t = draw_times(4, torch.Generator().manual_seed(0))
    >>> (t.sort().values * 4).long().tolist()
    [0, 1, 2, 3]
    """
    device = generator.device
    if not stratified:
        return torch.rand(batch, generator=generator, device=device, dtype=torch.float64)
    bins = torch.randperm(batch, generator=generator, device=device)
    within = torch.rand(batch, generator=generator, device=device, dtype=torch.float64)
    return (bins + within) / batch


def logit_normal(time: Tensor, mean: float, std: float) -> Tensor:
    """Turn uniform times into logit-normal ones, logit(s) ~ N(mean, std²) (arXiv:2403.03206 Eq. 19), in their order.

    By the inverse of its distribution function, s = sigmoid(mean + std Φ⁻¹(u)): what is stratified stays so.

    Args:
        time: (B,) float64, uniform on [0, 1].
        mean, std: below 0 the mean prefers clean latents, above 0 noise.

    Returns:
        (B,) in [0, 1].

    >>> logit_normal(torch.tensor([0.0, 0.5, 1.0]), 0.0, 1.0).tolist()
    [0.0, 0.5, 1.0]
    """
    return torch.sigmoid(mean + std * torch.special.ndtri(time))


def offset_noise(noise: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Add a shift, N(0, strength²), to each channel of each sample: ε + strength·ε', ε' the same at all positions.

    So that the mean of a picture is learned too, which white noise hardly touches (N. Guttenberg, "Diffusion With
    Offset Noise", crosslabs.org, 2023).

    Args:
        noise: (B, C, h, w) ε ~ N(0, I).
        strength: 0.1 there.
        generator: source of the shifts.

    Returns:
        (B, C, h, w), the ε to train with: x_t is made of it, and it is the target.
    """
    return noise + strength * torch.randn(*noise.shape[:2], 1, 1, generator=generator, device=generator.device)


def perturbed(noise: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Perturb the noise that x_t is made with, ε + γ ξ with ξ ~ N(0, I), while ε stays the target.

    The network learns from inputs that are off as those in sampling are (DDPM-IP, arXiv:2301.11706 Alg. 1).

    Args:
        noise: (B, C, h, w) ε.
        strength: γ, 0.1 there.
        generator: source of ξ.

    Returns:
        (B, C, h, w), the `input_noise` of `diffusion_loss`.
    """
    return noise + strength * torch.randn(noise.shape, generator=generator, device=generator.device)
