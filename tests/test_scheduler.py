import diffusers
import pytest

from ldm.diffusion.schedule import FlowSchedule, NoiseSchedule
from ldm.scheduler import DISTILLED, SAMPLERS, default_spacing, read_scheduler

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


@pytest.mark.parametrize("name", [*SAMPLERS, "PNDMScheduler"])
def test_what_diffusers_writes_is_read(name):
    """Every class that we map exists, and its own default config names the spacing that we take where none is said."""
    scheduler = getattr(diffusers, name)()
    config = {"_class_name": name, **scheduler.config}
    schedule, prediction_type, grid, sampler = read_scheduler(config)
    flow = name.startswith("FlowMatch")
    assert isinstance(schedule, FlowSchedule if flow else NoiseSchedule)
    assert prediction_type == ("flow_prediction" if flow else "epsilon")
    assert sampler == SAMPLERS.get(name, "ddim")
    if "timestep_spacing" in scheduler.config:
        assert grid["spacing"] == scheduler.config.timestep_spacing == default_spacing(sampler)


def test_a_file_that_does_not_say_leaves_the_spacing_to_the_sampler():
    assert read_scheduler({"_class_name": "PNDMScheduler", **BETAS})[2]["spacing"] is None
    assert [default_spacing(sampler) for sampler in ("ddim", "ddpm", "euler", "unipc")] == ["leading"] * 2 + [
        "linspace"
    ] * 2


@pytest.mark.parametrize(
    ("options", "spacing"),
    [
        ({}, "linspace"),
        ({"use_karras_sigmas": True}, "karras"),
        ({"use_exponential_sigmas": True}, "exponential"),
        ({"use_karras_sigmas": False, "timestep_spacing": "trailing"}, "trailing"),
    ],
)
def test_spacings(options, spacing):
    scheduler = diffusers.DPMSolverMultistepScheduler(**options)
    assert read_scheduler({"_class_name": "DPMSolverMultistepScheduler", **scheduler.config})[2]["spacing"] == spacing


def test_the_stochastic_form_of_a_solver():
    config = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", **BETAS}
    assert read_scheduler(config)[3] == "dpmpp_2m_sde"


def test_where_the_last_step_ends():
    grids = [
        read_scheduler({**BETAS, **more})[2] for more in ({}, {"set_alpha_to_one": True}, {"set_alpha_to_one": False})
    ]
    assert [grid["final_sigma"] for grid in grids[:2]] == [0.0, 0.0]
    assert grids[2]["final_sigma"] == pytest.approx(0.0292, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        *({"_class_name": name} for name in DISTILLED),
        {"solver_order": 3},
        {"solver_type": "heun"},
        {"predict_x0": False},
        {"final_sigmas_type": "sigma_min"},
        {"variance_type": "learned_range"},
        {"timestep_spacing": "even"},
    ],
)
def test_what_our_samplers_do_not_do_is_refused_by_name(options):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=rf"{name}={value!r} is not supported"):
        read_scheduler({**BETAS, **options})


@pytest.mark.parametrize("kind", ["DDIMScheduler", "FlowMatchEulerDiscreteScheduler"])
@pytest.mark.parametrize("num", [10**9, 1e300, float("inf"), float("nan")])
def test_more_timesteps_than_memory_holds_are_refused(kind, num):
    config = {**NoiseSchedule().config, "_class_name": kind, "num_train_timesteps": num}
    with pytest.raises(ValueError, match=r"num_train_timesteps=.* is not supported"):
        read_scheduler(config)
