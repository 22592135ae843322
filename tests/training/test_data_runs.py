"""Runs over pictures on disk: gone on from to the bit when interrupted, ended with a word when the data give way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from ldm.config import TrainConfig, check
from ldm.errors import UserError
from ldm.training import fit, stages
from probes import Stopped
from runs import ROOT, TINY_OWN, compose_values
from sets import parquet_folder, picture_folder, png, shard_folder, texts
from training_checks import assert_equal

NUM = 30
RUN = [
    *TINY_OWN, "data.batch_size=4", "data.max_bad=0.2",
    "trainer.max_steps=14", "trainer.checkpoint_every=4", "trainer.val_every=100", "trainer.val_batches=1",
]  # fmt: skip


def images() -> list[bytes]:
    rng = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 256, (NUM, 3), generator=rng).tolist()
    sizes = [(20, 20), (40, 20), (20, 30)]
    pictures = [png(tuple(colour), sizes[i % 3]) for i, colour in enumerate(colours)]
    pictures[7] = pictures[7][:40]  # left out, or replaced as it is met
    return pictures


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    parquet_folder(root / "parquet", images=images(), words=[[text, f"{text} again"] for text in texts(NUM)])
    shard_folder(root / "shards", images(), texts(NUM), size=4)
    picture_folder(root / "folder", [f"{i}.png" for i in range(9)])
    return root


def arguments(kind: str, sets: Path) -> list[str]:
    """What makes up a run over each kind of source, without a cache where that is where the order is decided."""
    parquet = [f"data.path={sets}/parquet", "data.caption_column=words"]
    return {
        "buckets": [
            "data=hub", *parquet, "data.buckets=true", "data.crop=random", "data.flip=true", "data.cache=false",
        ],
        "cached buckets": ["data=hub", *parquet, "data.buckets=true", "data.crop=random", "data.variants=3"],
        "mix": [
            "data=mix", "+source@data.sources.a=folder", f"data.sources.a.path={sets}/folder",
            "+data.sources.a.weight=2", "+source@data.sources.b=shards", f"data.sources.b.path={sets}/shards",
            "data.cache=false",
        ],
        "stream": ["data=shards", f"data.path={sets}/shards", "data.streaming=true", "data.cache=false"],
        "streamed rows": ["data=hub", *parquet, "data.streaming=true", "data.cache=false"],
    }[kind]  # fmt: skip


def config_of(kind: str, sets: Path, root: Path, name: str, *overrides: str):
    values = [*RUN, *arguments(kind, sets), f"output_dir={root}", f"name={name}", *overrides]
    return check(TrainConfig, compose_values("train", values))


@pytest.mark.parametrize("kind", ["buckets", "cached buckets", "mix", "stream", "streamed rows"])
def test_an_interrupted_run_goes_on_to_the_bit_with_other_workers(kind, sets, tmp_path):
    whole = config_of(kind, sets, tmp_path, "whole")
    stages.run(whole)
    with pytest.raises(Stopped):
        crash = "+callbacks.x={_target_: probes.StopAt, stage: diffusion, step: 10}"
        stages.run(config_of(kind, sets, tmp_path, "crashed", crash))
    resumed = config_of(kind, sets, tmp_path, "crashed", "data.num_workers=2")
    assert torch.load(fit.checkpoint_path(resumed, "diffusion"), weights_only=True)["global_step"] == 8
    stages.run(resumed)
    ours, theirs = (
        torch.load(fit.checkpoint_path(config, "diffusion"), weights_only=True) for config in (resumed, whole)
    )
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_equal(ours[part], theirs[part], part)


def test_a_set_that_changed_is_not_gone_on_with(tmp_path, capsys):
    folder = picture_folder(tmp_path / "set", [f"{i}.png" for i in range(12)])

    def run(*overrides: str) -> None:
        values = [*RUN, "data=folder", f"data.path={folder}", f"output_dir={tmp_path}", *overrides]
        stages.run(check(TrainConfig, compose_values("train", values)))

    run("name=one", "trainer.max_steps=2", "optim.schedule=constant")
    (folder / "3.png").write_bytes(png((200, 0, 0)))
    with pytest.raises(UserError, match=r"other pictures or captions than are there now.*name=…"):
        run("name=one", "trainer.max_steps=4", "optim.schedule=constant")
    capsys.readouterr()
    run("name=two", "trainer.max_steps=2")
    said = capsys.readouterr().out
    for stage in ("autoencoder", "clip"):
        assert f"! the pictures or captions have changed since stage '{stage}' was trained" in said


class Training:
    """`train.py` in a process of its own, that would train for hours."""

    def __init__(self, folder: Path, sets: Path) -> None:
        self.folder = folder
        self.checkpoint = folder / "run" / "checkpoints" / "diffusion" / "last.ckpt"
        values = [
            *RUN, "data=folder", f"data.path={sets}", f"output_dir={folder}", "name=run", "data.cache=false",
            "data.num_workers=1", "trainer.max_steps=1000000", "trainer.checkpoint_every=2",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *values], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not self.checkpoint.exists() and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert self.checkpoint.exists(), self.process.communicate()[0]

    def end(self) -> str:
        """Return what it said, once it has ended by itself within a minute; its last checkpoint is whole."""
        try:
            said, _ = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        assert self.process.returncode == 2, said
        assert torch.load(self.checkpoint, weights_only=True)["global_step"] >= 2
        return said.splitlines()[-1]


@pytest.fixture
def training(tmp_path):
    picture_folder(tmp_path / "set", [f"{i}.png" for i in range(12)])
    run = Training(tmp_path / "out", tmp_path / "set")
    yield run
    run.process.kill()


@pytest.mark.slow
def test_a_loader_process_that_is_killed_ends_the_run_with_a_word(training):
    children = psutil.Process(training.process.pid).children()
    (worker,) = [child for child in children if "resource_tracker" not in str(child.cmdline())]
    worker.send_signal(signal.SIGKILL)
    said = training.end()
    assert said.startswith("error: a loader process is gone") and "data.num_workers" in said


@pytest.mark.slow
def test_a_set_that_shrinks_ends_the_run_with_a_word(training, tmp_path):
    for i in range(12):
        (tmp_path / "set" / f"{i}.png").unlink()
    assert "was there when training began and cannot be read now" in training.end()
