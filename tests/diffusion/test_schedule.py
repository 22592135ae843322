import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.diffusion.schedule import (
    BETA_SCHEDULES,
    TERMINAL_SIGMA,
    FlowSchedule,
    NoiseSchedule,
    rescale_zero_terminal_snr,
    schedule_from_config,
)

ENDS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "squaredcos_cap_v2": (1e-4, 0.02)}
SCHEDULES = {name: NoiseSchedule(name, *ENDS[name]) for name in BETA_SCHEDULES}


@pytest.mark.parametrize("num_train_timesteps", [1, 10, 1000])
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_tables_are_those_of_diffusers(name, num_train_timesteps):
    start, end = ENDS[name]
    ours = NoiseSchedule(name, start, end, num_train_timesteps)
    theirs = DDPMScheduler(num_train_timesteps, start, end, name)
    torch.testing.assert_close(ours.betas, theirs.betas.double(), rtol=1e-6, atol=1e-7)
    # diffusers multiplies a thousand factors in float32.
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=1e-4, atol=1e-9)
    assert ours.betas.dtype == ours.alphas_cumprod.dtype == ours.sigmas.dtype == torch.float64


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_sigmas_rise_and_say_the_same_as_alphas_cumprod(name):
    schedule = SCHEDULES[name]
    assert (schedule.sigmas.diff() > 0).all()
    torch.testing.assert_close(1 / (1 + schedule.sigmas**2), schedule.alphas_cumprod, rtol=1e-12, atol=0)


def test_the_defaults_are_stable_diffusions():
    schedule = NoiseSchedule()
    assert schedule.sigmas[-1].item() == pytest.approx(14.6146, abs=1e-4)
    assert schedule.sigmas[0].item() == pytest.approx(0.0291672, abs=1e-6)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_timestep_of_every_tabled_sigma_is_exact(name):
    schedule = SCHEDULES[name]
    for t, sigma in enumerate(schedule.sigmas.tolist()):
        assert schedule.sigma_to_t(sigma) == pytest.approx(t, abs=1e-6)
        assert schedule.t_to_sigma(t) == pytest.approx(sigma, rel=1e-12)


@given(st.sampled_from(BETA_SCHEDULES), st.floats(0, 999))
def test_sigma_to_t_inverts_t_to_sigma(name, t):
    schedule = SCHEDULES[name]
    assert schedule.sigma_to_t(schedule.t_to_sigma(t)) == pytest.approx(t, abs=1e-6)


@given(st.sampled_from(BETA_SCHEDULES), st.floats(0, 1e5), st.floats(0, 1e5))
def test_sigma_to_t_is_monotone_and_clamped(name, a, b):
    low, high = sorted((a, b))
    schedule = SCHEDULES[name]
    assert 0 <= schedule.sigma_to_t(low) <= schedule.sigma_to_t(high) <= 999


def test_interpolation_is_linear_in_log_sigma():
    schedule = NoiseSchedule()
    middle = (schedule.sigmas[499] * schedule.sigmas[500]).sqrt().item()
    assert schedule.sigma_to_t(middle) == pytest.approx(499.5, abs=1e-9)
    assert schedule.t_to_sigma(499.5) == pytest.approx(middle, rel=1e-12)


def test_outside_the_schedule_time_is_clamped():
    schedule = NoiseSchedule()
    assert schedule.sigma_to_t(0.0) == schedule.sigma_to_t(0.001) == 0
    assert schedule.sigma_to_t(160.0) == 999
    assert schedule.t_to_sigma(-1) == pytest.approx(schedule.sigmas[0].item(), rel=1e-12)
    assert schedule.t_to_sigma(2000) == pytest.approx(schedule.sigmas[-1].item(), rel=1e-12)


def test_add_noise_is_eq_4_for_each_sample():
    schedule = NoiseSchedule()
    x_0, noise = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0, 17, 500, 999])
    x_t = schedule.add_noise(x_0, noise, t)
    for i, step in enumerate(t.tolist()):
        abar = torch.prod(1 - schedule.betas[: step + 1])
        torch.testing.assert_close(x_t[i], abar.sqrt() * x_0[i] + (1 - abar).sqrt() * noise[i])


def test_add_noise_agrees_with_diffusers():
    x_0, noise = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 250, 998, 999])
    theirs = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear").add_noise(x_0, noise, t)
    torch.testing.assert_close(NoiseSchedule().add_noise(x_0, noise, t), theirs, rtol=1e-4, atol=1e-5)


