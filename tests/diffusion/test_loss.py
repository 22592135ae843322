import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ldm.diffusion.loss import diffusion_loss, stratified_timesteps
from ldm.diffusion.parameterization import PREDICTION_TYPES, target
from ldm.diffusion.schedule import NoiseSchedule

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


@given(st.integers(1, 70), st.integers(1, 1000), st.integers(0, 2**31))
def test_there_is_one_timestep_in_each_bin(batch, num_train_timesteps, seed):
    t = stratified_timesteps(batch, num_train_timesteps, torch.Generator().manual_seed(seed))
    assert t.shape == (batch,)
    assert t.dtype == torch.int64
    width = num_train_timesteps / batch
    for i, step in enumerate(t.sort().values.tolist()):
        assert math.floor(i * width) <= step <= min(math.floor((i + 1) * width), num_train_timesteps - 1)


def test_each_timestep_is_uniform_at_every_place_in_the_batch():
    draws, batch, num_train_timesteps = 6000, 4, 10  # bins 2.5 wide: a timestep can lie in two
    g = torch.Generator().manual_seed(0)
    t = torch.stack([stratified_timesteps(batch, num_train_timesteps, g) for _ in range(draws)])
    for place in range(batch):
        counts = torch.bincount(t[:, place], minlength=num_train_timesteps).double()
        chi_squared = ((counts - draws / 10) ** 2 / (draws / 10)).sum()
        assert chi_squared < 27.9, f"place {place}: {counts.tolist()}"  # 99.9 % point, 9 degrees of freedom


def test_the_generator_alone_decides():
    a, b = (stratified_timesteps(16, 1000, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, stratified_timesteps(16, 1000, torch.Generator().manual_seed(8)))
