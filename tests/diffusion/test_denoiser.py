import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.parameterization import PREDICTION_TYPES, target
from ldm.diffusion.schedule import FlowSchedule, NoiseSchedule

SCHEDULE = NoiseSchedule()
FLOW = FlowSchedule(shift=3.0)
ZERO_SNR = NoiseSchedule(rescale_betas_zero_snr=True)
CONTEXT = torch.zeros(2, 3, 5)


class Recorder:
    """A network that keeps what it was called with and answers with a fixed prediction."""

    def __init__(self, prediction):
        self.prediction = prediction

    def __call__(self, x_t, t, context):
        self.x_t, self.t, self.context = x_t, t, context
        return self.prediction


def draw(seed=0, dtype=torch.float32):
    return torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(st.sampled_from(PREDICTION_TYPES), st.floats(-5, 2.2).map(lambda e: 10**e), st.integers(0, 2**31))
def test_a_perfect_network_gives_x_0_at_every_noise_level(prediction_type, sigma, seed):
    x_0, noise = draw(seed)
    scale = (1 + sigma**2) ** -0.5
    network = Recorder(target(prediction_type, x_0, noise, scale, sigma * scale))
    denoised = Denoiser(network, SCHEDULE, prediction_type)(x_0 + sigma * noise, sigma, CONTEXT)
    # float32 keeps x_0 + sigma·ε to some 1e-7 of its own size; no better x̂_0 is in it.
    torch.testing.assert_close(denoised, x_0, rtol=0, atol=3e-6 * max(1.0, sigma))


@pytest.mark.parametrize("sigma", [0.01, 1.0, 50.0, 2.0**24])
def test_a_flow_network_sees_the_straight_path(sigma):
    x_0, noise = draw(dtype=torch.float64)
    s = sigma / (1 + sigma)
    network = Recorder(noise - x_0)
    denoised = Denoiser(network, FLOW, "flow_prediction")(x_0 + sigma * noise, sigma, CONTEXT)
    torch.testing.assert_close(network.x_t, (1 - s) * x_0 + s * noise)
    torch.testing.assert_close(network.t, torch.full((2,), 1000 * s))
    torch.testing.assert_close(denoised, x_0, rtol=0, atol=1e-8)


@pytest.mark.parametrize("sigma", [4096.0, 2.0**24])
def test_pure_noise_is_the_last_timestep(sigma):
    x_0, noise = draw(dtype=torch.float64)
    network = Recorder(target("v_prediction", x_0, noise, 0.0, 1.0))
    denoised = Denoiser(network, ZERO_SNR, "v_prediction")(sigma * noise, sigma, CONTEXT)
    assert network.t.tolist() == [999, 999]
    torch.testing.assert_close(network.x_t, noise, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(denoised, x_0, rtol=0, atol=4 / sigma)


@given(st.sampled_from(PREDICTION_TYPES), st.floats(0.01, 100), st.sampled_from([SCHEDULE, FLOW]))
def test_predictions_and_denoised_are_two_ways_to_say_the_same(prediction_type, sigma, schedule):
    if schedule is FLOW and prediction_type == "epsilon":
        return
    x, prediction = draw(dtype=torch.float64)
    denoiser = Denoiser(Recorder(prediction), schedule, prediction_type)
    denoised = denoiser(x, sigma, CONTEXT)
    torch.testing.assert_close(denoiser.to_denoised(prediction, x, sigma), denoised)
    torch.testing.assert_close(denoiser.to_prediction(denoised, x, sigma), prediction, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_the_network_sees_the_training_state(t):
    x_0, noise = draw()
    network = Recorder(noise)
    sigma = SCHEDULE.sigmas[t].item()
    Denoiser(network, SCHEDULE, "epsilon")(x_0 + sigma * noise, sigma, CONTEXT)
    torch.testing.assert_close(network.x_t, SCHEDULE.add_noise(x_0, noise, torch.tensor([t, t])))
    assert network.t.dtype == torch.float32
    assert network.t.tolist() == [t, t]
    assert network.context is CONTEXT


def test_every_training_sigma_asks_at_a_whole_timestep():
    network = Recorder(torch.zeros(1, 1, 1, 1))
    denoiser = Denoiser(network, SCHEDULE, "sample")
    for t, sigma in enumerate(SCHEDULE.sigmas.float().tolist()):  # also where a sigma has been through float32
        denoiser(torch.zeros(1, 1, 1, 1), sigma, CONTEXT)
        assert network.t.item() == t


def test_between_and_beyond_timesteps():
    network = Recorder(torch.zeros(1, 1, 1, 1))
    denoiser = Denoiser(network, SCHEDULE, "epsilon")
    for sigma, t in [(SCHEDULE.t_to_sigma(321.25), 321.25), (1e-3, 0), (160.0, 999)]:
        denoiser(torch.ones(1, 1, 1, 1), sigma, CONTEXT)
        assert network.t.item() == pytest.approx(t, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_result_has_x_s_dtype(dtype):
    x, prediction = draw(dtype=dtype)
    assert Denoiser(Recorder(prediction), SCHEDULE, "v_prediction")(x, 2.0, CONTEXT).dtype == dtype


def test_a_half_precision_prediction_is_not_rounded_again():
    x, prediction = draw()
    prediction = prediction.bfloat16()
    denoised = Denoiser(Recorder(prediction), SCHEDULE, "epsilon")(x, 14.0, CONTEXT)
    torch.testing.assert_close(denoised, x - 14.0 * prediction.float(), rtol=1e-5, atol=1e-5)


def test_a_wrong_prediction_type_fails_at_once():
    with pytest.raises(ValueError, match="epsilon, v_prediction, sample"):
        Denoiser(Recorder(None), SCHEDULE, "x0")


@pytest.mark.parametrize("schedule", [FLOW, ZERO_SNR])
def test_epsilon_is_refused_where_a_schedule_ends_in_pure_noise(schedule):
    with pytest.raises(ValueError, match="prediction_type is 'epsilon', but this schedule ends in pure noise"):
        Denoiser(Recorder(None), schedule, "epsilon")
