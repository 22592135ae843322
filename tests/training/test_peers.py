"""One rank fails, is killed or hangs: all end within a stated time, its error is shown once, the run can go on."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ldm.training.peers import SILENT, Clock
from runs import ROOT, TINY
from training_checks import assert_equal

# ------------------------------------------------------------------------------------------------ who is it that hangs


def beat(number: int, batch: int, phase: int = 1, busy: str | None = None, waits: bool = False) -> dict:
    place = {"place": [batch, phase], "waits": waits, "where": "somewhere"}
    return {"number": number, **place, "busy": busy, "host": "here", "pid": 7}


def faults(timeout: float, *looks: list[dict], every: float = 1.0) -> list:
    """Look at the beats of all ranks again and again."""
    clock = Clock(timeout, 0.0)
    return [clock.fault(dict(enumerate(beats)), every * (i + 1)) for i, beats in enumerate(looks)]


def test_the_rank_that_is_behind_hangs():
    looks = [[beat(i, 5, 2), beat(i, 5, 1), beat(i, 5, 2)] for i in range(8)]
    found = faults(5.0, *looks)
    assert found[:6] == [None] * 6
    rank, text = found[6]
    assert rank == 1 and text.startswith("rank 1 (process 7 on here) hangs: for 6 s no rank has gone on")


def test_of_ranks_at_one_place_that_hangs_which_waits_for_no_other():
    looks = [[beat(i, 5, waits=True), beat(i, 5), beat(i, 5, waits=True)] for i in range(8)]
    assert faults(5.0, *looks)[6][0] == 1


def test_as_long_as_one_rank_goes_on_none_hangs():
    assert not any(faults(5.0, *([beat(i, i // 4), beat(i, i // 4)] for i in range(40))))


def test_work_that_may_take_long_stops_the_clock():
    drawing = [[beat(i, 5, 4, "measuring"), beat(i, 5, 4)] for i in range(50)]
    after = [[beat(50 + i, 5, 4), beat(50 + i, 5, 4)] for i in range(7)]
    found = faults(5.0, *drawing, *after)
    assert not any(found[:-2]) and found[-1] is not None


def test_a_rank_without_a_beat_hangs_whatever_it_does():
    looks = [[beat(i, 5, 4, "measuring"), beat(3, 5, 4)] for i in range(1, int(SILENT) + 6)]
    found = faults(5.0, *looks)
    rank, text = found[-1]
    assert rank == 1 and "has given no sign for 6" in text
    assert not any(found[: int(SILENT)])


def test_a_job_that_was_stopped_for_a_while_does_not_hang():
    looks = [[beat(i, 5), beat(i, 5)] for i in range(4)]
    assert not any(faults(5.0, *looks, every=100.0))


# --------------------------------------------------------------------------------------------------- real processes

PAIR = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
NINE = ["stages=[clip]", "clip.max_steps=9", "trainer.checkpoint_every=1", "trainer.timeout_minutes=0.25"]
LIMIT = 90  # seconds from the event to the end of all processes: well below half a minute where nothing else runs
START, BACK, END = "on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"
LOOKED = "on_validation_batch_start"
RAISED = r"probes\.Stopped: broken on purpose\nerror: rank {} of 2 failed; it was at step {} of clip, in"
HANGS = r"error: rank {} \(process \d+ on .*\) hangs: .* it is at step {} of clip, in {}"
GONE = r"error: the first rank of this node \(process \d+\) is gone, the others end"
KILLED = r"error: rank 1 \(process \d+ on .*\) was killed by SIGKILL; it was .*\. The same command"
# One after another in the same run: step, rank, event, hook, exit code, what is said.
EVENTS = [
    (1, 1, "raise", START, 1, RAISED.format(1, 1)),
    (2, 0, "raise", BACK, 1, RAISED.format(0, 2)),
    (3, 1, "user_error", END, 2, r"error: rank 1: bad on purpose"),
    (4, 1, "kill", START, 1, KILLED),
    (5, 0, "kill", START, -9, GONE),
    (6, 1, "hang", START, 1, HANGS.format(1, 6, "the forward pass")),
    (8, 0, "hang", LOOKED, 1, HANGS.format(0, 8, "validation, batch 0")),
]


def type_it(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *TINY, *PAIR, *NINE, f"output_dir={folder}/out", *arguments]
    # The pipes are open as long as any rank lives: when this returns all have ended.
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=folder)


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "out/shapes/checkpoints/clip/last.ckpt", weights_only=True)


@pytest.mark.slow
def test_all_ranks_end_and_the_run_goes_on(tmp_path):
    happening = []
    for i, (step, rank, event, hook, *_) in enumerate(EVENTS):
        where = f"stage: clip, step: {step}, rank: {rank}, event: {event}, marker: {tmp_path}/{i}, hook: {hook}"
        happening.append(f"+callbacks.event{i}={{_target_: probes.RankEvent, {where}}}")
    for i, (step, _, event, hook, code, said) in enumerate(EVENTS):
        done = type_it(tmp_path, *happening)
        assert time.time() - (tmp_path / str(i)).stat().st_mtime < LIMIT, done.stderr
        assert done.returncode == code, (event, done.stderr)
        assert re.search(said, done.stderr), (event, done.stderr)
        assert len(re.findall("^error: ", done.stderr, re.MULTILINE)) == 1, (event, done.stderr)
        assert ("hangs here:" in done.stderr and "in _happen" in done.stderr) == (event == "hang")
        # The checkpoint of a step is written when the next one starts: it may not have come to that.
        before = step - (hook in (START, END))
        saved = checkpoint(tmp_path)["global_step"] if list(tmp_path.rglob("last.ckpt")) else 0
        assert before <= saved <= step, (event, saved)
    again = type_it(tmp_path, *happening)
    assert again.returncode == 0 and "going on from step" in again.stdout, again.stderr
    whole = tmp_path / "whole"
    whole.mkdir()
    done = type_it(whole)
    assert done.returncode == 0, done.stderr
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_equal(checkpoint(tmp_path)[part], checkpoint(whole)[part], part)