def test_add_noise_in_half_precision_rounds_once_at_the_end():
    schedule = NoiseSchedule()
    x_0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    t = torch.tensor([3, 400, 999])
    expected = schedule.add_noise(x_0.double(), noise.double(), t)
    x_t = schedule.add_noise(x_0, noise, t)
    assert x_t.dtype == torch.bfloat16
    torch.testing.assert_close(x_t.double(), expected, rtol=2**-8, atol=1e-6)


def test_add_noise_refuses_what_does_not_fit():
    schedule, x_0 = NoiseSchedule(), torch.zeros(2, 4, 8, 8)
    t = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"noise must have x_0's shape \(2, 4, 8, 8\)"):
        schedule.add_noise(x_0, torch.zeros(1, 4, 8, 8), t)
    for wrong in (torch.tensor(5), torch.tensor([5]), torch.zeros(2, 1, dtype=torch.int64), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match=r"t must be int64 of shape \(2,\)"):
            schedule.add_noise(x_0, x_0, wrong)
    for outside in ([0, 1000], [-1, 5]):
        with pytest.raises(ValueError, match="this schedule has 0 to 999"):
            schedule.add_noise(x_0, x_0, torch.tensor(outside))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_coefficients_are_at_least_float32_and_per_sample(dtype, expected):
    schedule = NoiseSchedule()
    alpha, sigma = schedule.coefficients(torch.tensor([0, 999]), torch.zeros(2, 4, 8, 8, dtype=dtype))
    assert alpha.shape == sigma.shape == (2, 1, 1, 1)
    assert alpha.dtype == sigma.dtype == expected
    torch.testing.assert_close((sigma / alpha).flatten().double(), schedule.sigmas[[0, 999]], rtol=1e-6, atol=0)


def test_a_training_step_copies_no_table():
    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._to_copy.default
            return func(*args, **(kwargs or {}))

    schedule, t, like = NoiseSchedule(), torch.tensor([3, 4]), torch.zeros(2, 4, 8, 8)
    with Copies() as first:
        schedule.coefficients(t, like)
    with Copies() as second:
        schedule.coefficients(t, like)
    assert first.count > 0
    assert second.count == 0


