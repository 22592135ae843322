"""Runs as processes of their own: two in one directory, one whose numbers end, one that is killed."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from runs import ROOT, TINY

BASE = [*TINY, "stages=[clip]", "clip.max_steps=6", "trainer.checkpoint_every=2"]


def command(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *BASE, f"output_dir={folder}/out", *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}


def train(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *overrides), env=environment(), capture_output=True, text=True, timeout=300, cwd=folder
    )


@contextmanager
def waiting_run(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run that waits in the middle of its training for as long as it is wanted."""
    wait = f"+callbacks.wait={{_target_: probes.WaitAt, step: 3, marker: {folder}/waits}}"
    process = subprocess.Popen(command(folder, wait), env=environment(), stdout=subprocess.DEVNULL, cwd=folder)
    try:
        deadline = time.monotonic() + 240
        while not (folder / "waits").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_second_run_is_told_who_holds_the_directory_and_takes_over_from_the_dead(tmp_path):
    run_dir = tmp_path / "out" / "shapes"
    with waiting_run(tmp_path) as process:
        before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
        second = train(tmp_path)
        assert second.returncode == 2 and "Traceback" not in second.stderr
        since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
        holder = rf"process {process.pid} on {re.escape(socket.gethostname())} since {since}"
        assert re.search(rf"{re.escape(str(run_dir))} is in use by {holder}; .*name=…", second.stderr), second.stderr
        assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
        assert process.poll() is None
    assert f"process {process.pid} " in (run_dir / ".lock").read_text()  # killed: the lock is stale
    third = train(tmp_path)
    assert third.returncode == 0 and "going on from step 2" in third.stdout, third.stderr
    assert f"process {process.pid} " not in (run_dir / ".lock").read_text()


@pytest.mark.parametrize(
    "overrides",
    [
        ["clip.optim.lr=1e30"],
        pytest.param(["clip.optim.lr=1e30", "trainer.max_skipped=100"], marks=pytest.mark.slow),
    ],
)
def test_numbers_that_end_never_reach_a_checkpoint(overrides, tmp_path):
    """Steps that are far too large, with nothing put in anybody's place."""
    done = train(tmp_path, *overrides, "clip.optim.clip_norm=null", "trainer.checkpoint_every=1")
    for path in tmp_path.rglob("*.ckpt"):
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(each.isfinite().all() for each in state.values() if each.is_floating_point()), path
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr
    if done.returncode == 2:
        assert re.search(r"error: clip, step \d+: ", done.stderr) and "clip.optim.lr" in done.stderr
        assert not list((tmp_path / "out" / "stages").glob("clip-*/stage.json"))
