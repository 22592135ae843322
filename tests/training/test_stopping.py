"""SIGTERM, SIGUSR1 and Ctrl-C: the step in hand is finished, a checkpoint written, and the run can go on from it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.training import fit, stages
from runs import ROOT, TINY, tiny_config
from training_checks import assert_equal

FIVE = ["trainer.max_steps=5", "autoencoder.max_steps=5", "clip.max_steps=5", "trainer.checkpoint_every=100"]
CODES = [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)]


def killed_at(stage: str, step: int, signum: int, folder: Path) -> str:
    where = f"stage: {stage}, step: {step}, marker: {folder}/killed, signum: {int(signum)}"
    return f"+callbacks.kill={{_target_: probes.KillAt, {where}}}"


def checkpoint(config, stage: str) -> dict:
    return torch.load(fit.checkpoint_path(config, stage), weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("whole"), *FIVE)
    stages.run(config)
    return config


@pytest.mark.parametrize("stage", ["autoencoder", "clip", "diffusion"])
@pytest.mark.parametrize(("signum", "code"), CODES)
def test_the_step_is_finished_and_the_run_goes_on_from_it(stage, signum, code, whole, tmp_path, capsys):
    root = whole.output_dir if stage == "diffusion" else tmp_path
    only = [f"stages=[{stage}]", f"name=stopped-{signum.name}"]
    config = tiny_config(root, *FIVE, *only, killed_at(stage, 2, signum, tmp_path))
    before = {each: signal.getsignal(each) for each, _ in CODES}
    with pytest.raises(SystemExit) as ended:
        stages.run(config)
    assert ended.value.code == code
    assert {each: signal.getsignal(each) for each, _ in CODES} == before
    assert "stopped after step 3; the same command goes on from there" in capsys.readouterr().out
    found = checkpoint(config, stage)
    assert found["global_step"] == 3  # step 2 is the third, and was in hand
    if stage == "diffusion":  # weights and average each in its place
        state = found["state_dict"]
        name = next(key for key in state if key.startswith("network.") and key.endswith("conv_in.weight"))
        assert not torch.equal(state[name], state[name.replace("network.", "ema.average.", 1)])
    stages.run(config)
    assert "going on from step 3" in capsys.readouterr().out
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_equal(checkpoint(config, stage)[part], checkpoint(whole, stage)[part], part)


def test_of_batches_that_make_a_step_none_is_lost(whole, tmp_path):
    """A signal in the first half of a step waits for the second."""
    halves = ["trainer.accumulate_grad_batches=2", "stages=[diffusion]"]
    runs = [
        tiny_config(whole.output_dir, *FIVE, *halves, "name=halves"),
        tiny_config(whole.output_dir, *FIVE, *halves, "name=halves-stopped", killed_at("diffusion", 2, 15, tmp_path)),
    ]
    stages.run(runs[0])
    with pytest.raises(SystemExit):
        stages.run(runs[1])
    assert checkpoint(runs[1], "diffusion")["global_step"] == 3
    stages.run(runs[1])
    assert_equal(*(checkpoint(run, "diffusion")["state_dict"] for run in runs))


def test_no_grid_and_no_validation_is_made_on_the_way_out(whole, tmp_path):
    name = ["stages=[diffusion]", "name=quick", "callbacks.samples.every=1000", "trainer.val_every=100"]
    config = tiny_config(whole.output_dir, *FIVE, *name, killed_at("diffusion", 2, signal.SIGTERM, tmp_path))
    with pytest.raises(SystemExit):
        stages.run(config)
    assert not list(Path(config.run_dir).glob("samples/*/*")) and not (Path(config.run_dir) / "metrics.csv").exists()


TWICE = """
import os, signal, sys, time
import pytorch_lightning as pl

class Twice(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 2:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)
            print("still here", flush=True)
"""


def type_it(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT / "tests"), str(folder)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, ROOT / "train.py", *TINY, *FIVE, "stages=[clip]", f"output_dir={folder}/out", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=folder)


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    (tmp_path / "twice.py").write_text(TWICE)
    done = type_it(tmp_path, "+callbacks.twice={_target_: twice.Twice}")
    assert done.returncode == 143, done.stderr
    assert "SIGTERM: stopping after this step; once more stops at once" in done.stderr
    assert "still here" not in done.stdout and "Traceback" not in done.stderr
    assert not list((tmp_path / "out").rglob("*.ckpt"))


def test_on_slurm_the_job_is_put_into_the_queue_again(tmp_path):
    """SIGUSR1 comes before a job's time is over; `scontrol` is one that notes what it is asked."""
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    tool.chmod(0o755)
    kill = killed_at("clip", 2, signal.SIGUSR1, tmp_path)
    path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
    done = type_it(tmp_path, kill, PATH=path, SLURM_JOB_ID="4711")
    assert done.returncode == 143, done.stderr
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert "job 4711 is in the queue again" in done.stdout
    again = type_it(tmp_path, kill, PATH=path, SLURM_JOB_ID="4711")
    assert again.returncode == 0 and "going on from step 3" in again.stdout, again.stderr


@pytest.mark.slow
def test_ranks_stop_after_the_same_step(tmp_path):
    """One of two ranks gets the signal."""
    pair = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
    kill = killed_at("clip", 2, signal.SIGTERM, tmp_path)
    done = type_it(tmp_path, *pair, kill)
    assert done.returncode == 143, done.stderr
    assert done.stdout.count("stopped after step 3") == 1
    again = type_it(tmp_path, *pair, kill)
    assert again.returncode == 0 and "going on from step 3" in again.stdout, again.stderr
