import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.schedulers import CLASSES, TIME_SPACINGS, WITH_KARRAS, make_scheduler
from ldm.diffusion.grids import INFINITE_SIGMA, SPACINGS, sigma_grid, spread, start, timesteps
from ldm.diffusion.samplers import FAMILIES
from ldm.diffusion.schedule import TERMINAL_SIGMA, FlowSchedule, NoiseSchedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULE = NoiseSchedule()
ZERO_SNR = NoiseSchedule(rescale_betas_zero_snr=True)
ONE_OF_EACH_FAMILY = ("ddim", "euler", "unipc")


# --- timesteps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps_offset", [0, 1, 7])
@pytest.mark.parametrize("spacing", TIME_SPACINGS)
@pytest.mark.parametrize("sampler", ONE_OF_EACH_FAMILY)
def test_every_step_count_gives_that_many_timesteps_in_range(sampler, spacing, steps_offset):
    for num_steps in range(1, 1001):
        t = timesteps(num_steps, 1000, sampler, spacing, steps_offset)
        assert t.dtype == np.float64
        assert t.shape == (num_steps,), num_steps
        assert (np.diff(t) < 0).all(), num_steps
        assert t[0] <= 999, num_steps
        assert t[-1] >= 0, num_steps
        assert sampler == "euler" or (t == t.round()).all(), num_steps


