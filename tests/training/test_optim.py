import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tiny
from ldm.config import Optim
from ldm.errors import UserError
from ldm.training.optim import build_optimizer, learning_rate_factor, parameter_groups

SGD = {"_target_": "torch.optim.SGD", "lr": 0.5, "weight_decay": 0.1, "arguments": {}, "schedule": "constant"}
SGD |= {"warmup_steps": 0, "clip_norm": None}


def optim(**changes) -> Optim:
    return Optim.model_validate({**SGD, **changes})


@pytest.mark.parametrize("network", [tiny.unet, tiny.vae, tiny.clip])
def test_norms_biases_and_single_numbers_do_not_decay(network):
    module = network()
    named = dict(module.named_parameters())
    groups = parameter_groups(module, 0.1)
    decays = {id(p) for p in groups[0]["params"]}
    spared = {id(p) for p in groups[1]["params"]}
    assert groups[0]["weight_decay"] == 0.1 and groups[1]["weight_decay"] == 0
    assert decays | spared == {id(p) for p in named.values()} and not decays & spared
    for name, parameter in named.items():
        if "norm" in name or name.endswith(("bias", "logit_scale", "class_embedding")):
            assert id(parameter) in spared, name
        else:
            assert id(parameter) in decays, name


def test_frozen_parameters_are_not_optimized():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    given = [p for group in parameter_groups(module, 0.1) for p in group["params"]]
    assert {id(p) for p in given} == {id(p) for p in module[1].parameters()}


def test_decay_shrinks_matrices_only():
    module = nn.Linear(3, 3)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = build_optimizer(module, optim(), 10)["optimizer"]
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(module.weight.detach(), before["weight"] * (1 - 0.5 * 0.1))
    assert torch.equal(module.bias, before["bias"])


# --------------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]),
    ],
)
def test_the_schedule_by_hand(schedule, expected):
    assert [learning_rate_factor(step, schedule, 4, 8) for step in range(9)] == pytest.approx(expected)


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 50), st.integers(1, 100))
def test_the_schedule_rises_to_one_and_falls_to_its_end(schedule, warmup, max_steps):
    factors = [learning_rate_factor(step, schedule, warmup, max_steps) for step in range(max_steps + 20)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert all(a <= b for a, b in pairwise(factors[:warmup]))
    assert all(a >= b for a, b in pairwise(factors[warmup:]))
    assert all(factor > 0 for factor in factors[: min(warmup, max_steps)])  # no step is wasted
    if schedule == "constant":
        assert set(factors[warmup:]) <= {1.0}
    elif warmup < max_steps:
        assert factors[warmup] == 1 and factors[max_steps] == pytest.approx(0, abs=1e-12)


def test_the_optimizer_follows_the_schedule():
    built = build_optimizer(nn.Linear(1, 1), optim(schedule="linear", warmup_steps=2), 6)
    assert built["lr_scheduler"]["interval"] == "step"
    rates = []
    for _ in range(6):
        rates.append(built["optimizer"].param_groups[0]["lr"])
        built["optimizer"].step()
        built["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([0.25, 0.5, 0.5, 0.375, 0.25, 0.125])


# ---------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("target", ["torch.optim.AdamW", "torch.optim.RMSprop", "torch.optim.adam.Adam"])
def test_the_optimizer_is_whatever_is_named(target):
    built = build_optimizer(nn.Linear(1, 1), optim(_target_=target, arguments={"eps": 1e-5}), 10)["optimizer"]
    assert type(built).__name__ == target.rpartition(".")[2]
    assert all(group["eps"] == 1e-5 for group in built.param_groups)


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        ("torch.optim.Adamm", {}),
        ("nowhere.Adam", {}),
        ("Adam", {}),
        ("torch.optim", {}),
        ("torch.optim.AdamW", {"lrr": 1}),
        ("torch.optim.AdamW", {"betas": [2.0, 0.9]}),
        ("torch.optim.AdamW", {"lr": 1.0}),
    ],
)
def test_an_optimizer_that_cannot_be_built_is_a_user_error(target, arguments):
    with pytest.raises(UserError, match=r"optim\._target_=") as error:
        build_optimizer(nn.Linear(1, 1), optim(_target_=target, arguments=arguments), 10)
    assert target in str(error.value) and "\n" not in str(error.value)
