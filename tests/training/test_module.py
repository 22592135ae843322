"""What all stages share: draws, EMA, optimizer steps, logging; seen in real runs of the tiny experiment."""

from itertools import product
from pathlib import Path

import pytest
import torch

from ldm.config import TrainConfig, check
from ldm.errors import UserError
from ldm.training import fit, stages
from ldm.training.ema import EMA
from ldm.training.module import step_generator
from ldm.training.networks import build_unet, build_vae, load_frozen
from probes import Record
from runs import compose_values, tiny_config

RECORD = "+callbacks.record={_target_: probes.Record}"


def draws(*arguments: int) -> torch.Tensor:
    return torch.randn(16, generator=step_generator(*arguments))


def test_draws_are_a_function_of_the_arguments():
    assert torch.equal(draws(1, 2, 3, 4), draws(1, 2, 3, 4))
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    draws(1, 2, 3, 4)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_draws_differ_in_every_argument():
    reference = draws(5, 6, 7, 8)
    for i in range(4):
        arguments = [5, 6, 7, 8]
        arguments[i] += 1
        assert not torch.equal(draws(*arguments), reference)
    assert not torch.equal(draws(5, 6, 8, 7), reference)
    assert not torch.equal(draws(6, 5, 7, 8), reference)


def test_no_two_steps_share_a_seed():
    keys = product(range(3), range(5000), range(2), range(4))
    seeds = [step_generator(*key).initial_seed() for key in keys]
    assert len(set(seeds)) == len(seeds) == 3 * 5000 * 2 * 4


@pytest.mark.parametrize("seed", [0, 2**31, 2**63 - 1])
def test_seeds_of_any_size(seed):
    assert draws(seed, 10**9, 10**6, 10**5).isfinite().all()


def test_neighbouring_steps_are_unrelated():
    noise = torch.stack([torch.randn(400, generator=step_generator(0, step)) for step in range(64)])
    correlation = torch.corrcoef(noise) - torch.eye(64)
    assert correlation.abs().max() < 0.3  # 2,016 pairs, standard deviation 0.05
    assert noise.mean().abs() < 0.03 and abs(noise.std() - 1) < 0.03


# ------------------------------------------------------------------------------------------------- in a real run


