"""A run that was interrupted is the same run, to the bit."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.config import TrainConfig
from ldm.errors import UserError
from ldm.report.metrics import SPEED
from ldm.training import fit, stages
from ldm.weights.folder import load_weights
from probes import Record, Stopped
from runs import tiny_config
from training_checks import assert_equal

# Long enough to log (at step 50), to validate and to write checkpoints before and after the crash at step 47.
LONG = [
    "autoencoder.max_steps=52", "clip.max_steps=52", "trainer.max_steps=52",
    "autoencoder.optim.warmup_steps=5", "clip.optim.warmup_steps=5", "optim.warmup_steps=5",
    "trainer.val_every=15", "trainer.checkpoint_every=20", "data.num_train=50",
]  # fmt: skip
VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "accumulate": ["trainer.accumulate_grad_batches=2", "data.batch_size=4"],
    "uncached": ["data.cache=false"],
    "dropout": ["+unet.dropout=0.2"],
    "together": ["trainer.val_every=20"],  # validation and checkpoint at the same steps
}
CASES = [("autoencoder", "plain"), ("clip", "plain"), *(("diffusion", name) for name in VARIANTS)]


def rows(config: TrainConfig, stage: str) -> dict[tuple[str, str], str]:
    """Return what metrics.csv says of a stage, but for how fast it was; every (metric, step) must be there once."""
    with (Path(config.run_dir) / "metrics.csv").open(newline="") as file:
        found = [row for row in csv.reader(file) if row[0].startswith(f"{stage}/")]
    found = [row for row in found if row[0].rpartition("/")[2] not in SPEED]
    values = {(metric, step): value for metric, step, value, _ in found}
    assert len(values) == len(found)
    return values


def checkpoint(config: TrainConfig, stage: Any) -> dict[str, Any]:
    return torch.load(fit.checkpoint_path(config, stage), weights_only=True)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """Runs in this folder share one VAE and one CLIP."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def whole(shared):
    """Give the config of an uninterrupted run of a variant, made once."""
    done: dict[str, TrainConfig] = {}

    def run(variant: str) -> TrainConfig:
        for name in dict.fromkeys(["plain", variant]):  # the first one trains the VAE and CLIP, and has their figures
            if name not in done:
                done[name] = tiny_config(shared, *LONG, *VARIANTS[name], f"name=whole-{name}")
                stages.run(done[name])
        return done[variant]

    return run


@pytest.mark.parametrize(("stage", "variant"), CASES)
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(stage, variant, whole, shared, tmp_path, capsys):
    reference = whole("plain" if stage != "diffusion" else variant)
    root = shared if stage == "diffusion" else tmp_path
    overrides = [*LONG, *VARIANTS[variant], f"stages=[{stage}]", f"name=crashed-{variant}"]
    with pytest.raises(Stopped):
        stages.run(tiny_config(root, *overrides, f"+callbacks.x={{_target_: probes.StopAt, stage: {stage}, step: 47}}"))
    config = tiny_config(root, *overrides)
    assert checkpoint(config, stage)["global_step"] == 40
    capsys.readouterr()
    stages.run(config)
    assert "going on from step 40" in capsys.readouterr().out
    ours, theirs = checkpoint(config, stage), checkpoint(reference, stage)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_equal(ours[part], theirs[part], part)
    folder = {"autoencoder": "vae", "clip": "text_encoder", "diffusion": "unet"}[stage]
    assert_equal(*(load_weights(Path(each.run_dir) / "model" / folder) for each in (config, reference)))
    assert len(rows(config, stage)) >= 3 and rows(config, stage) == rows(reference, stage)


def test_a_crash_in_validation_just_after_a_checkpoint(whole, shared):
    reference = whole("together")
    overrides = [*LONG, *VARIANTS["together"], "stages=[diffusion]", "name=in-validation"]
    with pytest.raises(Stopped):
        crash = "+callbacks.x={_target_: probes.StopInValidation, stage: diffusion, step: 40}"
        stages.run(tiny_config(shared, *overrides, crash))
    config = tiny_config(shared, *overrides)
    assert checkpoint(config, "diffusion")["global_step"] == 40
    stages.run(config)
    assert_equal(checkpoint(config, "diffusion")["state_dict"], checkpoint(reference, "diffusion")["state_dict"])
    assert rows(config, "diffusion").items() <= rows(reference, "diffusion").items()


@pytest.mark.parametrize(("step", "overrides"), [(9, []), (47, ["resume=never"])])
def test_a_run_that_starts_anew_forgets_what_was(step, overrides, whole, shared, capsys):
    """Where there was no checkpoint yet, and where it is not wanted."""
    reference = whole("plain")
    arguments = [*LONG, "stages=[diffusion]", f"name=anew-{step}"]
    with pytest.raises(Stopped):
        crash = f"+callbacks.x={{_target_: probes.StopAt, stage: diffusion, step: {step}}}"
        stages.run(tiny_config(shared, *arguments, crash))
    capsys.readouterr()
    config = tiny_config(shared, *arguments, *overrides)
    stages.run(config)
    assert "going on" not in capsys.readouterr().out
    assert rows(config, "diffusion") == rows(reference, "diffusion")
    assert_equal(checkpoint(config, "diffusion")["state_dict"], checkpoint(reference, "diffusion")["state_dict"])


