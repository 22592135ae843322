import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ldm.diffusion.loss import (
    WEIGHTINGS,
    diffusion_loss,
    draw_times,
    logit_normal,
    loss_weight,
    offset_noise,
    perturbed,
    pseudo_huber,
)
from ldm.diffusion.parameterization import PREDICTION_TYPES, target, to_prediction
from ldm.diffusion.schedule import FlowSchedule, NoiseSchedule

SCHEDULE = NoiseSchedule()
T = torch.tensor([0, 400, 999])
CONTEXT = torch.zeros(3, 5, 6)


def draw():
    return torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_each_sample_has_its_own_mean_squared_error(prediction_type):
    x_0, noise = draw()
    wanted = target(prediction_type, x_0, noise, *SCHEDULE.coefficients(T, x_0))
    off_by = torch.tensor([0.0, 1.0, 3.0])[:, None, None, None]

    def network(x_t, t, context):
        torch.testing.assert_close(x_t, SCHEDULE.add_noise(x_0, noise, T))
        assert t is T
        assert context is CONTEXT
        return wanted + off_by

    loss = diffusion_loss(network, SCHEDULE, prediction_type, x_0, CONTEXT, T, noise)
    torch.testing.assert_close(loss, torch.tensor([0.0, 1.0, 9.0]), rtol=1e-5, atol=1e-6)


