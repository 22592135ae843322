"""Averages that a run keeps for later, and what `convert.py … ema=` makes of them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm.config import TrainConfig
from ldm.errors import UserError
from ldm.training import stages
from ldm.training.ema import PowerEMA
from ldm.training.networks import build_unet, load_frozen
from ldm.weights.folder import load_weights
from ldm.weights.posthoc import FOLDER
from probes import Record, Stopped
from runs import run_script, tiny_config
from training_checks import assert_equal

LENGTHS = (0.05, 0.1)
KEEP = "diffusion.posthoc_ema={lengths: [0.05, 0.1], every: 4}"
RUN = ["stages=[diffusion]", KEEP, "trainer.max_steps=14", "trainer.checkpoint_every=5", "trainer.val_every=100"]
RECORD = "+callbacks.record={_target_: probes.Record}"


def averages(config: TrainConfig) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted((Path(config.run_dir) / FOLDER).iterdir())}


@pytest.fixture(scope="module")
def run(finished) -> Any:
    """A run with averages, and the weights after each of its steps."""
    Record.weights.clear()
    config = tiny_config(finished.output_dir, *RUN, "name=averages", RECORD)
    stages.run(config)
    return config, list(Record.weights["diffusion"])


def test_a_run_keeps_every_length_every_so_many_steps_and_at_the_end(run):
    assert list(averages(run[0])) == [
        f"step-{step:07d}-length-{length}.safetensors" for step in (4, 8, 12, 14) for length in LENGTHS
    ]


def test_they_are_the_averages_of_a_reference_loop(run):
    config, states = run
    vae, conditioner = load_frozen(config)
    network = build_unet(config, vae, conditioner.text_tower.config["hidden_size"])
    for length in LENGTHS:
        average = PowerEMA(network, length)
        for step, state in enumerate(states, start=1):
            network.load_state_dict(state)
            average.update(network)
            if step in (4, 14):
                kept = averages(config)[f"step-{step:07d}-length-{length}.safetensors"]
                for name, tensor in average.average.state_dict().items():
                    torch.testing.assert_close(kept[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_run_that_was_interrupted_keeps_the_same(run, finished):
    arguments = [*RUN, "name=interrupted"]
    with pytest.raises(Stopped):  # after step 8 was kept: it comes again
        crash = "+callbacks.x={_target_: probes.StopAt, stage: diffusion, step: 9}"
        stages.run(tiny_config(finished.output_dir, *arguments, crash))
    config = tiny_config(finished.output_dir, *arguments)
    assert len(averages(config)) == 4
    stages.run(config)
    assert_equal(averages(config), averages(run[0]))


def test_a_run_that_starts_anew_leaves_none_of_the_old(finished):
    arguments = [*RUN, "name=anew"]
    stages.run(tiny_config(finished.output_dir, *arguments))
    config = tiny_config(finished.output_dir, *arguments, "trainer.max_steps=5", "resume=never")
    stages.run(config)
    assert [name[5:12] for name in averages(config)][::2] == ["0000004", "0000005"]


def test_the_doctor_touches_none(run, finished, capsys):
    before = averages(run[0])
    with pytest.raises(SystemExit):
        stages.run(tiny_config(finished.output_dir, *RUN, "name=averages", "doctor=true", "trainer.max_steps=15"))
    assert_equal(averages(run[0]), before)


def test_a_full_disk_is_told(finished, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldm.training.posthoc.save_snapshot", full)
    with pytest.raises(UserError, match=r"length-0\.05\.safetensors cannot be written: No space left .*every"):
        stages.run(tiny_config(finished.output_dir, *RUN, "name=full"))


# ----------------------------------------------------------------------------------------------------------- convert


def unet(folder: Path) -> dict[str, torch.Tensor]:
    return load_weights(folder / "unet")


@pytest.mark.parametrize("form", ["folder", "one.safetensors"])
def test_convert_writes_the_model_with_the_average(run, tmp_path, form, capsys):
    source = Path(run[0].run_dir)
    assert run_script("convert", f"src={source}", f"dst={tmp_path / form}", "ema=0.1") == 0
    assert "average  ema=0.1 after 14 steps; its profile is met but for 0.0%" in capsys.readouterr().out
    if form != "folder":
        assert run_script("convert", f"src={tmp_path / form}", f"dst={tmp_path / 'folder'}") == 0
    kept = averages(run[0])["step-0000014-length-0.1.safetensors"]
    assert_equal(dict(sorted(unet(tmp_path / "folder").items())), dict(sorted(kept.items())))
    assert_equal(load_weights(tmp_path / "folder" / "vae"), load_weights(source / "model" / "vae"))
    assert any(not torch.equal(kept[name], tensor) for name, tensor in unet(source / "model").items())


def test_convert_puts_together_what_was_not_kept(run, tmp_path):
    config, states = run
    assert run_script("convert", f"src={config.run_dir}", f"dst={tmp_path / 'x'}", "ema=0.08") == 0
    vae, conditioner = load_frozen(config)
    network = build_unet(config, vae, conditioner.text_tower.config["hidden_size"])
    average = PowerEMA(network, 0.08)
    for state in states:
        network.load_state_dict(state)
        average.update(network)
    found, expected = unet(tmp_path / "x"), average.average.state_dict()
    start = states[0]
    off = sum((found[name] - expected[name]).square().sum() for name in expected) ** 0.5
    moved = sum((expected[name] - start[name]).square().sum() for name in expected) ** 0.5
    assert off < 0.005 * moved  # found: 0.0005


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["src={run}", "ema=0.01"], "Within reach are"),
        (["src={run}", "ema=0.5"], "ema: "),
        (["src={run}", "ema=0"], "ema: "),
        (["src={run}/model", "ema=0.1"], "holds no averages"),
        (["src={run}/model/unet", "ema=0.1"], "name the run directory"),
        (["src={run}", "ema=0.1", "unet={run}/model/unet"], "leave one out"),
    ],
)
def test_convert_refuses(run, arguments, message, tmp_path, capsys):
    words = [word.format(run=run[0].run_dir) for word in arguments]
    assert run_script("convert", *words, f"dst={tmp_path / 'x'}") == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_convert_says_what_is_missing(run, tmp_path, capsys):
    shutil.copytree(run[0].run_dir, tmp_path / "run")
    (tmp_path / "run" / "ema" / "step-0000008-length-0.1.safetensors").unlink()
    assert run_script("convert", f"src={tmp_path / 'run'}", f"dst={tmp_path / 'x'}", "ema=0.08") == 0
    assert "note: without step-0000008-length-0.1.safetensors, which are missing" in capsys.readouterr().out
