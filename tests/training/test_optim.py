import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tiny
from ldm.config import Optim
from ldm.errors import UserError
from ldm.training import fit, stages
from ldm.training.ema import ScheduleFreeAverage
from ldm.training.optim import build_optimizer, learning_rate_factor, parameter_groups
from ldm.weights.folder import load_weights
from probes import Stopped
from runs import ROOT, tiny_config
from training_checks import assert_equal

SGD = {"_target_": "torch.optim.SGD", "lr": 0.5, "weight_decay": 0.1, "arguments": {}, "schedule": "constant"}
SGD |= {"warmup_steps": 0, "decay_share": 0.2, "clip_norm": None}


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
        ("wsd", [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.5, 0]),
    ],
)
def test_the_schedule_by_hand(schedule, expected):
    assert [learning_rate_factor(step, schedule, 4, 8, 0.25) for step in range(9)] == pytest.approx(expected)


@given(
    st.sampled_from(["constant", "linear", "cosine", "wsd"]),
    st.integers(0, 50),
    st.integers(1, 100),
    st.floats(0.01, 1),
)
def test_the_schedule_rises_to_one_and_falls_to_its_end(schedule, warmup, max_steps, share):
    factors = [learning_rate_factor(step, schedule, warmup, max_steps, share) for step in range(max_steps + 20)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert all(a <= b for a, b in pairwise(factors[:warmup]))
    assert all(a >= b for a, b in pairwise(factors[warmup:]))
    assert all(factor > 0 for factor in factors[: min(warmup, max_steps)])  # no step is wasted
    if schedule == "constant":
        assert set(factors[warmup:]) <= {1.0}
    elif warmup < max_steps:
        assert factors[warmup] == 1 and factors[max_steps] == pytest.approx(0, abs=1e-12)


def test_wsd_is_constant_until_its_share_whatever_the_length():
    for max_steps in (1000, 5000):
        factors = [learning_rate_factor(step, "wsd", 10, max_steps, 0.1) for step in range(max_steps + 1)]
        last = max_steps // 10
        assert set(factors[10 : -last - 1]) == {1.0}
        assert factors[-last - 1 :] == pytest.approx([1 - i / last for i in range(last + 1)])


def test_a_warm_up_that_reaches_into_the_decay_shortens_it():
    assert [learning_rate_factor(step, "wsd", 6, 8, 0.5) for step in (5, 6, 7, 8)] == [1, 1, 0.5, 0]


def test_the_share_of_the_config_is_that_of_the_run():
    built = build_optimizer(nn.Linear(1, 1), optim(schedule="wsd", decay_share=0.5), 4)
    rates = []
    for _ in range(5):
        rates.append(built["optimizer"].param_groups[0]["lr"])
        built["optimizer"].step()
        built["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([0.5, 0.5, 0.5, 0.25, 0])


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


# ----------------------------------------------------------------------------------------------------------- extras


FREE = "optim=schedule_free"


def preset(name: str) -> Optim:
    return Optim.model_validate(yaml.safe_load((ROOT / "conf" / "optim" / f"{name}.yaml").read_text()))


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("adam8bit", "bitsandbytes", "adam8bit"), ("schedule_free", "schedulefree", "schedule_free")],
)
def test_what_brings_a_missing_optimizer_is_said(name, package, extra, monkeypatch):
    for module in [each for each in sys.modules if each.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setattr("sys.meta_path", [])
    with pytest.raises(UserError, match=rf"No module named '{package}'.*: pip install 'ldm\[{extra}\]'"):
        build_optimizer(nn.Linear(1, 1), preset(name), 10)


def test_eight_bits_hold_the_moments_of_large_tensors():
    module = nn.Linear(128, 64)
    built = build_optimizer(module, preset("adam8bit"), 10)["optimizer"]
    module(torch.randn(4, 128)).square().mean().backward()
    built.step()
    assert built.state[module.weight]["state1"].dtype == torch.uint8
    assert built.state[module.bias]["state1"].dtype == torch.float32


def test_schedule_free_averages_are_what_its_own_eval_gives():
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)), torch.randn(32, 8)
    module[0].bias.requires_grad_(False)
    built = build_optimizer(module, preset("schedule_free"), 10)
    average = ScheduleFreeAverage(module)
    for _ in range(20):
        module(x).square().mean().backward()
        built["optimizer"].step()
        built["optimizer"].zero_grad()
        built["lr_scheduler"]["scheduler"].step()
        average.follow(module, built["optimizer"])
    trained = [p.detach().clone() for p in module.parameters()]
    built["optimizer"].eval()
    for mine, theirs, before in zip(average.average.parameters(), module.parameters(), trained, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-6, atol=1e-7)
        assert not torch.equal(theirs, before) or not theirs.requires_grad
    assert torch.equal(average.average[1].running_mean, module[1].running_mean)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim=adam8bit", "unet.block_out_channels=[32,32]"],
        ["optim=schedule_free", "diffusion.ema_decay=0"],
        ["optim.schedule=wsd", "optim.decay_share=0.5"],
    ],
    ids=lambda each: each[0],
)
def test_a_run_that_was_interrupted_is_the_same(overrides, finished):
    name = overrides[0].replace("=", "-")
    arguments = ["stages=[diffusion]", *overrides, "optim.warmup_steps=2", "trainer.max_steps=9", "trainer.val_every=3"]
    configs = [tiny_config(finished.output_dir, *arguments, f"name={name}-{i}") for i in range(2)]
    stages.run(configs[0])
    with pytest.raises(Stopped):
        stop = "+callbacks.x={_target_: probes.StopAt, stage: diffusion, step: 7}"
        stages.run(tiny_config(finished.output_dir, *arguments, f"name={name}-1", stop))
    stages.run(configs[1])
    kept: list[dict[str, Any]] = [torch.load(fit.checkpoint_path(c, "diffusion"), weights_only=True) for c in configs]
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal(kept[1][part], kept[0][part])
    exported = load_weights(Path(configs[0].run_dir) / "model" / "unet")
    state = kept[0]["state_dict"]
    assert all(torch.equal(tensor, state[f"ema.average.{name}"]) for name, tensor in exported.items())
    assert any(not torch.equal(tensor, state[f"network.{name}"]) for name, tensor in exported.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([FREE], "diffusion.ema_decay=0"),
        ([FREE, "diffusion.ema_decay=0", "diffusion.posthoc_ema={lengths: [0.1], every: 2}"], "posthoc"),
        ([FREE, "diffusion.ema_decay=0", "optim.schedule=cosine"], "leave it constant"),
        (["optim@clip.optim=schedule_free"], "clip.optim._target_=schedulefree.AdamWScheduleFree is for the U-Net"),
        (["optim@autoencoder.optim=schedule_free"], "is for the U-Net alone"),
        (["optim._target_=schedulefree.SGDScheduleFree"], "AdamWScheduleFree"),
        (["optim.decay_share=0"], "optim.decay_share"),
        (["diffusion.posthoc_ema={lengths: [], every: 2}"], "lengths"),
        (["diffusion.posthoc_ema={lengths: [0.1, 0.1], every: 2}"], "names a length twice"),
        (["diffusion.posthoc_ema={lengths: [0.3], every: 2}"], "lengths"),
        (["diffusion.posthoc_ema={lengths: [0.1]}"], "every"),
        (["trainer.max_skipped=-1"], "trainer.max_skipped"),
    ],
)
def test_what_cannot_work_is_refused(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        tiny_config(tmp_path, *overrides)
