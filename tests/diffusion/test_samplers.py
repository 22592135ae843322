"""What samplers promise by themselves: their contract, their order of accuracy, the right marginals.

diffusers is the judge in test_diffusers_parity.py; the judge here is a Gaussian, whose denoiser and whose probability
flow are known in closed form.
"""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grids import INFINITE_SIGMA, SPACINGS, sigma_grid, spread, start
from ldm.diffusion.multistep import lagrange_integrals
from ldm.diffusion.samplers import FAMILIES, SAMPLERS, ddim, ddpm, to_vp
from ldm.diffusion.schedule import FlowSchedule, NoiseSchedule
from ldm.diffusion.steps import ancestral_step

SCHEDULES = {
    "stable diffusion": (NoiseSchedule(), "epsilon"),
    "zero terminal snr": (NoiseSchedule(rescale_betas_zero_snr=True), "v_prediction"),
    "flow": (FlowSchedule(shift=3.0), "flow_prediction"),
}
SCHEDULE = SCHEDULES["stable diffusion"][0]
STOCHASTIC = ["ddpm", "euler_a", "dpmpp_2m_sde", "dpmpp_sde"]
DETERMINISTIC = [name for name in SAMPLERS if name not in STOCHASTIC]
# The docstrings' counts of evaluations and draws for N steps that end on 0.
EVALUATIONS = {name: (lambda n: n) for name in SAMPLERS} | {
    name: (lambda n: 2 * n - 1) for name in ("heun", "dpmpp_sde")
}
DRAWS = {name: (lambda n: n - 1) for name in STOCHASTIC} | {"dpmpp_sde": lambda n: 2 * (n - 1)}

MU, S = 0.7, 0.5


def gaussian(x, sigma):
    """D(x, σ) of x_0 ~ N(MU, S²)."""
    return (S**2 * x + sigma**2 * MU) / (S**2 + sigma**2)


def flow_of_gaussian(x, sigma, sigma_next):
    """The probability flow of x_0 ~ N(MU, S²) scales x - MU like √(S² + σ²)."""
    return MU + (x - MU) * math.sqrt((S**2 + sigma_next**2) / (S**2 + sigma**2))


def no_noise(x):
    raise AssertionError("a deterministic run asked for noise")


def karras(high, low, num_steps):
    """Steps that are uneven in sigma and in log sigma."""
    return torch.from_numpy(spread(high, low, num_steps + 1, "karras"))


def random_latents(count, seed=0, dtype=torch.float64):
    return torch.randn(count, 2, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- one step --------------------------------------------------------------------------------------------------------


@given(st.floats(1e-3, 1e3), st.just(0.0) | st.floats(1e-9, 1), st.floats(0, 1))
def test_an_ancestral_step_ends_at_the_next_noise_level(sigma, fraction, eta):
    sigma_next = sigma * fraction
    down, up = ancestral_step(sigma, sigma_next, eta)
    assert math.hypot(down, up) == pytest.approx(sigma_next, rel=1e-9)
    # DDIM Eq. 16 in the paper's own terms, divided by √ᾱ_next to come to x = x_0 + sigma·ε.
    a, a_next = 1 / (1 + Fraction(sigma) ** 2), 1 / (1 + Fraction(sigma_next) ** 2)
    sigma_t = eta * math.sqrt((1 - a_next) / (1 - a)) * math.sqrt(1 - a / a_next)
    assert up == pytest.approx(sigma_t / math.sqrt(a_next), rel=1e-7, abs=1e-7 * sigma_next)


def test_an_ancestral_step_from_pure_noise_forgets_where_it_came_from():
    down, up = ancestral_step(INFINITE_SIGMA, 50.0, 1.0)
    assert down == pytest.approx(50.0**2 / INFINITE_SIGMA, rel=1e-12)
    assert up == pytest.approx(50.0)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=4, unique_by=lambda v: round(v, 2)), st.floats(0, 100))
def test_lagrange_integrals_integrate_every_polynomial_they_can(nodes, end):
    begin = nodes[-1]
    weights = lagrange_integrals(nodes, begin, end)
    for power in range(len(nodes)):
        exact = (end ** (power + 1) - begin ** (power + 1)) / (power + 1)
        terms = [weight * node**power for weight, node in zip(weights, nodes, strict=True)]
        scale = max(*map(abs, terms), abs(exact), 1.0)
        assert sum(terms) == pytest.approx(exact, abs=1e-9 * scale)


def test_vp_coordinates_are_those_of_the_forward_process():
    x_0, noise = random_latents(2)
    for t, sigma in [(0, SCHEDULE.sigmas[0].item()), (999, SCHEDULE.sigmas[-1].item())]:
        x = x_0 + sigma * noise
        torch.testing.assert_close(to_vp(x, sigma), SCHEDULE.add_noise(x_0, noise, torch.tensor([t, t])))
    assert torch.equal(to_vp(x, 0.0), x)


# --- the contract ----------------------------------------------------------------------------------------------------


