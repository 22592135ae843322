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


def read_scheduler(config: Mapping[str, Any]) -> tuple[NoiseSchedule | FlowSchedule, str, dict[str, Any], str]:
    """Read a scheduler's config.

    Returns:
        The schedule; what the network predicts; `spacing`, `steps_offset` and `final_sigma` for `sigma_grid`; and the
        sampler.

    Raises:
        ValueError: an option that we do not have, or a value of another kind.
    """
    schedule = schedule_from_config(config)
    default = "flow_prediction" if isinstance(schedule, FlowSchedule) else "epsilon"
    prediction_type = config.get("prediction_type") or default
    check_prediction_type(prediction_type)
    if (spacing := config.get("timestep_spacing", "leading")) not in SPACINGS[:3]:
        raise ValueError(f"timestep_spacing={spacing!r} is not supported (only {', '.join(SPACINGS[:3])})")
    if not isinstance(steps_offset := config.get("steps_offset", 0), int) or steps_offset < 0:
        raise ValueError(f"steps_offset={steps_offset!r} is not supported (only whole numbers from 0)")
    for name in SPACINGS[3:]:
        if config.get(f"use_{name}_sigmas"):
            spacing = name
    final_sigma = 0.0
    if isinstance(schedule, NoiseSchedule) and not config.get("set_alpha_to_one", True):
        final_sigma = float(schedule.sigmas[0])  # Stable Diffusion 1.x: its last step goes to the first timestep
    sampler = SAMPLERS.get(str(config.get("_class_name")), "ddim")
    if config.get("algorithm_type") == "sde-dpmsolver++":
        sampler = "dpmpp_2m_sde"
    return (
        schedule,
        prediction_type,
        {"spacing": spacing, "steps_offset": steps_offset, "final_sigma": final_sigma},
        sampler,
    )
