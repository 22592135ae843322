"""Whole sampling runs beside diffusers' schedulers: same network, same noise, same timesteps.

diffusers' DDIM steps to prev_t = t - T // N. That is the next timestep of the grid with leading spacing, and with
trailing spacing where N divides T. Elsewhere it is not, and there the paper's formula, written out below in float64 and
itself checked against diffusers, takes its place. diffusers' DDPM looks the next timestep up: right on every grid.
"""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.parameterization import PREDICTION_TYPES
from ldm.diffusion.samplers import ddim, ddpm, from_vp, sigma_grid, timesteps, to_vp
from ldm.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule()
CONTEXT = torch.zeros(2, 1, 1)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# spacing, steps_offset, set_alpha_to_one
GRIDS = [
    ("leading", 0, True),
    ("leading", 0, False),
    ("leading", 1, True),
    ("leading", 1, False),
    ("trailing", 0, True),
    ("linspace", 0, True),
]
STEP_COUNTS = range(1, 61)


def make_network():
    """Make a small random MLP over channels and time, the same each time."""
    g = torch.Generator().manual_seed(0)
    w_in, w_t, w_out = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in [(16, 4), (16,), (4, 16)])

    def network(x_t, t, context):
        hidden = torch.einsum("oc,bchw->bohw", w_in.to(x_t) / 2, x_t)
        time = torch.sin(0.01 * t.to(x_t)[:, None] * w_t.to(x_t))
        return torch.einsum("oc,bchw->bohw", w_out.to(x_t) / 4, torch.tanh(hidden + time[:, :, None, None]))

    return network


def start(seed=1):
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(seed))


def seeded_noise(seed=2):
    g = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=g)


def run_ours(sampler, num_steps, grid, prediction_type, **kwargs):
    spacing, steps_offset, set_alpha_to_one = grid
    final_sigma = 0.0 if set_alpha_to_one else SCHEDULE.sigmas[0].item()
    sigmas = sigma_grid(SCHEDULE, num_steps, spacing, steps_offset, final_sigma)
    denoiser = Denoiser(make_network(), SCHEDULE, prediction_type)
    x = sampler(lambda x, s: denoiser(x, s, CONTEXT), from_vp(start(), sigmas[0]), sigmas, seeded_noise(), **kwargs)
    return to_vp(x, sigmas[-1])


def run_diffusers(scheduler, num_steps, **kwargs):
    scheduler.set_timesteps(num_steps)
    network, x, g = make_network(), start(), torch.Generator().manual_seed(2)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(2), CONTEXT), t, x, generator=g, **kwargs).prev_sample
    return x


def run_paper(num_steps, grid, prediction_type, eta):
    """DDIM (arXiv:2010.02502) Eq. 12 and 16 on x_t itself, in float64, from each timestep to the next of the grid."""
    spacing, steps_offset, set_alpha_to_one = grid
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abars = torch.cumprod(1 - betas, 0).tolist()
    steps = timesteps(num_steps, spacing, 1000, steps_offset).tolist()
    last = 1.0 if set_alpha_to_one else abars[0]
    network, noise, x = make_network(), seeded_noise(), start().double()
    for i, t in enumerate(steps):
        a, a_next = abars[t], abars[steps[i + 1]] if i + 1 < num_steps else last
        out = network(x, torch.tensor([t, t]), CONTEXT)
        if prediction_type == "epsilon":
            eps, x_0 = out, (x - math.sqrt(1 - a) * out) / math.sqrt(a)
        elif prediction_type == "v_prediction":
            eps, x_0 = math.sqrt(a) * out + math.sqrt(1 - a) * x, math.sqrt(a) * x - math.sqrt(1 - a) * out
        else:
            eps, x_0 = (x - math.sqrt(a) * out) / math.sqrt(1 - a), out
        s = eta * math.sqrt((1 - a_next) / (1 - a)) * math.sqrt(1 - a / a_next)
        x = math.sqrt(a_next) * x_0 + math.sqrt(1 - a_next - s**2) * eps
        if s > 0:
            x = x + s * noise(x).double()
    return x


def assert_same(ours, theirs, rtol, where):
    error = (ours.double() - theirs.double()).abs().max() / theirs.abs().max()
    assert error < rtol, f"{where}: relative error {error:.1e}"


def ddim_scheduler(grid, prediction_type):
    spacing, steps_offset, set_alpha_to_one = grid
    return DDIMScheduler(
        **BETAS,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        steps_offset=steps_offset,
        set_alpha_to_one=set_alpha_to_one,
        clip_sample=False,
    )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid[0] != "linspace"], ids=str)
def test_ddim_is_diffusers_ddim(grid, prediction_type):
    scheduler = ddim_scheduler(grid, prediction_type)
    for num_steps in STEP_COUNTS:
        if grid[0] == "trailing" and 1000 % num_steps != 0:
            continue
        for eta in (0.0, 0.5):
            ours = run_ours(ddim, num_steps, grid, prediction_type, eta=eta)
            assert_same(ours, run_diffusers(scheduler, num_steps, eta=eta), 1e-4, f"{num_steps} steps, eta {eta}")


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_ddim_is_the_paper_s_formula_on_every_grid(grid, prediction_type):
    for num_steps in STEP_COUNTS:
        ours = run_ours(ddim, num_steps, grid, prediction_type, eta=0.5)
        assert_same(ours, run_paper(num_steps, grid, prediction_type, eta=0.5), 1e-5, f"{num_steps} steps")


def test_the_paper_s_formula_is_diffusers_where_diffusers_keeps_to_the_grid():
    for grid in [("leading", 1, False), ("trailing", 0, True)]:
        theirs = run_diffusers(ddim_scheduler(grid, "epsilon"), 20, eta=0.5)
        assert_same(run_paper(20, grid, "epsilon", eta=0.5), theirs, 1e-4, grid)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid[2]], ids=str)
def test_ddpm_is_diffusers_ddpm(grid, prediction_type):
    spacing, steps_offset, _ = grid
    scheduler = DDPMScheduler(
        **BETAS,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        steps_offset=steps_offset,
        clip_sample=False,
    )
    for num_steps in STEP_COUNTS:
        ours = run_ours(ddpm, num_steps, grid, prediction_type)
        assert_same(ours, run_diffusers(scheduler, num_steps), 1e-4, f"{num_steps} steps")


def test_ddpm_over_all_of_training_s_steps_is_diffusers_ddpm():
    ours = run_ours(ddpm, 1000, ("leading", 0, True), "v_prediction")
    theirs = run_diffusers(DDPMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False), 1000)
    assert_same(ours, theirs, 1e-4, "1000 steps")
