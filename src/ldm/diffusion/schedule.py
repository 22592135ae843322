"""The noise schedule: how much noise each training timestep holds.

B batch, C channels, h w latents, T training steps.
"""

import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def make_betas(beta_schedule: str, beta_start: float, beta_end: float, num_train_timesteps: int) -> Tensor:
    """Compute β_t, the variance that forward step t adds.

    `linear` is DDPM's (arXiv:2006.11239 §4). `scaled_linear` is linear in √β and is Stable Diffusion's (its original
    code calls it "linear"). `squaredcos_cap_v2` is the cosine schedule of arXiv:2102.09672 Eq. 17, capped at 0.999;
    it does not look at `beta_start` and `beta_end`.

    Returns:
        (T,) float64 in (0, 1).

    Raises:
        ValueError: `beta_schedule` is none of the three.
    """
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64, device="cpu")
    if beta_schedule == "scaled_linear":
        return make_betas("linear", beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
    if beta_schedule == "squaredcos_cap_v2":
        time = torch.arange(num_train_timesteps + 1, dtype=torch.float64, device="cpu") / num_train_timesteps
        # Eq. 17: ᾱ(t) ∝ cos²((t/T + s) / (1 + s) · π/2), s = 0.008;  β_t = min(1 - ᾱ(t+1) / ᾱ(t), 0.999)
        alphas_cumprod = torch.cos((time + 0.008) / 1.008 * (math.pi / 2)) ** 2
        return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
    raise ValueError(f"beta_schedule is {beta_schedule!r}; choose one of {', '.join(BETA_SCHEDULES)}")


class NoiseSchedule:
    """Hold the tables of a variance-preserving diffusion: x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε.

    The tables are (T,) float64 on the CPU: `betas`, `alphas_cumprod` (ᾱ, falling) and `sigmas` (√((1 - ᾱ)/ᾱ), rising),
    the noise level of the same state in the coordinates x_0 + sigma·ε that samplers use. The defaults are those of
    Stable Diffusion.

    Raises:
        ValueError: an unknown `beta_schedule`, betas outside 0 < beta_start <= beta_end < 1, or no timesteps.

    >>> schedule = NoiseSchedule()
    >>> round(schedule.t_to_sigma(999), 3)
    14.615
    >>> round(schedule.sigma_to_t(14.615), 3)
    999.0
    """

    def __init__(
        self,
        beta_schedule: str = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_train_timesteps: int = 1000,
    ) -> None:
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(
                f"beta_start is {beta_start} and beta_end is {beta_end}; need 0 < beta_start <= beta_end < 1"
            )
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps is {num_train_timesteps}; need at least 1")
        self.beta_schedule = beta_schedule
        self.beta_start = beta_start
        self.beta_end = beta_end
        self.num_train_timesteps = num_train_timesteps

        self.betas = make_betas(beta_schedule, beta_start, beta_end, num_train_timesteps)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        self.sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

        self._log_sigmas = self.sigmas.log().numpy()
        self._steps = np.arange(num_train_timesteps, dtype=np.float64)
        self._coefficients: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @property
    def config(self) -> dict[str, Any]:
        """Return the schedule's part of diffusers' `scheduler_config.json`."""
        return {
            "num_train_timesteps": self.num_train_timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": self.beta_schedule,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the schedule that a diffusers `scheduler_config.json` describes; keys of the sampler are passed over.

        Raises:
            ValueError: a key of the schedule is missing, or the config asks for betas that this class does not make
                (`trained_betas`, `rescale_betas_zero_snr`, an unknown `beta_schedule`).
        """
        for key in ("trained_betas", "rescale_betas_zero_snr"):
            value = config.get(key)
            if value is not None and value is not False:
                raise ValueError(
                    f"the scheduler config sets {key}, which is not supported: its betas would not be those of the "
                    f"beta_schedule it names; use a model whose scheduler_config.json leaves {key} unset"
                )
        keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
        missing = [key for key in keys if key not in config]
        if missing:
            raise ValueError(f"the scheduler config lacks {', '.join(missing)}; add what the model was trained with")
        return cls(**{key: config[key] for key in keys})

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Look up alpha = √ᾱ_t and sigma = √(1 - ᾱ_t), one pair per sample.

        The tables are kept per device and dtype, so a training step copies nothing from host to device.

        Args:
            t: (B,) int64 in [0, T).
            like: (B, C, h, w); gives the device, and float64 if it is that.

        Returns:
            Two (B, 1, 1, 1) tensors, at least float32.

        Raises:
            ValueError: `t` is not (B,) int64, or (where looking costs nothing: on the CPU) leaves [0, T).
        """
        if t.shape != like.shape[:1] or t.dtype != torch.int64:
            raise ValueError(
                f"t must be int64 of shape ({len(like)},), one timestep per sample; "
                f"it is {t.dtype} of shape {tuple(t.shape)}"
            )
        key = (like.device, torch.promote_types(like.dtype, torch.float32))
        if key not in self._coefficients:
            # Ordinary tensors even when first asked for in inference mode: autograd may meet them later.
            with torch.inference_mode(False):
                alpha, sigma = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
                self._coefficients[key] = (alpha.to(*key), sigma.to(*key))
        try:
            # index_select, unlike indexing, refuses negative timesteps.
            alpha, sigma = (table.index_select(0, t.to(like.device)) for table in self._coefficients[key])
        except IndexError:
            raise ValueError(
                f"t holds timesteps from {int(t.min())} to {int(t.max())}; "
                f"this schedule has 0 to {self.num_train_timesteps - 1}"
            ) from None
        return rearrange(alpha, "b -> b 1 1 1"), rearrange(sigma, "b -> b 1 1 1")

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Sample x_t ~ q(x_t | x_0), the forward process in closed form.

        DDPM (arXiv:2006.11239) Eq. 4:  x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε.

        Args:
            x_0: (B, C, h, w) scaled latents.
            noise: (B, C, h, w) ε ~ N(0, I); the caller owns the randomness.
            t: (B,) int64 in [0, T), 0 the least noisy.

        Returns:
            (B, C, h, w) in x_0's dtype.

        Raises:
            ValueError: `noise` is not of x_0's shape, or `t` is not (B,) int64 in [0, T).
        """
        if noise.shape != x_0.shape:
            raise ValueError(f"noise must have x_0's shape {tuple(x_0.shape)}; it has {tuple(noise.shape)}")
        alpha, sigma = self.coefficients(t, x_0)
        return (alpha * x_0 + sigma * noise).to(x_0.dtype)

    def t_to_sigma(self, t: float) -> float:
        """Give the noise level at a timestep, linear in log sigma between integers, clamped to the schedule's ends."""
        return math.exp(np.interp(t, self._steps, self._log_sigmas))

    def sigma_to_t(self, sigma: float) -> float:
        """Give the timestep, fractional between two, of a noise level; the inverse of `t_to_sigma`.

        Args:
            sigma: at least 0; outside the schedule it is clamped to 0 or T - 1.
        """
        if sigma <= 0:
            return 0.0
        return float(np.interp(math.log(sigma), self._log_sigmas, self._steps))