def test_tables_first_used_in_inference_mode_serve_training():
    schedule, t, like = NoiseSchedule(), torch.tensor([3, 4]), torch.zeros(2, 4, 8, 8)
    with torch.inference_mode():
        schedule.coefficients(t, like)
    assert not any(table.is_inference() for tables in schedule._coefficients.values() for table in tables)
    prediction = torch.ones(2, 4, 8, 8, requires_grad=True)
    alpha, _ = schedule.coefficients(t, like)
    (alpha * prediction).sum().backward()
    assert prediction.grad is not None


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_config_round_trips_through_diffusers(name, tmp_path):
    schedule = NoiseSchedule(name, 0.001, 0.015, 500)
    DDPMScheduler.from_config(schedule.config).save_pretrained(tmp_path)
    loaded = NoiseSchedule.from_config(DDPMScheduler.load_config(tmp_path))
    assert loaded.config == schedule.config
    assert torch.equal(loaded.betas, schedule.betas)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trained_betas": [0.1, 0.2]}, "trained_betas must be num_train_timesteps=1000 numbers between 0 and 1"),
        ({"trained_betas": [0.1, 1.0], "num_train_timesteps": 2}, "trained_betas must be"),
        ({"rescale_betas_zero_snr": True, "num_train_timesteps": 1}, "needs 2 timesteps"),
        ({"timestep_type": "continuous"}, "timestep_type='continuous', which is not supported"),
        ({"thresholding": True}, "thresholding=True"),
        ({"use_lu_lambdas": True}, "use_lu_lambdas"),
        ({"beta_schedule": "sigmoid"}, "'sigmoid'; choose one of linear, scaled_linear, squaredcos_cap_v2"),
        ({"beta_start": 0.5}, "0 < beta_start <= beta_end < 1"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
    ],
)
def test_from_config_refuses_what_it_cannot_do(change, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_config(NoiseSchedule().config | change)


def test_from_config_names_what_is_missing():
    with pytest.raises(ValueError, match="lacks beta_start, beta_end"):
        NoiseSchedule.from_config({"num_train_timesteps": 1000, "beta_schedule": "linear"})


# --- zero terminal SNR and betas of one's own ------------------------------------------------------------------------


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_zero_terminal_snr_is_alg_1(name):
    schedule = NoiseSchedule(name, *ENDS[name], rescale_betas_zero_snr=True)
    plain = SCHEDULES[name].alphas_cumprod.sqrt()
    root = schedule.alphas_cumprod.sqrt()
    assert root[-1] == 0
    assert schedule.betas[-1] == 1
    assert root[0].item() == pytest.approx(plain[0].item(), rel=1e-12)
    # Shifted and scaled: differences keep their proportions.
    torch.testing.assert_close(root.diff() / root.diff().sum(), plain.diff() / plain.diff().sum(), rtol=1e-9, atol=0)
    torch.testing.assert_close(torch.cumprod(1 - schedule.betas, 0), schedule.alphas_cumprod, rtol=1e-9, atol=0)
    assert torch.equal(rescale_zero_terminal_snr(SCHEDULES[name].alphas_cumprod), schedule.alphas_cumprod)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_zero_terminal_snr_is_diffusers(name):
    start, end = ENDS[name]
    ours = NoiseSchedule(name, start, end, rescale_betas_zero_snr=True)
    theirs = DDIMScheduler(1000, start, end, name, rescale_betas_zero_snr=True)
    torch.testing.assert_close(ours.betas, theirs.betas.double(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.alphas_cumprod.sqrt(), theirs.alphas_cumprod.double().sqrt(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_sigmas_stay_finite_and_rise_to_pure_noise(name):
    schedule = NoiseSchedule(name, *ENDS[name], rescale_betas_zero_snr=True)
    assert schedule.zero_terminal_snr
    assert schedule.sigmas.isfinite().all()
    assert (schedule.sigmas.diff() > 0).all()
    assert schedule.sigma_to_t(schedule.sigmas[-1].item()) == schedule.sigma_to_t(2.0**24) == 999
    assert schedule.t_to_sigma(999) == pytest.approx(schedule.sigmas[-1].item())
    if name == "linear":
        # Two timesteps before it are above 4096 already. diffusers puts 4096 all the same, and its sigmas fall there.
        assert schedule.sigmas[-1] == 2 * schedule.sigmas[-2] > 2 * TERMINAL_SIGMA
    else:
        assert schedule.sigmas[-1] == TERMINAL_SIGMA


def test_training_sees_pure_noise_at_the_last_timestep():
    schedule = NoiseSchedule(rescale_betas_zero_snr=True)
    x_0, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([999, 998])
    alpha, sigma = schedule.coefficients(t, x_0)
    assert (alpha[0].item(), sigma[0].item()) == (0, 1)
    assert alpha[1] > 0
    assert torch.equal(schedule.add_noise(x_0, noise, t)[0], noise[0])


def test_trained_betas_are_diffusers(tmp_path):
    betas = torch.linspace(0.01, 0.3, 20).square().tolist()
    schedule = NoiseSchedule(num_train_timesteps=20, trained_betas=betas)
    theirs = DDIMScheduler(20, trained_betas=betas)
    torch.testing.assert_close(schedule.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=1e-5, atol=0)
    theirs.save_pretrained(tmp_path)
    loaded = NoiseSchedule.from_config(DDIMScheduler.load_config(tmp_path))
    assert torch.equal(loaded.betas, schedule.betas)
    rescaled = NoiseSchedule(num_train_timesteps=20, trained_betas=betas, rescale_betas_zero_snr=True)
    assert rescaled.alphas_cumprod[-1] == 0


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule(rescale_betas_zero_snr=True),
        NoiseSchedule(num_train_timesteps=3, trained_betas=[0.1, 0.2, 0.3]),
        NoiseSchedule("linear", 1e-4, 0.02),
    ],
    ids=["zero terminal snr", "trained betas", "linear"],
)
def test_every_config_round_trips_through_diffusers(schedule, tmp_path):
    DDIMScheduler.from_config(schedule.config | {"prediction_type": "v_prediction"}).save_pretrained(tmp_path)
    loaded = schedule_from_config(DDIMScheduler.load_config(tmp_path))
    assert isinstance(loaded, NoiseSchedule)
    assert loaded.config == schedule.config
    assert torch.equal(loaded.alphas_cumprod, schedule.alphas_cumprod)


def test_alpha_keeps_the_variance():
    schedule = NoiseSchedule()
    for t in (0, 500, 999):
        assert schedule.alpha(schedule.t_to_sigma(t)) == pytest.approx(schedule.alphas_cumprod[t].sqrt().item())


# --- flows -----------------------------------------------------------------------------------------------------------


@given(st.floats(0, 0.999), st.integers(1, 2000))
def test_a_flow_s_sigma_is_s_over_1_minus_s(s, num_train_timesteps):
    schedule = FlowSchedule(num_train_timesteps)
    sigma = s / (1 - s)
    assert schedule.alpha(sigma) == pytest.approx(1 - s)
    assert schedule.sigma_to_t(sigma) == pytest.approx(s * num_train_timesteps)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_a_flow_s_shift_is_diffusers(shift):
    theirs = FlowMatchEulerDiscreteScheduler(1000, shift)
    s = torch.arange(1000, 0, -1, dtype=torch.float64).numpy() / 1000
    torch.testing.assert_close(torch.from_numpy(FlowSchedule(1000, shift).shifted(s)).float(), theirs.sigmas)


def test_a_flow_s_config_round_trips_through_diffusers(tmp_path):
    schedule = FlowSchedule(500, 3.0)
    FlowMatchEulerDiscreteScheduler.from_config(schedule.config).save_pretrained(tmp_path)
    loaded = schedule_from_config(FlowMatchEulerDiscreteScheduler.load_config(tmp_path))
    assert isinstance(loaded, FlowSchedule)
    assert loaded.config == schedule.config == {"num_train_timesteps": 500, "shift": 3.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting=True, which is not supported"),
        ({"shift_terminal": 0.1}, "shift_terminal=0.1"),
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"stochastic_sampling": True}, "stochastic_sampling"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ({"prediction_type": "epsilon"}, "ends in pure noise"),
    ],
)
def test_a_flow_refuses_what_it_cannot_do(change, message):
    with pytest.raises(ValueError, match=message):
        schedule_from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0} | change)


