"""`resume=auto` as it is typed: which checkpoint a run goes on from, and what is said where it does not."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from ldm.training import fit
from ldm.training.checkpointing import newest_whole
from probes import Stopped
from runs import TINY, TINY_OWN, run_script, tiny_config
from sets import png, sidecar_folder
from training_checks import assert_equal

LONG = ["stages=[clip]", "clip.max_steps=7", "trainer.checkpoint_every=2"]
CRASH = "+callbacks.x={_target_: probes.StopAt, stage: clip, step: 6}"


def train(folder: Path, *overrides: str) -> int:
    return run_script("train", *TINY, *LONG, f"output_dir={folder / 'out'}", *overrides)


@pytest.fixture(scope="module")
def crashed(tmp_path_factory) -> Path:
    """A folder of a run that left checkpoints of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("crashed")
    with pytest.raises(Stopped):
        train(folder, CRASH)
    return folder


@pytest.fixture
def last(crashed, tmp_path, capsys) -> Path:
    """The last of the two checkpoints, in a copy."""
    shutil.copytree(crashed / "out", tmp_path / "out")
    capsys.readouterr()
    path = fit.checkpoint_path(tiny_config(tmp_path / "out", *LONG), "clip")
    assert steps(path.parent) == {"last.ckpt": 6, "previous.ckpt": 4}
    return path


def steps(folder: Path) -> dict[str, int]:
    return {path.name: torch.load(path, weights_only=True)["global_step"] for path in sorted(folder.iterdir())}


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_the_newest_is_taken_and_said(last, tmp_path, capsys):
    assert train(tmp_path) == 0
    out = capsys.readouterr().out
    assert f"going on from step 6 ({last})" in out and "warning" not in out


def test_a_broken_one_is_named_in_a_warning_and_the_one_before_is_taken(last, tmp_path, capsys):
    damage(last)
    assert train(tmp_path) == 0
    out = capsys.readouterr().out
    assert re.search(rf"warning: {re.escape(str(last))} cannot be read: \S+ is not what was written", out)
    assert f"going on from step 4 ({last.with_name('previous.ckpt')})" in out


def test_a_broken_one_never_takes_the_place_of_a_whole_one(last, tmp_path, monkeypatch):
    """Killed as the next checkpoint takes its name: what it went on from is there still."""
    damage(last)
    import os

    real = os.replace

    def killed(source, target):
        if Path(target).name == "last.ckpt":
            raise Stopped
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(Stopped):
            train(tmp_path)
    assert newest_whole(last.parent)[1].step == 4
    assert train(tmp_path) == 0
    assert steps(last.parent) == {"last.ckpt": 7, "previous.ckpt": 6}


def test_none_that_is_whole(last, tmp_path, capsys):
    for path in last.parent.iterdir():
        damage(path)
    before = files(tmp_path)
    assert train(tmp_path) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "last.ckpt cannot be read" in err and "previous.ckpt cannot be read" in err
    assert err.rstrip().endswith("to start anew over it: resume=never") and files(tmp_path) == before
    assert train(tmp_path, "resume=never") == 0
    assert "going on" not in capsys.readouterr().out and steps(last.parent) == {"last.ckpt": 7, "previous.ckpt": 6}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("clip.optim.lr=0.25", "clip.optim.lr: 0.001 then, 0.25 now"),
        ("text_encoder.projection_dim=12", "text_encoder.projection_dim: 8 then, 12 now"),
        ("seed=1", "seed: 0 then, 1 now"),
        ("data.num_train=65", "data.num_train: 64 then, 65 now"),
        ("clip.batch_size=4", "clip.batch_size: 8 then, 4 now"),
    ],
)
def test_a_changed_config_says_what_changed_and_how_to_start_anew(override, told, last, tmp_path, capsys):
    before = files(tmp_path)
    assert train(tmp_path, override) == 2
    err = capsys.readouterr().err
    assert err == (
        f"error: {last} was trained with another config ({told}). Give this run a name of its own (name=…), or start "
        "it anew over the old one (resume=never)\n"
    )
    assert files(tmp_path) == before


def test_a_secret_in_what_decides_the_weights(tmp_path, monkeypatch, capsys):
    """Another one is another config, and without the variable it is the same: the checkpoint has a digest of it."""

    def train_on(name: str, *overrides: str) -> int:  # as a shell puts $SET_KEY into the command
        said = [*TINY_OWN, *LONG, f"output_dir={tmp_path / 'out'}", "data=folder", f"data.path={tmp_path}/{name}"]
        return run_script("train", *said, *overrides)

    for name in ("cats-2024", "dogs-2024"):
        sidecar_folder(tmp_path / name, [png((9 * i, 0, 0), (16, 16)) for i in range(12)], ["a star"] * 12)
    monkeypatch.setenv("SET_KEY", "cats-2024")
    with pytest.raises(Stopped):
        train_on("cats-2024", CRASH)
    [kept] = (tmp_path / "out").glob("*/checkpoints/clip/last.ckpt")
    assert "cats-2024" not in repr(torch.load(kept, weights_only=True)["identity"])
    monkeypatch.setenv("SET_KEY", "dogs-2024")
    assert train_on("dogs-2024") == 2
    told = re.search(r"data\.path: (\S+ sha256:\w+) then, (\S+ sha256:\w+) now", capsys.readouterr().err)
    assert told and told[1] != told[2] and told[1].startswith(f"{tmp_path}/${{oc.env:SET_KEY}} ")
    monkeypatch.delenv("SET_KEY")
    assert train_on("cats-2024") == 0
    assert "going on from step 6" in capsys.readouterr().out


def test_both_ways_to_start_anew(last, tmp_path, capsys):
    before = files(last.parents[2])
    assert train(tmp_path, "seed=1", "name=other") == 0
    assert files(last.parents[2]) == before
    assert train(tmp_path, "seed=2", "resume=never") == 0
    assert "going on" not in capsys.readouterr().out and steps(last.parent) == {"last.ckpt": 7, "previous.ckpt": 6}


def test_more_steps_are_the_same_run(last, tmp_path, capsys):
    assert train(tmp_path, "clip.max_steps=9") == 0
    assert "going on from step 6" in capsys.readouterr().out
    assert train(tmp_path, "clip.max_steps=10") == 0
    assert "going on from step 9" in capsys.readouterr().out
    assert train(tmp_path, "clip.max_steps=9", "resume=auto") == 0  # its result is there
    assert train(tmp_path, "clip.max_steps=8") == 2
    err = capsys.readouterr().err
    assert "at step 10, past the 8 that this run asks for" in err and "resume=never" in err


def test_what_decides_no_weights_is_no_change(last, tmp_path, capsys, recwarn):
    others = ["data.num_workers=1", "trainer.checkpoint_every=3", "trainer.val_every=3", "data.cache=false"]
    assert train(tmp_path, *others) == 0
    assert "going on from step 6" in capsys.readouterr().out
    assert not [each for each in recwarn if "checkpoint" in str(each.message)]


def test_a_run_that_was_moved_or_copied_goes_on_where_it_is(crashed, last, tmp_path, capsys):
    first = crashed / "out"
    before = files(first)
    assert train(tmp_path) == 0
    assert "going on from step 6" in capsys.readouterr().out and files(first) == before
    assert train(crashed) == 0
    original = fit.checkpoint_path(tiny_config(first, *LONG), "clip")
    assert_equal(*(torch.load(path, weights_only=True)["state_dict"] for path in (last, original)))