def test_another_seed_is_another_run(whole, tmp_path):
    reference, config = whole("plain"), tiny_config(tmp_path, *LONG, "seed=1")
    stages.run(config)
    for stage in ("autoencoder", "clip", "diffusion"):
        key = (f"{stage}/loss", "49")
        assert rows(config, stage)[key] != rows(reference, stage)[key]


def test_a_longer_run_goes_on_from_the_end_of_the_shorter(tmp_path, capsys):
    record = "+callbacks.record={_target_: probes.Record}"
    constant = "optim.schedule=linear"
    stages.run(tiny_config(tmp_path, constant, "trainer.max_steps=4"))
    Record.rows.clear()
    capsys.readouterr()
    stages.run(tiny_config(tmp_path, constant, "trainer.max_steps=10", record))
    out = capsys.readouterr().out
    assert "going on from step 4" in out and out.count("up to date") == 2
    assert [row["step"] for row in Record.rows] == [5, 6, 7, 8, 9, 10]
    # Each step has the rate of the longer schedule, the first too: the old one had ended at zero.
    lr = tiny_config(tmp_path).optim.lr
    rates = [row["rate"] for row in Record.rows]  # noted when the scheduler has set the next step's rate
    assert rates == pytest.approx([lr * (1 - step / 10) for step in range(5, 11)], abs=1e-12)


def test_a_longer_run_has_its_figures_at_the_steps_of_one_that_was_never_shorter(tmp_path):
    found = []
    for name, lengths in (("direct", [8]), ("extended", [4, 8])):
        for length in lengths:
            told = [f"name={name}", "optim.schedule=constant", "trainer.val_every=2", f"trainer.max_steps={length}"]
            config = tiny_config(tmp_path, *told)
            stages.run(config)
        steps = {step for metric, step in rows(config, "diffusion") if metric == "diffusion/val_loss"}
        found.append((steps, rows(config, "diffusion")["diffusion/val_loss", "7"]))
    assert found[0][0] == {"1", "3", "5", "7"} and found[0] == found[1]


def test_another_accumulation_takes_whole_steps_from_where_the_run_stands(tmp_path):
    """Three steps of one batch of 8, then of two of 4: the fourth is of two batches, and validated in its turn."""
    record = "+callbacks.record={_target_: probes.Record}"
    common = ["optim.schedule=constant", "trainer.val_every=2", record]
    stages.run(tiny_config(tmp_path, *common, "trainer.max_steps=3"))
    Record.rows.clear()
    halves = ["trainer.max_steps=6", "data.batch_size=4", "trainer.accumulate_grad_batches=2"]
    config = tiny_config(tmp_path, *common, *halves)
    stages.run(config)
    assert [row["step"] for row in Record.rows if row["stage"] == "diffusion"] == [3, 4, 4, 5, 5, 6]
    steps = {step for metric, step in rows(config, "diffusion") if metric == "diffusion/val_loss"}
    assert {"3", "5"} <= steps


def test_the_first_step_of_a_longer_run_has_its_own_rate(tmp_path):
    stages.run(tiny_config(tmp_path, "optim.schedule=linear", "trainer.max_steps=2", "optim.lr=0.01"))
    before = checkpoint(tiny_config(tmp_path), "diffusion")["state_dict"]
    config = tiny_config(tmp_path, "optim.schedule=linear", "trainer.max_steps=3", "optim.lr=0.01")
    stages.run(config)
    after = checkpoint(config, "diffusion")["state_dict"]
    assert any(not torch.equal(before[key], after[key]) for key in before if key.startswith("network."))


def test_a_shorter_run_than_was_trained_is_refused(tmp_path):
    stages.run(tiny_config(tmp_path, "trainer.max_steps=4"))
    with pytest.raises(UserError, match=r"at step 4, past the 2 .*resume=never"):
        stages.run(tiny_config(tmp_path, "trainer.max_steps=2"))
    config = tiny_config(tmp_path, "trainer.max_steps=2", "resume=never")
    stages.run(config)
    assert checkpoint(config, "diffusion")["global_step"] == 2


def test_a_killed_run_is_resumed_at_its_end_too(tmp_path):
    """Killed after the last step, before the result was written: nothing is left to train, all to export."""
    config = tiny_config(tmp_path)
    stages.run(config)
    (Path(config.run_dir) / "model" / "stage.json").unlink()
    before = load_weights(Path(config.run_dir) / "model" / "unet")
    assert not stages.is_done(config, "diffusion")
    stages.run(config)
    assert stages.is_done(config, "diffusion")
    assert_equal(load_weights(Path(config.run_dir) / "model" / "unet"), before)