# --- which schedule? -------------------------------------------------------------------------------------------------


def test_the_config_says_which_schedule():
    plain = NoiseSchedule().config
    sampler_keys = {"solver_order": 3, "algorithm_type": "dpmsolver++", "use_karras_sigmas": True, "steps_offset": 1}
    for config in (
        plain,
        plain | {"_class_name": "PNDMScheduler"} | sampler_keys,
        plain | {"prediction_type": "sample"},
    ):
        assert isinstance(schedule_from_config(config), NoiseSchedule)
    as_flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    for config in ({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0}, plain | sampler_keys | as_flow):
        schedule = schedule_from_config(config)
        assert isinstance(schedule, FlowSchedule)
        assert schedule.config == {"num_train_timesteps": 1000, "shift": 3.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "eps"}, "'eps'; choose one of epsilon"),
        ({"rescale_betas_zero_snr": True}, "ends in pure noise"),  # epsilon, unless said otherwise
        ({"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}, "train with v_prediction"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas=True"),
    ],
)
def test_configs_that_cannot_be_sampled_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        schedule_from_config(NoiseSchedule().config | change)


def test_a_flow_noises_along_straight_paths():
    schedule = FlowSchedule(1000, shift=3.0)  # the shift is of sampling
    x_0, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    t = schedule.timesteps(torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64))
    assert t.dtype == torch.float32 and t.tolist() == [0, 300, 1000]
    alpha, sigma = schedule.coefficients(t, x_0)
    torch.testing.assert_close(alpha.flatten(), torch.tensor([1, 0.7, 0]))
    torch.testing.assert_close(sigma.flatten(), torch.tensor([0, 0.3, 1]))
    torch.testing.assert_close(schedule.add_noise(x_0, noise, t), alpha * x_0 + sigma * noise)
    half = schedule.add_noise(x_0.bfloat16(), noise.bfloat16(), t)
    assert half.dtype == torch.bfloat16 and schedule.coefficients(t, half)[0].dtype == torch.float32
    # What training is told of a time is what sampling will be: sigma = s / (1 - s) is asked for at t.
    assert schedule.sigma_to_t(0.3 / 0.7) == pytest.approx(300)


@pytest.mark.parametrize(
    ("t", "says"),
    [
        (torch.tensor([0.0, 1.0]), r"shape \(3,\)"),
        (torch.tensor([0, 1, 2]), "floating point.*int64"),
        (torch.tensor([0.0, 1.0, 1001.0]), "1001"),
        (torch.tensor([-1.0, 1.0, 2.0]), "-1"),
    ],
)
def test_a_flow_refuses_times_that_are_none(t, says):
    with pytest.raises(ValueError, match=says):
        FlowSchedule().coefficients(t, torch.zeros(3, 4, 2, 2))
    with pytest.raises(ValueError, match="noise must have"):
        FlowSchedule().add_noise(torch.zeros(3, 4, 2, 2), torch.zeros(3, 4, 2, 1), torch.zeros(3))


def test_times_divide_the_timesteps_evenly():
    schedule = NoiseSchedule(num_train_timesteps=4)
    times = torch.tensor([0.0, 0.24, 0.25, 0.999, 1.0], dtype=torch.float64)
    assert schedule.timesteps(times).tolist() == [0, 0, 1, 3, 3]
