"""What a diffusers `scheduler_config.json` says of a model: its noise, its network's output, and how to sample it."""

from collections.abc import Mapping
from typing import Any

from ldm.diffusion.grids import SPACINGS
from ldm.diffusion.parameterization import check_prediction_type
from ldm.diffusion.schedule import FlowSchedule, NoiseSchedule, schedule_from_config

# diffusers' classes that are samplers of ours; a model with another one (PNDM) is sampled by ddim.
SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "HeunDiscreteScheduler": "heun",
    "LMSDiscreteScheduler": "lms",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "UniPCMultistepScheduler": "unipc",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
}


# What a scheduler of diffusers asks of its sampler, with the values that ours have.
SAMPLER_OPTIONS: dict[str, tuple[Any, ...]] = {
    "final_sigmas_type": (None, "zero"),
    "predict_x0": (None, True),
    "solver_order": (None, 2),
    "solver_type": (None, "midpoint", "bh2"),
    "variance_type": (None, "fixed_small", "fixed_small_log"),
}
# Made for few steps with a sampler of their own, without which they draw rubbish.
DISTILLED = ("LCMScheduler", "TCDScheduler")


def default_spacing(sampler: str) -> str:
    """Return the spacing of a model that does not say: that of diffusers' scheduler for the sampler."""
    return "leading" if sampler in ("ddim", "ddpm") else "linspace"


def read_scheduler(config: Mapping[str, Any]) -> tuple[NoiseSchedule | FlowSchedule, str, dict[str, Any], str]:
    """Read a scheduler's config.

    Returns:
        The schedule; what the network predicts; `spacing` (None where it does not say), `steps_offset` and
        `final_sigma` for `sigma_grid`; and the sampler.

    Raises:
        ValueError: an option that we do not have, or a value of another kind.
    """
    kind = str(config.get("_class_name"))
    if kind in DISTILLED:
        raise ValueError(f"_class_name={kind!r} is not supported: the model is distilled for that sampler")
    for name, values in SAMPLER_OPTIONS.items():
        if (value := config.get(name)) not in values:
            raise ValueError(f"{name}={value!r} is not supported (only {', '.join(map(repr, values[1:]))})")
    schedule = schedule_from_config(config)
    default = "flow_prediction" if isinstance(schedule, FlowSchedule) else "epsilon"
    prediction_type = config.get("prediction_type") or default
    check_prediction_type(prediction_type)
    if (spacing := config.get("timestep_spacing")) not in (None, *SPACINGS[:3]):
        raise ValueError(f"timestep_spacing={spacing!r} is not supported (only {', '.join(SPACINGS[:3])})")
    if not isinstance(steps_offset := config.get("steps_offset", 0), int) or steps_offset < 0:
        raise ValueError(f"steps_offset={steps_offset!r} is not supported (only whole numbers from 0)")
    for name in SPACINGS[3:]:
        if config.get(f"use_{name}_sigmas"):
            spacing = name
    final_sigma = 0.0
    if isinstance(schedule, NoiseSchedule) and not config.get("set_alpha_to_one", True):
        final_sigma = float(schedule.sigmas[0])  # Stable Diffusion 1.x: its last step goes to the first timestep
    sampler = SAMPLERS.get(kind, "ddim")
    if config.get("algorithm_type") == "sde-dpmsolver++":
        sampler = "dpmpp_2m_sde"
    return (
        schedule,
        prediction_type,
        {"spacing": spacing, "steps_offset": steps_offset, "final_sigma": final_sigma},
        sampler,
    )