@pytest.mark.parametrize("spacing", TIME_SPACINGS)
def test_step_counts_keep_to_the_definition(spacing):
    """Table 2 of arXiv:2305.08891 in exact arithmetic; where that lands on a half, either neighbour is right."""
    for n in [*range(1, 101), *range(101, 1000, 13), 999, 1000]:
        exact = {
            "leading": lambda i, n=n: Fraction((n - 1 - i) * (1000 // n)),
            "linspace": lambda i, n=n: Fraction((n - 1 - i) * 999, max(n - 1, 1)),
            "trailing": lambda i, n=n: 1000 - Fraction(i * 1000, n) - 1,
        }[spacing]
        for i, (t, fractional) in enumerate(
            zip(timesteps(n, 1000, "ddim", spacing), timesteps(n, 1000, "euler", spacing), strict=True)
        ):
            assert abs(int(t) - exact(i)) <= Fraction(1, 2), (n, i)
            if spacing == "linspace":
                assert fractional == pytest.approx(float(exact(i)), abs=1e-9), (n, i)
        if n < 1000 and spacing != "trailing":  # the dpm family has one point more and drops the last
            assert (
                timesteps(n, 1000, "unipc", spacing).tolist() == timesteps(n + 1, 1000, "ddim", spacing)[:-1].tolist()
            )


@pytest.mark.parametrize(
    ("spacing", "steps_offset"), [("leading", 0), ("leading", 1), ("linspace", 0), ("trailing", 0)]
)
@pytest.mark.parametrize("sampler", CLASSES)
def test_every_step_count_is_diffusers_where_that_stays_in_range(sampler, spacing, steps_offset):
    theirs = make_scheduler(sampler, spacing, steps_offset=steps_offset)
    compared = 0
    # The others look up sigmas too, and some are slow at it: every seventh will do.
    for num_steps in range(1, 1001) if sampler in ("ddim", "euler", "unipc") else range(1, 1001, 7):
        theirs.set_timesteps(num_steps)
        t = theirs.timesteps.double()
        if sampler in ("heun", "dpmpp_sde"):
            t = t[[0, *range(2, len(t), 2)]]  # each but the first is there twice, or has its midpoint beside it
        # Trailing runs on to t = -1 for 62 step counts from 61 on; leading with offset 1 reaches 1000 at N = 1000; with
        # N + 1 points N = 1000 does not fit: diffusers asks at one t over and over (leading) or twice (linspace).
        if t.min() >= 0 and t.max() <= 999 and (t.diff() < 0).all():
            ours = torch.from_numpy(timesteps(num_steps, 1000, sampler, spacing, steps_offset))
            torch.testing.assert_close(ours, t, rtol=0, atol=1e-3)
            compared += 1
    assert compared >= (900 if sampler in ("ddim", "euler", "unipc") else 125)


def test_wrong_grids_are_refused():
    for num_steps in (0, 1001):
        with pytest.raises(ValueError, match=f"num_steps is {num_steps}; choose 1 to 1000"):
            timesteps(num_steps, 1000)
        for schedule in (SCHEDULE, FlowSchedule()):
            with pytest.raises(ValueError, match=f"num_steps is {num_steps}; choose 1 to 1000"):
                sigma_grid(schedule, num_steps, spacing="karras")
    with pytest.raises(ValueError, match="'karras'; timesteps are spaced leading, linspace or trailing"):
        timesteps(10, 1000, spacing="karras")
    with pytest.raises(ValueError, match="'uniform'; choose one of leading, linspace, trailing, karras, exponential"):
        sigma_grid(SCHEDULE, 10, spacing="uniform")
    with pytest.raises(ValueError, match="'plms'; choose one of ddim, ddpm, euler"):
        sigma_grid(SCHEDULE, 10, sampler="plms")
    with pytest.raises(ValueError, match="steps_offset is -1"):
        timesteps(10, 1000, spacing="leading", steps_offset=-1)
    for final_sigma in (-0.1, 1.0):
        with pytest.raises(ValueError, match="final_sigma is"):
            sigma_grid(SCHEDULE, 1000, final_sigma=final_sigma)


# --- noise levels ----------------------------------------------------------------------------------------------------


@st.composite
def grids(draw):
    num_train_timesteps = draw(st.integers(2, 1200))
    schedule = draw(
        st.sampled_from(
            [
                lambda T: NoiseSchedule(num_train_timesteps=T),
                lambda T: NoiseSchedule("linear", 1e-4, 0.02, T),
                lambda T: NoiseSchedule("squaredcos_cap_v2", num_train_timesteps=T),
                lambda T: NoiseSchedule(num_train_timesteps=T, rescale_betas_zero_snr=True),
                lambda T: NoiseSchedule("linear", 1e-4, 0.02, T, rescale_betas_zero_snr=True),
                lambda T: FlowSchedule(T),
                lambda T: FlowSchedule(T, 3.0),
                lambda T: FlowSchedule(T, 0.2),
            ]
        )
    )(num_train_timesteps)
    num_steps = draw(st.integers(1, num_train_timesteps) | st.just(num_train_timesteps))
    return schedule, num_steps, draw(st.sampled_from(list(FAMILIES))), draw(st.sampled_from(SPACINGS))


@settings(max_examples=300)
@given(grids(), st.integers(0, 3))
def test_every_grid_falls_strictly_to_0(grid, steps_offset):
    schedule, num_steps, sampler, spacing = grid
    sigmas = sigma_grid(schedule, num_steps, sampler, spacing, steps_offset)
    assert sigmas.dtype == torch.float64
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas.isfinite().all()
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    t = [schedule.sigma_to_t(sigma) for sigma in sigmas[:-1].tolist()]
    assert min(t) >= 0 and max(t) <= schedule.num_train_timesteps
    if isinstance(schedule, NoiseSchedule):
        assert sigmas[-2] >= schedule.sigmas[0]
        assert sigmas[0] <= schedule.sigmas[-1] or sigmas[0] == INFINITE_SIGMA


@pytest.mark.parametrize("spacing", TIME_SPACINGS)
@pytest.mark.parametrize("sampler", ONE_OF_EACH_FAMILY)
def test_a_grid_is_the_sigmas_of_its_timesteps_and_the_last(sampler, spacing):
    for num_steps in (1, 2, 30, 999, 1000):
        sigmas = sigma_grid(SCHEDULE, num_steps, sampler, spacing, steps_offset=1)
        t = timesteps(num_steps, 1000, sampler, spacing, 1)
        whole = t == t.round()
        assert torch.equal(sigmas[:-1][whole], SCHEDULE.sigmas[t[whole].astype(int)])
        # Between two timesteps diffusers is linear in sigma, while we ask the network where log sigma is.
        low = SCHEDULE.sigmas[t.astype(int)]
        high = SCHEDULE.sigmas[np.minimum(t.astype(int) + 1, 999)]
        torch.testing.assert_close(sigmas[:-1], low + torch.from_numpy(t % 1) * (high - low))


def test_only_ddim_ends_above_0():
    first = SCHEDULE.sigmas[0].item()
    for sampler in FAMILIES:
        for spacing in SPACINGS:
            sigmas = sigma_grid(SCHEDULE, 20, sampler, spacing, 1, final_sigma=first)
            assert sigmas[-1] == (first if sampler == "ddim" else 0)
            assert (sigmas[:-1].diff() < 0).all()


def test_karras_is_eq_5_and_exponential_is_uniform_in_log_sigma():
    high, low = SCHEDULE.sigmas[-1].item(), SCHEDULE.sigmas[0].item()
    for sampler in FAMILIES:
        for num_steps in (2, 7, 50):
            karras, exponential = (sigma_grid(SCHEDULE, num_steps, sampler, s) for s in ("karras", "exponential"))
            for sigmas in (karras, exponential):
                assert (sigmas[0], sigmas[-2]) == (high, low)
            for i in range(num_steps):
                ramp = i / (num_steps - 1)
                eq_5 = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
                assert karras[i].item() == pytest.approx(eq_5, rel=1e-12)
            ratios = exponential[1:-1] / exponential[:-2]
            torch.testing.assert_close(ratios, torch.full_like(ratios, (low / high) ** (1 / (num_steps - 1))))
    assert spread(5.0, 2.0, 1, "karras").tolist() == spread(5.0, 2.0, 1, "exponential").tolist() == [5.0]


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "karras", "exponential"])
@pytest.mark.parametrize("sampler", WITH_KARRAS)
def test_noise_levels_are_diffusers(sampler, spacing):
    """Also beyond the step counts of the parity tests."""
    theirs = make_scheduler(sampler, spacing)
    for num_steps in (2, 3, 25, 50, 60, 100, 250, 500):
        theirs.set_timesteps(num_steps)
        expected = theirs.sigmas.double().unique().flip(0)  # some are there twice
        ours = sigma_grid(SCHEDULE, num_steps, sampler, spacing)
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=0)  # they multiply in float32


