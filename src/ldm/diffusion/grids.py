"""Grids of noise levels: where a sampler asks the network, and what it starts from.

The levels are those of diffusers' scheduler of the same name, so that a seed gives the same picture in both.

B batch, C channels, h w latents, T training steps, N sampling steps.
"""

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.samplers import FAMILIES
from ldm.diffusion.schedule import FlowSchedule, NoiseSchedule
from ldm.diffusion.steps import at_least_float32

SPACINGS = ("leading", "linspace", "trailing", "karras", "exponential")

INFINITE_SIGMA = 2.0**24
"""A sigma beside which float32 does not see an x_0 of order 1: x = sigma·ε is pure noise, to the last bit."""


def timesteps(
    num_steps: int, num_train_timesteps: int, sampler: str = "ddim", spacing: str = "trailing", steps_offset: int = 0
) -> np.ndarray:
    """Choose the timesteps at which a sampler asks the network (arXiv:2305.08891 Table 2).

    `trailing` starts at T - 1, `linspace` spans 0 to T - 1, `leading` takes every (T // N)-th from 0 and mostly starts
    below T - 1. The families of samplers (`FAMILIES`) take their own view of it, as in diffusers:

    - `ddim`: N points; with N = 1 `leading` and `linspace` ask at t = 0 only, where pure noise was never seen.
    - `euler`: the same, but `linspace` is not rounded.
    - `dpm`: `leading` and `linspace` choose N + 1 points and leave out the last, t = 0.

    Args:
        num_steps: N, from 1 to T.
        num_train_timesteps: T.
        sampler: a key of `FAMILIES`.
        spacing: `leading`, `linspace` or `trailing`.
        steps_offset: added to `leading` timesteps (Stable Diffusion has 1), as far as they stay below T; the other
            spacings do not look at it.

    Returns:
        (N,) float64, falling, all different, in [0, T - 1]; whole but for the `linspace` of the `euler` family.

    Raises:
        ValueError: `num_steps` is not in 1..T, `sampler` or `spacing` is unknown, or `steps_offset` is negative.

    >>> timesteps(4, 1000).tolist()
    [999.0, 749.0, 499.0, 249.0]
    >>> timesteps(4, 1000, "ddim", "leading", steps_offset=1).tolist()
    [751.0, 501.0, 251.0, 1.0]
    >>> timesteps(4, 1000, "unipc", "leading", steps_offset=1).tolist()
    [801.0, 601.0, 401.0, 201.0]
    """
    _check_num_steps(num_steps, num_train_timesteps)
    if steps_offset < 0:
        raise ValueError(f"steps_offset is {steps_offset}; it must not be negative")
    family = _family(sampler)
    num_points = min(num_steps + 1, num_train_timesteps) if family == "dpm" else num_steps
    if spacing == "leading":
        t = np.arange(num_points, dtype=np.float64)[::-1][:num_steps] * (num_train_timesteps // num_points)
        return t + min(steps_offset, num_train_timesteps - 1 - t[0])
    if spacing == "linspace":
        t = np.linspace(0, num_train_timesteps - 1, num_points)[::-1][:num_steps]
        return t.copy() if family == "euler" else t.round()
    if spacing == "trailing":
        # A fractional stride can make arange run one too far, to t = -1.
        return np.arange(num_train_timesteps, 0, -num_train_timesteps / num_steps)[:num_steps].round() - 1
    raise ValueError(f"spacing is {spacing!r}; timesteps are spaced leading, linspace or trailing")


def sigma_grid(
    schedule: NoiseSchedule | FlowSchedule,
    num_steps: int,
    sampler: str = "ddim",
    spacing: str = "trailing",
    steps_offset: int = 0,
    final_sigma: float = 0.0,
) -> Tensor:
    """List the noise levels of a run of N steps: those at which the network is asked, then the one it ends on.

    With a `NoiseSchedule` they are the sigmas of `timesteps`, linear between two of them, or `karras` or `exponential`
    (see `spread`) from the schedule's last sigma to its first. With a `FlowSchedule` s is uniform before the shift: N
    points from 1 to 1/T as in diffusers' `FlowMatchEulerDiscreteScheduler`, for the `dpm` family N + 1 without the last
    as in its `UniPCMultistepScheduler`; its `karras` and `exponential` are spread over s. Where the first level is
    pure noise, it is large and finite: for the `ddim` family and for flows `INFINITE_SIGMA`, else the last of
    `schedule.sigmas`.

    Args:
        schedule: gives T and the sigma of each timestep.
        num_steps: N, from 1 to T.
        sampler: a key of `FAMILIES`.
        spacing: one of `SPACINGS`.
        steps_offset: see `timesteps`.
        final_sigma: what `ddim` ends on; all other samplers end on 0. 0 is x̂_0 itself; a scheduler config with
            `set_alpha_to_one` false (Stable Diffusion 1.x) means `schedule.sigmas[0]`.

    Returns:
        (N + 1,) float64 on the CPU, falling; the last two are equal where `final_sigma` is the last timestep's.

    Raises:
        ValueError: an unknown `spacing`; `final_sigma` is negative or above the last timestep's; and as `timesteps`
            does.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing is {spacing!r}; choose one of {', '.join(SPACINGS)}")
    family = _family(sampler)
    _check_num_steps(num_steps, schedule.num_train_timesteps)
    if isinstance(schedule, FlowSchedule):
        sigmas = _flow_sigmas(schedule, num_steps, family, spacing)
    elif spacing in ("karras", "exponential"):
        sigmas = spread(schedule.sigmas[-1].item(), schedule.sigmas[0].item(), num_steps, spacing)
    else:
        t = timesteps(num_steps, schedule.num_train_timesteps, sampler, spacing, steps_offset)
        sigmas = np.interp(t, np.arange(schedule.num_train_timesteps), schedule.sigmas.numpy())
        if schedule.zero_terminal_snr and family == "ddim" and t[0] == schedule.num_train_timesteps - 1:
            sigmas[0] = INFINITE_SIGMA
    last = final_sigma if sampler == "ddim" else 0.0
    if not 0 <= last <= sigmas[-1]:
        raise ValueError(f"final_sigma is {last}; need 0 to {sigmas[-1]:.4g}, the last timestep's sigma")
    return torch.from_numpy(np.append(sigmas, last))


def spread(high: float, low: float, num: int, spacing: str) -> np.ndarray:
    """Spread (num,) levels from `high` to `low`, both included: `karras` or `exponential`.

    `karras` is uniform in sigma^(1/7) (arXiv:2206.00364 Eq. 5, ρ = 7), `exponential` in log sigma.

    >>> spread(100.0, 1.0, 3, "exponential").round(6).tolist()
    [100.0, 10.0, 1.0]
    """
    ramp = np.linspace(0, 1, num)
    if spacing == "karras":
        levels = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    else:
        levels = high * (low / high) ** ramp
    # Rounding must not carry the ends out of the schedule.
    return np.where(ramp == 0, high, np.where(ramp == 1, low, levels))


def start(noise: Tensor, sigmas: Tensor, schedule: NoiseSchedule | FlowSchedule, sampler: str, spacing: str) -> Tensor:
    """Scale unit noise to the x that a sampler starts from, as diffusers does.

    That is the x whose network input is the noise itself, but for the `euler` family sigma·ε on the spacings that
    start at the schedule's end.

    Args:
        noise: (B, C, h, w) N(0, I).
        sigmas: the grid, as `sigma_grid` gives it.
        schedule, sampler, spacing: those of the grid.

    Returns:
        (B, C, h, w), float32 at least.
    """
    sigma = float(sigmas[0])
    if _family(sampler) == "euler" and spacing != "leading":
        return at_least_float32(noise) * sigma
    return at_least_float32(noise) / schedule.alpha(sigma)


def _flow_sigmas(schedule: FlowSchedule, num_steps: int, family: str, spacing: str) -> np.ndarray:
    low = np.array(1 / schedule.num_train_timesteps)
    if family == "dpm" and spacing not in ("karras", "exponential"):
        # A step from s = 1/T to 0 is one too long for what multistep samplers extrapolate: they leave 1/T out.
        s = schedule.shifted(np.linspace(1, low, num_steps + 1)[:-1])
    else:
        # diffusers spaces s between the ends of its shifted table and shifts the lot: the last is shifted twice.
        s = schedule.shifted(np.linspace(1, schedule.shifted(low), num_steps))
    if spacing in ("karras", "exponential"):
        s = spread(s[0], s[-1], num_steps, spacing)
    return np.append(INFINITE_SIGMA, s[1:] / (1 - s[1:]))


def _family(sampler: str) -> str:
    if sampler not in FAMILIES:
        raise ValueError(f"sampler is {sampler!r}; choose one of {', '.join(FAMILIES)}")
    return FAMILIES[sampler]


def _check_num_steps(num_steps: int, num_train_timesteps: int) -> None:
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(f"num_steps is {num_steps}; choose 1 to {num_train_timesteps}, the steps of training")