def test_every_sampler_has_a_family():
    assert SAMPLERS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_perfect_denoiser_leads_to_x_0(name):
    x_0, noise, extra = random_latents(3)
    for spacing, num_steps in itertools.product(SPACINGS, (1, 2, 3, 13)):
        sigmas = sigma_grid(SCHEDULE, num_steps, name, spacing)
        x = SAMPLERS[name](lambda x, sigma: x_0, x_0 + sigmas[0] * noise, sigmas, lambda x: extra)
        torch.testing.assert_close(x, x_0, rtol=0, atol=1e-11)


def test_ddim_that_ends_above_0_leaves_that_noise():
    x_0, noise, extra = random_latents(3)
    final_sigma = SCHEDULE.sigmas[0].item()
    sigmas = sigma_grid(SCHEDULE, 13, final_sigma=final_sigma)
    x = ddim(lambda x, sigma: x_0, x_0 + sigmas[0] * noise, sigmas, no_noise)
    torch.testing.assert_close(x, x_0 + final_sigma * noise)
    stochastic = ddpm(lambda x, sigma: x_0, x_0 + sigmas[0] * noise, sigmas, lambda x: extra)
    assert (stochastic - x_0).std() == pytest.approx(final_sigma, rel=0.2)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_draws_and_callbacks_are_as_many_as_promised(name, num_steps):
    asked, draws, seen = [], [], []
    sigmas = sigma_grid(SCHEDULE, num_steps, name)

    def denoise(x, sigma):
        asked.append((sigma, x / (1 + sigma)))
        return asked[-1][1]

    def noise(x):
        draws.append(x.shape)
        return torch.zeros_like(x)

    x = torch.ones(1, 1, 2, 2)
    result = SAMPLERS[name](denoise, x, sigmas, noise, callback=lambda *args: seen.append(args))
    assert len(asked) == EVALUATIONS[name](num_steps)
    assert draws == [(1, 1, 2, 2)] * DRAWS.get(name, lambda n: 0)(num_steps)
    assert [step for step, _, _ in seen] == list(range(num_steps))
    assert torch.equal(seen[-1][1], result)
    # Each step reports the x̂_0 that was asked for at its start, whatever else it asked for.
    at = {sigma: denoised for sigma, denoised in reversed(asked)}
    assert set(sigmas[:-1].tolist()) <= set(at)
    if name not in ("heun",):  # which asks twice at each inner level
        for (_, _, denoised), sigma in zip(seen, sigmas.tolist(), strict=False):
            assert torch.equal(denoised, at[sigma])
    if name != "lms":  # which extrapolates also the step to 0; all others end on x̂_0
        torch.testing.assert_close(seen[-1][1], seen[-1][2])


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_is_the_denoiser_itself(name):
    x = random_latents(2)[0]
    sigmas = sigma_grid(SCHEDULE, 1, name)
    result = SAMPLERS[name](gaussian, x, sigmas, no_noise)
    torch.testing.assert_close(result, gaussian(x, sigmas[0].item()))


def test_eta_draws_where_it_adds_noise():
    draws = []

    def noise(x):
        draws.append(1)
        return torch.zeros_like(x)

    ddim(lambda x, sigma: x / 2, torch.ones(1, 1, 2, 2), sigma_grid(SCHEDULE, 10), noise, eta=0.5)
    assert len(draws) == 9  # none at the step to sigma 0
    last_stands_still = sigma_grid(SCHEDULE, 10, "ddim", "leading", final_sigma=SCHEDULE.sigmas[0].item())
    assert last_stands_still[-1] == last_stands_still[-2]
    ddim(lambda x, sigma: x / 2, torch.ones(1, 1, 2, 2), last_stands_still, noise, eta=0.5)
    assert len(draws) == 18


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_an_eta_outside_0_to_1_is_refused(eta):
    with pytest.raises(ValueError, match="eta is"):
        ddim(lambda x, sigma: x, torch.ones(1, 1, 2, 2), sigma_grid(SCHEDULE, 3), no_noise, eta=eta)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_keeps_x_in_float32_and_no_graph(name):
    weight = torch.ones(1, requires_grad=True)
    x = torch.ones(1, 1, 2, 2, dtype=torch.float16)
    seen = []

    def denoise(x, sigma):
        seen.append(x.dtype)
        return weight.to(x) * x / 2

    result = SAMPLERS[name](denoise, x, sigma_grid(SCHEDULE, 5, name), torch.randn_like)
    assert {result.dtype, *seen} == {torch.float32}
    assert not result.requires_grad
    assert x.eq(1).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_float32_is_enough(name, schedule):
    """Also from pure noise, where sigma is 2^24 and x_0 is far below the last bit of x."""
    schedule, prediction_type = SCHEDULES[schedule]
    unit, draws = random_latents(1)[0], random_latents(30, seed=1)

    def network(x_t, t, context):
        return torch.tanh(x_t + 0.002 * t.to(x_t)[:, None, None, None]) - 0.3 * x_t

    for spacing, num_steps in itertools.product(("trailing", "karras"), (1, 2, 7, 15)):
        results = []
        for dtype in (torch.float32, torch.float64):
            denoiser = Denoiser(network, schedule, prediction_type)
            sigmas = sigma_grid(schedule, num_steps, name, spacing)
            queue = iter(draws)
            results.append(
                SAMPLERS[name](
                    lambda x, sigma, denoiser=denoiser: denoiser(x, sigma, None),
                    start(unit.to(dtype), sigmas, schedule, name, spacing),
                    sigmas,
                    lambda x, queue=queue: next(queue).to(x),
                )
            )
        error = (results[0] - results[1]).abs().max() / results[1].abs().max()
        assert error < 1e-5, (spacing, num_steps, error)


