import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from ldm.diffusion.samplers import (
    SAMPLERS,
    SPACINGS,
    ancestral_step,
    ddim,
    ddpm,
    from_vp,
    sigma_grid,
    timesteps,
    to_vp,
)
from ldm.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule()


def no_noise(x):
    raise AssertionError("a deterministic run asked for noise")


def geometric(high, low, num_steps):
    return torch.logspace(math.log10(high), math.log10(low), num_steps + 1, dtype=torch.float64)


# --- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps_offset", [0, 1, 7])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_step_count_gives_that_many_timesteps_in_range(spacing, steps_offset):
    for num_steps in range(1, 1001):
        t = timesteps(num_steps, spacing, 1000, steps_offset)
        assert t.dtype == torch.int64
        assert t.shape == (num_steps,), num_steps
        assert (t.diff() < 0).all(), num_steps
        assert t[0] <= 999, num_steps
        assert t[-1] >= 0, num_steps


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_step_count_keeps_to_the_definition(spacing):
    """Table 2 of arXiv:2305.08891 in exact arithmetic; where that lands on a half, either neighbour is right."""
    for n in range(1, 1001):
        exact = {
            "leading": lambda i, n=n: Fraction((n - 1 - i) * (1000 // n)),
            "linspace": lambda i, n=n: Fraction((n - 1 - i) * 999, max(n - 1, 1)),
            "trailing": lambda i, n=n: 1000 - Fraction(i * 1000, n) - 1,
        }[spacing]
        for i, t in enumerate(timesteps(n, spacing, 1000).tolist()):
            assert abs(t - exact(i)) <= Fraction(1, 2), (n, i)


@pytest.mark.parametrize(
    ("spacing", "steps_offset"), [("leading", 0), ("leading", 1), ("linspace", 0), ("trailing", 0)]
)
def test_every_step_count_is_diffusers_where_that_stays_in_range(spacing, steps_offset):
    theirs = DDIMScheduler(timestep_spacing=spacing, steps_offset=steps_offset)
    compared = 0
    for num_steps in range(1, 1001):
        theirs.set_timesteps(num_steps)
        # Trailing runs on to t = -1 for 62 step counts from 61 on; leading with offset 1 reaches 1000 at N = 1000.
        if theirs.timesteps.min() >= 0 and theirs.timesteps.max() <= 999:
            assert torch.equal(timesteps(num_steps, spacing, 1000, steps_offset), theirs.timesteps), num_steps
            compared += 1
    assert compared >= 900


@given(st.integers(1, 3000).flatmap(lambda T: st.tuples(st.just(T), st.integers(1, T))), st.sampled_from(SPACINGS))
def test_any_length_of_training_has_a_grid_of_any_length(lengths, spacing):
    num_train_timesteps, num_steps = lengths
    t = timesteps(num_steps, spacing, num_train_timesteps, steps_offset=1)
    assert len(t.unique()) == num_steps
    assert t.min() >= 0
    assert t.max() < num_train_timesteps


def test_wrong_grids_are_refused():
    for num_steps in (0, 1001):
        with pytest.raises(ValueError, match=f"num_steps is {num_steps}; choose 1 to 1000"):
            timesteps(num_steps, "trailing", 1000)
    with pytest.raises(ValueError, match="'uniform'; choose one of leading, linspace, trailing"):
        timesteps(10, "uniform", 1000)
    with pytest.raises(ValueError, match="steps_offset is -1"):
        timesteps(10, "leading", 1000, steps_offset=-1)
    for final_sigma in (-0.1, 1.0):
        with pytest.raises(ValueError, match="final_sigma is"):
            sigma_grid(SCHEDULE, 1000, final_sigma=final_sigma)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_grid_is_the_sigmas_of_its_timesteps_and_the_last(spacing):
    for num_steps in (1, 2, 30, 999, 1000):
        sigmas = sigma_grid(SCHEDULE, num_steps, spacing, steps_offset=1)
        assert sigmas.dtype == torch.float64
        assert (sigmas.diff() < 0).all()
        assert sigmas[-1] == 0
        assert torch.equal(sigmas[:-1], SCHEDULE.sigmas[timesteps(num_steps, spacing, 1000, 1)])
    first = SCHEDULE.sigmas[0].item()
    assert sigma_grid(SCHEDULE, 20, "leading", 1, final_sigma=first)[-1] == first


def test_vp_coordinates_round_trip():
    x_0, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t, sigma in [(0, SCHEDULE.sigmas[0].item()), (999, SCHEDULE.sigmas[-1].item())]:
        x = x_0 + sigma * noise
        torch.testing.assert_close(to_vp(x, sigma), SCHEDULE.add_noise(x_0, noise, torch.tensor([t, t])))
        torch.testing.assert_close(from_vp(to_vp(x, sigma), sigma), x)
    assert torch.equal(to_vp(x, 0.0), x)


# --- steps -----------------------------------------------------------------------------------------------------------


@given(st.floats(1e-3, 1e3), st.just(0.0) | st.floats(1e-9, 1), st.floats(0, 1))
def test_an_ancestral_step_ends_at_the_next_noise_level(sigma, fraction, eta):
    sigma_next = sigma * fraction
    down, up = ancestral_step(sigma, sigma_next, eta)
    assert math.hypot(down, up) == pytest.approx(sigma_next, rel=1e-9)
    # DDIM Eq. 16 in the paper's own terms, divided by √ᾱ_next to come to x = x_0 + sigma·ε.
    a, a_next = 1 / (1 + Fraction(sigma) ** 2), 1 / (1 + Fraction(sigma_next) ** 2)
    sigma_t = eta * math.sqrt((1 - a_next) / (1 - a)) * math.sqrt(1 - a / a_next)
    assert up == pytest.approx(sigma_t / math.sqrt(a_next), rel=1e-7, abs=1e-7 * sigma_next)


@pytest.mark.parametrize("final_sigma", [0.0, SCHEDULE.sigmas[0].item()])
def test_a_perfect_denoiser_leads_to_x_0(final_sigma):
    x_0, noise, extra = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigmas = sigma_grid(SCHEDULE, 13, final_sigma=final_sigma)
    x = ddim(lambda x, sigma: x_0, x_0 + sigmas[0] * noise, sigmas, no_noise)
    torch.testing.assert_close(x, x_0 + final_sigma * noise)
    stochastic = ddpm(lambda x, sigma: x_0, x_0 + sigmas[0] * noise, sigmas, lambda x: extra)
    assert (stochastic - x_0).std() == pytest.approx(final_sigma, rel=0.2)


def test_ddim_converges_to_the_ode_of_a_gaussian_at_first_order():
    """x_0 ~ N(mu, s²): D(x, σ) = (s² x + σ² mu) / (s² + σ²), and the ODE scales x - mu like √(s² + σ²)."""
    mu, s, high, low = 0.7, 0.5, 14.6, 0.03
    x = torch.linspace(-30, 30, 16, dtype=torch.float64).reshape(1, 1, 4, 4)
    exact = mu + (x - mu) * math.sqrt((s**2 + low**2) / (s**2 + high**2))

    def denoise(x, sigma):
        return (s**2 * x + sigma**2 * mu) / (s**2 + sigma**2)

    errors = [(ddim(denoise, x, geometric(high, low, n), no_noise) - exact).abs().max() for n in (50, 100, 200, 400)]
    for coarse, fine in pairwise(errors):
        assert 1.9 < coarse / fine < 2.1
    assert errors[-1] < 0.02 * exact.abs().max()


def test_ddpm_has_a_gaussian_s_marginal_variance():
    """The sampler is linear here, so unit impulses in the start and in each noise add up to the variance exactly."""
    s, high, low = 0.5, 14.6, 0.03

    def final_variance(num_steps):
        step = iter(range(1, num_steps + 1))

        def impulse(x):
            noise = torch.zeros_like(x)
            noise[next(step)] = 1
            return noise

        x = torch.zeros(num_steps + 1, 1, 1, 1, dtype=torch.float64)
        x[0] = math.sqrt(s**2 + high**2)
        x = ddpm(lambda x, sigma: x * s**2 / (s**2 + sigma**2), x, geometric(high, low, num_steps), impulse)
        return (x**2).sum().item()

    errors = [abs(final_variance(n) - (s**2 + low**2)) for n in (50, 100, 200, 400)]
    for coarse, fine in pairwise(errors):
        assert 1.8 < coarse / fine < 2.2
    assert errors[-1] < 0.02 * s**2


@pytest.mark.parametrize("sampler", [ddpm, lambda *args: ddim(*args, eta=0.5)])
def test_noise_is_drawn_only_where_it_is_added(sampler):
    draws = []

    def noise(x):
        draws.append(x.shape)
        return torch.zeros_like(x)

    sampler(lambda x, sigma: x / 2, torch.ones(1, 1, 2, 2), sigma_grid(SCHEDULE, 10), noise)
    assert draws == [(1, 1, 2, 2)] * 9  # none at the step to sigma 0
    draws.clear()
    last_stands_still = sigma_grid(SCHEDULE, 10, "leading", final_sigma=SCHEDULE.sigmas[0].item())
    sampler(lambda x, sigma: x / 2, torch.ones(1, 1, 2, 2), last_stands_still, noise)
    assert len(draws) == 9


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_reports_each_step(name):
    seen, asked = [], []
    sigmas = sigma_grid(SCHEDULE, 5)

    def denoise(x, sigma):
        asked.append(sigma)
        return x / (1 + sigma)

    x = SAMPLERS[name](
        denoise, torch.ones(1, 1, 2, 2), sigmas, torch.zeros_like, callback=lambda *args: seen.append(args)
    )
    assert asked == sigmas[:-1].tolist()
    assert [step for step, _, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[-1][1], x)
    assert torch.equal(seen[-1][2], x)  # the step to sigma 0 ends on x̂_0
    for (_, before, _), (_, _, denoised), sigma in zip(seen[:-1], seen[1:], asked[1:], strict=True):
        torch.testing.assert_close(denoised, before / (1 + sigma))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_keeps_x_in_float32_and_no_graph(name):
    weight = torch.ones(1, requires_grad=True)
    x = torch.ones(1, 1, 2, 2, dtype=torch.float16)
    result = SAMPLERS[name](lambda x, sigma: weight.to(x) * x / 2, x, sigma_grid(SCHEDULE, 3), torch.randn_like)
    assert result.dtype == torch.float32
    assert not result.requires_grad
    assert x.eq(1).all()


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_an_eta_outside_0_to_1_is_refused(eta):
    with pytest.raises(ValueError, match="eta is"):
        ddim(lambda x, sigma: x, torch.ones(1, 1, 2, 2), sigma_grid(SCHEDULE, 3), no_noise, eta=eta)
