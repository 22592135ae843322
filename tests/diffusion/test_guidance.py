import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from hypothesis import given
from hypothesis import strategies as st

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import GuidedDenoiser, drop_captions
from ldm.diffusion.schedule import NoiseSchedule


class CountingDenoiser:
    """x̂_0 = x / (1 + sigma) + the mean of each sample's context, and the batch sizes it was asked for."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, sigma, context):
        self.batches.append(len(x))
        return x / (1 + sigma) + context.mean((1, 2))[:, None, None, None]


def draw(seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(3, 2, 4, 4), (3, 5, 6), (1, 5, 6)]
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def test_scale_1_runs_the_condition_alone_and_once():
    x, context, null_context = draw()
    denoiser = CountingDenoiser()
    guided = GuidedDenoiser(denoiser, context, null_context, 1.0)(x, 2.0)
    assert denoiser.batches == [3]
    assert torch.equal(guided, CountingDenoiser()(x, 2.0, context))


def test_both_halves_run_as_one_batch():
    x, context, null_context = draw()
    denoiser = CountingDenoiser()
    GuidedDenoiser(denoiser, context, null_context, 7.5)(x, 2.0)
    assert denoiser.batches == [6]


@given(st.floats(-2, 20), st.integers(0, 2**31))
def test_guidance_is_linear_in_its_scale(w, seed):
    x, context, null_context = draw(seed)
    denoiser = CountingDenoiser()
    cond, null = denoiser(x, 2.0, context), denoiser(x, 2.0, null_context.expand(3, -1, -1))
    guided = GuidedDenoiser(denoiser, context, null_context, w)(x, 2.0)
    torch.testing.assert_close(guided, (1 - w) * null + w * cond, rtol=0, atol=1e-12)


def test_each_sample_has_its_own_negative_prompt():
    x, context, _ = draw()
    negative = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    together = GuidedDenoiser(CountingDenoiser(), context, negative, 5.0)(x, 2.0)
    for i in range(3):
        one = slice(i, i + 1)
        alone = GuidedDenoiser(CountingDenoiser(), context[one], negative[one], 5.0)(x[one], 2.0)
        torch.testing.assert_close(together[one], alone)


def test_a_null_context_of_another_length_is_refused():
    _, context, _ = draw()
    with pytest.raises(ValueError, match=r"null_context of shape \(1, 4, 6\) does not fit"):
        GuidedDenoiser(CountingDenoiser(), context, torch.zeros(1, 4, 6), 5.0)
    with pytest.raises(ValueError, match="does not fit"):
        drop_captions(context, torch.zeros(2, 5, 6), torch.tensor([True, False, False]))


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.booleans())
def test_captions_are_dropped_one_by_one(drop, with_batch_axis):
    g = torch.Generator().manual_seed(0)
    context = torch.randn(len(drop), 5, 6, generator=g)
    null_context = torch.randn(5, 6, generator=g)
    dropped = drop_captions(context, null_context[None] if with_batch_axis else null_context, torch.tensor(drop))
    for i, gone in enumerate(drop):
        assert torch.equal(dropped[i], null_context if gone else context[i])


def test_dropping_keeps_the_context_s_dtype_and_leaves_it_alone():
    context, null_context = torch.ones(2, 3, 4, dtype=torch.bfloat16), torch.zeros(3, 4)
    dropped = drop_captions(context, null_context, torch.tensor([True, False]))
    assert dropped.dtype == torch.bfloat16
    assert torch.equal(context, torch.ones_like(context))


@pytest.mark.parametrize("drop", [torch.tensor(True), torch.tensor([True]), torch.tensor([1, 0, 0])])
def test_a_mask_that_is_not_per_sample_is_refused(drop):
    _, context, null_context = draw()
    with pytest.raises(ValueError, match=r"drop must be bool of shape \(3,\)"):
        drop_captions(context, null_context, drop)


# ---------------------------------------------------------------------------------------------- rescale and interval


def network(x_t, t, context):
    return torch.tanh(x_t + context.mean((1, 2))[:, None, None, None]) + t[:, None, None, None].to(x_t) / 2000


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_rescaling_is_that_of_diffusers_on_what_the_network_predicts(prediction_type, phi):
    x, context, null_context = draw()
    schedule = NoiseSchedule()
    denoiser = Denoiser(network, schedule, prediction_type)
    for t in (10, 500, 990):
        sigma = schedule.t_to_sigma(t)
        x_t = x / (1 + sigma**2) ** 0.5
        times = torch.full((3,), float(t))
        null, cond = network(x_t, times, null_context.expand(3, -1, -1)), network(x_t, times, context)
        expected = rescale_noise_cfg(null + 5 * (cond - null), cond, guidance_rescale=phi)
        guided = GuidedDenoiser(denoiser, context, null_context, 5.0, rescale=phi)(x, sigma)
        torch.testing.assert_close(guided, denoiser.to_denoised(expected, x, sigma), rtol=1e-9, atol=1e-9)


def test_full_rescaling_gives_the_spread_of_the_condition():
    x, context, null_context = draw()
    denoiser = Denoiser(network, NoiseSchedule(), "v_prediction")
    guided = GuidedDenoiser(denoiser, context, null_context, 9.0, rescale=1.0)(x, 3.0)
    spread = denoiser.to_prediction(guided, x, 3.0).std((1, 2, 3))
    torch.testing.assert_close(spread, denoiser.to_prediction(denoiser(x, 3.0, context), x, 3.0).std((1, 2, 3)))


@pytest.mark.parametrize(("sigma", "guides"), [(0.5, False), (1.0, False), (1.01, True), (4.0, True), (4.01, False)])
def test_outside_of_its_interval_the_condition_runs_alone(sigma, guides):
    x, context, null_context = draw()
    denoiser = CountingDenoiser()
    found = GuidedDenoiser(denoiser, context, null_context, 7.5, interval=(1.0, 4.0))(x, sigma)
    assert denoiser.batches == ([6] if guides else [3])
    expected = GuidedDenoiser(CountingDenoiser(), context, null_context, 7.5 if guides else 1.0)(x, sigma)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options", [{"rescale": 1.1}, {"rescale": -0.1}, {"interval": (2.0, 1.0)}, {"interval": (-1, 1)}]
)
def test_options_out_of_range_are_refused(options):
    _, context, null_context = draw()
    with pytest.raises(ValueError, match=r"rescale is|interval is"):
        GuidedDenoiser(CountingDenoiser(), context, null_context, 7.5, **options)
