"""Whole sampling runs beside diffusers' schedulers: same network, same noise, same grid, same latents.

Where diffusers keeps to the paper, every step count from 1 to 60 must agree within 1e-4. Where it does not, the paper
is followed, and what of diffusers is set right for the comparison is said here:

- DDIM steps to prev_t = t - T // N. That is the next timestep of the grid with leading spacing, and with trailing
  spacing where N divides T. Elsewhere it is not, and there the paper's formula, written out below in float64 and itself
  checked against diffusers, takes its place. diffusers' DDPM looks the next timestep up: right on every grid.
- With Karras and exponential sigmas, DPMSolverMultistep and UniPC round or cut the timesteps at which the network is
  asked to whole numbers; k-diffusion and diffusers' other schedulers do not.
- With Karras and exponential sigmas on linspace, N = 1 takes both of its ends from t = 0: trailing stands in there.
- Euler ancestral cannot do Karras and exponential sigmas; it is given those of Euler.
- With zero terminal SNR, Euler's x + (sigma' - sigma) d takes the difference of numbers of order sigma = 4096, which in
  float32 leaves errors of some 4096 · 2^-24 = 2.4e-4 (ours does not, see test_samplers.py).
"""

import math

import diffusers
import pytest
import torch

from diffusion.schedulers import CLASSES, TIME_SPACINGS, WITH_KARRAS, make_scheduler
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grids import SPACINGS, sigma_grid, start, timesteps
from ldm.diffusion.samplers import FAMILIES, SAMPLERS, to_vp
from ldm.diffusion.schedule import FlowSchedule, NoiseSchedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULE = NoiseSchedule()
ZERO_SNR = NoiseSchedule(rescale_betas_zero_snr=True)
BOTH = ("epsilon", "v_prediction")
SHAPE = (2, 4, 3, 3)
# spacing, steps_offset, set_alpha_to_one
DDIM_GRIDS = [
    ("leading", 0, True),
    ("leading", 0, False),
    ("leading", 1, True),
    ("leading", 1, False),
    ("trailing", 0, True),
    ("linspace", 0, True),
]
STEP_COUNTS = range(1, 61)
SOME_STEP_COUNTS = (1, 2, 3, 4, 5, 8, 10, 14, 15, 20, 25, 40, 50, 60)
TOLERANCE = 1e-4


def make_network(dtype=torch.float32):
    """Make a small random MLP over channels and time, the same each time."""
    g = torch.Generator().manual_seed(0)
    w_in, w_t, w_out = (
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in [(4, 16), (16,), (16, 4)]
    )

    def network(x_t, t, context=None):
        time = torch.sin(0.01 * t.to(dtype)[:, None, None] * w_t)
        hidden = torch.tanh(x_t.permute(0, 2, 3, 1).flatten(1, 2) @ w_in / 2 + time)
        return (hidden @ w_out / 4).unflatten(1, SHAPE[2:]).permute(0, 3, 1, 2)

    return network


NETWORK = make_network()


def unit_noise(seed=1):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def seeded_noise(seed=2):
    g = torch.Generator().manual_seed(seed)
    return lambda *_: torch.randn(SHAPE, generator=g)


def brownian(noise):
    """Give DPMSolverSDE what it takes its noise from, one Brownian path over sigma, made of these draws."""
    first = []

    def increment(sigma, sigma_next):
        draw = noise()
        if not first:
            first.append((sigma_next, draw))
            return draw
        middle, draw_before = first.pop()
        path = (sigma - middle).sqrt() * draw_before + (middle - sigma_next).sqrt() * draw
        return path / (sigma - sigma_next).sqrt()

    return increment


def run_ours(
    sampler, num_steps, spacing, prediction_type, steps_offset=0, final_sigma=0.0, schedule=SCHEDULE, **kwargs
):
    sigmas = sigma_grid(schedule, num_steps, sampler, spacing, steps_offset, final_sigma)
    denoiser = Denoiser(NETWORK, schedule, prediction_type)
    x = start(unit_noise(), sigmas, schedule, sampler, spacing)
    x = SAMPLERS[sampler](lambda x, sigma: denoiser(x, sigma, None), x, sigmas, seeded_noise(), **kwargs)
    return to_vp(x, float(sigmas[-1]))


