"""A long run holds no more at its end than after its first steps: memory, open files, threads, processes, objects."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from runs import ROOT, TINY

WARM = 200  # steps: by then everything has been done some times
WINDOW = 300  # steps whose median is compared


def usage(folder: Path, *overrides: str) -> list[dict]:
    """Train in a process of its own; return what it held at every tenth step of the last stage."""
    path = folder / "usage.jsonl"
    arguments = [
        *TINY, f"output_dir={folder}/out", "trainer.val_every=50", "trainer.checkpoint_every=50",
        "callbacks.samples.every=50", "evaluation.metrics=[prompt_accuracy]", "evaluation.every=250",
        "evaluation.num_prompts=4", "evaluation.batch_size=4",
        f"+callbacks.usage={{_target_: probes.Usage, path: {path}}}", *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["stage"] == "diffusion" and row["step"] > WARM]


def check_flat(rows: list[dict]) -> None:
    """Compare what was held after warm-up with what was held at the end."""
    last = rows[-1]["step"]
    begin = [row for row in rows if row["step"] <= WARM + WINDOW]
    end = [row for row in rows if row["step"] > last - WINDOW]
    then, now = ({key: median(row[key] for row in part) for key in rows[0] if key != "stage"} for part in (begin, end))
    print(f"after warm-up {then}, at the end {now}")
    assert now["rss"] < 1.02 * then["rss"]
    for key in ("files", "threads", "children"):
        assert now[key] <= then[key], key
    assert now["objects"] - then["objects"] < (now["step"] - then["step"]) / 2  # nothing is kept of every step


def test_what_grows_is_noticed():
    row = {"stage": "diffusion", "rss": 900_000, "files": 7, "threads": 4, "children": 0, "objects": 500_000}
    steps = range(WARM + 10, 2001, 10)
    check_flat([{**row, "step": step} for step in steps])
    for key, rate in (("rss", 15), ("files", 1 / 50), ("threads", 1 / 500), ("children", 1 / 500), ("objects", 1)):
        with pytest.raises(AssertionError):
            check_flat([{**row, "step": step, key: row[key] + step * rate} for step in steps])


@pytest.mark.slow
def test_memory_is_flat_over_2000_steps(tmp_path):
    """With validation, pictures, metrics and checkpoints forty times each."""
    rows = usage(tmp_path, "trainer.max_steps=2000")
    assert rows[-1]["step"] == 2000
    check_flat(rows)
    run_dir = tmp_path / "out" / "shapes"
    assert len(list((run_dir / "samples" / "diffusion").iterdir())) == 40


@pytest.mark.slow
def test_memory_is_flat_with_loader_processes(tmp_path):
    """Pictures decoded in other processes, which stay through validation."""
    rows = usage(tmp_path, "trainer.max_steps=700", "data.cache=false", "data.num_workers=1")
    check_flat(rows)
    assert rows[-1]["children"] == 2  # of training, and of validation