# --- pure noise ------------------------------------------------------------------------------------------------------


def test_zero_terminal_snr_starts_at_a_large_sigma():
    for sampler, family in FAMILIES.items():
        for spacing in SPACINGS:
            first = sigma_grid(ZERO_SNR, 20, sampler, spacing)[0].item()
            if spacing == "leading":  # does not start at the end
                assert first < TERMINAL_SIGMA / 2
            elif family == "ddim" and spacing in TIME_SPACINGS:
                assert first == INFINITE_SIGMA
            else:
                assert first == TERMINAL_SIGMA


def test_float32_does_not_see_x_0_beside_the_infinite_sigma():
    x_0, noise = torch.tensor(0.5), torch.tensor(1.0)
    assert x_0 + INFINITE_SIGMA * noise == INFINITE_SIGMA * noise


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_grids_are_diffusers(shift):
    schedule = FlowSchedule(1000, shift)
    cases = [("euler", "trailing", {}), ("ddpm", "leading", {}), ("heun", "linspace", {})]
    cases += [
        (sampler, spacing, {f"use_{spacing}_sigmas": True})
        for sampler in ("euler", "unipc")
        for spacing in ("karras", "exponential")
    ]
    for sampler, spacing, options in cases:
        theirs = FlowMatchEulerDiscreteScheduler(1000, shift, **options)
        for num_steps in (1, 2, 28, 1000):
            theirs.set_timesteps(num_steps)
            sigmas = sigma_grid(schedule, num_steps, sampler, spacing)
            assert sigmas[0] == INFINITE_SIGMA
            torch.testing.assert_close(sigmas / (1 + sigmas), theirs.sigmas.double(), rtol=1e-6, atol=1e-7)
            asked = [schedule.sigma_to_t(sigma) for sigma in sigmas[:-1].tolist()]
            torch.testing.assert_close(torch.tensor(asked), theirs.timesteps, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_multistep_flow_grids_are_unipc_s_in_diffusers(sampler, shift):
    """Not FlowMatchEuler's, which ends s = …, 1/T, 0: with that step an extrapolated x̂_0 goes far astray."""
    theirs = UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction")
    for num_steps in (1, 2, 28, 1000):
        theirs.set_timesteps(num_steps)
        sigmas = sigma_grid(FlowSchedule(1000, shift), num_steps, sampler)
        # They start at s = 1 - 1e-6.
        torch.testing.assert_close(sigmas / (1 + sigmas), theirs.sigmas.double(), rtol=1e-6, atol=2e-6)


# --- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", FAMILIES)
def test_the_start_is_scaled_as_in_diffusers(sampler, spacing):
    noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    sigmas = sigma_grid(SCHEDULE, 10, sampler, spacing)
    first = sigmas[0].item()
    theirs = make_scheduler(sampler, spacing)
    theirs.set_timesteps(10)
    scale = float(theirs.init_noise_sigma)
    if FAMILIES[sampler] != "euler":
        assert scale == 1  # of x_t, which is x / √(1 + sigma²)
        scale *= math.sqrt(1 + first**2)
    x = start(noise, sigmas, SCHEDULE, sampler, spacing)
    torch.testing.assert_close(x, noise * scale, rtol=1e-4, atol=0)
    assert x.std().item() == pytest.approx(noise.std().item() * first, rel=0.01)


@pytest.mark.parametrize("sampler", FAMILIES)
def test_a_flow_starts_with_the_noise_itself(sampler):
    schedule = FlowSchedule()
    noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    sigmas = sigma_grid(schedule, 10, sampler)
    x = start(noise, sigmas, schedule, sampler, "trailing")
    torch.testing.assert_close(x * schedule.alpha(sigmas[0].item()), noise, rtol=1e-6, atol=0)


def test_the_start_is_float32_at_least():
    sigmas = sigma_grid(FlowSchedule(), 3, "euler")
    x = start(torch.ones(1, 1, 1, 1, dtype=torch.float16), sigmas, FlowSchedule(), "euler", "trailing")
    assert x.dtype == torch.float32
    assert x.isfinite().all()