def run_diffusers(scheduler, asked=None, **kwargs):
    """Run a scheduler whose timesteps are set; `asked(sigma)` gives the t for the network in place of its own."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # they would look for the first timestep, and find the wrong one of two equal ones
    if isinstance(scheduler, diffusers.DPMSolverSDEScheduler):
        scheduler.noise_sampler = brownian(seeded_noise())
    elif "generator" in scheduler.step.__code__.co_varnames:
        kwargs["generator"] = torch.Generator().manual_seed(2)
    x = unit_noise() * getattr(scheduler, "init_noise_sigma", 1.0)
    if isinstance(scheduler, diffusers.LMSDiscreteScheduler):
        scheduler.sigmas = scheduler.sigmas.tolist()  # it integrates over them in Python, slowly
    for i, t in enumerate(scheduler.timesteps):
        x_t = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        t_asked = t if asked is None else torch.tensor(asked(float(scheduler.sigmas[i])))
        x = scheduler.step(NETWORK(x_t, t_asked.expand(2)), t, x, **kwargs).prev_sample
    return x


def assert_same(ours, theirs, rtol, where):
    error = (ours.double() - theirs.double()).abs().max() / theirs.abs().max()
    assert error < rtol, f"{where}: relative error {error:.1e}"


# --- the usual samplers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", BOTH)
@pytest.mark.parametrize(("spacing", "steps_offset"), [("leading", 1), ("linspace", 0), ("trailing", 0)])
@pytest.mark.parametrize("sampler", [name for name in CLASSES if name != "ddim"])
def test_samplers_are_diffusers(sampler, spacing, steps_offset, prediction_type):
    scheduler = make_scheduler(sampler, spacing, prediction_type, steps_offset=steps_offset)
    for num_steps in STEP_COUNTS:
        scheduler.set_timesteps(num_steps)
        ours = run_ours(sampler, num_steps, spacing, prediction_type, steps_offset)
        assert_same(ours, run_diffusers(scheduler), TOLERANCE, f"{num_steps} steps")


@pytest.mark.parametrize("prediction_type", BOTH)
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("sampler", [*WITH_KARRAS, "euler_a"])
def test_samplers_are_diffusers_on_spread_sigmas(sampler, spacing, prediction_type):
    asked = SCHEDULE.sigma_to_t if FAMILIES[sampler] == "dpm" else None
    for ends, step_counts in [("trailing", [1]), ("linspace", STEP_COUNTS[1:])]:
        scheduler = make_scheduler(sampler, spacing, prediction_type, timestep_spacing=ends)
        lender = make_scheduler("euler", spacing, timestep_spacing=ends)
        for num_steps in step_counts:
            scheduler.set_timesteps(num_steps)
            if sampler == "euler_a":
                lender.set_timesteps(num_steps)
                scheduler.sigmas, scheduler.timesteps = lender.sigmas, lender.timesteps
            ours = run_ours(sampler, num_steps, spacing, prediction_type)
            assert_same(ours, run_diffusers(scheduler, asked), TOLERANCE, f"{num_steps} steps")


def test_diffusers_cuts_timesteps_of_spread_sigmas():
    """What the comparison above sets right; if it fails, drop it there."""
    for sampler in ("dpmpp_2m", "unipc"):
        for spacing in ("karras", "exponential"):
            scheduler = make_scheduler(sampler, spacing)
            scheduler.set_timesteps(10)
            exact = torch.tensor([SCHEDULE.sigma_to_t(sigma) for sigma in scheduler.sigmas[:-1].tolist()])
            assert (scheduler.timesteps - exact).abs().max() > 0.1


# --- DDIM and DDPM ---------------------------------------------------------------------------------------------------


def final_sigma(set_alpha_to_one):
    return 0.0 if set_alpha_to_one else SCHEDULE.sigmas[0].item()


def run_paper(num_steps, grid, prediction_type, eta):
    """DDIM (arXiv:2010.02502) Eq. 12 and 16 on x_t itself, in float64, from each timestep to the next of the grid."""
    spacing, steps_offset, set_alpha_to_one = grid
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abars = torch.cumprod(1 - betas, 0).tolist()
    steps = timesteps(num_steps, 1000, "ddim", spacing, steps_offset).astype(int).tolist()
    last = 1.0 if set_alpha_to_one else abars[0]
    network, noise, x = make_network(torch.float64), seeded_noise(), unit_noise().double()
    for i, t in enumerate(steps):
        a, a_next = abars[t], abars[steps[i + 1]] if i + 1 < num_steps else last
        out = network(x, torch.tensor([t, t]))
        if prediction_type == "epsilon":
            eps, x_0 = out, (x - math.sqrt(1 - a) * out) / math.sqrt(a)
        elif prediction_type == "v_prediction":
            eps, x_0 = math.sqrt(a) * out + math.sqrt(1 - a) * x, math.sqrt(a) * x - math.sqrt(1 - a) * out
        else:
            eps, x_0 = (x - math.sqrt(a) * out) / math.sqrt(1 - a), out
        s = eta * math.sqrt((1 - a_next) / (1 - a)) * math.sqrt(1 - a / a_next)
        x = math.sqrt(a_next) * x_0 + math.sqrt(1 - a_next - s**2) * eps
        if s > 0:
            x = x + s * noise().double()
    return x


def ddim_scheduler(grid, prediction_type):
    spacing, steps_offset, set_alpha_to_one = grid
    return make_scheduler(
        "ddim", spacing, prediction_type, steps_offset=steps_offset, set_alpha_to_one=set_alpha_to_one
    )


@pytest.mark.parametrize("prediction_type", [*BOTH, "sample"])
@pytest.mark.parametrize("grid", [grid for grid in DDIM_GRIDS if grid[0] != "linspace"], ids=str)
def test_ddim_is_diffusers_ddim(grid, prediction_type):
    spacing, steps_offset, set_alpha_to_one = grid
    scheduler = ddim_scheduler(grid, prediction_type)
    for num_steps in SOME_STEP_COUNTS if prediction_type == "sample" else STEP_COUNTS:
        if spacing == "trailing" and 1000 % num_steps != 0:
            continue
        for eta in (0.0, 0.5):
            scheduler.set_timesteps(num_steps)
            ours = run_ours(
                "ddim", num_steps, spacing, prediction_type, steps_offset, final_sigma(set_alpha_to_one), eta=eta
            )
            assert_same(ours, run_diffusers(scheduler, eta=eta), TOLERANCE, f"{num_steps} steps, eta {eta}")


@pytest.mark.parametrize("prediction_type", [*BOTH, "sample"])
@pytest.mark.parametrize("grid", DDIM_GRIDS, ids=str)
def test_ddim_is_the_paper_s_formula_on_every_grid(grid, prediction_type):
    spacing, steps_offset, set_alpha_to_one = grid
    for num_steps in SOME_STEP_COUNTS if prediction_type == "sample" else STEP_COUNTS:
        ours = run_ours(
            "ddim", num_steps, spacing, prediction_type, steps_offset, final_sigma(set_alpha_to_one), eta=0.5
        )
        assert_same(ours, run_paper(num_steps, grid, prediction_type, eta=0.5), 1e-5, f"{num_steps} steps")


def test_the_paper_s_formula_is_diffusers_where_diffusers_keeps_to_the_grid():
    for grid in [("leading", 1, False), ("trailing", 0, True)]:
        scheduler = ddim_scheduler(grid, "epsilon")
        scheduler.set_timesteps(20)
        assert_same(run_paper(20, grid, "epsilon", eta=0.5), run_diffusers(scheduler, eta=0.5), TOLERANCE, grid)


def test_ddpm_over_all_of_training_s_steps_is_diffusers_ddpm():
    scheduler = make_scheduler("ddpm", "leading", "v_prediction")
    scheduler.set_timesteps(1000)
    assert_same(run_ours("ddpm", 1000, "leading", "v_prediction"), run_diffusers(scheduler), TOLERANCE, "1000 steps")


# --- zero terminal SNR -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "spacing"),
    [
        (sampler, spacing)
        for sampler in ("ddim", "ddpm", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
        for spacing in SPACINGS
        if spacing in TIME_SPACINGS or sampler in WITH_KARRAS  # what diffusers has
    ],
)
def test_zero_terminal_snr_is_diffusers(sampler, spacing):
    """DDIM and DDPM take ᾱ_T = 0 as it is, the others 2^-24; Heun, LMS and DPMSolverSDE do not know of it."""
    scheduler = make_scheduler(sampler, spacing, "v_prediction", rescale_betas_zero_snr=True)
    asked = ZERO_SNR.sigma_to_t if FAMILIES[sampler] == "dpm" and spacing not in TIME_SPACINGS else None
    for num_steps in SOME_STEP_COUNTS:
        if (sampler == "ddim" and (spacing == "linspace" or 1000 % num_steps != 0)) or (
            spacing not in TIME_SPACINGS and num_steps == 1
        ):
            continue  # where diffusers strays, see above
        scheduler.set_timesteps(num_steps)
        ours = run_ours(sampler, num_steps, spacing, "v_prediction", schedule=ZERO_SNR)
        cancels = sampler in ("euler", "euler_a") and spacing != "leading"
        assert_same(ours, run_diffusers(scheduler, asked), 5e-4 if cancels else TOLERANCE, f"{num_steps} steps")


# --- flows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["trailing", "karras", "exponential"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_euler_on_a_flow_is_diffusers(sampler, shift, spacing):
    options = {} if spacing == "trailing" else {f"use_{spacing}_sigmas": True}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift, **options)
    for num_steps in SOME_STEP_COUNTS:
        scheduler.set_timesteps(num_steps)
        ours = run_ours(sampler, num_steps, spacing, "flow_prediction", schedule=FlowSchedule(1000, shift))
        assert_same(ours, run_diffusers(scheduler), TOLERANCE, f"{num_steps} steps")


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_multistep_samplers_on_a_flow_are_diffusers(sampler, shift):
    """On our grid: diffusers lets DPM-Solver start at s = 0.999, UniPC at 1 - 1e-6, and cuts the timesteps."""
    schedule = FlowSchedule(1000, shift)
    scheduler_class, own = CLASSES[sampler]
    for num_steps in SOME_STEP_COUNTS:
        scheduler = scheduler_class(use_flow_sigmas=True, prediction_type="flow_prediction", **own)
        scheduler.set_timesteps(num_steps)
        sigmas = sigma_grid(schedule, num_steps, sampler)
        scheduler.sigmas = (sigmas / (1 + sigmas)).float()
        scheduler.sigmas[0] = 1 - 2**-24  # the largest float32 below 1
        scheduler.timesteps = 1000 * scheduler.sigmas[:-1]
        ours = run_ours(sampler, num_steps, "trailing", "flow_prediction", schedule=schedule)
        assert_same(ours, run_diffusers(scheduler), TOLERANCE, f"{num_steps} steps")
