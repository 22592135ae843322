"""Noise schedules: how much noise each training timestep holds.

Two kinds: the variance-preserving `NoiseSchedule` and the straight paths of `FlowSchedule`; `schedule_from_config`
builds the one that a diffusers scheduler config describes.

B batch, C channels, h w latents, T training steps.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ldm.diffusion.parameterization import check_prediction_type

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

MOST_TIMESTEPS = 10**6  # of a config: tables of so many take megabytes
TERMINAL_SIGMA = 2.0**12
"""Stands for the sigma = ∞ of pure noise (ᾱ = 0) where one must calculate with it, as diffusers has it: ᾱ = 2^-24."""


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


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale √ᾱ so that the first stays and the last is 0 (arXiv:2305.08891 Alg. 1).

    Args:
        alphas_cumprod: (T,) ᾱ, falling; T at least 2.

    Returns:
        (T,) ᾱ, the last exactly 0.
    """
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


class NoiseSchedule:
    """Hold the tables of a variance-preserving diffusion: x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε.

    The tables are (T,) float64 on the CPU: `betas`, `alphas_cumprod` (ᾱ, falling) and `sigmas` (√((1 - ᾱ)/ᾱ), rising),
    the noise level of the same state in the coordinates x_0 + sigma·ε that samplers use. The defaults are those of
    Stable Diffusion.

    Args:
        beta_schedule, beta_start, beta_end: see `make_betas`.
        num_train_timesteps: T.
        trained_betas: T betas in (0, 1) to take instead.
        rescale_betas_zero_snr: end in pure noise, see `rescale_zero_terminal_snr`. Then the last ᾱ is 0 and the last
            sigma, which is infinite, is a large number: `TERMINAL_SIGMA`, or more where the one before is that large.

    Raises:
        ValueError: an unknown `beta_schedule`, betas outside 0 < beta_start <= beta_end < 1, no timesteps,
            `trained_betas` that are not T numbers in (0, 1), or fewer than two timesteps to rescale.

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
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(
                f"beta_start is {beta_start} and beta_end is {beta_end}; need 0 < beta_start <= beta_end < 1"
            )
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps is {num_train_timesteps}; need at least 1")
        if rescale_betas_zero_snr and num_train_timesteps < 2:
            raise ValueError("rescale_betas_zero_snr needs 2 timesteps: one to keep and one to make pure noise")
        self.beta_schedule = beta_schedule
        self.beta_start = beta_start
        self.beta_end = beta_end
        self.num_train_timesteps = num_train_timesteps
        self.trained_betas = None if trained_betas is None else [float(beta) for beta in trained_betas]
        self.zero_terminal_snr = rescale_betas_zero_snr

        if self.trained_betas is None:
            self.betas = make_betas(beta_schedule, beta_start, beta_end, num_train_timesteps)
        else:
            self.betas = torch.tensor(self.trained_betas, dtype=torch.float64, device="cpu")
            if len(self.betas) != num_train_timesteps or not ((self.betas > 0) & (self.betas < 1)).all():
                raise ValueError(
                    f"trained_betas must be num_train_timesteps={num_train_timesteps} numbers between 0 and 1"
                )
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        if rescale_betas_zero_snr:
            self.alphas_cumprod = rescale_zero_terminal_snr(self.alphas_cumprod)
            self.betas[1:] = 1 - self.alphas_cumprod[1:] / self.alphas_cumprod[:-1]
        self.sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        if rescale_betas_zero_snr:
            before = self.sigmas[-2].item()
            self.sigmas[-1] = TERMINAL_SIGMA if before < TERMINAL_SIGMA else 2 * before

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
            "trained_betas": self.trained_betas,
            "rescale_betas_zero_snr": self.zero_terminal_snr,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the schedule that a diffusers `scheduler_config.json` describes; keys of the sampler are passed over.

        Raises:
            ValueError: a key of the schedule is missing, or the config asks for what this class does not have.
        """
        _refuse_others(
            config,
            timestep_type="discrete",
            interpolation_type="linear",
            thresholding=False,
            use_flow_sigmas=False,
            use_beta_sigmas=False,
            use_lu_lambdas=False,
        )
        keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
        missing = [key for key in keys if key not in config]
        if missing:
            raise ValueError(f"the scheduler config lacks {', '.join(missing)}; add what the model was trained with")
        return cls(
            **{key: config[key] for key in keys},
            trained_betas=config.get("trained_betas"),
            rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr")),
        )

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
        return _mixed(x_0, noise, *self.coefficients(t, x_0))

    def timesteps(self, time: Tensor) -> Tensor:
        """Give the timesteps, int64 in [0, T), of times in [0, 1], which they divide into T equal parts."""
        # time · T can round up to T, which lies outside.
        return (time * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    def alpha(self, sigma: float) -> float:
        """Give the alpha of x_t = alpha (x_0 + sigma·ε) at a noise level: alpha² + (alpha sigma)² = 1."""
        return 1 / math.sqrt(1 + sigma**2)

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


class FlowSchedule:
    """Describe a rectified flow: x_t = (1 - s) x_0 + s ε along straight paths, s in [0, 1] (arXiv:2209.03003).

    Its noise level in the coordinates x_0 + sigma·ε is sigma = s / (1 - s), without end as s goes to 1. The network is
    asked at t = s·T.

    Args:
        num_train_timesteps: T.
        shift: moves sampling towards noise, see `shifted`; 1 leaves it uniform in s.

    Raises:
        ValueError: no timesteps, or a `shift` that is not above 0.

    >>> schedule = FlowSchedule()
    >>> schedule.sigma_to_t(1.0)
    500.0
    """

    zero_terminal_snr = True

    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0) -> None:
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps is {num_train_timesteps}; need at least 1")
        if not 0 < shift < math.inf:
            raise ValueError(f"shift is {shift}; it must be above 0")
        self.num_train_timesteps = num_train_timesteps
        self.shift = shift

    @property
    def config(self) -> dict[str, Any]:
        """Return the schedule's part of diffusers' `scheduler_config.json`."""
        return {"num_train_timesteps": self.num_train_timesteps, "shift": self.shift}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the schedule that a diffusers `scheduler_config.json` describes; keys of the sampler are passed over.

        The shift is called `flow_shift` in the configs of schedulers that are not for flows alone.

        Raises:
            ValueError: the config asks for what this class does not have.
        """
        _refuse_others(
            config,
            use_dynamic_shifting=False,
            shift_terminal=None,
            invert_sigmas=False,
            stochastic_sampling=False,
            thresholding=False,
            use_beta_sigmas=False,
            use_lu_lambdas=False,
        )
        return cls(config.get("num_train_timesteps", 1000), config.get("shift", config.get("flow_shift", 1.0)))

    def shifted(self, s: np.ndarray) -> np.ndarray:
        """Shift times in [0, 1] by arXiv:2403.03206 Eq. 23:  s' = shift s / (1 + (shift - 1) s)."""
        return self.shift * s / (1 + (self.shift - 1) * s)

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Give alpha = 1 - s and sigma = s at t = s·T, one pair per sample (arXiv:2403.03206 Eq. 13).

        Args:
            t: (B,) floating point in [0, T].
            like: (B, C, h, w); gives the device, and float64 if it is that.

        Returns:
            Two (B, 1, 1, 1) tensors, at least float32.

        Raises:
            ValueError: `t` is not (B,) floating point, or (where looking costs nothing: on the CPU) leaves [0, T].
        """
        if t.shape != like.shape[:1] or not t.is_floating_point():
            raise ValueError(
                f"t must be floating point of shape ({len(like)},), one time per sample; "
                f"it is {t.dtype} of shape {tuple(t.shape)}"
            )
        if t.device.type == "cpu" and not ((t >= 0) & (t <= self.num_train_timesteps)).all():
            raise ValueError(
                f"t holds times from {float(t.min())} to {float(t.max())}; "
                f"this flow has 0 to {self.num_train_timesteps}"
            )
        s = t.to(like.device, torch.promote_types(like.dtype, torch.float32)) / self.num_train_timesteps
        s = rearrange(s, "b -> b 1 1 1")
        return 1 - s, s

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Go from x_0 towards the noise on a straight path.

        Rectified flow (arXiv:2209.03003 Eq. 1, with time running to noise):  x_t = (1 - s) x_0 + s ε, s = t / T.

        Args:
            x_0: (B, C, h, w) scaled latents.
            noise: (B, C, h, w) ε ~ N(0, I); the caller owns the randomness.
            t: (B,) floating point in [0, T].

        Returns:
            (B, C, h, w) in x_0's dtype.

        Raises:
            ValueError: `noise` is not of x_0's shape, or `t` is not (B,) floating point in [0, T].
        """
        return _mixed(x_0, noise, *self.coefficients(t, x_0))

    def timesteps(self, time: Tensor) -> Tensor:
        """Give t = s·T, float32, of times s in [0, 1]: the network learns at all of them, not at T only."""
        return (time * self.num_train_timesteps).float()

    def alpha(self, sigma: float) -> float:
        """Give the alpha of x_t = alpha (x_0 + sigma·ε) at a noise level: alpha + alpha sigma = 1."""
        return 1 / (1 + sigma)

    def sigma_to_t(self, sigma: float) -> float:
        """Give the timestep t = s·T, fractional between two, of a noise level of at least 0."""
        return self.num_train_timesteps * sigma / (1 + sigma)