# --- accuracy on a Gaussian ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "order", "error"),
    [
        ("ddim", 1, 1e-2),
        ("euler", 1, 1e-2),
        ("heun", 2, 4e-4),
        ("dpmpp_2m", 2, 4e-4),
        ("unipc", 3, 3e-5),  # the corrector adds one
        ("lms", 4, 2e-5),
    ],
)
def test_deterministic_samplers_converge_to_the_probability_flow(name, order, error):
    high, low = 80.0, 0.03
    x = (MU + high * torch.linspace(-2, 2, 16, dtype=torch.float64)).reshape(1, 1, 4, 4)
    exact = flow_of_gaussian(x, high, low)
    errors = [
        (SAMPLERS[name](gaussian, x, karras(high, low, n), no_noise) - exact).abs().max().item() for n in (80, 160, 320)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert order - 0.3 < math.log2(coarse / fine) < order + 0.2, errors
    assert errors[1] < error * exact.abs().max()


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_deterministic_samplers_converge_on_every_kind_of_schedule(schedule, name):
    """From noise to latents: a flow and a schedule of zero terminal SNR start at sigma = ∞, where x - MU is S·ε."""
    schedule, _ = SCHEDULES[schedule]
    unit = torch.linspace(-3, 3, 13, dtype=torch.float64).reshape(1, 1, 1, 13)
    errors = []
    for num_steps in (40, 160):
        sigmas = sigma_grid(schedule, num_steps, name)
        x = start(unit, sigmas, schedule, name, "trailing")
        exact = flow_of_gaussian(x, sigmas[0].item(), 0.0)
        errors.append((SAMPLERS[name](gaussian, x, sigmas, no_noise) - exact).abs().max().item())
    first_order = name in ("ddim", "euler")
    assert errors[1] < (0.1 if first_order else 0.03), errors
    assert errors[0] / errors[1] > 2.5, errors


def final_variance(name, sigmas):
    """Give the variance of a run's result exactly: the samplers are linear here, so unit impulses in the start and in
    each noise add up."""
    num_draws = DRAWS[name](len(sigmas))
    impulses = iter(torch.eye(num_draws + 1, dtype=torch.float64)[1:].reshape(num_draws, num_draws + 1, 1, 1, 1))
    x = torch.zeros(num_draws + 1, 1, 1, 1, dtype=torch.float64)
    x[0] = math.sqrt(S**2 + sigmas[0] ** 2)
    x = SAMPLERS[name](lambda x, sigma: gaussian(x + MU, sigma) - MU, x, sigmas, lambda x: next(impulses))
    return (x**2).sum().item()


@pytest.mark.parametrize(
    ("name", "order", "error"),
    [("ddpm", 1, 0.02), ("euler_a", 1, 0.02), ("dpmpp_2m_sde", 2, 4e-4), ("dpmpp_sde", 2, 2e-4)],
)
def test_stochastic_samplers_converge_to_the_marginal_variance(name, order, error):
    high, low = 14.6, 0.03
    errors = [abs(final_variance(name, karras(high, low, n)) - (S**2 + low**2)) for n in (100, 200, 400)]
    for coarse, fine in itertools.pairwise(errors):
        assert order - 0.2 < math.log2(coarse / fine) < order + 0.2, errors
    assert errors[-1] < error * S**2


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_keep_the_mean(name):
    x = torch.full((1, 1, 2, 2), MU, dtype=torch.float64)
    result = SAMPLERS[name](gaussian, x, karras(14.6, 0.03, 20), torch.zeros_like)
    torch.testing.assert_close(result, x)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_draw_the_gaussian(name):
    generator = torch.Generator().manual_seed(0)
    sigmas = sigma_grid(SCHEDULE, 100, name, "karras")
    unit = torch.randn(20000, 1, 1, 1, generator=generator, dtype=torch.float64)
    x = MU + math.sqrt(S**2 + sigmas[0] ** 2) * unit
    x = SAMPLERS[name](gaussian, x, sigmas, lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float64))
    assert x.mean() == pytest.approx(MU, abs=4 * S / math.sqrt(20000))
    assert x.std() == pytest.approx(S, rel=0.05)