@pytest.mark.parametrize("accumulate", [1, 3])
def test_accumulation_counts_optimizer_steps_and_is_the_u_nets_own(accumulate, tmp_path):
    Record.rows.clear()
    config = tiny_config(
        tmp_path, RECORD, f"trainer.accumulate_grad_batches={accumulate}", "trainer.max_steps=4", "data.batch_size=2"
    )
    stages.run(config)
    by_stage = {stage: [row for row in Record.rows if row["stage"] == stage] for stage in ("autoencoder", "diffusion")}
    assert len(by_stage["diffusion"]) == 4 * accumulate
    assert [row["step"] for row in by_stage["diffusion"]] == [(i + 1) // accumulate for i in range(4 * accumulate)]
    assert [row["updates"] for row in by_stage["diffusion"]] == [row["step"] for row in by_stage["diffusion"]]
    lines = [line.split(",") for line in (Path(config.run_dir) / "metrics.csv").read_text().splitlines()]
    assert len([line for line in lines if line[0] == "diffusion/val_loss"]) == 2  # every two optimizer steps
    assert [row["step"] for row in by_stage["autoencoder"]] == [1, 2, 3]
    assert {row["accumulate"] for row in by_stage["autoencoder"]} == {1}


def test_the_average_in_a_run_is_that_of_a_reference_loop(tmp_path):
    """EMA of the weights after each optimizer step, from the fresh network on."""
    Record.weights.clear()
    config = tiny_config(tmp_path, RECORD, "trainer.max_steps=4", "diffusion.ema_decay=0.3")
    stages.run(config)
    states = Record.weights["diffusion"]
    vae, conditioner = load_frozen(config)
    network = build_unet(config, vae, conditioner.text_tower.config["hidden_size"])
    ema = EMA(network, 0.3)
    for state in states:
        network.load_state_dict(state)
        ema.update(network)
    kept = torch.load(fit.checkpoint_path(config, "diffusion"), weights_only=True)["state_dict"]
    for name, tensor in ema.average.state_dict().items():
        torch.testing.assert_close(kept[f"ema.average.{name}"], tensor, rtol=1e-5, atol=1e-6)
    assert int(kept["ema.num_updates"]) == 4


@pytest.mark.parametrize("stage", ["autoencoder", "clip", "diffusion"])
def test_a_checkpoint_is_data_and_holds_what_is_trained(stage, finished):
    content = torch.load(fit.checkpoint_path(finished, stage), weights_only=True)
    assert content["global_step"] == 3
    assert content["identity"]["seed"] == 0
    prefixes = {name.split(".")[0] for name in content["state_dict"]}
    assert prefixes == ({"network"} if stage == "clip" else {"network", "ema"})


def test_fresh_weights_are_a_function_of_the_seed(tmp_path):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    first = build_vae(tiny_config(tmp_path)).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)  # and draw nothing from the global state
    torch.manual_seed(456)
    second = build_vae(tiny_config(tmp_path)).state_dict()
    other = build_vae(tiny_config(tmp_path, "seed=1")).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_gradients_are_clipped_to_the_norm_of_the_stage(tmp_path):
    Record.rows.clear()
    base = ["stages=[autoencoder]", "++autoencoder.optim.arguments={betas: [0.0, 0.0], eps: 1e3, fused: false}"]
    base += ["autoencoder.optim.schedule=constant", "autoencoder.optim.weight_decay=0", "autoencoder.max_steps=1"]
    # With such an epsilon Adam's step is lr · gradient / eps: its length shows the gradient's.
    lengths = []
    for name, norm in (("one", 1.0), ("half", 0.5)):
        config = tiny_config(
            tmp_path, *base, f"name={name}", f"autoencoder.optim.clip_norm={norm}", "autoencoder.optim.lr=1e3",
            "autoencoder.ema_decay=0",
        )  # fmt: skip
        stages.run(config)
        before = build_vae(config).state_dict()
        after = torch.load(fit.checkpoint_path(config, "autoencoder"), weights_only=True)["state_dict"]
        moved = [(after[f"network.{key}"] - before[key]).square().sum() for key in before]
        lengths.append(float(torch.stack(moved).sum().sqrt()))
    assert lengths[0] == pytest.approx(1.0, rel=0.02) and lengths[1] == pytest.approx(0.5, rel=0.02)


def test_a_run_leaves_what_a_run_directory_holds(run_dir):
    names = {path.name for path in Path(run_dir).iterdir()}
    assert names == {
        ".lock", "config.yaml", "overrides.txt", "env.json", "metrics.csv", "samples", "checkpoints", "model",
        "tensorboard", "report",
    }  # fmt: skip
    assert (run_dir / "overrides.txt").read_text() == "experiment=shapes\n"


def test_a_fused_optimizer_is_clipped_in_bf16(tmp_path):
    """Lightning's own clipping refuses it, and it is what the GPU trainer runs by default."""
    config = tiny_config(
        tmp_path, "stages=[autoencoder]", "autoencoder.max_steps=2", "autoencoder.precision=bf16-mixed",
        "autoencoder.optim.clip_norm=1.0", "autoencoder.optim.arguments.fused=true",
    )  # fmt: skip
    stages.run(config)
    assert stages.is_done(config, "autoencoder")


def test_fp16_is_not_clipped_with_a_fused_optimizer():
    values = compose_values("train", ["experiment=shapes", "trainer=gpu", "trainer.precision=16-mixed"])
    with pytest.raises(UserError, match="fused=false"):
        check(TrainConfig, values)