def schedule_from_config(config: Mapping[str, Any]) -> NoiseSchedule | FlowSchedule:
    """Build the schedule that a diffusers `scheduler_config.json` describes.

    It is a flow if the scheduler is one of diffusers' `FlowMatch…` or the `prediction_type` is `flow_prediction`. Keys
    that only say how to sample are passed over.

    Raises:
        ValueError: a key of the schedule is missing; an option that we do not have; an unknown prediction type, or one
            that the schedule cannot be sampled with.
    """
    class_name, prediction_type = config.get("_class_name") or "", config.get("prediction_type")
    num = config.get("num_train_timesteps")
    if isinstance(num, int | float) and not num <= MOST_TIMESTEPS:
        raise ValueError(f"num_train_timesteps={num:g} is not supported (only up to {MOST_TIMESTEPS})")
    if class_name.startswith("FlowMatch") or prediction_type == "flow_prediction":
        check_prediction_type(prediction_type or "flow_prediction", zero_terminal_snr=True)
        return FlowSchedule.from_config(config)
    schedule = NoiseSchedule.from_config(config)
    check_prediction_type(prediction_type or "epsilon", schedule.zero_terminal_snr)
    return schedule


def _mixed(x_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    if noise.shape != x_0.shape:
        raise ValueError(f"noise must have x_0's shape {tuple(x_0.shape)}; it has {tuple(noise.shape)}")
    return (alpha * x_0 + sigma * noise).to(x_0.dtype)


def _refuse_others(config: Mapping[str, Any], **supported: Any) -> None:
    """Refuse a config that sets one of these options to anything but what we have.

    Raises:
        ValueError: it does; the message names the option.
    """
    for key, value in supported.items():
        if config.get(key) not in (None, value):
            raise ValueError(
                f"the scheduler config sets {key}={config[key]!r}, which is not supported (only {value!r}); the model "
                "would be sampled otherwise than it asks for"
            )
