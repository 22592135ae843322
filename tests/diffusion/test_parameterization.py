import math

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from ldm.diffusion.parameterization import (
    PREDICTION_TYPES,
    check_prediction_type,
    target,
    to_denoised,
    to_eps,
    to_prediction,
)
from ldm.diffusion.schedule import NoiseSchedule

# Variance-preserving, on a flow, and neither.
COEFFICIENTS = st.one_of(
    st.floats(0.01, math.pi / 2 - 0.01).map(lambda angle: (math.cos(angle), math.sin(angle))),
    st.floats(0.01, 0.99).map(lambda s: (1 - s, s)),
    st.tuples(st.floats(0.1, 2), st.floats(0.1, 2)),
)


@given(st.sampled_from(PREDICTION_TYPES), COEFFICIENTS, st.integers(0, 2**31))
def test_the_true_target_gives_back_x_0_and_noise(prediction_type, coefficients, seed):
    alpha, sigma = coefficients
    x_0, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x_t = alpha * x_0 + sigma * noise
    prediction = target(prediction_type, x_0, noise, alpha, sigma)
    torch.testing.assert_close(to_denoised(prediction_type, prediction, x_t, alpha, sigma), x_0, rtol=0, atol=1e-11)
    torch.testing.assert_close(to_eps(prediction_type, prediction, x_t, alpha, sigma), noise, rtol=0, atol=1e-11)


@given(st.sampled_from(PREDICTION_TYPES), COEFFICIENTS, st.integers(0, 2**31))
def test_any_prediction_splits_x_t_into_x_0_and_noise(prediction_type, coefficients, seed):
    alpha, sigma = coefficients
    x_t, prediction = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    denoised = to_denoised(prediction_type, prediction, x_t, alpha, sigma)
    eps = to_eps(prediction_type, prediction, x_t, alpha, sigma)
    torch.testing.assert_close(alpha * denoised + sigma * eps, x_t, rtol=0, atol=1e-11)
    torch.testing.assert_close(target(prediction_type, denoised, eps, alpha, sigma), prediction, rtol=0, atol=1e-9)
    again = to_prediction(prediction_type, denoised, x_t, alpha, sigma)
    torch.testing.assert_close(again, prediction, rtol=0, atol=1e-9)


def test_a_flow_s_velocity_leads_straight_from_x_0_to_the_noise():
    x_0, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    velocity = target("flow_prediction", x_0, noise, 0.75, 0.25)
    torch.testing.assert_close(x_0 + 0.25 * velocity, 0.75 * x_0 + 0.25 * noise)


def test_v_is_diffusers_velocity():
    x_0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 400, 999])
    theirs = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear").get_velocity(x_0, noise, t)
    ours = target("v_prediction", x_0, noise, *NoiseSchedule().coefficients(t, x_0))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [target, to_denoised, to_eps, to_prediction])
def test_a_wrong_prediction_type_names_the_right_ones(function):
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="'eps'; choose one of epsilon, v_prediction, sample, flow_prediction"):
        function("eps", x, x, 0.6, 0.8)


def test_epsilon_says_nothing_at_pure_noise():
    for prediction_type in PREDICTION_TYPES:
        check_prediction_type(prediction_type)
        if prediction_type != "epsilon":
            check_prediction_type(prediction_type, zero_terminal_snr=True)
    with pytest.raises(ValueError, match="ends in pure noise"):
        check_prediction_type("epsilon", zero_terminal_snr=True)


@pytest.mark.parametrize("prediction_type", [name for name in PREDICTION_TYPES if name != "epsilon"])
def test_all_others_find_x_0_at_pure_noise(prediction_type):
    x_0, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    prediction = target(prediction_type, x_0, noise, 0.0, 1.0)
    torch.testing.assert_close(to_denoised(prediction_type, prediction, noise, 0.0, 1.0), x_0)