def test_the_loss_reaches_every_parameter():
    x_0, noise = draw()
    network = nn.Conv2d(4, 4, 1)
    diffusion_loss(lambda x, t, c: network(x), SCHEDULE, "v_prediction", x_0, CONTEXT, T, noise).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_the_error_is_float32_under_autocast():
    x_0, noise = draw()
    torch.manual_seed(0)
    network = nn.Conv2d(4, 4, 1)
    seen = []

    def call(x_t, t, context):
        seen.append(network(x_t))
        return seen[-1]

    with torch.autocast("cpu", torch.bfloat16):
        loss = diffusion_loss(call, SCHEDULE, "epsilon", x_0, CONTEXT, T, noise)
    assert seen[0].dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    exact = ((seen[0].double() - noise.double()) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


def test_half_precision_latents_are_reduced_in_float32():
    x_0, noise = (x.bfloat16() for x in draw())
    loss = diffusion_loss(lambda x, t, c: torch.zeros_like(x), SCHEDULE, "epsilon", x_0, CONTEXT, T, noise)
    torch.testing.assert_close(loss, (noise.float() ** 2).mean((1, 2, 3)))


def test_a_prediction_of_another_shape_is_refused_rather_than_broadcast():
    x_0, noise = draw()
    with pytest.raises(ValueError, match=r"\(3, 1, 8, 8\).*\(3, 4, 8, 8\)"):
        diffusion_loss(lambda x, t, c: x[:, :1], SCHEDULE, "epsilon", x_0, CONTEXT, T, noise)


def test_the_input_may_be_noisier_than_the_target():
    """DDPM-IP: x_t is made of another noise, the target is not."""
    x_0, noise = draw()
    other = perturbed(noise, 0.5, torch.Generator().manual_seed(1))
    seen = []
    losses = diffusion_loss(
        lambda x, t, c: seen.append(x) or noise, SCHEDULE, "epsilon", x_0, CONTEXT, T, noise, input_noise=other
    )
    assert not losses.any()
    torch.testing.assert_close(seen[0], SCHEDULE.add_noise(x_0, other, T))


def test_a_flow_learns_the_velocity_of_straight_paths():
    schedule = FlowSchedule(1000)
    x_0, noise = draw()
    s = torch.tensor([0.0, 0.25, 1.0])
    seen = []

    def network(x_t, t, context):
        seen.append((x_t, t))
        return noise - x_0 + 2

    loss = diffusion_loss(network, schedule, "flow_prediction", x_0, CONTEXT, schedule.timesteps(s), noise)
    torch.testing.assert_close(loss, torch.full((3,), 4.0))
    [(x_t, t)] = seen
    assert t.tolist() == [0, 250, 1000]
    torch.testing.assert_close(x_t, torch.stack([x_0[0], 0.75 * x_0[1] + 0.25 * noise[1], noise[2]]))


# ------------------------------------------------------------------------------------------------------ pseudo-Huber


@pytest.mark.parametrize("c", [0.01, 0.1, 1.0, 1000.0])
def test_the_pseudo_huber_loss_is_its_formula(c):
    error = torch.tensor([-30.0, -1.0, -1e-3, 0.0, 1e-4, 0.5, 7.0], dtype=torch.float64)
    exact = torch.tensor([2 * c * math.fsum([math.hypot(e, c), -c]) for e in error.tolist()], dtype=torch.float64)
    torch.testing.assert_close(pseudo_huber(error, c), exact, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(pseudo_huber(error.float(), c), pseudo_huber(error, c).float(), rtol=1e-5, atol=0)


def test_the_pseudo_huber_loss_is_the_square_near_zero_and_linear_far_away():
    near, far = torch.tensor([1e-3, 2e-3]), torch.tensor([100.0, 200.0])
    torch.testing.assert_close(pseudo_huber(near, 1.0), near**2, rtol=1e-5, atol=0)
    first, second = pseudo_huber(far, 0.1).tolist()
    assert second - first == pytest.approx(2 * 0.1 * 100, rel=1e-4)
    x_0, noise = draw()
    losses = diffusion_loss(lambda x, t, c: noise + 3, SCHEDULE, "epsilon", x_0, CONTEXT, T, noise, huber_c=0.1)
    torch.testing.assert_close(losses, torch.full((3,), 2 * 0.1 * (math.hypot(3, 0.1) - 0.1)))


# ----------------------------------------------------------------------------------------------------------- weights

SNR = torch.tensor([0.0, 0.5, 5.0, 20.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("weighting", "prediction_type", "weights"),
    [
        ("uniform", "epsilon", [1, 1, 1, 1]),
        ("uniform", "flow_prediction", [1, 1, 1, 1]),
        ("min_snr", "epsilon", [None, 1, 1, 5 / 20]),
        ("min_snr", "v_prediction", [0, 0.5 / 1.5, 5 / 6, 5 / 21]),
        ("min_snr", "sample", [0, 0.5, 5, 5]),
        ("soft_min_snr", "epsilon", [None, 1 / 1.1, 1 / 2, 1 / 5]),
        ("soft_min_snr", "v_prediction", [0, 1 / (2 + 0.2) / 1.5, 2.5 / 6, 4 / 21]),
        ("soft_min_snr", "sample", [0, 1 / (2 + 0.2), 2.5, 4]),
        ("p2", "epsilon", [None, 1 / 1.5, 1 / 6, 1 / 21]),
        ("p2", "v_prediction", [0, 0.5 / 1.5**2, 5 / 36, 20 / 441]),
        ("p2", "sample", [0, 0.5 / 1.5, 5 / 6, 20 / 21]),
        ("debiased", "epsilon", [None, 2**0.5, 5**-0.5, 20**-0.5]),
        ("debiased", "v_prediction", [0, 0.5**0.5 / 1.5, 5**0.5 / 6, 20**0.5 / 21]),
        ("debiased", "sample", [0, 0.5**0.5, 5**0.5, 20**0.5]),
    ],
)
def test_weights_are_the_papers_numbers(weighting, prediction_type, weights):
    found = loss_weight(weighting, prediction_type, SNR)
    known = [i for i, weight in enumerate(weights) if weight is not None]  # epsilon at pure noise is refused elsewhere
    expected = torch.tensor([weights[i] for i in known], dtype=torch.float64)
    torch.testing.assert_close(found[known], expected)


def test_the_constants_of_weights_count():
    assert loss_weight("min_snr", "sample", SNR, snr_gamma=1.0).tolist() == [0, 0.5, 1, 1]
    torch.testing.assert_close(loss_weight("soft_min_snr", "sample", SNR[1:], snr_gamma=1.0), SNR[1:] / (1 + SNR[1:]))
    found = loss_weight("p2", "epsilon", SNR[1:], p2_gamma=0.5, p2_k=3.0)
    torch.testing.assert_close(found, (3 + SNR[1:]) ** -0.5)


@pytest.mark.parametrize("weighting", WEIGHTINGS[1:])
def test_a_weighting_is_one_objective_whatever_is_predicted(weighting):
    x_0, noise = draw().double()
    denoised = x_0 + 0.1 * torch.randn(x_0.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    alpha, sigma = SCHEDULE.coefficients(T, x_0)
    x_t, snr = SCHEDULE.add_noise(x_0, noise, T), (alpha / sigma).square().flatten()
    losses = {}
    for kind in ("epsilon", "v_prediction", "sample"):
        said = to_prediction(kind, denoised, x_t, alpha, sigma)
        error = diffusion_loss(lambda x, t, c, said=said: said, SCHEDULE, kind, x_0, CONTEXT, T, noise)
        losses[kind] = loss_weight(weighting, kind, snr) * error
    torch.testing.assert_close(losses["v_prediction"], losses["sample"])
    torch.testing.assert_close(losses["epsilon"], losses["sample"])


@pytest.mark.parametrize(("weighting", "kind"), [("max_snr", "epsilon"), ("min_snr", "flow_prediction")])
def test_weights_that_do_not_exist_are_refused(weighting, kind):
    with pytest.raises(ValueError, match=weighting):
        loss_weight(weighting, kind, SNR)


# ------------------------------------------------------------------------------------------------------------- times


def timesteps(batch, num_train_timesteps, generator, **options):
    return NoiseSchedule(num_train_timesteps=num_train_timesteps).timesteps(draw_times(batch, generator, **options))


@given(st.integers(1, 70), st.integers(1, 1000), st.integers(0, 2**31))
def test_there_is_one_timestep_in_each_bin(batch, num_train_timesteps, seed):
    t = timesteps(batch, num_train_timesteps, torch.Generator().manual_seed(seed))
    assert t.shape == (batch,)
    assert t.dtype == torch.int64
    width = num_train_timesteps / batch
    for i, step in enumerate(t.sort().values.tolist()):
        assert math.floor(i * width) <= step <= min(math.floor((i + 1) * width), num_train_timesteps - 1)


def test_each_timestep_is_uniform_at_every_place_in_the_batch():
    draws, batch, num_train_timesteps = 6000, 4, 10  # bins 2.5 wide: a timestep can lie in two
    g, schedule = torch.Generator().manual_seed(0), NoiseSchedule(num_train_timesteps=num_train_timesteps)
    t = torch.stack([schedule.timesteps(draw_times(batch, g)) for _ in range(draws)])
    for place in range(batch):
        counts = torch.bincount(t[:, place], minlength=num_train_timesteps).double()
        chi_squared = ((counts - draws / 10) ** 2 / (draws / 10)).sum()
        assert chi_squared < 27.9, f"place {place}: {counts.tolist()}"  # 99.9 % point, 9 degrees of freedom


def test_the_generator_alone_decides():
    a, b = (timesteps(16, 1000, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, timesteps(16, 1000, torch.Generator().manual_seed(8)))


def test_the_draws_are_those_of_every_run_before():
    """A permutation of the bins, then a place in each: runs of earlier releases go on as they began."""
    g, same = (torch.Generator().manual_seed(3) for _ in range(2))
    bins, within = torch.randperm(6, generator=same), torch.rand(6, generator=same, dtype=torch.float64)
    assert torch.equal(timesteps(6, 1000, g), ((bins + within) / 6 * 1000).long())
    assert torch.equal(timesteps(4, 1000, torch.Generator().manual_seed(0)), torch.tensor([14, 268, 792, 514]))


def test_times_that_are_not_stratified_are_independent():
    g = torch.Generator().manual_seed(0)
    times = torch.stack([draw_times(4, g, stratified=False) for _ in range(2000)])
    in_each_bin = torch.stack([(times * 4).long() == i for i in range(4)]).any(2).all(0).double().mean().item()
    assert in_each_bin == pytest.approx(24 / 4**4, abs=0.02)
    assert times.mean().item() == pytest.approx(0.5, abs=0.01) and times.std().item() == pytest.approx(
        12**-0.5, abs=0.01
    )


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 1.5), (1.0, 0.3)])
def test_logit_normal_times_are_normal_in_their_logits(mean, std):
    uniform = draw_times(20000, torch.Generator().manual_seed(0))
    times = logit_normal(uniform, mean, std)
    assert ((times > 0) & (times < 1)).all()
    logits = times.logit()
    assert logits.mean().item() == pytest.approx(mean, abs=0.01 * std) and logits.std().item() == pytest.approx(
        std, rel=0.01
    )
    share = (times < torch.sigmoid(torch.tensor(mean + std))).double().mean().item()
    assert share == pytest.approx(0.8413, abs=1e-3)
    assert torch.equal(times.argsort(), uniform.argsort())  # what is stratified stays so


# ------------------------------------------------------------------------------------------------------------- noise


def test_offset_noise_shifts_each_channel_of_each_sample():
    noise = torch.randn(500, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    shift = offset_noise(noise, 0.3, torch.Generator().manual_seed(1)) - noise
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift))
    first = shift[:, :, 0, 0]
    assert first.std().item() == pytest.approx(0.3, rel=0.05) and first.mean().item() == pytest.approx(0, abs=0.03)
    correlation = torch.corrcoef(first.T) - torch.eye(4)
    assert correlation.abs().max() < 0.2


def test_perturbed_noise_has_a_little_of_its_own_everywhere():
    noise = torch.zeros(50, 4, 8, 8)
    more = perturbed(noise, 0.1, torch.Generator().manual_seed(1))
    assert more.std().item() == pytest.approx(0.1, rel=0.02) and len(more.unique()) > 12000
