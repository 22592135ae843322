"""diffusers' schedulers under our samplers' names."""

from typing import Any

import diffusers

from ldm.diffusion.samplers import FAMILIES

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TIME_SPACINGS = ("leading", "linspace", "trailing")
CLASSES: dict[str, tuple[type, dict[str, Any]]] = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "lms": (diffusers.LMSDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_sde": (diffusers.DPMSolverSDEScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
}
# DDIM and DDPM know of no other grid, and Euler ancestral does not either; its own k-diffusion does.
WITH_KARRAS = [name for name in CLASSES if FAMILIES[name] != "ddim" and name != "euler_a"]


def make_scheduler(sampler: str, spacing: str, prediction_type: str = "epsilon", **options: Any) -> Any:
    """Build diffusers' scheduler for a sampler of ours; its karras and exponential, if any, stand on its linspace."""
    scheduler, own = CLASSES[sampler]
    if spacing in TIME_SPACINGS:
        grid = {"timestep_spacing": spacing}
    else:
        grid = {f"use_{spacing}_sigmas": True} if sampler in WITH_KARRAS else {}
    return scheduler(**{**BETAS, **own, **grid, "prediction_type": prediction_type, **options})
